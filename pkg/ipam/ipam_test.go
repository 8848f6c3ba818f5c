// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
)

// The address families that every test runs in; each names a small range, one outside of it, and addresses in it.
type family struct {
	name    string
	subnet  string // leases .2 to .6 ( ::2 to ::7)
	addrs   []string
	gateway string
}

var families = []family{
	{name: "IPv4", subnet: "10.1.0.0/29", addrs: []string{"10.1.0.2", "10.1.0.3", "10.1.0.4", "10.1.0.5", "10.1.0.6"}, gateway: "10.1.0.1"},
	{name: "IPv6", subnet: "fd00:1::/125", addrs: []string{"fd00:1::2", "fd00:1::3", "fd00:1::4", "fd00:1::5", "fd00:1::6", "fd00:1::7"}, gateway: "fd00:1::1"},
}

func eachFamily(t *testing.T, f func(*testing.T, family)) {
	for _, fam := range families {
		t.Run(fam.name, func(t *testing.T) { f(t, fam) })
	}
}

// clock is a settable CLOCK_BOOTTIME; like the real one it never shows the same time twice.
type clock struct{ now time.Duration }

// conf makes a configuration whose ipam section has these members beside runDir. All of one test share the directory dir.
func conf(t testing.TB, dir, members string, ck *clock) *Config {
	t.Helper()
	return confArgs(t, dir, members, "", ck)
}

func confArgs(t testing.TB, dir, members, args string, ck *clock) *Config {
	t.Helper()
	c, err := LoadConfig([]byte(fmt.Sprintf(`{"cniVersion":"1.1.0","name":"net","type":"x","ipam":{"type":"margay-ipam","runDir":%q,%s}}`, dir, members)), args)
	if err != nil {
		t.Fatalf("LoadConfig: %v", err)
	}
	if ck != nil {
		c.sys.boottime = func() time.Duration { ck.now++; return ck.now }
	}
	return c
}

func subnet(s string) string { return fmt.Sprintf(`"ranges":[[{"subnet":%q}]]`, s) }

func pod(n int) Attachment {
	return Attachment{ContainerID: fmt.Sprintf("c%d", n), IfName: "eth0", Netns: fmt.Sprintf("/run/netns/none-%d", n)}
}

// add leases and returns the addresses, separated by commas.
func add(t testing.TB, c *Config, at Attachment) string {
	t.Helper()
	a, err := Add(t.Context(), c, at)
	if err != nil {
		t.Fatalf("Add(%s): %v", at.ContainerID, err)
	}
	var out []string
	for _, ip := range a.IPs {
		out = append(out, ip.Address.Addr().String())
	}
	return strings.Join(out, ",")
}

func del(t testing.TB, c *Config, at Attachment) {
	t.Helper()
	if err := Del(t.Context(), c, at); err != nil {
		t.Fatalf("Del(%s): %v", at.ContainerID, err)
	}
}

// wantCode checks an error's CNI code and that its message has these parts.
func wantCode(t testing.TB, err error, code uint, parts ...string) {
	t.Helper()
	e, ok := errors.AsType[*types.Error](err)
	if !ok || e.Code != code {
		t.Fatalf("error = %v, want code %d", err, code)
	}
	for _, p := range parts {
		if !strings.Contains(e.Error(), p) {
			t.Errorf("error = %q, want it to contain %q", e.Error(), p)
		}
	}
}

func leaseCountOf(t testing.TB, c *Config) int {
	t.Helper()
	ls, err := Leases(t.Context(), c)
	if err != nil {
		t.Fatalf("Leases: %v", err)
	}
	return len(ls)
}

func TestAddGivesEveryUsableAddressOnceThenError11(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		c := conf(t, t.TempDir(), subnet(fam.subnet), nil)
		for i, want := range fam.addrs {
			a, err := Add(t.Context(), c, pod(i))
			if err != nil {
				t.Fatalf("Add %d: %v", i, err)
			}
			bits := netip.MustParsePrefix(fam.subnet).Bits()
			wantIPs := []Assigned{{Address: netip.PrefixFrom(netip.MustParseAddr(want), bits), Gateway: netip.MustParseAddr(fam.gateway)}}
			if diff := cmp.Diff(wantIPs, a.IPs, cmp.Comparer(func(a, b Assigned) bool { return a == b })); diff != "" {
				t.Errorf("Add %d (-want +got):\n%s", i, diff)
			}
		}
		n := len(fam.addrs)
		_, err := Add(t.Context(), c, pod(99))
		wantCode(t, err, 11, fam.subnet, fmt.Sprintf("%d leases held of %d addresses", n, n), "0 cooling down")
		if err := Status(t.Context(), c); err != nil {
			t.Errorf("Status with a full range = %v, want nil", err)
		}
		verify(t, c)
		for i := range fam.addrs {
			del(t, c, pod(i))
			del(t, c, pod(i)) // twice is fine
		}
		if n := leaseCountOf(t, c); n != 0 {
			t.Errorf("%d leases left, want 0", n)
		}
		verify(t, c)
	})
}

