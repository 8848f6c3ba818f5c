// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// limit is a setting of the real machine that clusters need raised.
type limit struct {
	setting string // file of /proc/sys
	enough  int
	saved   string // file with the value from before, while it is raised
	users   string // pattern of files that exist while there is any cluster
}

// inotifyLimit is the one setting of the real machine that a cluster changes: the number of inotify instances of a user. Every containerd,
// kubelet and many a pod needs some, all of them as root, and Linux' default of 128 is used up by five nodes: then containerd starts
// without its interface for kubelet. It is raised while there is any cluster on the machine, whoever made it, and put back by the last one.
var inotifyLimit = limit{
	setting: "/proc/sys/fs/inotify/max_user_instances", enough: 4096,
	saved: "/run/margay-test-cluster.json", users: "/sys/fs/cgroup/*/" + cgroupName("*"),
}

// raise raises the limit if it is lower. Call it when the cluster's cgroups are there: they keep others from putting it back.
func (l limit) raise() error {
	return l.withSaved(func(f *os.File, before int) error {
		now, err := l.read()
		if err != nil || now >= l.enough {
			return err
		}
		if before == 0 {
			if err := json.NewEncoder(f).Encode(now); err != nil {
				return err
			}
		}
		return l.write(l.enough)
	})
}

// restore puts the limit back if no cluster is left. A value that somebody else has set meanwhile stays.
func (l limit) restore() error {
	if _, err := os.Stat(l.saved); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return l.withSaved(func(_ *os.File, before int) error {
		left, err := filepath.Glob(l.users)
		if err != nil || len(left) > 0 {
			return err
		}
		now, err := l.read()
		if err != nil {
			return err
		}
		if before != 0 && now == l.enough {
			if err := l.write(before); err != nil {
				return err
			}
		}
		return os.Remove(l.saved)
	})
}

// withSaved calls f with the locked file, and with the value in it, 0 for none.
func (l limit) withSaved(do func(f *os.File, before int) error) error {
	for {
		f, err := os.OpenFile(l.saved, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return err
		}
		err = l.locked(f, do)
		_ = f.Close()
		if !errors.Is(err, errRemoved) {
			return err
		}
	}
}

// errRemoved: the file that was locked is not the one with that name any more.
var errRemoved = errors.New("removed while waiting for the lock")

func (l limit) locked(f *os.File, do func(f *os.File, before int) error) error {
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return err
	}
	ours, err := f.Stat()
	if err != nil {
		return err
	}
	if named, err := os.Stat(l.saved); err != nil || !os.SameFile(ours, named) {
		return errRemoved
	}
	var before int
	if err := json.NewDecoder(f).Decode(&before); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("decode %s: %w", l.saved, err)
	}
	return do(f, before)
}

func (l limit) read() (int, error) {
	b, err := os.ReadFile(l.setting)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

func (l limit) write(n int) error {
	return os.WriteFile(l.setting, []byte(strconv.Itoa(n)), 0o644)
}
