// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"context"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
)

// Attachment is one interface of one container. ContainerID and IfName name it and are always needed.
type Attachment struct {
	ContainerID string // CNI_CONTAINERID
	IfName      string // CNI_IFNAME
	// Netns is CNI_NETNS. Add records it, so that GC can look whether the namespace still exists; Del, Check and GC do not need it.
	Netns string
	// PodNamespace and PodName are for people; Add takes them from CNI_ARGS when they are empty.
	PodNamespace, PodName string
}

func (a Attachment) check() error {
	if a.ContainerID == "" || a.IfName == "" {
		return failf(types.ErrInvalidEnvironmentVariables, "CNI_CONTAINERID %q and CNI_IFNAME %q must not be empty", a.ContainerID, a.IfName)
	}
	return nil
}

// Add leases one address of each range set to the attachment, or none at all. Repeating it is safe: the attachment gets the same
// addresses again if they still fit the configuration. Error codes: 4 when the attachment holds a lease for another, still existing
// network namespace, 7 when a requested address is in no range, 11 when a range is exhausted, a requested address is held, there is
// no pod CIDR yet or the lock was not to be had in time, and what LoadConfig put off (2, 4, 6, 7).
func Add(ctx context.Context, c *Config, at Attachment) (*Assignment, error) {
	o, out, err := c.order(at)
	if err != nil {
		return nil, asCNI("read IPAM configuration", err)
	}
	s, err := openStore(ctx, c, o.plan)
	if err != nil {
		return nil, asCNI("open lease state of network "+c.Network, err)
	}
	var addrs []netip.Addr
	err = s.grow(o.plan)
	if err == nil || errors.Is(err, errDamaged) {
		err = s.run(o.plan, func(t *tx) (err error) {
			o.now = c.sys.boottime()
			addrs, out.Repeated, err = t.fulfil(o)
			return err
		})
	}
	if err = errors.Join(err, s.close()); err != nil {
		return nil, asCNI("lease an address of network "+c.Network, err)
	}
	for _, a := range addrs {
		r := o.plan.ranges[o.plan.find(a)]
		out.IPs = append(out.IPs, Assigned{Address: netip.PrefixFrom(a, r.subnet.Bits()), Gateway: r.gateway})
	}
	return out, nil
}

// order turns configuration and attachment into what is asked of the state, and prepares the answer.
func (c *Config) order(at Attachment) (*order, *Assignment, error) {
	p, err := c.ready()
	if err != nil {
		return nil, nil, err
	}
	if err := at.check(); err != nil {
		return nil, nil, err
	}
	wanted, err := p.match(c.requested)
	if err != nil {
		return nil, nil, err
	}
	out := &Assignment{Routes: c.section.Routes}
	if out.DNS, err = readResolvConf(c.section.ResolvConf); err != nil {
		return nil, nil, err
	}
	if at.PodName == "" {
		at.PodNamespace, at.PodName = c.podNamespace, c.podName
	}
	// A path that cannot be looked at now is compared by name later on.
	ns, _ := statNetns(at.Netns)
	o := &order{
		plan:        p,
		wanted:      wanted,
		cooldown:    c.cooldown(),
		strict:      c.section.Strict,
		maxReleased: c.sys.maxReleased,
		lease: Lease{
			ContainerID:  at.ContainerID,
			IfName:       at.IfName,
			Netns:        at.Netns,
			PodNamespace: at.PodNamespace,
			PodName:      at.PodName,
			Time:         c.sys.clock(),
			ns:           ns,
		},
	}
	return o, out, nil
}

// Del ends the attachment's lease. It needs neither valid ranges nor the network namespace, and a lease that is not there is a success.
func Del(ctx context.Context, c *Config, at Attachment) error {
	if err := at.check(); err != nil {
		return err
	}
	return c.withState(ctx, "release addresses of network "+c.Network, func(s *store) error {
		_, err := s.drop(at)
		return err
	})
}

// drop ends one lease and says whether there was one.
func (s *store) drop(at Attachment) (found bool, err error) {
	err = s.run(nil, func(t *tx) error {
		no, l, before, behind := t.findLease(at.ContainerID, at.IfName)
		if found = no != 0; found {
			t.release(no, &l, before, behind, s.sys.boottime())
		}
		return t.err
	})
	return found, err
}

// Check says whether the attachment holds a lease and, if there is a previous result, whether every leased address is in it (the
// prefix length is not compared: the main plugin may have chosen another). Error code ErrNoLease says no.
func Check(ctx context.Context, c *Config, at Attachment, prev []netip.Addr) error {
	if err := at.check(); err != nil {
		return err
	}
	found := false
	err := c.withState(ctx, "check leases of network "+c.Network, func(s *store) error {
		return s.run(nil, func(t *tx) error {
			no, l, _, _ := t.findLease(at.ContainerID, at.IfName)
			found = no != 0
			for _, a := range l.Addresses {
				if len(prev) > 0 && !slices.Contains(prev, a) {
					return failf(ErrNoLease, "%s holds %s, but prevResult has %s", &l, joinAddrs(l.Addresses), joinAddrs(prev))
				}
			}
			return t.err
		})
	})
	if err == nil && !found {
		return failf(ErrNoLease, "container %s interface %s holds no lease of network %s", at.ContainerID, at.IfName, c.Network)
	}
	return err
}

