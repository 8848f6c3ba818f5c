// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/margay-cni/margay/pkg/bpf"
	records "github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/netns"
)

// Issue: a changed policy is enforced within 50 ms.
const policyTarget = 50 // ms

// Size of the cluster in which a policy changes.
const (
	policyNamespaces = 100
	policyPods       = 5000
	policyCount      = 10_000
)

// benchPolicyChange measures from the API server's write of one policy to the first packet that is judged by it, with 10 000 policies and
// 5000 pods, 102 of them on the node.
func benchPolicyChange(ctx context.Context, b *bench) (err error) {
	l, err := b.newAgentLab("policy")
	if err != nil {
		return err
	}
	defer l.close()
	l.putCluster(1)
	l.putPolicies()
	if err := l.startWith(ctx, "server", l.fromServer()...); err != nil {
		return err
	}
	prog, err := ebpf.LoadPinnedProgram(filepath.Join(l.bpffs, "progs", l.dp.Build(), bpf.ProgFromPod), nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, prog.Close()) }()
	return netns.Do(l.node.path, func() error {
		p := &policyProbe{lab: l, prog: prog}
		if err := p.addPods(); err != nil {
			return err
		}
		return p.measure(b.choose(200, 50, 2))
	})
}

// policyProbe sends first packets from one pod to another, in the lab's namespace.
type policyProbe struct {
	lab      *agentLab
	prog     *ebpf.Program
	from, to *records.Record
	port     uint16
}

func (p *policyProbe) measure(times int) error {
	if _, err := p.change(false); err != nil { // the first compilation, too
		return err
	}
	time.Sleep(2 * time.Second)
	var took []float64
	for i := range times {
		time.Sleep(time.Duration(50+i%10) * time.Millisecond)
		d, err := p.change(i%2 == 0)
		if err != nil {
			return err
		}
		took = append(took, milliseconds(d))
	}
	const name = "one of 10 000 policies with 5 000 pods, to the first packet under it"
	p.lab.bench.alone("agent.policy.p50", name+", p50", "ms", policyTarget).ours = took
	p.lab.bench.alone("agent.policy.p99", name+", p99", "ms", 0).addAlone(percentile(took, 99))
	return nil
}

// change has the policy allow the packets, or not, and returns after what time one was judged by it.
func (p *policyProbe) change(allow bool) (time.Duration, error) {
	want := actShot
	if allow {
		want = actRedirect
	}
	port := intstr.FromInt32(targetPort)
	if !allow {
		port = intstr.FromInt32(targetPort + 1)
	}
	began := time.Now()
	p.lab.api.Put(&networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "changes"},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": p.to.Name}},
			PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress},
			Ingress: []networkingv1.NetworkPolicyIngressRule{{
				From:  []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": p.from.Name}}}},
				Ports: []networkingv1.NetworkPolicyPort{{Port: &port}},
			}},
		},
	})
	for ; ; time.Sleep(100 * time.Microsecond) { // without a pause the agent would have one CPU less
		verdict, err := p.packet()
		if err != nil {
			return 0, err
		}
		took := time.Since(began)
		if verdict == want {
			return took, nil
		}
		if took > patience {
			return 0, p.lab.late(fmt.Sprintf("verdict %d, want %d", verdict, want))
		}
	}
}

// packet sends the first packet of another connection and returns the verdict.
func (p *policyProbe) packet() (int, error) {
	p.port++
	packet, err := tcpPacket(macOf(p.from.MAC), macOf(p.from.HostMAC), netip.AddrPortFrom(p.from.Addresses[0], 10000+p.port%50000),
		netip.AddrPortFrom(p.to.Addresses[0], targetPort), true)
	if err != nil {
		return 0, err
	}
	verdict, _, err := testRun(p.prog, packet, p.from.HostIfindex, 1)
	return verdict, err
}

func macOf(text string) (mac [6]byte) {
	_, _ = fmt.Sscanf(text, "%02x:%02x:%02x:%02x:%02x:%02x", &mac[0], &mac[1], &mac[2], &mac[3], &mac[4], &mac[5]) // the kernel wrote it
	return mac
}

