// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/endpoint"
)

// mapping is one entry of the capability.
func mapping(hostIP string, hostPort, containerPort int, protocol string) map[string]any {
	return map[string]any{"hostPort": hostPort, "containerPort": containerPort, "protocol": protocol, "hostIP": hostIP}
}

func withPorts(mappings ...map[string]any) func(map[string]any) {
	return set("runtimeConfig", map[string]any{"portMappings": mappings})
}

// equatePorts compares addresses, as records hold them, without ids.
var equatePorts = cmp.Options{
	cmpopts.EquateComparable(netip.AddrPort{}), cmpopts.IgnoreFields(endpoint.HostPort{}, "ID"), cmpopts.EquateEmpty(),
}

func TestM3_HostPortFrontends(t *testing.T) {
	dual := []netip.Addr{netip.MustParseAddr("10.0.0.5"), netip.MustParseAddr("fd00::5")}
	port := func(protocol, host, pod string) endpoint.HostPort {
		return endpoint.HostPort{Protocol: protocol, Host: netip.MustParseAddrPort(host), Pod: netip.MustParseAddrPort(pod)}
	}
	for name, c := range map[string]struct {
		json string
		pod  []netip.Addr
		want []endpoint.HostPort
		err  string
	}{
		"nothing": {`null`, dual, nil, ""},
		"every address of the node": {`[{"hostPort":80,"containerPort":8080,"protocol":"TCP"}]`, dual,
			[]endpoint.HostPort{port("tcp", "0.0.0.0:80", "10.0.0.5:8080"), port("tcp", "[::]:80", "[fd00::5]:8080")}, ""},
		"IPv4 pod": {`[{"hostPort":80,"containerPort":8080}]`, dual[:1],
			[]endpoint.HostPort{port("tcp", "0.0.0.0:80", "10.0.0.5:8080")}, ""},
		"all of IPv6": {`[{"hostPort":53,"containerPort":53,"protocol":"udp","hostIP":"::"}]`, dual,
			[]endpoint.HostPort{port("udp", "[::]:53", "[fd00::5]:53")}, ""},
		"one address": {`[{"hostPort":53,"containerPort":53,"protocol":"sctp","hostIP":"127.0.0.1"}]`, dual,
			[]endpoint.HostPort{port("sctp", "127.0.0.1:53", "10.0.0.5:53")}, ""},
		"mapped address": {`[{"hostPort":53,"containerPort":53,"protocol":"udp","hostIP":"::ffff:192.0.2.1"}]`, dual,
			[]endpoint.HostPort{port("udp", "192.0.2.1:53", "10.0.0.5:53")}, ""},
		"twice the same": {`[{"hostPort":1,"containerPort":2},{"hostPort":1,"containerPort":2,"protocol":"tcp"}]`, dual[:1],
			[]endpoint.HostPort{port("tcp", "0.0.0.0:1", "10.0.0.5:2")}, ""},
		"same port of another protocol": {`[{"hostPort":1,"containerPort":2},{"hostPort":1,"containerPort":3,"protocol":"udp"}]`, dual[:1],
			[]endpoint.HostPort{port("tcp", "0.0.0.0:1", "10.0.0.5:2"), port("udp", "0.0.0.0:1", "10.0.0.5:3")}, ""},
		"two targets":        {`[{"hostPort":1,"containerPort":2},{"hostPort":1,"containerPort":3}]`, dual[:1], nil, "two ports of the pod: 2 and 3"},
		"family of no pod":   {`[{"hostPort":1,"containerPort":2,"hostIP":"::1"}]`, dual[:1], nil, "no address of that family"},
		"no host port":       {`[{"containerPort":2}]`, dual, nil, "hostPort 0 is no port"},
		"no container port":  {`[{"hostPort":2,"containerPort":70000}]`, dual, nil, "containerPort 70000 is no port"},
		"unknown protocol":   {`[{"hostPort":2,"containerPort":2,"protocol":"icmp"}]`, dual, nil, `protocol "icmp"`},
		"no address":         {`[{"hostPort":2,"containerPort":2,"hostIP":"eth0"}]`, dual, nil, `hostIP "eth0"`},
		"link-local address": {`[{"hostPort":2,"containerPort":2,"hostIP":"fe80::1"}]`, dual, nil, `hostIP "fe80::1"`},
		"no list":            {`{"hostPort":2}`, dual, nil, "portMappings"},
	} {
		t.Run(name, func(t *testing.T) {
			conf := &NetConf{RuntimeConfig: runtimeConfig{PortMappings: []byte(c.json)}}
			got, err := conf.hostPorts(c.pod)
			if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
				t.Fatalf("hostPorts() = %v, want error %q", err, c.err)
			}
			if diff := cmp.Diff(c.want, got, equatePorts); diff != "" {
				t.Errorf("hostPorts() (-want +got):\n%s", diff)
			}
		})
	}
}

