// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/privileged"
	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/pins"
)

// The tests of this file run the built plugin through libcni, with the shipped programs over maps of their own.

var build struct {
	once      sync.Once
	margay    error
	reference error
	dir       string
}

func TestMain(m *testing.M) {
	status := m.Run()
	if build.dir != "" {
		_ = os.RemoveAll(build.dir)
	}
	os.Exit(status)
}

// referencePlugins are tools of go.mod, which pins their version.
var referencePlugins = []string{
	"github.com/containernetworking/plugins/plugins/main/bridge",
	"github.com/containernetworking/plugins/plugins/main/ptp",
	"github.com/containernetworking/plugins/plugins/ipam/host-local",
	"github.com/containernetworking/plugins/plugins/meta/portmap",
	"github.com/containernetworking/plugins/plugins/meta/bandwidth",
	"github.com/containernetworking/plugins/plugins/meta/tuning",
}

// binaries builds the plugin and the reference plugins, and returns their directory.
func binaries(t *testing.T, reference bool) string {
	t.Helper()
	privileged.Require(t)
	build.once.Do(func() {
		if build.dir, build.margay = os.MkdirTemp("", "margay-cni-test"); build.margay != nil {
			return
		}
		build.margay = errors.Join(
			goCommand("build", "-o", filepath.Join(build.dir, "margay"), "github.com/margay-cni/margay/plugin"),
			goCommand("build", "-o", filepath.Join(build.dir, "margay-loader"), "github.com/margay-cni/margay/plugin/loader"))
		build.reference = goCommand(append([]string{"build", "-o", build.dir + "/"}, referencePlugins...)...)
	})
	if build.margay != nil {
		t.Fatal(build.margay)
	}
	if reference && build.reference != nil {
		if os.Getenv("REQUIRE_PRIVILEGED") == "1" {
			t.Fatalf("build the reference plugins: %v", build.reference)
		}
		t.Skipf("build the reference plugins: %v", build.reference)
	}
	return build.dir
}

func goCommand(args ...string) error {
	cmd := exec.Command("go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

// realNode is a node with the real datapath, on a bpffs of its own.
type realNode struct {
	*node
	bin   string
	cache string
}

func newRealNode(t *testing.T, reference bool) *realNode {
	t.Helper()
	n := &realNode{bin: binaries(t, reference), node: newNode(t), cache: t.TempDir()}
	n.bpffs = filepath.Join(t.TempDir(), "bpf")
	t.Cleanup(func() {
		if err := unix.Unmount(n.bpffs, unix.MNT_DETACH); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Errorf("unmount bpffs: %v", err)
		}
	})
	n.ns.Do(func() {
		d, err := datapath.Ensure(context.Background(), pins.Config{BPFFS: n.bpffs, Run: n.run})
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	})
	return n
}

// in returns the same node for a subtest: the programs need verifying only once.
func (n *realNode) in(t *testing.T) *realNode {
	inner, outer := *n.node, *n
	inner.t, outer.node = t, &inner
	return &outer
}

// list returns a configuration list of the plugins.
func (n *realNode) list(version string, plugins ...map[string]any) *libcni.NetworkConfigList {
	n.t.Helper()
	text, err := json.Marshal(map[string]any{"cniVersion": version, "name": "net", "plugins": plugins})
	if err != nil {
		n.t.Fatal(err)
	}
	l, err := libcni.NetworkConfFromBytes(text)
	if err != nil {
		n.t.Fatal(err)
	}
	return l
}

// margay returns our part of a configuration list.
func (n *realNode) margay(ranges []string, tweaks ...func(map[string]any)) map[string]any {
	n.t.Helper()
	var c map[string]any
	if err := json.Unmarshal(n.conf(ranges, tweaks...), &c); err != nil {
		n.t.Fatal(err)
	}
	delete(c, "cniVersion")
	delete(c, "name")
	return c
}

func (n *realNode) hostLocal(ranges []string) map[string]any {
	var sets []any
	for _, r := range ranges {
		sets = append(sets, []any{map[string]any{"subnet": r}})
	}
	return map[string]any{"type": "host-local", "dataDir": filepath.Join(n.cache, "host-local"), "ranges": sets}
}

func (n *realNode) cni() *libcni.CNIConfig {
	return libcni.NewCNIConfigWithCacheDir([]string{n.bin}, n.cache, nil)
}

func runtimeConf(id string, pod *netnstest.NS) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{ContainerID: id, NetNS: pod.Path(), IfName: "eth0", Args: [][2]string{
		{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "shop"}, {"K8S_POD_NAME", id}, {"K8S_POD_UID", "uid-" + id}}}
}

