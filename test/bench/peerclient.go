// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Datagrams: so many are sent, then their receipt is waited for, so that none is lost and what is counted has arrived.
const (
	window       = 64
	datagramSize = 64 // bytes of payload
	lastOfWindow = 1  // first byte of the datagram that is answered
)

func client(o order) (outcome, error) {
	switch o.Mode {
	case modeConnects:
		return transactions(o.For, 1, func(buf []byte) error {
			fd, err := dial(o.To, unix.SOCK_STREAM)
			if err != nil {
				return err
			}
			return errors.Join(ask(fd, buf), unix.Close(fd))
		})
	case modeRequests:
		return connected(o, unix.SOCK_STREAM, func(fd int) (outcome, error) {
			return transactions(o.For, 1, func(buf []byte) error { return ask(fd, buf) })
		})
	case modeDatagrams:
		return connected(o, unix.SOCK_DGRAM, func(fd int) (outcome, error) {
			return transactions(o.For, window, func(buf []byte) error { return sendWindow(fd, buf) })
		})
	case modeThroughput:
		return transfer(o, 1)
	case modeStreams:
		return transfer(o, streams)
	}
	return outcome{}, fmt.Errorf("no mode %q", o.Mode)
}

// connected has do work on a socket that is closed again.
func connected(o order, socket int, do func(fd int) (outcome, error)) (got outcome, err error) {
	fd, err := dial(o.To, socket)
	if err != nil {
		return got, err
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	return do(fd)
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

func sendWindow(fd int, buf []byte) error {
	for i := range window {
		buf[0] = 0
		if i == window-1 {
			buf[0] = lastOfWindow
		}
		if _, err := writeRaw(fd, buf[:datagramSize]); err != nil {
			return fmt.Errorf("send datagram: %w", err)
		}
	}
	if _, err := readRaw(fd, buf); err != nil {
		return fmt.Errorf("the last datagram was not answered: %w", err)
	}
	return nil
}

// transactions repeats do, which is worth so many of what is counted.
func transactions(duration time.Duration, worth float64, do func([]byte) error) (outcome, error) {
	buf := make([]byte, max(64, datagramSize))
	took := make([]float64, 0, 1<<16)
	start := time.Now()
	counted := start.Add(duration * warmUp / 100)
	count := 0
	for now := start; now.Sub(start) < duration || len(took) == 0; { // however long the machine did something else
		if err := do(buf); err != nil {
			return outcome{}, err
		}
		count++
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
	return outcome{
		PerSecond: worth * float64(len(took)) / sum * 1e6, P50: percentile(took, 50), P99: percentile(took, 99), Count: worth * float64(count),
	}, nil
}

// stream writes for a while, at least once, and then waits until the server has read everything: what stands in buffers is not transferred.
// It returns the bits.
func stream(fd int, end time.Time) (bits float64, err error) {
	buf := make([]byte, 64<<10)
	sent := 0
	for sent == 0 || time.Now().Before(end) {
		n, err := writeRaw(fd, buf)
		if err != nil {
			return 0, fmt.Errorf("send: %w", err)
		}
		sent += n
	}
	if err := unix.Shutdown(fd, unix.SHUT_WR); err != nil {
		return 0, fmt.Errorf("end the stream: %w", err)
	}
	if n, err := readRaw(fd, buf); err != nil || n != 0 {
		return 0, fmt.Errorf("wait for the server's end of the stream: %d bytes, %w", n, err)
	}
	return float64(sent) * 8, nil
}

// transfer adds up streams of the same time, each on a thread of its own.
func transfer(o order, streams int) (got outcome, err error) {
	fds, bits, errs := make([]int, streams), make([]float64, streams), make([]error, streams)
	for i := range fds {
		if fds[i], err = dial(o.To, unix.SOCK_STREAM); err != nil {
			return got, err
		}
		defer func() { err = errors.Join(err, unix.Close(fds[i])) }()
	}
	var wg sync.WaitGroup
	start := time.Now()
	for i, fd := range fds {
		wg.Go(func() {
			if errs[i] = settle(); errs[i] == nil {
				bits[i], errs[i] = stream(fd, start.Add(o.For))
			}
			runtime.UnlockOSThread() // the next streams' thread
		})
	}
	wg.Wait()
	took := time.Since(start)
	for _, b := range bits {
		got.Count += b
	}
	got.PerSecond = got.Count / took.Seconds()
	return got, errors.Join(errs...)
}
