// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/margay-cni/margay/internal/testutil/clustertest"
)

// Ports of the servers: in pods, on the nodes themselves, and of the services for the pod of n<i>.
const (
	podPort   = 8080
	hostPort  = 8081
	nodePorts = 30080
)

// remote is a cluster with a pod that serves on each of its three nodes, and a service for each pod.
type remote struct {
	*clustertest.Cluster
	pods []*clustertest.Pod
}

func newRemote(t *testing.T, o clustertest.Options) *remote {
	t.Helper()
	r := &remote{Cluster: clustertest.New(t, o)}
	for i, n := range r.Nodes() {
		labels := map[string]string{"on": n.Name}
		p := r.AddPod(n, "pod-"+n.Name, labels)
		p.Serve(podPort)
		n.Serve(hostPort)
		r.pods = append(r.pods, p)
		r.Apply(clustertest.NodePortService("of-"+n.Name, i+1, labels, 80, podPort, nodePorts+int32(i+1)))
	}
	r.WaitSettled()
	return r
}

// asks requires that a server answers on TCP and UDP, and that it has seen the client's own address.
func asks(t *testing.T, from *clustertest.Host, to netip.AddrPort, server *clustertest.Host) {
	t.Helper()
	want := fmt.Sprintf("%s %s", server.Name, from.Addr(to.Addr().Is6()))
	for _, network := range []string{"tcp", "udp"} {
		if got, err := from.Ask(network, to); err != nil || got != want {
			t.Errorf("%s from %s to %s = %q, %v; want %q", network, from.Name, to, got, err, want)
		}
	}
}

func pings(t *testing.T, from *clustertest.Host, to netip.Addr) {
	t.Helper()
	if err := from.Ping(to); err != nil {
		t.Error(err)
	}
}

// TestRemote: what is on different nodes talks as if it were on one, in every routing mode and family, each server sees its client's own
// address, and nothing is dropped on the way.
func TestRemote(t *testing.T) {
	for name, o := range map[string]clustertest.Options{
		"vxlan":           {RoutingMode: "vxlan"},
		"direct":          {RoutingMode: "direct", PodRoutes: true},
		"auto":            {RoutingMode: "auto"},
		"vxlan over IPv4": {RoutingMode: "vxlan", Underlay: clustertest.IPv4Only},
		"vxlan over IPv6": {RoutingMode: "vxlan", Underlay: clustertest.IPv6Only},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRemote(t, o)
			for _, v6 := range []bool{false, true} {
				t.Run(clustertest.FamilyName(v6), func(t *testing.T) { r.talk(t, v6) })
			}
			for _, n := range r.Nodes() {
				drops := r.Drops(n)
				// A pod's own stack looks for routers and reports its multicast groups when its device comes up.
				delete(drops, "multicast")
				delete(drops, "invalid_nd")
				if len(drops) > 0 {
					t.Errorf("%s dropped %v, want nothing but what pods' stacks send by themselves", n.Name, drops)
				}
			}
		})
	}
}

// talk takes every way of one family from each node to each other one.
func (r *remote) talk(t *testing.T, v6 bool) {
	onUnderlay := slices.Contains(r.Families(), v6)
	for i, from := range r.Nodes() {
		for j, to := range r.Nodes() {
			if i == j {
				continue
			}
			client, server := r.pods[i], r.pods[j]
			t.Run(from.Name+" to "+to.Name, func(t *testing.T) {
				t.Run("pod to pod", func(t *testing.T) {
					pings(t, client.Host, server.Addr(v6))
					asks(t, client.Host, server.AddrPort(v6, podPort), server.Host)
				})
				t.Run("pod to ClusterIP", func(t *testing.T) {
					asks(t, client.Host, clusterIP(j+1, v6), server.Host)
				})
				if !onUnderlay {
					return // nodes and the client have no address of the family
				}
				t.Run("pod to node", func(t *testing.T) {
					pings(t, client.Host, to.Addr(v6))
					asks(t, client.Host, to.AddrPort(v6, hostPort), to.Host)
				})
				t.Run("node to pod", func(t *testing.T) {
					pings(t, from.Host, server.Addr(v6))
					asks(t, from.Host, server.AddrPort(v6, podPort), server.Host)
				})
				t.Run("client to NodePort", func(t *testing.T) {
					asks(t, r.Client, from.AddrPort(v6, uint16(nodePorts+j+1)), server.Host)
				})
			})
		}
	}
}
