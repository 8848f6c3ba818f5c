// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

func (d *demo) startPods(ctx context.Context) error {
	d.title("Pods start without a daemon: libcni runs the plugin with %s, no agent is running", conflist)
	say("the first pod of a node waits for the kernel to verify and load the programs")
	for _, name := range []string{"web-1", "client", "web-2", "stock"} {
		n := d.a
		if d.pods[name].Spec.NodeName == d.b.name {
			n = d.b
		}
		p, err := d.startPod(ctx, n, name)
		if err != nil {
			return err
		}
		if err := d.podRuns(p); err != nil {
			return err
		}
		if d.servers[name], err = serve(name, p.ns); err != nil {
			return err
		}
	}
	var err error
	d.servers["outside"], err = serve("outside", d.client.ns)
	return err
}

// startPod adds a pod and says so.
func (d *demo) startPod(ctx context.Context, n *node, name string) (*pod, error) {
	p, err := n.addPod(ctx, name)
	if err != nil {
		return nil, err
	}
	if len(p.addrs) != 2 {
		return nil, fmt.Errorf("%s has addresses %v, want one of each family", name, p.addrs)
	}
	d.running[name] = p
	d.check(true, "%s: %-6s has %s and %s after %.1f ms", n.name, name, p.addrs[0], p.addrs[1], float64(p.took.Microseconds())/1000)
	return p, nil
}

// reaches shows that one pod reaches another in both families, by TCP and UDP, under its own address.
func (d *demo) reaches(ctx context.Context, from, to string) {
	client, target := d.running[from], d.running[to]
	for i, a := range target.addrs {
		var errs []error
		seen := ""
		for _, network := range networks {
			got, err := askOnce(ctx, client.ns, network, netip.AddrPortFrom(a, serverPort))
			if err == nil && (got.server != to || got.client != client.addrs[i].String()) {
				err = fmt.Errorf("%s: %s answered, which saw %s", network, got.server, got.client)
			}
			seen = got.client
			errs = append(errs, err)
		}
		err := errors.Join(errs...)
		d.check(err == nil, "%s on %s → %s on %s at %s, TCP and UDP: it sees %s%s",
			from, client.node.name, to, target.node.name, netip.AddrPortFrom(a, serverPort), seen, because(err))
	}
}

func (d *demo) podToPod(ctx context.Context) error {
	d.title("Pod to pod on one node")
	d.reaches(ctx, "client", "web-1")
	return nil
}

func (d *demo) startAgents(ctx context.Context) error {
	d.title("An agent on each node reads the manifests: Node objects, Pods, and the services of %s", shipped)
	start := time.Now()
	for _, n := range d.nodes() {
		if err := n.startAgent(d.manifests); err != nil {
			return err
		}
	}
	var last error
	ok := eventually(ctx, func() bool {
		for _, n := range []string{"client", "stock"} {
			for _, name := range []string{"web-1", "web-2"} {
				for _, a := range d.running[name].addrs {
					if _, last = askOnce(ctx, d.running[n].ns, "tcp", netip.AddrPortFrom(a, serverPort)); last != nil {
						return false
					}
				}
			}
		}
		for _, vip := range webIPs {
			if _, last = askOnce(ctx, d.running["client"].ns, "tcp", netip.AddrPortFrom(vip, 80)); last != nil {
				return false
			}
		}
		return true
	})
	d.check(ok, "other nodes and services are reached %d ms after the agents were started%s", time.Since(start).Milliseconds(), because(last))
	out, err := d.a.ask(ctx, "nodes")
	d.check(err == nil && strings.Contains(out, d.b.name), "margayctl nodes on node-a:%s", because(err))
	show(out)
	return d.showStatus(ctx)
}

// showStatus prints what margayctl status says, without its table of maps.
func (d *demo) showStatus(ctx context.Context) error {
	ok := eventually(ctx, func() bool {
		out, err := d.a.ask(ctx, "status")
		return err == nil && strings.Contains(out, "problems  none")
	})
	out, err := d.a.ask(ctx, "status")
	d.check(ok && err == nil, "margayctl status on node-a, its table of maps left out:%s", because(err))
	sections := slices.DeleteFunc(strings.Split(out, "\n\n"), func(s string) bool { return strings.HasPrefix(s, "MAP ") })
	show(strings.Join(sections, "\n\n"))
	return nil
}

