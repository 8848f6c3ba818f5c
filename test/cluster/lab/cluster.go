// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/test/cluster/machine"
)

// Options say what cluster Up makes.
type Options struct {
	Dir    string // build/cluster: what was built, and below state the clusters
	Name   string // of the cluster, in case there are several; lower-case letters, digits and dashes
	Nodes  int
	Family Family
	CNI    string // margay, reference (ptp, static routes and kube-proxy), or none
}

// CNIs are the possible values of Options.CNI.
var CNIs = []string{"margay", "reference", "none"}

var nameFormat = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,30}$`)

func (o Options) validate() error {
	var errs []error
	if !nameFormat.MatchString(o.Name) {
		errs = append(errs, fmt.Errorf("name %q: want lower-case letters, digits and dashes, at most 31", o.Name))
	}
	if o.Nodes < 1 || o.Nodes > 200 {
		errs = append(errs, fmt.Errorf("%d nodes: want 1 to 200", o.Nodes))
	}
	if o.Family != Dual && o.Family != IPv4 && o.Family != IPv6 {
		errs = append(errs, fmt.Errorf("family %q: want dual, ipv4 or ipv6", o.Family))
	}
	if o.CNI != "margay" && o.CNI != "reference" && o.CNI != "none" {
		errs = append(errs, fmt.Errorf("CNI %q: want one of %v", o.CNI, CNIs))
	}
	return errors.Join(errs...)
}

// Cluster is a cluster that was started, whether it still runs or not.
type Cluster struct {
	Options
	ID      string
	cgroups []machine.Hierarchy
}

// ID returns what a cluster's cgroups are called by. It follows from the absolute directory and the name, so that clusters of several
// working copies do not meet, and that the cgroups of one are found when nothing else is left of it.
func ID(dir, name string) string {
	sum := sha256.Sum256([]byte(stateDir(dir, name)))
	return hex.EncodeToString(sum[:4])
}

const clusterFile = "cluster.json"

func stateDir(dir, name string) string { return filepath.Join(dir, "state", name) }

// State returns the directory that has everything of the cluster.
func (c *Cluster) State() string { return stateDir(c.Dir, c.Name) }

// Kubeconfig returns the administrator's kubeconfig. The API server is reached with the control machine's network only.
func (c *Cluster) Kubeconfig() string { return filepath.Join(c.pkiDir(), "admin.conf") }

func (c *Cluster) pkiDir() string         { return filepath.Join(c.State(), "pki") }
func (c *Cluster) pki(name string) string { return filepath.Join(c.pkiDir(), name) }
func (c *Cluster) binDir() string         { return filepath.Join(c.Dir, "bin") }
func (c *Cluster) bin(name string) string { return filepath.Join(c.binDir(), name) }
func (c *Cluster) imageDir() string       { return filepath.Join(c.Dir, "images") }
func (c *Cluster) machine(name string) Machine {
	return Machine{Name: name, c: c, dir: filepath.Join(c.State(), "machines", name)}
}

// Control returns the machine of the control plane, which is the router too.
func (c *Cluster) Control() *Machine { m := c.machine("control"); return &m }

// Client returns the machine outside of the cluster, one hop behind the router.
func (c *Cluster) Client() *Machine { m := c.machine("client"); return &m }

// Nodes returns the nodes, node1 first.
func (c *Cluster) Nodes() []*Node {
	var all []*Node
	for i := range c.Options.Nodes {
		all = append(all, &Node{Machine: c.machine("node" + strconv.Itoa(i+1)), Number: i + 1})
	}
	return all
}

// Machine returns the control plane, the client, or a node, by its name.
func (c *Cluster) Machine(name string) (*Machine, error) {
	m := c.machine(name)
	if !nameFormat.MatchString(name) {
		return nil, fmt.Errorf("machine %q: no such name", name)
	}
	if _, err := os.Stat(m.dir); err != nil {
		return nil, fmt.Errorf("cluster %s has no machine %s: there are control, client, node1 to node%d", c.Name, name, c.Options.Nodes)
	}
	return &m, nil
}

// Open returns a cluster that Up made.
func Open(dir, name string) (*Cluster, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	c := &Cluster{}
	if err := readJSON(filepath.Join(stateDir(dir, name), clusterFile), c); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("there is no cluster %s in %s: make cluster-up: %w", name, dir, fs.ErrNotExist)
		}
		return nil, err
	}
	c.Dir, c.Name = dir, name
	c.cgroups, err = hierarchies()
	return c, err
}

// create makes the state directory of a new cluster.
func create(o Options) (*Cluster, error) {
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, err
	}
	o.Dir = dir
	c := &Cluster{Options: o}
	if c.cgroups, err = hierarchies(); err != nil {
		return nil, err
	}
	if _, err := os.Stat(c.State()); err == nil {
		return nil, fmt.Errorf("cluster %s exists already: make cluster-down", c.Name)
	}
	c.ID = ID(c.Dir, c.Name)
	if err := os.MkdirAll(c.State(), 0o755); err != nil {
		return nil, err
	}
	return c, writeJSON(filepath.Join(c.State(), clusterFile), c)
}

// lock keeps others from making or ending the cluster until release is called, or this process ends. It waits a little: a process that
// was killed may leave a child that has not started its program yet, and holds the lock until then.
func lock(dir, name string) (release func(), err error) {
	if err := os.MkdirAll(filepath.Join(dir, "state"), 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "state", ".lock-"+name), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if time.Now().After(deadline) {
			_ = f.Close()
			return nil, fmt.Errorf("another process makes or ends cluster %s of %s: %w", name, dir, err)
		}
	}
}

// Down ends a cluster and removes everything of it, whatever state it is in; without it there is nothing to do.
func Down(dir, name string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	if !nameFormat.MatchString(name) {
		return fmt.Errorf("name %q: no cluster has such a name", name)
	}
	release, err := lock(dir, name)
	if err != nil {
		return err
	}
	defer release()
	return remove(dir, name)
}

func remove(dir, name string) error {
	all, err := hierarchies()
	if err != nil {
		return nil // no cluster was ever made on such a machine
	}
	machines, err := filepath.Glob(filepath.Join(stateDir(dir, name), "machines", "*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range machines {
		p, err := recorded(m)
		if err == nil {
			err = p.kill()
		}
		errs = append(errs, err)
	}
	id := ID(dir, name)
	errs = append(errs, killCgroups(all, id), removeCgroups(all, id, ""), inotifyLimit.restore())
	if err := errors.Join(errs...); err != nil {
		return err // the state directory stays: it is what a second attempt needs
	}
	return os.RemoveAll(stateDir(dir, name))
}
