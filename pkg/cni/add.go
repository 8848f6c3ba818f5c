// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/link"
	"github.com/margay-cni/margay/pkg/netns"
)

// cleanupTimeout is what undoing a failed ADD may take after the command's own deadline has passed.
const cleanupTimeout = 10 * time.Second

// addition is one ADD: each step leaves here what the later ones need.
type addition struct {
	*attachment
	plugin   *Plugin
	rollback rollback

	lock *attachmentLock
	// inherited says that an earlier command left its journal: what it has left may still be there when this ADD has undone its own.
	inherited bool

	podNS, hostNS     *netns.Handle
	podLink, hostLink *link.Socket
	datapath          dataplane

	ipam   *types100.Result // what the IPAM plugin gave
	routes []link.Route     // of the pod
	mtu    int              // bytes
	podIf  link.Device
	hostIf link.Device
	start  start
	record endpoint.Record
	result types.Result
}

// step is a named part of ADD; tests inject a fault after each.
type step struct {
	name string
	do   func(context.Context) error
}

// Add connects a pod: it makes the interface, or with prevResult adopts the one that is there. It is a transaction: a failed ADD undoes
// what it did. Nothing the pod sends or receives passes before its programs are attached and its endpoint is registered with its policy,
// because the interface gets its addresses, and goes up, only afterwards.
func (p *Plugin) Add(ctx context.Context, args *Args) (err error) {
	at, err := p.load(args)
	if at != nil {
		defer at.done("ADD", time.Now(), &err)
	}
	if err != nil {
		return err
	}
	if err := at.conf.validateAdd(); err != nil {
		return err
	}
	lock, err := lockAttachment(ctx, at.conf.RunDir, args.ContainerID, args.IfName)
	if err != nil {
		return err
	}
	defer at.tidy("unlock", lock.release)

	a := &addition{attachment: at, plugin: p, lock: lock, inherited: lock.journal != nil}
	defer at.tidy("close", a.close)
	defer a.settleJournal(&err)
	defer a.rollback.run(&err)

	steps := []step{
		{"open namespaces", a.openNamespaces},
		{"ensure datapath", a.ensureDatapath},
		{"clear leftovers", a.clearLeftovers},
		{"begin journal", a.beginJournal},
		{"read policy", a.readPolicy},
		{"allocate addresses", a.allocateAddresses},
		{"make interface", a.makeInterface},
		{"attach programs", a.attachPrograms},
		{"register endpoint", a.registerEndpoint},
		{"register host ports", a.registerHostPorts},
		{"configure host", a.configureHost},
		{"configure pod", a.configurePod},
		{"print result", a.printResult},
	}
	if at.conf.PrevResult != nil {
		steps = []step{
			{"open namespaces", a.openNamespaces},
			{"ensure datapath", a.ensureDatapath},
			{"read policy", a.readPolicy},
			{"adopt interface", a.adoptInterface},
			{"begin journal", a.beginJournal},
			{"attach programs", a.attachPrograms},
			{"register endpoint", a.registerEndpoint},
			{"register host ports", a.registerHostPorts},
			{"print result", a.printResult},
		}
	}
	for _, s := range steps {
		started := time.Now()
		if err := s.do(ctx); err != nil {
			return err
		}
		if err := p.after(s.name); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return fail(types.ErrTryAgainLater, err, "out of time after step %q", s.name)
		}
		at.log.Debug("step done", slog.String("step", s.name), slog.Duration("took", time.Since(started)))
	}
	return nil
}

