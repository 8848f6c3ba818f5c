// SPDX-License-Identifier: Apache-2.0

//go:build cluster

package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/margay-cni/margay/pkg/netns"
	"github.com/margay-cni/margay/test/cluster/lab"
)

// family is one of the cluster's IP families.
type family struct {
	name string
	v6   bool
}

// families returns the cluster's families.
func families() []family {
	var all []family
	if cluster.Family != lab.IPv6 {
		all = append(all, family{"IPv4", false})
	}
	if cluster.Family != lab.IPv4 {
		all = append(all, family{"IPv6", true})
	}
	return all
}

// eachFamily runs a subtest for each family of the cluster.
func eachFamily(t *testing.T, test func(t *testing.T, f family)) {
	t.Helper()
	for _, f := range families() {
		t.Run(f.name, func(t *testing.T) { test(t, f) })
	}
}

// of returns the family's first one of some addresses.
func (f family) of(addrs []netip.Addr) netip.Addr {
	for _, a := range addrs {
		if a.Is6() == f.v6 {
			return a
		}
	}
	return netip.Addr{}
}

func (f family) at(p place, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(f.of(p.addrs), port)
}

// eventually repeats ok until it returns no error, and ends the test if it still does after so long.
func eventually(t testing.TB, what string, within time.Duration, ok func() error) {
	t.Helper()
	if err := until(within, ok); err != nil {
		t.Fatalf("%s: not within %v: %v", what, within, err)
	}
}

func until(within time.Duration, ok func() error) error {
	for deadline := time.Now().Add(within); ; time.Sleep(100 * time.Millisecond) {
		err := ok()
		if err == nil || time.Now().After(deadline) {
			return err
		}
	}
}

// space is a namespace that lives as long as a test.
type space struct {
	t    testing.TB
	name string
	ctx  context.Context
}

// spaceLabel marks the namespaces of these tests.
const spaceLabel = "margay-e2e"

// newSpace makes a namespace with labels such as {"team": "a"}, besides the one with its name that every namespace has.
func newSpace(t testing.TB, labels map[string]string) *space {
	t.Helper()
	s := &space{t: t, ctx: context.Background(), name: fmt.Sprintf("%s-%06x", spaceLabel, rand.IntN(1<<24))}
	all := map[string]string{spaceLabel: "true"}
	for k, v := range labels {
		all[k] = v
	}
	s.must(api.create(s.ctx, "Namespace", "", corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: s.name, Labels: all}}, nil))
	t.Cleanup(func() {
		if t.Failed() {
			s.explain()
		}
		if err := api.remove(s.ctx, "Namespace", "", s.name); err != nil {
			t.Errorf("remove namespace %s: %v", s.name, err)
		}
	})
	// Pods are refused until the controller has made the service account.
	eventually(t, "service account of "+s.name, time.Minute, func() error {
		return api.do(s.ctx, "GET", "/api/v1/namespaces/"+s.name+"/serviceaccounts/default", "", nil, nil)
	})
	return s
}

// removeSpaces waits until the namespaces of the tests are gone: a cluster that was given to us is left as it was.
func removeSpaces() error {
	if *upFlag {
		return nil
	}
	return until(10*time.Minute, func() error { // a hundred pods of the last test may be ending
		var list corev1.NamespaceList
		path := "/api/v1/namespaces?labelSelector=" + spaceLabel
		if err := api.do(context.Background(), "GET", path, "", nil, &list); err != nil {
			return err
		}
		if len(list.Items) > 0 {
			return fmt.Errorf("%d namespaces of the tests are still there, %s is one", len(list.Items), list.Items[0].Name)
		}
		return nil
	})
}

func (s *space) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// explain logs what a person wants to see of a failed test's namespace.
func (s *space) explain() {
	if cluster == nil || !cluster.Control().Running() {
		return
	}
	ctx, cancel := context.WithTimeout(s.ctx, 20*time.Second)
	defer cancel()
	out, err := cluster.Kubectl(ctx, "--namespace="+s.name, "get", "pods,services,networkpolicies", "--output=wide")
	s.t.Logf("namespace %s (%v):\n%.4000s", s.name, err, out)
	out, err = cluster.Kubectl(ctx, "--namespace="+s.name, "get", "events", "--field-selector=type=Warning")
	s.t.Logf("warnings (%v):\n%.4000s", err, out)
}

// apply makes or changes objects in the namespace, given in YAML.
func (s *space) apply(manifests string) {
	s.t.Helper()
	s.must(api.applyAll(s.ctx, s.name, strings.TrimSpace(manifests)))
}

// pod is a running pod, from which one can send.
type pod struct {
	place
	node   int // 1 is node1
	object *corev1.Pod
}

const (
	agnhost   = "registry.k8s.io/e2e-test-images/agnhost:2.66.1"
	pauseName = "registry.k8s.io/pause:3.10.2"
	httpPort  = 8080 // of the pods that server makes
	udpPort   = 8081
)

// option changes a pod before it is made.
type option func(*corev1.Pod)

func labelled(key, value string) option {
	return func(p *corev1.Pod) { p.Labels[key] = value }
}

func onHostNetwork(p *corev1.Pod) { p.Spec.HostNetwork = true }

