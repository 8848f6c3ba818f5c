// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/internal/testutil/apitest"
	"github.com/margay-cni/margay/pkg/state"
)

// onlyRemembered is an agent that knows nothing but what it remembered.
func onlyRemembered(t *testing.T, s *apitest.Server, servers ...string) Config {
	t.Helper()
	cfg := inPod(t, s)
	cfg.KubeletKubeconfigs = nil
	var addrs []netip.AddrPort
	for _, a := range servers {
		addrs = append(addrs, netip.MustParseAddrPort(a))
	}
	if err := writeRemembered(cfg.StateDir, addrs); err != nil {
		t.Fatal(err)
	}
	return cfg
}

func TestAnotherServerTakesOver(t *testing.T) {
	a := apitest.New(t)
	b := a.Another()
	a.Put(apiNode("n1", "10.244.1.0/24"))
	r := run(t, onlyRemembered(t, a, a.Addr(), b.Addr()))
	r.until("a snapshot", anything)
	if n := len(b.Requests("pods")); n != 0 {
		t.Errorf("%d requests to the second server, want none", n)
	}
	began := time.Now()
	a.Stop()
	b.Put(apiPod(1))
	r.until("the pod", func(s *state.Snapshot) bool { return len(s.Pods) == 1 })
	t.Logf("the second server took over after %v", time.Since(began).Round(time.Millisecond))
	if len(b.Requests("pods")) == 0 {
		t.Error("no request to the second server")
	}
}

// A server that answers errors alone is left.
func TestServerThatIsOfNoUse(t *testing.T) {
	a := apitest.New(t)
	b := a.Another()
	a.Put(apiNode("n1", "10.244.1.0/24"))
	a.Fail("", apitest.Fault{Code: http.StatusServiceUnavailable})
	r := run(t, onlyRemembered(t, a, a.Addr(), b.Addr()))
	r.until("a snapshot", anything)
}

// A server that falls silent without closing its connections is given up within seconds.
func TestServerThatFallsSilent(t *testing.T) {
	a := apitest.New(t)
	b := a.Another()
	a.Put(apiNode("n1", "10.244.1.0/24"))
	wire := newWire(t, a.Addr())
	r := run(t, onlyRemembered(t, a, wire.addr, b.Addr()))
	r.until("a snapshot", anything)
	began := time.Now()
	wire.cut()
	b.Put(apiPod(1))
	r.until("the pod", func(s *state.Snapshot) bool { return len(s.Pods) == 1 })
	took := time.Since(began)
	t.Logf("the second server took over after %v", took.Round(time.Millisecond))
	if took < pingAfter/2 {
		t.Errorf("after %v, want a silence of seconds: the wire was not cut", took)
	}
}

// wire passes bytes on between clients and a server until it is cut; then it holds connections open and passes nothing.
type wire struct {
	addr string
	mu   sync.Mutex
	off  chan struct{}
}

func newWire(t *testing.T, to string) *wire {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{addr: l.Addr().String(), off: make(chan struct{})}
	var conns []net.Conn
	t.Cleanup(func() {
		_ = l.Close()
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, c := range conns {
			_ = c.Close()
		}
	})
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", to)
			if err != nil {
				_ = client.Close()
				continue
			}
			w.mu.Lock()
			conns = append(conns, client, server)
			w.mu.Unlock()
			go w.pass(server, client)
			go w.pass(client, server)
		}
	}()
	return w
}

func (w *wire) pass(to io.Writer, from io.Reader) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		select {
		case <-w.off:
			return
		default:
		}
		if err != nil {
			return
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}

func (w *wire) cut() { close(w.off) }

// What the cluster says of its API servers is kept, used at once, and enough for the next start.
func TestServersAreRemembered(t *testing.T) {
	a := apitest.New(t)
	b := a.Another()
	a.Put(apiNode("n1", "10.244.1.0/24"), kubernetesSlice("kubernetes", b.Addr()))
	cfg := inPod(t, a) // kubelet names a
	r := run(t, cfg)
	r.until("a snapshot", anything)
	want := []netip.AddrPort{netip.MustParseAddrPort(b.Addr())}
	eventually(t, "the file", func() bool {
		got, err := readRemembered(cfg.StateDir)
		return err == nil && cmp.Equal(got, want, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }))
	})
	a.Stop()
	a.Put(apiPod(1))
	r.until("the pod, from the server that the cluster named", func(s *state.Snapshot) bool { return len(s.Pods) == 1 })

	cfg.KubeletKubeconfigs = nil
	again := run(t, cfg)
	again.until("a snapshot of the next agent", anything)
}

