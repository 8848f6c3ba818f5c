// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/bpf/object"
)

func TestTable(t *testing.T) {
	tab := newTable("NAME", ">PACKETS", "LAST")
	tab.add("a", "7", "")
	tab.add("größer", "1234567890", "x")
	var out bytes.Buffer
	tab.print(&out)
	want := "NAME       PACKETS  LAST\n" +
		"a                7\n" +
		"größer  1234567890  x\n"
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("table (-want +got):\n%s", diff)
	}
	out.Reset()
	newTable("NAME").print(&out)
	if out.Len() > 0 {
		t.Errorf("empty table = %q, want nothing", out.String())
	}
}

func TestSpan(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0s", 900 * time.Millisecond: "0s", 3 * time.Second: "3s", 130 * time.Second: "2m10s", 2 * time.Minute: "2m",
		time.Hour + 5*time.Minute + 9*time.Second: "1h5m", time.Hour + 9*time.Second: "1h", 76 * time.Hour: "3d4h",
	} {
		if got := span(d); got != want {
			t.Errorf("span(%v) = %q, want %q", d, got, want)
		}
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[uint64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 28 << 20: "28.0 MiB", 5 << 40: "5.0 TiB"} {
		if got := size(n); got != want {
			t.Errorf("size(%d) = %q, want %q", n, got, want)
		}
	}
}

func TestEnd(t *testing.T) {
	for _, tc := range []struct{ protocol, addr, pod, want string }{
		{"TCP", "10.1.0.5:80", "", "10.1.0.5:80"},
		{"TCP", "[fd00::1]:80", "", "[fd00::1]:80"},
		{"UDP", "[fd00::1]:80", "default/web", "default/web:80"},
		{"ICMP", "10.1.0.5:777", "", "10.1.0.5"},
		{"ICMPv6", "[fd00::1]:777", "", "fd00::1"},
		{"ICMPv6", "[fd00::1]:777", "default/web", "default/web"},
	} {
		if got := end(tc.protocol, netip.MustParseAddrPort(tc.addr), tc.pod); got != tc.want {
			t.Errorf("end(%s, %s, %q) = %q, want %q", tc.protocol, tc.addr, tc.pod, got, tc.want)
		}
	}
}

func TestShorten(t *testing.T) {
	list := []string{"a", "b", "c"}
	for most, want := range map[int]string{3: "a, b, c", 2: "a, b, +1"} {
		if got := shorten(list, most); got != want {
			t.Errorf("shorten(%v, %d) = %q, want %q", list, most, got, want)
		}
	}
}

// TestHints: each drop reason has a hint that fits on a line, and no hint is for a reason that does not exist.
func TestHints(t *testing.T) {
	reasons, err := object.DropReasons()
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, r := range reasons {
		name := object.DropReasonName(r)
		names[name] = true
		if n := len(hints[name]); n == 0 || n > 60 {
			t.Errorf("hint of %s has %d characters, want 1 to 60", name, n)
		}
	}
	for name := range hints {
		if !names[name] {
			t.Errorf("hint for %s, which is no drop reason", name)
		}
	}
}

// TestPortRanges: the port bits of a policy key, as the compiler takes endPort apart, come back as the range it was.
func TestPortRanges(t *testing.T) {
	c := policyCollector{}
	for _, tc := range []struct {
		name   string
		prefix uint32
		port   uint16
		want   string
	}{
		{"any protocol", bpf.PolicyPrefixBase, 0, "any"},
		{"any port", bpf.PolicyPrefixProto, 0, "any"},
		{"one port", bpf.PolicyPrefixPort, 8080, "8080"},
		{"sixteen ports", 92, 8192, "8192-8207"},
		{"half of all", 81, 32768, "32768-65535"},
	} {
		e := c.entry(bpf.PolicyKey{Prefixlen: tc.prefix, Proto: tcp, Port: bpf.Port16(tc.port)}, bpf.PolicyEntry{}, nil)
		if got := e.Ports.text(e.Protocol); got != tc.want {
			t.Errorf("%s: ports = %q, want %q", tc.name, got, tc.want)
		}
	}
}

func TestMergeEntries(t *testing.T) {
	ports := func(first, last uint16) policyEntry {
		return policyEntry{Identity: 20, Protocol: "TCP", Verdict: "allow", RuleID: 1, Ports: &portRange{first, last}}
	}
	other := ports(104, 107)
	other.RuleID = 2
	all := policyEntry{Identity: 20, Protocol: "TCP", Verdict: "allow", RuleID: 1}
	got := mergeEntries([]policyEntry{ports(101, 101), other, ports(102, 103), ports(65532, 65535), ports(100, 100), all})
	want := []policyEntry{all, ports(100, 103), ports(65532, 65535), other}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("mergeEntries() (-want +got):\n%s", diff)
	}
}
