// SPDX-License-Identifier: Apache-2.0

package main

import (
	"io"
	"strings"
	"testing"
)

func TestCommand(t *testing.T) {
	for line, want := range map[string]string{
		"-write":                              "make bench",
		"-inside /tmp/somewhere -full -write": "make bench-full",
		"-inside /tmp/somewhere -only packet -strict": "go run ./test/bench -only packet -strict",
		"": "go run ./test/bench",
	} {
		o, err := parse(strings.Fields(line), io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		if got := o.command(); got != want {
			t.Errorf("command of %q = %q, want %q", line, got, want)
		}
	}
}

func TestFlagErrors(t *testing.T) {
	for _, line := range []string{"-smoke -write", "-smoke -full", "-smoke -strict", "-write -only packet", "-nothing", "word"} {
		if _, err := parse(strings.Fields(line), io.Discard); err == nil {
			t.Errorf("%q: no error", line)
		}
	}
}

func TestChoose(t *testing.T) {
	for want, o := range map[int]options{60: {full: true}, 12: {}, 1: {smoke: true}} {
		b := &bench{options: o}
		if got := b.choose(60, 12, 1); got != want {
			t.Errorf("choose with %+v = %d, want %d", o, got, want)
		}
	}
}
