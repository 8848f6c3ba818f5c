// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// errNoState says that nothing was leased since the boot.
var errNoState = errors.New("no lease state")

// store is the open and locked state of one network.
type store struct {
	layout
	dir  string
	sys  system
	lock *os.File
	file *os.File
	dev  device

	reads, writes int // of all transactions
}

// openStore locks the network's state, finishes what a killed caller left and, given a plan, makes a state or fits it to the plan.
// Without a plan it returns errNoState, and makes nothing, when there is no state of this boot.
func openStore(ctx context.Context, c *Config, p *plan) (_ *store, err error) {
	s := &store{dir: c.dir(), sys: c.sys}
	if p == nil {
		// The file appears by rename and then stays, so a call that only needs existing leases can look before it locks.
		if _, err := os.Stat(s.path()); errors.Is(err, fs.ErrNotExist) {
			return nil, errNoState
		}
	}
	if s.lock, err = lock(ctx, s.dir, c.PollLock); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	s.file, err = os.OpenFile(s.path(), os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		if p == nil {
			return nil, errNoState
		}
		return s, s.replace(p, nil)
	}
	if err != nil {
		return nil, fmt.Errorf("open lease state: %w", err)
	}
	s.dev = s.sys.device(s.file)
	err = s.start(p)
	if errors.Is(err, errDamaged) {
		err = s.repair(p)
	}
	return s, err
}

func (s *store) path() string {
	return filepath.Join(s.dir, "state")
}

// close gives up file and lock; the lock last, so that nobody sees the file before it is closed.
func (s *store) close() error {
	var errs []error
	if s.file != nil {
		errs = append(errs, s.file.Close())
	}
	return errors.Join(append(errs, s.lock.Close())...)
}

// start reads the header and brings the state into a shape in which calls can work on it.
func (s *store) start(p *plan) error {
	var head cell
	if _, err := s.dev.ReadAt(head[:], headerCell); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read lease state: %w", err)
	}
	l, ok := decodeLayout(&head)
	if !ok {
		return fmt.Errorf("%w: no header of version %d", errDamaged, layoutVersion)
	}
	var none [16]byte
	if now := s.sys.bootID(); now != l.bootID && now != none && l.bootID != none {
		return s.void(p)
	}
	fi, err := s.file.Stat()
	if err != nil {
		return fmt.Errorf("read lease state: %w", err)
	}
	if fi.Size() != l.size() {
		return fmt.Errorf("%w: %d bytes long instead of %d", errDamaged, fi.Size(), l.size())
	}
	if err := recoverJournal(s.dev, l); err != nil {
		return err
	}
	s.layout = l
	if p != nil && p.fingerprint() != l.fingerprint {
		return s.refit(p)
	}
	return nil
}

// void drops a state of an earlier boot: the pods that held its leases are gone.
func (s *store) void(p *plan) error {
	if p != nil {
		return s.replace(p, nil)
	}
	s.sys.before("remove state")
	if err := os.Remove(s.path()); err != nil {
		return fmt.Errorf("remove lease state of an earlier boot: %w", err)
	}
	return errNoState
}

// repair makes a new state from the intact records of a damaged one, which stays beside it for whoever looks into the damage.
func (s *store) repair(p *plan) error {
	s.sys.before("keep damaged state")
	kept := s.path() + ".damaged"
	if err := os.Remove(kept); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Link(s.path(), kept); err != nil {
		return fmt.Errorf("keep damaged lease state: %w", err)
	}
	return s.refit(p)
}

// refit makes a new state from the present one's records, with room to grow.
func (s *store) refit(p *plan) error {
	data, err := io.ReadAll(io.NewSectionReader(s.dev, 0, 1<<40))
	if err != nil {
		return fmt.Errorf("read lease state: %w", err)
	}
	return s.replace(p, salvage(data))
}

// grow makes sure that one more lease fits.
func (s *store) grow(p *plan) error {
	t := newTx(s.dev, s.layout)
	leases, addrs := t.pool(leasePool), t.pool(addrPool)
	if t.err != nil {
		return t.err
	}
	if leases.used < s.leaseCap && addrs.used+maxAddrs <= s.addrCap {
		return nil
	}
	return s.refit(p)
}

// replace writes a new state file with these records and puts it in place of the present one.
func (s *store) replace(p *plan, r *records) (err error) {
	img, l, err := r.build(p, s.sys.bootID())
	if err != nil {
		return err
	}
	s.sys.before("create new state")
	name := s.path() + ".new"
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("write lease state: %w", err)
	}
	dev := s.sys.device(f)
	if _, err = dev.WriteAt(img, 0); err == nil {
		s.sys.before("rename new state")
		err = os.Rename(name, s.path())
	}
	if err != nil {
		return fmt.Errorf("write lease state: %w", errors.Join(err, f.Close(), os.Remove(name)))
	}
	if s.file != nil {
		err = s.file.Close()
	}
	s.file, s.dev, s.layout = f, dev, l
	return err
}

// run carries out one transaction. If the state turns out to be damaged, it is repaired and the transaction tried once more.
func (s *store) run(p *plan, f func(*tx) error) error {
	err := s.try(f)
	if errors.Is(err, errDamaged) {
		if err = s.repair(p); err == nil {
			err = s.try(f)
		}
	}
	return err
}

func (s *store) try(f func(*tx) error) error {
	t := newTx(s.dev, s.layout)
	defer func() {
		s.reads += t.reads
		s.writes += t.writes
	}()
	err := f(t)
	if t.err != nil {
		return t.err // what f concluded from cells that it could not read is of no interest
	}
	if err != nil {
		return err
	}
	return t.commit()
}
