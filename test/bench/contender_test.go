// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
)

// A node's placeholders, with both families or without the second.
func testPlaceholders(dir string, families int) *placeholders {
	p := &placeholders{
		Node: "node2", Number: 2, PodCIDR4: "10.244.2.0/24", Ranges: `[[{"subnet":"10.244.2.0/24"}]]`, ClusterCIDR4: "10.244.0.0/16", ClusterCIDR6: "fd00:244::/32",
		Kubeconfig: "/kubeconfig", Dir: dir, Built: "/built",
	}
	if families == 2 {
		p.PodCIDR6, p.Ranges = "fd00:244:2::/64", `[[{"subnet":"10.244.2.0/24"}],[{"subnet":"fd00:244:2::/64"}]]`
	}
	return p
}

// What bench always compares is described as what -cni takes, and can be given to it under another name.
func TestOwnContenders(t *testing.T) {
	for name, want := range map[string]struct {
		plugins []string
		daemon  string
		routes  bool
	}{
		"margay":         {[]string{"/built/margay"}, "/built/margay-agent --node node2 --kubeconfig /kubeconfig", false},
		"ptp-kube-proxy": {[]string{"/built/ptp", "/built/portmap"}, "/built/kube-proxy --kubeconfig /kubeconfig --hostname-override node2 --proxy-mode nftables", true},
	} {
		c, err := ownContender(name)
		if err != nil {
			t.Fatal(err)
		}
		for families := 1; families <= 2; families++ {
			p := testPlaceholders(t.TempDir(), families)
			text, err := c.install(p)
			if err != nil {
				t.Fatal(err)
			}
			ch, err := parseChain(text, p.Built)
			if err != nil {
				t.Fatalf("%s: %v in %s", name, err, text)
			}
			var plugins []string
			for _, p := range ch.plugins {
				plugins = append(plugins, p.path)
			}
			if !slices.Equal(plugins, want.plugins) || strings.Contains(string(text), "fd00:") != (families == 2) {
				t.Errorf("%s: plugins %v, want %v, in %s", name, plugins, want.plugins, text)
			}
			programs, err := c.programs(p)
			if err != nil || len(programs) != 1 || !strings.HasPrefix(strings.Join(programs[0], " "), want.daemon) {
				t.Errorf("%s: daemons %q, %v, want %q", name, programs, err, want.daemon)
			}
		}
		if c.Routes != want.routes || c.Services != 10_000 {
			t.Errorf("%s: routes %v, services %d", name, c.Routes, c.Services)
		}
		var flag cnis
		for _, text := range []string{"contenders/" + name, "again=contenders/" + name} {
			if err := flag.Set(text); err != nil {
				t.Errorf("-cni %s: %v", text, err)
			}
		}
		if flag.String() != c.Name+", again" || flag[1].id != "cni-again" || flag[0].oneNode {
			t.Errorf("cnis = %s", flag.String())
		}
	}
}

// The same contender in another mode leaves the first one as it was.
func TestWith(t *testing.T) {
	c, err := ownContender("ptp-kube-proxy")
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{reference: c}
	iptables, nftables := b.proxy("iptables"), b.proxy("nftables")
	for _, got := range []struct {
		*contender
		last string
	}{{iptables, "iptables"}, {nftables, "nftables"}, {c, "0s"}} {
		if argv := got.Daemons[0]; argv[len(argv)-1] != got.last {
			t.Errorf("%s: last argument %q, want %q", got.Name, argv[len(argv)-1], got.last)
		}
	}
	if programs, err := nftables.onFirst().programs(testPlaceholders("", 2)); err != nil || len(programs) > 0 {
		t.Errorf("daemons on the second node: %v, %v", programs, err)
	}
	if c.firstOnly || nftables.firstOnly {
		t.Error("onFirst has changed what it was made from")
	}
}

// Further files are filled into the node's directory, and programs are found from contender.yaml on.
func TestContenderDirectory(t *testing.T) {
	top := t.TempDir()
	for name, text := range map[string]string{
		"contender.yaml": "{name: other, bin: bin, conflist: net.conflist, files: [agent.conf], daemons: [[agent, -c, '{{.Dir}}/agent.conf'], ['{{.Built}}/kube-proxy']]}",
		"net.conflist":   `{"name": "n", "cniVersion": "1.0.0", "plugins": [{"type": "plug", "mtu": {{.MTU}}}]}`,
		"agent.conf":     "node={{.Node}}\n", "bin/agent": "", "bin/plug": "",
	} {
		path := filepath.Join(top, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var flag cnis
	if err := flag.Set(top); err != nil {
		t.Fatal(err)
	}
	p := testPlaceholders(t.TempDir(), 2)
	p.MTU = 1400
	text, err := flag[0].install(p)
	var conf struct{ Plugins []struct{ MTU int } }
	if err != nil || json.Unmarshal(text, &conf) != nil || conf.Plugins[0].MTU != 1400 {
		t.Errorf("conflist %s, %v", text, err)
	}
	if got, err := os.ReadFile(filepath.Join(p.Dir, "agent.conf")); err != nil || string(got) != "node=node2\n" {
		t.Errorf("agent.conf = %q, %v", got, err)
	}
	programs, err := flag[0].programs(p)
	want := [][]string{{filepath.Join(top, "bin/agent"), "-c", p.Dir + "/agent.conf"}, {"/built/kube-proxy"}}
	if err != nil || !slices.EqualFunc(programs, want, slices.Equal) {
		t.Errorf("daemons = %q, %v, want %q", programs, err, want)
	}
	// Programs of another directory, such as another commit's, and none that is silently taken from elsewhere.
	if err := flag.Set("moved=" + top + "," + t.TempDir()); err == nil || !strings.Contains(err.Error(), "agent") {
		t.Errorf("without programs: %v", err)
	}
}

func TestContenderErrors(t *testing.T) {
	const conflist = `{"name": "n", "plugins": [{"type": "plug"}]}`
	for _, yaml := range []string{
		"", "name: a", "conflist: c", "{name: a, conflist: none}", "{name: a, conflist: c, routing: true}", "{name: a, conflist: c, files: [none]}",
	} {
		dir := fstest.MapFS{"c": {Data: []byte(conflist)}, "contender.yaml": {Data: []byte(yaml)}}
		if _, err := readContender(dir); err == nil {
			t.Errorf("contender.yaml %q: no error", yaml)
		}
	}
	for _, c := range []*contender{
		{Conflist: "c", templates: map[string]string{"c": "{{.Nothing}}"}},
		{Conflist: "c", templates: map[string]string{"c": "no JSON"}},
		{Conflist: "c", templates: map[string]string{"c": conflist, "f": "{{"}, Files: []string{"f"}},
		{Conflist: "c", templates: map[string]string{"c": conflist}, Daemons: [][]string{{"agent", "{{.Nod}}"}}},
		{Conflist: "c", templates: map[string]string{"c": conflist}, Daemons: [][]string{{}}},
		{Conflist: "c", templates: map[string]string{"c": conflist}, Bin: "/nowhere"},
	} {
		if err := c.check(); err == nil {
			t.Errorf("%+v: no error", c)
		}
	}
}
