// SPDX-License-Identifier: Apache-2.0

// Package netfilter keeps the one nftables table that Margay has on a node. Forwarded pod traffic never meets netfilter; what does are the
// outer packets of the overlay, because the kernel's VXLAN device hands them to the node's own stack. The table keeps conntrack away from
// them, so that a full conntrack table does not stop the overlay (docs/design/0008-netfilter.md). Every packet pays for the table, so it is
// made only where something tracks connections.
//
// It belongs to the namespace of the calling thread. The functions keep no state and may be called by several goroutines; two that change
// the table at once leave the content that one of them wanted. It knows nothing of devices (pkg/link), BPF and Kubernetes, and runs no
// program: it speaks netlink. It needs nf_tables with the expressions fib and notrack, in Linux 6.1 and newer the options
// CONFIG_NF_TABLES_INET, CONFIG_NFT_FIB_INET and CONFIG_NFT_CT.
package netfilter

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Table is the name of our table, of family inet: everything in it is ours.
const Table = "margay"

// ErrUnsupported is wrapped by the error about a kernel that lacks nf_tables or one of the expressions. The overlay works without the
// table as long as conntrack has room.
var ErrUnsupported = errors.New("the kernel lacks nf_tables with fib and notrack")

// Settings of conntrack, which exist in every namespace once the kernel has it, whether or not anything uses it there. The first is the
// whole machine's; the second is the number of connections that conntrack knows in the namespace of the thread that reads it.
const (
	conntrackMax   = "/proc/sys/net/netfilter/nf_conntrack_max"
	conntrackCount = "/proc/sys/net/netfilter/nf_conntrack_count"
)

// base is one chain of the table: where conntrack would meet outer packets, and what is asked beside protocol and port.
type base struct {
	name string
	hook *nftables.ChainHook
	only []expr.Any
}

var chains = []base{
	// Those for the node itself: what it only forwards, such as the tunnels of a virtual machine that it masquerades, needs its conntrack.
	{"overlay-in", nftables.ChainHookPrerouting, []expr.Any{
		&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
	}},
	// Those that the node sends; nothing forwarded comes by here.
	{"overlay-out", nftables.ChainHookOutput, nil},
}

// EnsureNotrack makes the table so that conntrack leaves the overlay's outer packets alone, to the UDP port in host byte order, in both
// families. It reports whether it had to change something. Where conntrack knows no connection at the moment it makes no table, and mends the
// one that is there: nothing tells an idle conntrack from one that nobody uses. An error wraps ErrUnsupported where the kernel cannot do it.
func EnsureNotrack(port uint16) (changed bool, err error) {
	tracking, err := tracks()
	if err != nil {
		return false, err
	}
	if !tracking {
		if there, err := Exists(); err != nil || !there {
			return false, err
		}
	}
	c, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return false, unsupported(fmt.Errorf("open netlink socket of netfilter: %w", err))
	}
	defer func() { _ = c.CloseLasting() }()

	there, err := lookup(c)
	if err != nil {
		return false, err
	}
	if there && isNotrack(c, port) {
		return false, nil
	}
	return true, replace(c, port)
}

// tracks tells whether conntrack knows a connection in this namespace. It is true as well where the kernel has conntrack and does not say.
func tracks() (bool, error) {
	if _, err := os.Stat(conntrackMax); errors.Is(err, fs.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, fmt.Errorf("look for conntrack: %w", err)
	}
	count, err := os.ReadFile(conntrackCount)
	return err != nil || strings.TrimSpace(string(count)) != "0", nil
}

// Exists tells whether our table is there.
func Exists() (bool, error) {
	c, err := nftables.New()
	if err != nil {
		return false, notThere(unsupported(fmt.Errorf("open netlink socket of netfilter: %w", err)))
	}
	there, err := lookup(c)
	return there, notThere(err)
}

// Remove removes our table with everything in it, and reports whether it was there. A kernel without nf_tables is success.
func Remove() (removed bool, err error) {
	there, err := Exists()
	if err != nil || !there {
		return false, err
	}
	c, err := nftables.New()
	if err != nil {
		return false, fmt.Errorf("open netlink socket of netfilter: %w", err)
	}
	c.DelTable(table())
	if err := c.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return false, fmt.Errorf("remove nftables table %s: %w", Table, err)
	}
	return true, nil
}

func table() *nftables.Table {
	return &nftables.Table{Name: Table, Family: nftables.TableFamilyINet}
}

// lookup tells whether the table is there. Its error wraps ErrUnsupported where there can be none.
func lookup(c *nftables.Conn) (bool, error) {
	_, err := c.ListTableOfFamily(Table, nftables.TableFamilyINet)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, unsupported(fmt.Errorf("look up nftables table %s: %w", Table, err))
	}
	return true, nil
}

// replace writes the table anew, in one transaction: no packet meets half a table.
func replace(c *nftables.Conn, port uint16) error {
	t := c.AddTable(table()) // only what is there can be deleted
	c.DelTable(t)
	c.AddTable(t)
	for _, b := range chains {
		chain := c.AddChain(b.chain(t))
		c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: b.notrack(port)})
	}
	if err := c.Flush(); err != nil {
		return unsupported(fmt.Errorf("write nftables table %s: %w", Table, err))
	}
	return nil
}

// chain is before conntrack, and after the reassembly of fragments where conntrack is active.
func (b base) chain(t *nftables.Table) *nftables.Chain {
	accept := nftables.ChainPolicyAccept
	return &nftables.Chain{
		Table: t, Name: b.name, Type: nftables.ChainTypeFilter, Hooknum: b.hook, Priority: nftables.ChainPriorityRaw, Policy: &accept,
	}
}

// notrack is the rule "udp dport PORT [fib daddr type local] notrack".
func (b base) notrack(port uint16) []expr.Any {
	rule := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
	}
	return append(append(rule, b.only...), &expr.Notrack{})
}

// isNotrack tells whether the table is as replace writes it. What cannot be read is not.
func isNotrack(c *nftables.Conn, port uint16) bool {
	for _, b := range chains {
		want := b.chain(table())
		have, err := c.ListChain(table(), b.name)
		if err != nil || have.Hooknum == nil || *have.Hooknum != *want.Hooknum || *have.Priority != *want.Priority ||
			have.Policy == nil || *have.Policy != *want.Policy {
			return false
		}
		rules, err := c.GetRules(table(), have)
		if err != nil || len(rules) != 1 || !equal(rules[0].Exprs, b.notrack(port)) {
			return false
		}
	}
	return true
}

// equal compares rules as the kernel gets them.
func equal(a, b []expr.Any) bool {
	return slices.EqualFunc(a, b, func(a, b expr.Any) bool {
		x, errX := expr.Marshal(unix.NFPROTO_INET, a)
		y, errY := expr.Marshal(unix.NFPROTO_INET, b)
		return errX == nil && errY == nil && bytes.Equal(x, y)
	})
}

// unsupported adds ErrUnsupported to the kernel's ways of saying it: there is no netfilter netlink, the subsystem of nf_tables is missing,
// also in a transaction, or an expression is.
func unsupported(err error) error {
	for _, errno := range []unix.Errno{unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT, unix.EINVAL, unix.EOPNOTSUPP, unix.ENOENT} {
		if errors.Is(err, errno) {
			return fmt.Errorf("%w: %w", ErrUnsupported, err)
		}
	}
	return err
}

// notThere drops the error of a kernel that cannot have our table.
func notThere(err error) error {
	if errors.Is(err, ErrUnsupported) {
		return nil
	}
	return err
}