func TestExcludedAndGatewayAreNeverLeased(t *testing.T) {
	for _, tc := range []struct {
		name, members string
		want          []string
	}{
		{"IPv4", `"subnet":"10.1.0.0/28","gateway":"10.1.0.3","exclude":["10.1.0.4/30","10.1.0.9"]`, []string{"10.1.0.1", "10.1.0.2", "10.1.0.8", "10.1.0.10", "10.1.0.11", "10.1.0.12", "10.1.0.13", "10.1.0.14"}},
		{"IPv6", `"ranges":[[{"subnet":"fd00::/64","rangeStart":"fd00::10","rangeEnd":"fd00::1:0:0:1","exclude":["fd00::12","fd00::14/126","fd00::18/125","fd00::20/123","fd00::40/122","fd00::80/121","fd00::100/120","fd00::200/119","fd00::400/118","fd00::800/117","fd00::1000/116","fd00::2000/115","fd00::4000/114","fd00::8000/113","fd00::1:0/112","fd00::2:0/111"]}]]`, []string{"fd00::10", "fd00::11", "fd00::13", "fd00::4:0"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := conf(t, t.TempDir(), tc.members, nil)
			for i, want := range tc.want {
				if got := add(t, c, pod(i)); got != want {
					t.Fatalf("Add %d = %s, want %s", i, got, want)
				}
			}
			if tc.name == "IPv4" {
				_, err := Add(t.Context(), c, pod(99))
				wantCode(t, err, 11)
			}
		})
	}
}

func TestDualStackIsAllOrNothing(t *testing.T) {
	dir := t.TempDir()
	c := conf(t, dir, `"ranges":[[{"subnet":"10.1.0.0/24"}],[{"subnet":"fd00:1::/126"}]]`, nil)
	for i := range 2 { // ::2 and ::3
		if got, want := add(t, c, pod(i)), fmt.Sprintf("10.1.0.%d,fd00:1::%d", i+2, i+2); got != want {
			t.Fatalf("Add %d = %s, want %s", i, got, want)
		}
	}
	before, _ := os.ReadFile(filepath.Join(c.dir(), "state"))
	_, err := Add(t.Context(), c, pod(2))
	wantCode(t, err, 11, "fd00:1::/126", "2 leases held of 2 addresses")
	after, _ := os.ReadFile(filepath.Join(c.dir(), "state"))
	if string(before) != string(after) {
		t.Error("an Add that failed changed the state")
	}
	del(t, c, pod(0))
	if got, want := add(t, c, pod(2)), "10.1.0.4,fd00:1::2"; got != want {
		t.Errorf("Add after Del = %s, want %s", got, want)
	}
	verify(t, c)
}

func TestReuseIsLeastRecentlyReleasedFirst(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		ck := &clock{now: time.Hour}
		dir := t.TempDir()
		c := conf(t, dir, subnet(fam.subnet)+`,"releaseCooldown":10`, ck)
		for i := range fam.addrs {
			add(t, c, pod(i))
		}
		order := []int{3, 0, 2}
		for _, i := range order {
			del(t, c, pod(i))
			ck.now += time.Second
		}
		strict := conf(t, dir, subnet(fam.subnet)+`,"releaseCooldown":10,"strictCooldown":true`, ck)
		_, err := Add(t.Context(), strict, pod(10))
		wantCode(t, err, 11, fmt.Sprintf("%d leases held", len(fam.addrs)-3), "3 cooling down")
		// Without strictCooldown a cooling address is better than none, and the oldest is the best of them.
		if got, want := add(t, c, pod(10)), fam.addrs[3]; got != want {
			t.Errorf("Add = %s, want %s, which was released first", got, want)
		}
		ck.now = time.Hour + 12*time.Second // pod 0's address was released at +1 s
		if got, want := add(t, strict, pod(11)), fam.addrs[0]; got != want {
			t.Errorf("strict Add = %s, want %s", got, want)
		}
		_, err = Add(t.Context(), strict, pod(12))
		wantCode(t, err, 11, "1 cooling down")
		verify(t, c)
	})
}

