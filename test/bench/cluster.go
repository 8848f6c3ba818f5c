// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containernetworking/cni/libcni"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/margay-cni/margay/internal/testutil/apitest"
	"github.com/margay-cni/margay/pkg/netns"
)

// patience is how long a cluster may take until its services answer: the slowest has to install 10 000 of them.
const patience = 90 * time.Second

// cluster is two nodes and an external client on a fabric of their own, with pods that a contender connects:
//
//	 client, 172.16.1.100         node1, .11         node2, .12
//	        │                     │  client, local     │  remote
//	        │                     │                    │
//	════════╧═════════════════════╧════════════════════╧════════ a bridge
//
// The pods' addresses are 10.244.<node>.0/24 and fd00:244:<node>::/64. What runs on the nodes follows an API server that answers on the
// loopback address of each.
type cluster struct {
	bench     *bench
	contender *contender
	fabric    *fabric
	dir       string
	fixture   *fixture
	api       *apitest.Server
	nodes     []*clusterNode
	client    place            // outside
	pods      map[string]place // by name; nodes without a CNI are there themselves
	servers   map[string]*peer // by the pod's name
	clients   map[string]*peer // by the namespace
	daemons   []*daemon
}

// clusterNode is a machine of a cluster.
type clusterNode struct {
	place
	name   string
	number int
	dir    string
	api    *apitest.Server
	cni    *libcni.CNIConfig
	conf   *libcni.NetworkConfigList
	served bool // a daemon runs here
}

func (n *clusterNode) bpffs() string { return filepath.Join(n.dir, "bpf") }
func (n *clusterNode) run() string   { return filepath.Join(n.dir, "run") }

func (n *clusterNode) podRanges() []string {
	return []string{fmt.Sprintf("10.244.%d.0/24", n.number), fmt.Sprintf("fd00:244:%d::/64", n.number)}
}

func (n *clusterNode) writeJSON(path string, v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return os.WriteFile(path, text, 0o644)
}

// newCluster makes a cluster without pods; its daemons are started later, so that they find everything there. The name is its own.
func (b *bench) newCluster(name string, c *contender) (_ *cluster, err error) {
	k := &cluster{
		bench: b, contender: c, dir: filepath.Join(b.node.dir, name),
		pods: map[string]place{}, servers: map[string]*peer{}, clients: map[string]*peer{},
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("make cluster %s: %w", name, err), k.close())
		}
	}()
	if err := os.Mkdir(k.dir, 0o755); err != nil {
		return nil, err
	}
	k.fixture = &fixture{dir: k.dir}
	k.api = apitest.New(k.fixture)
	if k.fabric, err = newFabric(b.node, name); err != nil {
		return nil, err
	}
	if k.client, err = k.fabric.attach("outside", 100); err != nil {
		return nil, err
	}
	for number := 1; number <= 2; number++ {
		n, err := k.addNode(number)
		if err != nil {
			return nil, err
		}
		k.nodes = append(k.nodes, n)
	}
	k.api.Put(clusterObjects(k.nodes)...)
	if c.conflist == nil {
		k.pods["remote"] = k.nodes[1].place
	}
	if c.overlay {
		k.pods["remote"], err = k.overlay()
	}
	if !c.routes {
		return k, err
	}
	for _, from := range k.nodes {
		for _, to := range k.nodes {
			for i, prefix := range to.podRanges() {
				if from != to {
					err = errors.Join(err, route(from.path, prefix, to.addrs[i]))
				}
			}
		}
	}
	return k, err
}

func (k *cluster) addNode(number int) (*clusterNode, error) {
	n := &clusterNode{name: fmt.Sprintf("node%d", number), number: number}
	n.dir = filepath.Join(k.dir, n.name)
	if err := os.Mkdir(n.dir, 0o755); err != nil {
		return nil, err
	}
	var err error
	if n.place, err = k.fabric.attach(n.name, uint32(10+number)); err != nil {
		return nil, err
	}
	if k.contender.conflist == nil {
		return n, nil
	}
	err = netns.Do(n.path, func() error { n.api = k.api.Another(); return nil })
	if err != nil {
		return nil, err
	}
	text, err := k.contender.conflist(n)
	if err != nil {
		return nil, err
	}
	if n.conf, err = libcni.NetworkConfFromBytes(text); err != nil {
		return nil, err
	}
	n.cni = libcni.NewCNIConfigWithCacheDir([]string{k.contender.plugins}, filepath.Join(n.dir, "cni"), nil)
	return n, nil
}

