// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/pkg/datapath"
)

// TestUninstallAfterDatapath lets the real datapath load, pin, attach and change settings, and requires that no trace of it stays. The
// directories are given one by one, as somebody does who runs several nodes on a machine.
func TestUninstallAfterDatapath(t *testing.T) {
	tests := []struct {
		name  string
		bpffs string // below the node's root
	}{
		{"on a mounted bpffs", "/sys/fs/bpf/margay"},
		{"mounts a bpffs of its own", "/run/bpf-of/margay"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t)
			m.must(os.MkdirAll(m.at("/run/bpf-of"), 0o755))
			before := m.state()
			cfg := datapath.Config{BPFFS: m.at(tt.bpffs), Run: m.at("/run/margay")}
			dirs := []string{
				"--root", "/", "--cni-bin-dir", m.at("/opt/cni/bin"), "--cni-conf-dir", m.at("/etc/cni/net.d"),
				"--state-dir", m.at("/var/lib/margay"), "--run-dir", cfg.Run, "--bpffs", cfg.BPFFS,
			}
			m.ok(dirs...)
			m.ns.Do(func() {
				d, err := datapath.Ensure(t.Context(), cfg)
				m.must(err)
				defer d.Close()
				for _, nic := range []string{"eth0", "eth1"} {
					m.must(d.AttachNetdev(m.device(nic).Attrs().Index))
				}
				m.must(d.AttachPod(m.device("veth1234").Attrs().Index))
			})
			if cmp.Equal(before["tc qdisc"], m.state()["tc qdisc"]) {
				t.Fatal("the comparison does not see that the datapath is attached")
			}
			out := m.ok(append(dirs, "--uninstall")...)
			if diff := cmp.Diff(before, m.state()); diff != "" {
				t.Errorf("machine before installing and after uninstalling (-before +after):\n%s\nprinted:\n%s", diff, out)
			}
		})
	}
}
