// SPDX-License-Identifier: Apache-2.0

package main

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func readFile(t *testing.T, path string) string {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

// TestShippedUnitStartsThisAgent: the unit is one that systemd takes, and its command line one that the agent takes, with the example of the
// environment file and without.
func TestShippedUnitStartsThisAgent(t *testing.T) {
	unit := readFile(t, "../install/systemd/margay-agent.service")
	example := readFile(t, "../install/systemd/margay-agent.env")
	command := regexp.MustCompile(`(?m)^ExecStart=(\S+) (.*)$`).FindStringSubmatch(unit)
	if command == nil || filepath.Base(command[1]) != "margay-agent" {
		t.Fatal("the unit does not start margay-agent")
	}
	setting := regexp.MustCompile(`(MARGAY_[A-Z_]+)=(\S[^\n]*)?`)
	for name, text := range map[string]string{
		"without the file": regexp.MustCompile(`(?m)^Environment=.*$`).FindString(unit),
		"with the example": example,
	} {
		var environment []string
		if name == "without the file" {
			environment = strings.Fields(strings.TrimPrefix(text, "Environment="))
		} else {
			environment = setting.FindAllString(text, -1)
		}
		line := command[2]
		for _, e := range environment {
			key, value, _ := strings.Cut(e, "=")
			line = strings.NewReplacer("${"+key+"}", value, "$"+key, value).Replace(line)
		}
		if strings.Contains(line, "$") {
			t.Errorf("%s: nothing sets what %q names", name, line)
		}
		if o, err := parse(append(strings.Fields(line), "--node", "worker-1"), io.Discard); err != nil {
			t.Errorf("%s: parse(%q) = %v", name, line, err)
		} else if name == "with the example" && o.reach.Mode != "auto" {
			t.Errorf("%s: routing mode %s, want that of the file", name, o.reach.Mode)
		}
	}
}

// TestShippedUnitIsSystemds asks systemd what it thinks of the unit.
func TestShippedUnitIsSystemds(t *testing.T) {
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Skip("no systemd here")
	}
	unit := readFile(t, "../install/systemd/margay-agent.service")
	here := filepath.Join(t.TempDir(), "margay-agent.service")
	if err := os.WriteFile(here, []byte(strings.Replace(unit, "/usr/local/bin/margay-agent", "/bin/true", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), "systemd-analyze", "verify", here).CombinedOutput()
	if err != nil || strings.Contains(string(out), "margay-agent.service:") {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}
