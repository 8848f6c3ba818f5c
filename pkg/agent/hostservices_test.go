// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/link"
	"github.com/margay-cni/margay/pkg/state"
)

func (f *fakeNetwork) EnsureHostPair() (host, service link.Device, err error) {
	if err := f.op("pair"); err != nil {
		return host, service, err
	}
	if f.named(link.HostDevice) == nil {
		f.next += 2
		f.devices = append(f.devices, device{index: f.next - 1, name: link.HostDevice, kind: "veth", up: true},
			device{index: f.next, name: link.ServiceDevice, kind: "veth", up: true})
	}
	return link.Device{Index: f.named(link.HostDevice).index}, link.Device{Index: f.named(link.ServiceDevice).index}, nil
}

func (f *fakeNetwork) SyncServiceRoutes(device int, want []link.ServiceRoute, keep bool) (changed int, err error) {
	if err := f.op("service routes"); err != nil {
		return 0, err
	}
	have := map[link.ServiceRoute]bool{}
	for r := range f.serviceRoutes[device] {
		if keep || slices.Contains(want, r) {
			have[r] = true
		} else {
			changed++
		}
	}
	for _, r := range want {
		if !have[r] {
			have[r] = true
			changed++
		}
	}
	f.serviceRoutes = map[int]map[link.ServiceRoute]bool{device: have}
	return changed, nil
}

func TestHostPairIsMadeAndRepaired(t *testing.T) {
	w, n, facts := networkRig()
	one := link.ServiceRoute{Dst: netip.MustParsePrefix("10.96.0.0/12"), Source: netip.MustParseAddr("192.0.2.2"), MTU: 1450}
	two := link.ServiceRoute{Dst: netip.MustParsePrefix("fd00:96::/112"), MTU: 1450}
	w.want = &wantedNetwork{services: []link.ServiceRoute{one, two}}
	whole := func(when string) {
		t.Helper()
		host, service := n.named(link.HostDevice), n.named(link.ServiceDevice)
		if host == nil || service == nil || facts().host != host.index || n.attach[service.index] != "host" {
			t.Fatalf("%s: pair %v, %v, programs %v, published host %d, want all of it", when, host, service, n.attach, facts().host)
		}
		if diff := cmp.Diff(map[link.ServiceRoute]bool{one: true, two: true}, n.serviceRoutes[host.index], cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
			t.Errorf("%s: routes (-want +got):\n%s", when, diff)
		}
	}
	w.survey(false)
	whole("at first")
	n.ops = nil
	if w.survey(false); slices.Contains(n.ops, "pair") || slices.Contains(n.ops, "service routes") {
		t.Errorf("operations although nothing changed = %v", n.ops)
	}
	for what, damage := range map[string]func(){
		"the pair is gone": func() {
			n.devices = slices.DeleteFunc(n.devices, func(d device) bool { return isHostPair(d.name) })
			n.serviceRoutes = nil
		},
		"the programs are gone": func() { delete(n.attach, n.named(link.ServiceDevice).index) },
		"a route is gone":       func() { delete(n.serviceRoutes[n.named(link.HostDevice).index], two) },
		"a route is too many":   func() { n.serviceRoutes[n.named(link.HostDevice).index][link.ServiceRoute{Dst: one.Dst}] = true },
	} {
		damage()
		w.survey(what == "the programs are gone") // of which removals tell
		whole(what)
	}

	// Where it cannot be made, nothing is sent there, and the status says why.
	n.fail["pair"] = errors.New("name is taken")
	if again := w.survey(true); !again || facts().host != 0 || !strings.Contains(strings.Join(facts().problems, "\n"), "name is taken") {
		t.Errorf("survey() = %v, host %d, problems %q, want true, none and the reason", again, facts().host, facts().problems)
	}
	delete(n.fail, "pair")
	w.survey(false)
	whole("after the fault")
}

// A predecessor's pair serves on until the services are known.
func TestHostPairIsAdopted(t *testing.T) {
	w, n, facts := networkRig()
	host, _, err := n.EnsureHostPair()
	if err != nil {
		t.Fatal(err)
	}
	n.serviceRoutes = map[int]map[link.ServiceRoute]bool{host.Index: {{Dst: netip.MustParsePrefix("10.96.0.10/32")}: true}}
	n.ops = nil
	for _, want := range []*wantedNetwork{nil, {}} {
		w.want = want
		w.survey(true)
		if facts().host != host.Index || slices.Contains(n.ops, "service routes") || len(n.serviceRoutes[host.Index]) != 1 {
			t.Errorf("wanted %+v: host %d, operations %v, routes %v, want %d and the routes left alone", want, facts().host, n.ops, n.serviceRoutes, host.Index)
		}
	}
}

// The host's routes to services: ranges as configured, other service addresses one by one, and never a node's address.
func TestServiceRoutes(t *testing.T) {
	addrs := func(list ...string) (out []netip.Addr) {
		for _, a := range list {
			out = append(out, netip.MustParseAddr(a))
		}
		return out
	}
	snapshot := nodesOnly(self, other)
	snapshot.Services = map[state.Key]*state.Service{{Namespace: "default", Name: "web"}: {
		Key: state.Key{Namespace: "default", Name: "web"}, Type: state.LoadBalancer,
		ClusterIPs: addrs("10.96.0.10", "fd00:96::10"), ExternalIPs: addrs("203.0.113.7", "192.0.2.1", "192.0.2.2"), LoadBalancerIPs: addrs("198.51.100.9"),
		Ports: []state.ServicePort{{Name: "http", Protocol: 6, Port: 80, NodePort: 30080}},
	}}
	for name, c := range map[string]struct {
		cidrs []netip.Prefix
		want  []string
	}{
		"learned":    {nil, []string{"10.96.0.10/32", "198.51.100.9/32", "203.0.113.7/32", "fd00:96::10/128"}},
		"configured": {[]netip.Prefix{netip.MustParsePrefix("10.96.0.0/12")}, []string{"10.96.0.0/12", "198.51.100.9/32", "203.0.113.7/32", "fd00:96::10/128"}},
	} {
		t.Run(name, func(t *testing.T) {
			k := newKernel(1)
			r := newRig(t, k, runDir(t))
			r.serviceCIDRs, r.cidrsGiven = c.cidrs, true
			facts := twoFamilies()
			facts.host = 9
			r.takeFacts(*facts)
			r.give(snapshot)
			var got []string
			for _, route := range r.wanted.services {
				got = append(got, route.Dst.String())
				if source := map[bool]string{false: "192.0.2.1", true: "2001:db8::1"}[route.Dst.Addr().Is6()]; route.Source.String() != source || route.MTU != 1450 {
					t.Errorf("route %+v, want source %s and MTU 1450", route, source)
				}
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("routes (-want +got):\n%s", diff)
			}
			if k.nodeState.entries[0].HostIfindex != 9 || k.egress.entries[9].V4 != bpf.NewAddr(netip.MustParseAddr("192.0.2.1")) {
				t.Errorf("node_state %+v, egress address %+v, want device 9 with 192.0.2.1", k.nodeState.entries[0], k.egress.entries[9])
			}
		})
	}
}
