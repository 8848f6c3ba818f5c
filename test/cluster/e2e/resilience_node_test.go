// SPDX-License-Identifier: Apache-2.0

//go:build cluster

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"github.com/margay-cni/margay/pkg/addr"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/ipam"
	"github.com/margay-cni/margay/pkg/pins"
	"github.com/margay-cni/margay/test/cluster/lab"
)

const (
	// settleTime is how long a cluster may need to come to rest: kubelet repeats what failed after up to half a minute.
	settleTime = 4 * time.Minute
	// leftoverTime is how long something that belongs to nothing may stay (docs/design/0014-gc.md).
	leftoverTime = time.Minute
)

// inNode returns where a path of a node is for us, through its first process.
func inNode(n *lab.Node, path string) (string, error) {
	pid, err := n.PID()
	return fmt.Sprintf("/proc/%d/root%s", pid, path), err
}

// process is one of a node's, by the real machine's process id.
type process struct {
	pid, parent int
	args        []string
}

// processes returns the node's processes: all that descend from its first one.
func processes(n *lab.Node) ([]process, error) {
	first, err := n.PID()
	if err != nil {
		return nil, err
	}
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	children := map[int][]process{}
	for _, dir := range dirs {
		stat, err := os.ReadFile(filepath.Join(dir, "stat"))
		if err != nil {
			continue // it has ended
		}
		// proc_pid_stat(5): the command is in parentheses and may contain anything; the parent is the second field behind it.
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		if len(fields) < 2 {
			continue
		}
		p := process{}
		if p.pid, err = strconv.Atoi(filepath.Base(dir)); err != nil {
			return nil, err
		}
		if p.parent, err = strconv.Atoi(fields[1]); err != nil {
			return nil, err
		}
		cmdline, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil || len(cmdline) == 0 {
			continue // it has ended, perhaps without having been waited for
		}
		p.args = strings.Split(strings.TrimSuffix(string(cmdline), "\x00"), "\x00")
		children[p.parent] = append(children[p.parent], p)
	}
	all := slices.Clone(children[first])
	for i := 0; i < len(all); i++ {
		all = append(all, children[all[i].pid]...)
	}
	return all, nil
}

// find returns the one process of a node for which is holds.
func find(t *testing.T, n *lab.Node, what string, is func(process) bool) process {
	t.Helper()
	var found process
	eventually(t, what+" on "+n.Name, time.Minute, func() error {
		all, err := processes(n)
		if err != nil {
			return err
		}
		all = slices.DeleteFunc(all, func(p process) bool { return !is(p) })
		if len(all) != 1 {
			return fmt.Errorf("there are %d: %v", len(all), all)
		}
		found = all[0]
		return nil
	})
	return found
}

// agentProcess returns a node's agent.
func agentProcess(t *testing.T, n *lab.Node) process {
	t.Helper()
	return find(t, n, "the agent", func(p process) bool { return p.args[0] == "/usr/bin/margay-agent" })
}

// kill kills a process with SIGKILL. find has seen it just now as a descendant of the node's first process.
func (p process) kill(t *testing.T) {
	t.Helper()
	if err := unix.Kill(p.pid, unix.SIGKILL); err != nil {
		t.Fatalf("kill %v: %v", p.args, err)
	}
}

// recordOf returns Margay's record of a pod.
func recordOf(p pod) (*endpoint.Record, error) {
	run, err := inNode(cluster.Nodes()[p.node-1], "/run/margay")
	if err != nil {
		return nil, err
	}
	records, err := endpoint.NewStore(run).List()
	if err != nil {
		return nil, err
	}
	for _, r := range records {
		if r.UID == string(p.object.UID) {
			return r, nil
		}
	}
	return nil, fmt.Errorf("there is no record of pod %s on node%d", p.name, p.node)
}

// sandboxOf returns the ID of a pod's sandbox, as the plugin got it.
func sandboxOf(t *testing.T, p pod) string {
	t.Helper()
	r, err := recordOf(p)
	if err != nil {
		t.Fatal(err)
	}
	return r.ContainerID
}

