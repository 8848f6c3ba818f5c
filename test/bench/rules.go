// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"runtime"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/policy"
	"github.com/margay-cni/margay/pkg/state"
)

const rulesSection = "New connections under policy"

// Issue: what a new connection under any number of rules keeps of one without policy.
const rulesTarget = 0.98

// ruled is a client and a server pod on maps of their own, with so many rules in force on each.
type ruled struct {
	ends
	rules   int
	dp      *datapath.Datapath
	fromPod *ebpf.Program
	ifindex int // of the client
	macs    *added
	port    uint16
	took    []float64 // by round
}

// benchRules measures new connections between two pods with none, 100 and 10 000 rules in force on both: by test runs, and with sockets.
func benchRules(ctx context.Context, b *bench) (err error) {
	var all []*ruled
	defer func() {
		for _, r := range all {
			err = errors.Join(err, r.close())
		}
	}()
	for number, rules := range []int{0, 100, 10_000} {
		r := &ruled{rules: rules}
		all = append(all, r)
		if err := r.open(ctx, b, number); err != nil {
			return err
		}
	}
	for i, f := range families {
		if err := b.firstPackets(all, i); err != nil {
			return err
		}
		var runners []*runner
		for _, r := range all {
			runners = append(runners, r.runner(f.v6))
		}
		connects := kinds[1:2]
		if err := b.race(ctx, b.choose(60, 30, 1), connects, runners); err != nil {
			return err
		}
		for k, r := range all[1:] {
			theirs := all[0].name
			rate := &measurement{ID: fmt.Sprintf("rules.crr.%s.%d", idOf(f.name), r.rules), Section: rulesSection, Unit: "1000/s", Higher: true,
				Name: fmt.Sprintf("TCP_CRR, %s, %d rules", f.name, r.rules), Reference: theirs, Target: rulesTarget}
			for n, lap := range runners[k+1].laps["crr"] {
				rate.add(lap.rate, runners[0].laps["crr"][n].rate)
			}
			b.report.add(rate)
		}
	}
	return nil
}

// firstPackets measures the first packet of a connection by test runs, each side in turn.
func (b *bench) firstPackets(all []*ruled, family int) (err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := pinThread()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.SchedSetaffinity(0, &home)) }()
	for _, r := range all {
		r.took = nil
	}
	for range b.rounds(11, 1) {
		batch := make([][]float64, len(all))
		for range b.rounds(400, 5) {
			for i, r := range all {
				ns, err := r.firstPacket(families[family].v6)
				if err != nil {
					return fmt.Errorf("%d rules: %w", r.rules, err)
				}
				batch[i] = append(batch[i], ns)
			}
		}
		for i, r := range all {
			r.took = append(r.took, middleMean(batch[i]))
		}
	}
	f := families[family]
	for _, r := range all[1:] {
		b.report.add(&measurement{
			ID: fmt.Sprintf("rules.first.%s.%d", idOf(f.name), r.rules), Section: rulesSection, Unit: "ns",
			Name: fmt.Sprintf("first packet alone, %s, %d rules", f.name, r.rules), Reference: all[0].name, ours: r.took, theirs: all[0].took,
		})
	}
	return nil
}

func (r *ruled) firstPacket(v6 bool) (ns float64, err error) {
	r.port++
	packet, err := tcpPacket(r.macs.mac, r.macs.hostMAC, netip.AddrPortFrom(r.client.addr(v6), 10000+r.port%50000), netip.AddrPortFrom(r.server.addr(v6), echoPort), true)
	if err != nil {
		return 0, err
	}
	verdict, ns, err := testRun(r.fromPod, packet, r.ifindex, 1)
	if err == nil && verdict != actRedirect {
		err = fmt.Errorf("verdict %d of a first packet, want %d", verdict, actRedirect)
	}
	return ns, err
}

// open makes the maps, the pods, and the rules.
func (r *ruled) open(ctx context.Context, b *bench, number int) (err error) {
	r.name = fmt.Sprintf("%d rules", r.rules)
	if r.rules == 0 {
		r.name = "no policy"
	}
	n := *b.node
	n.cfg = datapath.Config{
		BPFFS: filepath.Join(n.dir, fmt.Sprintf("rules%d-bpf", number)), Run: filepath.Join(n.dir, fmt.Sprintf("rules%d-run", number)),
		Sizes: map[string]uint32{"policy": 1 << 20},
	}
	if r.dp, err = datapath.Ensure(ctx, n.cfg); err != nil {
		return err
	}
	n.dp = r.dp
	if r.fromPod, err = ebpf.LoadPinnedProgram(n.program(bpf.ProgFromPod), nil); err != nil {
		return err
	}
	plugin := n.margay("rules", fmt.Sprintf("10.25%d.0.0/16", number), fmt.Sprintf("fd00:25%d::/64", number))
	s := ruledCluster(r.rules)
	var macs [2]*added
	for i, end := range []struct {
		*place
		name string
	}{{&r.client, "client"}, {&r.server, "server"}} {
		id := fmt.Sprintf("rules%d-%s", number, end.name)
		if end.path, err = n.namespace(id); err != nil {
			return err
		}
		_, out, err := plugin.run(ctx, "ADD", id, end.path)
		if err != nil {
			return err
		}
		if macs[i], err = parseAdded(out); err != nil {
			return err
		}
		end.addrs = macs[i].addrs
		s.Pods[state.Key{Namespace: "bench", Name: end.name}].IPs = end.addrs
	}
	if err := r.enforce(s, macs); err != nil {
		return err
	}
	if r.serverProcess, err = startServers(r.server); err != nil {
		return err
	}
	r.clientProcess, err = startPeer(r.client.path)
	return err
}

