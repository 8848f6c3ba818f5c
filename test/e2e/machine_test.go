// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/conf"
	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/privileged"
	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/endpoint"
)

// bin holds the binaries, built once for all tests.
var bin string

func TestMain(m *testing.M) {
	os.Exit(buildAndRun(m))
}

func buildAndRun(m *testing.M) int {
	dir, err := os.MkdirTemp("", "margay-e2e-*")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	bin = dir
	for name, pkg := range map[string]string{"margay": "plugin", "margay-loader": "plugin/loader", "margay-ipam": "ipam", "margay-agent": "agent", "margayctl": "ctl"} {
		build := exec.Command("go", "build", "-o", filepath.Join(dir, name), "github.com/margay-cni/margay/"+pkg)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build %s: %v\n%s", name, err, out)
			return 1
		}
	}
	return m.Run()
}

// machine is a node with Margay's binaries, and a client outside, until the test ends.
type machine struct {
	t         *testing.T
	node      *netnstest.NS
	client    *netnstest.NS
	config    datapath.Config
	manifests string
	cni       *libcni.CNIConfig
	network   *libcni.NetworkConfigList
	agent     *exec.Cmd
	agentLog  bytes.Buffer
}

// pod is a namespace that libcni has connected, or will.
type pod struct {
	ns    *netnstest.NS
	name  string
	addrs []netip.Addr // IPv4, IPv6
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	privileged.Require(t)
	m := &machine{t: t, node: netnstest.New(t), client: netnstest.New(t), manifests: t.TempDir()}
	m.config = datapath.Config{BPFFS: filepath.Join(t.TempDir(), "bpf"), Run: t.TempDir()}
	t.Cleanup(func() {
		if err := unix.Unmount(m.config.BPFFS, unix.MNT_DETACH); err != nil && !os.IsNotExist(err) {
			t.Errorf("unmount bpffs: %v", err)
		}
	})
	m.cni = libcni.NewCNIConfigWithCacheDir([]string{bin}, t.TempDir(), nil)
	m.network = m.shippedNetwork()
	m.joinClient()
	return m
}

// shippedNetwork is the shipped conflist with the test's directories.
func (m *machine) shippedNetwork() *libcni.NetworkConfigList {
	m.t.Helper()
	var list map[string]any
	m.must(json.Unmarshal(conf.Conflist, &list))
	plugin := list["plugins"].([]any)[0].(map[string]any)
	plugin["bpffs"], plugin["runDir"], plugin["logLevel"] = m.config.BPFFS, m.config.Run, "error"
	b, err := json.Marshal(list)
	m.must(err)
	network, err := libcni.NetworkConfFromBytes(b)
	m.must(err)
	return network
}

func (m *machine) records() *endpoint.Store { return endpoint.NewStore(m.config.Run) }

func (m *machine) joinClient() {
	m.t.Helper()
	for _, ns := range []*netnstest.NS{m.node, m.client} {
		ns.Do(func() { m.must(os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0)) })
	}
	peer, err := os.Open(m.client.Path())
	m.must(err)
	defer peer.Close()
	m.node.Do(func() {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "eth0"
		veth := netlink.NewVeth(attrs)
		veth.PeerName, veth.PeerNamespace = "eth0", netlink.NsFd(int(peer.Fd()))
		m.must(netlink.LinkAdd(veth))
		m.up("eth0", nodetest.NodeAddrs)
	})
	m.client.Do(func() { m.up("eth0", nodetest.ClientAddrs) })
}

func (m *machine) up(device string, addrs []netip.Addr) {
	m.t.Helper()
	l, err := netlink.LinkByName(device)
	m.must(err)
	for _, a := range addrs {
		n := &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen()*3/4, a.BitLen())}
		m.must(netlink.AddrAdd(l, &netlink.Addr{IPNet: n, Flags: unix.IFA_F_NODAD}))
	}
	m.must(netlink.LinkSetUp(l))
}

// newPod makes the namespace of a pod of namespace shop, as a runtime does before ADD.
func (m *machine) newPod(name string) *pod {
	return &pod{ns: netnstest.New(m.t), name: name}
}

func (m *machine) attachment(p *pod) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{
		ContainerID: "e2e-" + p.name, NetNS: p.ns.Path(), IfName: "eth0",
		Args: [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "shop"}, {"K8S_POD_NAME", p.name}},
	}
}

// add connects the pod.
func (m *machine) add(p *pod) {
	m.t.Helper()
	m.node.Do(func() {
		r, err := m.cni.AddNetworkList(m.t.Context(), m.network, m.attachment(p))
		m.must(err)
		result, err := types100.NewResultFromResult(r)
		m.must(err)
		for _, ip := range result.IPs {
			a, _ := netip.AddrFromSlice(ip.Address.IP)
			p.addrs = append(p.addrs, a.Unmap())
		}
	})
}

// startPod makes and connects a pod that serves on TCP and UDP port 8080.
func (m *machine) startPod(name string) *pod {
	m.t.Helper()
	p := m.newPod(name)
	m.add(p)
	nodetest.Serve(m.t, p.ns, name, 8080)
	return p
}

// apply puts a manifest into the agent's directory, whole.
func (m *machine) apply(file, content string) {
	m.t.Helper()
	tmp := filepath.Join(m.manifests, "."+file)
	m.must(os.WriteFile(tmp, []byte(content), 0o600))
	m.must(os.Rename(tmp, filepath.Join(m.manifests, file)))
}

// startAgent starts the agent and waits until it has compiled its manifests once.
func (m *machine) startAgent(flags ...string) {
	m.t.Helper()
	m.runAgent(flags...)
	m.eventually("the agent has compiled its manifests", func() bool {
		status, err := m.agentStatus()
		return err == nil && strings.Contains(status, `"written":`)
	})
}

// runAgent starts the agent.
func (m *machine) runAgent(flags ...string) {
	m.t.Helper()
	m.agent = exec.Command(filepath.Join(bin, "margay-agent"), "--manifests", m.manifests, "--node", "node",
		"--bpffs", m.config.BPFFS, "--run", m.config.Run)
	m.agent.Args = append(m.agent.Args, flags...)
	m.agentLog.Reset()
	m.agent.Stdout, m.agent.Stderr = &m.agentLog, &m.agentLog
	m.node.Do(func() { m.must(m.agent.Start()) })
	m.t.Cleanup(func() {
		m.killAgent()
		if m.t.Failed() {
			m.t.Logf("agent log:\n%s", m.agentLog.String())
		}
	})
}

func (m *machine) agentStatus() (string, error) {
	c, err := net.Dial("unix", filepath.Join(m.config.Run, "agent.sock"))
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return "", err
	}
	if _, err := c.Write([]byte("GET /status HTTP/1.0\r\n\r\n")); err != nil {
		return "", err
	}
	var b bytes.Buffer
	_, err = b.ReadFrom(c)
	return b.String(), err
}

func (m *machine) killAgent() {
	if m.agent == nil {
		return
	}
	_ = m.agent.Process.Kill()
	_ = m.agent.Wait()
	m.agent = nil
}

// eventually waits for a condition, for a bounded time.
func (m *machine) eventually(what string, ok func() bool) {
	m.t.Helper()
	for deadline := time.Now().Add(15 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if ok() {
			return
		}
	}
	m.t.Fatalf("not within 15 s: %s", what)
}

func (m *machine) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}
