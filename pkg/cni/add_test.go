// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/link"
)

// forFamilies runs a test for IPv4, IPv6 and dual stack.
func forFamilies(t *testing.T, f func(t *testing.T, ranges []string)) {
	for name, ranges := range familyRanges {
		t.Run(name, func(t *testing.T) { f(t, ranges) })
	}
}

func resultAddresses(r *types100.Result) []netip.Addr {
	var out []netip.Addr
	for _, ip := range r.IPs {
		a, _ := netip.AddrFromSlice(ip.Address.IP)
		out = append(out, a.Unmap())
	}
	return out
}

func TestAddThenDel(t *testing.T) {
	forFamilies(t, func(t *testing.T, ranges []string) {
		n, pod := newNode(t), netnstest.New(t)
		before := n.state()
		args := cmdArgs("c1", pod.Path(), n.conf(ranges))
		r := n.mustAdd(args)

		addresses := resultAddresses(r)
		if len(addresses) != len(ranges) {
			t.Fatalf("result has addresses %v, want one for each of %v", addresses, ranges)
		}
		checkResult(t, r, pod.Path(), addresses)
		checkRegistered(t, n, r, addresses)
		checkReachable(t, n, pod, addresses)

		if err := n.verb(n.plugin.Check, n.withPrev(args, r)); err != nil {
			t.Errorf("CHECK = %v, want nil", err)
		}
		if err := n.del(n.withPrev(args, r)); err != nil {
			t.Errorf("DEL = %v, want nil", err)
		}
		if diff := cmp.Diff(before, n.state()); diff != "" {
			t.Errorf("state after DEL (-want +got):\n%s", diff)
		}
	})
}

func checkResult(t *testing.T, r *types100.Result, netns string, addresses []netip.Addr) {
	t.Helper()
	if len(r.Interfaces) != 2 || r.Interfaces[0].Sandbox != "" || r.Interfaces[1].Sandbox != netns || r.Interfaces[1].Name != "eth0" {
		t.Fatalf("interfaces = %v, want the host's end without a sandbox, then eth0 in %s", r.Interfaces, netns)
	}
	for _, i := range r.Interfaces {
		if i.Mtu != 1500 || i.Mac == "" {
			t.Errorf("interface = %v, want MTU 1500 and a MAC", i)
		}
	}
	for i, ip := range r.IPs {
		ones, bits := ip.Address.Mask.Size()
		if ip.Interface == nil || *ip.Interface != 1 || ones != bits || ip.Gateway.String() != link.GatewayOf(addresses[i]).String() {
			t.Errorf("ip = %v, want a host prefix on interface 1 through %s", ip, link.GatewayOf(addresses[i]))
		}
	}
	if len(r.Routes) != len(addresses) {
		t.Errorf("routes = %v, want a default route for each family", r.Routes)
	}
}

func checkRegistered(t *testing.T, n *node, r *types100.Result, addresses []netip.Addr) {
	t.Helper()
	rec, err := endpoint.NewStore(n.run).Load("c1", "eth0")
	if err != nil {
		t.Fatal(err)
	}
	if rec.Namespace != "shop" || rec.Name != "web-0" || rec.UID != "1f0c" || rec.Network != "net" || !slices.Equal(rec.Addresses, addresses) ||
		rec.MAC != r.Interfaces[1].Mac || rec.HostMAC != r.Interfaces[0].Mac || rec.HostIfName != r.Interfaces[0].Name || rec.Policy != endpoint.StartedOpen {
		t.Errorf("record = %+v, want what the result %+v says", rec, r)
	}
	for _, a := range addresses {
		e, ok, _ := n.plane.LookupEndpoint(a)
		if !ok || int(e.Ifindex) != rec.HostIfindex || net.HardwareAddr(e.Mac[:]).String() != rec.MAC ||
			net.HardwareAddr(e.HostMac[:]).String() != rec.HostMAC || e.Identity != bpf.IdentityPodUnknown || e.Flags != 0 {
			t.Errorf("endpoint %s = %+v, %v, want what the record %+v says", a, e, ok, rec)
		}
	}
	if !n.plane.attached[rec.HostIfindex] {
		t.Errorf("device %d has no programs", rec.HostIfindex)
	}
}

