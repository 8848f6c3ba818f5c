// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
)

// Services that are measured: their backend is on the client's node, or on the other one.
var (
	serviceLocal  = clusterService{name: "local", number: 10, nodePort: 30010, target: echoPort}
	serviceRemote = clusterService{name: "remote", number: 11, nodePort: 30011, target: echoPort}
)

// casting is a cluster to be: a contender, and how many further services it is to have.
type casting struct {
	*contender
	others int
}

// cast is contenders without further services.
func cast(contenders ...*contender) (out []casting) {
	for _, c := range contenders {
		out = append(out, casting{c, 0})
	}
	return out
}

// startClusters makes several clusters at once, because most of it is waiting, and returns those that were made also when others failed.
func (b *bench) startClusters(ctx context.Context, section string, wanted ...casting) (map[casting]*cluster, error) {
	made, errs := make([]*cluster, len(wanted)), make([]error, len(wanted))
	var wg sync.WaitGroup
	for i, c := range wanted {
		wg.Go(func() {
			errs[i] = attempt(func() (err error) {
				made[i], err = b.startCluster(ctx, fmt.Sprintf("%s-%s-%d", section, c.id, c.others), c.contender, c.others)
				return err
			})
		})
	}
	wg.Wait()
	clusters := map[casting]*cluster{}
	for i, c := range wanted {
		if made[i] != nil {
			clusters[c] = made[i]
		}
	}
	return clusters, errors.Join(errs...)
}

// closeClusters ends them all.
func closeClusters(clusters map[casting]*cluster) error {
	var errs []error
	for _, k := range clusters {
		errs = append(errs, k.close())
	}
	return errors.Join(errs...)
}

// startCluster makes a cluster with a client and two servers in pods, "client" and "local" on the first node and "remote" on the other, the
// two services, and so many more. Everything answers when it returns.
func (b *bench) startCluster(ctx context.Context, name string, c *contender, services int) (_ *cluster, err error) {
	k, err := b.newCluster(name, c, 2, len(families))
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, k.close())
		}
	}()
	if !c.network() {
		return k, k.serve("remote", k.pods["remote"])
	}
	if b.smoke {
		services = min(services, 50)
	}
	k.put(otherServices(services)...)
	if c.DaemonsFirst {
		err = k.start()
	}
	if err := errors.Join(err, k.addServers(ctx, "local", "remote")); err != nil {
		return nil, err
	}
	for name, pod := range k.pods {
		if len(pod.addrs) != len(families) {
			return nil, fmt.Errorf("%s: pod %s has the addresses %v: on several nodes both families are compared", c.Name, name, pod.addrs)
		}
	}
	k.put(serviceLocal.objects(endpoint{k.pods["local"].addrs, "node1"})...)
	k.put(serviceRemote.objects(endpoint{k.pods["remote"].addrs, "node2"})...)
	if !c.DaemonsFirst { // so that they find everything there
		if err := k.start(); err != nil {
			return nil, err
		}
	}
	var courses []course
	for _, f := range families {
		courses = append(courses, k.between(f.v6))
		if c.Services == 0 {
			continue
		}
		for _, s := range []clusterService{serviceLocal, serviceRemote} {
			courses = append(courses, k.clusterIP(s, f.v6), k.nodePort(s, f.v6))
		}
	}
	return k, k.ready(ctx, courses...)
}

// startNode makes a cluster of one node with a client and a server in pods, "client" and "local", and no service.
func (b *bench) startNode(ctx context.Context, name string, c *contender) (_ *cluster, err error) {
	k, err := b.newCluster(name, c, 1, len(families))
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, k.close())
		}
	}()
	if err := errors.Join(k.start(), k.addServers(ctx, "local")); err != nil {
		return nil, err
	}
	var courses []course
	for _, f := range families {
		if k.pods["local"].addr(f.v6).IsValid() { // else it is a CNI of one family
			courses = append(courses, k.within(f.v6))
		}
	}
	return k, k.ready(ctx, courses...)
}

// addServers connects a client to the first node, and servers, of which "remote" is on the other.
func (k *cluster) addServers(ctx context.Context, names ...string) error {
	if _, err := k.addPod(ctx, k.nodes[0], "client"); err != nil {
		return err
	}
	for _, name := range names {
		n := k.nodes[0]
		if name == "remote" {
			n = k.nodes[1]
		}
		pod, err := k.addPod(ctx, n, name)
		if err != nil {
			return err
		}
		if err := k.serve(name, pod); err != nil {
			return err
		}
	}
	return nil
}

// serve starts a server in a place, until the cluster ends.
func (k *cluster) serve(name string, at place) error {
	p, err := startServers(at)
	if err != nil {
		return err
	}
	k.fixture.Cleanup(p.stop)
	k.servers[name] = p
	return nil
}

// runner has a client and a server for a course. Courses from one place share the client.
func (k *cluster) runner(c course, server string) (*runner, error) {
	client := k.clients[c.from]
	if client == nil {
		var err error
		if client, err = startPeer(c.from); err != nil {
			return nil, err
		}
		k.fixture.Cleanup(client.stop)
		k.clients[c.from] = client
	}
	return &runner{course: c, client: client, server: k.servers[server]}, nil
}

// way is where a server is, seen from the client.
type way struct {
	id, name string
	service  clusterService
	pod      func(k *cluster, v6 bool) course
}

var serviceWays = []way{
	{"local", "same node", serviceLocal, (*cluster).within},
	{"remote", "other node", serviceRemote, (*cluster).between},
}

// between is the way between the nodes: from pod to pod, or of the nodes' own where there are no pods. It leaves the port to the kind of
// traffic.
func (k *cluster) between(v6 bool) course {
	if !k.contender.network() {
		return course{k.contender.Name, k.nodes[0].path, k.pods["remote"].addr(v6), 0}
	}
	return course{k.contender.Name, k.pods["client"].path, k.pods["remote"].addr(v6), 0}
}

// within is the way from pod to pod on the first node.
func (k *cluster) within(v6 bool) course {
	return course{k.contender.Name, k.pods["client"].path, k.pods["local"].addr(v6), 0}
}

// clusterIP is the way from the client pod to a service.
func (k *cluster) clusterIP(s clusterService, v6 bool) course {
	return course{k.contender.Name, k.pods["client"].path, s.addr(v6), 80}
}

// nodePort is the way from outside to a service, by the first node.
func (k *cluster) nodePort(s clusterService, v6 bool) course {
	return course{k.contender.Name, k.client.path, k.nodes[0].addr(v6), uint16(s.nodePort)}
}