// livingPods returns the addresses of the pods on a node that Margay serves, each with the pod's name, as the API server has them.
func livingPods(n *lab.Node) (map[netip.Addr]string, error) {
	var list corev1.PodList
	if err := api.get(context.Background(), "Pod", "", "", &list); err != nil {
		return nil, err
	}
	living := map[netip.Addr]string{}
	for _, p := range list.Items {
		ended := p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
		if p.Spec.NodeName != n.Name || p.Spec.HostNetwork || ended {
			continue
		}
		for _, ip := range p.Status.PodIPs {
			a, err := netip.ParseAddr(ip.IP)
			if err != nil {
				return nil, err
			}
			living[a] = p.Namespace + "/" + p.Name
		}
	}
	return living, nil
}

// property is what Margay has on a node for pods.
type property struct {
	addresses map[string]map[netip.Addr]string // of each record, lease and entry of the map endpoints: the pod's name, if that is known
	sandboxes map[string]string                // that a record or a lease is about: the pod's name
	devices   []string
	journals  []string
	hostPorts map[uint32]string // service ids of records' hostPorts: the pod's name
}

// owned returns what Margay has on a node for pods.
func owned(n *lab.Node) (property, error) {
	p := property{addresses: map[string]map[netip.Addr]string{"record": {}, "lease": {}}, sandboxes: map[string]string{}, hostPorts: map[uint32]string{}}
	run, err := inNode(n, "/run/margay")
	if err != nil {
		return p, err
	}
	records, err := endpoint.NewStore(run).List()
	if err != nil {
		return p, err
	}
	for _, r := range records {
		p.sandboxes[r.ContainerID] = r.Namespace + "/" + r.Name
		for _, h := range r.HostPorts {
			p.hostPorts[h.ID] = r.Namespace + "/" + r.Name
		}
		for _, a := range r.Addresses {
			p.addresses["record"][a] = r.Namespace + "/" + r.Name
		}
	}
	leases, err := ipam.Leases(context.Background(), ipam.Existing(run, "margay"))
	if err != nil {
		return p, err
	}
	for _, l := range leases {
		p.sandboxes[l.ContainerID] = l.PodNamespace + "/" + l.PodName
		for _, a := range l.Addresses {
			p.addresses["lease"][a] = l.PodNamespace + "/" + l.PodName
		}
	}
	locks, err := os.ReadDir(filepath.Join(run, "locks"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return p, err
	}
	for _, l := range locks {
		if info, err := l.Info(); err == nil && info.Size() > 0 {
			p.journals = append(p.journals, l.Name())
		}
	}
	if p.addresses["map entry"], err = endpointEntries(n); err != nil {
		return p, err
	}
	err = nodePlace(n.Number).do(func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			if strings.HasPrefix(l.Attrs().Name, "mgy") {
				p.devices = append(p.devices, l.Attrs().Name)
			}
		}
		return err
	})
	return p, err
}

// endpointEntries returns the addresses in the map endpoints.
func endpointEntries(n *lab.Node) (map[netip.Addr]string, error) {
	m, err := openMap(n, "endpoints")
	if err != nil {
		return nil, err
	}
	defer m.Close()
	all := map[netip.Addr]string{}
	var key [16]byte
	var value []byte
	entries := m.Iterate()
	for entries.Next(&key, &value) {
		all[addr.From16(key)] = ""
	}
	return all, entries.Err()
}

// openMap opens a map that is pinned on a node.
func openMap(n *lab.Node, name string) (*ebpf.Map, error) {
	pattern, err := inNode(n, "/sys/fs/bpf/margay/maps/"+name+"_v*")
	if err != nil {
		return nil, err
	}
	pins, err := filepath.Glob(pattern)
	if err != nil || len(pins) != 1 {
		return nil, fmt.Errorf("%s: %d maps are pinned (%v)", pattern, len(pins), err)
	}
	return ebpf.LoadPinnedMap(pins[0], &ebpf.LoadPinOptions{ReadOnly: true})
}

// hostPortEntries returns the service ids of the hostPorts in the map services.
func hostPortEntries(n *lab.Node) (map[uint32]bool, error) {
	m, err := openMap(n, "services")
	if err != nil {
		return nil, err
	}
	defer m.Close()
	all := map[uint32]bool{}
	var key bpf.FrontendKey
	var value bpf.Service
	entries := m.Iterate()
	for entries.Next(&key, &value) {
		if pins.IsHostPort(value.Id) {
			all[value.Id] = true
		}
	}
	return all, entries.Err()
}

