// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/ipam"
	"github.com/margay-cni/margay/pkg/link"
	"github.com/margay-cni/margay/pkg/netns"
)

// foundJournal is a lock file that is there, with its journal, if it has one.
type foundJournal struct {
	path    string
	text    string
	journal *journal
}

// readJournals reads the lock files. Those of commands at work are among them: their locks are held.
func readJournals(run string) (out []foundJournal, err error) {
	dir := filepath.Join(run, lockDir)
	files, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list attachments' locks: %w", err)
	}
	for _, f := range files {
		j := foundJournal{path: filepath.Join(dir, f.Name())}
		data, err := os.ReadFile(j.path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the command has ended
		}
		if err != nil {
			return nil, fmt.Errorf("read an attachment's lock: %w", err)
		}
		j.text, j.journal = string(data), parseJournal(data)
		out = append(out, j)
	}
	return out, nil
}

// journalResidue is what a command left that was killed or gave up. Nobody has got the attachment of such an ADD, and nobody wants that
// of such a DEL, whether or not the namespace is there.
func (l *look) journalResidue(found foundJournal) residue {
	key := fmt.Sprintf("journal %s %s", filepath.Base(found.path), found.text)
	return residue{key, func(ctx context.Context) error {
		lock, err := tryLock(found.path)
		if lock == nil || err != nil {
			return err
		}
		defer l.tidy("unlock", lock.release)
		if found.journal == nil || lock.journal == nil || *lock.journal != *found.journal {
			if found.journal == nil && lock.journal == nil {
				l.removed[kindJournal]++ // a command was killed before it changed anything
			}
			return nil
		}
		err = l.remove(ctx, *found.journal, lock, found.journal.Command+" did not come to its end")
		if err == nil {
			l.removed[kindJournal]++
		}
		return err
	}}
}

// recordResidue is a record whose pod is gone without a DEL that got through.
func (l *look) recordResidue(r *endpoint.Record) residue {
	key := fmt.Sprintf("record %s %s %d %s", r.ContainerID, r.IfName, r.HostIfindex, r.Created)
	return residue{key, func(ctx context.Context) error {
		return l.locked(r.ContainerID, r.IfName, func(lock *attachmentLock) error {
			now, err := endpoint.NewStore(l.run).Load(r.ContainerID, r.IfName)
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			devices, err := l.link.Devices()
			if err != nil || now.HostIfindex != r.HostIfindex || !now.Created.Equal(r.Created) || !isDead(devices, l.home, now) {
				return err
			}
			return l.remove(ctx, journal{
				ContainerID: r.ContainerID, IfName: r.IfName, Netns: r.Netns, Network: r.Network, IPAMRun: r.IPAMRun, Adopted: r.Adopted,
			}, lock, "pod is gone without a DEL")
		})
	}}
}

// deviceResidues are devices that ADD made and nothing tells of. Only those that are down: ADD sets them up when they have a record, so
// nobody's packets go through one that is not. Such a device proves that its lease, if there is one, is no other plugin's.
func (l *look) deviceResidues() (out []residue) {
	known := map[string]bool{}
	for _, r := range l.records {
		known[r.HostIfName] = true
	}
	for _, j := range l.journals {
		if j.journal != nil {
			known[link.HostName(j.journal.ContainerID, j.journal.IfName)] = true
		}
	}
	for _, d := range l.devices {
		if !abandoned(d) || known[d.Name] {
			continue
		}
		out = append(out, residue{fmt.Sprintf("device %s %d", d.Name, d.Index), func(ctx context.Context) error {
			return l.removeDevice(ctx, d)
		}})
	}
	return out
}

func abandoned(d link.Device) bool {
	return link.IsHostName(d.Name) && d.Kind == "veth" && !d.Up
}

