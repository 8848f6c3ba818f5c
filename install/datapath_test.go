// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"io"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/conf"
	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/pkg/cni"
	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/link"
)

// TestUninstallAfterDatapath lets the real datapath load, pin, attach and change settings, and the plugin add a pod, and requires that no trace of it stays. The
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
				m.must(serveHost(d))
			})
			m.addPod(cfg)
			if cmp.Equal(before["tc qdisc"], m.state()["tc qdisc"]) {
				t.Fatal("the comparison does not see that the datapath is attached")
			}
			if code, out := m.run(append(dirs, "--uninstall")...); code != exitFailed || !strings.Contains(out, "pod default/web, eth0 on mgy") {
				t.Errorf("--uninstall with a pod = exit code %d, want %d and the pod named:\n%s", code, exitFailed, out)
			}
			out := m.ok(append(dirs, "--uninstall", "--force")...)
			if diff := cmp.Diff(before, m.state()); diff != "" {
				t.Errorf("machine before installing and after uninstalling (-before +after):\n%s\nprinted:\n%s", diff, out)
			}
		})
	}
}

// serveHost makes what the agent makes for the node's own sockets, in the calling thread's namespace.
func serveHost(d *datapath.Datapath) error {
	c, err := link.Dial(-1)
	if err != nil {
		return err
	}
	defer c.Close()
	host, service, err := c.EnsureHostPair()
	if err != nil {
		return err
	}
	_, err = c.SyncServiceRoutes(host.Index, []link.ServiceRoute{{Dst: netip.MustParsePrefix("10.96.0.0/12")}, {Dst: netip.MustParsePrefix("fd00:96::/112")}}, false)
	return errors.Join(err, d.AttachHost(service.Index))
}

// addPod connects a pod to the machine by the plugin's ADD with the shipped conflist.
func (m *machine) addPod(cfg datapath.Config) {
	m.t.Helper()
	list, err := libcni.NetworkConfFromBytes(conf.Conflist)
	m.must(err)
	var stdin map[string]any
	m.must(json.Unmarshal(list.Plugins[0].Bytes, &stdin))
	stdin["name"], stdin["cniVersion"] = list.Name, list.CNIVersion
	stdin["runDir"], stdin["bpffs"] = cfg.Run, cfg.BPFFS
	content, err := json.Marshal(stdin)
	m.must(err)
	pod := netnstest.New(m.t)
	m.ns.Do(func() {
		m.must(cni.New(io.Discard).Add(m.t.Context(), &cni.Args{
			ContainerID: "c1", Netns: pod.Path(), IfName: "eth0", StdinData: content,
			Args: "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=c1",
		}))
	})
}
