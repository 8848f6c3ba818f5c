// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

const (
	procSys        = "/proc/sys"
	sysctlForward4 = "/proc/sys/net/ipv4/ip_forward"
	sysctlForward6 = "/proc/sys/net/ipv6/conf/all/forwarding"
	sysctlConf6    = "/proc/sys/net/ipv6/conf"
)

// ensureForwarding turns IP forwarding on: bpf_fib_lookup answers nothing on a device that does not forward. A node that learns its
// IPv6 routes from router advertisements goes on doing so (accept_ra 2), which forwarding alone would end.
func ensureForwarding(cfg Config) error {
	if err := setSysctl(cfg, sysctlForward4, "1"); err != nil {
		return err
	}
	if on, err := readSysctl(sysctlForward6); err != nil || on == "1" {
		return ignoreMissing(err)
	}
	devices, err := os.ReadDir(sysctlConf6)
	if err != nil {
		return fmt.Errorf("list IPv6 devices: %w", err)
	}
	for _, dev := range devices {
		path := filepath.Join(sysctlConf6, dev.Name(), "accept_ra")
		if ra, err := readSysctl(path); err != nil || ra != "1" || dev.Name() == "all" || dev.Name() == "default" || dev.Name() == "lo" {
			continue
		}
		if err := setSysctl(cfg, path, "2"); err != nil {
			return err
		}
	}
	return setSysctl(cfg, sysctlForward6, "1")
}

func readSysctl(path string) (string, error) {
	b, err := os.ReadFile(path)
	return strings.TrimSpace(string(b)), err
}

// setSysctl writes a value and remembers the old one for uninstall. A sysctl that the kernel does not have is no error.
func setSysctl(cfg Config, path, value string) error {
	old, err := readSysctl(path)
	if err != nil || old == value {
		return ignoreMissing(err)
	}
	return changeSysctl(cfg, path, old, value)
}

// changeSysctl makes old value, after it has remembered old.
func changeSysctl(cfg Config, path, old, value string) error {
	if err := remember(cfg, "sysctls.json", path, old); err != nil {
		return err
	}
	err := os.WriteFile(writable(cfg, path), []byte(value), 0)
	if errors.Is(err, syscall.EROFS) {
		return fmt.Errorf("set %s to %s: %w (in a container that is not privileged the agent needs the node's /proc/sys/net and --proc-sys)", path, value, err)
	}
	if err != nil {
		return fmt.Errorf("set %s to %s: %w", path, value, err)
	}
	return nil
}

// writable returns where a setting that is named below /proc/sys can be written.
func writable(c Config, path string) string {
	if c.ProcSys == "" {
		return path
	}
	return filepath.Join(c.ProcSys, strings.TrimPrefix(path, procSys))
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// remember adds key to the JSON object in <run>/<file>, unless it is there: the first value is the one from before Margay. The caller
// holds the datapath lock.
func remember(cfg Config, file, key, value string) error {
	path := filepath.Join(cfg.Run, file)
	values := map[string]string{}
	b, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(b, &values)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read %s: %w", path, err)
	}
	if _, ok := values[key]; ok {
		return nil
	}
	values[key] = value
	b, err = json.MarshalIndent(values, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(path+".tmp", append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Rename(path+".tmp", path)
}
