// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"time"

	"github.com/margay-cni/margay/test/cluster/machine"
)

// The control plane's services.
const (
	Etcd              = "etcd"
	APIServer         = "kube-apiserver"
	ControllerManager = "kube-controller-manager"
	Scheduler         = "kube-scheduler"
)

// Domain is the cluster's DNS domain.
const Domain = "cluster.local"

// APIAddress returns the address that the API server advertises; its port is 6443.
func (c *Cluster) APIAddress() netip.Addr { return number(c.fabricPrefixes()[0], controlNumber) }

// apiURL is the API server's, as nodes reach it without services.
func (c *Cluster) apiURL() string {
	return "https://" + netip.AddrPortFrom(c.APIAddress(), 6443).String()
}

// DNSAddress returns the cluster address of the DNS service.
func (c *Cluster) DNSAddress() netip.Addr { return number(c.ServiceRanges()[0], 10) }

// makeKeys makes the certificates and kubeconfigs of all components.
func (c *Cluster) makeKeys() error {
	a, err := newAuthority(c.pkiDir())
	if err != nil {
		return err
	}
	addrs := append(addresses(c.fabricPrefixes(), controlNumber), addresses(c.ServiceRanges(), 1)...)
	addrs = append(addrs, netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback())
	names := []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc." + Domain, "localhost"}
	users := [][]string{ // certificate, user, groups
		{"admin", "kubernetes-admin", "system:masters"},
		{"kubelet-client", "kube-apiserver", "system:masters"}, // of the API server, when it calls a kubelet
		{ControllerManager, "system:kube-controller-manager"},
		{Scheduler, "system:kube-scheduler"},
		{KubeProxy, "system:kube-proxy"},
	}
	for _, n := range c.Nodes() {
		users = append(users, []string{n.Name, "system:node:" + n.Name, "system:nodes"})
	}
	errs := []error{a.server("api", names, addrs), a.serviceAccountKeys()}
	for _, u := range users {
		errs = append(errs, a.client(u[0], u[1], u[2:]...), a.kubeconfig(u[0], c.apiURL()))
	}
	return errors.Join(errs...)
}

// join writes prefixes as the command lines of Kubernetes want them.
func join(prefixes []netip.Prefix) string {
	var all []string
	for _, p := range prefixes {
		all = append(all, p.String())
	}
	return strings.Join(all, ",")
}

func (c *Cluster) controlSpec() machine.Spec {
	anyAddress := "0.0.0.0"
	if c.Family != IPv4 {
		anyAddress = "::"
	}
	masks := pick(c.Family, "--node-cidr-mask-size-ipv4=24", "--node-cidr-mask-size-ipv6=64")
	if c.Family != Dual {
		masks = pick(c.Family, "--node-cidr-mask-size=24", "--node-cidr-mask-size=64")
	}
	data := filepath.Join(c.Control().dir, machine.DiskDir, "var/lib/etcd")
	services := map[string]machine.Service{
		// Nothing of etcd's must survive the real machine's crash.
		Etcd: {Argv: []string{c.bin("etcd"), "--data-dir", data, "--listen-client-urls", "http://127.0.0.1:2379", "--advertise-client-urls",
			"http://127.0.0.1:2379", "--listen-peer-urls", "http://127.0.0.1:2380", "--unsafe-no-fsync", "--log-level", "warn"}},
		APIServer: {Argv: []string{c.bin("kube-apiserver"), "--etcd-servers=http://127.0.0.1:2379", "--secure-port=6443", "--bind-address=" + anyAddress,
			"--advertise-address=" + c.APIAddress().String(), "--service-cluster-ip-range=" + join(c.ServiceRanges()), "--allow-privileged=true",
			"--authorization-mode=Node,RBAC", "--client-ca-file=" + c.pki("ca.crt"), "--tls-cert-file=" + c.pki("api.crt"),
			"--tls-private-key-file=" + c.pki("api.key"), "--kubelet-client-certificate=" + c.pki("kubelet-client.crt"),
			"--kubelet-client-key=" + c.pki("kubelet-client.key"), "--kubelet-preferred-address-types=InternalIP",
			"--service-account-issuer=https://kubernetes.default.svc." + Domain, "--service-account-key-file=" + c.pki("sa.pub"),
			"--service-account-signing-key-file=" + c.pki("sa.key")}},
		ControllerManager: {Argv: append([]string{c.bin("kube-controller-manager"), "--kubeconfig=" + c.pki(ControllerManager+".conf"),
			"--leader-elect=false", "--allocate-node-cidrs=true", "--cluster-cidr=" + join(c.PodRanges()),
			"--service-cluster-ip-range=" + join(c.ServiceRanges()), "--service-account-private-key-file=" + c.pki("sa.key"),
			"--root-ca-file=" + c.pki("ca.crt"), "--cluster-signing-cert-file=" + c.pki("ca.crt"), "--cluster-signing-key-file=" + c.pki("ca.key"),
			"--use-service-account-credentials=true", "--flex-volume-plugin-dir=/var/lib/flexvolume"}, masks...)},
		Scheduler: {Argv: []string{c.bin("kube-scheduler"), "--kubeconfig=" + c.pki(Scheduler+".conf"), "--leader-elect=false"}},
	}
	return machine.Spec{Hostname: "control", Keep: []string{c.Dir}, Cgroups: c.cgroups, Services: services, Files: hostFiles("control")}
}

// hostFiles are the files in /etc that name the machine. No name server answers at the fabric's router: nothing beyond the cluster has a name.
func hostFiles(name string) map[string]string {
	return map[string]string{
		"/etc/hostname":    name + "\n",
		"/etc/hosts":       "127.0.0.1 localhost " + name + "\n::1 localhost\n",
		"/etc/resolv.conf": "nameserver 127.0.0.1\n",
	}
}

// startControl starts the control plane's machine and services and waits until the API server is ready.
func (c *Cluster) startControl(ctx context.Context) error {
	m := c.Control()
	if err := m.define(c.controlSpec()); err != nil {
		return err
	}
	if err := errors.Join(m.powerOn(c.plugControl), inotifyLimit.raise()); err != nil {
		return err
	}
	for _, s := range []string{Etcd, APIServer} {
		if err := m.Start(s); err != nil {
			return err
		}
	}
	return nil
}

// startControllers starts what needs the API server.
func (c *Cluster) startControllers(ctx context.Context) error {
	if err := c.WaitAPI(ctx); err != nil {
		return err
	}
	return errors.Join(c.Control().Start(ControllerManager), c.Control().Start(Scheduler))
}

// WaitAPI waits until the API server says that it is ready.
func (c *Cluster) WaitAPI(ctx context.Context) error {
	err := poll(ctx, 2*time.Minute, 250*time.Millisecond, func() error {
		_, err := c.Kubectl(ctx, "get", "--raw=/readyz")
		return err
	})
	if err != nil {
		return fmt.Errorf("wait for the API server: %w; %s", err, tail(c.Control().Log(APIServer)))
	}
	return nil
}

// StopAPI ends the API server. Everything else goes on; StartAPI brings it back.
func (c *Cluster) StopAPI() error { return c.Control().Stop(APIServer) }

// StartAPI starts the API server again and waits until it is ready.
func (c *Cluster) StartAPI(ctx context.Context) error {
	if err := c.Control().Start(APIServer); err != nil {
		return err
	}
	return c.WaitAPI(ctx)
}

// poll calls f until it succeeds, and returns its last error when the time is up.
func poll(ctx context.Context, limit, interval time.Duration, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ctx.Err(), err)
		case <-time.After(interval):
		}
	}
}
