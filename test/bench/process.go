// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/margay-cni/margay/pkg/netns"
)

const (
	echoPort  = 9000
	sinkPort  = 9001
	countPort = 9002
)

// course is a way that traffic takes: from a namespace to an address.
type course struct {
	name string
	from string
	to   netip.Addr
	port uint16 // 0: that of the server
}

// peer is a running process at one end of the traffic.
type peer struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// startPeer runs this binary as a peer in a namespace.
func startPeer(path string, args ...string) (*peer, error) {
	cmd := exec.Command("/proc/self/exe", append([]string{peerCommand}, args...)...)
	cmd.Stderr = os.Stderr
	cmd.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1") // its signals would interrupt system calls
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := netns.Do(path, cmd.Start); err != nil {
		return nil, fmt.Errorf("start a peer in %s: %w", path, err)
	}
	return &peer{cmd: cmd, in: in, out: bufio.NewReader(out)}, nil
}

func (p *peer) stop() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait() // killed: says nothing
}

// startServers serves every mode in a namespace, on each of the place's addresses.
func startServers(at place) (*peer, error) {
	var args []string
	for _, a := range at.addrs {
		for mode, port := range map[string]uint16{modeServe: echoPort, modeSink: sinkPort, modeCount: countPort} {
			args = append(args, "-serve", mode+"="+netip.AddrPortFrom(a, port).String())
		}
	}
	return startServerProcess(at.path, args)
}

func startServerProcess(path string, args []string) (*peer, error) {
	p, err := startPeer(path, args...)
	if err != nil {
		return nil, err
	}
	if _, err := p.out.ReadString('\n'); err != nil {
		p.stop()
		return nil, fmt.Errorf("server in %s does not get ready: %w", path, err)
	}
	return p, nil
}

// answerTime is how long a client may take beyond what it was told.
const answerTime = 5 * time.Second

// burst has a client do something for a while.
func (p *peer) burst(ctx context.Context, c course, mode string, length time.Duration) (got outcome, err error) {
	to := serverAddress(mode, c.to)
	if c.port != 0 {
		to = netip.AddrPortFrom(c.to, c.port)
	}
	if err := json.NewEncoder(p.in).Encode(order{Mode: mode, To: to, For: length}); err != nil {
		return got, fmt.Errorf("client on %s: %w", c.name, err)
	}
	ctx, cancel := context.WithTimeout(ctx, length+answerTime)
	defer cancel()
	ended := context.AfterFunc(ctx, func() { _ = p.cmd.Process.Kill() }) // it waits for an answer that does not come
	defer ended()
	line, err := p.out.ReadBytes('\n')
	if err != nil {
		return got, fmt.Errorf("%s on %s: no outcome: %w", mode, c.name, errors.Join(err, ctx.Err()))
	}
	if err := json.Unmarshal(line, &got); err != nil {
		return got, fmt.Errorf("%s on %s: %w", mode, c.name, err)
	}
	if got.Error != "" {
		return got, fmt.Errorf("%s on %s: %s", mode, c.name, got.Error)
	}
	return got, nil
}

// runClient has a client of its own do something for a while.
func runClient(ctx context.Context, c course, mode string, length time.Duration) (outcome, error) {
	p, err := startPeer(c.from)
	if err != nil {
		return outcome{}, err
	}
	defer p.stop()
	return p.burst(ctx, c, mode, length)
}

// softirqThread returns the process that does what is left of a CPU's network work when that becomes too much, false where it is not seen.
func softirqThread(cpu int) (process int, ok bool) {
	names, _ := filepath.Glob("/proc/[0-9]*/comm") // the pattern is right
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil || strings.TrimSpace(string(text)) != fmt.Sprintf("ksoftirqd/%d", cpu) {
			continue
		}
		id, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		return id, err == nil
	}
	return 0, false
}
