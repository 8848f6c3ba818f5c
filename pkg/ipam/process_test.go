// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// childEnv makes the test binary a process that only uses the allocator: "add", "del" or "churn", run directory, subnets, number.
const childEnv = "MARGAY_IPAM_TEST_CHILD"

func TestMain(m *testing.M) {
	if args := strings.Fields(os.Getenv(childEnv)); len(args) == 4 {
		if err := child(args[0], args[1], args[2], args[3]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func flockFd(fd int) error { return syscall.Flock(fd, syscall.LOCK_UN) }

func childConfig(dir, subnets string) (*Config, error) {
	var sets []string
	for _, s := range strings.Split(subnets, ",") {
		sets = append(sets, fmt.Sprintf(`[{"subnet":%q}]`, s))
	}
	return LoadConfig([]byte(fmt.Sprintf(`{"cniVersion":"1.1.0","name":"net","ipam":{"runDir":%q,"ranges":[%s]}}`, dir, strings.Join(sets, ","))), "")
}

func child(verb, dir, subnets, id string) error {
	c, err := childConfig(dir, subnets)
	if err != nil {
		return err
	}
	ctx := context.Background()
	at := Attachment{ContainerID: id, IfName: "eth0", Netns: "/run/netns/none-" + id}
	switch verb {
	case "del":
		return Del(ctx, c, at)
	case "churn": // until killed; each line is a promise to the parent
		for i := 0; ; i++ {
			at.ContainerID = fmt.Sprintf("%s-%d", id, i)
			a, err := Add(ctx, c, at)
			if err != nil {
				return err
			}
			fmt.Println("added", at.ContainerID, a.IPs[0].Address.Addr())
			if i >= 3 {
				at.ContainerID = fmt.Sprintf("%s-%d", id, i-3)
				fmt.Println("deleting", at.ContainerID)
				if err := Del(ctx, c, at); err != nil {
					return err
				}
				fmt.Println("deleted", at.ContainerID)
			}
		}
	}
	a, err := Add(ctx, c, at)
	if err != nil {
		return err
	}
	for _, ip := range a.IPs {
		fmt.Println(ip.Address.Addr())
	}
	return nil
}

func childCommand(t testing.TB, verb, dir, subnets, id string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+strings.Join([]string{verb, dir, subnets, id}, " "))
	return cmd
}

// Every ADD is a process of its own. The same ranges must look the same to each, or each would rewrite the whole file as for edited ones.
func TestNextProcessKeepsTheFile(t *testing.T) {
	dir := t.TempDir()
	state := filepath.Join(dir, "ipam", "net", "state")
	var before os.FileInfo
	for _, id := range []string{"a", "b", "c"} {
		if out, err := childCommand(t, "add", dir, "10.1.0.0/24,fd00::/64", id).CombinedOutput(); err != nil {
			t.Fatalf("add %s: %v: %s", id, err, out)
		}
		after, err := os.Stat(state)
		if err != nil {
			t.Fatal(err)
		}
		if before != nil && !os.SameFile(before, after) {
			t.Errorf("add %s replaced the state file", id)
		}
		before = after
	}
}

// TestManyProcesses starts 200 processes at once that Add, then 200 that Del; a third of the addresses is asked for a second time
// while others still Add.
func TestManyProcesses(t *testing.T) {
	for _, tc := range []struct {
		name, subnets string
		each          int
	}{{"IPv4", "10.1.0.0/24", 1}, {"IPv6", "fd00::/120", 1}, {"dual stack", "10.1.0.0/24,fd00::/64", 2}} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			const n = 200
			var mu sync.Mutex
			owner := map[netip.Addr]string{}
			inParallel(n, func(i int) {
				id := fmt.Sprintf("c%d", i)
				out, err := childCommand(t, "add", dir, tc.subnets, id).CombinedOutput()
				if err != nil {
					t.Errorf("add %s: %v: %s", id, err, out)
					return
				}
				mu.Lock()
				defer mu.Unlock()
				lines := strings.Fields(string(out))
				if len(lines) != tc.each {
					t.Errorf("add %s gave %q, want %d addresses", id, lines, tc.each)
				}
				for _, l := range lines {
					a, err := netip.ParseAddr(l)
					if err != nil {
						t.Errorf("add %s: %v", id, err)
					}
					if other, ok := owner[a]; ok {
						t.Errorf("%s was given to %s and to %s", a, other, id)
					}
					owner[a] = id
				}
			})
			c, err := childConfig(dir, tc.subnets)
			if err != nil {
				t.Fatal(err)
			}
			if got := leaseCountOf(t, c); got != n {
				t.Errorf("%d leases, want %d", got, n)
			}
			verify(t, c)
			inParallel(n, func(i int) {
				if out, err := childCommand(t, "del", dir, tc.subnets, fmt.Sprintf("c%d", i)).CombinedOutput(); err != nil {
					t.Errorf("del c%d: %v: %s", i, err, out)
				}
			})
			if got := leaseCountOf(t, c); got != 0 {
				t.Errorf("%d leases left, want 0", got)
			}
			verify(t, c)
		})
	}
}