func (l *look) removeDevice(ctx context.Context, d link.Device) error {
	still := func() (bool, error) {
		now, err := l.link.DeviceByIndex(d.Index)
		if errors.Is(err, link.ErrNotFound) {
			return false, nil
		}
		return err == nil && now.Name == d.Name && abandoned(now), err
	}
	for _, lease := range l.leases {
		if link.HostName(lease.ContainerID, lease.IfName) != d.Name {
			continue
		}
		return l.locked(lease.ContainerID, lease.IfName, func(lock *attachmentLock) error {
			if same, err := still(); !same || err != nil || lock.journal != nil || l.recordExists(lease.ContainerID, lease.IfName) {
				return err
			}
			j := journal{ContainerID: lease.ContainerID, IfName: lease.IfName, Netns: lease.Netns, Network: lease.network}
			if lease.run != l.run {
				j.IPAMRun = lease.run
			}
			return l.remove(ctx, j, lock, "device has no record")
		})
	}
	// Nothing says whose it is. An ADD that begins now makes a device of its own, with another index.
	if same, err := still(); !same || err != nil {
		return err
	}
	if err := l.link.Delete(d.Index); err != nil {
		return err
	}
	l.removed[kindDevice]++
	l.log.Warn("device that nothing tells of is removed", "device", d.Name)
	return nil
}

// leaseResidues are leases without record, journal and device whose namespace is gone. Another main plugin's leases look like that while
// its pods are alive, but for the namespace.
func (l *look) leaseResidues() (out []residue) {
	names := map[string]bool{}
	for _, d := range l.devices {
		names[d.Name] = true
	}
	for _, lease := range l.leases {
		if l.hasRecord(lease.ContainerID, lease.IfName) || l.hasJournal(lease.ContainerID, lease.IfName) ||
			names[link.HostName(lease.ContainerID, lease.IfName)] {
			continue
		}
		key := fmt.Sprintf("lease %s %s %s %s %s", lease.run, lease.network, lease.ContainerID, lease.IfName, lease.Time)
		state := func() presence {
			dev, ino := lease.NetnsFile()
			return namespaceAt(lease.Netns, netns.ID{Dev: dev, Ino: ino}, l.seen[key])
		}
		switch state() {
		case there:
			l.seenNow[key] = true
			continue
		case unknown:
			continue
		}
		l.seenNow[key] = l.seen[key]
		out = append(out, residue{key, func(ctx context.Context) error {
			return l.locked(lease.ContainerID, lease.IfName, func(lock *attachmentLock) error {
				if lock.journal != nil || l.recordExists(lease.ContainerID, lease.IfName) || state() != gone {
					return nil
				}
				ended, err := ipam.Release(ctx, ipam.Existing(lease.run, lease.network), lease.Lease)
				if !ended {
					return err
				}
				l.removed[kindLease]++
				l.log.Warn("lease of a network namespace that is gone is ended", slog.String("network", lease.network), slog.Any("addresses", lease.Addresses),
					slog.String("containerID", lease.ContainerID), slog.String("ifName", lease.IfName))
				return nil
			})
		}})
	}
	return out
}

// recordExists says whether there is a record now; in doubt there is.
func (l *look) recordExists(containerID, ifName string) bool {
	_, err := endpoint.NewStore(l.run).Load(containerID, ifName)
	return !errors.Is(err, fs.ErrNotExist)
}

// locked calls f with the attachment's lock, or not at all when a command has it.
func (l *look) locked(containerID, ifName string, f func(*attachmentLock) error) error {
	if err := endpoint.CheckName(containerID, ifName); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(l.run, lockDir), 0o755); err != nil {
		return err
	}
	lock, err := tryLock(lockPath(l.run, containerID, ifName))
	if lock == nil || err != nil {
		return err
	}
	defer l.tidy("unlock", lock.release)
	return f(lock)
}

func (l *look) tidy(what string, do func() error) {
	if err := do(); err != nil {
		l.log.Warn(what, slog.Any("error", err))
	}
}
