// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// process names a process for good: its number may be given to another one later, its start time not.
type process struct {
	PID   int
	Start uint64 // clock ticks since the machine started
}

// identify names the living process pid.
func identify(pid int) (process, error) {
	start, _, err := stat(pid)
	return process{PID: pid, Start: start}, err
}

// stat returns when a process started and its state, one letter. See proc_pid_stat(5): fields 22 and 3, counted from behind the command,
// which may contain anything.
func stat(pid int) (start uint64, state byte, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, err
	}
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(fields) < 20 {
		return 0, 0, fmt.Errorf("/proc/%d/stat has %d fields behind the command", pid, len(fields))
	}
	start, err = strconv.ParseUint(string(fields[19]), 10, 64)
	return start, fields[0][0], err
}

// alive reports whether the process still runs. One that waits to be reaped does not: everything in its PID namespace is gone.
func (p process) alive() bool {
	if p.PID == 0 {
		return false
	}
	start, state, err := stat(p.PID)
	return err == nil && start == p.Start && state != 'Z' && state != 'X'
}

// kill kills the process, and no other that has its number by now, and waits for its end.
func (p process) kill() error {
	if p.PID == 0 {
		return nil
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", p.PID, err)
	}
	defer unix.Close(fd)
	if !p.alive() {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", p.PID, err)
	}
	for deadline := time.Now().Add(30 * time.Second); p.alive(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("process %d does not end although it was killed", p.PID)
		}
	}
	return nil
}

const processFile = "process.json"

// record writes the machine's first process into its directory.
func record(dir string, p process) error {
	return writeJSON(filepath.Join(dir, processFile), p)
}

// recorded returns the first process of the machine with this directory, no process if there was none yet.
func recorded(dir string) (process, error) {
	var p process
	err := readJSON(filepath.Join(dir, processFile), &p)
	if errors.Is(err, fs.ErrNotExist) {
		return process{}, nil
	}
	return p, err
}

func writeJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("decode %s: %w", path, err)
	}
	return nil
}
