// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/margay-cni/margay/internal/testutil/clustertest"
)

// TestPodAddressAsExternalAddress: an external address takes its service's port and nothing else. Where it is a pod's, the pod's other ports
// are still the pod's: for pods of its node and of another, and for its own node, whose probes they answer.
func TestPodAddressAsExternalAddress(t *testing.T) {
	t.Parallel()
	c := clustertest.New(t, clustertest.Options{})
	n1, n2 := c.Node("n1"), c.Node("n2")
	shared, near := c.AddPod(n1, "shared", nil), c.AddPod(n1, "near", nil)
	backend, far := c.AddPod(n2, "backend", map[string]string{"on": "backend"}), c.AddPod(n2, "far", nil)
	shared.Serve(podPort)
	backend.Serve(podPort)
	s := clustertest.NodePortService("shared", 1, map[string]string{"on": "backend"}, outsidePort, podPort, outsideNodePorts+1)
	s.Spec.Type = corev1.ServiceTypeNodePort
	for _, v6 := range c.Families() {
		s.Spec.ExternalIPs = append(s.Spec.ExternalIPs, shared.Addr(v6).String())
	}
	c.Apply(s)
	c.WaitSettled()
	for _, v6 := range c.Families() {
		t.Run(clustertest.FamilyName(v6), func(t *testing.T) {
			for _, from := range []*clustertest.Host{near.Host, far.Host} {
				asks(t, from, netip.AddrPortFrom(shared.Addr(v6), outsidePort), backend.Host)
				asks(t, from, shared.AddrPort(v6, podPort), shared.Host)
			}
			asks(t, n1.Host, shared.AddrPort(v6, podPort), shared.Host)
			pings(t, n1.Host, shared.Addr(v6))
			pings(t, far.Host, shared.Addr(v6))
		})
	}
}
