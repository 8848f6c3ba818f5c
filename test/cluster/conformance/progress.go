// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"io"
	"strings"
)

// progress takes ginkgo's verbose output, and writes of it one line for each test that ended: what became of it, and its name on the next
// line of the output.
type progress struct {
	to    io.Writer
	line  []byte
	ended string // the line before was the end of a test
}

// Write takes part of the output, which need not end with a line.
func (p *progress) Write(b []byte) (int, error) {
	for rest := b; ; {
		line, after, whole := bytes.Cut(rest, []byte("\n"))
		p.line = append(p.line, line...)
		if !whole {
			return len(b), nil
		}
		if err := p.take(string(p.line)); err != nil {
			return 0, err
		}
		p.line, rest = p.line[:0], after
	}
}

func (p *progress) take(line string) error {
	ended := p.ended
	p.ended = ""
	switch {
	case strings.HasPrefix(line, "• "):
		p.ended = line
	case ended != "" && strings.HasPrefix(line, sigNetwork):
		name, _, _ := strings.Cut(short(line), " [sig-network") // behind the name come the labels, which it has anyway
		_, err := fmt.Fprintf(p.to, "%s %s\n", ended, name)
		return err
	}
	return nil
}
