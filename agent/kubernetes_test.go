// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/margay-cni/margay/internal/testutil/apitest"
	"github.com/margay-cni/margay/internal/testutil/nodetest"
)

// apiServer starts an API server in the node's namespace; it knows the node.
func apiServer(t *testing.T, n *nodetest.Node) *apitest.Server {
	t.Helper()
	var s *apitest.Server
	n.NS.Do(func() { s = apitest.New(t) })
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}}
	for _, a := range n.Addrs {
		node.Status.Addresses = append(node.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a.String()})
	}
	s.Put(node, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "default"}},
		&networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/16", "fd00:96::/112"}}})
	return s
}

func apiService(name string, ips ...string) *corev1.Service {
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}}
	s.Spec = corev1.ServiceSpec{Type: corev1.ServiceTypeClusterIP, ClusterIP: ips[0], ClusterIPs: ips, Ports: []corev1.ServicePort{{Name: "http", Port: 80}}}
	return s
}

func apiSlices(service string, port int32, addrs ...netip.Addr) (out []*discoveryv1.EndpointSlice) {
	name, tcp, node := "http", corev1.ProtocolTCP, "n1"
	for _, a := range addrs {
		family := discoveryv1.AddressTypeIPv4
		if a.Is6() {
			family = discoveryv1.AddressTypeIPv6
		}
		out = append(out, &discoveryv1.EndpointSlice{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: "default", Name: service + "-" + strings.ToLower(string(family)), Labels: map[string]string{discoveryv1.LabelServiceName: service},
			},
			AddressType: family, Ports: []discoveryv1.EndpointPort{{Name: &name, Port: &port, Protocol: &tcp}},
			Endpoints: []discoveryv1.Endpoint{{Addresses: []string{a.String()}, NodeName: &node}},
		})
	}
	return out
}

// startFrom runs an agent that follows the server until the test ends; it need not be ready yet.
func startFrom(t *testing.T, n *nodetest.Node, s *apitest.Server, flags ...string) *process {
	t.Helper()
	p := commandFrom(t, n, []string{"--kubeconfig", s.Kubeconfig(), "--state-dir", t.TempDir()}, flags...)
	n.NS.Do(func() {
		if err := p.cmd.Start(); err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("agent's log:\n%s", p.log)
		}
	})
	return p
}

func (p *process) ready() bool {
	r, err := p.get("/healthz")
	return err == nil && r == "ok\n"
}

