// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/test/cluster/machine"
)

// Machine is one fake machine of a cluster: the control plane, a node, or the external client.
type Machine struct {
	Name string
	c    *Cluster
	dir  string
}

// Dir returns the machine's directory: its description, its logs and its disk.
func (m *Machine) Dir() string { return m.dir }

// Log returns the file that a service writes its output to; "init" is the machine's first process.
func (m *Machine) Log(service string) string {
	return filepath.Join(m.dir, machine.LogDir, service+".log")
}

// Disk returns where the machine's path is in the real machine; path is absolute and below /var, /opt, /root or /tmp.
func (m *Machine) Disk(path string) string { return filepath.Join(m.dir, machine.DiskDir, path) }

// Running reports whether the machine is on.
func (m *Machine) Running() bool {
	p, err := recorded(m.dir)
	return err == nil && p.alive()
}

// PID returns the machine's first process. It is an error if the machine is off.
func (m *Machine) PID() (int, error) {
	p, err := recorded(m.dir)
	if err != nil {
		return 0, err
	}
	if !p.alive() {
		return 0, fmt.Errorf("machine %s of cluster %s is off", m.Name, m.c.Name)
	}
	return p.PID, nil
}

// powerOn makes the machine's namespaces and cgroups and starts its first process, but no service. plug is called in between: it connects
// the machine's network namespace.
func (m *Machine) powerOn(plug func(pid int) error) error {
	if m.Running() {
		return fmt.Errorf("machine %s is on already", m.Name)
	}
	if err := os.MkdirAll(filepath.Join(m.dir, machine.LogDir), 0o755); err != nil {
		return err
	}
	log, err := os.OpenFile(m.Log("init"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	// The first process waits for a word on this pipe: should we die before it is recorded, it ends by itself.
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer w.Close()
	cmd := exec.Command(m.c.bin("machine-init"), m.dir)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = r, log, log
	cmd.Env = []string{"PATH=/opt/cni/bin:" + m.c.binDir() + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"}
	cmd.SysProcAttr = &unix.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWPID,
		Setsid:     true,
	}
	err = cmd.Start()
	_ = r.Close()
	if err != nil {
		return fmt.Errorf("start machine %s: %w", m.Name, err)
	}
	go func() { _ = cmd.Wait() }() // whoever needs its end asks the process table
	p, err := identify(cmd.Process.Pid)
	if err != nil {
		return err
	}
	err = errors.Join(record(m.dir, p), makeCgroups(m.c.cgroups, m.c.ID, m.Name, p.PID))
	if err == nil {
		err = plug(p.PID)
	}
	if err == nil {
		_, err = io.WriteString(w, machine.Go)
	}
	if err == nil {
		err = m.waitInit(p)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("start machine %s: %w", m.Name, err), p.kill())
	}
	return nil
}

// waitInit waits until the first process answers.
func (m *Machine) waitInit(p process) error {
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		_, err := machine.Ask(m.dir, machine.Request{Verb: "status"})
		if err == nil {
			return nil
		}
		if !p.alive() || time.Now().After(deadline) {
			return fmt.Errorf("%w; %s", err, tail(m.Log("init")))
		}
	}
}

// PowerOff ends the machine at once, as when its power fails: every process is killed, /run and the BPF file system are lost, the disk
// stays. A machine that is off already is no error.
func (m *Machine) PowerOff() error {
	p, err := recorded(m.dir)
	if err != nil {
		return err
	}
	if err := p.kill(); err != nil {
		return err
	}
	return removeCgroups(m.c.cgroups, m.c.ID, m.Name)
}

// Start starts a service that does not run.
func (m *Machine) Start(service string) error { return m.ask("start", service, 0) }

// Stop ends a service with SIGTERM, and with SIGKILL if it has not ended after ten seconds.
func (m *Machine) Stop(service string) error { return m.ask("stop", service, 10*time.Second) }

// Kill ends a service with SIGKILL.
func (m *Machine) Kill(service string) error { return m.ask("kill", service, 10*time.Second) }

func (m *Machine) ask(verb, service string, grace time.Duration) error {
	_, err := machine.Ask(m.dir, machine.Request{Verb: verb, Service: service, Grace: grace})
	return err
}

// Services returns the services that run, with their process ids inside the machine.
func (m *Machine) Services() (map[string]int, error) {
	reply, err := machine.Ask(m.dir, machine.Request{Verb: "status"})
	return reply.Running, err
}

// SetService changes how a service is started from its next start on, or adds one.
func (m *Machine) SetService(name string, s machine.Service) error {
	spec, err := machine.ReadSpec(m.dir)
	if err != nil {
		return err
	}
	spec.Services[name] = s
	return machine.WriteSpec(m.dir, spec)
}

// Command returns a command that runs inside the machine, in all its namespaces.
func (m *Machine) Command(ctx context.Context, argv ...string) (*exec.Cmd, error) {
	pid, err := m.PID()
	if err != nil {
		return nil, err
	}
	args := append([]string{"--target", strconv.Itoa(pid), "--mount", "--uts", "--net", "--pid", "--cgroup", "--"}, argv...)
	cmd := exec.CommandContext(ctx, "nsenter", args...)
	cmd.Env = append(os.Environ(), "PATH=/opt/cni/bin:"+m.c.binDir()+":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	return cmd, nil
}

// NetCommand returns a command that runs with the machine's network, and with the files of the real machine.
func (m *Machine) NetCommand(ctx context.Context, argv ...string) (*exec.Cmd, error) {
	pid, err := m.PID()
	if err != nil {
		return nil, err
	}
	return exec.CommandContext(ctx, "nsenter", append([]string{fmt.Sprintf("--net=/proc/%d/ns/net", pid), "--"}, argv...)...), nil
}

// Output runs a command inside the machine and returns what it prints; the error has what it prints to standard error.
func (m *Machine) Output(ctx context.Context, argv ...string) (string, error) {
	cmd, err := m.Command(ctx, argv...)
	if err != nil {
		return "", err
	}
	return output(cmd, argv)
}

func output(cmd *exec.Cmd, argv []string) (string, error) {
	cmd.WaitDelay = 5 * time.Second
	out, err := cmd.Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		err = fmt.Errorf("%q: %w: %s", argv, err, exit.Stderr)
	}
	return string(out), err
}

// tail returns the end of a log for an error message.
func tail(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	const most = 1500
	if len(b) > most {
		b = b[len(b)-most:]
	}
	return path + " ends with: " + string(b)
}
