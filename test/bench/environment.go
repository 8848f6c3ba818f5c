// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// environment says where and with what the run was made.
func (r *report) environment() []string {
	return []string{
		fmt.Sprintf("Run with `%s` on %s, in %s, of commit %s.", r.command, r.started.UTC().Format("2006-01-02"),
			time.Since(r.started).Round(time.Second), commit()),
		fmt.Sprintf("Machine: %s, %d CPUs, %s; load average %s before and %s after the run (its own work included).",
			processor(), runtime.NumCPU(), memory(), r.load, loadAverage()),
		fmt.Sprintf("Kernel %s, %s, %s; %s.", kernel(), distribution(), runtime.Version(), strings.Join(r.versions, "; ")),
	}
}

// commit names what was measured, and says if that is not all: the binaries are built from the checkout as it is. The results that a run
// writes do not count.
func commit() string {
	head, err := exec.Command("git", "rev-parse", "--short=12", "HEAD").Output()
	if err != nil {
		return "unknown"
	}
	name := strings.TrimSpace(string(head))
	changed, err := exec.Command("git", "status", "--porcelain", "--", ".", ":!"+docFile, ":!"+dataDir).Output()
	if err != nil || len(changed) > 0 {
		name += " with changes"
	}
	return name
}

func loadAverage() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.Fields(string(text))[0]
}

// field returns what follows the first occurrence of key and a separator in a file of lines.
func field(path, key, separator string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return "unknown"
	}
	for line := range strings.Lines(string(text)) {
		name, value, ok := strings.Cut(line, separator)
		if ok && strings.TrimSpace(name) == key {
			return strings.Trim(strings.TrimSpace(value), `"`)
		}
	}
	return "unknown"
}

func processor() string {
	name := field("/proc/cpuinfo", "model name", ":")
	if strings.Contains(field("/proc/cpuinfo", "flags", ":"), "hypervisor") {
		name += " (virtual machine)"
	}
	return name
}

func distribution() string { return field("/etc/os-release", "PRETTY_NAME", "=") }

func memory() string {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return "unknown memory"
	}
	return fmt.Sprintf("%d GiB", (uint64(info.Totalram)*uint64(info.Unit)+1<<29)>>30)
}

// kernel returns the release up to the machine's own suffix.
func kernel() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "unknown"
	}
	release, _, _ := strings.Cut(unix.ByteSliceToString(u.Release[:]), "-")
	return release
}
