// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/pins"
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
	on, err := pins.OnBPFFS(mountPoint)
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
