// SPDX-License-Identifier: Apache-2.0

// Package firewalltest gives namespaces of tests what administrators give their nodes: firewalls that forward nothing, strict reverse path
// filtering, a conntrack table without room. It needs root, and nft and iptables.
package firewalltest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
)

// Ports that the firewalls let in, beside ICMP and the answers to what the node itself opened.
const (
	// OverlayPort is the overlay's, UDP, without a look at the connection's state (docs/install.md).
	OverlayPort = 8472
	// OpenPort is open for servers on the node, TCP and UDP; UDPPort for UDP.
	OpenPort = 9090
	UDPPort  = 9191
)

// Firewall is the rules of a hardened node: it forwards nothing but answers, and judges source addresses by the route back.
type Firewall struct {
	Name string
	// Conntrack says whether rules use it, so that it is at work in the namespace.
	Conntrack bool
	rules     []load
}

// load is a command and its standard input.
type load struct{ command, rules string }

// reversePath is strict reverse path filtering for IPv6, of which the kernel has none of its own; firewalld's default rules have it.
const reversePath = `
	chain reverse-path {
		type filter hook prerouting priority 0
		icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-advert } accept
		meta nfproto ipv6 fib saddr . iif oif missing drop
	}`

// WithoutConntrack forwards nothing at all and lets everything in.
var WithoutConntrack = Firewall{"nftables without conntrack", false, []load{{"nft -f -", `table inet firewall {` + reversePath + `
	chain forward {
		type filter hook forward priority 0; policy drop
	}
}`}}}

// NFTables is a firewall as nftables has it.
var NFTables = Firewall{"nftables", true, []load{{"nft -f -", `table inet firewall {` + reversePath + fmt.Sprintf(`
	chain forward {
		type filter hook forward priority 0; policy drop
		ct state established,related accept
	}
	chain input {
		type filter hook input priority 0; policy drop
		iif lo accept
		ct state established,related accept
		ct state invalid drop
		meta l4proto { icmp, icmpv6 } accept
		udp dport { %d, %d } accept
		meta l4proto { tcp, udp } th dport %d accept
	}
}`, OverlayPort, UDPPort, OpenPort)}}}

// IPTables is the same with iptables, whose match rpfilter does for IPv6 what the setting does for IPv4.
var IPTables = Firewall{"iptables", true, []load{
	{"iptables-restore", iptablesRules("icmp")},
	{"ip6tables-restore", iptablesRules("icmpv6")},
	{"ip6tables-restore --noflush", "*raw\n-A PREROUTING -m rpfilter --invert -j DROP\nCOMMIT\n"},
}}

func iptablesRules(icmp string) string {
	return fmt.Sprintf(`*filter
:INPUT DROP
:FORWARD DROP
:OUTPUT ACCEPT
-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
-A INPUT -i lo -j ACCEPT
-A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
-A INPUT -m conntrack --ctstate INVALID -j DROP
-A INPUT -p %s -j ACCEPT
-A INPUT -p udp --dport %d -j ACCEPT
-A INPUT -p udp --dport %d -j ACCEPT
-A INPUT -p udp --dport %d -j ACCEPT
-A INPUT -p tcp --dport %d -j ACCEPT
COMMIT
`, icmp, OverlayPort, UDPPort, OpenPort, OpenPort)
}

// Harden applies the firewall in a node's namespace, and strict rp_filter to every device there and in its pods.
func (f Firewall) Harden(t testing.TB, node *netnstest.NS, pods ...*netnstest.NS) {
	t.Helper()
	node.Do(func() {
		for _, l := range f.rules {
			words := strings.Fields(l.command)
			cmd := exec.Command(words[0], words[1:]...)
			cmd.Stdin = strings.NewReader(l.rules)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v: %v\n%s\n%s", cmd, err, out, l.rules)
			}
		}
	})
	for _, ns := range append(pods, node) {
		ns.Do(func() {
			settings, err := filepath.Glob("/proc/sys/net/ipv4/conf/*/rp_filter")
			if err != nil || len(settings) < 3 {
				t.Fatalf("settings = %q, %v, want those of all, default and each device", settings, err)
			}
			for _, path := range settings {
				must(t, "set rp_filter", os.WriteFile(path, []byte("1"), 0))
			}
		})
	}
}

func must(t testing.TB, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}
