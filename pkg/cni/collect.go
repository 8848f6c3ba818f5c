// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"time"

	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/ipam"
	"github.com/margay-cni/margay/pkg/link"
	"github.com/margay-cni/margay/pkg/netns"
	"github.com/margay-cni/margay/pkg/pins"
)

// DefaultGrace is how long something must look dead before a Collector removes it.
const DefaultGrace = 10 * time.Second

// programsAge is how long programs of another build are kept that no device uses: during an upgrade that build's plugin may still run, and
// would have to load them again.
const programsAge = 10 * time.Minute

// A Collector does not wait long for a lock of leases: whoever has it for longer hangs, and the rest of the node must not wait for that.
const (
	readTimeout   = 2 * time.Second
	removeTimeout = 5 * time.Second
)

// The kinds of what a Collector removes.
const (
	kindRecord   = "record"
	kindLease    = "lease"
	kindDevice   = "device"
	kindJournal  = "journal"
	kindPrograms = "programs"
)

// Collector removes what pods have left of which no DEL came, or came to its end: docs/design/0014-gc.md. It does what DEL does, for each
// attachment under its lock, and only for what has looked dead for some time. It needs neither the runtime nor the cluster. Not for
// concurrent use.
type Collector struct {
	plugin     *Plugin
	run, bpffs string
	grace      time.Duration
	log        *slog.Logger
	now        func() time.Time
	// programs removes the programs that are of no use any more; nil: nobody does.
	programs func(ctx context.Context) ([]string, error)

	// suspects says since when something looks dead.
	suspects map[string]time.Time
	// seen are leases whose namespace was there in an earlier look: that it is not any more is no matter of how the caller sees files.
	seen map[string]bool
	// said is what was logged about a suspect that could not be removed.
	said map[string]string
}

// Loader is pkg/datapath, which the plugin does not link.
type Loader struct {
	// Load makes the datapath where it is not there.
	Load func(context.Context, pins.Config) error
	// RemoveUnusedPrograms removes other builds' programs that no device has, if they are older than age.
	RemoveUnusedPrograms func(ctx context.Context, cfg pins.Config, age time.Duration) (builds []string, err error)
}

// NewCollector returns a Collector for the node with these directories.
func NewCollector(cfg pins.Config, loader Loader, log *slog.Logger) *Collector {
	plugin := New(io.Discard)
	plugin.ensure = ensureWith(loader.Load)
	return &Collector{
		plugin: plugin, run: cfg.Run, bpffs: cfg.BPFFS, grace: DefaultGrace, log: log, now: time.Now,
		programs: func(ctx context.Context) ([]string, error) {
			return loader.RemoveUnusedPrograms(ctx, cfg, programsAge)
		},
		suspects: map[string]time.Time{}, said: map[string]string{},
	}
}

// residue is something that looks dead.
type residue struct {
	// key tells it from everything else, also from what takes its place.
	key string
	// remove looks again, under the lock of the attachment, and removes it; it does nothing while a command has that lock.
	remove func(ctx context.Context) error
}

// look is one reading of the node.
type look struct {
	*Collector
	link     *link.Conn
	home     netns.ID // of the node's namespace
	devices  []link.Device
	records  []*endpoint.Record
	journals []foundJournal
	leases   []foundLease
	// leasesKnown says that all of them could be read: only then a device without lease has none.
	leasesKnown bool
	removed     map[string]int
	// seenNow will be the Collector's seen.
	seenNow map[string]bool
}

// foundLease is a lease with where it is.
type foundLease struct {
	ipam.Lease
	run, network string
}

// Collect looks once at everything, and removes what has looked dead for long enough. removed counts by kind; suspects is how many things
// look dead and are still there. The calling thread is in the node's network namespace.
func (c *Collector) Collect(ctx context.Context) (removed map[string]int, suspects int, err error) {
	l := &look{Collector: c, removed: map[string]int{}, seenNow: map[string]bool{}}
	if l.link, err = link.Dial(-1); err != nil {
		return nil, len(c.suspects), err
	}
	defer l.link.Close()
	unreadable, err := l.read(ctx)
	if err != nil {
		return nil, len(c.suspects), err
	}
	faults := []error{unreadable}
	since := map[string]time.Time{}
	now := c.now()
	for _, r := range l.residues() {
		first, known := c.suspects[r.key]
		if !known {
			first = now
		}
		since[r.key] = first
		if now.Sub(first) < c.grace || !known {
			continue
		}
		err := removeInTime(ctx, r)
		if err == nil {
			delete(since, r.key) // removed, or alive after all
			continue
		}
		faults = append(faults, err)
		if c.said[r.key] != err.Error() {
			c.said[r.key] = err.Error()
			c.log.Error("what a pod has left cannot be removed; trying again", "what", r.key, "err", err)
		}
	}
	c.suspects, c.seen = since, l.seenNow
	maps.DeleteFunc(c.said, func(key, _ string) bool { _, ok := since[key]; return !ok })
	faults = append(faults, l.removePrograms(ctx))
	return l.removed, len(since), errors.Join(faults...)
}

func removeInTime(ctx context.Context, r residue) error {
	ctx, cancel := context.WithTimeout(ctx, removeTimeout)
	defer cancel()
	return r.remove(ctx)
}

// read reads the node. What could not be read of single files is no reason to leave the rest: that is unreadable.
func (l *look) read(ctx context.Context) (unreadable, err error) {
	if l.home, err = netns.Identify("/proc/thread-self/ns/net"); err != nil {
		return nil, err
	}
	// Devices before records and leases: an ADD makes its device after its lease and before its record.
	if l.devices, err = l.link.Devices(); err != nil {
		return nil, err
	}
	var faults []error
	if l.journals, err = readJournals(l.run); err != nil {
		return nil, err
	}
	l.records, err = endpoint.NewStore(l.run).List()
	faults = append(faults, err, l.elsewhere())
	l.leases, err = l.readLeases(ctx)
	if l.leasesKnown = err == nil; !l.leasesKnown {
		maps.Copy(l.seenNow, l.seen)
	}
	return errors.Join(append(faults, err)...), nil
}

