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
	"github.com/containernetworking/cni/pkg/types"
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
	attached  []attachment
}

// attachment is a pod that ADD has been asked for.
type attachment struct {
	node *clusterNode
	pod  *libcni.RuntimeConf
}

// clusterNode is a machine of a cluster.
type clusterNode struct {
	place
	name   string
	number int
	ranges []string // of its pods
	dir    string
	api    *apitest.Server
	filled *placeholders
	chain  *chain // of its conflist, for what measures the plugins
	cni    *libcni.CNIConfig
	conf   *libcni.NetworkConfigList
	served bool // a daemon runs here
}

func (n *clusterNode) bpffs() string { return filepath.Join(n.dir, "bpf") }

// podRanges are the ranges of a node's pods, of one family or both.
func podRanges(node, families int) []string {
	return []string{fmt.Sprintf("10.244.%d.0/24", node), fmt.Sprintf("fd00:244:%d::/64", node)}[:families]
}

// placeholders are what the contender's templates know of a node.
func (n *clusterNode) placeholders(built string) (*placeholders, error) {
	ranges, err := json.Marshal(ranges(n.ranges))
	if err != nil {
		return nil, err
	}
	p := &placeholders{
		Node: n.name, Number: n.number, Address4: n.addr(false).String(), Address6: n.addr(true).String(), NIC: "eth0", MTU: fabricMTU,
		PodCIDR4: n.ranges[0], Ranges: string(ranges), ClusterCIDR4: clusterPods4, ClusterCIDR6: clusterPods6,
		ServiceCIDR4: serviceCIDR4, ServiceCIDR6: serviceCIDR6, APIServer: n.api.Addr(), Kubeconfig: n.api.Kubeconfig(), Dir: n.dir, Built: built,
	}
	if len(n.ranges) > 1 {
		p.PodCIDR6 = n.ranges[1]
	}
	return p, nil
}

// newCluster makes a cluster without pods, whose nodes have pod ranges of so many families. Its daemons are started later. The name is its
// own.
func (b *bench) newCluster(name string, c *contender, nodes, families int) (_ *cluster, err error) {
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
	for number := 1; number <= nodes; number++ {
		n, err := k.addNode(number, podRanges(number, families))
		if err != nil {
			return nil, err
		}
		k.nodes = append(k.nodes, n)
	}
	k.api.Put(clusterObjects(k.nodes)...)
	if !c.network() {
		k.pods["remote"] = k.nodes[1].place
	}
	if c.overlay {
		k.pods["remote"], err = k.overlay()
	}
	if !c.Routes {
		return k, err
	}
	for _, from := range k.nodes {
		for _, to := range k.nodes {
			for i, prefix := range to.ranges {
				if from != to {
					err = errors.Join(err, route(from.path, prefix, to.addrs[i]))
				}
			}
		}
	}
	return k, err
}

func (k *cluster) addNode(number int, ranges []string) (*clusterNode, error) {
	n := &clusterNode{name: fmt.Sprintf("node%d", number), number: number, ranges: ranges}
	n.dir = filepath.Join(k.dir, n.name)
	if err := os.Mkdir(n.dir, 0o755); err != nil {
		return nil, err
	}
	var err error
	if n.place, err = k.fabric.attach(n.name, uint32(10+number)); err != nil {
		return nil, err
	}
	if !k.contender.network() {
		return n, nil
	}
	err = netns.Do(n.path, func() error { n.api = k.api.Another(); return nil })
	if err != nil {
		return nil, err
	}
	if n.filled, err = n.placeholders(k.bench.node.bin); err != nil {
		return nil, err
	}
	bin, err := k.contender.bin(n.filled)
	if err != nil {
		return nil, err
	}
	text, err := k.contender.install(n.filled)
	if err != nil {
		return nil, err
	}
	if n.chain, err = parseChain(text, bin); err != nil {
		return nil, err
	}
	n.chain.in = n.path
	if n.conf, err = libcni.NetworkConfFromBytes(text); err != nil {
		return nil, err
	}
	n.cni = libcni.NewCNIConfigWithCacheDir([]string{bin}, filepath.Join(n.dir, "cni"), nil)
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
	conf := &libcni.RuntimeConf{
		ContainerID: n.name + "-" + name, NetNS: p.path, IfName: "eth0",
		Args: [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "default"}, {"K8S_POD_NAME", name}},
	}
	k.attached = append(k.attached, attachment{n, conf})
	raw, err := n.add(ctx, k.contender, conf)
	if err != nil {
		return p, fmt.Errorf("ADD of %s on %s: %w", name, n.name, err)
	}
	result, err := types100.NewResultFromResult(raw)
	if err != nil {
		return p, err
	}
	for _, ip := range result.IPs {
		a, _ := netip.AddrFromSlice(ip.Address.IP)
		p.addrs = append(p.addrs, a.Unmap())
	}
	slices.SortFunc(p.addrs, func(a, b netip.Addr) int { return cmp.Compare(a.BitLen(), b.BitLen()) })
	k.pods[name] = p
	return p, nil
}

// add runs ADD on the node; where the plugin needs daemons that have just been started, until it succeeds, as a runtime would.
func (n *clusterNode) add(ctx context.Context, c *contender, pod *libcni.RuntimeConf) (result types.Result, err error) {
	ctx, cancel := context.WithTimeout(ctx, c.wait())
	defer cancel()
	for {
		err := netns.Do(n.path, func() (err error) {
			result, err = n.cni.AddNetworkList(ctx, n.conf, pod)
			if err != nil && c.DaemonsFirst {
				_ = n.cni.DelNetworkList(ctx, n.conf, pod) // what is wrong, ADD says
			}
			return err
		})
		if err == nil || !c.DaemonsFirst || ctx.Err() != nil {
			return result, err
		}
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// deletePods runs DEL of all pods; their namespaces stay.
func (k *cluster) deletePods() (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second) // also when the run is interrupted
	defer cancel()
	for _, a := range k.attached {
		err = errors.Join(err, netns.Do(a.node.path, func() error { return a.node.cni.DelNetworkList(ctx, a.node.conf, a.pod) }))
	}
	k.attached = nil
	return err
}

// put gives the API server objects.
func (k *cluster) put(objects ...runtime.Object) { k.api.Put(objects...) }

// start runs the contender's daemons on every node.
func (k *cluster) start() error {
	for _, n := range k.nodes {
		programs, err := k.contender.programs(n.filled)
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
	ctx, cancel := context.WithTimeout(ctx, k.contender.wait())
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
	return k.settle(ctx)
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
			return fmt.Errorf("%s, %s: %w", k.contender.Name, c.name, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// close ends everything.
func (k *cluster) close() error {
	var errs []error
	if k.contender.oneNode { // its state is not in the node's directory, but where the next one's will be
		errs = append(errs, k.deletePods())
	}
	for _, d := range k.daemons {
		d.stop()
	}
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
