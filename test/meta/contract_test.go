// SPDX-License-Identifier: Apache-2.0

package meta

import (
	"go/ast"
	"go/parser"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// rows are the promises that a service proxy makes, as kube-proxy keeps them, and those of network policy. Comments name them as "contract
// row V8", and each has a test named after it: TestV8_…, or TestI1_I2_… for several.
var rows = map[string]string{
	"I1":  "services with the label service-proxy-name are another proxy's, also when it comes or goes",
	"I2":  "headless services, and those of type ExternalName, are never served",
	"I3":  "slices with the label headless, and those that name no service, are ignored",
	"I4":  "each address family is served by itself, from slices of that family",
	"I5":  "slices join by the name and protocol of a port, not by its number",
	"I6":  "ports without name or number are ignored, and of an endpoint's addresses all but the first",
	"I7":  "endpoints of all slices are merged; of two for one address the one that does not terminate counts",
	"I8":  "conditions that are not set have their defaults, and local is the endpoint whose node is this one",
	"I9":  "publishNotReadyAddresses is for whoever makes the slices",
	"I10": "nothing is written before services and slices are known completely",
	"I11": "of the Node object come the zone, the addresses and whether the node leaves",
	"I12": "changes are gathered, and faults tried again at growing distance",

	"S1": "a service port has the lists that its policies can lead to",
	"S2": "the cluster's list has the ready endpoints; without any, those that terminate and serve",
	"S3": "the node's own list falls back in the same way, on its own",
	"S4": "topology hints narrow the cluster's list, for the node or for the zone",
	"S5": "without any endpoint refuse, without one that this policy allows drop",
	"S6": "the choice is uniform, and connections that exist stay",

	"V1":  "cluster addresses follow the internal policy, which never falls back to other nodes",
	"V2":  "external addresses, load balancer addresses and NodePorts follow the external policy",
	"V3":  "load balancer addresses are those of the status, unless their mode is Proxy",
	"V4":  "under external policy Local, pods and the node itself still reach all endpoints",
	"V5":  "under external policy Local, outside clients reach this node's endpoints or nothing, and keep their address",
	"V6":  "NodePorts are served on the addresses that nodePortAddresses names",
	"V7":  "NodePorts on the loopback address, where asked for",
	"V8":  "a service without endpoints refuses, by every frontend, TCP and UDP",
	"V9":  "unknown ports of cluster addresses are refused, addresses that no service has are dropped",
	"V10": "source ranges limit the load balancer addresses and nothing else",
	"V11": "session affinity by the client's address, across all frontends of a service port",
	"V12": "a pod reaches itself through every kind of frontend",
	"V13": "who sees which source address",
	"V14": "SCTP is served like TCP and UDP",
	"V15": "clients and endpoints on the host's network, in all combinations",
	"V16": "segments outside the window never reach a client untranslated",
	"V17": "kubelet's rules about loopback addresses are neither hit nor passed by",

	"U1": "UDP flows leave a backend that does not serve any more, and only that",
	"U2": "UDP flows of a service that has lost its last backend end, too",
	"U3": "a UDP client on the node, with one port for ever, follows the backends",

	"H1": "health checks of services with external policy Local",
	"H2": "/healthz and /livez",
	"H3": "/metrics, /proxyMode and what else is asked on the loopback address",

	"M1": "metrics under kube-proxy's names",
	"M2": "the settings of the kernel's connection tracking",
	"M3": "cleaning up removes what was installed",

	"N1":  "NetworkPolicy isolates in each direction by itself",
	"N2":  "rules add up, and both ends of a connection decide",
	"N3":  "an empty list of rules allows nothing, an empty rule everything",
	"N4":  "a rule is its ports and its peers, and what is missing matches all",
	"N5":  "peers by labels of pods and namespaces, which may change",
	"N6":  "blocks of addresses without their exceptions, judged after service translation",
	"N7":  "ports are the pod's, with a protocol and perhaps a range",
	"N8":  "named ports are the destination pod's",
	"N9":  "a rule for another protocol isolates TCP all the same",
	"N10": "replies pass, and NetworkPolicy has no say in traffic with the pod's node and with itself",
	"N11": "pods on the host's network are nodes",
	"N12": "policies that change reach open connections",
	"N13": "policy is in force before a pod's first packet",
	"N14": "ICMP, neighbour discovery, and the client's own address behind a NodePort",
	"N15": "a policy is in force within seconds, and drops",
	"N16": "policies through ClusterIPs, on one node and across nodes",

	"C1":  "ClusterNetworkPolicies select pods anywhere, in the order of priority and rules, and isolate nobody",
	"C2":  "Admin tier, NetworkPolicy, Baseline tier, allow",
	"C3":  "Accept and Deny are final for their direction, Pass leaves the tier",
	"C4":  "peers: namespaces, pods, networks and nodes",
	"C5":  "what is not understood fails closed",
	"C6":  "protocols, ports, ranges and named ports",
	"C7":  "a pod is not subject under its own address, and is through a service",
	"C8":  "domain names",
	"C9":  "conditions in the status",
	"C10": "the API's own conformance tests",
}

// untested are the rows that no test can be about yet, each with the reason.
var untested = map[string]string{
	"C10": "it is a suite of its own, which needs a whole cluster",
	"M2":  "kube-proxy sizes netfilter's table for its own use of it; Margay uses none, and leaves the settings alone",
}

// TestContractRows requires a test for every row, and that a reason not to have one is given up when there is one.
func TestContractRows(t *testing.T) {
	tested := map[string]bool{}
	for _, file := range files(t, func(path string) bool { return strings.HasSuffix(path, "_test.go") }) {
		for _, decl := range parse(t, file, parser.SkipObjectResolution).Decls {
			if f, ok := decl.(*ast.FuncDecl); ok && f.Recv == nil {
				for _, row := range rowsOf(f.Name.Name) {
					tested[row] = true
				}
			}
		}
	}
	for _, fault := range rowFaults(tested, untested) {
		t.Error(fault)
	}
}

var rowName = regexp.MustCompile(`^[ISVUHMNC][1-9][0-9]*$`)

// rowsOf returns the rows that a test function is named after: those between "Test" and the first word that is none.
func rowsOf(name string) (found []string) {
	rest, isTest := strings.CutPrefix(name, "Test")
	words := strings.Split(rest, "_")
	for _, word := range words[:len(words)-1] {
		if !isTest || !rowName.MatchString(word) {
			break
		}
		found = append(found, word)
	}
	return found
}

func rowFaults(tested map[string]bool, untested map[string]string) (faults []string) {
	for _, row := range slices.Sorted(maps.Keys(rows)) {
		_, excused := untested[row]
		switch {
		case !tested[row] && !excused:
			faults = append(faults, row+" ("+rows[row]+"): no test is named Test"+row+"_…")
		case tested[row] && excused:
			faults = append(faults, row+": has a test by now, take it out of the list of those without")
		}
	}
	for _, row := range slices.Sorted(maps.Keys(untested)) {
		if rows[row] == "" || len(untested[row]) < 20 {
			faults = append(faults, row+": no such row, or no reason why it has no test")
		}
	}
	for _, row := range slices.Sorted(maps.Keys(tested)) {
		if rows[row] == "" {
			faults = append(faults, row+": a test is named after a row that does not exist")
		}
	}
	return faults
}

// TestContractRowsBite proves on made-up tests that the rule finds what it is for.
func TestContractRowsBite(t *testing.T) {
	for name, want := range map[string][]string{
		"TestV8_NoEndpointsRejects": {"V8"},
		"TestH1_H2_AgentAnswers":    {"H1", "H2"},
		"TestV8":                    nil, // says not what it is about
		"TestRow12_TooBig":          nil,
		"TestV8Something_Else":      nil,
		"BenchmarkV8_Refusal":       nil,
		"TestI04_Family":            nil,
	} {
		if diff := cmp.Diff(want, rowsOf(name)); diff != "" {
			t.Errorf("rowsOf(%s) (-want +got):\n%s", name, diff)
		}
	}
	all := map[string]bool{}
	for row := range rows {
		all[row] = row != "S6" && row != "U3"
	}
	reason := "a reason that is long enough"
	got := rowFaults(map[string]bool{"X1": true}, map[string]string{"Y1": reason})
	if len(got) != len(rows)+2 {
		t.Errorf("with no row tested, one of no list and one excuse for no row: %d faults, want %d", len(got), len(rows)+2)
	}
	got = rowFaults(all, map[string]string{"U3": reason, "V8": reason})
	want := []string{"S6 (", "V8: has a test by now"}
	for i := range min(len(got), len(want)) {
		if strings.HasPrefix(got[i], want[i]) {
			got[i] = want[i]
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("faults (-want +got):\n%s", diff)
	}
}