// webPorts are hostPorts at every address, at one, and at the loopback addresses.
var webPorts = withPorts(mapping("", 8080, 80, "tcp"), mapping("", 8080, 80, "udp"), mapping("192.0.2.1", 8081, 80, "tcp"),
	mapping("127.0.0.1", 8081, 81, "tcp"), mapping("::1", 8081, 81, "tcp"))

func TestM3_HostPortAddCheckDel(t *testing.T) {
	n, pod := newNode(t), netnstest.New(t)
	before := n.state()
	args := cmdArgs("c1", pod.Path(), n.conf(familyRanges["dual stack"], webPorts))
	r := n.mustAdd(args)
	rec, err := n.records().Load("c1", "eth0")
	if err != nil || len(rec.HostPorts) != 7 || len(n.plane.ports) != 7 || len(n.plane.targets) != 7 {
		t.Fatalf("record = %+v, %v, frontends = %v: want 7 hostPorts", rec, err, n.plane.ports)
	}
	for _, p := range rec.HostPorts {
		if s := n.plane.ports[frontend(p)]; s != mapForm(p).Service() || n.plane.targets[p.ID] != p.Pod {
			t.Errorf("hostPort %s = %+v to %s, want id %d and %s", p, s, n.plane.targets[s.Id], p.ID, p.Pod)
		}
	}
	args = n.withPrev(args, r)
	if err := n.verb(n.plugin.Check, args); err != nil {
		t.Errorf("CHECK = %v, want nil", err)
	}
	key := frontend(rec.HostPorts[0])
	kept := n.plane.ports[key]
	delete(n.plane.ports, key)
	if err := n.verb(n.plugin.Check, args); code(err) != codeCheckMismatch || !strings.Contains(err.Error(), "hostPort TCP *:8080 (IPv4)") {
		t.Errorf("CHECK without the frontend = %v, want it named", err)
	}
	n.plane.ports[key] = kept
	if err := n.del(args); err != nil {
		t.Errorf("DEL = %v, want nil", err)
	}
	if diff := cmp.Diff(before, n.state()); diff != "" {
		t.Errorf("state after DEL (-want +got):\n%s", diff)
	}
}

func TestM3_HostPortDelWithoutRecord(t *testing.T) {
	n, pod := newNode(t), netnstest.New(t)
	before := n.state()
	args := cmdArgs("c1", pod.Path(), n.conf(familyRanges["dual stack"], webPorts))
	args = n.withPrev(args, n.mustAdd(args))
	if err := n.records().Delete("c1", "eth0"); err != nil {
		t.Fatal(err)
	}
	if err := n.del(args); err != nil {
		t.Errorf("DEL = %v, want nil", err)
	}
	n.eventually(before)
}