// elsewhere is an error when there are records of another network namespace than ours: nothing can be said about their pods.
func (l *look) elsewhere() error {
	for _, r := range l.records {
		if id := netns.ParseID(r.HostNetnsID); id != l.home && id != (netns.ID{}) {
			return fmt.Errorf("container %s, interface %s was added in network namespace %s, and this is %s: run the agent in the node's (hostNetwork)",
				r.ContainerID, r.IfName, id, l.home)
		}
	}
	return nil
}

// readLeases reads margay-ipam's leases wherever it has any.
func (l *look) readLeases(ctx context.Context) (out []foundLease, err error) {
	runs := map[string]bool{l.run: true}
	for _, r := range l.records {
		if r.IPAMRun != "" {
			runs[r.IPAMRun] = true
		}
	}
	for _, j := range l.journals {
		if j.journal != nil && j.journal.IPAMRun != "" {
			runs[j.journal.IPAMRun] = true
		}
	}
	var faults []error
	for run := range runs {
		networks, err := ipam.Networks(run)
		faults = append(faults, err)
		for _, network := range networks {
			leases, err := readNetwork(ctx, run, network)
			faults = append(faults, err)
			for _, lease := range leases {
				out = append(out, foundLease{lease, run, network})
			}
		}
	}
	return out, errors.Join(faults...)
}

func readNetwork(ctx context.Context, run, network string) ([]ipam.Lease, error) {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	return ipam.Leases(ctx, ipam.Existing(run, network))
}

// residues are what looks dead.
func (l *look) residues() (out []residue) {
	for _, j := range l.journals {
		out = append(out, l.journalResidue(j))
	}
	for _, r := range l.records {
		if isDead(l.devices, l.home, r) && !l.hasJournal(r.ContainerID, r.IfName) {
			out = append(out, l.recordResidue(r))
		}
	}
	if l.leasesKnown {
		out = append(out, l.deviceResidues()...)
	}
	return append(out, l.leaseResidues()...)
}

func (l *look) hasJournal(containerID, ifName string) bool {
	for _, j := range l.journals {
		if j.journal != nil && j.journal.ContainerID == containerID && j.journal.IfName == ifName {
			return true
		}
	}
	return false
}

func (l *look) hasRecord(containerID, ifName string) bool {
	for _, r := range l.records {
		if r.ContainerID == containerID && r.IfName == ifName {
			return true
		}
	}
	return false
}

// attachment returns what DEL would be given.
func (l *look) attachment(j journal) (*attachment, error) {
	conf := map[string]any{"cniVersion": versions[len(versions)-1], "name": j.Network, "type": "margay", "runDir": l.run, "bpffs": l.bpffs}
	if !j.Adopted {
		section := map[string]any{"type": ipam.PluginType}
		if j.IPAMRun != "" {
			section["runDir"] = j.IPAMRun
		}
		conf["ipam"] = section
	}
	stdin, err := json.Marshal(conf)
	if err != nil {
		return nil, err
	}
	decoded, err := decodeNetConf(stdin)
	if err != nil {
		return nil, err
	}
	return &attachment{
		conf: decoded, log: l.log.With(slog.String("containerID", j.ContainerID), slog.String("ifName", j.IfName)),
		args:     &Args{ContainerID: j.ContainerID, IfName: j.IfName, Netns: j.Netns, StdinData: stdin},
		closeLog: func() error { return nil }, pollLocks: true,
	}, nil
}

// remove does what DEL does, under the lock, and counts what there was.
func (l *look) remove(ctx context.Context, j journal, lock *attachmentLock, why string) error {
	at, err := l.attachment(j)
	if err != nil {
		return err
	}
	var kinds []string
	record, err := at.records().Load(j.ContainerID, j.IfName)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		kinds = append(kinds, kindRecord)
	}
	if d, err := l.link.Device(link.HostName(j.ContainerID, j.IfName)); err == nil && !j.Adopted {
		kinds = append(kinds, kindDevice)
		at.log = at.log.With(slog.String("device", d.Name))
	}
	for _, lease := range l.leases {
		if !j.Adopted && lease.ContainerID == j.ContainerID && lease.IfName == j.IfName && lease.network == j.Network {
			kinds = append(kinds, kindLease)
			at.log = at.log.With(slog.Any("addresses", lease.Addresses))
		}
	}
	if err := l.plugin.removeLocked(ctx, at, lock); err != nil {
		return fmt.Errorf("container %s, interface %s: %w", j.ContainerID, j.IfName, err)
	}
	for _, kind := range kinds {
		l.removed[kind]++
	}
	at.log.Warn(why+"; what is left of it is removed", slog.String("network", j.Network), slog.Any("removed", kinds))
	if record != nil && record.IPAM != "" && record.IPAM != ipam.PluginType {
		at.log.Warn("the pod's addresses stay with its IPAM plugin", slog.String("ipam", record.IPAM), slog.Any("addresses", record.Addresses))
	}
	return nil
}

// removePrograms removes programs that are of no use any more.
func (l *look) removePrograms(ctx context.Context) error {
	if l.programs == nil {
		return nil
	}
	builds, err := l.programs(ctx)
	if len(builds) > 0 {
		l.removed[kindPrograms] += len(builds)
		l.log.Info("programs of other builds are removed, no device uses them", "builds", builds)
	}
	return err
}
