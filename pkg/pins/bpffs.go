// SPDX-License-Identifier: Apache-2.0

package pins

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// OnBPFFS tells whether path, or its nearest existing ancestor, is on a bpffs.
func OnBPFFS(path string) (bool, error) {
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

// checkBPFFS tells whether datapath.Ensure could have a bpffs.
func checkBPFFS(cfg Config) error {
	on, err := OnBPFFS(cfg.BPFFS)
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