// openNamespaces binds a netlink socket to the pod's namespace and one to ours, and refuses to be both.
func (a *addition) openNamespaces(context.Context) (err error) {
	if a.podNS, err = netns.Open(a.args.Netns); err != nil {
		return fail(types.ErrInvalidNetNS, err, "CNI_NETNS %q is no network namespace", a.args.Netns)
	}
	if a.hostNS, err = netns.Current(); err != nil {
		return fail(types.ErrInvalidNetNS, err, "the plugin's own network namespace")
	}
	same, err := a.podNS.Same(a.hostNS)
	if err != nil {
		return fail(types.ErrInvalidNetNS, err, "compare CNI_NETNS with the plugin's own network namespace")
	}
	if same && !overrides(a.args) {
		return fail(types.ErrInvalidNetNS, nil, "CNI_NETNS %q is the plugin's own network namespace", a.args.Netns)
	}
	if a.podLink, err = link.Open(a.podNS.FD()); err != nil {
		return fail(codeDevice, err, "open a netlink socket in the pod's namespace")
	}
	if a.hostLink, err = link.Open(-1); err != nil {
		return fail(codeDevice, err, "open a netlink socket")
	}
	return nil
}

// overrides says whether the runtime allows the pod's namespace to be the plugin's (CNI_NETNS_OVERRIDE).
func overrides(args *Args) bool {
	return args.NetnsOverride == "1" || strings.EqualFold(args.NetnsOverride, "true")
}

// close releases what the steps opened.
func (a *addition) close() error {
	var faults []error
	for _, c := range []*link.Socket{a.podLink, a.hostLink} {
		if c != nil {
			c.Close()
		}
	}
	for _, h := range []*netns.Handle{a.podNS, a.hostNS} {
		if h != nil {
			faults = append(faults, h.Close())
		}
	}
	if a.datapath != nil {
		faults = append(faults, a.datapath.Close())
	}
	return errors.Join(faults...)
}

func (a *addition) ensureDatapath(ctx context.Context) (err error) {
	if a.datapath, err = a.plugin.ensure(ctx, a.conf.datapath()); err != nil {
		return fail(codeDatapath, err, "the datapath cannot be loaded here (bpffs %s)", a.conf.BPFFS)
	}
	return nil
}

// beginJournal notes that the attachment is ADD's from here on: if nobody removes the note, nobody has got a result. An attachment with a
// record may have been added before, though: nothing is noted that would end it.
func (a *addition) beginJournal(context.Context) error {
	if _, err := a.records().Load(a.args.ContainerID, a.args.IfName); err == nil {
		return nil
	}
	if err := a.lock.write(a.journal("ADD")); err != nil {
		return fail(types.ErrIOFailure, err, "write %s; is %s writable and not full?", a.lock.path, a.conf.RunDir)
	}
	return nil
}

// settleJournal comes after a failed ADD's rollback: what is undone entirely needs no journal, anything else does.
func (a *addition) settleJournal(err *error) {
	if *err == nil {
		return
	}
	if a.rollback.failed && a.lock.journal == nil {
		a.tidy("keep journal", func() error { return a.lock.write(a.journal("ADD")) })
	} else if !a.rollback.failed && !a.inherited && a.lock.journal != nil {
		a.tidy("clear journal", a.lock.clear)
	}
}

// clearLeftovers refuses an interface that exists, as the specification wants, unless it is what an ADD of this very attachment left behind
// when it was killed: that is removed, and ADD starts afresh. The lease is not touched, the IPAM plugin gives the same addresses again.
func (a *addition) clearLeftovers(context.Context) error {
	id, name := a.args.ContainerID, a.args.IfName
	record, err := a.records().Load(id, name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		a.log.Warn("unreadable record is removed", slog.Any("error", err))
	}
	known := record != nil || err != nil && !errors.Is(err, fs.ErrNotExist)
	podIf, err := a.podLink.Device(name)
	exists := err == nil
	if err != nil && !errors.Is(err, link.ErrNotFound) {
		return fail(codeDevice, err, "look for interface %s in the pod's namespace", name)
	}
	if !exists && !known {
		return nil
	}
	hostIf, err := a.hostLink.Device(link.HostName(id, name))
	if err != nil && !errors.Is(err, link.ErrNotFound) {
		return fail(codeDevice, err, "look for what an earlier ADD left")
	}
	ours := err == nil && exists && hostIf.Peer == podIf.Index && podIf.Peer == hostIf.Index
	if exists && !ours {
		return fail(codeInterface, nil, "interface %s exists in %s already, and it is not ours: remove it or choose another name", name, a.args.Netns)
	}
	if exists && record != nil && a.complete(record, podIf, hostIf) {
		return fail(codeInterface, nil, "interface %s exists in %s already: container %s was added before; call DEL first", name, a.args.Netns, id)
	}
	a.log.Warn("an earlier ADD did not finish; its leftovers are removed")
	r := removal{attachment: a.attachment, link: a.hostLink, datapath: a.datapath, record: record}
	if err := r.removeInterface(); err != nil {
		return err
	}
	return r.removeRecord()
}

