// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// serveAll serves until the process is ended, or whoever started it.
func serveAll(servers []order, stdin io.Reader, stdout io.Writer) error {
	failed := make(chan error)
	go func() {
		_, err := io.Copy(io.Discard, stdin)
		failed <- err
	}()
	for _, s := range servers {
		fd, err := listen(s)
		if err != nil {
			return err
		}
		go func() {
			if err := settle(); err != nil {
				failed <- err
			}
			failed <- serveOne(s.Mode, fd)
		}()
	}
	fmt.Fprintln(stdout, "ready")
	return <-failed
}

func serveOne(mode string, fd int) error {
	switch mode {
	case modeServe:
		return serve(fd, echo)
	case modeSink:
		return serve(fd, func(fd int) error { go sink(fd); return nil })
	default:
		return answerWindows(fd)
	}
}

func listen(s order) (fd int, err error) {
	sa, family := sockaddr(s.To)
	socket := map[string]int{modeServe: unix.SOCK_STREAM, modeSink: unix.SOCK_STREAM, modeCount: unix.SOCK_DGRAM}[s.Mode]
	if socket == 0 {
		return -1, fmt.Errorf("no mode %q", s.Mode)
	}
	if fd, err = unix.Socket(family, socket|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, fmt.Errorf("open socket: %w", err)
	}
	if err := unix.Bind(fd, sa); err != nil {
		return -1, fmt.Errorf("bind to %s: %w", s.To, err)
	}
	if socket == unix.SOCK_DGRAM {
		return fd, nil
	}
	if err := unix.Listen(fd, 128); err != nil {
		return -1, fmt.Errorf("listen on %s: %w", s.To, err)
	}
	return fd, nil
}

func serve(listener int, handle func(fd int) error) error {
	for {
		fd, _, err := unix.Accept(listener)
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
			return fmt.Errorf("set TCP_NODELAY: %w", err)
		}
		if err := handle(fd); err != nil {
			return err
		}
	}
}

// echo sends back what comes until the client has gone.
func echo(fd int) error {
	buf := make([]byte, 64)
	for {
		n, err := readRaw(fd, buf)
		if err == nil && n > 0 {
			_, err = writeRaw(fd, buf[:n])
		}
		if err != nil || n == 0 {
			return unix.Close(fd)
		}
	}
}

var sinkBuffers = sync.Pool{New: func() any { return new([256 << 10]byte) }}

// sink reads what comes until the client has gone.
func sink(fd int) {
	err := settle()
	defer runtime.UnlockOSThread() // the next connection's thread
	buf := sinkBuffers.Get().(*[256 << 10]byte)
	defer sinkBuffers.Put(buf)
	for n := 1; err == nil && n > 0; {
		n, err = readRaw(fd, buf[:])
	}
	_ = unix.Close(fd) // after an error the client sees a reset, or less than it sent
}

// answerWindows answers datagrams that say that they are the last of their window.
func answerWindows(fd int) error {
	buf := make([]byte, 2*datagramSize)
	var from unix.RawSockaddrAny
	for {
		size := uint32(unsafe.Sizeof(from))
		n, _, errno := unix.RawSyscall6(syscall.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), 0,
			uintptr(unsafe.Pointer(&from)), uintptr(unsafe.Pointer(&size)))
		if errno == unix.EINTR || errno == unix.ECONNREFUSED { // the client of an earlier answer has gone
			continue
		}
		if errno != 0 {
			return fmt.Errorf("receive datagram: %w", errno)
		}
		if n == 0 || buf[0] != lastOfWindow {
			continue
		}
		_, _, errno = unix.RawSyscall6(syscall.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), 1, 0,
			uintptr(unsafe.Pointer(&from)), uintptr(size))
		if errno != 0 && errno != unix.ECONNREFUSED {
			return fmt.Errorf("answer datagram: %w", errno)
		}
	}
}

// serverAddress is where a mode of client finds its server in a namespace.
func serverAddress(mode string, at netip.Addr) netip.AddrPort {
	switch mode {
	case modeThroughput, modeStreams:
		return netip.AddrPortFrom(at, sinkPort)
	case modeDatagrams:
		return netip.AddrPortFrom(at, countPort)
	default:
		return netip.AddrPortFrom(at, echoPort)
	}
}