func TestM3_HostPortFaultLeavesNothing(t *testing.T) {
	for _, step := range append([]string{"FreeHostPortID", "PutHostPort"}, ownSteps...) {
		t.Run(step, func(t *testing.T) {
			n, pod := newNode(t), netnstest.New(t)
			before := n.state()
			if strings.HasSuffix(step, "ID") || step == "PutHostPort" {
				n.plane.faults[step] = errInjected
			}
			n.after = func(s string) error {
				if s == step {
					return errInjected
				}
				return nil
			}
			_, err := n.add(cmdArgs("c1", pod.Path(), n.conf(familyRanges["dual stack"], webPorts)))
			if err == nil || !strings.Contains(err.Error(), errInjected.Error()) {
				t.Fatalf("ADD = %v, want the injected fault", err)
			}
			n.plane.faults = map[string]error{}
			if diff := cmp.Diff(before, n.state()); diff != "" {
				t.Errorf("state after the failed ADD (-want +got):\n%s", diff)
			}
		})
	}
}

func TestM3_HostPortKilledAddIsRepaired(t *testing.T) {
	for _, step := range []string{"register endpoint", "register host ports", "configure host", "put"} {
		t.Run(step, func(t *testing.T) {
			n, pod := newNode(t), netnstest.New(t)
			before := n.state()
			args := cmdArgs("c1", pod.Path(), n.conf(familyRanges["dual stack"], webPorts))
			if step == "put" { // half of the entries
				n.killPut(args)
			} else {
				n.kill(step, args)
			}
			n.mustAdd(args)
			if len(n.plane.ports) != 7 || len(n.plane.targets) != 7 {
				t.Errorf("frontends = %v, lists = %v: want 7 of each", n.plane.ports, n.plane.targets)
			}
			if err := n.del(args); err != nil {
				t.Errorf("DEL = %v, want nil", err)
			}
			if diff := cmp.Diff(before, n.state()); diff != "" {
				t.Errorf("state after DEL (-want +got):\n%s", diff)
			}
		})
	}
}

// killPut lets ADD end in the middle of its second hostPort, without rollback.
func (n *node) killPut(args *Args) {
	n.t.Helper()
	defer func() {
		n.plane.onPort = nil
		if r := recover(); r != errInjected {
			n.t.Fatalf("ADD ended with %v before its second hostPort", r)
		}
	}()
	halves := 0
	n.plane.onPort = func(half bool) {
		if half {
			halves++
		}
		if halves == 2 {
			panic(errInjected)
		}
	}
	_, _ = n.add(args)
}

func TestM3_HostPortCollisionNamesTheHolder(t *testing.T) {
	service := bpf.NewFrontendKey(6, netip.IPv4Unspecified(), 30080)
	for name, c := range map[string]struct {
		ports func(map[string]any)
		want  string
	}{
		"another pod's":                 {withPorts(mapping("", 8080, 1, "tcp")), "TCP *:8080 (IPv4) is taken by pod shop/web-0"},
		"another pod's one address":     {withPorts(mapping("192.0.2.1", 8081, 1, "tcp")), "TCP 192.0.2.1:8081 is taken by pod shop/web-0"},
		"one of all that another has":   {withPorts(mapping("192.0.2.1", 8080, 1, "tcp")), "TCP *:8080 (IPv4) is taken by pod shop/web-0"},
		"a NodePort":                    {withPorts(mapping("", 30080, 1, "tcp")), "TCP *:30080 (IPv4) is taken by service default/web:http"},
		"one address of a NodePort":     {withPorts(mapping("127.0.0.1", 30080, 1, "tcp")), "taken by service default/web:http"},
		"address that is not the nodes": {withPorts(mapping("192.0.2.7", 1, 1, "tcp")), "this node does not have the address"},
		"free by protocol":              {withPorts(mapping("", 30080, 1, "udp"), mapping("192.0.2.1", 8081, 1, "udp")), ""},
		"free by family":                {withPorts(mapping("2001:db8:1::1", 8081, 1, "tcp")), ""},
		"free by address":               {withPorts(mapping("127.0.0.2", 8081, 1, "tcp")), ""},
		"all addresses beside one":      {withPorts(mapping("", 8081, 1, "tcp")), ""},
	} {
		t.Run(name, func(t *testing.T) {
			n, podA, podB := newNode(t), netnstest.New(t), netnstest.New(t)
			n.mustAdd(cmdArgs("a", podA.Path(), n.conf(familyRanges["dual stack"], webPorts)))
			n.plane.ports[service] = bpf.Service{Id: 7}
			if err := os.WriteFile(filepath.Join(n.run, endpoint.ServicesFile), []byte(`{"7":"default/web:http"}`), 0o600); err != nil {
				t.Fatal(err)
			}
			before := n.state()
			_, err := n.add(cmdArgs("b", podB.Path(), n.conf(familyRanges["dual stack"], c.ports)))
			if c.want == "" {
				if err != nil {
					t.Errorf("ADD = %v, want success", err)
				}
				return
			}
			if code(err) != codeHostPort || !strings.Contains(err.Error(), c.want) {
				t.Errorf("ADD = %v with code %d, want %q with code %d", err, code(err), c.want, codeHostPort)
			}
			if diff := cmp.Diff(before, n.state()); diff != "" {
				t.Errorf("state after the refused ADD (-want +got):\n%s", diff)
			}
		})
	}
}

