// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/pins"
)

type portMapping struct {
	HostPort      int    `json:"hostPort"`
	ContainerPort int    `json:"containerPort"`
	Protocol      string `json:"protocol"`
	HostIP        string `json:"hostIP,omitempty"`
}

// both maps the port of TCP and UDP.
func both(hostIP string, port int) []portMapping {
	return []portMapping{{port, 8080, "tcp", hostIP}, {port, 8080, "udp", hostIP}}
}

// withPorts is the pod's attachment as a runtime makes it of hostPorts, because the shipped conflist declares the capability.
func (m *machine) withPorts(p *pod, ports []portMapping) *libcni.RuntimeConf {
	rt := m.attachment(p)
	rt.CapabilityArgs = map[string]any{"portMappings": ports}
	return rt
}

// startPodWithPorts makes and connects a pod that serves on port 8080.
func (m *machine) startPodWithPorts(name string, ports []portMapping) *pod {
	m.t.Helper()
	p := m.newPod(name)
	m.node.Do(func() {
		_, err := m.cni.AddNetworkList(m.t.Context(), m.network, m.withPorts(p, ports))
		m.must(err)
	})
	r, err := m.records().Load("e2e-"+name, "eth0")
	m.must(err)
	p.addrs = r.Addresses
	nodetest.Serve(m.t, p.ns, name, 8080)
	return p
}

// answers asks from a namespace with TCP and UDP, and wants the pod's name and the client's own address.
func (m *machine) answers(from *netnstest.NS, to netip.AddrPort, pod string, client netip.Addr) {
	m.t.Helper()
	for _, network := range []string{"tcp", "udp"} {
		got, err := nodetest.Ask(m.t, from, network, to)
		if want := pod + " " + client.String(); err != nil || got != want {
			m.t.Errorf("%s to %s = %q, %v, want %q", network, to, got, err, want)
		}
	}
}

func (m *machine) silent(from *netnstest.NS, to netip.AddrPort) {
	m.t.Helper()
	if got, err := nodetest.Ask(m.t, from, "tcp", to); err == nil {
		m.t.Errorf("TCP to %s = %q, want no answer", to, got)
	}
}

// Contract row M3: hostPorts, at every address and at one, in both families, from outside and from pods, whose address is kept.
func TestM3_HostPort(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.startAgent()
	web := m.startPodWithPorts("web", both("", 8053))
	m.startPodWithPorts("one", append(both(nodetest.NodeAddrs[0].String(), 8054), both(nodetest.NodeAddrs[1].String(), 8054)...))
	other := m.startPod("other")
	for i, a := range nodetest.NodeAddrs {
		to := netip.AddrPortFrom(a, 8053)
		m.eventually("the NIC has its program", func() bool {
			_, err := nodetest.Ask(t, m.client, "tcp", to)
			return err == nil
		})
		m.answers(m.client, to, "web", nodetest.ClientAddrs[i])
		m.answers(m.client, netip.AddrPortFrom(a, 8054), "one", nodetest.ClientAddrs[i])
		m.answers(other.ns, to, "web", other.addrs[i])
		m.answers(other.ns, netip.AddrPortFrom(a, 8054), "one", other.addrs[i])
		m.answers(web.ns, to, "web", a) // to itself: as the node's address
		m.silent(m.client, netip.AddrPortFrom(a, 8055))
	}
	out, err := exec.Command(filepath.Join(bin, "margayctl"), "services", "--bpffs", m.config.BPFFS, "--run", m.config.Run).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "shop/web:hostPort-8053") || !strings.Contains(string(out), "shop/one:hostPort-8054") ||
		!strings.Contains(string(out), "host_port") || strings.Contains(string(out), "external_local") {
		t.Errorf("margayctl services = %s, %v, want both hostPorts by their pods' names", out, err)
	}

	// Taken is taken, whoever asks; the refused pod leaves nothing and disturbs nobody.
	p := m.newPod("late")
	m.node.Do(func() {
		_, err := m.cni.AddNetworkList(t.Context(), m.network, m.withPorts(p, both("", 8053)))
		if err == nil || !strings.Contains(err.Error(), "taken by pod shop/web") {
			t.Errorf("ADD with a taken hostPort = %v, want the holder's name", err)
		}
	})
	m.answers(m.client, netip.AddrPortFrom(nodetest.NodeAddrs[0], 8053), "web", nodetest.ClientAddrs[0])

	// DEL gives the port back, and the next one gets it.
	m.node.Do(func() { m.must(m.cni.DelNetworkList(t.Context(), m.network, m.withPorts(web, both("", 8053)))) })
	for i, a := range nodetest.NodeAddrs {
		m.silent(m.client, netip.AddrPortFrom(a, 8053))
		m.answers(m.client, netip.AddrPortFrom(a, 8054), "one", nodetest.ClientAddrs[i])
	}
	m.startPodWithPorts("next", both("", 8053))
	for i, a := range nodetest.NodeAddrs {
		m.answers(m.client, netip.AddrPortFrom(a, 8053), "next", nodetest.ClientAddrs[i])
	}
}

