// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/pins"
)

// entries counts what the four maps of hostPorts hold.
func hostPortEntries(t *testing.T, d *Datapath) (n int) {
	t.Helper()
	var (
		f bpf.FrontendKey
		s bpf.Service
		k bpf.BackendKey
		b bpf.Backend
		m bpf.ServiceBackend
		v uint32
	)
	for it := d.Maps.Services.Iterate(); it.Next(&f, &s); {
		n++
	}
	for it := d.Maps.Backends.Iterate(); it.Next(&k, &b); {
		n++
	}
	for it := d.Maps.ServiceBackends.Iterate(); it.Next(&m, &v); {
		n++
	}
	return n
}

func TestM3_HostPortInTheMaps(t *testing.T) {
	ns, cfg := place(t)
	all := ensure(t, ns, cfg)
	d, err := pins.Open(cfg)
	must(t, err)
	defer d.Close()
	for name, host := range map[string]netip.Addr{"IPv4": netip.IPv4Unspecified(), "IPv6": netip.MustParseAddr("::1")} {
		t.Run(name, func(t *testing.T) {
			to := netip.AddrPortFrom(netip.MustParseAddr("10.0.0.5"), 80)
			if host.Is6() {
				to = netip.AddrPortFrom(netip.MustParseAddr("fd00::5"), 80)
			}
			p := pins.HostPort{Frontend: bpf.NewFrontendKey(unix.IPPROTO_UDP, host, 53), Backend: to}
			var err error
			p.ID, err = d.FreeHostPortID(p.Frontend)
			must(t, err)
			if !pins.IsHostPort(p.ID) {
				t.Errorf("id = %d, want one from %d on", p.ID, bpf.HostPortFirst)
			}
			if second, err := d.FreeHostPortID(p.Frontend, p.ID); err != nil || second == p.ID {
				t.Errorf("second id = %d, %v, want another than the first", second, err)
			}
			for range 2 { // the second time it is there already
				must(t, d.PutHostPort(p))
				must(t, d.CheckHostPort(p))
			}
			if got := hostPortEntries(t, all); got != 3 {
				t.Errorf("maps have %d entries, want 3", got)
			}
			if to, ok, err := d.HostPortBackend(p.ID); err != nil || !ok || to != p.Backend {
				t.Errorf("HostPortBackend = %s, %v, %v, want %s", to, ok, err, p.Backend)
			}
			other := p
			other.Backend = netip.AddrPortFrom(to.Addr(), 81)
			if err := d.PutHostPort(other); !errors.Is(err, pins.ErrHostPortID) {
				t.Errorf("PutHostPort with a taken id = %v, want ErrHostPortID", err)
			}
			must(t, d.DeleteHostPort(other)) // not this one: it stays
			must(t, d.CheckHostPort(p))
			other.ID, err = d.FreeHostPortID(p.Frontend)
			must(t, err)
			if err := d.PutHostPort(other); !errors.Is(err, pins.ErrFrontendTaken) {
				t.Errorf("PutHostPort with a taken frontend = %v, want ErrFrontendTaken", err)
			}
			must(t, d.DeleteHostPort(other)) // what the failure has left
			must(t, d.CheckHostPort(p))
			epoch := func() (e uint32) { must(t, all.Maps.ServiceEpochs.Lookup(p.ID, &e)); return e }
			before, id := epoch(), p.ID
			p.ID = 0 // found by its frontend
			must(t, d.DeleteHostPort(p))
			must(t, d.DeleteHostPort(p))
			p.ID = id
			if got := hostPortEntries(t, all); got != 0 || epoch() == before {
				t.Errorf("maps have %d entries after the deletion and the epoch is %d, want none and not %d", got, epoch(), before)
			}
		})
	}
}

// Of many who want one frontend at once, one gets it, and no id has two owners.
func TestM3_HostPortRace(t *testing.T) {
	ns, cfg := place(t)
	d := ensure(t, ns, cfg)
	const pods = 8
	for round := range 20 {
		f := bpf.NewFrontendKey(unix.IPPROTO_TCP, netip.IPv4Unspecified(), uint16(8000+round))
		var (
			wg      sync.WaitGroup
			mu      sync.Mutex
			winners []pins.HostPort
		)
		for i := range pods {
			wg.Go(func() {
				p := pins.HostPort{Frontend: f, Backend: netip.MustParseAddrPort(fmt.Sprintf("10.0.%d.%d:80", round, i))}
				for {
					var err error
					if p.ID, err = d.FreeHostPortID(f); err != nil {
						t.Error(err)
						return
					}
					switch err = d.PutHostPort(p); {
					case errors.Is(err, pins.ErrHostPortID):
						continue
					case errors.Is(err, pins.ErrFrontendTaken):
						err = d.DeleteHostPort(p)
					case err == nil:
						mu.Lock()
						winners = append(winners, p)
						mu.Unlock()
					}
					if err != nil {
						t.Error(err)
					}
					return
				}
			})
		}
		wg.Wait()
		if len(winners) != 1 || d.CheckHostPort(winners[0]) != nil {
			t.Fatalf("round %d: winners = %v, want one, whole", round, winners)
		}
	}
	if got := hostPortEntries(t, d); got != 3*20 {
		t.Errorf("maps have %d entries, want %d", got, 3*20)
	}
}

// A service's frontend is nobody's to take or to delete.
func TestM3_HostPortLeavesServicesAlone(t *testing.T) {
	ns, cfg := place(t)
	d := ensure(t, ns, cfg)
	f := bpf.NewFrontendKey(unix.IPPROTO_TCP, netip.IPv4Unspecified(), 30080)
	want := bpf.Service{Id: 5, List: [2]uint32{1, 1}}
	must(t, d.Maps.Services.Update(&f, &want, ebpf.UpdateAny))
	p := pins.HostPort{ID: bpf.HostPortFirst, Frontend: f, Backend: netip.MustParseAddrPort("10.0.0.5:80")}
	if err := d.PutHostPort(p); !errors.Is(err, pins.ErrFrontendTaken) {
		t.Errorf("PutHostPort = %v, want ErrFrontendTaken", err)
	}
	for _, id := range []uint32{p.ID, 0, 5} {
		p.ID = id
		must(t, d.DeleteHostPort(p))
	}
	if got, ok, err := d.LookupFrontend(f); err != nil || !ok || got != want {
		t.Errorf("frontend = %+v, %v, %v, want %+v", got, ok, err, want)
	}
}
