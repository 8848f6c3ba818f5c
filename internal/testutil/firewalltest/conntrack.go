// SPDX-License-Identifier: Apache-2.0

package firewalltest

import (
	"net"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
)

const (
	conntrackMax   = "/proc/sys/net/netfilter/nf_conntrack_max"
	conntrackCount = "/proc/sys/net/netfilter/nf_conntrack_count"
)

// room is how many connections conntrack may know in a namespace under LimitConntrack, beside as many as the machine itself has open.
const room = 200

// Tracked returns how many connections conntrack knows in a namespace.
func Tracked(t testing.TB, ns *netnstest.NS) (n int) {
	t.Helper()
	ns.Do(func() { n = readNumber(t, conntrackCount) })
	return n
}

func readNumber(t testing.TB, path string) int {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, "read a setting", err)
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	must(t, "read a setting", err)
	return n
}

// LimitConntrack lowers the number of connections that conntrack knows in any one namespace, until the test ends, and returns it. It is
// the whole machine's, and only a process in the machine's first network namespace can: a test that calls it must not be parallel to
// others. Those in other processes that call it wait for each other at a lock on the setting.
func LimitConntrack(t testing.TB) int {
	t.Helper()
	f, err := os.OpenFile(conntrackMax, os.O_RDWR, 0)
	must(t, "open the machine's limit", err)
	t.Cleanup(func() { f.Close() }) // and with it the lock
	must(t, "lock the machine's limit", unix.Flock(int(f.Fd()), unix.LOCK_EX))
	before, limit := readNumber(t, conntrackMax), readNumber(t, conntrackCount)+room
	set := func(n int) error { return os.WriteFile(conntrackMax, []byte(strconv.Itoa(n)), 0) }
	t.Cleanup(func() {
		if err := set(before); err != nil {
			t.Errorf("put the machine's limit back to %d: %v", before, err)
		}
	})
	must(t, "lower the machine's limit", set(limit))
	return limit
}

// FillConntrack opens connections inside a namespace until conntrack has no room there. They stay open until the test ends, and established
// ones make no room for others. Some rule in the namespace must use conntrack.
func FillConntrack(t testing.TB, ns *netnstest.NS, limit int) {
	t.Helper()
	ns.Do(func() {
		server, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, "listen", err)
		t.Cleanup(func() { server.Close() })
		must(t, "empty the table", netlink.ConntrackTableFlush(netlink.ConntrackTable))
		for i := 0; readNumber(t, conntrackCount) < limit; i++ {
			if i > 2*limit {
				t.Fatalf("after %d connections conntrack knows %d, want %d", i, readNumber(t, conntrackCount), limit)
			}
			c, err := net.Dial("tcp", server.Addr().String())
			must(t, "connect", err)
			accepted, err := server.Accept()
			must(t, "accept", err)
			t.Cleanup(func() { c.Close(); accepted.Close() })
		}
	})
}
