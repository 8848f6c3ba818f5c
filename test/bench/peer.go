// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"runtime/debug"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// peerCommand makes this binary one end of the traffic: a process of its own, pinned to one CPU, with blocking system calls on one thread.
// Go's own network poller would add more to a transaction than what is measured.
const peerCommand = "peer"

// peer modes.
const (
	modeServe      = "serve"  // echo every byte of every connection
	modeSink       = "sink"   // read everything
	modeRequests   = "rr"     // one byte there and back, again and again
	modeConnects   = "crr"    // the same with a new connection each
	modeThroughput = "stream" // write
)

// outcome is what a client prints.
type outcome struct {
	PerSecond float64 `json:"perSecond"` // transactions, or bits
	P50       float64 `json:"p50"`       // microseconds of a transaction
	P99       float64 `json:"p99"`
}

// warmUp is the part of a client's time that does not count.
const warmUp = 5 // percent

func runPeer(args []string, stdout io.Writer) error {
	var mode, address string
	var duration time.Duration
	flags := flag.NewFlagSet(peerCommand, flag.ContinueOnError)
	flags.StringVar(&mode, "mode", "", "what to do")
	flags.StringVar(&address, "address", "", "where to listen or connect")
	flags.DurationVar(&duration, "for", time.Second, "how long a client runs")
	if err := flags.Parse(args); err != nil {
		return err
	}
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	debug.SetGCPercent(-1)
	runtime.LockOSThread()
	if _, err := pinThread(); err != nil {
		return err
	}
	// Ahead of whatever else the machine is doing.
	if err := unix.Setpriority(unix.PRIO_PROCESS, 0, -20); err != nil {
		return fmt.Errorf("raise priority: %w", err)
	}
	if mode == modeServe || mode == modeSink {
		return serve(to, mode == modeServe, stdout)
	}
	result, err := client(mode, to, duration)
	if err != nil {
		return err
	}
	return json.NewEncoder(stdout).Encode(result)
}

func client(mode string, to netip.AddrPort, duration time.Duration) (outcome, error) {
	switch mode {
	case modeRequests:
		fd, err := dial(to)
		if err != nil {
			return outcome{}, err
		}
		return transactions(duration, func(buf []byte) error { return ask(fd, buf) })
	case modeConnects:
		return transactions(duration, func(buf []byte) error {
			fd, err := dial(to)
			if err != nil {
				return err
			}
			if err := ask(fd, buf); err != nil {
				return err
			}
			return unix.Close(fd)
		})
	case modeThroughput:
		fd, err := dial(to)
		if err != nil {
			return outcome{}, err
		}
		return stream(fd, duration)
	}
	return outcome{}, fmt.Errorf("no mode %q", mode)
}

// sockaddr returns the kernel's form of an address, and its family.
func sockaddr(a netip.AddrPort) (unix.Sockaddr, int) {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}, unix.AF_INET
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}, unix.AF_INET6
}

func dial(to netip.AddrPort) (fd int, err error) {
	sa, family := sockaddr(to)
	if fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, fmt.Errorf("open socket: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return -1, fmt.Errorf("set TCP_NODELAY: %w", err)
	}
	if err := unix.Connect(fd, sa); err != nil {
		return -1, fmt.Errorf("connect to %s: %w", to, err)
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
			return 0, errno
		}
	}
}

// ask sends one byte and waits for one.
func ask(fd int, buf []byte) error {
	if _, err := writeRaw(fd, buf[:1]); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	n, err := readRaw(fd, buf)
	if err == nil && n == 0 {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return fmt.Errorf("receive: %w", err)
	}
	return nil
}

func transactions(duration time.Duration, do func([]byte) error) (outcome, error) {
	buf := make([]byte, 64)
	took := make([]float64, 0, 1<<20)
	start := time.Now()
	counted := start.Add(duration * warmUp / 100)
	for now := start; now.Sub(start) < duration; {
		if err := do(buf); err != nil {
			return outcome{}, err
		}
		end := time.Now()
		if now.After(counted) {
			took = append(took, float64(end.Sub(now).Nanoseconds())/1000)
		}
		now = end
	}
	sum := 0.0
	for _, t := range took {
		sum += t
	}
	return outcome{PerSecond: float64(len(took)) / sum * 1e6, P50: percentile(took, 50), P99: percentile(took, 99)}, nil
}

func stream(fd int, duration time.Duration) (outcome, error) {
	buf := make([]byte, 64<<10)
	start := time.Now()
	counted, sent := start.Add(duration*warmUp/100), 0
	var begun time.Time
	for {
		n, err := writeRaw(fd, buf)
		if err != nil {
			return outcome{}, fmt.Errorf("send: %w", err)
		}
		now := time.Now()
		if begun.IsZero() {
			if now.After(counted) {
				begun = now
			}
			continue
		}
		sent += n
		if now.Sub(start) >= duration {
			return outcome{PerSecond: float64(sent) * 8 / now.Sub(begun).Seconds()}, nil
		}
	}
}

// serve takes one connection after the other until the process is ended.
func serve(at netip.AddrPort, echo bool, stdout io.Writer) error {
	sa, family := sockaddr(at)
	listener, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open socket: %w", err)
	}
	if err := unix.Bind(listener, sa); err != nil {
		return fmt.Errorf("bind to %s: %w", at, err)
	}
	if err := unix.Listen(listener, 128); err != nil {
		return fmt.Errorf("listen on %s: %w", at, err)
	}
	fmt.Fprintln(stdout, "ready")
	buf := make([]byte, 256<<10)
	for {
		fd, _, err := unix.Accept(listener)
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
			return fmt.Errorf("set TCP_NODELAY: %w", err)
		}
		for {
			n, err := readRaw(fd, buf)
			if err == nil && n > 0 && echo {
				_, err = writeRaw(fd, buf[:n])
			}
			if err != nil || n == 0 {
				break // the client has gone
			}
		}
		if err := unix.Close(fd); err != nil {
			return err
		}
	}
}
