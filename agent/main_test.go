// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/pkg/agent"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/datapath"
)

const serviceYAML = `apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec:
  type: NodePort
  selector: {app: web}
  clusterIPs: [10.96.0.10, "fd00:96::10"]
  ipFamilies: [IPv4, IPv6]
  ipFamilyPolicy: RequireDualStack
  ports: [{name: http, port: 80, targetPort: 8080, nodePort: 30080}]
`

const policyYAML = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: default}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress]
  ingress: [{ports: [{port: %d}]}]
`

func service(t *testing.T, d *datapath.Datapath, a netip.Addr, port uint16) (s bpf.Service, ok bool) {
	t.Helper()
	k := bpf.NewFrontendKey(6, a, port)
	err := d.Maps.Services.Lookup(&k, &s)
	return s, err == nil
}

func epoch(t *testing.T, n *nodetest.Node, p *nodetest.Pod) (e uint32) {
	t.Helper()
	k := uint32(p.Ifindex) % n.DP.Maps.EndpointEpochs.MaxEntries()
	if err := n.DP.Maps.EndpointEpochs.Lookup(&k, &e); err != nil {
		t.Fatal(err)
	}
	return e
}

// contents is every entry of every map that the agent writes, and its files.
func contents(t *testing.T, n *nodetest.Node) map[string]string {
	t.Helper()
	out := map[string]string{}
	m := &n.DP.Maps
	for name, one := range map[string]*ebpf.Map{
		"policy": m.Policy, "ipcache": m.IPCache, "endpoints": m.Endpoints, "pending": m.Pending, "services": m.Services, "backends": m.Backends,
		"service_backends": m.ServiceBackends, "node_addrs": m.NodeAddrs, "node_state": m.NodeState,
		"endpoint_epochs": m.EndpointEpochs, "service_epochs": m.ServiceEpochs,
	} {
		zero := make([]byte, one.ValueSize())
		var k, v []byte
		it := one.Iterate()
		for it.Next(&k, &v) {
			if one.Type() != ebpf.Array || !bytes.Equal(v, zero) {
				out[fmt.Sprintf("%s %x", name, k)] = fmt.Sprintf("%x", v)
			}
		}
		if err := it.Err(); err != nil {
			t.Fatalf("read %s: %v", name, err)
		}
	}
	for _, name := range []string{"services.json", "rules.json"} {
		b, err := os.ReadFile(filepath.Join(n.Config.Run, name))
		if err != nil {
			t.Fatal(err)
		}
		out[name] = string(b)
	}
	return out
}

func TestManifestsReachTheMapsAndStayThroughARestart(t *testing.T) {
	n := nodetest.New(t)
	manifests := t.TempDir()
	one, two := n.AddPod("one"), n.AddPod("two")
	record(t, n, one, map[string]string{"app": "web"})
	p := start(t, n, manifests)

	began := time.Now()
	put(t, manifests, "web.yaml", serviceYAML)
	counts := func(want uint32) func() bool {
		return func() bool {
			s4, ok4 := service(t, n.DP, netip.MustParseAddr("10.96.0.10"), 80)
			s6, ok6 := service(t, n.DP, netip.MustParseAddr("fd00:96::10"), 80)
			p4, okp4 := service(t, n.DP, netip.IPv4Unspecified(), 30080)
			p6, okp6 := service(t, n.DP, netip.IPv6Unspecified(), 30080)
			all := [2]uint32{want, want}
			return ok4 && ok6 && okp4 && okp6 && s4.Count == all && s6.Count == all && p4.Count == all && p6.Count == all
		}
	}
	eventually(t, "the service with one backend in each family", counts(1))
	t.Logf("file renamed → service in the maps: %v", time.Since(began))

	began = time.Now()
	record(t, n, two, map[string]string{"app": "web"})
	eventually(t, "the second pod among the backends", counts(2))
	t.Logf("record renamed → backend in the maps: %v", time.Since(began))
	t.Logf("the round: compile %v, write %v", p.status().LastChange.Compile, p.status().LastChange.Write)

	eventually(t, "the node's addresses", func() bool {
		for _, a := range nodetest.NodeAddrs {
			var flags uint32
			if k := bpf.NewAddr(a); n.DP.Maps.NodeAddrs.Lookup(&k, &flags) != nil || flags != bpf.NodeAddrLocal|bpf.NodeAddrNodePort {
				return false
			}
		}
		return true
	})

	isolated := func(pod *nodetest.Pod) func() bool {
		return func() bool {
			for _, a := range pod.Addrs {
				e, ok, err := n.DP.LookupEndpoint(a)
				if err != nil || !ok || e.PolicyId[bpf.Ingress] < bpf.PolicyFirst || e.PolicyId[bpf.Egress] != bpf.PolicyNone {
					return false
				}
			}
			return true
		}
	}
	before := epoch(t, n, one)
	began = time.Now()
	put(t, manifests, "policy.yaml", fmt.Sprintf(policyYAML, 8080))
	eventually(t, "the pods to be isolated", func() bool { return isolated(one)() && isolated(two)() })
	t.Logf("file renamed → policy in the maps: %v", time.Since(began))
	eventually(t, "the pod's epoch to be raised", func() bool { return epoch(t, n, one) != before })

	// A broken file is reported by file and line, and disturbs nothing: neither what it held before nor what others hold.
	// The API answers after the round that followed the change, and the source reports before it publishes.
	was := contents(t, n)
	put(t, manifests, "policy.yaml", strings.Replace(fmt.Sprintf(policyYAML, 8080), "kind: NetworkPolicy", "kind: [", 1))
	eventually(t, "the broken file to be reported", func() bool {
		for _, problem := range p.status().Source {
			if strings.HasSuffix(problem.File, "policy.yaml") && problem.Line > 0 {
				return true
			}
		}
		return false
	})
	rounds := p.status().Rounds
	eventually(t, "two more rounds", func() bool { return p.status().Rounds > rounds+2 })
	if diff := cmp.Diff(was, contents(t, n)); diff != "" {
		t.Errorf("maps with a broken file (-want +got):\n%s", diff)
	}

	// Killed and started again while the file is still broken: the policy that it held stays in force.
	p.kill()
	p = start(t, n, manifests)
	eventually(t, "a full compare", func() bool { return p.status().Rounds > 3 })
	if !p.status().Last.Held {
		t.Errorf("held = false, want true while a file has never been readable")
	}
	if !isolated(one)() || !isolated(two)() {
		t.Errorf("the pods are not isolated any more, want the policy in force that the broken file held")
	}
	put(t, manifests, "policy.yaml", fmt.Sprintf(policyYAML, 8080))
	eventually(t, "the source to be complete", func() bool { return !p.status().Last.Held })
	if diff := cmp.Diff(was, contents(t, n)); diff != "" {
		t.Errorf("maps once the file is readable again (-want +got):\n%s", diff)
	}

	// What the last round had to raise is settled: an agent that is killed before raises it once more.
	rounds = p.status().Rounds
	eventually(t, "two more rounds", func() bool { return p.status().Rounds > rounds+2 })
	p.kill()
	p = start(t, n, manifests)
	rounds = p.status().Rounds
	eventually(t, "full compares", func() bool { return p.status().Rounds > rounds+2 })
	if got := p.writes(); got != 0 {
		t.Errorf("entries written by an agent that was killed and started again = %d, want 0", got)
	}
	if diff := cmp.Diff(was, contents(t, n)); diff != "" {
		t.Errorf("maps after a restart (-want +got):\n%s", diff)
	}

	before = epoch(t, n, one)
	put(t, manifests, "policy.yaml", fmt.Sprintf(policyYAML, 9090))
	eventually(t, "the changed policy to raise the epoch", func() bool { return epoch(t, n, one) != before })

	for _, name := range []string{"web.yaml", "policy.yaml"} {
		if err := os.Remove(filepath.Join(manifests, name)); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "everything to be gone", func() bool {
		for k := range contents(t, n) {
			for _, name := range []string{"services ", "backends ", "service_backends ", "policy "} {
				if strings.HasPrefix(k, name) {
					return false
				}
			}
		}
		return true
	})
}

func TestWhatSomebodyRemovesIsRepaired(t *testing.T) {
	n := nodetest.New(t)
	pod := n.AddPod("one")
	record(t, n, pod, nil)
	p := start(t, n, t.TempDir())
	eventually(t, "from_netdev on the node's device", func() bool { return len(p.status().Last.Devices) == 1 })
	for name, tt := range map[string]struct {
		index    int
		attached func(int) error
	}{
		"pod":    {pod.Ifindex, n.DP.PodAttached},
		"netdev": {n.ClientDevice, n.DP.NetdevAttached},
	} {
		t.Run(name, func(t *testing.T) {
			n.NS.Do(func() {
				q := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
					LinkIndex: tt.index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
				}}
				if err := netlink.QdiscDel(q); err != nil {
					t.Fatal(err)
				}
				eventually(t, "the program to be attached again", func() bool { return tt.attached(tt.index) == nil })
			})
		})
	}
	for _, a := range pod.Addrs {
		k := bpf.NewAddr(a)
		if err := n.DP.Maps.Endpoints.Delete(&k); err != nil {
			t.Fatal(err)
		}
	}
	// The record is young: its ADD could still be at work. The agent waits for it to settle.
	eventually(t, "the endpoints to be rebuilt", func() bool {
		for _, a := range pod.Addrs {
			if e, ok, err := n.DP.LookupEndpoint(a); err != nil || !ok || int(e.Ifindex) != pod.Ifindex {
				return false
			}
		}
		return true
	})
}

func TestDevicesAndRoutesAreFollowed(t *testing.T) {
	n := nodetest.New(t)
	p := start(t, n, t.TempDir())
	routes := func() (epoch uint32) {
		if err := n.DP.Maps.EndpointEpochs.Lookup(bpf.EpochSlotRoutes, &epoch); err != nil {
			t.Fatal(err)
		}
		return epoch
	}
	// What the agent makes at its start changes the routes, too, and the kernel takes its time with IPv6.
	settled := func() uint32 {
		var epoch uint32
		eventually(t, "the route epoch to stay for three rounds", func() bool {
			epoch = routes()
			rounds := p.status().Rounds
			eventually(t, "three more rounds", func() bool { return p.status().Rounds > rounds+3 })
			return routes() == epoch
		})
		return epoch
	}
	eventually(t, "from_netdev on the node's device", func() bool { return len(p.status().Last.Devices) == 1 })
	before := settled()
	n.NS.Do(func() {
		r, err := netlink.ParseIPNet("198.51.100.0/24")
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.RouteAdd(&netlink.Route{Dst: r, Gw: nodetest.ClientAddrs[0].AsSlice()}); err != nil {
			t.Fatal(err)
		}
	})
	eventually(t, "the route epoch to be raised", func() bool { return routes() != before })

	// A pod's start is no change of the node's routes.
	before = settled()
	pod := n.AddPod("one")
	record(t, n, pod, nil)
	eventually(t, "the pod to be known", func() bool { return p.status().Last.Counts.Endpoints == 1 })
	rounds := p.status().Rounds
	eventually(t, "two more rounds", func() bool { return p.status().Rounds > rounds+2 })
	if got := routes(); got != before {
		t.Errorf("route epoch after a pod's start = %d, want %d as before", got, before)
	}
	n.NS.Do(func() {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "eth1"
		veth := netlink.NewVeth(attrs)
		veth.PeerName = "eth1peer"
		if err := netlink.LinkAdd(veth); err != nil {
			t.Fatal(err)
		}
		a, err := netlink.ParseAddr("198.18.0.1/24")
		if err != nil {
			t.Fatal(err)
		}
		l, err := netlink.LinkByName("eth1")
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.AddrAdd(l, a); err != nil {
			t.Fatal(err)
		}
		eventually(t, "from_netdev on a device that appeared", func() bool { return n.DP.NetdevAttached(l.Attrs().Index) == nil })
		k := bpf.NewAddr(netip.MustParseAddr("198.18.0.1"))
		var flags uint32
		// Not a primary one, so no NodePorts are served on it (contract row V6).
		eventually(t, "its address", func() bool { return n.DP.Maps.NodeAddrs.Lookup(&k, &flags) == nil && flags == bpf.NodeAddrLocal })
		if err := netlink.LinkDel(l); err != nil {
			t.Fatal(err)
		}
		eventually(t, "its address to go", func() bool { return n.DP.Maps.NodeAddrs.Lookup(&k, &flags) != nil })
	})
}

func TestSecondAgentIsRefused(t *testing.T) {
	n := nodetest.New(t)
	start(t, n, t.TempDir())
	second := command(t, n, t.TempDir())
	var err error
	n.NS.Do(func() { err = second.cmd.Run() })
	if err == nil || second.cmd.ProcessState.ExitCode() != 1 || !strings.Contains(second.log.String(), agent.ErrRunning.Error()) {
		t.Errorf("second agent ended with %v and %q, want status 1 and %q", err, second.log, agent.ErrRunning)
	}
}

func TestSignalEndsTheAgentCleanly(t *testing.T) {
	n := nodetest.New(t)
	p := start(t, n, t.TempDir())
	if err := p.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("agent ended with %v after a signal, want success", err)
	}
	n.NS.Do(func() {
		if err := n.DP.NetdevAttached(n.ClientDevice); err != nil {
			t.Errorf("from_netdev after the agent ended: %v, want it in place", err)
		}
	})
}

func TestParse(t *testing.T) {
	for name, tt := range map[string]struct {
		args []string
		ok   bool
	}{
		"least": {[]string{"--manifests", "m", "--node", "n"}, true},
		"everything": {[]string{"--manifests", "m", "--node", "n", "--bpffs", "b", "--run", "r", "--devices", "eth*,br0", "--log-level", "debug", "--resync", "1m", "--map-size", "flows=10",
			"--load-balancing", "maglev", "--nodeport-addresses", "primary, 10.0.0.0/8,localhost", "--service-cidrs", "10.96.0.0/12, fd00:96::/108"}, true},
		"version":         {[]string{"--version"}, true},
		"no manifests":    {[]string{"--node", "n"}, false},
		"no node":         {[]string{"--manifests", "m", "--node", ""}, false},
		"argument":        {[]string{"--manifests", "m", "--node", "n", "x"}, false},
		"unknown flag":    {[]string{"--manifests", "m", "--nose", "n"}, false},
		"wrong size":      {[]string{"--manifests", "m", "--node", "n", "--map-size", "flows"}, false},
		"wrong balancing": {[]string{"--manifests", "m", "--node", "n", "--load-balancing", "least"}, false},
		"wrong NodePorts": {[]string{"--manifests", "m", "--node", "n", "--nodeport-addresses", "primary,first"}, false},
		"wrong range":     {[]string{"--manifests", "m", "--node", "n", "--service-cidrs", "10.96.0.0"}, false},
		"zero size":       {[]string{"--manifests", "m", "--node", "n", "--map-size", "flows=0"}, false},
		"negative resync": {[]string{"--manifests", "m", "--node", "n", "--resync", "-1s"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := parse(tt.args, io.Discard); (err == nil) != tt.ok {
				t.Errorf("parse(%q) = %v, want success = %v", tt.args, err, tt.ok)
			}
		})
	}
}
