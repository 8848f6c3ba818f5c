// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"
)

// policyModule pins network-policy-api, seen from the repository's root.
const policyModule = "test/cluster/tools/network-policy-api"

// What the changed tests log for each probe, so that the report knows which tests were judged without any.
const (
	probeMade    = "probe made"
	probeLeftOut = "probe left out: no SCTP on this kernel"
)

// policyTests builds the conformance tests of network-policy-api, as policyTest in the binaries' directory, and returns the manifest of the
// CustomResourceDefinition that they are about. The module's files go into a directory of their own, because its manifests are compiled in:
// on a kernel without SCTP its SCTP servers would never become ready, and with them the pods of every test.
func (r runner) policyTests(ctx context.Context) (crd string, err error) {
	source, err := moduleDir(ctx)
	if err != nil {
		return "", err
	}
	work := filepath.Join(r.cluster.Dir, "network-policy-api")
	if err := copyModule(source, work); err != nil {
		return "", err
	}
	supported, err := sctpSupported()
	if err != nil {
		return "", err
	}
	if !supported {
		if err := removeSCTP(work); err != nil {
			return "", err
		}
	}
	build := [][]string{
		{"go", "test", "-C", work, "-c", "-trimpath", "-o", r.bin(policyTest), "./conformance"},
		{"go", "build", "-o", r.bin("test2json"), "cmd/test2json"},
	}
	for _, argv := range build {
		cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("%v: %w: %s", cmd, err, out)
		}
	}
	return filepath.Join(work, "config/crd/experimental/policy.networking.k8s.io_clusternetworkpolicies.yaml"), nil
}

// moduleDir returns where the pinned module's files are, and downloads them before if need be.
func moduleDir(ctx context.Context) (string, error) {
	cmd := exec.CommandContext(ctx, "go", "mod", "download", "-json", "sigs.k8s.io/network-policy-api")
	cmd.Dir = policyModule
	out, err := cmd.Output()
	var module struct{ Dir, Error string }
	if decodeErr := json.Unmarshal(out, &module); decodeErr != nil || module.Error != "" || err != nil {
		return "", fmt.Errorf("%v in %s: %w: %s", cmd, policyModule, errors.Join(err, decodeErr), module.Error)
	}
	return module.Dir, nil
}

// copyModule replaces the directory to with a writable copy of from, in which files can be changed.
func copyModule(from, to string) error {
	if err := os.RemoveAll(to); err != nil {
		return err
	}
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		return err
	}
	// The copy has the modes of the module cache, in which nothing is writable; a later RemoveAll needs writable directories.
	return filepath.WalkDir(to, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.Chmod(path, 0o755)
		}
		return os.Chmod(path, 0o644)
	})
}

// sctpSupported reports whether this kernel has SCTP sockets.
func sctpSupported() (bool, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_SCTP)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("ask for an SCTP socket: %w", err)
	}
	return true, unix.Close(fd)
}

// removeSCTP changes the tests below dir for a kernel without SCTP: no pod has an SCTP server, and probes by SCTP are left out.
func removeSCTP(dir string) error {
	changes := []struct {
		file   string
		change func([]byte) ([]byte, error)
	}{
		{"conformance/base/manifests.yaml", withoutSCTPServers},
		{"conformance/utils/kubernetes/helper.go", withoutSCTPProbes},
	}
	for _, c := range changes {
		path := filepath.Join(dir, c.file)
		content, err := os.ReadFile(path)
		if err == nil {
			content, err = c.change(content)
		}
		if err == nil {
			err = os.WriteFile(path, content, 0o644)
		}
		if err != nil {
			return fmt.Errorf("take SCTP out of %s: %w", c.file, err)
		}
	}
	return nil
}

// container matches the beginning of an item in a pod template's list of containers.
var container = regexp.MustCompile(`^        - name: `)

// withoutSCTPServers removes the containers that serve SCTP from a manifest: those whose lines set SERVE_SCTP_PORT_…. The manifest is a
// template, so it is taken by its lines and not as YAML.
func withoutSCTPServers(manifest []byte) ([]byte, error) {
	var kept bytes.Buffer
	var item strings.Builder // the container that is being read
	removed := 0
	flush := func() {
		if container.MatchString(item.String()) && strings.Contains(item.String(), "SERVE_SCTP_PORT_") {
			removed++
		} else {
			kept.WriteString(item.String())
		}
		item.Reset()
	}
	for line := range strings.Lines(string(manifest)) {
		// An item ends where the next begins, or where a line is less indented.
		if container.MatchString(line) || !strings.HasPrefix(line, "        ") {
			flush()
		}
		item.WriteString(line)
	}
	flush()
	if removed == 0 || strings.Contains(kept.String(), "SCTP_PORT") {
		return nil, fmt.Errorf("removed %d containers, and this is left of SCTP: %t", removed, strings.Contains(kept.String(), "SCTP_PORT"))
	}
	return kept.Bytes(), nil
}

// probe matches the first line of the function through which the tests make every probe.
var probe = regexp.MustCompile(`(?m)^func PokeServer\(t \*testing\.T, .*, protocol, .*\{\n`)

// withoutSCTPProbes makes that function return at once for SCTP, and log either way.
func withoutSCTPProbes(source []byte) ([]byte, error) {
	found := probe.FindAllIndex(source, -1)
	if len(found) != 1 {
		return nil, fmt.Errorf("found the function for probes %d times, want once", len(found))
	}
	inserted := fmt.Sprintf("\tif strings.EqualFold(protocol, \"sctp\") {\n\t\tt.Log(%q)\n\t\treturn\n\t}\n\tt.Log(%q)\n", probeLeftOut, probeMade)
	at := found[0][1]
	return []byte(string(source[:at]) + inserted + string(source[at:])), nil
}