// GCReport says what GC did to the leases that were not listed as valid.
type GCReport struct {
	Freed []Lease
	// Kept are leases that an empty list would have ended although their network namespace still exists.
	Kept []Lease
}

// GC ends every lease whose attachment is not among valid. An empty list may mean "no attachments" as well as "not told" (libcni
// leaves it out in both cases), so it ends only leases whose network namespace is gone. GC goes on after an error.
func GC(ctx context.Context, c *Config, valid []Attachment) (GCReport, error) {
	var report GCReport
	type key struct{ containerID, ifName string }
	keep := map[key]bool{}
	for _, v := range valid {
		keep[key{v.ContainerID, v.IfName}] = true
	}
	err := c.withState(ctx, "collect leases of network "+c.Network, func(s *store) error {
		leases, err := s.leases()
		if err != nil {
			return err
		}
		var errs []error
		for _, l := range leases {
			switch {
			case keep[key{l.ContainerID, l.IfName}]:
			case len(valid) == 0 && (l.Netns == "" || l.netnsExists()):
				report.Kept = append(report.Kept, l)
			default:
				if _, err := s.drop(Attachment{ContainerID: l.ContainerID, IfName: l.IfName}); err != nil {
					errs = append(errs, err)
					continue
				}
				report.Freed = append(report.Freed, l)
			}
		}
		return errors.Join(errs...)
	})
	return report, err
}

// Status returns an error with code 50 when no Add can work: the configuration is wrong, there is no pod CIDR yet, or the state
// directory cannot be written. An exhausted range is not such a case: pods that run are fine, and a node must not become NotReady.
func Status(_ context.Context, c *Config) error {
	if _, err := c.ready(); err != nil {
		return types.NewError(types.ErrPluginNotAvailable, "ADD cannot work: "+err.Error(), "")
	}
	if err := os.MkdirAll(c.dir(), 0o700); err != nil {
		return types.NewError(types.ErrPluginNotAvailable, "ADD cannot work: make lease directory: "+err.Error(), "")
	}
	f, err := os.OpenFile(filepath.Join(c.dir(), "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return types.NewError(types.ErrPluginNotAvailable, "ADD cannot work: open lock: "+err.Error(), "")
	}
	return f.Close()
}

// Leases lists what is leased, ordered by first address. It takes the lock for as long as reading takes.
func Leases(ctx context.Context, c *Config) ([]Lease, error) {
	var out []Lease
	err := c.withState(ctx, "list leases of network "+c.Network, func(s *store) (err error) {
		out, err = s.leases()
		return err
	})
	slices.SortFunc(out, func(a, b Lease) int { return slices.CompareFunc(a.Addresses, b.Addresses, netip.Addr.Compare) })
	return out, err
}

// Networks names the networks that have leases below the run directory, or had some since the boot.
func Networks(run string) ([]string, error) {
	dirs, err := os.ReadDir(filepath.Join(run, "ipam"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, asCNI("list networks with leases", err)
	}
	var out []string
	for _, d := range dirs {
		if d.IsDir() && CheckNetwork(d.Name()) == nil {
			out = append(out, d.Name())
		}
	}
	return out, nil
}

// Existing returns a configuration that is good for what needs no ranges: Leases, Release, Del and GC.
func Existing(run, network string) *Config {
	return &Config{
		Network: network, RunDir: run, PollLock: true, sys: realSystem(),
		fault: failf(types.ErrInvalidNetworkConfig, "network %s is opened without its ranges", network),
	}
}

// Release ends this lease and no other: one that its attachment got since l was read stays. It says whether there was something to end.
func Release(ctx context.Context, c *Config, l Lease) (ended bool, err error) {
	err = c.withState(ctx, "release addresses of network "+c.Network, func(s *store) error {
		return s.run(nil, func(t *tx) error {
			no, have, before, behind := t.findLease(l.ContainerID, l.IfName)
			ended = no != 0 && have.Time.Equal(l.Time) && have.Netns == l.Netns && have.ns == l.ns
			if ended {
				t.release(no, &have, before, behind, s.sys.boottime())
			}
			return t.err
		})
	})
	return ended && err == nil, err
}

// leases reads every lease of the state.
func (s *store) leases() ([]Lease, error) {
	data := make([]byte, s.size())
	if _, err := s.dev.ReadAt(data, 0); err != nil {
		return nil, err
	}
	return salvage(data).leases, nil
}

// withState calls f on the network's state, or not at all when there is none.
func (c *Config) withState(ctx context.Context, doing string, f func(*store) error) error {
	s, err := openStore(ctx, c, nil)
	if errors.Is(err, errNoState) {
		return nil
	}
	if err == nil {
		err = errors.Join(f(s), s.close())
	}
	return asCNI(doing, err)
}
