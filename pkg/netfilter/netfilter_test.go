// SPDX-License-Identifier: Apache-2.0

package netfilter_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/privileged"
	"github.com/margay-cni/margay/pkg/netfilter"
)

const ruleset = `table inet margay {
	chain overlay-in {
		type filter hook prerouting priority raw; policy accept;
		udp dport 8472 fib daddr type local notrack
	}

	chain overlay-out {
		type filter hook output priority raw; policy accept;
		udp dport 8472 notrack
	}
}
`

// nft runs nft in the calling thread's namespace.
func nft(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("nft", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("nft %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func ensure(t *testing.T, port uint16, wantChanged bool) {
	t.Helper()
	changed, err := netfilter.EnsureNotrack(port)
	if err != nil || changed != wantChanged {
		t.Errorf("EnsureNotrack(%d) = %v, %v, want %v", port, changed, err, wantChanged)
	}
}

func wantRuleset(t *testing.T, want string) {
	t.Helper()
	if diff := cmp.Diff(want, nft(t, "list", "ruleset")); diff != "" {
		t.Errorf("ruleset (-want +got):\n%s", diff)
	}
}

// others is a table of somebody else's by our name, whose rule switches conntrack on in one family, ip or ip6.
func others(family string) string {
	return "table " + family + ` margay {
	chain input {
		type filter hook input priority filter; policy accept;
		ct state invalid drop
	}
}
`
}

// loopback is an address of the namespace itself, by nft's name of its family.
var loopback = map[string]string{"ip": "127.0.0.1", "ip6": "::1"}

// tracked returns how many connections conntrack knows after a ping of the namespace to itself.
func tracked(t *testing.T, family string) string {
	t.Helper()
	if out, err := exec.Command("ping", "-n", "-c1", "-W1", loopback[family]).CombinedOutput(); err != nil {
		t.Fatalf("ping: %v\n%s", err, out)
	}
	b, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// track makes somebody else's rule use conntrack.
func track(t *testing.T, family string) {
	t.Helper()
	nft(t, others(family))
	if tracked(t, family) == "0" {
		t.Fatal("a rule that uses conntrack did not switch it on: the test says nothing")
	}
}

// TestEnsureNotrack: the table is as nft prints it here, is written once, comes back whatever was done to it, follows the port, and leaves
// other tables alone.
func TestEnsureNotrack(t *testing.T) {
	privileged.Require(t)
	netnstest.New(t).Do(func() {
		others := others("ip")
		track(t, "ip")
		ensure(t, 8472, true)
		wantRuleset(t, others+ruleset)
		ensure(t, 8472, false)
		for _, harm := range [][]string{
			{"delete", "table", "inet", "margay"},
			{"flush", "table", "inet", "margay"},
			{"flush", "chain", "inet", "margay", "overlay-in"},
			{"add", "rule", "inet", "margay", "overlay-out", "drop"},
			{"insert", "rule", "inet", "margay", "overlay-out", "udp", "dport", "53", "notrack"},
			{"add", "chain", "inet", "margay", "overlay-in", "{ policy drop; }"},
		} {
			nft(t, harm...)
			ensure(t, 8472, true)
			wantRuleset(t, others+ruleset)
		}
		ensure(t, 4789, true)
		wantRuleset(t, others+strings.ReplaceAll(ruleset, "8472", "4789"))

		for _, want := range []bool{true, false} {
			if got, err := netfilter.Exists(); got != want || err != nil {
				t.Errorf("Exists() = %v, %v, want %v", got, err, want)
			}
			if got, err := netfilter.Remove(); got != want || err != nil {
				t.Errorf("Remove() = %v, %v, want %v", got, err, want)
			}
		}
		wantRuleset(t, others)
	})
}

// TestNotrackFollowsConntrack: there is no table before conntrack knows a connection, of either family, and there is one afterwards as long as
// nobody removes it, because an idle conntrack looks like none.
func TestNotrackFollowsConntrack(t *testing.T) {
	privileged.Require(t)
	for _, family := range []string{"ip", "ip6"} {
		t.Run(family, func(t *testing.T) {
			netnstest.New(t).Do(func() {
				ensure(t, 8472, false)
				wantRuleset(t, "")
				track(t, family)
				ensure(t, 8472, true)
				if err := netlink.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
					t.Fatal(err)
				}
				ensure(t, 8472, false)
				nft(t, "flush", "chain", "inet", "margay", "overlay-in")
				ensure(t, 8472, true)
				wantRuleset(t, others(family)+ruleset)

				nft(t, "flush", "ruleset")
				if err := netlink.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
					t.Fatal(err)
				}
				ensure(t, 8472, false)
				wantRuleset(t, "")
			})
		})
	}
}

// TestNotrackKeepsConntrackOff: in a namespace where nothing uses conntrack any more, our table does not switch it on.
func TestNotrackKeepsConntrackOff(t *testing.T) {
	privileged.Require(t)
	for _, family := range []string{"ip", "ip6"} {
		t.Run(family, func(t *testing.T) {
			netnstest.New(t).Do(func() {
				track(t, family)
				ensure(t, 8472, true)
				nft(t, "delete", "table", family, "margay")
				if err := netlink.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
					t.Fatal(err)
				}
				wantRuleset(t, ruleset)
				if got := tracked(t, family); got != "0" {
					t.Errorf("connections that conntrack knows = %s, want 0", got)
				}
			})
		})
	}
}
