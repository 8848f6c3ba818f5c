// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// sysctlReserved are the ports that the kernel gives to nobody who does not ask for them by number. It belongs to the network namespace.
const sysctlReserved = "/proc/sys/net/ipv4/ip_local_reserved_ports"

// PortRange are the ports from First to Last.
type PortRange struct {
	First, Last uint16
}

// ParsePortRange reads FIRST-LAST, or one port.
func ParsePortRange(s string) (PortRange, error) {
	r, err := parseRange(s)
	if err == nil && r.First == 0 {
		err = fmt.Errorf("port range %q begins with 0", s)
	}
	return r, err
}

// parseRange takes port 0 too, which the kernel lets be reserved.
func parseRange(s string) (PortRange, error) {
	first, last, span := strings.Cut(s, "-")
	if !span {
		last = first
	}
	a, errA := strconv.ParseUint(first, 10, 16)
	b, errB := strconv.ParseUint(last, 10, 16)
	if errA != nil || errB != nil || a > b {
		return PortRange{}, fmt.Errorf("port range %q: want FIRST-LAST with ports from 1 to 65535", s)
	}
	return PortRange{uint16(a), uint16(b)}, nil
}

func (r PortRange) String() string {
	if r.First == r.Last {
		return strconv.Itoa(int(r.First))
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// ReservePorts keeps the ports of NodePorts out of the range that sockets without a port of their own get theirs from: an own connection of
// the node must not take one and then get what is meant for the service. What else is reserved stays; the value from before Margay is
// remembered for uninstall.
func ReservePorts(ctx context.Context, cfg Config, r PortRange) error {
	return withReserved(ctx, cfg, func(old string, ranges []PortRange) error {
		if err := disownPorts(cfg, r); err != nil {
			return err
		}
		want := joinRanges(append(ranges, r))
		if slices.Equal(want, joinRanges(ranges)) {
			return nil
		}
		return changeSysctl(cfg, sysctlReserved, old, formatRanges(want))
	})
}

// withReserved calls change, under the datapath's lock, with the kernel's list as it is written there and as ranges; not where the kernel has
// no such setting.
func withReserved(ctx context.Context, cfg Config, change func(old string, ranges []PortRange) error) error {
	unlock, err := lock(ctx, filepath.Join(cfg.Run, "datapath.lock"))
	if err != nil {
		return fmt.Errorf("lock the datapath: %w", err)
	}
	defer unlock()
	old, err := readReserved()
	if err != nil {
		return ignoreMissing(err)
	}
	ranges, err := parseRanges(old)
	if err != nil {
		return err
	}
	return change(old, ranges)
}

// ReservedPorts returns the ports that the kernel gives to no socket that asks for any, sorted; none where it has no such setting.
func ReservedPorts() ([]PortRange, error) {
	s, err := readReserved()
	if err != nil {
		return nil, ignoreMissing(err)
	}
	return parseRanges(s)
}

// readReserved reads the value in one call: the kernel gives no more than the first call has room for.
func readReserved() (string, error) {
	f, err := os.Open(sysctlReserved)
	if err != nil {
		return "", err
	}
	defer f.Close()
	// Every second port alone takes 6 bytes: nothing is longer.
	b := make([]byte, 1<<18)
	n, err := f.Read(b)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("read %s: %w", sysctlReserved, err)
	}
	return strings.TrimSpace(string(b[:n])), nil
}

func parseRanges(s string) ([]PortRange, error) {
	var out []PortRange
	for _, field := range strings.FieldsFunc(s, func(c rune) bool { return c == ',' }) {
		r, err := parseRange(field)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", sysctlReserved, err)
		}
		out = append(out, r)
	}
	return out, nil
}

// joinRanges sorts ranges and joins those that overlap or touch, as the kernel shows them.
func joinRanges(ranges []PortRange) []PortRange {
	ranges = slices.Clone(ranges)
	slices.SortFunc(ranges, func(a, b PortRange) int { return int(a.First) - int(b.First) })
	var out []PortRange
	for _, r := range ranges {
		if n := len(out); n > 0 && int(r.First) <= int(out[n-1].Last)+1 {
			out[n-1].Last = max(out[n-1].Last, r.Last)
			continue
		}
		out = append(out, r)
	}
	return out
}

func formatRanges(ranges []PortRange) string {
	var out []string
	for _, r := range ranges {
		out = append(out, r.String())
	}
	return strings.Join(out, ",")
}
