// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/test/cluster/machine"
)

// supervisor starts and ends services. It reaps by itself: os/exec would compete with it for exit statuses.
type supervisor struct {
	dir string

	mu      sync.Mutex
	running map[string]*service
}

type service struct {
	pid   int
	ended chan struct{} // closed when the process was reaped
}

func (s *supervisor) serve(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			fmt.Fprintln(os.Stderr, "init: accept:", err)
			return
		}
		go s.answer(conn)
	}
}

func (s *supervisor) answer(conn net.Conn) {
	defer conn.Close()
	var req machine.Request
	if err := json.NewDecoder(conn).Decode(&req); err != nil {
		fmt.Fprintln(os.Stderr, "init: read a request:", err)
		return
	}
	reply := machine.Reply{}
	if err := s.do(req); err != nil {
		reply.Error = err.Error()
	}
	reply.Running = s.status()
	fmt.Fprintf(os.Stderr, "init: %s %s: %v\n", req.Verb, req.Service, reply)
	if err := json.NewEncoder(conn).Encode(reply); err != nil {
		fmt.Fprintln(os.Stderr, "init: answer:", err)
	}
}

func (s *supervisor) do(req machine.Request) error {
	switch req.Verb {
	case "start":
		return s.start(req.Service)
	case "stop":
		return s.end(req.Service, unix.SIGTERM, req.Grace)
	case "kill":
		return s.end(req.Service, unix.SIGKILL, req.Grace)
	case "status":
		return nil
	}
	return fmt.Errorf("no verb %q", req.Verb)
}

func (s *supervisor) status() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	pids := map[string]int{}
	for name, svc := range s.running {
		pids[name] = svc.pid
	}
	return pids
}

// start starts a service that does not run. The lock is held until the process is known, so that its end is not reaped before.
func (s *supervisor) start(name string) error {
	spec, err := machine.ReadSpec(s.dir)
	if err != nil {
		return err
	}
	want, ok := spec.Services[name]
	if !ok {
		return fmt.Errorf("no service %q", name)
	}
	path, err := lookPath(want.Argv[0])
	if err != nil {
		return err
	}
	log, err := logFile(s.dir, name)
	if err != nil {
		return err
	}
	defer log.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	if svc, ok := s.running[name]; ok {
		return fmt.Errorf("%s runs already, as process %d", name, svc.pid)
	}
	pid, err := syscall.ForkExec(path, want.Argv, &syscall.ProcAttr{
		Dir:   "/",
		Env:   append(os.Environ(), want.Env...),
		Files: []uintptr{0, log.Fd(), log.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return fmt.Errorf("start %s: %w", path, err)
	}
	s.running[name] = &service{pid: pid, ended: make(chan struct{})}
	return nil
}

// end sends a signal to a service and waits for its end; what has not ended after grace is killed. A service that does not run is no
// error: it may just have ended.
func (s *supervisor) end(name string, sig unix.Signal, grace time.Duration) error {
	s.mu.Lock()
	svc, ok := s.running[name]
	if !ok {
		s.mu.Unlock()
		return nil
	}
	err := unix.Kill(svc.pid, sig) // under the lock: nothing is reaped meanwhile, so the number is still this process'
	s.mu.Unlock()
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	select {
	case <-svc.ended:
		return nil
	case <-time.After(grace):
	}
	s.mu.Lock()
	if s.running[name] == svc {
		_ = unix.Kill(svc.pid, unix.SIGKILL)
	}
	s.mu.Unlock()
	select {
	case <-svc.ended:
		return nil
	case <-time.After(20 * time.Second):
		return fmt.Errorf("%s (process %d) does not end", name, svc.pid)
	}
}

// reap waits for children, the services and every orphan of the machine, until the machine is switched off. It looks who ended without
// reaping (WNOWAIT) and reaps under the lock, so that start and end never see the number of a process that is gone.
func (s *supervisor) reap() error {
	for {
		var info unix.Siginfo
		err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOWAIT, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ECHILD):
			time.Sleep(50 * time.Millisecond) // no child at all: nothing to wait on
			continue
		case err != nil:
			return fmt.Errorf("wait for children: %w", err)
		}
		s.mu.Lock()
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		if err == nil && pid > 0 {
			for name, svc := range s.running {
				if svc.pid == pid {
					fmt.Fprintf(os.Stderr, "init: %s ended: exit status %d, signal %v\n", name, status.ExitStatus(), status.Signal())
					delete(s.running, name)
					close(svc.ended)
				}
			}
		}
		s.mu.Unlock()
	}
}
