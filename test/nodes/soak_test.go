// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/internal/testutil/clustertest"
)

var (
	soakTime = flag.Duration("soak", 0, "how long TestSoak goes on changing things; every change is made once in any case")
	soakSeed = flag.Uint64("soak-seed", 0, "seed of TestSoak's choices; 0 takes another one each time")
)

// TestSoak opens and closes connections by every path while pods, policies, nodes, agents and devices change. Each connection must end
// well, or with an error that a change explains which its path goes through; each dropped packet must have a reason that a change
// explains; and no flow may be left in the tables that nobody will end.
func TestSoak(t *testing.T) {
	for mode, o := range map[string]clustertest.Options{
		"vxlan": {RoutingMode: "vxlan"}, "direct": {RoutingMode: "direct", PodRoutes: true},
	} {
		if mode == "direct" && *soakTime == 0 {
			continue // one mode is enough every day
		}
		t.Run(mode, func(t *testing.T) {
			s := newSoak(t, o)
			s.run(*soakTime)
			s.wantAllPaths()
			s.wantExplained()
			s.wantNoFlows()
		})
	}
}

// soak is a cluster under load. The test's own goroutine makes the changes, workers make the connections.
type soak struct {
	*remote
	t    *testing.T
	rand *rand.Rand
	// cut is the pod that a policy isolates for a while.
	cut   *clustertest.Pod
	paths []*path
	// drops are each node's at the last look; excused are the reasons that changes up to now explain.
	drops   map[string]map[string]uint64
	excused map[string]bool

	mu      sync.Mutex
	addrs   map[*clustertest.Node][]netip.Addr
	changes []*change
	active  map[int]time.Time // connections that are open, by number: since when
	ended   []connection
	opened  int
	over    bool
}

// change is something that happens to the cluster, and what it may do to connections meanwhile.
type change struct {
	name       string
	start, end time.Time // end is zero while it goes on
	affects    func(*path) bool
}

// connection is one that has ended. Err is nil if every question was answered as it should be.
type connection struct {
	path          *path
	local, remote netip.AddrPort
	start, end    time.Time
	err           error
}

func newSoak(t *testing.T, o clustertest.Options) *soak {
	t.Helper()
	seed := *soakSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d", seed)
	s := &soak{
		remote: newRemote(t, o), t: t, rand: rand.New(rand.NewPCG(seed, 0)), drops: map[string]map[string]uint64{}, excused: map[string]bool{},
		addrs: map[*clustertest.Node][]netip.Addr{}, active: map[int]time.Time{},
	}
	s.makePaths()
	for _, n := range s.Nodes() {
		s.noteAddrs(n)
		s.drops[n.Name] = s.Drops(n)
	}
	// A pod's own stack looks for routers and reports its multicast groups when its device comes up.
	s.excuse("multicast", "invalid_nd")
	return s
}

func (s *soak) noteAddrs(n *clustertest.Node) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.addrs[n] = n.Addrs
}

// addr is a node's address of a family. Other than that of the Node it may be asked for by workers.
func (s *soak) addr(n *clustertest.Node, v6 bool) netip.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.addrs[n][map[bool]int{false: 0, true: 1}[v6]]
}

// workers is how many connections are open at a time.
const workers = 8

// run changes things under load for at least that long, each at least once, in a random order.
func (s *soak) run(atLeast time.Duration) {
	s.t.Helper()
	var group sync.WaitGroup
	seeds := s.rand.Uint64()
	for i := range workers {
		group.Go(func() { s.work(rand.New(rand.NewPCG(seeds, uint64(i)))) })
	}
	defer func() {
		s.mu.Lock()
		s.over = true
		s.mu.Unlock()
		group.Wait() // bounded, because every operation on a socket is
	}()
	begin := time.Now()
	s.load(5 * workers)
	s.wantDrops("before any change")
	for round := 0; round == 0 || time.Since(begin) < atLeast; round++ {
		kinds := s.kinds()
		s.rand.Shuffle(len(kinds), func(i, j int) { kinds[i], kinds[j] = kinds[j], kinds[i] })
		for _, kind := range kinds {
			s.make(kind)
		}
	}
}

// make makes a change and waits until what it may have affected is over.
func (s *soak) make(k kind) {
	s.t.Helper()
	c := &change{name: k.name, start: time.Now(), affects: k.affects}
	s.mu.Lock()
	s.changes = append(s.changes, c)
	s.mu.Unlock()
	s.excuse(k.drops...)
	k.make()
	s.WaitSettled()
	s.mu.Lock()
	c.end = time.Now()
	s.mu.Unlock()
	s.outlive(c.end)
	s.load(workers)
	s.wantDrops(k.name)
	for _, reason := range k.never {
		delete(s.excused, reason)
	}
}

func (s *soak) excuse(reasons ...string) {
	for _, r := range reasons {
		s.excused[r] = true
	}
}

// load waits until that many more connections have ended.
func (s *soak) load(connections int) {
	s.t.Helper()
	count := func() int {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.ended)
	}
	before := count()
	s.Eventually(fmt.Sprintf("%d connections end", connections), func() bool { return count() >= before+connections })
}

