// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/pkg/link"
)

var adoptSteps = []string{"open namespaces", "ensure datapath", "read policy", "adopt interface", "begin journal", "attach programs", "register endpoint",
	"register host ports",
	"print result"}

// adopted makes what an earlier plugin of the list would have made, and returns the arguments of an ADD that finds it.
func (n *node) adopted(pod *netnstest.NS) *Args {
	n.t.Helper()
	podNS, err := os.Open(pod.Path())
	if err != nil {
		n.t.Fatal(err)
	}
	defer podNS.Close()
	nodeNS, err := os.Open(n.ns.Path())
	if err != nil {
		n.t.Fatal(err)
	}
	defer nodeNS.Close()
	in, err := link.Dial(int(podNS.Fd()))
	if err != nil {
		n.t.Fatal(err)
	}
	defer in.Close()
	podMAC, hostMAC := link.MACs("other", "eth0")
	if _, _, err := in.AddVeth(link.VethSpec{
		PodName: "eth0", HostName: "veth-other", PodMAC: podMAC, HostMAC: hostMAC, MTU: 1500, HostNS: int(nodeNS.Fd()),
	}); err != nil {
		n.t.Fatal(err)
	}
	prev := &types100.Result{CNIVersion: "1.1.0", Interfaces: []*types100.Interface{{Name: "eth0", Sandbox: pod.Path(), Mac: podMAC.String()}}}
	for _, a := range []string{"10.42.0.9/24", "fd42::9/64"} {
		p := netip.MustParsePrefix(a)
		prev.IPs = append(prev.IPs, &types100.IPConfig{Interface: new(int), Address: net.IPNet{
			IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen()),
		}})
	}
	return n.withPrev(cmdArgs("c1", pod.Path(), n.conf(nil, unset("ipam"))), prev)
}

// A failed ADD behind another plugin leaves that plugin's interface as it was, and nothing of ours.
func TestFaultAfterEachStepOfAdoption(t *testing.T) {
	for _, step := range adoptSteps {
		t.Run(step, func(t *testing.T) {
			n, pod := newNode(t), netnstest.New(t)
			args := n.adopted(pod)
			before := n.state()
			reached := false
			n.after = func(s string) error {
				if s == step {
					reached = true
					return errInjected
				}
				return nil
			}
			if _, err := n.add(args); !errors.Is(err, errInjected) || !reached {
				t.Fatalf("ADD = %v, want the injected fault", err)
			}
			if diff := cmp.Diff(before, n.state()); diff != "" {
				t.Errorf("state after the failed ADD (-want +got):\n%s", diff)
			}
			n.after = nil
			n.mustAdd(args) // and it can be tried again
		})
	}
}

// DEL after a killed ADD behind another plugin does the same; the runtime calls it whatever ADD came to.
func TestDelAfterKilledAdoption(t *testing.T) {
	for _, step := range adoptSteps {
		t.Run(step, func(t *testing.T) {
			n, pod := newNode(t), netnstest.New(t)
			args := n.adopted(pod)
			before := n.state()
			n.kill(step, args)
			for range 2 {
				if err := n.del(args); err != nil {
					t.Errorf("DEL = %v, want nil", err)
				}
				if diff := cmp.Diff(before, n.state()); diff != "" {
					t.Errorf("state after DEL (-want +got):\n%s", diff)
				}
			}
		})
	}
}

// The list above is the whole of it.
func TestAdoptStepsIsComplete(t *testing.T) {
	n, pod := newNode(t), netnstest.New(t)
	var got []string
	n.after = func(step string) error {
		got = append(got, step)
		return nil
	}
	n.mustAdd(n.adopted(pod))
	if diff := cmp.Diff(adoptSteps, got); diff != "" {
		t.Errorf("steps of ADD (-want +got):\n%s", diff)
	}
}
