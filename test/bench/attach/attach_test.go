// SPDX-License-Identifier: Apache-2.0

package attach

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/pkg/bpf"
)

// pods is how many devices one iteration attaches to.
const pods = 50

// kind is a way to attach from_pod and to_pod to a device, and to undo it. Both are called in the node's namespace.
type kind struct {
	name   string
	attach func(ifindex int) error
	detach func(ifindex int) error
}

func kinds(b *testing.B, n *nodetest.Node) []kind {
	tcx := newTCX(b, n)
	return []kind{
		{"filter", n.DP.AttachPod, func(ifindex int) error {
			return netlink.QdiscDel(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
				LinkIndex: ifindex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
			}})
		}},
		{"tcx", tcx.attach, tcx.detach},
	}
}

// tcx attaches the programs that the node's datapath has pinned, as links.
type tcx struct {
	fromPod, toPod *ebpf.Program

	mu    sync.Mutex
	links map[int][]link.Link
}

func newTCX(b *testing.B, n *nodetest.Node) *tcx {
	b.Helper()
	open := func(name string) *ebpf.Program {
		p, err := ebpf.LoadPinnedProgram(filepath.Join(n.Config.BPFFS, "progs", n.DP.Build(), name), nil)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { p.Close() })
		return p
	}
	t := &tcx{fromPod: open(bpf.ProgFromPod), toPod: open(bpf.ProgToPod), links: map[int][]link.Link{}}
	b.Cleanup(func() {
		for ifindex := range t.links {
			if err := t.detach(ifindex); err != nil {
				b.Error(err)
			}
		}
	})
	return t
}

func (t *tcx) attach(ifindex int) error {
	in, err := link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: t.fromPod, Attach: ebpf.AttachTCXIngress})
	if err != nil {
		return fmt.Errorf("attach from_pod: %w", err)
	}
	out, err := link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: t.toPod, Attach: ebpf.AttachTCXEgress})
	if err != nil {
		return errors.Join(fmt.Errorf("attach to_pod: %w", err), in.Close())
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.links[ifindex] = []link.Link{in, out}
	return nil
}

func (t *tcx) detach(ifindex int) error {
	t.mu.Lock()
	links := t.links[ifindex]
	delete(t.links, ifindex)
	t.mu.Unlock()
	var errs []error
	for _, l := range links {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// devices makes host-side devices as pods have them. Deleting one deletes its other end.
func devices(b *testing.B, n *nodetest.Node, count int) []int {
	b.Helper()
	var indexes []int
	n.NS.Do(func() {
		for i := range count {
			attrs := netlink.NewLinkAttrs()
			attrs.Name = fmt.Sprintf("host%d", i)
			veth := netlink.NewVeth(attrs)
			veth.PeerName = fmt.Sprintf("pod%d", i)
			if err := netlink.LinkAdd(veth); err != nil {
				b.Fatal(err)
			}
			l, err := netlink.LinkByName(attrs.Name)
			if err != nil {
				b.Fatal(err)
			}
			indexes = append(indexes, l.Attrs().Index)
		}
	})
	return indexes
}

// BenchmarkAttach: one iteration attaches both programs to 50 devices. p50 and slowest are of one device, in milliseconds.
func BenchmarkAttach(b *testing.B) {
	n := nodetest.New(b)
	indexes := devices(b, n, pods)
	for _, k := range kinds(b, n) {
		for _, way := range []struct {
			name string
			run  func(*testing.B, *nodetest.Node, kind, []int) []time.Duration
		}{{"one by one", serial}, {"50 in parallel", parallel}} {
			b.Run(k.name+"/"+way.name, func(b *testing.B) {
				var took []time.Duration
				b.ResetTimer()
				for range b.N {
					took = append(took, way.run(b, n, k, indexes)...)
					b.StopTimer()
					n.NS.Do(func() {
						for _, i := range indexes {
							if err := k.detach(i); err != nil {
								b.Fatalf("detach: %v", err)
							}
						}
					})
					b.StartTimer()
				}
				slices.Sort(took)
				b.ReportMetric(float64(took[len(took)/2])/1e6, "ms/p50")
				b.ReportMetric(float64(took[len(took)-1])/1e6, "ms/slowest")
			})
		}
	}
}

// attached attaches once, and says how long it took. A kernel without the kind skips b.
func attached(b *testing.B, k kind, ifindex int) (time.Duration, error) {
	began := time.Now()
	err := k.attach(ifindex)
	return time.Since(began), err
}

func check(b *testing.B, k kind, err error) {
	b.Helper()
	if errors.Is(err, ebpf.ErrNotSupported) {
		b.Skipf("this kernel has no %s", k.name)
	}
	if err != nil {
		b.Fatalf("attach by %s: %v", k.name, err)
	}
}

func serial(b *testing.B, n *nodetest.Node, k kind, indexes []int) []time.Duration {
	b.Helper()
	var took []time.Duration
	n.NS.Do(func() {
		for _, i := range indexes {
			d, err := attached(b, k, i)
			check(b, k, err)
			took = append(took, d)
		}
	})
	return took
}

// parallel starts all attaches at once, from threads that are in the node's namespace already.
func parallel(b *testing.B, n *nodetest.Node, k kind, indexes []int) []time.Duration {
	b.Helper()
	b.StopTimer()
	took, errs := make([]time.Duration, len(indexes)), make([]error, len(indexes))
	var ready, done sync.WaitGroup
	start := make(chan struct{})
	for at, i := range indexes {
		ready.Add(1)
		done.Go(func() {
			n.NS.Do(func() {
				ready.Done()
				<-start
				took[at], errs[at] = attached(b, k, i)
			})
		})
	}
	ready.Wait()
	b.StartTimer()
	close(start)
	done.Wait()
	check(b, k, errors.Join(errs...))
	return took
}
