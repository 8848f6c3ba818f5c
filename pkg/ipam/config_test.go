// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"encoding/json"
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func mkdirTemp() (string, error) { return os.MkdirTemp("", "ipam") }
func removeAll(dir string)       { _ = os.RemoveAll(dir) }

func TestParseRange(t *testing.T) {
	for _, tc := range []struct {
		name string
		in   rangeConf
		want string // "start end gateway size", or the error
	}{
		{"IPv4 defaults", rangeConf{Subnet: "10.1.2.0/24"}, "10.1.2.1 10.1.2.254 10.1.2.1 253"},
		{"IPv6 defaults", rangeConf{Subnet: "fd00::/64"}, "fd00::1 fd00::ffff:ffff:ffff:ffff fd00::1 18446744073709551614"},
		{"IPv4 smallest", rangeConf{Subnet: "10.1.2.4/30"}, "10.1.2.5 10.1.2.6 10.1.2.5 1"},
		{"IPv6 smallest", rangeConf{Subnet: "fd00::4/126"}, "fd00::5 fd00::7 fd00::5 2"},
		{"IPv4 part", rangeConf{Subnet: "10.1.0.0/16", Start: "10.1.2.0", End: "10.1.2.255", Gateway: "10.1.0.1"}, "10.1.2.0 10.1.2.255 10.1.0.1 256"},
		{"IPv6 part", rangeConf{Subnet: "fd00::/64", Start: "fd00::", End: "fd00::ff", Gateway: "fe80::1"}, "fd00:: fd00::ff fe80::1 255"},
		{"IPv4 whole space", rangeConf{Subnet: "0.0.0.0/0", Exclude: []string{"0.0.0.0/1", "128.0.0.0/2"}}, "0.0.0.1 255.255.255.254 0.0.0.1 1073741823"},
		{"IPv6 end of space", rangeConf{Subnet: "ffff:ffff:ffff:ffff:ffff:ffff:ffff:fff0/124"}, "ffff:ffff:ffff:ffff:ffff:ffff:ffff:fff1 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:fff1 14"},
		{"overlapping excludes", rangeConf{Subnet: "10.1.2.0/24", Exclude: []string{"10.1.2.0/25", "10.1.2.64/26", "10.1.2.128", "10.9.0.0/16", "fd00::/64"}}, "10.1.2.1 10.1.2.254 10.1.2.1 126"},
		{"no subnet", rangeConf{}, `subnet "": netip.ParsePrefix(""): no '/'`},
		{"host bits", rangeConf{Subnet: "10.1.2.3/24"}, "subnet 10.1.2.3/24 has host bits set, its network address is 10.1.2.0/24"},
		{"too small", rangeConf{Subnet: "10.1.2.0/31"}, "subnet 10.1.2.0/31 is too small: at least 4 addresses are needed"},
		{"IPv6 too small", rangeConf{Subnet: "fd00::/127"}, "subnet fd00::/127 is too small: at least 4 addresses are needed"},
		{"start outside", rangeConf{Subnet: "10.1.2.0/24", Start: "10.1.3.1"}, "rangeStart 10.1.3.1 is not in subnet 10.1.2.0/24"},
		{"end of other family", rangeConf{Subnet: "10.1.2.0/24", End: "fd00::1"}, "rangeEnd fd00::1 is not in subnet 10.1.2.0/24"},
		{"gateway of other family", rangeConf{Subnet: "10.1.2.0/24", Gateway: "fe80::1"}, "gateway fe80::1 is not in subnet 10.1.2.0/24"},
		{"backwards", rangeConf{Subnet: "10.1.2.0/24", Start: "10.1.2.9", End: "10.1.2.8"}, "rangeStart 10.1.2.9 is behind rangeEnd 10.1.2.8"},
		{"zone", rangeConf{Subnet: "fe80::/64", Start: "fe80::2%eth0"}, `rangeStart "fe80::2%eth0": a plain IPv4 or IPv6 address is needed`},
		{"mapped", rangeConf{Subnet: "::ffff:10.0.0.0/104"}, `subnet "::ffff:10.0.0.0/104": a plain IPv4 or IPv6 prefix is needed`},
		{"bad exclude", rangeConf{Subnet: "10.1.2.0/24", Exclude: []string{"x"}}, `exclude "x": ParseAddr("x"): unable to parse IP`},
		{"all excluded", rangeConf{Subnet: "10.1.2.0/24", Exclude: []string{"10.1.0.0/16"}}, "range 10.1.2.0/24 (10.1.2.1 to 10.1.2.254) has no usable address"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r, err := tc.in.parse()
			got := ""
			if err != nil {
				got = err.Error()
			} else {
				got = r.start.String() + " " + r.end.String() + " " + r.gateway.String() + " " + r.size().String()
			}
			if got != tc.want {
				t.Errorf("parse(%+v) = %q, want %q", tc.in, got, tc.want)
			}
		})
	}
}

