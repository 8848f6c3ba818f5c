// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/test/cluster/machine"
)

// hierarchies returns the cgroup mounts of this machine.
func hierarchies() ([]machine.Hierarchy, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var found []machine.Hierarchy
	v1 := false
	for s := bufio.NewScanner(f); s.Scan(); {
		// See proc_pid_mountinfo(5): ID parent device root mount-point options … - type source super-options.
		before, after, ok := strings.Cut(s.Text(), " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !ok || len(left) < 6 || len(right) < 3 || !strings.HasPrefix(left[4], "/sys/fs/cgroup") {
			continue
		}
		switch right[0] {
		case "cgroup":
			options := slices.DeleteFunc(strings.Split(right[2], ","), func(o string) bool { return o == "rw" || o == "xattr" })
			if strings.HasPrefix(options[0], "name=") {
				options = append([]string{"none"}, options...)
			}
			found = append(found, machine.Hierarchy{Path: left[4], Type: "cgroup", Options: strings.Join(options, ",")})
			v1 = true
		case "cgroup2":
			found = append(found, machine.Hierarchy{Path: left[4], Type: "cgroup2"})
		}
	}
	if !v1 {
		return nil, errors.New("the test cluster needs the controllers in cgroup version 1 hierarchies below /sys/fs/cgroup, as with the kernel parameter systemd.unified_cgroup_hierarchy=0; this machine has none")
	}
	return found, nil
}

// cgroupName is where the cluster with this id has its cgroups in every hierarchy.
func cgroupName(id string) string { return "margay-cluster-" + id }

// makeCgroups makes the machine's cgroup in every hierarchy and moves the process there.
func makeCgroups(all []machine.Hierarchy, id, name string, pid int) error {
	for _, h := range all {
		parent := filepath.Join(h.Path, cgroupName(id))
		for _, dir := range []string{parent, filepath.Join(parent, name)} {
			if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return err
			}
			if err := inheritCPUs(dir); err != nil {
				return err
			}
		}
		if err := os.WriteFile(filepath.Join(parent, name, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0o644); err != nil {
			return fmt.Errorf("move process %d to its cgroup: %w", pid, err)
		}
	}
	return nil
}

// killCgroups kills every process in the cgroups of the cluster: what has no record, because its machine's directory was lost.
func killCgroups(all []machine.Hierarchy, id string) error {
	var errs []error
	for _, h := range all {
		files, err := filepath.Glob(filepath.Join(h.Path, cgroupName(id), "*", "cgroup.procs"))
		errs = append(errs, err)
		for _, file := range files {
			pids, err := os.ReadFile(file)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
			for field := range strings.FieldsSeq(string(pids)) {
				pid, err := strconv.Atoi(field)
				if err != nil {
					errs = append(errs, err)
					continue
				}
				if p, err := identify(pid); err == nil {
					errs = append(errs, p.kill())
				}
			}
		}
	}
	return errors.Join(errs...)
}

// inheritCPUs gives a new cpuset its parent's processors and memory: without them it takes no process.
func inheritCPUs(dir string) error {
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		b, err := os.ReadFile(filepath.Join(filepath.Dir(dir), file))
		if errors.Is(err, fs.ErrNotExist) {
			return nil // no cpuset hierarchy
		}
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, file), b, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// removeCgroups removes a machine's cgroups, or with name "" those of the whole cluster. The kernel lets go of a dead process' cgroup a
// little after the process.
func removeCgroups(all []machine.Hierarchy, id, name string) error {
	deadline := time.Now().Add(20 * time.Second)
	for _, h := range all {
		dir := filepath.Join(h.Path, cgroupName(id), name)
		for {
			err := removeTree(dir)
			if err == nil {
				break
			}
			if time.Now().After(deadline) {
				return err
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	return nil
}

// removeTree removes a cgroup and those below it, bottom-up.
func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove cgroup %s: %w", dir, err)
	}
	return nil
}
