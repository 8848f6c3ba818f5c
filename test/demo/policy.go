// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net/netip"
	"strings"

	"github.com/margay-cni/margay/pkg/netns"
)

// livePolicy cuts open connections off, on the node of each server, and lets them go on.
func (d *demo) livePolicy(ctx context.Context) error {
	d.title("A NetworkPolicy cuts the client off while its connections are open")
	var open []*talk
	for i, server := range []string{"web-1", "web-2"} {
		t, err := d.openOn(ctx, i, server)
		if err != nil {
			return err
		}
		defer t.conn.Close()
		d.check(true, "connection %s → %s is open, %s on %s answers", t.conn.LocalAddr(), t.conn.RemoteAddr(), server, d.running[server].node.name)
		open = append(open, t)
	}
	var watches []func() (string, error)
	for _, n := range d.nodes() {
		watch, err := d.watchDrops(ctx, n)
		if err != nil {
			return err
		}
		watches = append(watches, watch)
	}
	say("applying %s/later/cut-off.yaml: only pods of the namespace may reach app=web", shipped)
	if err := d.apply("cut-off.yaml"); err != nil {
		return err
	}
	for _, t := range open {
		d.check(eventually(ctx, func() bool { _, err := t.ask(); return err != nil }), "%s gets no answer any more", t.conn.LocalAddr())
	}
	got, err := askOnce(ctx, d.running["client"].ns, "tcp", netip.AddrPortFrom(webIPs[0], 80))
	d.check(err == nil, "the pod client still does: %s answered%s", got.server, because(err))
	for i, n := range d.nodes() {
		out, err := watches[i]()
		d.check(err == nil && strings.Contains(out, "shop-only"), "margayctl drops on %s says why:%s", n.name, because(err))
		show(out)
	}
	return d.policyRemoved(ctx, open)
}

// watchDrops starts margayctl drops on a node. The function that it returns waits for the first drop by policy, and returns what was printed.
func (d *demo) watchDrops(ctx context.Context, n *node) (wait func() (string, error), err error) {
	out := &bytes.Buffer{}
	drops := n.ctl(ctx, "drops", "--follow", "--reason", "policy", "--count", "1", "--timeout", "10s")
	drops.Stdout, drops.Stderr = out, out
	return func() (string, error) { err := drops.Wait(); return out.String(), err }, netns.Do(n.ns, drops.Start)
}

func (d *demo) policyRemoved(ctx context.Context, open []*talk) error {
	say("removing the policy")
	if err := d.withdraw("cut-off.yaml"); err != nil {
		return err
	}
	for _, t := range open {
		d.check(eventually(ctx, func() bool { _, err := t.ask(); return err == nil }), "%s, the same connection, goes on", t.conn.LocalAddr())
	}
	out, err := d.b.ask(ctx, "drops")
	d.check(err == nil && strings.Contains(out, "policy"), "margayctl drops on node-b, the totals:%s", because(err))
	show(out)
	return nil
}

// count decodes a JSON document of margayctl and counts the list under key.
func count(doc []byte, key string) (int, error) {
	var lists map[string]json.RawMessage
	if err := json.Unmarshal(doc, &lists); err != nil {
		return 0, err
	}
	var list []json.RawMessage
	err := json.Unmarshal(lists[key], &list)
	return len(list), err
}
