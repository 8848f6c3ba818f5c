// SPDX-License-Identifier: Apache-2.0

//go:build cluster

package lab_test

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/margay-cni/margay/internal/testutil/privileged"
	"github.com/margay-cni/margay/test/cluster/lab"
)

// built returns the directory with what test/cluster build made.
func built(t *testing.T) string {
	t.Helper()
	privileged.Require(t)
	dir, err := filepath.Abs("../../../build/cluster")
	must(t, err)
	for _, path := range []string{"bin/kubelet", "bin/machine-init", "images/agnhost.tar"} {
		if _, err := os.Stat(filepath.Join(dir, path)); err != nil {
			t.Fatalf("go run ./test/cluster build comes first: %v", err)
		}
	}
	return dir
}

func logger(t *testing.T) *slog.Logger { return slog.New(slog.NewTextHandler(t.Output(), nil)) }

const web = `apiVersion: apps/v1
kind: DaemonSet
metadata: {name: web}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 0
      tolerations: [{operator: Exists}]
      containers:
      - {name: web, image: "registry.k8s.io/e2e-test-images/agnhost:2.66.1", args: [netexec], ports: [{containerPort: 8080, hostPort: 8088}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, type: NodePort, ipFamilyPolicy: PreferDualStack, ports: [{port: 80, targetPort: 8080, nodePort: 30080}]}
`

// bench is a cluster with a web server on each node.
type bench struct {
	*lab.Cluster
	t   *testing.T
	ctx context.Context
}

func newBench(t *testing.T, family lab.Family, nodes int) *bench {
	t.Helper()
	c := up(t, lab.Options{Dir: built(t), Name: "test-" + string(family), Nodes: nodes, Family: family, CNI: "reference"})
	b := &bench{Cluster: c, t: t, ctx: t.Context()}
	must(t, c.Apply(b.ctx, web))
	b.kubectl("rollout", "status", "daemonset/web", "--timeout=120s")
	return b
}

func (b *bench) kubectl(args ...string) string {
	b.t.Helper()
	out, err := b.Kubectl(b.ctx, args...)
	must(b.t, err)
	return strings.TrimSpace(out)
}

// pod returns a field of the web server's pod on a node.
func (b *bench) pod(node, path string) string {
	b.t.Helper()
	return b.kubectl("get", "pods", "--selector=app=web", "--field-selector=spec.nodeName="+node, "--output=jsonpath={.items[0]"+path+"}")
}

// fetch gets a page of the web server with a command's help, with some patience.
func (b *bench) fetch(from func(url string) (string, error), addr string, port int, page string) string {
	b.t.Helper()
	url := "http://" + net.JoinHostPort(addr, fmt.Sprint(port)) + page
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		out, err := from(url)
		if err == nil {
			return strings.TrimSpace(out)
		}
		if time.Now().After(deadline) {
			b.t.Fatalf("get %s: %v", url, err)
		}
	}
}

func (b *bench) fromPod(node string) func(string) (string, error) {
	name := b.pod(node, ".metadata.name")
	return func(url string) (string, error) {
		return b.Kubectl(b.ctx, "exec", name, "--", "curl", "-gsf", "--max-time", "3", url)
	}
}

func (b *bench) fromClient(url string) (string, error) {
	return b.Client().Output(b.ctx, "curl", "-gsf", "--max-time", "3", url)
}

// TestNetwork requires of the reference network, in every family, what the cluster is there for: so what Margay fails at later is not
// the harness' fault.
func TestNetwork(t *testing.T) {
	for _, family := range []lab.Family{lab.Dual, lab.IPv4, lab.IPv6} {
		t.Run(string(family), func(t *testing.T) {
			b := newBench(t, family, 2)
			from := b.fromPod("node1")
			for _, node := range []string{"node1", "node2"} {
				name := b.pod(node, ".metadata.name")
				for _, addr := range strings.Fields(b.pod(node, ".status.podIPs[*].ip")) {
					if got := b.fetch(from, addr, 8080, "/hostname"); got != name {
						t.Errorf("pod of %s at %s answers %q, want %q", node, addr, got, name)
					}
				}
				if got := b.kubectl("get", "--raw", "/api/v1/namespaces/default/pods/"+name+":8080/proxy/hostname"); got != name {
					t.Errorf("the API server reaches %q at the pod of %s, want %q", got, node, name)
				}
			}
			addrs := strings.Fields(b.kubectl("get", "service", "web", "--output=jsonpath={.spec.clusterIPs[*]}"))
			if want := len(b.PodRanges()); len(addrs) != want {
				t.Errorf("the service has addresses %v, want %d", addrs, want)
			}
			for _, addr := range append(addrs, "web.default.svc."+lab.Domain) {
				b.fetch(from, addr, 80, "/hostname")
			}
			for _, n := range b.Nodes() {
				for _, addr := range n.Addresses() {
					b.fetch(b.fromClient, addr.String(), 30080, "/hostname")
				}
			}
		})
	}
}