func TestConfigFaults(t *testing.T) {
	for _, tc := range []struct {
		name, members, args string
		code                uint
		part                string
	}{
		{"misspelt key", `"ranges":[[{"subnet":"10.1.0.0/24","excludes":["10.1.0.9"]}]]`, "", 2, `ipam.ranges[][].excludes = ["10.1.0.9"]`},
		{"unknown key", `"subnet":"10.1.0.0/24","colour":"red"`, "", 2, `ipam.colour = "red"`},
		{"ranges of wrong type", `"ranges":[{"subnet":"10.1.0.0/24"}]`, "", 6, "list of lists"},
		{"cool-down of wrong type", `"subnet":"10.1.0.0/24","releaseCooldown":"1m"`, "", 6, "ipam section"},
		{"short form without subnet", `"rangeStart":"10.1.0.0"`, "", 7, "subnet"},
		{"empty set", `"ranges":[[]]`, "", 7, "range set 0 is empty"},
		{"mixed set", `"ranges":[[{"subnet":"10.1.0.0/24"},{"subnet":"fd00::/64"}]]`, "", 7, "mixes"},
		{"overlap in a set", `"ranges":[[{"subnet":"10.1.0.0/24"},{"subnet":"10.1.0.0/25"}]]`, "", 7, "overlap"},
		{"overlap of sets", `"ranges":[[{"subnet":"fd00::/64"}],[{"subnet":"fd00::/96"}]]`, "", 7, "overlap"},
		{"broken CNI_ARGS", `"subnet":"10.1.0.0/24"`, "IP", 4, "KEY=VALUE"},
		{"IP in CNI_ARGS", `"subnet":"10.1.0.0/24"`, "IP=x", 4, `"x"`},
		{"missing resolvConf", `"subnet":"10.1.0.0/24","resolvConf":"/nonexistent"`, "", 5, "/nonexistent"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := confArgs(t, t.TempDir(), tc.members, tc.args, nil)
			_, err := Add(t.Context(), c, pod(0))
			wantCode(t, err, tc.code, tc.part)
			del(t, c, pod(0))
			if _, err := os.Stat(c.dir()); err == nil {
				t.Error("a call with a faulty configuration made the state directory")
			}
		})
	}
}

func TestLoadConfigErrors(t *testing.T) {
	for _, tc := range []struct {
		name, stdin string
		code        uint
	}{
		{"no JSON", `{`, 6},
		{"no name", `{"ipam":{}}`, 7},
		{"name that leaves the directory", `{"name":"../x","ipam":{}}`, 7},
		{"ipam is no object", `{"name":"n","ipam":[1]}`, 6},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := LoadConfig([]byte(tc.stdin), "")
			wantCode(t, err, tc.code)
		})
	}
	c, err := LoadConfig([]byte(`{"name":"n"}`), "")
	if err != nil {
		t.Fatal(err)
	}
	c.RunDir = t.TempDir()
	_, err = Add(t.Context(), c, pod(0))
	wantCode(t, err, 7, "no ipam section")
}

