// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

func (d *demo) outsideToNodePort(ctx context.Context) error {
	d.title("A client outside comes in at the NodePort of web, on either node, and keeps its address")
	for _, n := range d.nodes() {
		for i := range families {
			to := netip.AddrPortFrom(n.addr(i), webNodePort)
			for _, network := range networks {
				d.checkLog(ctx, network, i, n, to)
			}
		}
	}
	return nil
}

// checkLog asks once from outside and shows what the server wrote into its own log.
func (d *demo) checkLog(ctx context.Context, network string, family int, entry *node, to netip.AddrPort) {
	got, err := askOnce(ctx, d.client.ns, network, to)
	line, where := d.logOf(got.server), ""
	if p := d.running[got.server]; p != nil {
		where = p.node.name
	}
	d.check(err == nil && strings.HasSuffix(line, " client "+d.client.addr(family).String()),
		"outside → %s %s (%s); log of %s on %s: %q%s", strings.ToUpper(network), to, entry.name, got.server, where, line, because(err))
}

func (d *demo) throughOtherNode(ctx context.Context) error {
	d.title("The NodePort is asked on node-a, the only server is on node-b: its log names the client, nobody's node")
	for i := range families {
		for _, network := range networks {
			d.checkLog(ctx, network, i, d.a, netip.AddrPortFrom(d.a.addr(i), stockNodePort))
		}
	}
	return d.wayBack(ctx, d.a)
}

// askedWhileWatched is how many requests wayBack makes with each protocol and family.
const askedWhileWatched = 10

// wayBack shows which node the answers of stock come from, by a capture on the router's devices: packets whose source is the NodePort.
func (d *demo) wayBack(ctx context.Context, from *node) error {
	answered, sent, err := d.watchAnswers(ctx)
	if err != nil {
		return err
	}
	other := d.a
	if from == d.a {
		other = d.b
	}
	d.check(answered == 4*askedWhileWatched && sent[from] >= answered && sent[other] == 0,
		"the router sees where the answers to %d requests come from: %d packets from %s, %d from %s", answered, sent[from], from.name, sent[other], other.name)
	return nil
}

// watchAnswers asks stock on node-a from outside and counts the answers, and the packets with the NodePort as source that each node sends.
func (d *demo) watchAnswers(ctx context.Context) (answered int, sent map[*node]int, err error) {
	captures := map[*node]*capture{}
	for _, n := range d.nodes() {
		c, err := d.fabric.watch(n, stockNodePort)
		if err != nil {
			return 0, nil, err
		}
		defer c.close()
		captures[n] = c
	}
	for i := range families {
		for _, network := range networks {
			for range askedWhileWatched {
				got, err := askOnce(ctx, d.client.ns, network, netip.AddrPortFrom(d.a.addr(i), stockNodePort))
				if err == nil && got.client == d.client.addr(i).String() {
					answered++
				}
			}
		}
	}
	sent = map[*node]int{}
	for n, c := range captures {
		var e error
		sent[n], e = c.count()
		err = errors.Join(err, e)
	}
	return answered, sent, err
}

// largeSize is the size of a datagram that takes six packets.
const largeSize = 8192

func (d *demo) large(ctx context.Context) error {
	d.title("Datagrams of 8 KB, six fragments each, arrive there and back")
	for i := range families {
		for _, way := range []struct {
			ns, from string
			to       netip.AddrPort
		}{
			{d.running["client"].ns, "client on node-a → stock on node-b,", netip.AddrPortFrom(d.running["stock"].addrs[i], serverPort)},
			{d.client.ns, "outside → NodePort on node-a → stock on node-b,", netip.AddrPortFrom(d.a.addr(i), stockNodePort)},
		} {
			t, err := dial(ctx, way.ns, "udp", netip.Addr{}, way.to)
			if err != nil {
				return err
			}
			// Once more, because the first may have been what told the sender the path's MTU.
			var got answer
			for range 2 {
				if got, err = t.askWith(largeSize); err == nil {
					break
				}
			}
			err = errors.Join(err, t.conn.Close())
			d.check(err == nil && got.bytes == largeSize, "%s %s: the answer has %d bytes%s", way.from, families[i], got.bytes, because(err))
		}
	}
	return nil
}

func (d *demo) straightBack(ctx context.Context) error {
	d.title("The same service with the annotation margay.io/service-return: dsr")
	say("applying %s/later/stock.yaml", shipped)
	if err := d.apply("stock.yaml"); err != nil {
		return err
	}
	// New flows take the new way as soon as the agent of node-a has written it.
	eventually(ctx, func() bool {
		out, err := d.a.ask(ctx, "services")
		return err == nil && strings.Contains(out, "dsr")
	})
	for i := range families {
		for _, network := range networks {
			d.checkLog(ctx, network, i, d.a, netip.AddrPortFrom(d.a.addr(i), stockNodePort))
		}
	}
	return d.wayBack(ctx, d.b)
}

func (d *demo) judgeClient(ctx context.Context) error {
	d.title("A NetworkPolicy with ipBlock, judged on node-b about a client that comes in through node-a")
	watch, err := d.watchDrops(ctx, d.b)
	if err != nil {
		return err
	}
	say("applying %s/later/not-you.yaml: everybody but %s and %s may ask stock", shipped, d.client.extra[0].Addr(), d.client.extra[1].Addr())
	if err := d.apply("not-you.yaml"); err != nil {
		return err
	}
	for i := range families {
		to := netip.AddrPortFrom(d.a.addr(i), stockNodePort)
		banned, welcome := d.client.extra[i].Addr(), d.client.addr(i)
		ok := eventually(ctx, func() bool { _, err := askFrom(ctx, d.client.ns, "udp", banned, to); return err != nil })
		_, err := askFrom(ctx, d.client.ns, "tcp", banned, to)
		d.check(ok && err != nil, "outside as %s → %s gets no answer", banned, to)
		got, err := askFrom(ctx, d.client.ns, "tcp", welcome, to)
		d.check(err == nil && got.client == welcome.String(), "outside as %s → %s is answered by %s%s", welcome, to, got.server, because(err))
	}
	out, err := watch()
	d.check(err == nil && strings.Contains(out, d.client.extra[0].Addr().String()) && strings.Contains(out, "not-you"), "margayctl drops on node-b says why:%s", because(err))
	show(out)
	say("removing the policy")
	if err := d.withdraw("not-you.yaml"); err != nil {
		return err
	}
	ok := eventually(ctx, func() bool {
		for i := range families {
			if _, err := askFrom(ctx, d.client.ns, "tcp", d.client.extra[i].Addr(), netip.AddrPortFrom(d.a.addr(i), stockNodePort)); err != nil {
				return false
			}
		}
		return true
	})
	d.check(ok, "outside as %s and %s is answered again", d.client.extra[0].Addr(), d.client.extra[1].Addr())
	return nil
}

// openOn opens a connection to web's NodePort on node-a that the named server answers.
func (d *demo) openOn(ctx context.Context, family int, server string) (*talk, error) {
	for range 40 {
		t, err := dial(ctx, d.client.ns, "tcp", netip.Addr{}, netip.AddrPortFrom(d.a.addr(family), webNodePort))
		if err != nil {
			return nil, fmt.Errorf("connect to the NodePort: %w", err)
		}
		if got, err := t.ask(); err == nil && got.server == server {
			return t, nil
		}
		if err := t.conn.Close(); err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("none of 40 connections to the NodePort reached %s", server)
}