// While the API server is away everything goes on; an agent that starts during that time changes nothing, and repairs what it can.
func TestAPIServerIsAway(t *testing.T) {
	n := nodetest.New(t)
	s := apiServer(t, n)
	pod := n.AddPod("one")
	nodetest.Serve(t, pod.NS, "one", 8080)
	record(t, n, pod, nil)
	s.Put(apiService("web", "10.96.0.10", "fd00:96::10"))
	for _, slice := range apiSlices("web", 8080, pod.Addrs...) {
		s.Put(slice)
	}
	first := startFrom(t, n, s)
	asked := func() bool {
		for _, a := range []string{"10.96.0.10", "fd00:96::10"} {
			if got, err := nodetest.Ask(t, n.NS, "tcp", netip.AddrPortFrom(netip.MustParseAddr(a), 80)); err != nil || !strings.HasPrefix(got, "one ") {
				return false
			}
		}
		return true
	}
	within(t, time.Minute, "an answer", asked)
	// The cluster's own ranges stand in for the flag.
	learned := []string{"10.96.0.0/16 from 192.0.2.1", "fd00:96::/112 from 2001:db8:1::1"}
	within(t, time.Minute, "routes", func() bool { return cmp.Equal(learned, serviceRoutes(t, n)) })
	within(t, time.Minute, "readiness", func() bool {
		code, _ := ask(t, n, "http://127.0.0.1:10256/readyz")
		return code == 200 && first.ready()
	})
	before := contents(t, n)

	s.Stop()
	within(t, time.Minute, "a problem", func() bool { return strings.Contains(fmt.Sprint(first.status().Source), "cannot be reached since") })
	if code, _ := ask(t, n, "http://127.0.0.1:10256/readyz"); code != 200 {
		t.Errorf("/readyz of a running agent without API server = %d, want 200", code)
	}
	first.kill()

	second := startFrom(t, n, s)
	within(t, time.Minute, "the next agent's problem", func() bool {
		_, err := second.get("/healthz")
		return err == nil && strings.Contains(fmt.Sprint(second.status().Source), "nothing is changed until everything has been read")
	})
	rounds, sweeps := second.status().Rounds, second.status().Flows.Last
	within(t, time.Minute, "full rounds and sweeps without API server", func() bool {
		st := second.status()
		return st.Rounds > rounds+2 && st.Flows.Last.After(sweeps)
	})
	for path, want := range map[string]int{"/livez": 200, "/healthz": 200, "/readyz": 503} {
		if code, body := ask(t, n, "http://127.0.0.1:10256"+path); code != want {
			t.Errorf("%s = %d %s, want %d", path, code, body, want)
		}
	}
	if !asked() {
		t.Error("no answer by an agent that has not read anything yet")
	}
	n.NS.Do(func() {
		err := netlink.QdiscDel(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: pod.Ifindex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}})
		if err != nil {
			t.Fatal(err)
		}
	})
	within(t, time.Minute, "the pod's programs to be attached again", asked)
	if diff := cmp.Diff(before, contents(t, n)); diff != "" {
		t.Errorf("maps (-before +after):\n%s", diff)
	}
	if diff := cmp.Diff(learned, serviceRoutes(t, n)); diff != "" {
		t.Errorf("routes (-want +got):\n%s", diff)
	}

	s.Delete(apiService("web", "10.96.0.10", "fd00:96::10"))
	s.Put(apiService("other", "10.96.0.11", "fd00:96::11"))
	for _, slice := range apiSlices("other", 8080, pod.Addrs...) {
		s.Put(slice)
	}
	n.NS.Do(s.Start)
	within(t, time.Minute, "what happened meanwhile", func() bool {
		_, gone := service(t, n.DP, netip.MustParseAddr("10.96.0.10"), 80)
		_, here := service(t, n.DP, netip.MustParseAddr("fd00:96::11"), 80)
		return !gone && here && second.ready()
	})
}

// What a person must see becomes an event on the node: here that its ranges are missing, and that they have come.
func TestEventsAboutTheNode(t *testing.T) {
	n := nodetest.New(t)
	s := apiServer(t, n)
	startFrom(t, n, s)
	has := func(kind, text string) func() bool {
		return func() bool {
			for _, e := range s.Events() {
				if e.InvolvedObject.Name == "n1" && e.Type == kind && strings.Contains(e.Message, text) {
					return true
				}
			}
			return false
		}
	}
	within(t, time.Minute, "a warning", has(corev1.EventTypeWarning, "spec.podCIDRs is empty"))
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}, Spec: corev1.NodeSpec{PodCIDRs: []string{"10.244.1.0/24", "fd00:244:1::/64"}}}
	for _, a := range n.Addrs {
		node.Status.Addresses = append(node.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a.String()})
	}
	s.Put(node)
	within(t, time.Minute, "its end", has(corev1.EventTypeNormal, "spec.podCIDRs is empty"))
}

// memoryBound is what the agent may hold in memory with 5 000 pods and 1 000 services, its own file included: the contract is 64 MiB. What is
// measured depends on when the garbage collector has last run, so the bound of the test has room.
const memoryBound = 80 << 10 // KiB

