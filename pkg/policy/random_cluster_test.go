// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"net/netip"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"pgregory.net/rapid"
	policyv1alpha2 "sigs.k8s.io/network-policy-api/apis/v1alpha2"

	"github.com/margay-cni/margay/pkg/state"
)

// nodeAddress is one that no pod of the random world has.
func nodeAddress(i int, six bool) netip.Addr {
	return podAddress(128+i, six)
}

func drawNode(t *rapid.T, i int) *state.Node {
	n := &state.Node{Name: string(rune('m' + i)), Labels: drawLabels(t, "node labels")}
	n.Addresses = []netip.Addr{nodeAddress(i, false), nodeAddress(i, true)}
	n.AllAddresses = n.Addresses
	switch rapid.IntRange(0, 5).Draw(t, "node addresses") {
	case 0: // one that a pod could claim
		n.Addresses = []netip.Addr{podAddress(7, false), podAddress(7, true)}
		n.AllAddresses = n.Addresses
	case 1: // one that is not internal, and that both nodes claim
		n.AllAddresses = append(n.AllAddresses[:2:2], nodeAddress(2, false))
	}
	return n
}

// drawGoodSelector draws one that can be read, unless odd.
func drawGoodSelector(t *rapid.T, name string, odd bool) *metav1.LabelSelector {
	if odd {
		return drawSelector(t, name)
	}
	return &metav1.LabelSelector{MatchLabels: drawLabels(t, name)}
}

func drawNamespacedPod(t *rapid.T, name string, odd bool) *policyv1alpha2.NamespacedPod {
	return &policyv1alpha2.NamespacedPod{NamespaceSelector: *drawGoodSelector(t, name+" namespaces", odd), PodSelector: *drawGoodSelector(t, name+" pods", odd)}
}

// drawClusterPeer draws something that means nothing only if odd.
func drawClusterPeer(t *rapid.T, odd bool) policyv1alpha2.ClusterNetworkPolicyEgressPeer {
	var p policyv1alpha2.ClusterNetworkPolicyEgressPeer
	cidrs := randomCIDRs
	kinds := 4
	if odd {
		cidrs, kinds = append(cidrs, "none"), 7
	}
	switch rapid.IntRange(1, kinds).Draw(t, "cluster peer kind") {
	case 1:
		p.Nodes = drawGoodSelector(t, "nodes", odd)
	case 2:
		p.Namespaces = drawGoodSelector(t, "namespaces", odd)
	case 3:
		p.Pods = drawNamespacedPod(t, "peer", odd)
	case 5:
		p.DomainNames = []policyv1alpha2.DomainName{"example.com"}
	case 6: // one too many
		p.Namespaces, p.Nodes = drawSelector(t, "namespaces"), drawSelector(t, "nodes")
	case 7: // nothing that this version knows
	default:
		for _, cidr := range rapid.SliceOfN(rapid.SampledFrom(cidrs), 1, 2).Draw(t, "networks") {
			p.Networks = append(p.Networks, policyv1alpha2.CIDR(cidr))
		}
	}
	return p
}

func drawClusterProtocol(t *rapid.T, odd bool) policyv1alpha2.ClusterNetworkPolicyProtocol {
	var p policyv1alpha2.ClusterNetworkPolicyProtocol
	var port *policyv1alpha2.Port
	draw := func(name string) int32 { return int32(rapid.SampledFrom(randomPorts[1:]).Draw(t, name)) }
	kinds := 2
	if odd {
		kinds = 4
	}
	switch rapid.IntRange(0, kinds).Draw(t, "port kind") {
	case 0:
	case 1:
		port = &policyv1alpha2.Port{Number: draw("port")}
	case 3:
		port = &policyv1alpha2.Port{Number: draw("port"), Range: &policyv1alpha2.PortRange{Start: draw("start"), End: draw("end")}}
	case 4:
		port = &policyv1alpha2.Port{}
	default:
		start, end := draw("start"), draw("end")
		if !odd {
			start, end = min(start, end), max(start, end)
		}
		port = &policyv1alpha2.Port{Range: &policyv1alpha2.PortRange{Start: start, End: end}}
	}
	switch rapid.IntRange(0, 2+kinds).Draw(t, "protocol kind") {
	case 0, 5:
		p.TCP = &policyv1alpha2.ClusterNetworkPolicyProtocolTCP{DestinationPort: port}
	case 1:
		p.UDP = &policyv1alpha2.ClusterNetworkPolicyProtocolUDP{DestinationPort: port}
	case 2:
		p.SCTP = &policyv1alpha2.ClusterNetworkPolicyProtocolSCTP{DestinationPort: port}
	case 3, 4:
		p.DestinationNamedPort = rapid.SampledFrom([]string{"web", "dns", "none"}).Draw(t, "named port")
	case 6: // nothing that this version knows
	}
	return p
}