func (r *ruled) close() error {
	for _, p := range []*peer{r.clientProcess, r.serverProcess} {
		if p != nil {
			p.stop()
		}
	}
	var errs []error
	if r.fromPod != nil {
		errs = append(errs, r.fromPod.Close())
	}
	if r.dp != nil {
		errs = append(errs, r.dp.Close())
	}
	return errors.Join(errs...)
}

// enforce writes what the cluster's policies compile to, as the agent does.
func (r *ruled) enforce(s *state.Snapshot, macs [2]*added) error {
	compiler := policy.NewCompiler()
	compiler.Limits.Entries = 1 << 20
	result, err := compiler.Compile(s)
	if err != nil {
		return err
	}
	for k, e := range result.Entries {
		key := bpf.PolicyKey{
			Prefixlen: bpf.PolicyPrefixBase + uint32(k.Bits), PolicyId: k.Policy, Identity: k.Identity, Direction: uint8(k.Direction),
			Proto: k.Protocol, Port: bpf.Port16(k.Port),
		}
		if err := r.dp.Maps.Policy.Put(&key, &bpf.PolicyEntry{Verdict: uint32(e.Verdict), Rank: e.Rank, RuleId: e.Rule}); err != nil {
			return fmt.Errorf("write a policy entry: %w", err)
		}
	}
	for p, id := range result.Identities {
		key := bpf.NewIPCacheKey(p)
		if err := r.dp.Maps.IPCache.Put(&key, &bpf.IPCacheEntry{Identity: id}); err != nil {
			return fmt.Errorf("write an identity: %w", err)
		}
	}
	r.macs = macs[0]
	for i, name := range []string{"client", "server"} {
		dev, err := net.InterfaceByName(macs[i].hostName)
		if err != nil {
			return err
		}
		if i == 0 {
			r.ifindex = dev.Index
		}
		for _, a := range macs[i].addrs {
			e := bpf.Endpoint{
				Ifindex: uint32(dev.Index), Identity: result.Identity(a), PolicyId: result.Pods[state.Key{Namespace: "bench", Name: name}].Policy,
				Mac: macs[i].mac, HostMac: macs[i].hostMAC,
			}
			if err := r.dp.PutEndpoint(a, e); err != nil {
				return err
			}
		}
	}
	return nil
}

// ruledCluster has the client and the server, 1000 pods elsewhere, and so many rules in each direction that say something about the two: one
// third names CIDRs, two thirds ranges of ports and pods of 100 apps. The connections that are measured are allowed by one more.
func ruledCluster(rules int) *state.Snapshot {
	s := state.NewSnapshot()
	s.Namespaces["bench"] = state.ImplicitNamespace("bench")
	pod := func(name, app string, local bool, ips ...netip.Addr) {
		k := state.Key{Namespace: "bench", Name: name}
		s.Pods[k] = &state.Pod{Key: k, Labels: map[string]string{"app": app}, Local: local, IPs: ips}
	}
	pod("client", "client", true)
	pod("server", "server", true)
	for i := range 1000 {
		pod(fmt.Sprint("other-", i), fmt.Sprint("app-", i%100), false,
			netip.AddrFrom4([4]byte{10, 200, byte(i >> 8), byte(i)}), netip.MustParseAddr(fmt.Sprintf("fd00:200::%x", i+1)))
	}
	if rules == 0 {
		return s
	}
	app := func(name string) *metav1.LabelSelector {
		return &metav1.LabelSelector{MatchLabels: map[string]string{"app": name}}
	}
	from, to := networkingv1.NetworkPolicySpec{PodSelector: *app("client"), PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeEgress}},
		networkingv1.NetworkPolicySpec{PodSelector: *app("server"), PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}}
	add := func(peer networkingv1.NetworkPolicyPeer, low, high int) {
		port, end := intstr.FromInt32(int32(low)), int32(high)
		peers, ports := []networkingv1.NetworkPolicyPeer{peer}, []networkingv1.NetworkPolicyPort{{Port: &port, EndPort: &end}}
		from.Egress = append(from.Egress, networkingv1.NetworkPolicyEgressRule{To: peers, Ports: ports})
		to.Ingress = append(to.Ingress, networkingv1.NetworkPolicyIngressRule{From: peers, Ports: ports})
	}
	for i := range rules - 1 {
		low := 10_000 + 7*i%50_000
		switch i % 6 {
		case 0:
			add(networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: fmt.Sprintf("172.%d.%d.%d/28", i>>16, i>>8&255, i&240)}}, low, low)
		case 3:
			add(networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: fmt.Sprintf("2001:db8:%x::/48", i)}}, low, low+5)
		default:
			add(networkingv1.NetworkPolicyPeer{PodSelector: app(fmt.Sprint("app-", i%100))}, low, low+3)
		}
	}
	add(networkingv1.NetworkPolicyPeer{PodSelector: &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{
		{Key: "app", Operator: metav1.LabelSelectorOpIn, Values: []string{"client", "server"}},
	}}}, echoPort, echoPort+10)
	for name, spec := range map[string]networkingv1.NetworkPolicySpec{"from": from, "to": to} {
		k := state.Key{Namespace: "bench", Name: name}
		s.NetworkPolicies[k] = &state.NetworkPolicy{Key: k, Spec: spec}
	}
	return s
}