// checkReachable connects from the node to each address at once: no address may be tentative, no neighbour unresolved.
func checkReachable(t *testing.T, n *node, pod *netnstest.NS, addresses []netip.Addr) {
	t.Helper()
	for _, a := range addresses {
		talk(t, n.ns, pod, a)
	}
}

var ownSteps = []string{"open namespaces", "ensure datapath", "clear leftovers", "begin journal", "read policy", "allocate addresses", "make interface",
	"attach programs", "register endpoint", "register host ports", "configure host", "configure pod", "print result"}

var errInjected = errors.New("injected")

// A test of the list itself: a step that is not in it would go untested below.
func TestOwnStepsIsComplete(t *testing.T) {
	n, pod := newNode(t), netnstest.New(t)
	var got []string
	n.after = func(step string) error {
		got = append(got, step)
		return nil
	}
	n.mustAdd(cmdArgs("c1", pod.Path(), n.conf([]string{range4})))
	if diff := cmp.Diff(ownSteps, got); diff != "" {
		t.Errorf("steps of ADD (-want +got):\n%s", diff)
	}
}

func TestFaultAfterEachStepLeavesNothing(t *testing.T) {
	forFamilies(t, func(t *testing.T, ranges []string) {
		for _, step := range ownSteps {
			t.Run(step, func(t *testing.T) {
				n, pod := newNode(t), netnstest.New(t)
				before := n.state()
				n.after = func(s string) error {
					if s == step {
						return errInjected
					}
					return nil
				}
				if _, err := n.add(cmdArgs("c1", pod.Path(), n.conf(ranges))); !errors.Is(err, errInjected) {
					t.Fatalf("ADD = %v, want the injected fault", err)
				}
				if diff := cmp.Diff(before, n.state()); diff != "" {
					t.Errorf("state after the failed ADD (-want +got):\n%s", diff)
				}
				if got := podDevices(t, pod); !slices.Equal(got, []string{"lo"}) {
					t.Errorf("pod has %v, want lo alone", got)
				}
			})
		}
	})
}

func TestFaultOfThePartsLeavesNothing(t *testing.T) {
	for name, c := range map[string]struct {
		fault string
		code  uint
	}{
		"datapath cannot be loaded": {"Ensure", codeDatapath},
		"attach refused":            {"AttachPod", codeAttach},
		"endpoints map full":        {"PutEndpoint", codeRegister},
		"endpoints map unreadable":  {"LookupEndpoint", codeRegister},
		"pending map unreadable":    {"LookupPending", codeRegister},
	} {
		t.Run(name, func(t *testing.T) {
			n, pod := newNode(t), netnstest.New(t)
			before := n.state()
			n.plane.faults[c.fault] = errInjected
			_, err := n.add(cmdArgs("c1", pod.Path(), n.conf(familyRanges["dual stack"])))
			if code(err) != c.code || !strings.Contains(err.Error(), "injected") {
				t.Fatalf("ADD = %v with code %d, want code %d and the cause", err, code(err), c.code)
			}
			delete(n.plane.faults, c.fault)
			if diff := cmp.Diff(before, n.state()); diff != "" {
				t.Errorf("state after the failed ADD (-want +got):\n%s", diff)
			}
		})
	}
}

// kill runs ADD up to the end of a step and stops there as kill -9 does: nothing is rolled back.
func (n *node) kill(step string, args *Args) {
	n.t.Helper()
	n.after = func(s string) error {
		if s == step {
			panic(errInjected) // the deferred rollback sees no error
		}
		return nil
	}
	defer func() {
		n.after = nil
		if r := recover(); r != errInjected {
			n.t.Fatalf("ADD ended with %v before step %q", r, step)
		}
	}()
	n.ns.Do(func() { _ = n.plugin.Add(context.Background(), args) })
}