func (d *demo) betweenNodes(ctx context.Context) error {
	d.title("Pod to pod between the nodes, through the VXLAN overlay")
	d.reaches(ctx, "client", "web-2")
	d.reaches(ctx, "stock", "web-1")
	return nil
}

func (d *demo) podToService(ctx context.Context) error {
	d.title("A ClusterIP spreads a pod's requests over backends on both nodes")
	client := d.running["client"]
	for i, vip := range webIPs {
		seen := map[string]int{}
		var last error
		for range 40 {
			got, err := askOnce(ctx, client.ns, "tcp", netip.AddrPortFrom(vip, 80))
			if err == nil && got.client == client.addrs[i].String() {
				seen[got.server]++
			} else if err != nil {
				last = err
			}
		}
		d.check(seen["web-1"]+seen["web-2"] == 40 && seen["web-1"] > 0 && seen["web-2"] > 0,
			"client → %s, 40 times: web-1 on node-a answers %d, web-2 on node-b %d; they see the pod's own address%s",
			netip.AddrPortFrom(vip, 80), seen["web-1"], seen["web-2"], because(last))
	}
	return nil
}

func (d *demo) toOutside(ctx context.Context) error {
	d.title("Pods reach the outside under their node's address")
	for _, name := range []string{"client", "stock"} {
		p := d.running[name]
		for i := range families {
			to := netip.AddrPortFrom(d.client.addr(i), serverPort)
			for _, network := range networks {
				_, err := askOnce(ctx, p.ns, network, to)
				line := d.logOf("outside")
				d.check(err == nil && strings.HasSuffix(line, " "+p.node.addr(i).String()),
					"%s on %s (%s) → outside: its log says %q%s", name, p.node.name, p.addrs[i], line, because(err))
			}
		}
	}
	return nil
}

func (d *demo) withoutAgents(ctx context.Context) error {
	d.title("Both agents are killed; a further pod starts and works, and nothing else stops")
	if err := errors.Join(d.a.killAgent(), d.b.killAgent()); err != nil {
		return err
	}
	late, err := d.startPod(ctx, d.a, "late")
	if err != nil {
		return err
	}
	for _, vip := range webIPs {
		got, err := askOnce(ctx, late.ns, "tcp", netip.AddrPortFrom(vip, 80))
		d.check(err == nil && got.server != "", "late → %s: answered by %s%s", netip.AddrPortFrom(vip, 80), got.server, because(err))
	}
	for i := range families {
		got, err := askOnce(ctx, d.client.ns, "tcp", netip.AddrPortFrom(d.a.addr(i), stockNodePort))
		d.check(err == nil && got.client == d.client.addr(i).String(),
			"outside → NodePort on node-a: answered by %s on node-b, which sees %s%s", got.server, got.client, because(err))
	}
	out, err := d.a.ask(ctx, "endpoints", "-o", "json")
	n, jsonErr := count([]byte(out), "endpoints")
	d.check(err == nil && jsonErr == nil && n == 3, "margayctl, which needs no agent, lists %d endpoints on node-a%s", n, because(errors.Join(err, jsonErr)))
	return nil
}

func (d *demo) cleanUp(ctx context.Context) error {
	d.title("Everything goes away again")
	err := errors.Join(d.a.delPods(ctx), d.b.delPods(ctx))
	d.check(err == nil, "DEL of every pod%s", because(err))
	for _, n := range d.nodes() {
		removed, err := n.uninstall(ctx)
		d.check(err == nil, "margay-install --uninstall on %s removes %d things%s", n.name, removed, because(err))
		left, err := n.leftovers()
		d.check(err == nil && len(left) == 0, "no device, pin or record is left on %s%s%s", n.name, strings.Join(append([]string{""}, left...), " "), because(err))
	}
	say("after %.1f s", time.Since(d.start).Seconds())
	return nil
}
