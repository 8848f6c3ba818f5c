// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// reservedFile names, in the run directory, the ports that ReserveHostPorts has reserved and that were free before: it may free them again.
const reservedFile = "hostports.json"

// portSet has one bit for each port.
type portSet [1 << 10]uint64

func newPortSet(ranges []PortRange) *portSet {
	s := &portSet{}
	for _, r := range ranges {
		for p := uint32(r.First); p <= uint32(r.Last); p++ {
			s[p/64] |= 1 << (p % 64)
		}
	}
	return s
}

// combine returns f of each word of two sets.
func (s *portSet) combine(o *portSet, f func(a, b uint64) uint64) *portSet {
	out := &portSet{}
	for i := range s {
		out[i] = f(s[i], o[i])
	}
	return out
}

func (s *portSet) union(o *portSet) *portSet {
	return s.combine(o, func(a, b uint64) uint64 { return a | b })
}
func (s *portSet) intersect(o *portSet) *portSet {
	return s.combine(o, func(a, b uint64) uint64 { return a & b })
}
func (s *portSet) minus(o *portSet) *portSet {
	return s.combine(o, func(a, b uint64) uint64 { return a &^ b })
}

// ranges are the set's ports in order.
func (s *portSet) ranges() (out []PortRange) {
	for p := range uint32(1 << 16) {
		if s[p/64]&(1<<(p%64)) == 0 {
			continue
		}
		if n := len(out); n > 0 && uint32(out[n-1].Last)+1 == p {
			out[n-1].Last = uint16(p)
		} else {
			out = append(out, PortRange{uint16(p), uint16(p)})
		}
	}
	return out
}

// ReserveHostPorts keeps the hostPorts of this node's pods out of the range that sockets without a port of their own get theirs from, and
// gives back those that are no hostPorts any more. What somebody else has reserved stays, also when it is a hostPort; so does what
// ReservePorts has. The value from before Margay is remembered for uninstall. Neither a kill nor a restart loses count.
func ReserveHostPorts(ctx context.Context, cfg Config, ports []PortRange) error {
	path := filepath.Join(cfg.Run, reservedFile)
	if _, err := os.Stat(path); len(ports) == 0 && errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return withReserved(ctx, cfg, func(old string, ranges []PortRange) error {
		return reserveHostPorts(cfg, path, old, newPortSet(ranges), newPortSet(ports))
	})
}

// reserveHostPorts changes the kernel's list from have, written as old, so that it has the wanted hostPorts; path names those that are ours.
func reserveHostPorts(cfg Config, path, old string, have, wanted *portSet) error {
	own, err := readOwnPorts(path)
	if err != nil {
		return err
	}
	add := wanted.minus(have)
	kept := own.intersect(wanted).union(add)
	// Before they are reserved, and until after they are free: a kill in between is made good by the next call.
	if err := writeOwnPorts(path, own.union(add)); err != nil {
		return err
	}
	if next := have.minus(own.minus(wanted)).union(add); *next != *have {
		if err := changeSysctl(cfg, sysctlReserved, old, formatRanges(next.ranges())+"\n"); err != nil {
			return err
		}
	}
	return writeOwnPorts(path, kept)
}

func readOwnPorts(path string) (*portSet, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return &portSet{}, nil
	}
	var ranges []PortRange
	if err == nil {
		err = json.Unmarshal(data, &ranges)
	}
	if err != nil {
		return nil, fmt.Errorf("read which hostPorts are reserved: %w", err)
	}
	return newPortSet(ranges), nil
}

// writeOwnPorts replaces the file, if it says something else; where there is nothing to say there is none.
func writeOwnPorts(path string, own *portSet) error {
	ranges := own.ranges()
	if len(ranges) == 0 {
		return ignoreMissing(os.Remove(path))
	}
	data, err := json.Marshal(ranges)
	if err != nil {
		return err
	}
	if have, err := os.ReadFile(path); err == nil && slices.Equal(have, data) {
		return nil
	}
	if err := os.WriteFile(path+".tmp", data, 0o600); err != nil {
		return fmt.Errorf("write which hostPorts are reserved: %w", err)
	}
	return os.Rename(path+".tmp", path)
}

// disownPorts says that somebody else wants these ports reserved: they are not given back with the hostPorts. The caller holds the
// datapath lock.
func disownPorts(cfg Config, r PortRange) error {
	path := filepath.Join(cfg.Run, reservedFile)
	own, err := readOwnPorts(path)
	if err != nil {
		return err
	}
	return writeOwnPorts(path, own.minus(newPortSet([]PortRange{r})))
}
