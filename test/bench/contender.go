// SPDX-License-Identifier: Apache-2.0

package main

import (
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/template"
	"time"

	"sigs.k8s.io/yaml"
)

// contender is a way to give the nodes of a cluster a network: a CNI and what serves the services. contender.yaml in a directory of its own
// describes one, Margay's and the reference's as well as those of -cni. What is said to be a template may name placeholders.
type contender struct {
	Name string `json:"name"` // as the reports have it
	// Bin is the directory of its plugins and daemons, from contender.yaml on; empty: that of what bench builds. A template.
	Bin string `json:"bin"`
	// Conflist is the file of a node's list of plugins, beside contender.yaml. A template.
	Conflist string `json:"conflist"`
	// Files are further ones beside it, which each node has in its directory. Templates.
	Files []string `json:"files"`
	// Daemons are the programs that run on every node, with their arguments. Those without a slash are in Bin. Templates.
	Daemons [][]string `json:"daemons"`
	// DaemonsFirst has the daemons started before the pods, and ADD repeated until it succeeds: the plugin needs them.
	DaemonsFirst bool `json:"daemonsFirst"`
	// Routes gives every node static routes to the pods of the others.
	Routes bool `json:"routes"`
	// Services is how many services it is asked to serve at most; 0: none, not even one.
	Services int `json:"services"`
	// Patience is how many seconds a cluster may take until its pods and services answer and its daemons have come to rest; 0: 90.
	Patience int `json:"patience"`

	id        string            // a file name, and part of results' ids where it is Margay
	templates map[string]string // the conflist and the files
	oneNode   bool              // the conflist is one node's as it is: not for sections with several
	firstOnly bool              // the daemons run on the first node alone
	overlay   bool              // the nodes' own traffic goes by a VXLAN device of the kernel

	// settled says whether a node is as it will be after a while, for those whose daemons put something off; nil: it is when they are at rest.
	settled func(*clusterNode) (bool, error)
}

// placeholders are what the templates of a contender can name.
type placeholders struct {
	Node                       string // its name
	Number                     int    // 1, 2
	Address4, Address6         string // the node's own, on NIC
	NIC                        string
	MTU                        int    // of NIC, bytes
	PodCIDR4, PodCIDR6         string // the node's; the second is empty where only IPv4 is measured
	Ranges                     string // both, as the key ranges of host-local and margay-ipam has them: JSON
	ClusterCIDR4, ClusterCIDR6 string // of all pods
	ServiceCIDR4, ServiceCIDR6 string
	APIServer, Kubeconfig      string // HOST:PORT, and the path of a file
	Dir                        string // the node's own directory, for everything that is to be gone afterwards
	Built                      string // the directory of what bench builds
}

//go:embed contenders
var ownContenders embed.FS

// ownContender returns one of those that are always compared.
func ownContender(name string) (*contender, error) {
	dir, err := fs.Sub(ownContenders, "contenders/"+name)
	if err != nil {
		return nil, err
	}
	return readContender(dir)
}

// readContender reads contender.yaml and the files that it names.
func readContender(dir fs.FS) (*contender, error) {
	text, err := fs.ReadFile(dir, "contender.yaml")
	if err != nil {
		return nil, err
	}
	c := &contender{templates: map[string]string{}}
	if err := yaml.UnmarshalStrict(text, c); err != nil {
		return nil, fmt.Errorf("contender.yaml: %w", err)
	}
	if c.Name == "" || c.Conflist == "" {
		return nil, errors.New("contender.yaml: name and conflist are required")
	}
	for _, name := range append(slices.Clone(c.Files), c.Conflist) {
		text, err := fs.ReadFile(dir, name)
		if err != nil {
			return nil, err
		}
		c.templates[name] = string(text)
	}
	return c, nil
}

// with is the contender under another name, with further arguments for its first daemon.
func (c *contender) with(id, name string, arguments ...string) *contender {
	out := *c
	out.id, out.Name, out.Daemons = id, name, slices.Clone(c.Daemons)
	out.Daemons[0] = append(slices.Clone(c.Daemons[0]), arguments...)
	return &out
}

// onFirst is the contender with its daemons on the first node alone, if the other's pods are reached without them.
func (c *contender) onFirst() *contender {
	out := *c
	out.firstOnly = c.Routes
	return &out
}

// network says whether there is a CNI, and not the nodes alone.
func (c *contender) network() bool { return c.Conflist != "" }

// wait is how long a cluster may take until everything answers.
func (c *contender) wait() time.Duration {
	if c.Patience != 0 {
		return time.Duration(c.Patience) * time.Second
	}
	return patience
}

// Nodes without anything, for traffic between the nodes themselves: by the fabric, and by the kernel's own VXLAN over it, which no CNI that
// encapsulates can do without.
var (
	bare      = &contender{id: "bare", Name: "host ↔ host"}
	bareVXLAN = &contender{id: "bare-vxlan", Name: "host ↔ host, VXLAN", overlay: true}
)

// fill returns a template's text for a node.
func (p *placeholders) fill(text string) (string, error) {
	t, err := template.New("").Parse(text)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	if err := t.Execute(&b, p); err != nil {
		return "", err
	}
	return b.String(), nil
}

// bin is where the plugins and daemons are.
func (c *contender) bin(p *placeholders) (string, error) {
	if c.Bin == "" {
		return p.Built, nil
	}
	return p.fill(c.Bin)
}

// install writes a node's files and returns its conflist.
func (c *contender) install(p *placeholders) ([]byte, error) {
	for _, name := range c.Files {
		text, err := p.fill(c.templates[name])
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(p.Dir, filepath.Base(name)), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	return c.conflist(p)
}

func (c *contender) conflist(p *placeholders) ([]byte, error) {
	text, err := p.fill(c.templates[c.Conflist])
	return []byte(text), err
}

// programs returns a node's daemons with their arguments.
func (c *contender) programs(p *placeholders) (programs [][]string, err error) {
	if len(c.Daemons) == 0 || c.firstOnly && p.Number > 1 {
		return nil, nil
	}
	bin, err := c.bin(p)
	if err != nil {
		return nil, err
	}
	for _, templates := range c.Daemons {
		var argv []string
		for _, text := range templates {
			arg, err := p.fill(text)
			if err != nil {
				return nil, err
			}
			argv = append(argv, arg)
		}
		if len(argv) == 0 {
			return nil, errors.New("a daemon without a program")
		}
		if !strings.Contains(argv[0], "/") {
			argv[0] = filepath.Join(bin, argv[0])
		}
		programs = append(programs, argv)
	}
	return programs, nil
}