func TestKilledAddIsRepaired(t *testing.T) {
	forFamilies(t, func(t *testing.T, ranges []string) {
		for _, step := range ownSteps[:len(ownSteps)-2] { // after "configure pod" everything is there: ADD is complete
			t.Run(step, func(t *testing.T) {
				n, pod := newNode(t), netnstest.New(t)
				before := n.state()
				args := cmdArgs("c1", pod.Path(), n.conf(ranges))
				n.kill(step, args)
				r := n.mustAdd(args)
				checkRegistered(t, n, r, resultAddresses(r))
				if err := n.del(args); err != nil {
					t.Errorf("DEL = %v, want nil", err)
				}
				if diff := cmp.Diff(before, n.state()); diff != "" {
					t.Errorf("state after DEL (-want +got):\n%s", diff)
				}
			})
		}
	})
}

func TestDelAfterKilledAddLeavesNothing(t *testing.T) {
	for _, step := range ownSteps {
		for name, netnsGone := range map[string]bool{"": false, ", namespace gone": true} {
			t.Run(step+name, func(t *testing.T) {
				n, pod := newNode(t), netnstest.New(t)
				before := n.state()
				args := cmdArgs("c1", pod.Path(), n.conf(familyRanges["dual stack"]))
				n.kill(step, args)
				if netnsGone {
					pod.Delete()
					args.Netns = ""
				}
				if err := n.del(args); err != nil {
					t.Errorf("DEL = %v, want nil", err)
				}
				n.eventually(before)
			})
		}
	}
}

// eventually waits for the kernel to dismantle a deleted namespace's devices, which it does in the background.
func (n *node) eventually(want []string) {
	n.t.Helper()
	var diff string
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		if diff = cmp.Diff(want, n.state()); diff == "" {
			return
		}
	}
	n.t.Errorf("state (-want +got):\n%s", diff)
}

func podDevices(t *testing.T, pod *netnstest.NS) []string {
	t.Helper()
	var out []string
	pod.Do(func() {
		links, err := netlink.LinkList()
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range links {
			out = append(out, l.Attrs().Name)
		}
	})
	return out
}

func TestAddRefusesAnInterfaceThatExists(t *testing.T) {
	t.Run("complete ADD of the same container", func(t *testing.T) {
		n, pod := newNode(t), netnstest.New(t)
		args := cmdArgs("c1", pod.Path(), n.conf(familyRanges["dual stack"]))
		n.mustAdd(args)
		before := n.state()
		if _, err := n.add(args); code(err) != codeInterface {
			t.Errorf("ADD = %v, want code %d", err, codeInterface)
		}
		if diff := cmp.Diff(before, n.state()); diff != "" {
			t.Errorf("the living pod changed (-want +got):\n%s", diff)
		}
	})
	t.Run("somebody else's", func(t *testing.T) {
		n, pod := newNode(t), netnstest.New(t)
		pod.Do(func() {
			a := netlink.NewLinkAttrs()
			a.Name = "eth0"
			if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: a, PeerName: "other", PeerTxQLen: -1}); err != nil {
				t.Fatal(err)
			}
		})
		before := n.state()
		if _, err := n.add(cmdArgs("c1", pod.Path(), n.conf([]string{range4}))); code(err) != codeInterface {
			t.Errorf("ADD = %v, want code %d", err, codeInterface)
		}
		if diff := cmp.Diff(before, n.state()); diff != "" {
			t.Errorf("state (-want +got):\n%s", diff)
		}
		if got := podDevices(t, pod); !slices.Contains(got, "eth0") {
			t.Errorf("pod has %v, want the other's eth0 untouched", got)
		}
	})
}