// What a pod has left whose DEL never came is taken over: the record's device is gone, or there is no record at all.
func TestM3_HostPortOfAPodThatIsGone(t *testing.T) {
	for name, spoil := range map[string]func(n *node, r *endpoint.Record) error{
		"device gone": func(n *node, r *endpoint.Record) (err error) {
			n.ns.Do(func() {
				l, lookErr := netlink.LinkByName(r.HostIfName)
				err = errors.Join(lookErr, netlink.LinkDel(l))
			})
			return err
		},
		"record gone": func(n *node, r *endpoint.Record) error { return n.records().Delete(r.ContainerID, r.IfName) },
	} {
		t.Run(name, func(t *testing.T) {
			n, podA, podB := newNode(t), netnstest.New(t), netnstest.New(t)
			n.mustAdd(cmdArgs("a", podA.Path(), n.conf(familyRanges["dual stack"], webPorts)))
			a, err := n.records().Load("a", "eth0")
			if err != nil {
				t.Fatal(err)
			}
			if err := spoil(n, a); err != nil {
				t.Fatal(err)
			}
			n.mustAdd(cmdArgs("b", podB.Path(), n.conf(familyRanges["dual stack"], webPorts)))
			b, err := n.records().Load("b", "eth0")
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range b.HostPorts {
				if s := n.plane.ports[frontend(p)]; n.plane.targets[s.Id] != p.Pod {
					t.Errorf("hostPort %s leads to %s, want %s", p, n.plane.targets[s.Id], p.Pod)
				}
			}
		})
	}
}

func TestM3_HostPortOfTwoAtOnce(t *testing.T) {
	n, pod := newNode(t), netnstest.New(t)
	// Another ADD takes the id that this one has chosen.
	n.plane.onPort = func(bool) {
		n.plane.onPort = nil
		n.plane.targets[bpf.HostPortFirst] = netip.MustParseAddrPort("10.42.0.200:1")
	}
	n.mustAdd(cmdArgs("c1", pod.Path(), n.conf([]string{range4}, withPorts(mapping("", 1, 1, "tcp")))))
	r, err := n.records().Load("c1", "eth0")
	if err != nil || r.HostPorts[0].ID != bpf.HostPortFirst+1 || n.plane.targets[bpf.HostPortFirst+1] != r.HostPorts[0].Pod {
		t.Errorf("record = %+v, %v, lists = %v: want the next id", r, err, n.plane.targets)
	}
}

func TestM3_HostPortConfigurationIsRefused(t *testing.T) {
	n, pod := newNode(t), netnstest.New(t)
	args := cmdArgs("c1", pod.Path(), n.conf([]string{range4}, withPorts(mapping("nowhere", 1, 1, "tcp"))))
	if _, err := n.add(args); code(err) != types.ErrInvalidNetworkConfig {
		t.Errorf("ADD = %v, want code %d", err, types.ErrInvalidNetworkConfig)
	}
	if err := n.del(args); err != nil {
		t.Errorf("DEL = %v, want nil", err)
	}
}