// addPods makes the devices, records and entries of two pods, as the plugin would; their other ends are nowhere.
func (p *policyProbe) addPods() error {
	for i, r := range []**records.Record{&p.from, &p.to} {
		name := []string{"from", "to"}[i]
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "mgy" + name
		veth := netlink.NewVeth(attrs)
		veth.PeerName = name
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("make a device: %w", err)
		}
		link, err := netlink.LinkByName(attrs.Name)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		mac := link.Attrs().HardwareAddr.String()
		*r = &records.Record{
			ContainerID: "c-" + name, IfName: "eth0", Netns: p.lab.node.path, Network: "bench", Namespace: "default", Name: name,
			Addresses: []netip.Addr{probeAddr(i)}, MAC: mac, HostMAC: mac, HostIfName: attrs.Name, HostIfindex: link.Attrs().Index, Created: time.Now(),
		}
		e := bpf.Endpoint{
			Ifindex: uint32(link.Attrs().Index), Identity: bpf.IdentityPodUnknown, PolicyId: [2]uint32{bpf.PolicyNodeOnly, bpf.PolicyNodeOnly},
			Mac: macOf(mac), HostMac: macOf(mac),
		}
		if err := p.lab.dp.PutEndpoint(probeAddr(i), e); err != nil {
			return err
		}
		if err := records.NewStore(filepath.Join(p.lab.dir, "server", "run")).Save(*r); err != nil {
			return err
		}
	}
	return nil
}

func probeAddr(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 64, 0, byte(200 + i)}) }

// putPolicies fills the API server with namespaces, pods, one in 50 of them on the node, and policies: each lets one app and one CIDR in at a range
// of ports, to one app of its namespace.
func (l *agentLab) putPolicies() {
	app := func(name string) *metav1.LabelSelector {
		return &metav1.LabelSelector{MatchLabels: map[string]string{"app": name}}
	}
	for i := range policyNamespaces {
		l.api.Put(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("ns-", i)}})
	}
	put := func(namespace, name, app string, number int, local bool, addrs ...netip.Addr) {
		pod := apiPod(number, 0)
		pod.Namespace, pod.Name, pod.Labels["app"], pod.Spec.NodeName = namespace, name, app, nodeName(1)
		if local {
			pod.Spec.NodeName = nodeName(0)
		}
		if len(addrs) > 0 {
			pod.Status.PodIP, pod.Status.PodIPs = addrs[0].String(), []corev1.PodIP{{IP: addrs[0].String()}}
		}
		l.api.Put(pod)
	}
	for i := range policyPods {
		put(fmt.Sprint("ns-", i%policyNamespaces), fmt.Sprint("pod-", i), fmt.Sprint(i/policyNamespaces%10), i, i/policyNamespaces == i%50)
	}
	for i, name := range []string{"from", "to"} {
		put("default", name, name, policyPods+i, true, probeAddr(i))
	}
	for i := range policyCount {
		port, end := intstr.FromInt32(int32(1000+i)), int32(1005+i)
		n := i / policyNamespaces
		l.api.Put(&networkingv1.NetworkPolicy{
			ObjectMeta: metav1.ObjectMeta{Namespace: fmt.Sprint("ns-", i%policyNamespaces), Name: fmt.Sprint("policy-", n)},
			Spec: networkingv1.NetworkPolicySpec{
				PodSelector: *app(fmt.Sprint(n % 10)), PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress},
				Ingress: []networkingv1.NetworkPolicyIngressRule{{
					From: []networkingv1.NetworkPolicyPeer{
						{PodSelector: app(fmt.Sprint((n + 1) % 10))}, {IPBlock: &networkingv1.IPBlock{CIDR: fmt.Sprintf("192.0.%d.0/24", n)}},
					},
					Ports: []networkingv1.NetworkPolicyPort{{Port: &port, EndPort: &end}},
				}},
			},
		})
	}
}
