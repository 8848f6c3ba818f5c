// SPDX-License-Identifier: Apache-2.0

package conf_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/conf"
	"github.com/margay-cni/margay/internal/testutil/privileged"
	"github.com/margay-cni/margay/pkg/ipam"
	"github.com/margay-cni/margay/pkg/manifest"
	"github.com/margay-cni/margay/pkg/node"
	"github.com/margay-cni/margay/pkg/state"
)

// loaders knows every kind of file that we ship, by its path below conf/.
var loaders = []struct {
	pattern string
	load    func(t *testing.T, content []byte)
}{
	{conf.ConflistName, loadConflist},
	{"kubernetes/" + conf.ConflistName, loadConflist},
	{"nodes.yaml", loadNodes},
	{"demo/*.yaml", loadManifest},
	{"demo/later/*.yaml", loadManifest},
}

// TestEveryFileLoads: what is shipped works as it is, and a new file needs a loader here.
func TestEveryFileLoads(t *testing.T) {
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) == ".go" {
			return err
		}
		t.Run(path, func(t *testing.T) {
			content, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			for _, l := range loaders {
				if ok, _ := filepath.Match(l.pattern, path); ok {
					l.load(t, content)
					return
				}
			}
			t.Error("nothing here knows how to load this file")
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// loadConflist reads the file as a runtime does.
func loadConflist(t *testing.T, content []byte) {
	list, err := libcni.NetworkConfFromBytes(content)
	if err != nil {
		t.Fatal(err)
	}
	// libcni takes the highest of cniVersions that it knows; a libcni that does not know the list takes cniVersion.
	if got, want := list.CNIVersion, "1.1.0"; got != want {
		t.Errorf("CNI version = %s, want %s: with less a runtime sends neither STATUS nor GC", got, want)
	}
	for _, p := range list.Plugins {
		for _, capability := range []string{"ips", "mac", "portMappings", "io.kubernetes.cri.pod-annotations"} {
			if p.Network.Type == "margay" && !p.Network.Capabilities[capability] {
				t.Errorf("plugin %s does not declare capability %s: the runtime would not pass it", p.Network.Type, capability)
			}
		}
	}
}

// loadManifest reads a file with services, policies or both.
func loadManifest(t *testing.T, content []byte) {
	if got := snapshot(t, content); len(got.Services)+len(got.NetworkPolicies) == 0 {
		t.Errorf("snapshot = %v, want a service or a policy in it", got)
	}
}

// loadNodes reads a file with nodes, which must be able to live side by side.
func loadNodes(t *testing.T, content []byte) {
	s := snapshot(t, content)
	if len(s.Nodes) < 2 {
		t.Errorf("nodes = %v, want two", s.Nodes)
	}
	for self, object := range s.Nodes {
		device := node.Device{Index: 2, Name: "eth0", MTU: 1500, DefaultRoute: true, Usable: object.Addresses}
		for _, a := range object.Addresses {
			device.Addresses = append(device.Addresses, netip.PrefixFrom(a, a.BitLen()))
		}
		machine := node.Machine{Devices: []node.Device{device}, Addresses: object.Addresses}
		got := node.NewCompiler(self, node.VXLAN, nil, nil).Compile(node.Input{Snapshot: s, Machine: machine})
		if len(got.Problems) != 0 || len(got.Tunnels) != len(s.Nodes)-1 {
			t.Errorf("on %s: tunnels %v with problems %v, want one to every other node without", self, got.Tunnels, got.Problems)
		}
	}
}

// snapshot reads the file as the agent does, which must have nothing to say about it.
func snapshot(t *testing.T, content []byte) *state.Snapshot {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file.yaml"), content, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	source := manifest.New(dir, "demo", slog.New(slog.DiscardHandler))
	got := state.NewSnapshot()
	if err := source.Run(ctx, func(s *state.Snapshot) { got = s; cancel() }); err != nil {
		t.Fatal(err)
	}
	if problems := source.Problems(); len(problems) != 0 {
		t.Errorf("problems = %v, want none", problems)
	}
	return got
}

// plugin returns what the runtime gives our plugin of the shipped conflist, with the node's directories below dir.
func plugin(t *testing.T, dir string) []byte {
	t.Helper()
	list, err := libcni.NetworkConfFromBytes(conf.Conflist)
	if err != nil {
		t.Fatal(err)
	}
	var stdin map[string]any
	if err := json.Unmarshal(list.Plugins[0].Bytes, &stdin); err != nil {
		t.Fatal(err)
	}
	stdin["name"], stdin["cniVersion"] = list.Name, list.CNIVersion
	stdin["runDir"], stdin["bpffs"] = filepath.Join(dir, "run"), filepath.Join(dir, "bpffs")
	content, err := json.Marshal(stdin)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// TestConflistAssignsAddresses: the shipped ranges give a pod one address of each family.
func TestConflistAssignsAddresses(t *testing.T) {
	c, err := ipam.LoadConfig(plugin(t, t.TempDir()), "")
	if err != nil {
		t.Fatal(err)
	}
	assigned, err := ipam.Add(t.Context(), c, ipam.Attachment{ContainerID: "c1", IfName: "eth0"})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, ip := range assigned.IPs {
		got = append(got, ip.Address.Masked().String())
	}
	if diff := cmp.Diff([]string{"10.244.0.0/24", "fd00:244::/64"}, got); diff != "" {
		t.Errorf("subnets of the assigned addresses (-want +got):\n%s", diff)
	}
}

// TestKubernetesConflistTakesTheNodesRanges: it differs from the other one in nothing but the ranges, which are the Node object's.
func TestKubernetesConflistTakesTheNodesRanges(t *testing.T) {
	content, err := os.ReadFile("kubernetes/" + conf.ConflistName)
	if err != nil {
		t.Fatal(err)
	}
	var byHand, forKubernetes map[string]any
	for from, into := range map[string]*map[string]any{string(conf.Conflist): &byHand, string(content): &forKubernetes} {
		if err := json.Unmarshal([]byte(from), into); err != nil {
			t.Fatal(err)
		}
	}
	section := byHand["plugins"].([]any)[0].(map[string]any)["ipam"].(map[string]any)
	delete(section, "ranges")
	if diff := cmp.Diff(byHand, forKubernetes); diff != "" {
		t.Errorf("conflist without its ranges and the one for Kubernetes (-want +got):\n%s", diff)
	}
}

// TestConflistServes: the plugin, its loader beside it as installed, finds nothing wrong with the shipped file on this machine.
func TestConflistServes(t *testing.T) {
	privileged.Require(t)
	dir := t.TempDir()
	for name, source := range map[string]string{"margay": "plugin", "margay-loader": "plugin/loader"} {
		build := exec.Command("go", "build", "-o", filepath.Join(dir, name), "github.com/margay-cni/margay/"+source)
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", name, err, out)
		}
	}
	status := exec.Command(filepath.Join(dir, "margay"))
	status.Env = []string{"CNI_COMMAND=STATUS", "CNI_PATH=" + dir}
	status.Stdin = bytes.NewReader(plugin(t, t.TempDir()))
	if out, err := status.CombinedOutput(); err != nil {
		t.Errorf("STATUS = %v, want success\n%s", err, out)
	}
}

// TestEmbedded: what margay-install installs is the file that is tested here.
func TestEmbedded(t *testing.T) {
	want, err := os.ReadFile(conf.ConflistName)
	if err != nil {
		t.Fatal(err)
	}
	if string(conf.Conflist) != string(want) {
		t.Error("the embedded conflist is not the file")
	}
}
