// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	types100 "github.com/containernetworking/cni/pkg/types/100"
)

const cniVersion = "1.0.0"

// plugin is a CNI plugin with its configuration, run as a container runtime does: the binary itself, arguments in the environment.
type plugin struct {
	path string
	conf []byte
	// under is a command, with arguments, that runs the plugin.
	under []string
}

// cost is what a process took: from before its start to after its end, and of all CPUs, its children's part included.
type cost struct {
	wall, cpu time.Duration
}

// run executes a command and returns what it cost and what it printed.
func (p *plugin) run(ctx context.Context, command, id, ns string) (cost, []byte, error) {
	var out, errOut bytes.Buffer
	argv := append(slices.Clone(p.under), p.path)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = []string{
		"CNI_COMMAND=" + command, "CNI_CONTAINERID=" + id, "CNI_NETNS=" + ns, "CNI_IFNAME=eth0", "CNI_PATH=" + filepath.Dir(p.path),
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=bench;K8S_POD_NAME=" + id, "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(p.conf), &out, &errOut
	start := time.Now()
	err := cmd.Run()
	took := cost{wall: time.Since(start)}
	if cmd.ProcessState != nil {
		took.cpu = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	}
	if err != nil {
		return took, nil, fmt.Errorf("%s %s %s: %w: %s%s", filepath.Base(p.path), command, id, err, out.Bytes(), errOut.Bytes())
	}
	return took, out.Bytes(), nil
}

// margay returns Margay with its own IPAM.
func (n *node) margay(network string, subnets ...string) *plugin {
	return n.margayWith(map[string]any{}, network, subnets...)
}

// margayWith adds keys to the configuration.
func (n *node) margayWith(keys map[string]any, network string, subnets ...string) *plugin {
	conf := map[string]any{
		"type": "margay", "bpffs": n.cfg.BPFFS, "runDir": n.cfg.Run, "logLevel": "error",
		"ipam": map[string]any{"type": "margay-ipam", "ranges": ranges(subnets)},
	}
	for key, value := range keys {
		conf[key] = value
	}
	return n.plugin("margay", network, conf)
}

// ptp returns the reference: ptp with host-local.
func (n *node) ptp(network string, subnets ...string) *plugin {
	routes := []any{map[string]any{"dst": "0.0.0.0/0"}}
	if len(subnets) > 1 {
		routes = append(routes, map[string]any{"dst": "::/0"})
	}
	return n.plugin("ptp", network, map[string]any{
		"type": "ptp",
		"ipam": map[string]any{
			"type": "host-local", "dataDir": filepath.Join(n.dir, "host-local"), "ranges": ranges(subnets), "routes": routes,
		},
	})
}

func (n *node) plugin(binary, network string, conf map[string]any) *plugin {
	conf["cniVersion"], conf["name"] = cniVersion, network
	text, err := json.Marshal(conf)
	if err != nil {
		panic(err) // maps of strings
	}
	return &plugin{path: filepath.Join(n.bin, binary), conf: text}
}

func ranges(subnets []string) []any {
	var sets []any
	for _, s := range subnets {
		sets = append(sets, []any{map[string]any{"subnet": s}})
	}
	return sets
}

// added is what the benchmarks need of an ADD's result.
type added struct {
	addrs    []netip.Addr
	mac      [6]byte // the pod's
	hostMAC  [6]byte
	hostName string
}

func parseAdded(out []byte) (*added, error) {
	var r types100.Result
	if err := json.Unmarshal(out, &r); err != nil {
		return nil, fmt.Errorf("decode the result: %w", err)
	}
	a := &added{}
	for _, ip := range r.IPs {
		addr, _ := netip.AddrFromSlice(ip.Address.IP)
		a.addrs = append(a.addrs, addr.Unmap())
	}
	for _, i := range r.Interfaces {
		mac, err := net.ParseMAC(i.Mac)
		if err != nil {
			return nil, fmt.Errorf("MAC of %s: %w", i.Name, err)
		}
		if i.Sandbox != "" {
			copy(a.mac[:], mac)
		} else {
			copy(a.hostMAC[:], mac)
			a.hostName = i.Name
		}
	}
	return a, nil
}
