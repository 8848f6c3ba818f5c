// SPDX-License-Identifier: Apache-2.0

// Package machine is what the test cluster's harness and the first process of a fake machine say to each other: the machine's
// description, a file, and the requests that the first process answers on a socket. A fake machine is a network, mount, UTS, PID and
// cgroup namespace of the machine that it runs on, and some directories that are its disk.
package machine

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"
)

// Names of files in a machine's directory.
const (
	SpecFile = "machine.json" // Spec
	LogDir   = "log"          // what the services and the first process wrote, NAME.log
	DiskDir  = "disk"         // what survives a reboot
	socket   = "control.sock"
)

// Go is what the harness writes to the first process' standard input when the machine's cables are plugged in. End of file instead means
// that the harness is gone: then the first process ends, and the machine with it.
const Go = "go\n"

// Spec describes a machine. The first process reads it again for each request, so a service may change between two starts.
type Spec struct {
	// Hostname is the machine's name.
	Hostname string
	// Keep are directories of the real machine that the fake one sees at the same path, writable.
	Keep []string
	// Cgroups are the hierarchies that the machine mounts. Its first process is in the machine's own cgroup in each.
	Cgroups []Hierarchy
	// Sysctls are files of /proc/sys, named from there, that show and take values without any effect on the real machine.
	Sysctls map[string]string
	// Files are written to the machine's disk at its start, by absolute path.
	Files map[string]string
	// Services are what the first process can start.
	Services map[string]Service
}

// Hierarchy is one mount of cgroups.
type Hierarchy struct {
	Path    string // mount point, below /sys/fs/cgroup
	Type    string // cgroup or cgroup2
	Options string // the controllers, for version 1
}

// Service is a program that runs until it is told to end.
type Service struct {
	Argv []string
	Env  []string
}

// Request is one line to the first process; it is answered by one Reply.
type Request struct {
	Verb    string // start, stop (SIGTERM, and SIGKILL after Grace), kill (SIGKILL), status
	Service string
	Grace   time.Duration
}

// Reply answers a Request.
type Reply struct {
	Error   string
	Running map[string]int // by service, the process id inside the machine
}

// ReadSpec reads the description in a machine's directory.
func ReadSpec(dir string) (Spec, error) {
	var s Spec
	b, err := os.ReadFile(filepath.Join(dir, SpecFile))
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return s, fmt.Errorf("decode %s of %s: %w", SpecFile, dir, err)
	}
	return s, nil
}

// WriteSpec replaces the description in a machine's directory, whole or not at all.
func WriteSpec(dir string, s Spec) error {
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	path := filepath.Join(dir, SpecFile)
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// Listen makes the socket in a machine's directory.
func Listen(dir string) (net.Listener, error) {
	var l net.Listener
	err := short(dir, func(path string) (err error) {
		if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
			return err
		}
		l, err = net.Listen("unix", path)
		return err
	})
	return l, err
}

// Ask sends one request to the first process of the machine with this directory and returns its answer.
func Ask(dir string, r Request) (Reply, error) {
	var reply Reply
	err := short(dir, func(path string) error {
		conn, err := net.DialTimeout("unix", path, 5*time.Second)
		if err != nil {
			return err
		}
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(r.Grace + 30*time.Second)); err != nil {
			return err
		}
		if err := json.NewEncoder(conn).Encode(r); err != nil {
			return err
		}
		return json.NewDecoder(conn).Decode(&reply)
	})
	if err != nil {
		return reply, fmt.Errorf("ask the machine in %s to %s %s: %w", dir, r.Verb, r.Service, err)
	}
	if reply.Error != "" {
		return reply, fmt.Errorf("%s %s in the machine of %s: %s", r.Verb, r.Service, dir, reply.Error)
	}
	return reply, nil
}

// short calls f with a path of the socket that fits into the 108 bytes of a socket address, however deep dir is.
func short(dir string, f func(path string) error) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return f(fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), socket))
}