func TestAddEnvironment(t *testing.T) {
	n, pod := newNode(t), netnstest.New(t)
	for name, c := range map[string]struct {
		change func(*Args)
		code   uint
	}{
		"no such namespace":        {func(a *Args) { a.Netns = "/run/netns/none" }, 8},
		"file that is none":        {func(a *Args) { a.Netns = "/etc/hosts" }, 8},
		"the plugin's own":         {func(a *Args) { a.Netns = n.ns.Path() }, 8},
		"unknown argument":         {func(a *Args) { a.Args = "X=1" }, 4},
		"container ID with slash":  {func(a *Args) { a.ContainerID = "a/b" }, 4},
		"bad MAC in CNI_ARGS":      {func(a *Args) { a.Args = "MAC=zz" }, 4},
		"missing IPAM plugin":      {func(a *Args) { a.StdinData = n.conf(nil, set("ipam", map[string]any{"type": "nobody"})) }, 7},
		"MTU too small for IPv6":   {func(a *Args) { a.StdinData = n.conf([]string{range6}, set("mtu", 1000)) }, 7},
		"run directory is a file":  {func(a *Args) { a.StdinData = n.conf([]string{range4}, set("runDir", "/etc/hosts")) }, 5},
		"configuration is no JSON": {func(a *Args) { a.StdinData = []byte(`{`) }, 6},
	} {
		t.Run(name, func(t *testing.T) {
			before := n.state()
			args := cmdArgs("c1", pod.Path(), n.conf([]string{range4}))
			c.change(args)
			if _, err := n.add(args); code(err) != c.code {
				t.Errorf("ADD = %v with code %d, want %d", err, code(err), c.code)
			}
			if diff := cmp.Diff(before, n.state()); diff != "" {
				t.Errorf("state after the failed ADD (-want +got):\n%s", diff)
			}
		})
	}
}

func TestAddHonoursRequests(t *testing.T) {
	for name, c := range map[string]struct {
		tweaks []func(map[string]any)
		args   string
		want   func(*types100.Result) string
		is     string
	}{
		"mtu": {[]func(map[string]any){set("mtu", 1400)}, "", func(r *types100.Result) string {
			return fmt.Sprint(r.Interfaces[1].Mtu)
		}, "1400"},
		"mac capability": {[]func(map[string]any){set("runtimeConfig", map[string]any{"mac": "02:aa:00:00:00:01"})}, "", func(r *types100.Result) string {
			return r.Interfaces[1].Mac
		}, "02:aa:00:00:00:01"},
		"ips capability": {[]func(map[string]any){set("runtimeConfig", map[string]any{"ips": []string{"10.42.0.77/24"}})}, "", func(r *types100.Result) string {
			return r.IPs[0].Address.IP.String()
		}, "10.42.0.77"},
		"args.cni.ips": {[]func(map[string]any){set("args", map[string]any{"cni": map[string]any{"ips": []string{"10.42.0.78"}}})}, "", func(r *types100.Result) string {
			return r.IPs[0].Address.IP.String()
		}, "10.42.0.78"},
		"CNI_ARGS": {nil, "IP=10.42.0.79;MAC=02:aa:00:00:00:02", func(r *types100.Result) string {
			return r.IPs[0].Address.IP.String() + " " + r.Interfaces[1].Mac
		}, "10.42.0.79 02:aa:00:00:00:02"},
		"routes of the IPAM section": {[]func(map[string]any){func(c map[string]any) {
			c["ipam"].(map[string]any)["routes"] = []any{map[string]any{"dst": "10.0.0.0/8", "gw": "10.42.0.1"}}
		}}, "", func(r *types100.Result) string {
			return fmt.Sprint(r.Routes[0].Dst.String(), " ", r.Routes[0].GW, " ", len(r.Routes))
		}, "10.0.0.0/8 169.254.1.1 1"},
		"dns": {[]func(map[string]any){set("dns", map[string]any{"nameservers": []string{"10.0.0.53"}})}, "", func(r *types100.Result) string {
			return fmt.Sprint(r.DNS.Nameservers)
		}, "[10.0.0.53]"},
	} {
		t.Run(name, func(t *testing.T) {
			n, pod := newNode(t), netnstest.New(t)
			args := cmdArgs("c1", pod.Path(), n.conf([]string{range4}, c.tweaks...))
			args.Args = c.args
			r := n.mustAdd(args)
			if got := c.want(r); got != c.is {
				t.Errorf("result has %s, want %s", got, c.is)
			}
			if err := n.verb(n.plugin.Check, n.withPrev(args, r)); err != nil {
				t.Errorf("CHECK = %v, want nil", err)
			}
		})
	}
}