// Contract rows M3 and V17: the node's own processes reach hostPorts, at its addresses and at the loopback ones, also from a source that is not
// a loopback address. A hostPort on a loopback address is for nobody else.
func TestM3_HostPortFromTheNode(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.startAgent()
	m.startPodWithPorts("web", both("", 8053))
	m.startPodWithPorts("own", append(both("127.0.0.1", 8054), both("::1", 8054)...))
	other := m.startPod("other")
	for i, loopback := range []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::1")} {
		for pod, to := range map[string]netip.AddrPort{
			"web": netip.AddrPortFrom(nodetest.NodeAddrs[i], 8053), "web ": netip.AddrPortFrom(loopback, 8053), "own": netip.AddrPortFrom(loopback, 8054),
		} {
			for _, network := range []string{"tcp", "udp"} {
				m.eventually("the node reaches "+network+" "+to.String(), func() bool {
					got, err := nodetest.Ask(t, m.node, network, to)
					return err == nil && strings.HasPrefix(got, strings.TrimSpace(pod)+" ")
				})
			}
		}
		m.node.Do(func() {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: nodetest.NodeAddrs[i].AsSlice()}, Timeout: 5 * time.Second}
			c, err := d.DialContext(t.Context(), "tcp", netip.AddrPortFrom(loopback, 8054).String())
			if err != nil {
				t.Errorf("from %s to %s: %v, want a connection", nodetest.NodeAddrs[i], loopback, err)
				return
			}
			m.must(c.Close())
		})
		m.silent(m.client, netip.AddrPortFrom(nodetest.NodeAddrs[i], 8054))
		m.silent(other.ns, netip.AddrPortFrom(nodetest.NodeAddrs[i], 8054))
	}
}

// A hostPort is made without the agent, outlives it, and a restart disturbs neither an open connection nor new ones. What somebody has removed
// from the maps meanwhile, the agent makes again.
func TestM3_HostPortNeedsNoAgent(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.apply("web.yaml", webService)
	m.startAgent()
	m.startPod("web")
	m.eventually("the NodePort works", func() bool { _, ok := m.asks(false); return ok })
	m.killAgent()
	p := m.startPodWithPorts("port", both("", 8053))
	to := []netip.AddrPort{netip.AddrPortFrom(nodetest.NodeAddrs[0], 8053), netip.AddrPortFrom(nodetest.NodeAddrs[1], 8053)}
	var open []*nodetest.Conn
	for _, network := range []string{"tcp", "udp"} {
		for _, a := range to {
			c, err := nodetest.Dial(t, m.client, network, a, 0)
			m.must(err)
			open = append(open, c)
		}
	}
	works := func(when string) {
		t.Helper()
		for i, c := range open {
			if got, err := c.Ask(); err != nil || !strings.HasPrefix(got, "port ") {
				t.Errorf("%s: open connection %d = %q, %v, want an answer", when, i, got, err)
			}
		}
		for i, a := range to {
			m.answers(m.client, a, "port", nodetest.ClientAddrs[i])
		}
		if why, ok := m.asks(false); !ok {
			t.Errorf("%s: NodePort: %s", when, why)
		}
	}
	works("without the agent")
	m.startAgent("--resync", "100ms")
	works("with the agent")
	m.killAgent()

	d, err := datapath.Open(m.config)
	m.must(err)
	defer d.Close()
	r, err := m.records().Load("e2e-port", "eth0")
	m.must(err)
	for _, hp := range r.HostPorts {
		m.must(d.DeleteHostPort(pins.HostPort{
			ID: hp.ID, Frontend: bpf.NewFrontendKey(hp.ProtocolNumber(), hp.Host.Addr(), hp.Host.Port()), Backend: hp.Pod,
		}))
	}
	m.silent(m.client, to[0])
	m.startAgent("--resync", "100ms")
	m.eventually("the hostPorts are made again", func() bool {
		_, err := nodetest.Ask(t, m.client, "udp", to[1])
		return err == nil
	})
	works("after the repair")

	// Record and pod gone without DEL: nobody has the hostPorts any more.
	p.ns.Delete()
	m.must(m.records().Delete("e2e-port", "eth0"))
	m.eventually("the hostPorts are removed", func() bool {
		_, there, err := d.LookupFrontend(bpf.NewFrontendKey(r.HostPorts[0].ProtocolNumber(), r.HostPorts[0].Host.Addr(), 8053))
		return err == nil && !there
	})
}