func (n *realNode) addList(l *libcni.NetworkConfigList, rt *libcni.RuntimeConf) *types100.Result {
	n.t.Helper()
	var (
		raw types.Result
		err error
	)
	n.ns.Do(func() { raw, err = n.cni().AddNetworkList(context.Background(), l, rt) })
	if err != nil {
		n.t.Fatalf("ADD %s: %v", rt.ContainerID, err)
	}
	r, err := types100.NewResultFromResult(raw)
	if err != nil {
		n.t.Fatal(err)
	}
	return r
}

func (n *realNode) delList(l *libcni.NetworkConfigList, rt *libcni.RuntimeConf) {
	n.t.Helper()
	n.ns.Do(func() {
		if err := n.cni().DelNetworkList(context.Background(), l, rt); err != nil {
			n.t.Errorf("DEL %s: %v", rt.ContainerID, err)
		}
	})
}

func (n *realNode) checkList(l *libcni.NetworkConfigList, rt *libcni.RuntimeConf) {
	n.t.Helper()
	n.ns.Do(func() {
		if err := n.cni().CheckNetworkList(context.Background(), l, rt); err != nil {
			n.t.Errorf("CHECK %s: %v", rt.ContainerID, err)
		}
	})
}

// talk connects from one namespace to an address in another and has one line echoed.
func talk(t *testing.T, from, to *netnstest.NS, a netip.Addr) {
	t.Helper()
	var ln net.Listener
	to.Do(func() {
		var err error
		if ln, err = net.Listen("tcp", netip.AddrPortFrom(a, 0).String()); err != nil {
			t.Fatal(err)
		}
	})
	defer ln.Close()
	served := make(chan error, 1)
	go func() {
		conn, err := ln.Accept()
		if err != nil {
			served <- err
			return
		}
		defer conn.Close()
		line := make([]byte, 5)
		if _, err = conn.Read(line); err == nil {
			_, err = conn.Write(line)
		}
		served <- err
	}()
	from.Do(func() {
		conn, err := net.DialTimeout("tcp", ln.Addr().String(), 5*time.Second)
		if err != nil {
			t.Errorf("connect from %s to %s: %v", from.Path(), a, err)
			return
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
		line := make([]byte, 5)
		if _, err = conn.Write([]byte("hello")); err == nil {
			_, err = conn.Read(line)
		}
		if err != nil || string(line) != "hello" {
			t.Errorf("echo from %s = %q, %v, want hello", a, line, err)
			return
		}
		if err := <-served; err != nil {
			t.Errorf("server at %s: %v", a, err)
		}
	})
}

func TestBinarySpeaksEveryVersion(t *testing.T) {
	node := newRealNode(t, false)
	for _, v := range versions {
		t.Run(v, func(t *testing.T) {
			forFamilies(t, func(t *testing.T, ranges []string) {
				n := node.in(t)
				a, b := netnstest.New(t), netnstest.New(t)
				before := n.state()
				l := n.list(v, n.margay(ranges))
				n.addList(l, runtimeConf("a", a))
				r := n.addList(l, runtimeConf("b", b))
				for _, address := range resultAddresses(r) {
					talk(t, a, b, address)
				}
				if v >= "0.4.0" {
					n.checkList(l, runtimeConf("a", a))
				}
				if v == "1.1.0" {
					n.ns.Do(func() {
						if err := n.cni().GetStatusNetworkList(context.Background(), l); err != nil {
							t.Errorf("STATUS = %v, want nil", err)
						}
						valid := &libcni.GCArgs{ValidAttachments: []types.GCAttachment{{ContainerID: "b", IfName: "eth0"}}}
						if err := n.cni().GCNetworkList(context.Background(), l, valid); err != nil {
							t.Errorf("GC = %v, want nil", err)
						}
					})
					if got := podDevices(t, a); slices.Contains(got, "eth0") {
						t.Errorf("pod a has %v after GC without it, want no eth0", got)
					}
					talk(t, n.ns, b, resultAddresses(r)[0])
				}
				n.delList(l, runtimeConf("a", a))
				n.delList(l, runtimeConf("b", b))
				n.delList(l, runtimeConf("b", b))
				if diff := cmp.Diff(before, n.state()); diff != "" {
					t.Errorf("state (-want +got):\n%s", diff)
				}
			})
		})
	}
}

func TestVersionCommand(t *testing.T) {
	out, err := runPlugin(binaries(t, false), "", "CNI_COMMAND=VERSION")
	var got struct {
		CNIVersion        string   `json:"cniVersion"`
		SupportedVersions []string `json:"supportedVersions"`
	}
	if err := errors.Join(err, json.Unmarshal(out, &got)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(versions, got.SupportedVersions); diff != "" {
		t.Errorf("supportedVersions (-want +got):\n%s", diff)
	}
}

func runPlugin(dir, stdin string, env ...string) ([]byte, error) {
	cmd := exec.Command(filepath.Join(dir, "margay"))
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdin = strings.NewReader(stdin)
	return cmd.Output()
}

func TestErrorsAreJSONOnStandardOutput(t *testing.T) {
	dir := binaries(t, false)
	for name, c := range map[string]struct {
		stdin string
		env   []string
		code  uint
		speak string
	}{
		"no container": {minimalConf, []string{"CNI_COMMAND=ADD", "CNI_PATH=/x"}, 4, "1.1.0"},
		"no JSON":      {`{`, []string{"CNI_COMMAND=STATUS", "CNI_PATH=/x"}, 6, "1.1.0"},
		"wrong version": {`{"cniVersion":"9.9.9","name":"n","type":"margay"}`,
			[]string{"CNI_COMMAND=ADD", "CNI_PATH=/x", "CNI_CONTAINERID=a", "CNI_IFNAME=e", "CNI_NETNS=/x"}, 1, "1.1.0"},
		"invalid": {`{"cniVersion":"1.0.0","name":"n","type":"margay","mtu":1}`,
			[]string{"CNI_COMMAND=ADD", "CNI_PATH=/x", "CNI_CONTAINERID=a", "CNI_IFNAME=e", "CNI_NETNS=/x"}, 7, "1.0.0"},
		"no such namespace": {strings.Replace(minimalConf, `"type"`, `"runDir":"`+t.TempDir()+`","type"`, 1),
			[]string{"CNI_COMMAND=ADD", "CNI_PATH=/x", "CNI_CONTAINERID=a", "CNI_IFNAME=e", "CNI_NETNS=/x"}, 8, "1.1.0"},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := runPlugin(dir, c.stdin, c.env...)
			var exit *exec.ExitError
			if !errors.As(err, &exit) {
				t.Errorf("exit = %v, want a failure", err)
			}
			var got struct {
				CNIVersion string `json:"cniVersion"`
				Code       uint   `json:"code"`
				Msg        string `json:"msg"`
			}
			if err := json.Unmarshal(out, &got); err != nil {
				t.Fatalf("standard output %q: %v", out, err)
			}
			if got.Code != c.code || got.CNIVersion != c.speak || got.Msg == "" {
				t.Errorf("error = %s, want code %d in version %s with a message", out, c.code, c.speak)
			}
		})
	}
}
