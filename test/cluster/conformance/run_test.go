// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestRunGroupLeavesNothing: a command that ignores the interruption is killed with the process that it started.
func TestRunGroupLeavesNothing(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	pidFile := filepath.Join(t.TempDir(), "pid")
	cmd := exec.CommandContext(ctx, "bash", "-c", `trap "" INT; sleep 300 & echo $! >"$0.new"; mv "$0.new" "$0"; wait`, pidFile)
	ended := make(chan error, 1)
	go func() { ended <- runGroup(cmd, 200*time.Millisecond) }()
	pid := awaitFile(t, pidFile)
	cancel()
	select {
	case err := <-ended:
		if err == nil {
			t.Error("a killed command ended without an error")
		}
	case <-time.After(30 * time.Second):
		t.Fatal("the command goes on for 30 s")
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if !sleeps(t, pid) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %s goes on", pid)
		}
	}
}

func awaitFile(t *testing.T, path string) string {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		content, err := os.ReadFile(path)
		if err == nil {
			return strings.TrimSpace(string(content))
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// sleeps reports whether the process is the sleep of the test; a dead one that nobody has reaped has no command line any more.
func sleeps(t *testing.T, pid string) bool {
	t.Helper()
	line, err := os.ReadFile(filepath.Join("/proc", pid, "cmdline"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !strings.Contains(err.Error(), "no such process") {
		t.Fatal(err)
	}
	return bytes.HasPrefix(line, []byte("sleep\x00300"))
}

// TestRunGroupInterrupts: a command that minds the interruption ends in its own way, and what it says then is kept.
func TestRunGroupInterrupts(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ready := filepath.Join(t.TempDir(), "ready")
	var said bytes.Buffer
	cmd := exec.CommandContext(ctx, "bash", "-c", `trap "echo reported; exit 0" INT; >"$0"; for i in {1..600}; do sleep 0.1; done`, ready)
	cmd.Stdout = &said
	ended := make(chan error, 1)
	go func() { ended <- runGroup(cmd, time.Minute) }()
	awaitFile(t, ready)
	cancel()
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Fatal("the command goes on for a minute")
	}
	if said.String() != "reported\n" {
		t.Errorf("it said %q, want %q", said.String(), "reported\n")
	}
}
