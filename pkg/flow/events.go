// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/bpf/object"
)

// LockFile is the file under the run directory that whoever reads the events holds locked.
const LockFile = "events.lock"

// ErrEventsBusy says that another process reads the events: the ring buffer gives each event to one reader only.
var ErrEventsBusy = errors.New("another process is reading the events")

// tick is how much older than now the programs' coarse clock may be: one tick of the slowest kernel (100 Hz), twice.
const tick = 20 * time.Millisecond

// Event is one sampled drop or verdict. The JSON names are a promise to scripts.
type Event struct {
	Time time.Time `json:"time"`
	// Type is "drop" or "verdict".
	Type string `json:"type"`
	// Reason is the name of the drop reason, "none" for an allowed verdict.
	Reason string `json:"reason"`
	// Direction is the pod's policy direction, Hook the program that saw the packet.
	Direction string `json:"direction"`
	Hook      string `json:"hook"`
	// Ifindex is the hook's device; Device its name where it still exists.
	Ifindex  uint32 `json:"ifindex"`
	Device   string `json:"device,omitempty"`
	Protocol string `json:"protocol"`
	// Source and Destination are the tuple at the hook; for policy drops after service translation.
	Source         netip.AddrPort `json:"source"`
	SourcePod      string         `json:"sourcePod,omitempty"`
	Destination    netip.AddrPort `json:"destination"`
	DestinationPod string         `json:"destinationPod,omitempty"`
	// RuleID is the rule that decided, 0 where none did; Rule is its text where the agent wrote it.
	RuleID uint32 `json:"ruleID,omitempty"`
	Rule   string `json:"rule,omitempty"`
	// Length in bytes, from the Ethernet header.
	Length uint32 `json:"length"`
}

// NewEvent decodes an event as the programs wrote it.
func NewEvent(e bpf.Event, clock Clock) Event {
	return Event{
		Time:        clock.Time(e.Time),
		Type:        object.EventTypeName(e.Type),
		Reason:      object.DropReasonName(e.Reason),
		Direction:   object.DirectionName(e.Direction),
		Hook:        object.HookName(e.Hook),
		Ifindex:     e.Ifindex,
		Protocol:    ProtocolName(e.Tuple.Proto),
		Source:      e.Tuple.Source(),
		Destination: e.Tuple.Destination(),
		RuleID:      e.RuleId,
		Length:      e.Length,
	}
}

// Name fills in the names of pods and rule.
func (e *Event) Name(names *Names) {
	e.SourcePod = names.Pod(e.Source.Addr())
	e.DestinationPod = names.Pod(e.Destination.Addr())
	e.Rule = names.Rule(e.RuleID)
}

// Reader reads the events. There can be only one at a time on a node: the ring buffer has one consumer position.
type Reader struct {
	ring  *ringbuf.Reader
	lock  *os.File
	clock Clock
	since uint64 // older events are skipped, nanoseconds of CLOCK_MONOTONIC
}

// NewReader reads from the events map. The ring buffer keeps events that nobody has read yet; those older than history when the reader
// was made are skipped. It holds the lock under the run directory until Close, and returns ErrEventsBusy if another reader has it.
func NewReader(events *ebpf.Map, run string, history time.Duration) (*Reader, error) {
	clock, err := Now()
	if err != nil {
		return nil, err
	}
	lock, err := lockEvents(run)
	if err != nil {
		return nil, err
	}
	ring, err := ringbuf.NewReader(events)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open events: %w", err), lock.Close())
	}
	since := uint64(max(0, clock.Monotonic-history-tick))
	return &Reader{ring: ring, lock: lock, clock: clock, since: since}, nil
}

// lockEvents takes the lock of the events' only reader. Closing the file gives it back, also when the process dies.
func lockEvents(run string) (*os.File, error) {
	if err := os.MkdirAll(run, 0o755); err != nil {
		return nil, fmt.Errorf("make run directory: %w", err)
	}
	path := filepath.Join(run, LockFile)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open events lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrEventsBusy
		}
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
	}
	return f, nil
}

// Close gives the lock back. It interrupts a Follow that is still running.
func (r *Reader) Close() error {
	return errors.Join(r.ring.Close(), r.lock.Close())
}

// Follow calls visit for each event, in the order in which the programs wrote them, until visit returns false (then nil) or ctx ends
// (then its error). After ctx has ended the Reader is of no more use.
func (r *Reader) Follow(ctx context.Context, visit func(Event) bool) error {
	stop := context.AfterFunc(ctx, func() { r.ring.Close() })
	defer stop()
	var record ringbuf.Record
	for {
		if err := r.ring.ReadInto(&record); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return fmt.Errorf("read events: %w", err)
		}
		e, err := decode(record.RawSample)
		if err != nil {
			return err
		}
		if e.Time >= r.since && !visit(NewEvent(e, r.clock)) {
			return nil
		}
	}
}

// decode reads an event as the programs wrote it, in the byte order of the machine.
func decode(sample []byte) (bpf.Event, error) {
	var e bpf.Event
	if _, err := binary.Decode(sample, binary.NativeEndian, &e); err != nil {
		return e, fmt.Errorf("event of %d bytes, want %d: the pinned programs are of another build", len(sample), binary.Size(e))
	}
	return e, nil
}