// outlive waits until no connection is open any more that was before then.
func (s *soak) outlive(then time.Time) {
	s.t.Helper()
	s.Eventually("connections from before a change end", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, since := range s.active {
			if since.Before(then) {
				return false
			}
		}
		return true
	})
}

// wantDrops requires a known cause for every reason under which packets have been dropped since the last call.
func (s *soak) wantDrops(when string) {
	s.t.Helper()
	for _, n := range s.Nodes() {
		now := s.Drops(n)
		for reason, packets := range now {
			if before := s.drops[n.Name][reason]; packets > before && !s.excused[reason] {
				s.t.Errorf("%s: %s dropped %d packets as %s, which no change explains", when, n.Name, packets-before, reason)
			}
		}
		s.drops[n.Name] = now
	}
}

// explain returns the changes that may have made a connection fail.
func (s *soak) explain(c connection) (names []string) {
	for _, ch := range s.changes {
		if ch.affects != nil && ch.affects(c.path) && c.start.Before(ch.end) && c.end.After(ch.start) {
			names = append(names, ch.name)
		}
	}
	return names
}

// wantExplained requires a change that explains it for every connection that failed.
func (s *soak) wantExplained() {
	s.t.Helper()
	explained := map[string]int{}
	unexplained := 0
	for _, c := range s.ended {
		if c.err == nil {
			continue
		}
		if names := s.explain(c); len(names) > 0 {
			explained[strings.Join(names, ", ")]++
			continue
		}
		if unexplained++; unexplained <= 20 {
			s.t.Errorf("%s, %v to %v, open for %v from %v: %v; no change explains it. At that time: %q", c.path.name, c.local, c.remote,
				c.end.Sub(c.start).Round(time.Millisecond), c.start.Format(time.StampMilli), c.err, s.meanwhile(c))
		}
	}
	s.t.Logf("%d connections by %d paths; failed and explained: %v; not explained: %d", len(s.ended), len(s.paths), explained, unexplained)
	for _, ch := range s.changes {
		s.t.Logf("%s to %s: %s", ch.start.Format(time.StampMilli), ch.end.Format(time.StampMilli), ch.name)
	}
}

// meanwhile are all changes during the life of a connection.
func (s *soak) meanwhile(c connection) (names []string) {
	for _, ch := range s.changes {
		if c.start.Before(ch.end) && c.end.After(ch.start) {
			names = append(names, ch.name)
		}
	}
	return names
}

// wantAllPaths requires that each path was taken, and worked.
func (s *soak) wantAllPaths() {
	s.t.Helper()
	worked := map[*path]bool{}
	for _, c := range s.ended {
		worked[c.path] = worked[c.path] || c.err == nil
	}
	for _, p := range s.paths {
		if !worked[p] {
			s.t.Errorf("no connection of %s ended well", p.name)
		}
	}
}

// Flows that nobody ends any more are kept for 2 h 10 min (TCP that looks alive), others for at most 5 minutes.
const (
	closedAreGone = 5*time.Minute + 10*time.Second
	allAreGone    = 3 * time.Hour
)

// wantNoFlows requires that every connection has left the flow tables after the time that ended ones may stay, but for those that could not
// take leave because of a change; and that after a longer time nothing is left.
func (s *soak) wantNoFlows() {
	s.t.Helper()
	cutOff := map[netip.AddrPort]bool{}
	for _, c := range s.ended {
		if len(s.explain(c)) > 0 {
			cutOff[c.local] = true
		}
	}
	leaked := map[string][]string{}
	defer func() {
		if len(leaked) > 0 {
			s.t.Logf("flows that stay: %v", leaked)
		}
	}()
	// Sockets that were closed while their packets were lost go on taking leave.
	s.Eventually("flows of connections that have ended go from the tables", func() bool {
		clear(leaked)
		for _, n := range s.Nodes() {
			s.SweepAhead(n, closedAreGone)
			for _, f := range s.Flows(n) {
				if !cutOff[f.Source] {
					leaked[n.Name] = append(leaked[n.Name], fmt.Sprintf("%s %v to %v %s (backend %v, source %v)", f.Protocol, f.Source, f.Destination, f.State, f.Backend, f.TranslatedSource))
				}
			}
		}
		return len(leaked) == 0
	})
	left := map[string]int{}
	for _, n := range s.Nodes() {
		s.SweepAhead(n, allAreGone)
		left[n.Name] = s.FlowEntries(n)
	}
	if diff := cmp.Diff(map[string]int{"n1": 0, "n2": 0, "n3": 0}, left); diff != "" {
		s.t.Errorf("entries in the flow tables in the end (-want +got):\n%s", diff)
	}
}

// kind is a change that can be made, and what it explains.
type kind struct {
	name    string
	make    func()
	affects func(*path) bool
	// drops are the reasons that packets may be dropped for from now on; never those of them that end with the change.
	drops, never []string
}

// through says of paths whether they go through a node.
func through(n *clustertest.Node) func(*path) bool {
	return func(p *path) bool { return slices.Contains(p.nodes, n) }
}
