// SPDX-License-Identifier: Apache-2.0

// Package rtnetlink exchanges single requests with the kernel's network configuration, for the commands that a container runtime waits for.
// It knows the form of messages, and nothing of devices (pkg/link) or filters (pkg/pins).
//
// A netlink library would do this too, and does it elsewhere: pkg/link. In a process that lives for a few milliseconds it is felt:
// its buffers are on the stack, which grows to them, its sockets in Go's poller, and it asks for a socket's address with every request; figures in docs/design/0016-plugin-start.md.
//
// The kernel carries a request out before it returns from the system call that sends it, so a socket here blocks, and its answer is there at once.
// Dumps are not for this package: they can be interrupted.
package rtnetlink

import (
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// bufferSize is what the largest answer needs, that about one device, several times over.
const bufferSize = 32 << 10

// Socket is bound to one network namespace for good. It may be used by one goroutine at a time.
type Socket struct {
	fd     int
	number uint32 // of the last request
	buffer []byte
}

// Open opens a socket in the namespace with the open file descriptor ns; -1 means the calling thread's namespace.
func Open(ns int) (*Socket, error) {
	fd, err := socketIn(ns)
	if err != nil {
		return nil, err
	}
	return &Socket{fd: fd, buffer: make([]byte, bufferSize)}, nil
}

func socketIn(ns int) (fd int, err error) {
	if ns < 0 {
		return newSocket()
	}
	runtime.LockOSThread()
	home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		runtime.UnlockOSThread()
		return -1, fmt.Errorf("open the thread's own network namespace: %w", err)
	}
	defer unix.Close(home)
	if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return -1, fmt.Errorf("enter the network namespace: %w", err)
	}
	fd, err = newSocket()
	if back := unix.Setns(home, unix.CLONE_NEWNET); back != nil {
		// Without the unlock the thread dies with its goroutine, and nobody else meets it in the wrong namespace.
		if err == nil {
			err = unix.Close(fd)
		}
		return -1, errors.Join(err, fmt.Errorf("leave the network namespace: %w", back))
	}
	runtime.UnlockOSThread()
	return fd, err
}

func newSocket() (int, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return -1, fmt.Errorf("open netlink socket: %w", err)
	}
	return fd, nil
}

// Close closes the socket.
func (s *Socket) Close() error {
	return unix.Close(s.fd)
}

// Do has the kernel carry the request out. The error is the kernel's, a unix.Errno.
func (s *Socket) Do(r *Request) error {
	native.PutUint16(r.data[6:], native.Uint16(r.data[6:])|unix.NLM_F_ACK)
	_, err := s.exchange(r)
	return err
}

// Get asks for one object, and returns the answer without its header; it is valid until the next request. The error is the kernel's.
func (s *Socket) Get(r *Request) ([]byte, error) {
	answer, err := s.exchange(r)
	if err == nil && answer == nil {
		return nil, errors.New("the kernel acknowledged a question")
	}
	return answer, err
}

// exchange sends the request and waits for the one message that answers it: an object, or an acknowledgement, for which it returns nil.
func (s *Socket) exchange(r *Request) ([]byte, error) {
	s.number++
	native.PutUint32(r.data[0:], uint32(len(r.data)))
	native.PutUint32(r.data[8:], s.number)
	if err := again(func() error { return sendAll(s.fd, r.data) }); err != nil {
		return nil, err
	}
	for {
		var n int
		err := again(func() (err error) { n, err = unix.Read(s.fd, s.buffer); return err })
		if err != nil {
			return nil, err
		}
		message := s.buffer[:n]
		if n < unix.SizeofNlMsghdr || int(native.Uint32(message)) > n || int(native.Uint32(message)) < unix.SizeofNlMsghdr {
			return nil, fmt.Errorf("netlink message of %d bytes: %w", n, unix.EMSGSIZE)
		}
		if native.Uint32(message[8:]) != s.number {
			continue
		}
		body := message[unix.SizeofNlMsghdr:native.Uint32(message)]
		if native.Uint16(message[4:]) != unix.NLMSG_ERROR {
			return body, nil
		}
		if len(body) < 4 {
			return nil, fmt.Errorf("netlink acknowledgement of %d bytes: %w", n, unix.EMSGSIZE)
		}
		if code := int32(native.Uint32(body)); code != 0 {
			return nil, unix.Errno(-code)
		}
		return nil, nil
	}
}

// sendAll writes to a socket without an address, which is the kernel's.
func sendAll(fd int, data []byte) error {
	n, err := unix.Write(fd, data)
	if err == nil && n != len(data) {
		err = unix.EMSGSIZE
	}
	return err
}

// again repeats what a signal interrupted.
func again(do func() error) error {
	for {
		if err := do(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
