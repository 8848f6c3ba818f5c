// SPDX-License-Identifier: Apache-2.0

package attach

import (
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
)

// linkCounts is what BenchmarkDelete has above the filters: nothing, from_pod, or both.
var linkCounts = []struct {
	name  string
	links int
}{{"filters", 0}, {"one-link", 1}, {"two-links", 2}}

// BenchmarkDelete deletes pods' devices that have filters and none, one or two tcx links above them, in turns: one at a time, and 20 in
// parallel, as on a node that is drained. The metrics are medians, in milliseconds, for one device, and until the last of the 20 is gone.
func BenchmarkDelete(b *testing.B) {
	n := nodetest.New(b)
	t := newTCX(b, n)
	var one, many [3][]float64
	for i := range b.N {
		for turn := range linkCounts {
			at := (i + turn) % len(linkCounts)
			one[at] = append(one[at], deleteAll(b, n, t, linkCounts[at].links, 1))
			many[at] = append(many[at], deleteAll(b, n, t, linkCounts[at].links, 20))
		}
	}
	b.ReportMetric(0, "ns/op")
	for at, c := range linkCounts {
		b.ReportMetric(median(one[at]), c.name+"-ms")
		b.ReportMetric(median(many[at]), c.name+"-20-ms")
	}
}

// deleteAll makes devices and returns how long it takes until they are gone, all at once.
func deleteAll(b *testing.B, n *nodetest.Node, t *tcx, links, count int) float64 {
	b.Helper()
	indexes := devices(b, n, count)
	var attached []link.Link
	n.NS.Do(func() {
		for _, index := range indexes {
			if err := n.DP.AttachPod(index); err != nil {
				b.Fatal(err)
			}
			for _, o := range []link.TCXOptions{
				{Program: t.fromPod, Attach: ebpf.AttachTCXIngress}, {Program: t.toPod, Attach: ebpf.AttachTCXEgress},
			}[:links] {
				o.Interface = index
				made, err := link.AttachTCX(o)
				if errors.Is(err, ebpf.ErrNotSupported) {
					b.Skip("this kernel has no tcx")
				}
				if err != nil {
					b.Fatal(err)
				}
				attached = append(attached, made)
			}
		}
	})
	var ready, done sync.WaitGroup
	start := make(chan struct{})
	errs := make([]error, count)
	for i, index := range indexes {
		ready.Add(1)
		done.Go(func() {
			n.NS.Do(func() {
				ready.Done()
				<-start
				errs[i] = netlink.LinkDel(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index}})
			})
		})
	}
	ready.Wait()
	began := time.Now()
	close(start)
	done.Wait()
	took := time.Since(began)
	for _, l := range slices.Backward(attached) {
		errs = append(errs, l.Close())
	}
	if err := errors.Join(errs...); err != nil {
		b.Fatal(err)
	}
	return float64(took) / 1e6
}