// TestReboot: a node that was switched off starts with the disk it had and nothing else, and its pods come back.
func TestReboot(t *testing.T) {
	b := newBench(t, lab.Dual, 2)
	n := b.Nodes()[1]
	for _, path := range []string{"/run/mark", "/var/mark", "/etc/mark", "/opt/mark"} {
		must(t, n.WriteFile(path, []byte("here")))
	}
	container := b.pod("node2", ".status.containerStatuses[0].containerID")
	pid, err := n.PID()
	must(t, err)
	must(t, n.Reboot(b.ctx))
	if now, err := n.PID(); err != nil || now == pid {
		t.Errorf("first process %d, %v, want another one than %d", now, err, pid)
	}
	out, err := n.Output(b.ctx, "sh", "-c", "ls /run/mark /var/mark /etc/mark /opt/mark 2>/dev/null; true")
	must(t, err)
	if got, want := strings.Fields(out), "[/etc/mark /opt/mark /var/mark]"; fmt.Sprint(got) != want {
		t.Errorf("after the reboot there are %v, want %v", got, want)
	}
	if mac, err := b.Control().Output(b.ctx, "cat", "/sys/class/net/fabric/address"); err != nil || strings.TrimSpace(mac) != "02:00:1e:00:00:01" {
		t.Errorf("the router has the MAC %q (%v): one that depends on its ports changes with a reboot, and nobody tells its neighbours", mac, err)
	}
	must(t, b.WaitReady(b.ctx))
	for deadline := time.Now().Add(time.Minute); b.pod("node2", ".status.containerStatuses[0].containerID") == container; time.Sleep(time.Second) {
		if time.Now().After(deadline) {
			t.Fatal("the pod's container is said to be the one from before")
		}
	}
	b.kubectl("rollout", "status", "daemonset/web", "--timeout=60s")
	b.fetch(b.fromPod("node1"), b.pod("node2", ".status.podIP"), 8080, "/hostname")
}

// TestServicesEndAndStart kills what runs pods; the pods themselves go on.
func TestServicesEndAndStart(t *testing.T) {
	b := newBench(t, lab.Dual, 1)
	n := b.Nodes()[0]
	container := b.pod("node1", ".status.containerStatuses[0].containerID")
	addr := b.pod("node1", ".status.podIP")
	inNode := func(url string) (string, error) { return n.Output(b.ctx, "curl", "-gsf", "--max-time", "3", url) }
	for _, service := range []string{lab.Kubelet, lab.Containerd} {
		must(t, n.Kill(service))
	}
	running, err := n.Services()
	must(t, err)
	if _, kubelet := running[lab.Kubelet]; kubelet || running[lab.KubeProxy] == 0 {
		t.Errorf("services %v, want kube-proxy without kubelet", running)
	}
	b.fetch(inNode, addr, 8080, "/hostname")
	for _, service := range []string{lab.Containerd, lab.Kubelet} {
		must(t, n.Start(service))
	}
	if err := n.Start(lab.Kubelet); err == nil || !strings.Contains(err.Error(), "runs already") {
		t.Errorf("a second start of kubelet = %v, want that it runs already", err)
	}
	must(t, b.WaitReady(b.ctx))
	if got := b.pod("node1", ".status.containerStatuses[0].containerID"); got != container {
		t.Errorf("the pod's container is %s, want %s as before", got, container)
	}

	must(t, b.StopAPI())
	if _, err := b.Kubectl(b.ctx, "get", "--raw=/readyz", "--request-timeout=2s"); err == nil {
		t.Error("the API server answers although it was stopped")
	}
	b.fetch(b.fromClient, n.Addresses()[0].String(), 30080, "/hostname")
	must(t, b.StartAPI(b.ctx))
	b.kubectl("exec", "daemonset/web", "--", "true")
}

// TestInNetns: a test's own client reaches the API server from the control plane's namespace.
func TestInNetns(t *testing.T) {
	c := up(t, lab.Options{Dir: built(t), Name: "innetns", Nodes: 1, Family: lab.Dual, CNI: "none"})
	dial := func() error {
		conn, err := net.DialTimeout("tcp", netip.AddrPortFrom(c.APIAddress(), 6443).String(), 2*time.Second)
		if err == nil {
			_ = conn.Close()
		}
		return err
	}
	must(t, c.Control().InNetns(dial))
	must(t, c.Nodes()[0].InNetns(dial))
	must(t, c.Client().InNetns(dial)) // by way of the router
}
