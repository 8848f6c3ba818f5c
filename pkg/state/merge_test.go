// SPDX-License-Identifier: Apache-2.0

package state

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var sameAddr = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

func addrs(s ...string) []netip.Addr {
	var out []netip.Addr
	for _, a := range s {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

func TestMergePods(t *testing.T) {
	key := Key{"web", "api-0"}
	both := addrs("10.0.0.5", "fd00::5")
	for _, tc := range []struct {
		name  string
		known *Pod
		local []*Pod
		want  *Pod
	}{
		{
			name:  "only the record",
			local: []*Pod{{Key: key, UID: "u", IPs: both, Labels: map[string]string{"app": "api"}}},
			want:  &Pod{Key: key, UID: "u", IPs: both, Labels: map[string]string{"app": "api"}, Node: "node-a", Local: true, Ready: true},
		},
		{
			name:  "only the source",
			known: &Pod{Key: key, IPs: both, Node: "node-b"},
			want:  &Pod{Key: key, IPs: both, Node: "node-b"},
		},
		{
			name:  "both",
			known: &Pod{Key: key, Labels: map[string]string{"app": "api"}, Ports: []ContainerPort{{"http", TCP, 80}}, IPs: addrs("10.9.9.9")},
			local: []*Pod{{Key: key, UID: "u", IPs: both, Labels: map[string]string{"app": "other", "zone": "z"}, Ports: []ContainerPort{{"x", TCP, 1}}}},
			want: &Pod{Key: key, UID: "u", IPs: both, Labels: map[string]string{"app": "api", "zone": "z"},
				Ports: []ContainerPort{{"http", TCP, 80}}, Node: "node-a", Local: true},
		},
		{
			name:  "the source says it is not ready",
			known: &Pod{Key: key, Ready: false, Terminating: true, Node: "node-a", Local: true},
			local: []*Pod{{Key: key, IPs: both, Ready: true}},
			want:  &Pod{Key: key, IPs: both, Terminating: true, Node: "node-a", Local: true},
		},
		{
			name:  "the record is another incarnation's",
			known: &Pod{Key: key, UID: "new", Labels: map[string]string{"app": "api"}},
			local: []*Pod{{Key: key, UID: "old", IPs: both, Labels: map[string]string{"role": "admin"}}},
			want:  &Pod{Key: key, UID: "new", Labels: map[string]string{"app": "api"}},
		},
		{
			name: "two interfaces of one pod add up",
			local: []*Pod{
				{Key: key, UID: "u", IPs: addrs("10.0.0.5"), Labels: map[string]string{"a": "1"}},
				{Key: key, UID: "u", IPs: addrs("fd00::5", "10.0.0.5"), Labels: map[string]string{"a": "2", "b": "2"}},
			},
			want: &Pod{Key: key, UID: "u", IPs: both, Labels: map[string]string{"a": "2", "b": "2"}, Node: "node-a", Local: true, Ready: true},
		},
		{
			name:  "a later record with another UID replaces the earlier",
			local: []*Pod{{Key: key, UID: "old", IPs: addrs("10.0.0.4")}, {Key: key, UID: "new", IPs: both}},
			want:  &Pod{Key: key, UID: "new", IPs: both, Node: "node-a", Local: true, Ready: true},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := NewSnapshot()
			if tc.known != nil {
				s.Pods[key] = tc.known
			}
			known, local := deepCopy(s), deepCopyPods(tc.local)
			got := MergePods(s, "node-a", tc.local)
			if diff := cmp.Diff(map[Key]*Pod{key: tc.want}, got.Pods, sameAddr); diff != "" {
				t.Errorf("MergePods() (-want +got):\n%s", diff)
			}
			if len(tc.local) > 0 {
				if diff := cmp.Diff(map[string]*Namespace{"web": ImplicitNamespace("web")}, got.Namespaces); diff != "" {
					t.Errorf("namespaces (-want +got):\n%s", diff)
				}
			} else if got != s {
				t.Error("MergePods() of no records is a new snapshot, want the same")
			}
			if diff := cmp.Diff(known, s, sameAddr) + cmp.Diff(local, tc.local, sameAddr); diff != "" {
				t.Errorf("MergePods() wrote to its input (-before +after):\n%s", diff)
			}
		})
	}
}

func deepCopy(s *Snapshot) *Snapshot {
	out := *s
	out.Pods, out.Namespaces, out.EndpointSlices = map[Key]*Pod{}, map[string]*Namespace{}, map[Key]*EndpointSlice{}
	for k, p := range s.Pods {
		out.Pods[k] = deepCopyPods([]*Pod{p})[0]
	}
	for k, v := range s.Namespaces {
		out.Namespaces[k] = &Namespace{Name: v.Name, Labels: union(v.Labels, nil)}
	}
	for k, v := range s.EndpointSlices {
		out.EndpointSlices[k] = v
	}
	return &out
}

func deepCopyPods(pods []*Pod) []*Pod {
	var out []*Pod
	for _, p := range pods {
		c := *p
		c.Labels = union(p.Labels, nil)
		c.IPs = append([]netip.Addr(nil), p.IPs...)
		c.Ports = append([]ContainerPort(nil), p.Ports...)
		out = append(out, &c)
	}
	return out
}

func TestMergePodsKeepsNamespaceLabels(t *testing.T) {
	s := NewSnapshot()
	s.Namespaces["web"] = &Namespace{Name: "web", Labels: map[string]string{"team": "a"}}
	got := MergePods(s, "n", []*Pod{{Key: Key{"web", "p"}}})
	if got.Namespaces["web"] != s.Namespaces["web"] {
		t.Errorf("namespace = %v, want the one that was there", got.Namespaces["web"])
	}
}
