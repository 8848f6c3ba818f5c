// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"fmt"
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/margay-cni/margay/internal/testutil/clustertest"
	"github.com/margay-cni/margay/pkg/addr"
	"github.com/margay-cni/margay/pkg/flow"
)

// returnAnnotation says how the answers of a service's forwarded clients go back (docs/services.md).
const returnAnnotation = "margay.io/service-return"

// outsideService is a service with every kind of address that clients outside use. Its only pod is on n2.
type outsideService struct {
	number             int32 // 1 to 9, of its addresses and ports
	external, balancer []netip.Addr
	object             *corev1.Service
}

// Ports of outside services: plus their number they are the NodePorts.
const (
	outsidePort      = 80
	outsideNodePorts = 31000
)

func newOutsideService(number int32, selector map[string]string, wayBack string, policy corev1.ServiceExternalTrafficPolicy) *outsideService {
	s := &outsideService{number: number}
	for _, format := range []string{"198.51.100.%d", "2001:db8:e::%d"} {
		s.external = append(s.external, netip.MustParseAddr(fmt.Sprintf(format, number)))
		s.balancer = append(s.balancer, netip.MustParseAddr(fmt.Sprintf(format, 100+number)))
	}
	o := clustertest.NodePortService(fmt.Sprintf("outside-%d", number), int(100+number), selector, outsidePort, podPort, outsideNodePorts+number)
	o.Annotations = map[string]string{returnAnnotation: wayBack}
	o.Spec.Type, o.Spec.ExternalTrafficPolicy = corev1.ServiceTypeLoadBalancer, policy
	for i := range s.external {
		o.Spec.ExternalIPs = append(o.Spec.ExternalIPs, s.external[i].String())
		o.Status.LoadBalancer.Ingress = append(o.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: s.balancer[i].String()})
	}
	s.object = o
	return s
}

// addresses are the frontends of a family, the NodePort that of a node, by what they are called.
func (s *outsideService) addresses(n *clustertest.Node, v6 bool) map[string]netip.AddrPort {
	i := map[bool]int{false: 0, true: 1}[v6]
	return map[string]netip.AddrPort{
		"NodePort":              n.AddrPort(v6, uint16(outsideNodePorts+s.number)),
		"external address":      netip.AddrPortFrom(s.external[i], outsidePort),
		"load balancer address": netip.AddrPortFrom(s.balancer[i], outsidePort),
	}
}

// routeVia makes the router send the service's addresses to a node.
func (s *outsideService) routeVia(c *clustertest.Cluster, n *clustertest.Node) {
	for i := range s.external {
		c.RouteVia(addr.HostPrefix(s.external[i]), n.Host)
		c.RouteVia(addr.HostPrefix(s.balancer[i]), n.Host)
	}
}

// outsideServices is a cluster with pods on n1, n2 and n3, and services whose only pod is the one on n2.
type outsideServices struct {
	*clustertest.Cluster
	pods               []*clustertest.Pod
	tunnel, dsr, local *outsideService
}

func newOutsideServices(t *testing.T, o clustertest.Options) *outsideServices {
	t.Helper()
	s := &outsideServices{Cluster: clustertest.New(t, o)}
	for _, n := range s.Nodes() {
		s.pods = append(s.pods, s.AddPod(n, "pod-"+n.Name, map[string]string{"on": n.Name}))
	}
	s.pods[1].Serve(podPort)
	selector := map[string]string{"on": "n2"}
	s.tunnel = newOutsideService(1, selector, "tunnel", corev1.ServiceExternalTrafficPolicyCluster)
	s.dsr = newOutsideService(2, selector, "dsr", corev1.ServiceExternalTrafficPolicyCluster)
	s.local = newOutsideService(3, selector, "tunnel", corev1.ServiceExternalTrafficPolicyLocal)
	s.Apply(s.tunnel.object, s.dsr.object, s.local.object)
	s.WaitSettled()
	return s
}

// flowsTo are the flows of a node that were opened to an address.
func (s *outsideServices) flowsTo(n *clustertest.Node, to netip.AddrPort) (flows []flow.Flow) {
	for _, f := range s.Flows(n) {
		if f.Destination == to {
			flows = append(flows, f)
		}
	}
	return flows
}

// drops sends a datagram and requires that a node drops it for a reason.
func (s *outsideServices) drops(t *testing.T, from *clustertest.Host, to netip.AddrPort, n *clustertest.Node, reason string) {
	t.Helper()
	before := s.Drops(n)[reason]
	conn, err := from.Dial("udp", to, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("lost")); err != nil {
		t.Fatal(err)
	}
	s.Eventually(fmt.Sprintf("%s drops what %s sends to %s as %s", n.Name, from.Name, to, reason), func() bool {
		return s.Drops(n)[reason] > before
	})
}

