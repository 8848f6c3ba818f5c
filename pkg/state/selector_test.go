// SPDX-License-Identifier: Apache-2.0

package state

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// selectorWorld has a dual-stack service with a numeric and a named target port.
func selectorWorld(pods ...*Pod) *Snapshot {
	s := NewSnapshot()
	key := Key{"web", "api"}
	s.Services[key] = &Service{
		Key: key, Type: ClusterIP, ClusterIPs: addrs("10.96.0.1", "fd00:96::1"), Selector: map[string]string{"app": "api"},
		Ports: []ServicePort{{Name: "http", Protocol: TCP, Port: 80, TargetPort: 8080}, {Name: "dns", Protocol: UDP, Port: 53, TargetName: "dns"}},
	}
	s.Nodes["node-a"] = &Node{Name: "node-a", Labels: map[string]string{"topology.kubernetes.io/zone": "z1"}, Addresses: addrs("192.0.2.1", "2001:db8::1")}
	for _, p := range pods {
		s.Pods[p.Key] = p
	}
	return s
}

func apiPod(n int, tweak ...func(*Pod)) *Pod {
	p := &Pod{
		Key: Key{"web", fmt.Sprintf("api-%d", n)}, Labels: map[string]string{"app": "api", "n": fmt.Sprint(n)}, Ready: true, Node: "node-a", Local: true,
		IPs: addrs(fmt.Sprintf("10.0.0.%d", n), fmt.Sprintf("fd00::%d", n)), Ports: []ContainerPort{{"dns", UDP, 5353}},
	}
	for _, fn := range tweak {
		fn(p)
	}
	return p
}

// endpointLines writes every endpoint of every slice as one line: address, condition letters, node, ports.
func endpointLines(s *Snapshot) []string {
	var out []string
	for key, slice := range s.EndpointSlices {
		if slice.Service != (Key{"web", "api"}) || key != slice.Key || key.Namespace != "web" {
			out = append(out, fmt.Sprintf("slice %v of %v under %v", slice.Key, slice.Service, key))
		}
		var ports []string
		for _, p := range slice.Ports {
			ports = append(ports, fmt.Sprintf("%s/%v=%d", p.Name, p.Protocol, p.Port))
		}
		for _, e := range slice.Endpoints {
			conditions := ""
			for letter, is := range map[string]bool{"r": e.Ready, "s": e.Serving, "t": e.Terminating} {
				if is {
					conditions += letter
				}
			}
			letters := strings.Split(conditions, "")
			slices.Sort(letters)
			out = append(out, fmt.Sprintf("%v %s %s/%s %s ipv6=%v", e.Addr, strings.Join(letters, ""), e.Node, e.Zone, strings.Join(ports, ","), slice.IPv6))
		}
	}
	slices.Sort(out)
	return out
}

func TestWithSelectorSlices(t *testing.T) {
	const ports = "http/TCP=8080,dns/UDP=5353"
	for _, tc := range []struct {
		name string
		s    *Snapshot
		want []string
	}{
		{"two pods", selectorWorld(apiPod(1), apiPod(2)), []string{
			"10.0.0.1 rs node-a/z1 " + ports + " ipv6=false", "10.0.0.2 rs node-a/z1 " + ports + " ipv6=false",
			"fd00::1 rs node-a/z1 " + ports + " ipv6=true", "fd00::2 rs node-a/z1 " + ports + " ipv6=true",
		}},
		{"a name with two numbers", selectorWorld(apiPod(1), apiPod(2, func(p *Pod) { p.Ports[0].Port = 53; p.IPs = p.IPs[:1] })), []string{
			"10.0.0.1 rs node-a/z1 " + ports + " ipv6=false", "10.0.0.2 rs node-a/z1 http/TCP=8080,dns/UDP=53 ipv6=false",
			"fd00::1 rs node-a/z1 " + ports + " ipv6=true",
		}},
		{"a name that the pod has not, or with another protocol", selectorWorld(
			apiPod(1, func(p *Pod) { p.Ports = nil; p.IPs = p.IPs[1:] }),
			apiPod(2, func(p *Pod) { p.Ports[0].Protocol = TCP; p.IPs = p.IPs[1:] })), []string{
			"fd00::1 rs node-a/z1 http/TCP=8080 ipv6=true", "fd00::2 rs node-a/z1 http/TCP=8080 ipv6=true",
		}},
		{"other pods", selectorWorld(
			apiPod(1, func(p *Pod) { p.Labels["app"] = "other" }),
			apiPod(2, func(p *Pod) { p.Namespace = "other" }),
			apiPod(3, func(p *Pod) { p.Finished = true }),
			apiPod(4, func(p *Pod) { p.IPs = nil })), nil},
		{"conditions", selectorWorld(
			apiPod(1, func(p *Pod) { p.Ready = false; p.IPs = p.IPs[:1] }),
			apiPod(2, func(p *Pod) { p.Terminating = true; p.IPs = p.IPs[:1] }),
			apiPod(3, func(p *Pod) { p.Node = "node-b"; p.IPs = p.IPs[:1] })), []string{
			"10.0.0.1  node-a/z1 " + ports + " ipv6=false", "10.0.0.2 st node-a/z1 " + ports + " ipv6=false", "10.0.0.3 rs node-b/ " + ports + " ipv6=false",
		}},
		{"host network", selectorWorld(
			apiPod(1, func(p *Pod) { p.HostNetwork = true; p.IPs = nil }),
			apiPod(2, func(p *Pod) { p.HostNetwork = true; p.IPs = nil; p.Node = "node-b" })), []string{
			"192.0.2.1 rs node-a/z1 " + ports + " ipv6=false", "2001:db8::1 rs node-a/z1 " + ports + " ipv6=true",
		}},
		{"published although not ready", func() *Snapshot {
			s := selectorWorld(apiPod(1, func(p *Pod) { p.Ready = false; p.IPs = p.IPs[:1] }))
			s.Services[Key{"web", "api"}].PublishNotReady = true
			return s
		}(), []string{"10.0.0.1 r node-a/z1 " + ports + " ipv6=false"}},
		{"one family", func() *Snapshot {
			s := selectorWorld(apiPod(1))
			s.Services[Key{"web", "api"}].ClusterIPs = addrs("fd00:96::1")
			return s
		}(), []string{"fd00::1 rs node-a/z1 " + ports + " ipv6=true"}},
		{"without selector", func() *Snapshot {
			s := selectorWorld(apiPod(1))
			s.Services[Key{"web", "api"}].Selector = nil
			return s
		}(), nil},
		{"a slice of its own, of either family", func() *Snapshot {
			s := selectorWorld(apiPod(1))
			s.EndpointSlices[Key{"web", "hand"}] = &EndpointSlice{Key: Key{"web", "hand"}, Service: Key{"web", "api"}, IPv6: true,
				Endpoints: []Endpoint{{Addr: netip.MustParseAddr("fd00::77")}}}
			return s
		}(), []string{"fd00::77  /  ipv6=true"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := deepCopy(tc.s)
			got := WithSelectorSlices(tc.s)
			if diff := cmp.Diff(tc.want, endpointLines(got)); diff != "" {
				t.Errorf("endpoints (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(before.EndpointSlices, tc.s.EndpointSlices, sameAddr); diff != "" {
				t.Errorf("WithSelectorSlices() wrote to its input (-before +after):\n%s", diff)
			}
			if diff := cmp.Diff(got, WithSelectorSlices(tc.s), sameAddr); diff != "" {
				t.Errorf("WithSelectorSlices() differs the second time:\n%s", diff)
			}
		})
	}
}