// complete says whether an earlier ADD came to its end: the pod's own configuration is the last thing that it makes. In doubt it did not.
func (a *addition) complete(r *endpoint.Record, podIf, hostIf link.Device) bool {
	if !podIf.Up || !hostIf.Up || r.HostIfindex != hostIf.Index {
		return false
	}
	pod, err := link.Dial(a.podNS.FD())
	if err != nil {
		return false
	}
	defer pod.Close()
	host, err := link.Dial(-1)
	if err != nil {
		return false
	}
	defer host.Close()
	return host.VerifyHost(link.Host{Index: hostIf.Index, PodMAC: podIf.MAC, Addresses: r.Addresses}) == nil &&
		pod.VerifyPod(link.Pod{Index: podIf.Index, GatewayMAC: hostIf.MAC, Addresses: r.Addresses}) == nil
}

func (a *addition) readPolicy(ctx context.Context) (err error) {
	a.start, err = startPolicy(ctx, a.datapath, a.conf, a.pod)
	return err
}

func (a *addition) allocateAddresses(ctx context.Context) (err error) {
	var repeated bool
	if a.ipam, repeated, err = a.allocate(ctx); err != nil {
		return err
	}
	if !repeated { // else the lease is older than this ADD, and outlives its failure
		a.rollback.add("release addresses", func() error {
			ctx, cancel := cleanupContext(ctx)
			defer cancel()
			return a.release(ctx)
		})
	}
	if a.record.Addresses, a.routes, err = podConfig(a.ipam); err != nil {
		return err
	}
	if a.mtu, err = a.chooseMTU(); err != nil {
		return err
	}
	for _, addr := range a.record.Addresses {
		if addr.Is6() && a.mtu < minMTU6 {
			return fail(types.ErrInvalidNetworkConfig, nil, "mtu: %d is less than %d, which IPv6 needs (the pod's address is %s)", a.mtu, minMTU6, addr)
		}
	}
	return nil
}

// chooseMTU returns the configured MTU, or the one that the agent computed from the way to other nodes, or that of the device that has the
// default route, or Ethernet's. What is not configured, the agent changes when the node's changes.
func (a *addition) chooseMTU() (int, error) {
	if a.conf.MTU != 0 {
		return a.conf.MTU, nil
	}
	a.record.FollowMTU = true
	node, err := endpoint.ReadNode(a.conf.RunDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		a.log.Warn("what the agent knows of the node cannot be used", slog.Any("error", err))
	}
	if node.MTU > 0 {
		return min(node.MTU, maxMTU), nil
	}
	mtu, err := a.hostLink.DefaultMTU()
	if err != nil {
		return 0, fail(codeDevice, err, "find the MTU of the device with the default route; set mtu in the conflist to do without")
	}
	if mtu == 0 {
		return 1500, nil
	}
	return min(mtu, maxMTU), nil
}

// bigTCPSize is the largest packet of a pod with bigTCP, in bytes: between pods of a node twice the throughput of half of it, and well
// below what a veth pair takes (512 KiB) and a packet's 17 fragments of 32 KiB hold.
const bigTCPSize = 256 << 10