// TestServicesFromOutside: every kind of address that a client outside may ask, at an entry node that has no backend, in both routing
// modes, families, and ways back. The pod sees the client's own address.
func TestServicesFromOutside(t *testing.T) {
	for mode, o := range map[string]clustertest.Options{
		"vxlan": {RoutingMode: "vxlan"}, "direct": {RoutingMode: "direct", PodRoutes: true},
	} {
		t.Run(mode, func(t *testing.T) {
			s := newOutsideServices(t, o)
			for _, v6 := range s.Families() {
				t.Run(clustertest.FamilyName(v6), func(t *testing.T) {
					// n1 shares the backend's network, n3 does not.
					for _, entry := range []*clustertest.Node{s.Node("n1"), s.Node("n3")} {
						t.Run("tunnel by "+entry.Name, func(t *testing.T) { s.forwards(t, s.tunnel, entry, v6) })
						t.Run("dsr by "+entry.Name, func(t *testing.T) { s.forwards(t, s.dsr, entry, v6) })
					}
					t.Run("traffic policy Local", func(t *testing.T) { s.keepsLocal(t, v6) })
					t.Run("from pods", func(t *testing.T) { s.servePods(t, v6) })
				})
			}
		})
	}
}

// forwards requires answers from n2's pod by an entry node, and that its flow table holds what the way back needs: both directions, or
// with DSR the client's only.
func (s *outsideServices) forwards(t *testing.T, service *outsideService, entry *clustertest.Node, v6 bool) {
	service.routeVia(s.Cluster, entry)
	for what, to := range service.addresses(entry, v6) {
		t.Run(what, func(t *testing.T) {
			before := len(s.flowsTo(entry, to))
			asks(t, s.Client, to, s.pods[1].Host)
			flows := s.flowsTo(entry, to)
			if len(flows)-before != 2 {
				t.Errorf("flows of the client on %s = %d more, want one for TCP and one for UDP", entry.Name, len(flows)-before)
			}
			for _, f := range flows {
				if wantPaired := service == s.tunnel; f.Paired != wantPaired || f.Action != "to_node" {
					t.Errorf("flow on %s: both directions %v, action %s; want %v, to_node", entry.Name, f.Paired, f.Action, wantPaired)
				}
			}
		})
	}
}

// keepsLocal asks a service whose traffic policy is Local, at the node that has the endpoint and at one that has none.
func (s *outsideServices) keepsLocal(t *testing.T, v6 bool) {
	n1, n2 := s.Node("n1"), s.Node("n2")
	s.local.routeVia(s.Cluster, n2)
	for what, to := range s.local.addresses(n2, v6) {
		t.Run(what+" with a local endpoint", func(t *testing.T) { asks(t, s.Client, to, s.pods[1].Host) })
	}
	s.local.routeVia(s.Cluster, n1)
	for what, to := range s.local.addresses(n1, v6) {
		t.Run(what+" without", func(t *testing.T) { s.drops(t, s.Client, to, n1, "service_no_local") })
	}
}

// servePods asks as the pod on n3. NodePorts are another node's: under policy Cluster the own node translates, under Local the node that
// was asked decides. Other outside addresses lead pods to any endpoint, whatever the policy.
func (s *outsideServices) servePods(t *testing.T, v6 bool) {
	n1, n2, n3, client := s.Node("n1"), s.Node("n2"), s.Node("n3"), s.pods[2]
	for what, to := range s.tunnel.addresses(n1, v6) {
		t.Run(what+", policy Cluster", func(t *testing.T) {
			before := len(s.flowsTo(n1, to))
			asks(t, client.Host, to, s.pods[1].Host)
			if got := len(s.flowsTo(n1, to)); got != before {
				t.Errorf("the pod's flows on n1 = %d, want none: its own node translates", got-before)
			}
		})
	}
	for what, to := range s.local.addresses(n2, v6) {
		t.Run(what+", policy Local, with an endpoint there", func(t *testing.T) { asks(t, client.Host, to, s.pods[1].Host) })
	}
	t.Run("NodePort of a node without endpoint, policy Local", func(t *testing.T) {
		s.drops(t, client.Host, s.local.addresses(n1, v6)["NodePort"], n1, "service_no_local")
	})
	t.Run("NodePort of the own node without endpoint, policy Local", func(t *testing.T) {
		asks(t, client.Host, s.local.addresses(n3, v6)["NodePort"], s.pods[1].Host)
	})
}
