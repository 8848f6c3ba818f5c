// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/pkg/bpf"
)

// Size of the cluster that TestTenThousandServices loads.
const (
	manyServices   = 10000
	manyEndpoints  = 10 // of each
	servicesAFile  = 100
	loadBound      = 3 * time.Minute // on a machine that is busy with other things
	changeBound    = 10 * time.Second
	changedService = 4242
)

// manyAddr is the cluster address of a service.
func manyAddr(service int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 97, byte(service / 256), byte(service % 256)})
}

// manyBackend is an endpoint of a service.
func manyBackend(service, endpoint int) netip.AddrPort {
	n := service*manyEndpoints + endpoint
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(128 + n>>16), byte(n >> 8), byte(n)}), 8080)
}

// writeServices writes the manifest of the services from first on. The endpoint called without is left out.
func writeServices(t *testing.T, dir string, first int, without netip.AddrPort) {
	t.Helper()
	var b strings.Builder
	for s := first; s < first+servicesAFile; s++ {
		fmt.Fprintf(&b, "---\n{apiVersion: v1, kind: Service, metadata: {name: s%d, namespace: default}, spec: {clusterIPs: [%s], ports: [{port: 80}]}}\n",
			s, manyAddr(s))
		fmt.Fprintf(&b, "---\n{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4, ports: [{name: \"\", port: 8080}],\n"+
			"  metadata: {name: s%d, namespace: default, labels: {kubernetes.io/service-name: s%d}}, endpoints: [", s, s)
		for e := range manyEndpoints {
			if a := manyBackend(s, e); a != without {
				fmt.Fprintf(&b, "{addresses: [%s], nodeName: other},", a.Addr())
			}
		}
		b.WriteString("]}\n")
	}
	name := filepath.Join(dir, fmt.Sprintf("services-%d.yaml", first/servicesAFile))
	if err := os.WriteFile(name+".new", []byte(b.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(name+".new", name); err != nil {
		t.Fatal(err)
	}
}

// TestTenThousandServices loads 10 000 services with 10 endpoints each from manifests into maps of the default sizes, and takes one endpoint
// away: only that service's entries change. The times are logged; what must hold of them is docs/benchmarks.md's business.
func TestTenThousandServices(t *testing.T) {
	n := nodetest.New(t)
	manifests := t.TempDir()
	for first := 0; first < manyServices; first += servicesAFile {
		writeServices(t, manifests, first, netip.AddrPort{})
	}
	began := time.Now()
	p := command(t, n, manifests, "--resync", "1h")
	n.NS.Do(func() {
		if err := p.cmd.Start(); err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(p.kill)
	within(t, loadBound, "every service to be there", func() bool {
		s, ok := service(t, n.DP, manyAddr(manyServices-1), 80)
		return ok && s.Count == [2]uint32{manyEndpoints, manyEndpoints} && missingServices(t, n) == 0
	})
	t.Logf("%d services with %d endpoints each are in the maps %v after the agent's start", manyServices, manyEndpoints, time.Since(began).Round(time.Millisecond))
	within(t, changeBound, "the round to end", func() bool { return p.writes() > manyServices*manyEndpoints })
	if faults := p.status().Last.Faults; len(faults) != 0 {
		t.Errorf("faults = %v, want none", faults)
	}

	before, writes := p.status().Rounds, p.writes()
	gone := manyBackend(changedService, 3)
	began = time.Now()
	writeServices(t, manifests, changedService-changedService%servicesAFile, gone)
	within(t, changeBound, "the service to lose the endpoint", func() bool {
		s, ok := service(t, n.DP, manyAddr(changedService), 80)
		member := bpf.NewServiceBackend(s.Id, gone)
		return ok && s.Count == [2]uint32{manyEndpoints - 1, manyEndpoints - 1} && n.DP.Maps.ServiceBackends.Lookup(&member, new(uint32)) != nil
	})
	t.Logf("one endpoint is gone from the maps %v after its manifest changed", time.Since(began).Round(time.Millisecond))
	within(t, changeBound, "the round to end", func() bool { return p.status().Rounds > before })
	// The freed slot is filled by the last one, and the frontend, the last slot and the member follow.
	if got := p.writes() - writes; got == 0 || got > 8 {
		t.Errorf("%d map entries were written for one endpoint, want a handful", got)
	}
}

// missingServices counts the services without a frontend.
func missingServices(t *testing.T, n *nodetest.Node) (missing int) {
	t.Helper()
	for s := range manyServices {
		if _, ok := service(t, n.DP, manyAddr(s), 80); !ok {
			missing++
		}
	}
	return missing
}

// within waits for something that takes longer than eventually allows.
func within(t *testing.T, bound time.Duration, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(bound); !ok(); {
		if time.Now().After(end) {
			t.Fatalf("waited %v for %s", bound, what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}
