// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/link"
	"github.com/margay-cni/margay/pkg/netns"
)

// inspection is one CHECK. Everything that is wrong is reported at once.
type inspection struct {
	*attachment
	record   *endpoint.Record
	prev     *types100.Result
	datapath dataplane
	pod      *link.Conn
	host     *link.Conn
	podIf    link.Device
	hostIf   link.Device
	podMAC   net.HardwareAddr
	hostMAC  net.HardwareAddr
}

// Check compares what ADD did with what is there: record, prevResult, both devices, addresses, routes, neighbours, map entries, programs and
// the lease. What plugins behind us added is left alone.
func (p *Plugin) Check(ctx context.Context, args *Args) (err error) {
	at, err := p.load(args)
	if at == nil {
		return err
	}
	defer at.done("CHECK", time.Now(), &err)
	if err != nil {
		return err
	}
	if err := at.conf.validate(); err != nil {
		return err
	}
	lock, err := lockAttachment(ctx, at.conf.RunDir, args.ContainerID, args.IfName)
	if err != nil {
		return err
	}
	defer at.tidy("unlock", lock.release)

	i := &inspection{attachment: at}
	if i.prev, err = at.conf.prevResult(); err != nil {
		return err
	}
	if i.prev == nil {
		return fail(types.ErrInvalidNetworkConfig, nil, "CHECK needs prevResult in the configuration")
	}
	if i.record, err = at.records().Load(args.ContainerID, args.IfName); err != nil {
		return fail(codeCheckMismatch, err, "the endpoint's record cannot be read; delete the pod to have it added anew")
	}
	if i.datapath, err = p.open(at.conf.datapath()); err != nil {
		return fail(codeDatapath, err, "open the datapath (bpffs %s)", at.conf.BPFFS)
	}
	defer at.tidy("close datapath", i.datapath.Close)
	podNS, err := netns.Open(args.Netns)
	if err != nil {
		return fail(types.ErrInvalidNetNS, err, "CNI_NETNS %q is no network namespace", args.Netns)
	}
	defer at.tidy("close namespace", podNS.Close)
	if i.pod, err = link.Dial(podNS.FD()); err != nil {
		return fail(codeDevice, err, "open a netlink socket in the pod's namespace")
	}
	defer i.pod.Close()
	if i.host, err = link.Dial(-1); err != nil {
		return fail(codeDevice, err, "open a netlink socket")
	}
	defer i.host.Close()

	if err := i.compare(); err != nil {
		return fail(codeCheckMismatch, err, "the pod's network is not as ADD left it; delete the pod to have it added anew")
	}
	if i.record.Adopted || at.conf.IPAM.Type == "" {
		return nil
	}
	return at.checkLease(ctx, i.record.Addresses)
}

func (i *inspection) compare() error {
	if err := i.findDevices(); err != nil {
		return err
	}
	faults := []error{i.comparePrevResult(), i.compareEndpoints(), i.compareHostPorts()}
	if err := i.datapath.PodAttached(i.hostIf.Index); err != nil {
		faults = append(faults, fmt.Errorf("programs of %s: %w", i.hostIf.Name, err))
	}
	if !i.record.Adopted {
		faults = append(faults,
			i.pod.VerifyPod(link.Pod{Index: i.podIf.Index, Addresses: i.record.Addresses, Routes: i.expectedRoutes(), GatewayMAC: i.hostMAC}),
			i.host.VerifyHost(link.Host{Index: i.hostIf.Index, PodMAC: i.podMAC, Addresses: i.record.Addresses}))
	}
	return errors.Join(faults...)
}

// findDevices looks both ends up and compares them with the record.
func (i *inspection) findDevices() (err error) {
	r := i.record
	if i.podMAC, err = net.ParseMAC(r.MAC); err != nil {
		return fmt.Errorf("record: %w", err)
	}
	if i.hostMAC, err = net.ParseMAC(r.HostMAC); err != nil {
		return fmt.Errorf("record: %w", err)
	}
	if i.podIf, err = i.pod.Device(r.IfName); err != nil {
		return fmt.Errorf("pod interface: %w", err)
	}
	if i.hostIf, err = i.host.DeviceByIndex(r.HostIfindex); err != nil {
		return fmt.Errorf("host device: %w", err)
	}
	var faults []error
	if i.podIf.Peer != i.hostIf.Index || i.hostIf.Peer != i.podIf.Index {
		faults = append(faults, fmt.Errorf("%s and %s are no pair any more", i.podIf.Name, i.hostIf.Name))
	}
	for _, end := range []struct {
		d    link.Device
		want net.HardwareAddr
	}{{i.podIf, i.podMAC}, {i.hostIf, i.hostMAC}} {
		if !end.d.Up {
			faults = append(faults, fmt.Errorf("%s is down", end.d.Name))
		}
		if end.d.MAC.String() != end.want.String() {
			faults = append(faults, fmt.Errorf("%s has MAC %s, registered is %s (to choose one, give it to margay as mac)",
				end.d.Name, end.d.MAC, end.want))
		}
	}
	return errors.Join(faults...)
}

// comparePrevResult wants the interface and all its addresses in prevResult.
func (i *inspection) comparePrevResult() error {
	if !slices.ContainsFunc(i.prev.Interfaces, func(f *types100.Interface) bool {
		return f.Name == i.record.IfName && f.Sandbox == i.args.Netns
	}) {
		return fmt.Errorf("prevResult has no interface %s in %s", i.record.IfName, i.args.Netns)
	}
	var faults []error
	listed := interfaceAddresses(i.prev, i.record.IfName, i.args.Netns)
	for _, a := range i.record.Addresses {
		if !slices.Contains(listed, a) {
			faults = append(faults, fmt.Errorf("prevResult lacks address %s", a))
		}
	}
	for _, a := range listed {
		if !slices.Contains(i.record.Addresses, a) {
			faults = append(faults, fmt.Errorf("prevResult has address %s, which is not registered", a))
		}
	}
	return errors.Join(faults...)
}

// compareEndpoints wants a map entry for each address. Identity and policy are the agent's to change.
func (i *inspection) compareEndpoints() error {
	var faults []error
	for _, a := range i.record.Addresses {
		e, ok, err := i.datapath.LookupEndpoint(a)
		switch {
		case err != nil:
			faults = append(faults, fmt.Errorf("look up %s in the endpoints map: %w", a, err))
		case !ok:
			faults = append(faults, fmt.Errorf("endpoints map lacks %s", a))
		case int(e.Ifindex) != i.hostIf.Index || e.Mac != mac6(i.podMAC) || e.HostMac != mac6(i.hostMAC):
			faults = append(faults, fmt.Errorf("endpoints map has %s behind device %d with MAC %s, want %d and %s",
				a, e.Ifindex, net.HardwareAddr(e.Mac[:]), i.hostIf.Index, i.podMAC))
		}
	}
	return errors.Join(faults...)
}

// expectedRoutes are prevResult's routes through our gateways: others may have been added by plugins behind us, which check their own.
func (i *inspection) expectedRoutes() []link.Route {
	var out []link.Route
	for _, r := range i.prev.Routes {
		dst, ok := prefixOf(r.Dst)
		gw, gwOK := netip.AddrFromSlice(r.GW)
		if !ok || !gwOK || gw.Unmap() != link.GatewayOf(dst.Addr()) {
			continue
		}
		lr := link.Route{Dst: dst}
		if r.Table != nil {
			lr.Table = *r.Table
		}
		out = append(out, lr)
	}
	return out
}