func TestLoadConfigCollectsRequestsAndLists(t *testing.T) {
	c, err := LoadConfig([]byte(`{"cniVersion":"1.1.0","name":"n","runDir":"/r","ipam":{"type":"margay-ipam","dataDir":"/x","subnet":"10.1.0.0/24","ranges":[[{"subnet":"fd00::/64"}]]},
		"runtimeConfig":{"ips":["10.1.0.9/24"]},"args":{"cni":{"ips":["fd00::9","10.1.0.9"]}},
		"prevResult":{"cniVersion":"1.0.0","ips":[{"address":"10.1.0.9/32"},{"address":"fd00::9/128"}]},
		"cni.dev/valid-attachments":[{"containerID":"c","ifname":"eth0"}]}`), "K8S_POD_NAMESPACE=ns;K8S_POD_NAME=p;IP=fd00::9")
	if err != nil {
		t.Fatal(err)
	}
	addrs := []netip.Addr{netip.MustParseAddr("10.1.0.9"), netip.MustParseAddr("fd00::9")}
	if !slices.Equal(c.requested, addrs) {
		t.Errorf("requested = %v, want %v", c.requested, addrs)
	}
	if !slices.Equal(c.PrevIPs, addrs) {
		t.Errorf("PrevIPs = %v, want %v", c.PrevIPs, addrs)
	}
	if diff := cmp.Diff([]Attachment{{ContainerID: "c", IfName: "eth0"}}, c.Valid); diff != "" {
		t.Errorf("Valid (-want +got):\n%s", diff)
	}
	if c.dir() != "/r/ipam/n" || c.podNamespace != "ns" || c.podName != "p" || len(c.plan.sets) != 2 {
		t.Errorf("dir %s, pod %s/%s, %d sets, want /r/ipam/n, ns/p, 2", c.dir(), c.podNamespace, c.podName, len(c.plan.sets))
	}
	if ip := c.plan.ranges[0].start; !ip.Is4() {
		t.Errorf("first range starts at %s, want the short form's subnet first", ip)
	}
}

// FuzzConfig: whatever comes in, LoadConfig and Add answer with a coded error or with usable addresses of the ranges.
func FuzzConfig(f *testing.F) {
	for _, s := range append(modelPlans(), `"subnet":"10.1.0.0/24","exclude":["10.1.0.0/25","10.1.0.200"],"gateway":"10.1.0.3"`,
		`"subnet":"::/0","exclude":["::/1"]`, `"ranges":[[{"subnet":"255.255.255.252/30"}]]`, `"ranges":[[{}]]`, `"routes":[{"dst":"0.0.0.0/0"}]`,
		`"subnet":"fe80::/64","rangeStart":"fe80::5%x"`) {
		f.Add([]byte(`{"cniVersion":"1.1.0","name":"net","ipam":{`+s+`}}`), "IP=10.1.0.9")
	}
	f.Add([]byte(`{"name":"n","ipam":{"subnet":"fd00::/64"},"runtimeConfig":{"ips":["fd00::5/64"]},"prevResult":{"ips":[{"address":"1.2.3.4/5"}]}}`), "K8S_POD_NAME=p")
	f.Fuzz(func(t *testing.T, stdin []byte, args string) {
		c, err := LoadConfig(stdin, args)
		if err != nil {
			return
		}
		if json.Unmarshal(stdin, &struct{}{}) != nil {
			t.Fatalf("LoadConfig accepts what is no JSON")
		}
		c.RunDir = t.TempDir()
		c.section.RangesFile = ""
		c.section.ResolvConf = ""
		a, err := Add(t.Context(), c, pod(0))
		if err != nil {
			return
		}
		p, err := c.ready()
		if err != nil {
			t.Fatalf("Add succeeds with %v", err)
		}
		for set, ip := range a.IPs {
			id := p.find(ip.Address.Addr())
			if id < 0 || p.setOf(id) != set || ip.Address.Addr() == ip.Gateway {
				t.Errorf("Add gave %s for set %d", ip.Address, set)
			}
		}
		verify(t, c)
		del(t, c, pod(0))
		verify(t, c)
	})
}