func drawClusterRule(t *rapid.T) state.ClusterNetworkPolicyRule {
	odd := rapid.IntRange(0, 5).Draw(t, "odd") == 0
	peer := rapid.Custom(func(t *rapid.T) policyv1alpha2.ClusterNetworkPolicyEgressPeer { return drawClusterPeer(t, odd) })
	protocol := rapid.Custom(func(t *rapid.T) policyv1alpha2.ClusterNetworkPolicyProtocol { return drawClusterProtocol(t, odd) })
	least, actions := 1, []policyv1alpha2.ClusterNetworkPolicyRuleAction{"Accept", "Deny", "Pass", "Ponder"}
	if odd {
		least = 0
	} else {
		actions = actions[:3]
	}
	r := state.ClusterNetworkPolicyRule{
		Action: rapid.SampledFrom(actions).Draw(t, "action"),
		Peers:  rapid.SliceOfN(peer, least, 2).Draw(t, "peers"),
	}
	if rapid.IntRange(0, 2).Draw(t, "has protocols") > 0 {
		r.Protocols = rapid.SliceOfN(protocol, least, 3).Draw(t, "protocols")
	}
	if odd && rapid.Bool().Draw(t, "unknown field") {
		r.Unknown = []string{"spec.x[0].y"}
	}
	return r
}

func drawClusterPolicy(t *rapid.T, name string) *state.ClusterNetworkPolicy {
	p := &state.ClusterNetworkPolicy{
		Name:     name,
		Tier:     rapid.SampledFrom([]policyv1alpha2.Tier{"Admin", "Admin", "Admin", "Baseline", "Baseline", "Baseline", "Cellar"}).Draw(t, "tier"),
		Priority: rapid.Int32Range(0, 2).Draw(t, "priority"),
		Ingress:  rapid.SliceOfN(rapid.Custom(drawClusterRule), 0, 3).Draw(t, "ingress"),
		Egress:   rapid.SliceOfN(rapid.Custom(drawClusterRule), 0, 3).Draw(t, "egress"),
	}
	switch rapid.IntRange(0, 9).Draw(t, "subject kind") {
	case 0:
	case 1, 2, 3, 4:
		p.Subject.Pods = drawNamespacedPod(t, "subject", false)
	case 5:
		p.Subject.Namespaces, p.Subject.Pods = &metav1.LabelSelector{}, drawNamespacedPod(t, "subject", true)
	default:
		p.Subject.Namespaces = drawGoodSelector(t, "subject namespaces", rapid.IntRange(0, 3).Draw(t, "odd subject") == 0)
	}
	if rapid.IntRange(0, 19).Draw(t, "unknown") == 0 {
		p.Unknown = []string{rapid.SampledFrom([]string{"spec", "spec.subject.x", "spec.x", "spec.tier"}).Draw(t, "path")}
	}
	return p
}

// changeCluster replaces, adds or removes an object that is in no namespace.
func changeCluster(t *rapid.T, s *state.Snapshot) {
	if rapid.IntRange(0, 3).Draw(t, "node") == 0 {
		i := rapid.IntRange(0, 1).Draw(t, "which node")
		n := drawNode(t, i)
		if s.Nodes[n.Name] = n; rapid.IntRange(0, 4).Draw(t, "remove node") == 0 {
			delete(s.Nodes, n.Name)
		}
		return
	}
	name := rapid.SampledFrom([]string{"p", "q", "r"}).Draw(t, "cluster policy")
	s.ClusterNetworkPolicies[name] = drawClusterPolicy(t, name)
	if rapid.IntRange(0, 4).Draw(t, "remove cluster policy") == 0 {
		delete(s.ClusterNetworkPolicies, name)
	}
}
