// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/margay-cni/margay/pkg/netns"
)

// cnis are the other CNIs to compare with: the value of flag -cni, which may be repeated.
type cnis []*contender

func (c *cnis) String() string {
	var names []string
	for _, one := range *c {
		names = append(names, one.Name)
	}
	return strings.Join(names, ", ")
}

// Set reads [NAME=]DIR[,BINDIR], or NAME=CONFLIST,BINDIR.
func (c *cnis) Set(text string) error {
	name, rest, named := strings.Cut(text, "=")
	if !named {
		name, rest = "", text
	}
	path, bin, _ := strings.Cut(rest, ",")
	one, err := readCNI(path, bin)
	if err != nil {
		return err
	}
	if named {
		one.Name = name
	}
	if one.id = "cni-" + fileName(one.Name); one.Name == "" || slices.ContainsFunc(*c, func(other *contender) bool { return other.id == one.id }) {
		return fmt.Errorf("want names that differ, have %q", one.Name)
	}
	if err := one.check(); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	*c = append(*c, one)
	return nil
}

// readCNI reads a directory with contender.yaml, or a conflist alone. Paths are made absolute: the daemons may run elsewhere.
func readCNI(path, bin string) (one *contender, err error) {
	if bin != "" {
		if bin, err = filepath.Abs(bin); err != nil {
			return nil, err
		}
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		if bin == "" {
			return nil, errors.New("a conflist alone wants NAME=CONFLIST,BINDIR")
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		return &contender{Bin: bin, Conflist: path, templates: map[string]string{path: string(text)}, oneNode: true}, nil
	}
	if one, err = readContender(os.DirFS(path)); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if bin != "" {
		one.Bin = bin
	}
	if one.Bin == "" || filepath.IsAbs(one.Bin) || strings.HasPrefix(one.Bin, "{{") {
		return one, nil
	}
	one.Bin, err = filepath.Abs(filepath.Join(path, one.Bin))
	return one, err
}

// check finds what a run would only find after minutes: templates that cannot be filled, and programs that are not there. It must not
// happen that a program which bench has built takes the place of one that is missing: the comparison would be with itself.
func (c *contender) check() error {
	p := &placeholders{Node: "node1", Number: 1, Ranges: "[]", Built: "{built}"}
	text, err := c.conflist(p)
	if err != nil {
		return err
	}
	bin, err := c.bin(p)
	if err != nil {
		return err
	}
	ch, err := parseChain(text, bin)
	if err != nil {
		return err
	}
	for _, name := range c.Files {
		if _, err := p.fill(c.templates[name]); err != nil {
			return err
		}
	}
	programs, err := c.programs(p)
	if err != nil {
		return err
	}
	for _, plugin := range ch.plugins {
		programs = append(programs, []string{plugin.path})
	}
	for _, argv := range programs {
		if strings.HasPrefix(argv[0], p.Built) {
			continue // is built later
		}
		if _, err := os.Stat(argv[0]); err != nil {
			return err
		}
	}
	return nil
}

// chain is the plugins of a network with their configurations, in the order of ADD, and what ADD printed for each container: DEL is told.
// Any number of goroutines may use it, each for containers of its own.
type chain struct {
	plugins []*plugin
	in      string   // the node's network namespace; empty: the caller's
	results sync.Map // container ID → []byte
}

func newChain(plugins ...*plugin) *chain {
	return &chain{plugins: plugins}
}

// parseChain returns the plugins of a conflist.
func parseChain(conflist []byte, bin string) (*chain, error) {
	var list struct {
		Version string           `json:"cniVersion"`
		Name    string           `json:"name"`
		Plugins []map[string]any `json:"plugins"`
	}
	decoder := json.NewDecoder(bytes.NewReader(conflist))
	decoder.UseNumber() // numbers are handed on as they stand
	if err := decoder.Decode(&list); err != nil {
		return nil, fmt.Errorf("decode the conflist: %w", err)
	}
	if len(list.Plugins) == 0 {
		return nil, errors.New("the conflist has no plugins")
	}
	ch := newChain()
	for _, conf := range list.Plugins {
		binary, ok := conf["type"].(string)
		if !ok {
			return nil, errors.New("a plugin of the conflist has no type")
		}
		conf["cniVersion"], conf["name"] = list.Version, list.Name
		text, err := json.Marshal(conf)
		if err != nil {
			return nil, err
		}
		ch.plugins = append(ch.plugins, &plugin{path: filepath.Join(bin, binary), conf: text})
	}
	return ch, nil
}

// run executes a command of the whole chain, one plugin after the other as a runtime does, and returns what they cost together and the
// last one's output.
func (c *chain) run(ctx context.Context, command, id, ns string) (total cost, out []byte, err error) {
	plugins := slices.Clone(c.plugins)
	var previous []byte
	if command == "DEL" {
		slices.Reverse(plugins)
		if added, known := c.results.LoadAndDelete(id); known {
			previous = added.([]byte)
		}
	}
	for _, p := range plugins {
		p, err := p.withPrevious(previous)
		if err != nil {
			return total, nil, err
		}
		var took cost
		var printed []byte
		run := func() (err error) {
			took, printed, err = p.run(ctx, command, id, ns)
			return err
		}
		if c.in == "" {
			err = run()
		} else {
			err = netns.Do(c.in, run)
		}
		total.wall += took.wall
		total.cpu += took.cpu
		if err != nil {
			return total, nil, err
		}
		if command == "ADD" {
			previous, out = printed, printed
		}
	}
	if command == "ADD" {
		c.results.Store(id, out)
	}
	return total, out, nil
}

// withPrevious returns the plugin with the result of those before it in its configuration.
func (p *plugin) withPrevious(result []byte) (*plugin, error) {
	if len(result) == 0 {
		return p, nil
	}
	var conf map[string]json.RawMessage
	if err := json.Unmarshal(p.conf, &conf); err != nil {
		return nil, fmt.Errorf("decode the configuration: %w", err)
	}
	conf["prevResult"] = result
	text, err := json.Marshal(conf)
	if err != nil {
		return nil, fmt.Errorf("encode the configuration: %w", err)
	}
	return &plugin{path: p.path, conf: text}, nil
}
