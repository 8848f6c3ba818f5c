// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// peerCommand makes this binary one end of the traffic: a process of its own, pinned to one CPU, with blocking system calls. Go's own
// network poller would add more to a transaction than what is measured.
const peerCommand = "peer"

// What a client does, and a server.
const (
	modeRequests   = "rr"      // one byte there and back, again and again
	modeConnects   = "crr"     // the same with a new connection each
	modeThroughput = "stream"  // write
	modeStreams    = "streams" // the same on several connections
	modeDatagrams  = "udp"     // datagrams, as many as the server takes

	modeServe = "serve" // echo every byte of every connection, one connection after the other
	modeSink  = "sink"  // read everything, of all connections
	modeCount = "count" // answer the last datagram of every window
)

// streams is how many connections modeStreams has.
const streams = 8

// order is what a client is told to do. It reads them from standard input, one after the other, and prints an outcome for each: a process
// of its own for every burst would measure its start as well, and cold caches.
type order struct {
	Mode string         `json:"mode"`
	To   netip.AddrPort `json:"to"`
	For  time.Duration  `json:"for"` // nanoseconds
}

// outcome is what a client prints.
type outcome struct {
	PerSecond float64 `json:"perSecond"` // transactions, bits, or datagrams
	P50       float64 `json:"p50"`       // microseconds of a transaction
	P99       float64 `json:"p99"`
	Count     float64 `json:"count"` // how many in all, warm-up included
	CPU       float64 `json:"cpu"`   // nanoseconds that the client took for them
	Error     string  `json:"error,omitempty"`
}

// warmUp is the part of a client's time that does not count.
const warmUp = 5 // percent

// serving is the value of a flag that may be repeated: MODE=ADDRESS:PORT.
type serving []order

func (s *serving) String() string { return fmt.Sprint(*s) }

func (s *serving) Set(text string) error {
	mode, address, _ := strings.Cut(text, "=")
	to, err := netip.ParseAddrPort(address)
	*s = append(*s, order{Mode: mode, To: to})
	return err
}

func runPeer(args []string, stdin io.Reader, stdout io.Writer) error {
	var servers serving
	flags := flag.NewFlagSet(peerCommand, flag.ContinueOnError)
	flags.Var(&servers, "serve", "`MODE=ADDRESS:PORT` to serve; without it orders for a client are read")
	if err := flags.Parse(args); err != nil {
		return err
	}
	debug.SetGCPercent(-1)
	runtime.GOMAXPROCS(4 * streams) // a thread in a system call that Go does not know of keeps its processor
	if len(servers) > 0 {
		return serveAll(servers, stdin, stdout)
	}
	return takeOrders(stdin, stdout)
}

// takeOrders is a client's life.
func takeOrders(stdin io.Reader, stdout io.Writer) error {
	if err := settle(); err != nil {
		return err
	}
	in, out := json.NewDecoder(stdin), json.NewEncoder(stdout)
	for {
		var o order
		if err := in.Decode(&o); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		before, err := cpuTime(0)
		if err != nil {
			return err
		}
		got, err := client(o)
		if err != nil {
			got = outcome{Error: err.Error()}
		}
		after, err := cpuTime(0)
		if err != nil {
			return err
		}
		got.CPU = after - before
		runtime.GC() // not while somebody measures
		if err := out.Encode(got); err != nil {
			return err
		}
	}
}

// settle keeps the calling thread, with its goroutine, on the machine's last CPU, ahead of whatever else the machine is doing. Every thread
// that carries traffic does it, and no other: the runtime's own ones, of two processes, would interrupt one transaction in a hundred.
func settle() error {
	runtime.LockOSThread()
	if _, err := pinThread(); err != nil {
		return err
	}
	if err := unix.Setpriority(unix.PRIO_PROCESS, 0, -20); err != nil {
		return fmt.Errorf("raise the priority: %w", err)
	}
	return nil
}

// cpuTime returns the nanoseconds of CPU that a process has used, all its threads together, 0 being the caller. Most of what the kernel does
// for packets is done in a sender's system call and is in it.
func cpuTime(process int) (float64, error) {
	clock := int32(unix.CLOCK_PROCESS_CPUTIME_ID)
	if process != 0 {
		clock = int32(^process)<<3 | 2 // as clock_getcpuclockid does
	}
	var t unix.Timespec
	if err := unix.ClockGettime(clock, &t); err != nil {
		return 0, fmt.Errorf("read the CPU time of process %d: %w", process, err)
	}
	return float64(t.Nano()), nil
}

// sockaddr returns the kernel's form of an address, and its family.
func sockaddr(a netip.AddrPort) (unix.Sockaddr, int) {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}, unix.AF_INET
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}, unix.AF_INET6
}

// dial connects a socket of a type.
func dial(to netip.AddrPort, socket int) (fd int, err error) {
	sa, family := sockaddr(to)
	if fd, err = unix.Socket(family, socket|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, fmt.Errorf("open socket: %w", err)
	}
	if socket == unix.SOCK_STREAM {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	}
	if err == nil {
		err = unix.Connect(fd, sa)
	}
	if err != nil {
		return -1, errors.Join(fmt.Errorf("connect to %s: %w", to, err), unix.Close(fd))
	}
	return fd, nil
}

// readRaw and writeRaw are system calls that Go's scheduler does not hear of.
func readRaw(fd int, buf []byte) (int, error)  { return raw(syscall.SYS_READ, fd, buf) }
func writeRaw(fd int, buf []byte) (int, error) { return raw(syscall.SYS_WRITE, fd, buf) }

func raw(call uintptr, fd int, buf []byte) (int, error) {
	for {
		n, _, errno := unix.RawSyscall(call, uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)))
		if errno == 0 {
			return int(n), nil
		}
		if errno != unix.EINTR {
			return 0, os.NewSyscallError("read or write", errno)
		}
	}
}
