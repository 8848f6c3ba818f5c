// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"net/netip"
	"testing"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/pkg/bpf/object"
)

// families runs f once for IPv4 and once for IPv6.
func families(t *testing.T, f func(t *testing.T, v6 bool)) {
	t.Run("IPv4", func(t *testing.T) { f(t, false) })
	t.Run("IPv6", func(t *testing.T) { f(t, true) })
}

// family picks the address of one family from a pair.
func family(pair []netip.Addr, v6 bool) netip.Addr {
	if v6 {
		return pair[1]
	}
	return pair[0]
}

func wantAnswer(t *testing.T, what, got string, err error, want string) {
	t.Helper()
	if err != nil || got != want {
		t.Errorf("%s = %q, %v, want %q", what, got, err, want)
	}
}

func TestPodToPod(t *testing.T) {
	t.Parallel()
	n := nodetest.New(t)
	a, b := n.AddPod("a"), n.AddPod("b")
	nodetest.Serve(t, b.NS, "b", 8080)
	families(t, func(t *testing.T, v6 bool) {
		for _, network := range []string{"tcp", "udp"} {
			got, err := nodetest.Ask(t, a.NS, network, netip.AddrPortFrom(b.Addr(v6), 8080))
			wantAnswer(t, network, got, err, "b "+a.Addr(v6).String())
		}
	})
	if drops := n.AllDrops(); drops[object.DropReasonName(6)] != 0 {
		t.Errorf("drops = %v, want none by policy", drops)
	}
}