func TestNeverLeasedComesBeforeReleased(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		c := conf(t, t.TempDir(), subnet(fam.subnet)+`,"releaseCooldown":0`, nil)
		var got []string
		for i := range fam.addrs {
			got = append(got, add(t, c, pod(i)))
			del(t, c, pod(i))
		}
		if diff := cmp.Diff(fam.addrs, got); diff != "" {
			t.Errorf("addresses (-want +got):\n%s", diff)
		}
		if got := add(t, c, pod(9)); got != fam.addrs[0] {
			t.Errorf("Add in a range all of which was leased = %s, want %s", got, fam.addrs[0])
		}
	})
}

func TestReleasedAddressesAreBoundedInHugeRange(t *testing.T) {
	ck := &clock{now: time.Hour}
	c := conf(t, t.TempDir(), subnet("fd00::/64")+`,"releaseCooldown":5`, ck)
	c.sys.maxReleased = 8
	seen := map[string]bool{}
	for i := range 100 {
		seen[add(t, c, pod(i))] = true
		del(t, c, pod(i))
		ck.now += time.Second
	}
	if len(seen) != 8 {
		t.Errorf("100 pods, one at a time, used %d addresses, want 8", len(seen))
	}
	verify(t, c)
}

func TestRepeatedAdd(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		dir := t.TempDir()
		c := conf(t, dir, subnet(fam.subnet), nil)
		netns := filepath.Join(dir, "netns")
		touch(t, netns)
		at := Attachment{ContainerID: "c", IfName: "eth0", Netns: netns}
		first := add(t, c, at)
		second, err := Add(t.Context(), c, at)
		if err != nil || !second.Repeated || second.IPs[0].Address.Addr().String() != first {
			t.Errorf("second Add = %+v, %v, want the same address %s", second, err, first)
		}
		other := at
		other.Netns = filepath.Join(dir, "other")
		touch(t, other.Netns)
		_, err = Add(t.Context(), c, other)
		wantCode(t, err, 4, "already holds "+first, netns)
		if err := os.Remove(netns); err != nil {
			t.Fatal(err)
		}
		if got := add(t, c, other); got != first {
			t.Errorf("Add after the first namespace is gone = %s, want %s", got, first)
		}
		if ls, _ := Leases(t.Context(), c); len(ls) != 1 || ls[0].Netns != other.Netns {
			t.Errorf("leases = %+v, want one of the new namespace", ls)
		}
		// A lease that the edited ranges do not fit is replaced.
		moved := conf(t, dir, `"ranges":[[{"subnet":"10.77.0.0/24"}]]`, nil)
		if got := add(t, moved, other); got != "10.77.0.2" {
			t.Errorf("Add with other ranges = %s, want 10.77.0.2", got)
		}
		if n := leaseCountOf(t, moved); n != 1 {
			t.Errorf("%d leases, want 1", n)
		}
		verify(t, moved)
	})
}

func touch(t testing.TB, path string) {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestRequestedAddresses(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		dir := t.TempDir()
		plain := conf(t, dir, subnet(fam.subnet), nil)
		ask := func(a string) *Config { return confArgs(t, dir, subnet(fam.subnet), "IgnoreUnknown=1;IP="+a, nil) }
		want := fam.addrs[2]
		if got := add(t, ask(want), pod(0)); got != want {
			t.Errorf("requested %s, got %s", want, got)
		}
		_, err := Add(t.Context(), ask(want), pod(1))
		wantCode(t, err, 11, want, "container c0 interface eth0")
		del(t, plain, pod(0))
		if got := add(t, ask(want+"/64"), pod(1)); got != want {
			t.Errorf("requested %s, which is cooling down, got %s", want, got)
		}
		for i, w := range []string{fam.addrs[0], fam.addrs[1], fam.addrs[3]} {
			if got := add(t, plain, pod(10+i)); got != w {
				t.Errorf("Add = %s, want %s", got, w)
			}
		}
		_, err = Add(t.Context(), ask(fam.gateway), pod(2))
		wantCode(t, err, 7, "reserved")
		_, err = Add(t.Context(), ask("192.0.2.1"), pod(2))
		wantCode(t, err, 7, "none of the ranges")
		_, err = Add(t.Context(), ask(fam.addrs[0]+","+fam.addrs[1]), pod(2))
		wantCode(t, err, 7, "same range set")
		verify(t, plain)
	})
}