// server describes a pod on a node that answers by HTTP and UDP, and says its own name as hostname. It has the label app with its name.
func server(name string, node int, options ...option) *corev1.Pod {
	p := podOf(name, node, corev1.Container{Name: "server", Image: agnhost, Args: []string{"netexec", "--http-port=8080", "--udp-port=8081"},
		Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: httpPort}, {Name: "ask", ContainerPort: udpPort, Protocol: corev1.ProtocolUDP}}})
	for _, o := range options {
		o(p)
	}
	return p
}

// idle describes a pod that does nothing: tests send from it.
func idle(name string, node int, options ...option) *corev1.Pod {
	p := podOf(name, node, corev1.Container{Name: "idle", Image: pauseName})
	for _, o := range options {
		o(p)
	}
	return p
}

// podOf describes a pod of one container on node number node, or with 0 wherever the scheduler wants.
func podOf(name string, node int, c corev1.Container) *corev1.Pod {
	grace := int64(1)
	c.ImagePullPolicy = corev1.PullIfNotPresent
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": name}},
		Spec:       corev1.PodSpec{TerminationGracePeriodSeconds: &grace, Containers: []corev1.Container{c}},
	}
	if node > 0 {
		p.Spec.NodeName = cluster.Nodes()[node-1].Name
	}
	return p
}

// start makes pods at once and waits until all are ready.
func (s *space) start(objects ...*corev1.Pod) []pod {
	s.t.Helper()
	s.create(objects...)
	var names []string
	for _, o := range objects {
		names = append(names, o.Name)
	}
	return s.ready(3*time.Minute, names...)
}

// create makes pods and waits for nothing.
func (s *space) create(objects ...*corev1.Pod) {
	s.t.Helper()
	for _, o := range objects {
		s.must(api.create(s.ctx, "Pod", s.name, o, nil))
	}
}

// ready waits until pods are ready, and returns them.
func (s *space) ready(within time.Duration, names ...string) []pod {
	s.t.Helper()
	pods := make([]pod, len(names))
	eventually(s.t, fmt.Sprintf("pods %v", names), within, func() error {
		var list corev1.PodList
		if err := api.get(s.ctx, "Pod", s.name, "", &list); err != nil {
			return err
		}
		found := map[string]*corev1.Pod{}
		for i := range list.Items {
			found[list.Items[i].Name] = &list.Items[i]
		}
		for i, name := range names {
			p, err := asPod(found[name])
			if err != nil {
				return fmt.Errorf("pod %s: %w", name, err)
			}
			pods[i] = p
		}
		return nil
	})
	return pods
}

// asPod returns a pod that is ready, with one address in each family.
func asPod(object *corev1.Pod) (pod, error) {
	if object == nil {
		return pod{}, errNotFound
	}
	ready := false
	for _, c := range object.Status.Conditions {
		ready = ready || c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	}
	if !ready {
		return pod{}, fmt.Errorf("phase %s, not ready", object.Status.Phase)
	}
	p := pod{object: object, place: place{name: object.Name}}
	for _, ip := range object.Status.PodIPs {
		a, err := netip.ParseAddr(ip.IP)
		if err != nil {
			return pod{}, err
		}
		p.addrs = append(p.addrs, a)
	}
	if len(p.addrs) != len(families()) {
		return pod{}, fmt.Errorf("has addresses %v, want one of each family", p.addrs)
	}
	for i, n := range cluster.Nodes() {
		if n.Name == object.Spec.NodeName {
			p.node = i + 1
		}
	}
	if object.Spec.HostNetwork {
		p.netns = nodePlace(p.node).netns
		return p, nil
	}
	path, err := podNetns(p.node, p.addrs[0])
	p.netns = func() (string, error) { return path, nil }
	return p, err
}

// podNetns finds a pod's network namespace among those that the node's runtime has bound to files: it is the one with its address.
func podNetns(node int, addr netip.Addr) (string, error) {
	pid, err := cluster.Nodes()[node-1].PID()
	if err != nil {
		return "", err
	}
	paths, err := filepath.Glob(fmt.Sprintf("/proc/%d/root/run/netns/*", pid))
	if err != nil {
		return "", err
	}
	for _, path := range paths {
		if has, err := hasAddress(path, addr); err == nil && has { // others may be about to end
			return path, nil
		}
	}
	return "", fmt.Errorf("node%d has no network namespace with address %s", node, addr)
}

func hasAddress(path string, addr netip.Addr) (has bool, err error) {
	err = netns.Do(path, func() error {
		addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
		for _, a := range addrs {
			ip, _ := netip.AddrFromSlice(a.IP)
			has = has || ip.Unmap() == addr
		}
		return err
	})
	return has, err
}

// delete deletes a pod and waits until it is gone.
func (s *space) delete(name string) {
	s.t.Helper()
	s.must(api.remove(s.ctx, "Pod", s.name, name))
	eventually(s.t, "end of pod "+name, time.Minute, func() error {
		err := api.get(s.ctx, "Pod", s.name, name, &corev1.Pod{})
		if errors.Is(err, errNotFound) {
			return nil
		}
		return errors.Join(errors.New("it is still there"), err)
	})
}

// label changes labels of a pod.
func (s *space) label(name, key, value string) {
	s.t.Helper()
	s.must(api.patch(s.ctx, "Pod", s.name, name, fmt.Sprintf(`{"metadata":{"labels":{%q:%q}}}`, key, value)))
}

// kubectl runs kubectl in the namespace and returns what it prints.
func (s *space) kubectl(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(s.ctx, time.Minute)
	defer cancel()
	return cluster.Kubectl(ctx, append([]string{"--namespace=" + s.name}, args...)...)
}

// exists reports whether a file is there.
func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