func inParallel(n int, f func(int)) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { f(i) })
	}
	wg.Wait()
}

// TestKilledProcesses lets processes Add and Del as fast as they can and kills each at a random instant. What a process has told us
// must hold, whatever happened to the call it was in.
func TestKilledProcesses(t *testing.T) {
	for _, subnets := range []string{"10.1.0.0/24", "fd00::/64"} {
		t.Run(subnets, func(t *testing.T) {
			dir := t.TempDir()
			c, err := childConfig(dir, subnets)
			if err != nil {
				t.Fatal(err)
			}
			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d", seed)
			rnd := rand.New(rand.NewPCG(seed, 0))
			for round := range 20 {
				var outs [4]bytes.Buffer
				var delays [4]time.Duration
				for i := range delays {
					delays[i] = time.Duration(rnd.Int64N(int64(15 * time.Millisecond)))
				}
				inParallel(len(outs), func(i int) {
					killAfter(t, childCommand(t, "churn", dir, subnets, fmt.Sprintf("r%d-%d", round, i)), &outs[i], delays[i])
				})
				verify(t, c)
				checkPromises(t, c, outs[:])
				if _, err := GC(t.Context(), c, nil); err != nil {
					t.Fatal(err)
				}
				if n := leaseCountOf(t, c); n != 0 {
					t.Fatalf("%d leases after GC, want 0", n)
				}
			}
		})
	}
}

// killAfter waits for the process's first answer, then for delay, and kills it.
func killAfter(t *testing.T, cmd *exec.Cmd, out *bytes.Buffer, delay time.Duration) {
	pipe, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Error(err)
		return
	}
	r := bufio.NewReader(pipe)
	line, err := r.ReadString('\n')
	if err != nil {
		t.Errorf("process said nothing: %v", err)
	}
	out.WriteString(line)
	timer := time.AfterFunc(delay, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	_, _ = out.ReadFrom(r)
	if err := cmd.Wait(); err != nil {
		if e, ok := errors.AsType[*exec.ExitError](err); !ok || e.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Errorf("process ended by itself: %v", err)
		}
	}
}

// checkPromises compares the leases with what the processes printed before they were killed.
func checkPromises(t *testing.T, c *Config, outs []bytes.Buffer) {
	t.Helper()
	held := map[string]string{}
	ls, err := Leases(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range ls {
		held[l.ContainerID] = l.Addresses[0].String()
	}
	for i := range outs {
		added, going, gone := map[string]string{}, map[string]bool{}, map[string]bool{}
		for line := range strings.Lines(outs[i].String()) {
			f := strings.Fields(line)
			switch {
			case !strings.HasSuffix(line, "\n"):
			case f[0] == "added":
				added[f[1]] = f[2]
			case f[0] == "deleting":
				going[f[1]] = true
			case f[0] == "deleted":
				gone[f[1]] = true
			}
		}
		for id, a := range added {
			switch got := held[id]; {
			case gone[id] && got != "":
				t.Errorf("%s was deleted but holds %s", id, got)
			case !going[id] && got != a:
				t.Errorf("%s holds %q, want %s", id, got, a)
			}
		}
	}
}