// strayPending counts the entries of the map pending that are about no pod of the node and no namespace.
func strayPending(n *lab.Node) (strays int, err error) {
	var pods corev1.PodList
	var namespaces corev1.NamespaceList
	if err := errors.Join(api.get(context.Background(), "Pod", "", "", &pods), api.get(context.Background(), "Namespace", "", "", &namespaces)); err != nil {
		return 0, err
	}
	known := map[bpf.PendingKey]bool{pins.PendingKeyOf("", "", ""): true}
	for _, ns := range namespaces.Items {
		known[pins.PendingKeyOf(ns.Name, "", "")] = true
	}
	for _, p := range pods.Items {
		if p.Spec.NodeName == n.Name {
			known[pins.PendingKeyOf(p.Namespace, p.Name, string(p.UID))] = true
		}
	}
	m, err := openMap(n, "pending")
	if err != nil {
		return 0, err
	}
	defer m.Close()
	var key bpf.PendingKey
	var value []byte
	entries := m.Iterate()
	for entries.Next(&key, &value) {
		if !known[key] {
			strays++
		}
	}
	return strays, entries.Err()
}

// tidy returns an error unless a node has a record, a lease, a map entry and a device for each of its living pods, and for nothing else.
func tidy(n *lab.Node) error {
	living, err := livingPods(n)
	if err != nil {
		return err
	}
	owned, err := owned(n)
	if err != nil {
		return err
	}
	var faults []string
	for _, what := range []string{"record", "lease", "map entry"} {
		has := owned.addresses[what]
		for a, name := range has {
			if living[a] == "" {
				faults = append(faults, fmt.Sprintf("a %s of %s, which no pod has (%s)", what, a, name))
			} else if name != "" && name != living[a] {
				faults = append(faults, fmt.Sprintf("a %s of %s about %s, and it is %s's", what, a, name, living[a]))
			}
		}
		for a, name := range living {
			if _, ok := has[a]; !ok {
				faults = append(faults, fmt.Sprintf("no %s of %s, which pod %s has", what, a, name))
			}
		}
	}
	if pods := len(living) / len(families()); len(owned.devices) != pods {
		faults = append(faults, fmt.Sprintf("%d devices of pods, and %d pods: %v", len(owned.devices), pods, owned.devices))
	}
	for _, j := range owned.journals {
		faults = append(faults, "the journal "+j)
	}
	served, err := hostPortEntries(n)
	if err != nil {
		return err
	}
	for id := range served {
		if owned.hostPorts[id] == "" {
			faults = append(faults, fmt.Sprintf("a hostPort in the map services, %d, which no record has", id))
		}
	}
	for id, name := range owned.hostPorts {
		if !served[id] {
			faults = append(faults, fmt.Sprintf("no hostPort %d in the map services, which pod %s has", id, name))
		}
	}
	strays, err := strayPending(n)
	if err != nil {
		return err
	}
	if strays > 0 {
		faults = append(faults, fmt.Sprintf("%d published policies of pods that are not", strays))
	}
	if len(faults) > 0 {
		return fmt.Errorf("%s has\n  %s", n.Name, strings.Join(faults, "\n  "))
	}
	return nil
}

// becomesTidy requires that within a minute nothing on any node belongs to nothing, and that no living pod lacks anything.
func becomesTidy(t *testing.T, after string) {
	t.Helper()
	start := time.Now()
	for _, n := range cluster.Nodes() {
		eventually(t, "nothing is left after "+after, leftoverTime, func() error { return tidy(n) })
	}
	t.Logf("after %s nothing was left within %v", after, time.Since(start).Round(100*time.Millisecond))
}

// pinned returns what Margay has pinned on a node.
func pinned(t *testing.T, n *lab.Node) (all []string) {
	t.Helper()
	top, err := inNode(n, "/sys/fs/bpf/margay")
	if err != nil {
		t.Fatal(err)
	}
	err = filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		all = append(all, strings.TrimPrefix(path, top))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}
