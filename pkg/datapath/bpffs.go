// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// systemBPFFS is where every distribution mounts bpffs.
const systemBPFFS = "/sys/fs/bpf"

// ensureBPFFS makes cfg.BPFFS a directory on a bpffs, mounting one where there is none: at the system's place when the directory lies
// below it, else at the directory itself.
func ensureBPFFS(cfg Config) error {
	mountPoint := cfg.BPFFS
	if strings.HasPrefix(cfg.BPFFS+"/", systemBPFFS+"/") {
		mountPoint = systemBPFFS
	} else if err := os.MkdirAll(cfg.BPFFS, 0o700); err != nil {
		return fmt.Errorf("make %s: %w", cfg.BPFFS, err)
	}
	on, err := onBPFFS(mountPoint)
	if err != nil {
		return err
	}
	if !on {
		// Remembered first: a crash in between must not leave a mount that uninstall does not know.
		if err := remember(cfg, "mounts.json", mountPoint, "bpf"); err != nil {
			return err
		}
		if err := unix.Mount("bpf", mountPoint, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_RELATIME, "mode=0700"); err != nil {
			return fmt.Errorf("mount bpffs at %s (CAP_SYS_ADMIN is needed; or mount it yourself: mount -t bpf bpf %s): %w", mountPoint, mountPoint, err)
		}
	}
	if err := os.MkdirAll(cfg.BPFFS, 0o700); err != nil {
		return fmt.Errorf("make %s: %w", cfg.BPFFS, err)
	}
	return nil
}

// onBPFFS tells whether path, or its nearest existing ancestor, is on a bpffs.
func onBPFFS(path string) (bool, error) {
	for {
		var st unix.Statfs_t
		err := unix.Statfs(path, &st)
		if err == nil {
			return st.Type == unix.BPF_FS_MAGIC, nil
		}
		if !errors.Is(err, fs.ErrNotExist) || path == "/" {
			return false, fmt.Errorf("look at %s: %w", path, err)
		}
		path = filepath.Dir(path)
	}
}

// checkBPFFS tells whether ensureBPFFS could succeed.
func checkBPFFS(cfg Config) error {
	on, err := onBPFFS(cfg.BPFFS)
	if err != nil || on {
		return err
	}
	known, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return fmt.Errorf("read the kernel's filesystems: %w", err)
	}
	if !strings.Contains(string(known), "\tbpf\n") {
		return errors.New("this kernel has no bpffs (CONFIG_BPF_SYSCALL)")
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("no bpffs at %s, and only root can mount one", cfg.BPFFS)
	}
	return nil
}
