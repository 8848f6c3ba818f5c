// SPDX-License-Identifier: Apache-2.0

package state

import (
	"fmt"
	"strings"
)

// Severity says what a problem of a source does to what it is about.
type Severity string

const (
	// Error keeps something from being in force: of one in a file's text the whole file, of one between files the object named.
	Error Severity = "error"
	// Warning is about something that is ignored, or that may pass by itself; everything else is in force.
	Warning Severity = "warning"
)

// Problem is something about a source that a person should look at. File is where: a file without its directory, or the Kubernetes API;
// Line is 1 or more, or 0 if no line is to blame.
type Problem struct {
	File     string   `json:"file"`
	Line     int      `json:"line,omitempty"`
	Object   string   `json:"object,omitempty"`
	Message  string   `json:"message"`
	Severity Severity `json:"severity"`
}

// String is the problem as compilers write theirs: svc.yaml:12: Service web/api: spec.ports[0].port: 70000 is outside 1 to 65535.
func (p Problem) String() string {
	var b strings.Builder
	b.WriteString(p.File)
	if p.Line > 0 {
		fmt.Fprintf(&b, ":%d", p.Line)
	}
	if p.Object != "" {
		b.WriteString(": " + p.Object)
	}
	if p.Severity == Warning {
		b.WriteString(": warning")
	}
	b.WriteString(": " + p.Message)
	return b.String()
}