func TestEditedRangesKeepLeases(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		dir := t.TempDir()
		old := conf(t, dir, subnet(fam.subnet), nil)
		for i := range 3 {
			add(t, old, pod(i))
		}
		del(t, old, pod(1)) // addrs[1] is released
		wider := map[string]string{"IPv4": "10.1.0.0/28", "IPv6": "fd00:1::/124"}[fam.name]
		c := conf(t, dir, subnet(wider)+`,"releaseCooldown":0`, nil)
		if got := add(t, c, pod(3)); got != fam.addrs[3] {
			t.Errorf("Add in the wider range = %s, want %s: the first that was never leased", got, fam.addrs[3])
		}
		verify(t, c)
		elsewhere := conf(t, dir, subnet("10.99.0.0/24"), nil)
		if got := add(t, elsewhere, pod(4)); got != "10.99.0.2" {
			t.Errorf("Add = %s, want 10.99.0.2", got)
		}
		if err := Check(t.Context(), elsewhere, pod(0), nil); err != nil {
			t.Errorf("Check of a lease outside the ranges = %v, want nil", err)
		}
		verify(t, elsewhere)
		for i := range 5 {
			del(t, elsewhere, pod(i))
		}
		if n := leaseCountOf(t, elsewhere); n != 0 {
			t.Errorf("%d leases, want 0", n)
		}
		verify(t, elsewhere)
	})
}

func TestDelAndGCWorkWithBrokenRanges(t *testing.T) {
	dir := t.TempDir()
	c := conf(t, dir, subnet("10.1.0.0/24"), nil)
	add(t, c, pod(0))
	add(t, c, pod(1))
	for _, broken := range []string{`"ranges":"x"`, `"ranges":[[{"subnet":"10.1.0.0/33"}]]`, `"rangesFile":"/nonexistent"`, `"colour":1`} {
		b := conf(t, dir, broken, nil)
		if _, err := Add(t.Context(), b, pod(2)); err == nil {
			t.Errorf("Add with %s succeeds", broken)
		}
		wantCode(t, Status(t.Context(), b), 50)
	}
	b := conf(t, dir, `"ranges":"x"`, nil)
	del(t, b, pod(0))
	if r, err := GC(t.Context(), b, []Attachment{pod(5)}); err != nil || len(r.Freed) != 1 {
		t.Errorf("GC = %+v, %v, want one freed", r, err)
	}
	verify(t, c)
}

func TestRoutesAndDNSPassThrough(t *testing.T) {
	dir := t.TempDir()
	resolv := filepath.Join(dir, "resolv.conf")
	if err := os.WriteFile(resolv, []byte("# a comment\nnameserver 10.0.0.53\nnameserver fd00::53\nsearch a.example b.example\noptions ndots:5\ndomain example\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := conf(t, dir, fmt.Sprintf(`"subnet":"10.1.0.0/24","routes":[{"dst":"0.0.0.0/0","gw":"10.1.0.9"}],"resolvConf":%q`, resolv), nil)
	a, err := Add(t.Context(), c, pod(0))
	if err != nil {
		t.Fatal(err)
	}
	if len(a.Routes) != 1 || a.Routes[0].Dst.String() != "0.0.0.0/0" || a.Routes[0].GW.String() != "10.1.0.9" {
		t.Errorf("routes = %v, want the configured one", a.Routes)
	}
	want := types.DNS{Nameservers: []string{"10.0.0.53", "fd00::53"}, Domain: "example", Search: []string{"a.example", "b.example"}, Options: []string{"ndots:5"}}
	if diff := cmp.Diff(want, a.DNS); diff != "" {
		t.Errorf("DNS (-want +got):\n%s", diff)
	}
}

func TestWaitForLockIsBounded(t *testing.T) {
	c := conf(t, t.TempDir(), subnet("10.1.0.0/24"), nil)
	add(t, c, pod(0))
	held, err := lock(t.Context(), c.dir(), false)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err = Add(ctx, c, pod(1))
	wantCode(t, err, 11, "lock")
	wantCode(t, Del(ctx, c, pod(0)), 11, "lock")
}

func TestPodNameIsRecorded(t *testing.T) {
	dir := t.TempDir()
	c := confArgs(t, dir, subnet("fd00::/64"), "K8S_POD_NAMESPACE=shop;K8S_POD_NAME="+strings.Repeat("n", 300), nil)
	at := pod(0)
	at.ContainerID = strings.Repeat("f", 64)
	at.Netns = "/var/run/netns/cni-" + strings.Repeat("a", 36)
	add(t, c, at)
	ls, err := Leases(t.Context(), c)
	if err != nil || len(ls) != 1 {
		t.Fatalf("Leases = %v, %v, want one", ls, err)
	}
	if l := ls[0]; l.PodNamespace != "shop" || !strings.HasPrefix(l.PodName, strings.Repeat("n", 253)) || l.ContainerID != at.ContainerID || l.Netns != at.Netns {
		t.Errorf("lease = %+v, want container, netns and pod shop/nnn…", l)
	}
	at.ContainerID = strings.Repeat("f", 500)
	_, err = Add(t.Context(), c, at)
	wantCode(t, err, 4, "too long")
	verify(t, c)
}