// addPod connects a pod to a node.
func (k *cluster) addPod(ctx context.Context, n *clusterNode, name string) (place, error) {
	p := place{}
	var err error
	if p.path, err = k.bench.node.namespace(k.fabric.name + "-" + name); err != nil {
		return p, err
	}
	k.fabric.hosts = append(k.fabric.hosts, p)
	attachment := &libcni.RuntimeConf{
		ContainerID: n.name + "-" + name, NetNS: p.path, IfName: "eth0",
		Args: [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "default"}, {"K8S_POD_NAME", name}},
	}
	err = netns.Do(n.path, func() error {
		raw, err := n.cni.AddNetworkList(ctx, n.conf, attachment)
		if err != nil {
			return fmt.Errorf("ADD of %s on %s: %w", name, n.name, err)
		}
		result, err := types100.NewResultFromResult(raw)
		if err != nil {
			return err
		}
		for _, ip := range result.IPs {
			a, _ := netip.AddrFromSlice(ip.Address.IP)
			p.addrs = append(p.addrs, a.Unmap())
		}
		return nil
	})
	slices.SortFunc(p.addrs, func(a, b netip.Addr) int { return cmp.Compare(a.BitLen(), b.BitLen()) })
	k.pods[name] = p
	return p, err
}

// put gives the API server objects.
func (k *cluster) put(objects ...runtime.Object) { k.api.Put(objects...) }

// start runs the contender's daemons on every node.
func (k *cluster) start() error {
	if k.contender.daemons == nil {
		return nil
	}
	for _, n := range k.nodes {
		programs, err := k.contender.daemons(n)
		if err != nil {
			return err
		}
		n.served = len(programs) > 0
		for i, argv := range programs {
			d, err := startDaemon(n, filepath.Join(n.dir, fmt.Sprintf("daemon%d.log", i)), argv)
			if err != nil {
				return err
			}
			k.daemons = append(k.daemons, d)
		}
	}
	return nil
}

// ready waits until a client gets an answer on every course, and the daemons have come to rest and put nothing off any more.
func (k *cluster) ready(ctx context.Context, courses ...course) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for _, c := range courses {
		if err := k.answers(ctx, c); err != nil {
			return err
		}
	}
	for _, d := range k.daemons {
		if err := d.waitIdle(ctx, 200*time.Millisecond); err != nil {
			return err
		}
	}
	for _, n := range k.nodes {
		for n.served && k.contender.settled != nil {
			settled, err := k.contender.settled(n)
			if err == nil && !settled {
				err = waitOr(ctx, 20*time.Millisecond)
			}
			if err != nil {
				return fmt.Errorf("%s, %s does not settle: %w", k.contender.name, n.name, err)
			}
			if settled {
				break
			}
		}
	}
	return nil
}

func waitOr(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

func (k *cluster) answers(ctx context.Context, c course) error {
	for {
		err := try(c)
		if err == nil {
			return nil
		}
		for _, d := range k.daemons {
			if failure := d.failed(); failure != nil {
				return failure
			}
		}
		select {
		case <-ctx.Done():
			for _, d := range k.daemons {
				err = errors.Join(err, errors.New(d.lastWords()))
			}
			return fmt.Errorf("%s, %s: %w", k.contender.name, c.name, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// close ends everything.
func (k *cluster) close() error {
	for _, d := range k.daemons {
		d.stop()
	}
	var errs []error
	if k.fixture != nil {
		k.fixture.close()
	}
	if k.fabric != nil {
		errs = append(errs, k.fabric.close())
	}
	for _, n := range k.nodes {
		// EINVAL, ENOENT: nothing was mounted, because the contender is another one.
		if err := unix.Unmount(n.bpffs(), unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", n.bpffs(), err))
		}
	}
	return errors.Join(append(errs, os.RemoveAll(k.dir))...)
}
