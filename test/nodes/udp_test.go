// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/margay-cni/margay/internal/testutil/clustertest"
	"github.com/margay-cni/margay/internal/testutil/nodetest"
)

// udpClients are sockets that keep their port whatever becomes of the service that they send to, by who has them and what they send to.
type udpClients map[string]*nodetest.Conn

// newUDPClients sends from a pod to the ClusterIP and the NodePort of service 10, and from outside to the NodePort, in both families.
func newUDPClients(t *testing.T, c *clustertest.Cluster, pod *clustertest.Pod, entry *clustertest.Node) udpClients {
	t.Helper()
	out := udpClients{}
	dial := func(from *clustertest.Host, what string, to netip.AddrPort) {
		conn, err := from.Dial("udp", to, 40000+len(out))
		if err != nil {
			t.Fatal(err)
		}
		out[fmt.Sprintf("%s to the %s %s", from.Name, what, to)] = conn
	}
	for _, v6 := range c.Families() {
		dial(pod.Host, "ClusterIP", clusterIP(10, v6))
		dial(pod.Host, "NodePort", entry.AddrPort(v6, 30080))
		dial(c.Client, "NodePort", entry.AddrPort(v6, 30080))
	}
	return out
}

// wantNobody sends once from each and requires that nobody answers.
func (u udpClients) wantNobody(t *testing.T, when string) {
	t.Helper()
	for what, conn := range u {
		if got, err := conn.Ask(); err == nil {
			t.Errorf("%s: %s is answered %q, want nobody", when, what, got)
		}
	}
}

// wantServer requires that all of them, which go on sending, reach the server before the cluster's patience is over.
func (u udpClients) wantServer(t *testing.T, c *clustertest.Cluster, when, server string) {
	t.Helper()
	var got string
	var err error
	defer func() {
		if t.Failed() {
			t.Logf("the last answer: %q, %v", got, err)
		}
	}()
	for what, conn := range u {
		c.Eventually(fmt.Sprintf("%s: %s reaches %s", when, what, server), func() bool {
			got, err = conn.Ask()
			return err == nil && strings.HasPrefix(got, server+" ")
		})
	}
}

// Contract row U2: who sends to a service that is not there yet, or has no endpoints yet, reaches it once it has, by the same socket; and
// row U3: it follows when the pod is replaced, here or on another node, or serves by another port. Backends here and remote.
func TestU2_U3_UDPClientsFollow(t *testing.T) {
	for _, mode := range []string{"vxlan", "direct"} {
		t.Run(mode, func(t *testing.T) {
			c := clustertest.New(t, clustertest.Options{Nodes: 2, RoutingMode: mode, PodRoutes: mode == "direct"})
			here, there := c.Node("n1"), c.Node("n2")
			clients := newUDPClients(t, c, c.AddPod(here, "client", nil), here)
			c.WaitSettled()
			clients.wantNobody(t, "before there is a service")

			labels := map[string]string{"app": "dns"}
			service := clustertest.NodePortService("dns", 10, labels, 80, 8080, 30080)
			c.Apply(service)
			c.WaitSettled()
			clients.wantNobody(t, "before there is an endpoint")

			first := c.AddPod(here, "first", labels)
			first.Serve(8080)
			clients.wantServer(t, c, "the first endpoint", "first")

			nodetest.Serve(t, first.NS, "other-port", 8081)
			for i := range service.Spec.Ports {
				service.Spec.Ports[i].TargetPort.IntVal = 8081
			}
			c.Apply(service)
			clients.wantServer(t, c, "another port of the same pod", "other-port")

			c.DeletePod(first)
			second := c.AddPod(there, "second", labels)
			second.Serve(8081)
			clients.wantServer(t, c, "a pod in the place of the first", "second")

			c.DeletePod(second)
			third := c.AddPod(there, "third", labels)
			third.Serve(8081)
			clients.wantServer(t, c, "a pod in the place of the second", "third")

			// The service goes and comes again, under another number.
			c.Delete(service)
			c.WaitSettled()
			clients.wantNobody(t, "after the service has gone")
			c.Apply(service)
			clients.wantServer(t, c, "the service again", "third")
		})
	}
}

// Contract row U3: clients that ask all the time follow as well. Whenever the service changes, answers of the old server are under way.
func TestU3_BusyUDPClientsFollow(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{Nodes: 2, RoutingMode: "vxlan"})
	here, there := c.Node("n1"), c.Node("n2")
	labels := map[string]string{"app": "dns"}
	server := c.AddPod(there, "server", labels)
	names := map[int32]string{8080: "one", 8081: "other"}
	for port, name := range names {
		nodetest.Serve(t, server.NS, name, uint16(port))
	}
	service := clustertest.NodePortService("dns", 10, labels, 80, 8080, 30080)
	c.Apply(service)
	clients := newUDPClients(t, c, c.AddPod(here, "client", nil), here)
	c.WaitSettled()
	for round := range int32(10) {
		port := 8081 - round%2
		for i := range service.Spec.Ports {
			service.Spec.Ports[i].TargetPort.IntVal = port
		}
		c.Apply(service)
		var all sync.WaitGroup
		for what, conn := range clients {
			all.Go(func() {
				for end := time.Now().Add(10 * time.Second); ; {
					got, err := conn.Ask()
					if err == nil && strings.HasPrefix(got, names[port]+" ") {
						return
					}
					if time.Now().After(end) {
						t.Errorf("change %d: the last answer to %s is %q, %v, want one of %q", round, what, got, err, names[port])
						return
					}
				}
			})
		}
		all.Wait()
		if t.Failed() {
			return
		}
	}
}

// Contract row U1: clients of a backend that stays are left alone while others come and go.
func TestU1_SurvivingUDPFlowsStay(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{Nodes: 2})
	labels := map[string]string{"app": "dns"}
	stays := c.AddPod(c.Node("n2"), "stays", labels)
	stays.Serve(8080)
	c.Apply(clustertest.NodePortService("dns", 10, labels, 80, 8080, 30080))
	client := c.AddPod(c.Node("n1"), "client", nil)
	c.WaitSettled()
	clients := newUDPClients(t, c, client, c.Node("n1"))
	clients.wantServer(t, c, "the only endpoint", "stays")
	for i := range 3 {
		other := c.AddPod(c.Node("n1"), fmt.Sprintf("other%d", i), labels)
		other.Serve(8080)
		c.WaitSettled()
		c.DeletePod(other)
		c.WaitSettled()
		for what, conn := range clients {
			if got, err := conn.Ask(); err != nil || !strings.HasPrefix(got, "stays ") {
				t.Errorf("%s while others come and go = %q, %v, want stays", what, got, err)
			}
		}
	}
}
