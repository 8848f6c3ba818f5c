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
)

// cni is another CNI to compare with, as a node would have it: flag -cni.
type cni struct {
	name     string
	conflist []byte
	bin      string // directory of the plugins that the conflist names
}

// cnis is the value of a flag that may be repeated.
type cnis []cni

func (c *cnis) String() string {
	var names []string
	for _, one := range *c {
		names = append(names, one.name)
	}
	return strings.Join(names, ", ")
}

// Set reads NAME=CONFLIST,BINDIR.
func (c *cnis) Set(text string) error {
	name, rest, named := strings.Cut(text, "=")
	conflist, bin, both := strings.Cut(rest, ",")
	if !named || !both || name == "" || conflist == "" || bin == "" {
		return fmt.Errorf("want NAME=CONFLIST,BINDIR, have %q", text)
	}
	content, err := os.ReadFile(conflist)
	if err != nil {
		return err
	}
	if bin, err = filepath.Abs(bin); err != nil {
		return err
	}
	one := cni{name: name, conflist: content, bin: bin}
	if _, err := one.chain(); err != nil {
		return fmt.Errorf("%s: %w", conflist, err)
	}
	*c = append(*c, one)
	return nil
}

// chain is the plugins of a network with their configurations, in the order of ADD, and what ADD printed for each container: DEL is told.
// Any number of goroutines may use it, each for containers of its own.
type chain struct {
	plugins []*plugin
	results sync.Map // container ID → []byte
}

func newChain(plugins ...*plugin) *chain {
	return &chain{plugins: plugins}
}

// chain returns the plugins of the conflist.
func (c *cni) chain() (*chain, error) {
	var list struct {
		Version string           `json:"cniVersion"`
		Name    string           `json:"name"`
		Plugins []map[string]any `json:"plugins"`
	}
	decoder := json.NewDecoder(bytes.NewReader(c.conflist))
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
		ch.plugins = append(ch.plugins, &plugin{path: filepath.Join(c.bin, binary), conf: text})
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
		took, printed, err := p.run(ctx, command, id, ns)
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
