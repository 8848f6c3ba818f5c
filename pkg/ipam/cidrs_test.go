// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/margay-cni/margay/pkg/endpoint"
)

// rewrite replaces a file as the agent does.
func rewrite(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// nodeJSON is what an agent of this build writes about a node with these pod CIDRs.
func nodeJSON(t *testing.T, cidrs ...string) string {
	t.Helper()
	n := endpoint.NewNode("worker-1", "vxlan", 1450, nil)
	for _, c := range cidrs {
		n.PodCIDRs = append(n.PodCIDRs, netip.MustParsePrefix(c))
	}
	b, err := json.Marshal(n)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestPodCIDRsFromTheAgent: without ranges in the configuration, addresses come from what the agent says of the node, now.
func TestPodCIDRsFromTheAgent(t *testing.T) {
	for _, tc := range []struct {
		name   string
		cidrs  []string
		first  string
		next   string
		others []string // ranges that the node gets instead
		moved  string
	}{
		{"IPv4", []string{"10.7.0.0/29"}, "10.7.0.2", "10.7.0.3", []string{"10.9.0.0/24"}, "10.9.0.2"},
		{"IPv6", []string{"fd00:7::/64"}, "fd00:7::2", "fd00:7::3", []string{"fd00:9::/64"}, "fd00:9::2"},
		{"dual stack, IPv4 first", []string{"10.7.0.0/24", "fd00:7::/64"}, "10.7.0.2,fd00:7::2", "10.7.0.3,fd00:7::3",
			[]string{"10.7.0.0/24", "fd00:9::/64"}, "10.7.0.4,fd00:9::2"},
		{"dual stack, IPv6 first", []string{"fd00:7::/64", "10.7.0.0/24"}, "fd00:7::2,10.7.0.2", "fd00:7::3,10.7.0.3",
			[]string{"10.9.0.0/24", "fd00:7::/64"}, "10.9.0.2,fd00:7::4"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, endpoint.NodeFile)
			c := conf(t, dir, `"releaseCooldown":1`, nil)

			// The machine has started, and no agent has seen the cluster.
			_, err := Add(t.Context(), c, pod(0))
			wantCode(t, err, 11, "no pod CIDR yet", path, "margay-agent", "ipam.ranges")
			wantCode(t, Status(t.Context(), c), 50, "no pod CIDR yet", path)

			// An agent has, but the node has no range.
			rewrite(t, path, nodeJSON(t))
			_, err = Add(t.Context(), c, pod(0))
			wantCode(t, err, 11, "no pod CIDR yet", "node worker-1", "--allocate-node-cidrs")
			wantCode(t, Status(t.Context(), c), 50, "node worker-1")

			rewrite(t, path, nodeJSON(t, tc.cidrs...))
			if err := Status(t.Context(), c); err != nil {
				t.Errorf("Status = %v, want nil", err)
			}
			for i, want := range []string{tc.first, tc.next} {
				if got := add(t, c, pod(i)); got != want {
					t.Errorf("Add = %s, want %s", got, want)
				}
			}

			// The node object was made anew. Who has an address keeps it, and gives it back as ever.
			rewrite(t, path, nodeJSON(t, tc.others...))
			if got := add(t, c, pod(2)); got != tc.moved {
				t.Errorf("Add after another pod CIDR = %s, want %s", got, tc.moved)
			}
			if err := Check(t.Context(), c, pod(0), nil); err != nil {
				t.Errorf("Check of an older lease = %v, want nil", err)
			}
			del(t, c, pod(0))
			verify(t, c)

			// Without the file nobody starts, but everybody can end.
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			_, err = Add(t.Context(), c, pod(3))
			wantCode(t, err, 11, "no pod CIDR yet")
			del(t, c, pod(1))
			del(t, c, pod(2))
			if got, err := Leases(t.Context(), c); err != nil || len(got) != 0 {
				t.Errorf("leases = %v, %v, want none", got, err)
			}
		})
	}
}

// TestRangesGoBeforeTheAgent: what the configuration names is not the agent's to change, and needs none.
func TestRangesGoBeforeTheAgent(t *testing.T) {
	dir := t.TempDir()
	rewrite(t, filepath.Join(dir, endpoint.NodeFile), nodeJSON(t, "10.7.0.0/24"))
	list := filepath.Join(dir, "mine.json")
	rewrite(t, list, `["10.8.0.0/24"]`)
	for members, want := range map[string]string{
		subnet("10.1.0.0/24"):         "10.1.0.2",
		`"subnet":"10.2.0.0/24"`:      "10.2.0.2",
		`"rangesFile":"` + list + `"`: "10.8.0.2",
		`"routes":[]`:                 "10.7.0.2",
	} {
		c := conf(t, dir, members, nil)
		if got := add(t, c, pod(0)); got != want {
			t.Errorf("Add with %s = %s, want %s", members, got, want)
		}
		del(t, c, pod(0))
	}
}

// TestBadNodeFile: every fault has a code and names the file.
func TestBadNodeFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, endpoint.NodeFile)
	c := conf(t, dir, `"routes":[]`, nil)
	for content, code := range map[string]uint{
		`{"version":1,"name":"n","podCIDRs":["10.7.0.0/24"`: 6,
		`[]`:                             6,
		`{"name":"n"}`:                   7,
		`{"version":2,"podCIDRs":["x"]}`: 7,
		`{"version":1,"podCIDRs":["10.7.0.1/24"]}`:                7,
		`{"version":1,"podCIDRs":["10.7.0.0/31"]}`:                7,
		`{"version":1,"podCIDRs":["10.7.0.0/24","10.7.0.0/25"]}`:  7,
		`{"version":1,"podCIDRs":["10.7.0.0/24","fd00:7::/127"]}`: 7,
	} {
		rewrite(t, path, content)
		_, err := Add(t.Context(), c, pod(0))
		wantCode(t, err, code, path)
		wantCode(t, Status(t.Context(), c), 50, path)
		del(t, c, pod(0))
	}
}

func TestRangesFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "mine.json")
	c := conf(t, dir, `"releaseCooldown":1,"rangesFile":"`+path+`"`, nil)
	_, err := Add(t.Context(), c, pod(0))
	wantCode(t, err, 11, "no pod CIDR yet", path)
	rewrite(t, path, `[]`)
	_, err = Add(t.Context(), c, pod(0))
	wantCode(t, err, 11, "no pod CIDR yet")
	rewrite(t, path, `["fd00:7::/64","10.7.0.0/30"`)
	_, err = Add(t.Context(), c, pod(0))
	wantCode(t, err, 6, path)
	rewrite(t, path, `["fd00:7::/64","10.7.0.0/30","10.8.0.0/24"]`)
	for i, want := range []string{"fd00:7::2,10.7.0.2", "fd00:7::3,10.8.0.2"} {
		if got := add(t, c, pod(i)); got != want {
			t.Errorf("Add = %s, want %s", got, want)
		}
	}
	if err := Status(t.Context(), c); err != nil {
		t.Errorf("Status = %v, want nil", err)
	}
}

// TestNodeFileIsTheAgents: the layout that is read here is the one that the agent writes.
func TestNodeFileIsTheAgents(t *testing.T) {
	if nodeFile != endpoint.NodeFile {
		t.Errorf("node file = %s, the agent writes %s", nodeFile, endpoint.NodeFile)
	}
	if got := endpoint.NewNode("n", "vxlan", 0, nil).Version; got != nodeVersion {
		t.Errorf("layout = %d, the agent writes %d", nodeVersion, got)
	}
}
