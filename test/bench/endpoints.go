// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/netns"
)

const endpointsSection = "One endpoint changes: from the API server to a new connection"

// endpointSizes are numbers of services, the moving one among them; one stands for an idle agent, and the last is for the long form:
// kube-proxy takes 20 seconds to install it.
var endpointSizes = []int{1, 1000, 5000}

// serviceMoving is the service whose one endpoint goes from one pod to the other.
var serviceMoving = clusterService{name: "moving", number: 12, target: namePort}

// namePort is where pods say which they are.
const namePort = 9100

// changePause is how long a cluster is left alone between two changes. kube-proxy lets a second pass from one update of its rules to the
// next; a change that comes earlier waits for that, and measures it.
const changePause = 1300 * time.Millisecond

// mover is a cluster with the moving service.
type mover struct {
	*cluster
	at      string    // the pod that has the endpoint
	changed time.Time // the last time
	took    []float64 // ms
	memory  []float64 // MiB
}

// benchEndpoints measures how long it takes until a new connection reaches the one endpoint that has taken another's place, from the event
// that the API server sends on, and the memory of what does it.
func benchEndpoints(ctx context.Context, b *bench) (err error) {
	// The other node's agent is not what is measured, and must not share the processors with the one that is: it is left out where pods are
	// reached without it, and frozen before the first change.
	margay, theirs := b.margay.with("margay", "Margay", "--routing-mode", "direct"), []*contender{b.proxy("nftables").onFirst()}
	for _, other := range b.servingOthers() {
		theirs = append(theirs, other.onFirst())
	}
	sizes := endpointSizes
	if !b.full {
		sizes = sizes[:2]
	}
	var wanted []casting
	for _, size := range sizes {
		wanted = append(wanted, casting{margay, size - 1})
		for _, other := range theirs {
			if size <= other.Services {
				wanted = append(wanted, casting{other, size - 1})
			}
		}
	}
	clusters, err := b.startClusters(ctx, "endpoints", wanted...)
	defer func() { err = errors.Join(err, closeClusters(clusters)) }()
	if err != nil {
		return err
	}
	var all []*mover
	movers := map[casting]*mover{}
	for _, c := range wanted {
		m, err := newMover(ctx, clusters[c])
		if err != nil {
			return err
		}
		movers[c], all = m, append(all, m)
	}
	for i := range b.choose(15, 10, 1) {
		for k := range all {
			at := k
			if i%2 == 1 {
				at = len(all) - 1 - k
			}
			if err := all[at].change(ctx); err != nil {
				return err
			}
		}
	}
	for _, size := range sizes {
		for i, other := range theirs {
			if m := movers[casting{other, size - 1}]; m != nil {
				b.compareMovers(size, movers[casting{margay, size - 1}], m, i > 0)
			}
		}
	}
	return nil
}

// compareMovers reports a cluster of Margay's beside another one with as many services.
func (b *bench) compareMovers(size int, ours, theirs *mover, further bool) {
	add := func(id, name, unit string, our, their []float64) {
		m := &measurement{
			ID: fmt.Sprintf("endpoint.%s.%d", id, size), Section: endpointsSection, Name: fmt.Sprintf("%s, %s", name, count(size)),
			Unit: unit, Reference: theirs.contender.Name, Target: 1,
		}
		if further {
			m = m.beside(theirs.contender.Name)
		}
		m.ours, m.theirs = our, their
		b.report.add(m)
	}
	add("change", "change → traffic", "ms", ours.took, theirs.took)
	add("memory", "agent's memory", "MiB", ours.memory, theirs.memory)
}

// count names a number of services.
func count(services int) string {
	if services == 1 {
		return "1 service"
	}
	return fmt.Sprintf("%d services", services)
}

func newMover(ctx context.Context, k *cluster) (*mover, error) {
	m := &mover{cluster: k, at: "local"}
	for _, name := range []string{"local", "remote"} {
		if err := k.sayName(name); err != nil {
			return nil, err
		}
	}
	k.put(serviceMoving.objects(m.endpoint())...)
	if _, err := m.awaitName(ctx); err != nil {
		return nil, err
	}
	err := k.ready(ctx)
	for _, d := range k.daemons {
		if d.on != k.nodes[0] {
			err = errors.Join(err, d.freeze())
		}
	}
	return m, err
}

// endpoint is the service's endpoint now.
func (m *mover) endpoint() endpoint {
	node := map[string]string{"local": "node1", "remote": "node2"}[m.at]
	return endpoint{m.pods[m.at].addrs, node}
}

// change moves the endpoint and waits for the first connection that reaches it.
func (m *mover) change(ctx context.Context) error {
	time.Sleep(time.Until(m.changed.Add(changePause)))
	m.at = map[string]string{"local": "remote", "remote": "local"}[m.at]
	slices := serviceMoving.slices(m.endpoint())
	start := time.Now()
	m.put(slices...)
	arrived, err := m.awaitName(ctx)
	if err != nil {
		return err
	}
	m.changed = time.Now()
	m.took = append(m.took, milliseconds(arrived.Sub(start)))
	time.Sleep(100 * time.Millisecond) // what is left to do, the next one's clock does not see
	sum := 0.0
	for _, d := range m.daemons {
		if d.on != m.nodes[0] {
			continue
		}
		mib, err := d.memory()
		if err != nil {
			return err
		}
		sum += mib
	}
	m.memory = append(m.memory, sum)
	return nil
}

// sayName has a pod tell every client on namePort which pod it is, by the first letter.
func (k *cluster) sayName(pod string) error {
	for _, f := range families {
		var listener net.Listener
		err := netns.Do(k.pods[pod].path, func() (err error) {
			listener, err = net.Listen("tcp", netip.AddrPortFrom(k.pods[pod].addr(f.v6), namePort).String())
			return err
		})
		if err != nil {
			return err
		}
		k.fixture.Cleanup(func() { _ = listener.Close() })
		go func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return // closed
				}
				_, _ = conn.Write([]byte(pod[:1])) // a client that has gone asks again
				_ = conn.Close()
			}
		}()
	}
	return nil
}

// awaitName asks the moving service, again and again, until the pod answers that has the endpoint, and returns when that was. The service
// is asked over IPv4; the other family changes with it.
func (m *mover) awaitName(ctx context.Context) (arrived time.Time, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	to := netip.AddrPortFrom(serviceMoving.addr(false), 80)
	err = netns.Do(m.pods["client"].path, func() error {
		for ctx.Err() == nil {
			if name, err := askName(to); err == nil && name == m.at[0] {
				arrived = time.Now()
				return nil
			}
			time.Sleep(100 * time.Microsecond)
		}
		return fmt.Errorf("%s: the new endpoint does not answer: %w", m.contender.Name, ctx.Err())
	})
	return arrived, err
}

// askName connects and reads one byte. It ends the connection by a reset, so that no port is left waiting.
func askName(to netip.AddrPort) (name byte, err error) {
	fd, err := dialWithin(to, 20*time.Millisecond)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return 0, err
	}
	var buf [1]byte
	if n, err := unix.Read(fd, buf[:]); err != nil || n != 1 {
		return 0, fmt.Errorf("read %d bytes: %w", n, err)
	}
	return buf[0], nil
}

// dialWithin connects a TCP socket on which nothing takes longer than so long.
func dialWithin(to netip.AddrPort, limit time.Duration) (fd int, err error) {
	sa, family := sockaddr(to)
	if fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, err
	}
	timeout := unix.NsecToTimeval(limit.Nanoseconds())
	err = errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout), unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout),
	)
	if err == nil {
		err = unix.Connect(fd, sa)
	}
	if err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}