// TestMemoryWithManyPods measures the memory of the shipped binary with 5 000 pods and 1 000 services with 5 endpoints in each family.
func TestMemoryWithManyPods(t *testing.T) {
	const pods, services, endpoints = 5000, 1000, 5
	n := nodetest.New(t)
	s := apiServer(t, n)
	for i := range pods {
		s.Put(bulkyPod(i))
	}
	for i := range services {
		s.Put(apiService(fmt.Sprint("s", i), netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)}).String(), fmt.Sprintf("fd00:96::%x", i+1)))
		for _, slice := range apiSlices(fmt.Sprint("s", i), 8080, podAddr(i*endpoints, false), podAddr(i*endpoints, true)) {
			for e := 1; e < endpoints; e++ {
				ep := slice.Endpoints[0]
				ep.Addresses = []string{podAddr(i*endpoints+e, slice.AddressType == discoveryv1.AddressTypeIPv6).String()}
				slice.Endpoints = append(slice.Endpoints, ep)
			}
			s.Put(slice)
		}
	}
	binary := filepath.Join(t.TempDir(), "margay-agent")
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the agent: %v\n%s", err, out)
	}
	p := commandFrom(t, n, []string{"--kubeconfig", s.Kubeconfig(), "--state-dir", t.TempDir()}, "--resync", "10s", "--log-level", "info")
	p.cmd.Path = binary
	began := time.Now()
	n.NS.Do(func() {
		if err := p.cmd.Start(); err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("agent's log:\n%s", p.log)
		}
	})
	within(t, loadBound, "the agent to be ready", p.ready)
	t.Logf("ready %v after the start, resident %v", time.Since(began).Round(time.Millisecond), resident(t, p))
	for i := range 500 {
		pod := bulkyPod(i)
		pod.Labels["changed"] = "yes"
		s.Put(pod)
		time.Sleep(5 * time.Millisecond)
	}
	time.Sleep(time.Second)
	after := resident(t, p)
	t.Logf("resident %v after 500 changed pods", after)
	if after["VmRSS"] > memoryBound {
		t.Errorf("resident %d KiB, want at most %d", after["VmRSS"], memoryBound)
	}
}

func podAddr(i int, v6 bool) netip.Addr {
	if v6 {
		return netip.MustParseAddr(fmt.Sprintf("fd00:244::%x", i+1))
	}
	return netip.AddrFrom4([4]byte{10, 244, byte(i >> 8), byte(i)})
}

// bulkyPod has what real pods carry along.
func bulkyPod(i int) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
		Namespace: "default", Name: fmt.Sprintf("web-5d8f9c7b6d-%05d", i), UID: "0f1e2d3c-aaaa-bbbb-cccc-1234567890ab",
		Labels:        map[string]string{"app": fmt.Sprint("web-", i/50), "pod-template-hash": "5d8f9c7b6d", "app.kubernetes.io/name": "web"},
		ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "kube-controller-manager", FieldsV1: metav1.NewFieldsV1(`{"f":"` + strings.Repeat("x", 4000) + `"}`)}},
	}}
	for c := range 2 {
		container := corev1.Container{Name: fmt.Sprint("c", c), Image: "registry.example/team/web:1.2.3", Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}}}
		for e := range 20 {
			container.Env = append(container.Env, corev1.EnvVar{Name: fmt.Sprint("VARIABLE_", e), Value: strings.Repeat("v", 40)})
		}
		p.Spec.Containers = append(p.Spec.Containers, container)
	}
	p.Spec.NodeName = fmt.Sprint("n", i/50+2)
	p.Status.Phase = corev1.PodRunning
	p.Status.PodIPs = []corev1.PodIP{{IP: podAddr(i, false).String()}, {IP: podAddr(i, true).String()}}
	p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	return p
}

// resident is what the process holds in memory, the most that it has held, and what of it is no file, in KiB.
func resident(t *testing.T, p *process) map[string]int {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]int{}
	for line := range strings.Lines(string(data)) {
		name, value, _ := strings.Cut(line, ":")
		if slices.Contains([]string{"VmHWM", "VmRSS", "RssAnon"}, name) {
			if out[name], err = strconv.Atoi(strings.Fields(value)[0]); err != nil {
				t.Fatal(err)
			}
		}
	}
	return out
}
