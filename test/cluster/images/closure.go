// SPDX-License-Identifier: Apache-2.0

package main

import (
	"debug/elf"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
)

// install is the cure when a tool is missing.
const install = "install it with hack/install-deps deps-cluster.txt"

// addDynamic adds the command of this machine under the path as, with every shared library that it links and the dynamic linker, where
// that linker looks for them.
func addDynamic(t tree, as, command string) error {
	source, err := exec.LookPath(command)
	if err != nil {
		return fmt.Errorf("%w: %s", err, install)
	}
	if source, err = filepath.EvalSymlinks(source); err != nil {
		return err
	}
	t[as] = entry{mode: 0o755, source: source}
	listed, err := output("ldd", source)
	if err != nil {
		return err
	}
	libraries, err := parseLdd(listed)
	if err != nil {
		return fmt.Errorf("libraries of %s: %w", source, err)
	}
	for _, library := range libraries {
		t[strings.TrimPrefix(library, "/")] = entry{mode: 0o755, source: library}
	}
	return nil
}

// parseLdd returns the absolute paths of the files in ldd's output. A library that ldd did not find is an error, and so is an output
// without any: all that is added with libraries is linked dynamically.
func parseLdd(listed string) ([]string, error) {
	var found []string
	for line := range strings.Lines(listed) {
		fields := strings.Fields(line)
		if strings.Contains(line, "not found") {
			return nil, fmt.Errorf("ldd: %s", strings.TrimSpace(line))
		}
		for _, field := range fields {
			if strings.HasPrefix(field, "/") {
				found = append(found, field)
				break // "/path (address)", or "name => /path (address)"
			}
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("ldd names no file: %q", listed)
	}
	return found, nil
}

// staticBusybox returns the path of a busybox that links no library.
func staticBusybox() (string, error) {
	path, err := exec.LookPath("busybox")
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, install)
	}
	file, err := elf.Open(path)
	if err != nil {
		return "", err
	}
	libraries, err := file.ImportedLibraries()
	if err = errors.Join(err, file.Close()); err != nil {
		return "", err
	}
	if len(libraries) > 0 {
		return "", fmt.Errorf("%s needs %v: the package busybox-static is wanted, %s", path, libraries, install)
	}
	return path, nil
}