// makeInterface makes the pair, both ends down.
func (a *addition) makeInterface(context.Context) error {
	id, name := a.args.ContainerID, a.args.IfName
	podMAC, hostMAC := link.MACs(id, name)
	requested, err := a.conf.requestedMAC(a.pod)
	if err != nil {
		return fail(types.ErrInvalidEnvironmentVariables, err, "CNI_ARGS: MAC")
	}
	if requested != nil {
		podMAC = requested
	}
	spec := link.VethSpec{
		PodName: name, HostName: link.HostName(id, name), PodMAC: podMAC, HostMAC: hostMAC, MTU: a.mtu, HostNS: a.hostNS.FD(),
	}
	if a.conf.BigTCP {
		spec.GSOMaxSize = bigTCPSize
	}
	podIndex, hostIndex, err := a.podLink.AddVeth(spec)
	if errors.Is(err, link.ErrExists) {
		// The name in the pod is free, as clearLeftovers saw: the host's end of a pair in another namespace of this container is left.
		if err = a.deleteHostDevice(spec.HostName); err == nil {
			podIndex, hostIndex, err = a.podLink.AddVeth(spec)
		}
	}
	if err != nil {
		return fail(codeDevice, err, "make interface %s", name)
	}
	a.rollback.add("delete interface", func() error { return a.hostLink.Delete(hostIndex) })
	a.podIf = link.Device{Index: podIndex, Name: name, MAC: podMAC, MTU: a.mtu}
	a.hostIf = link.Device{Index: hostIndex, Name: spec.HostName, MAC: hostMAC, MTU: a.mtu}
	a.result = a.ownResult()
	return nil
}

func (a *addition) deleteHostDevice(name string) error {
	d, err := a.hostLink.Device(name)
	if errors.Is(err, link.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	return a.hostLink.Delete(d.Index)
}

func (a *addition) attachPrograms(context.Context) error {
	if a.conf.PrevResult != nil { // our own device takes its programs along
		a.rollback.add("detach programs", func() error { return a.datapath.DetachPod(a.hostIf.Index) })
	}
	if err := a.datapath.AttachPod(a.hostIf.Index); err != nil {
		return fail(codeAttach, err, "attach the pod's programs to %s", a.hostIf.Name)
	}
	return nil
}

// configurePod comes after configureHost: the end that goes up second has its carrier at once, and the pod must be able to send as soon as
// ADD returns. The host's end needs the kernel's link watcher first.
func (a *addition) configurePod(context.Context) error {
	if err := a.podLink.ConfigurePod(a.podConfiguration()); err != nil {
		return fail(codeDevice, err, "configure interface %s in the pod", a.podIf.Name)
	}
	if err := link.SyncCarrier(a.hostIf.Name); err != nil {
		return fail(codeDevice, err, "bring host device %s into service", a.hostIf.Name)
	}
	return nil
}

func (a *addition) podConfiguration() link.Pod {
	return link.Pod{
		Index: a.podIf.Index, Addresses: a.record.Addresses, Routes: a.routes, GatewayMAC: a.hostIf.MAC,
		EnableIPv6: func() error {
			return a.podNS.Do(func() error { return link.EnableIPv6(a.podIf.Name) })
		},
	}
}

func (a *addition) configureHost(context.Context) error {
	h := link.Host{Index: a.hostIf.Index, PodMAC: a.podIf.MAC, Addresses: a.record.Addresses}
	if err := a.hostLink.ConfigureHost(h); err != nil {
		return fail(codeDevice, err, "configure host device %s", a.hostIf.Name)
	}
	return nil
}

// printResult ends the journal first: the runtime must not know of an attachment that looks abandoned.
func (a *addition) printResult(context.Context) error {
	if err := a.lock.clear(); err != nil {
		return fail(types.ErrIOFailure, err, "clear %s", a.lock.path)
	}
	if err := printTo(a.plugin.stdout, a.result, a.conf.CNIVersion); err != nil {
		return fail(types.ErrIOFailure, err, "print the result")
	}
	return nil
}

func mac6(m net.HardwareAddr) (out [6]uint8) {
	copy(out[:], m)
	return out
}

// cleanupContext returns a context for undoing, which also has time left when the command has not.
func cleanupContext(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
}
