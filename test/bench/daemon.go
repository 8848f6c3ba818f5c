// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/netns"
)

// daemon is an agent or a proxy that runs on a node.
type daemon struct {
	on     *clusterNode
	cmd    *exec.Cmd
	log    string        // file
	exited chan struct{} // closed when it has been waited for
	err    error         // how it ended; valid once exited is closed
}

// startDaemon runs a program on a node until stop, or until this process ends, however that may be.
func startDaemon(on *clusterNode, log string, argv []string) (*daemon, error) {
	out, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	d := &daemon{on: on, cmd: exec.Command(argv[0], argv[1:]...), log: log, exited: make(chan struct{})}
	d.cmd.Stdout, d.cmd.Stderr = out, out
	// The kernel sends the signal when the thread ends that started the program: so that thread waits for it.
	// A process group of its own, so that its children end with it, and an interrupt from the keyboard leaves that to whoever interrupts.
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL, Setpgid: true}
	started := make(chan error, 1)
	go func() {
		err := netns.Do(on.path, func() error {
			err := d.cmd.Start()
			_ = out.Close() // the program has it, or there is nothing in it
			started <- err
			if err != nil {
				return nil
			}
			return d.cmd.Wait()
		})
		d.err = err
		close(d.exited)
		started <- err // of a namespace that could not be entered
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", filepath.Base(argv[0]), err)
	}
	return d, nil
}

// stop ends the daemon and its children; one that has ended before is no error.
func (d *daemon) stop() {
	_ = unix.Kill(-d.cmd.Process.Pid, unix.SIGKILL)
	<-d.exited
}

// freeze has the daemon do nothing any more; what it has told the kernel stays.
func (d *daemon) freeze() error { return d.cmd.Process.Signal(unix.SIGSTOP) }

// failed describes a daemon that has ended by itself; nil while it runs.
func (d *daemon) failed() error {
	select {
	case <-d.exited:
	default:
		return nil
	}
	return fmt.Errorf("%s has ended (%w): %s", filepath.Base(d.cmd.Path), d.err, d.lastWords())
}

// lastWords are the last lines of its log.
func (d *daemon) lastWords() string {
	text, err := os.ReadFile(d.log)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return strings.Join(lines[max(0, len(lines)-10):], "\n")
}

// ticks are the hundredths of a second that the process and its children that were waited for have had of all CPUs.
func (d *daemon) ticks() (sum int, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", d.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(text), ") ") // the name before may have spaces
	fields := strings.Fields(rest)
	if len(fields) < 15 {
		return 0, fmt.Errorf("process statistics %q", text)
	}
	for _, f := range fields[11:15] { // utime, stime, cutime, cstime
		n, err := strconv.Atoi(f)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

// waitIdle waits until the daemon has not worked for so long: less than one part in ten.
func (d *daemon) waitIdle(ctx context.Context, quiet time.Duration) error {
	last, err := d.ticks()
	for err == nil {
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s does not come to rest: %w: %s", filepath.Base(d.cmd.Path), ctx.Err(), d.lastWords())
		case <-time.After(quiet):
		}
		if failure := d.failed(); failure != nil {
			return failure
		}
		before := last
		if last, err = d.ticks(); last-before < int(quiet.Milliseconds()/100) {
			return nil
		}
	}
	return err
}

// memory is the daemon's resident memory in MiB.
func (d *daemon) memory() (float64, error) {
	text := field(fmt.Sprintf("/proc/%d/status", d.cmd.Process.Pid), "VmRSS", ":")
	kib, err := strconv.ParseFloat(strings.TrimSuffix(text, " kB"), 64)
	return kib / 1024, err
}
