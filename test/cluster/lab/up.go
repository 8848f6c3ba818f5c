// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"
)

// Up makes a cluster. If it cannot be made, what there is of it stays for whoever wants to look, until Down. Build first (package build).
func Up(ctx context.Context, o Options, log *slog.Logger) (*Cluster, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, err
	}
	release, err := lock(dir, o.Name)
	if err != nil {
		return nil, err
	}
	defer release()
	c, err := create(o)
	if err != nil {
		return nil, err
	}
	steps := []struct {
		name string
		run  func(context.Context) error
	}{
		{"make keys", func(context.Context) error { return c.makeKeys() }},
		{"start the control plane", c.startControl},
		{"start the nodes", c.startNodes},
		{"start the controllers", c.startControllers},
		{"import images", c.importImages},
		{"wait for the nodes' pod ranges", c.routePods},
		{"start the network", func(ctx context.Context) error { return c.installCNI(ctx, log) }},
		{"start DNS", c.installDNS},
		{"wait until everything is ready", c.waitUp},
	}
	for _, s := range steps {
		start := time.Now()
		if err := s.run(ctx); err != nil {
			return c, fmt.Errorf("%s: %w", s.name, err)
		}
		log.Info(s.name, "seconds", time.Since(start).Round(10*time.Millisecond).Seconds())
	}
	return c, nil
}

// startNodes starts the nodes and the client.
func (c *Cluster) startNodes(ctx context.Context) error {
	err := c.eachNode(func(n *Node) error {
		spec, err := n.spec()
		if err != nil {
			return err
		}
		return errors.Join(n.define(spec), n.start())
	})
	if err != nil {
		return err
	}
	spec := c.controlSpec()
	spec.Hostname, spec.Services, spec.Files = "client", nil, hostFiles("client")
	client := c.Client()
	return errors.Join(client.define(spec), client.powerOn(c.plugClient))
}

func (c *Cluster) importImages(ctx context.Context) error {
	archives, err := filepath.Glob(filepath.Join(c.imageDir(), "*.tar"))
	if err != nil {
		return err
	}
	if len(archives) == 0 {
		return fmt.Errorf("there are no images in %s: go run ./test/cluster build", c.imageDir())
	}
	return c.eachNode(func(n *Node) error { return n.ImportImages(ctx, archives...) })
}

// routePods waits until every node has its pod ranges, and gives the fabric's router the routes to them, as a router of a real network
// would have them: the API server calls pods, and an answer to the client may come from a pod's address.
func (c *Cluster) routePods(ctx context.Context) error {
	return c.eachPodRange(ctx, func(n *Node, r podRange) error { return c.Control().route(r.prefix, r.via) })
}

// WaitReady waits until all nodes, or those that are named, are Ready, as kubelets of their present life say.
func (c *Cluster) WaitReady(ctx context.Context, names ...string) error {
	if len(names) == 0 {
		for _, n := range c.Nodes() {
			names = append(names, n.Name)
		}
	}
	return poll(ctx, 3*time.Minute, 500*time.Millisecond, func() error {
		nodes, err := c.nodeObjects(ctx)
		if err != nil {
			return err
		}
		for _, name := range names {
			n, ok := nodes[name]
			if !ok {
				return fmt.Errorf("node %s has not registered", name)
			}
			machine := c.machine(name)
			since, err := machine.kubeletStarted()
			if err != nil {
				return err
			}
			if err := ready(n, since); err != nil {
				return err
			}
		}
		return nil
	})
}

// waitUp waits until a cluster with a network can run pods.
func (c *Cluster) waitUp(ctx context.Context) error {
	if !c.hasNetwork() {
		return nil // without a network no node becomes Ready
	}
	if err := c.WaitReady(ctx); err != nil {
		return err
	}
	_, err := c.Kubectl(ctx, "--namespace=kube-system", "rollout", "status", "deployment/coredns", "--timeout=2m")
	return err
}