func TestLabelsReachTheRecord(t *testing.T) {
	n, pod := newNode(t), netnstest.New(t)
	labels := map[string]any{"cni": map[string]any{"labels": []any{map[string]any{"key": "app", "value": "web"}}}}
	n.mustAdd(cmdArgs("c1", pod.Path(), n.conf([]string{range4}, set("args", labels))))
	r, err := endpoint.NewStore(n.run).Load("c1", "eth0")
	if err != nil || r.Labels["app"] != "web" {
		t.Errorf("record = %+v, %v, want label app=web", r, err)
	}
}

func TestAddWhereTheRuntimeDisabledIPv6(t *testing.T) {
	n, pod := newNode(t), netnstest.New(t)
	pod.Do(func() {
		for _, f := range []string{"all", "default"} {
			if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+f+"/disable_ipv6", []byte("1"), 0); err != nil {
				t.Fatal(err)
			}
		}
	})
	r := n.mustAdd(cmdArgs("c1", pod.Path(), n.conf(familyRanges["dual stack"])))
	checkReachable(t, n, pod, resultAddresses(r))
}

func TestAddressOfALivingPodIsNotTakenOver(t *testing.T) {
	n, podA, podB := newNode(t), netnstest.New(t), netnstest.New(t)
	r := n.mustAdd(cmdArgs("a", podA.Path(), n.conf([]string{range4})))
	before := n.state()
	// Another network gives out the same range.
	other := n.conf([]string{range4}, set("name", "other"), set("runtimeConfig", map[string]any{"ips": []string{resultAddresses(r)[0].String()}}))
	if _, err := n.add(cmdArgs("b", podB.Path(), other)); code(err) != codeRegister {
		t.Errorf("ADD = %v, want code %d", err, codeRegister)
	}
	if diff := cmp.Diff(before, n.state()); diff != "" {
		t.Errorf("state (-want +got):\n%s", diff)
	}
}

// The programs and the endpoint must be there before the first packet can be.
func TestNothingIsUpBeforeTheEndpointIsRegistered(t *testing.T) {
	n, pod := newNode(t), netnstest.New(t)
	n.plane.onPut = func(int) {
		pod.Do(func() {
			l, err := netlink.LinkByName("eth0")
			if err != nil {
				t.Fatal(err)
			}
			addresses, err := netlink.AddrList(l, netlink.FAMILY_ALL)
			if err != nil || len(addresses) != 0 || l.Attrs().Flags&net.FlagUp != 0 || len(n.plane.attached) != 1 {
				t.Errorf("at registration: addresses %v (%v), flags %v, attached %v; want none, down, one", addresses, err, l.Attrs().Flags, n.plane.attached)
			}
		})
	}
	n.mustAdd(cmdArgs("c1", pod.Path(), n.conf(familyRanges["dual stack"])))
}

func TestResultSpeaksTheConfiguredVersion(t *testing.T) {
	for _, v := range versions {
		t.Run(v, func(t *testing.T) {
			n, pod := newNode(t), netnstest.New(t)
			n.mustAdd(cmdArgs("c1", pod.Path(), n.conf(familyRanges["dual stack"], set("cniVersion", v))))
			text := n.out.String()
			if !strings.Contains(strings.ReplaceAll(text, ": ", ":"), fmt.Sprintf(`"cniVersion":%q`, v)) {
				t.Errorf("result %s, want version %s", text, v)
			}
			if got := strings.Contains(text, `"mtu"`); got != (v == "1.1.0") {
				t.Errorf("result has mtu: %v, want it in 1.1.0 alone", got)
			}
		})
	}
}