// An address that belongs to somebody else by now gets neither belief nor the token.
func TestServerWithAnotherAuthority(t *testing.T) {
	mine, stranger := apitest.New(t), apitest.New(t)
	mine.Put(apiNode("n1"))
	stranger.Put(apiNode("n2"))
	r := run(t, onlyRemembered(t, mine, stranger.Addr(), mine.Addr()))
	got := r.until("a snapshot", anything)
	if got.Nodes["n1"] == nil || got.Nodes["n2"] != nil || len(stranger.Requests("nodes")) != 0 {
		t.Errorf("nodes = %v, want the own cluster's", got.Nodes)
	}
}

func TestKubeconfig(t *testing.T) {
	s := apitest.New(t)
	s.Put(apiNode("n1"))
	cfg := inPod(t, s)
	cfg.Kubeconfig, cfg.ServiceAccountDir, cfg.KubeletKubeconfigs = s.Kubeconfig(), "/nonexistent", nil
	r := run(t, cfg)
	r.until("a snapshot", anything)
	if _, err := os.Stat(filepath.Join(cfg.StateDir, RememberedFile)); err == nil {
		t.Error("servers are remembered, want the kubeconfig's alone to count")
	}
}

func TestFoundAddresses(t *testing.T) {
	s := apitest.New(t)
	kubelet := s.Kubeconfig()
	t.Setenv("KUBERNETES_SERVICE_HOST", "fd00:96::1")
	t.Setenv("KUBERNETES_SERVICE_PORT", "443")
	for _, tc := range []struct {
		name   string
		tweak  func(*Config)
		want   []string
		refuse bool
	}{
		{"all", func(*Config) {}, []string{
			"192.0.2.1:6443 kubernetes.default.svc", "[2001:db8::1]:6443 kubernetes.default.svc", s.Addr() + " kubernetes.default.svc", "[fd00:96::1]:443 kubernetes.default.svc",
		}, false},
		{"nothing remembered", func(c *Config) { c.StateDir = t.TempDir() }, []string{
			s.Addr() + " kubernetes.default.svc", "[fd00:96::1]:443 kubernetes.default.svc",
		}, false},
		{"no state directory", func(c *Config) { c.StateDir, c.KubeletKubeconfigs = "", []string{"/nonexistent"} }, []string{"[fd00:96::1]:443 kubernetes.default.svc"}, false},
		{"the operator's", func(c *Config) { c.Servers = []string{"https://api.example:6443", "https://[2001:db8::7]"} }, []string{
			"api.example:6443 api.example", "[2001:db8::7]:443 2001:db8::7",
		}, false},
		{"without TLS", func(c *Config) { c.Servers = []string{"http://192.0.2.1:8080"} }, nil, true},
		{"no URL", func(c *Config) { c.Servers = []string{"192.0.2.1:6443"} }, nil, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg := onlyRemembered(t, s, "192.0.2.1:6443", "[2001:db8::1]:6443")
			cfg.KubeletKubeconfigs = []string{"/nonexistent", kubelet, kubelet}
			tc.tweak(&cfg)
			found, err := cfg.found()
			if (err != nil) != tc.refuse {
				t.Fatalf("found() = %v, refused: want %v", err, tc.refuse)
			}
			var got []string
			for _, a := range found {
				got = append(got, a.hostPort+" "+a.serverName)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("addresses (-want +got):\n%s", diff)
			}
		})
	}
}

func TestNewRefuses(t *testing.T) {
	s := apitest.New(t)
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	for name, tweak := range map[string]func(*Config){
		"no service account": func(c *Config) { c.ServiceAccountDir = t.TempDir() },
		"no address":         func(c *Config) { c.KubeletKubeconfigs = nil },
		"no kubeconfig":      func(c *Config) { c.Kubeconfig = "/nonexistent" },
	} {
		cfg := inPod(t, s)
		tweak(&cfg)
		if _, err := New(cfg); err == nil {
			t.Errorf("%s: New() = nil, want an error", name)
		}
	}
}

// Of a file that is damaged nothing is believed, and the agent starts all the same.
func TestRememberedFileIsDamaged(t *testing.T) {
	s := apitest.New(t)
	s.Put(apiNode("n1"))
	for _, text := range []string{"", "{", `{"version": 99, "servers": ["192.0.2.1:1"]}`, `{"version": 1, "servers": ["x"]}`} {
		cfg := inPod(t, s)
		if err := os.WriteFile(filepath.Join(cfg.StateDir, RememberedFile), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if got, err := readRemembered(cfg.StateDir); err == nil || len(got) > 0 {
			t.Errorf("readRemembered(%q) = %v, %v, want an error", text, got, err)
		}
		run(t, cfg).until("a snapshot", anything)
	}
}
