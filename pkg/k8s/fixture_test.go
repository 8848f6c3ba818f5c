// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/margay-cni/margay/internal/testutil/apitest"
	"github.com/margay-cni/margay/pkg/state"
)

// bound is for what should take milliseconds, on a machine that is busy with other things.
const bound = 30 * time.Second

// recorder keeps what a source publishes.
type recorder struct {
	t      testing.TB
	source *Source

	mu        sync.Mutex
	snapshots []*state.Snapshot
	arrived   chan struct{}
}

// inPod is the configuration of an agent in a pod of n1, with the server named by kubelet's file.
func inPod(t testing.TB, s *apitest.Server) Config {
	return Config{
		Node: "n1", ServiceAccountDir: s.ServiceAccount(), StateDir: t.TempDir(), KubeletKubeconfigs: []string{s.Kubeconfig()},
		UserAgent: "test", Log: slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", p[:len(p)-1])
	return len(p), nil
}

// run follows the API until the test ends.
func run(t testing.TB, cfg Config) *recorder {
	t.Helper()
	source, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r := &recorder{t: t, source: source, arrived: make(chan struct{}, 1)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- source.Run(ctx, r.publish) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run() = %v, want nil", err)
			}
		case <-time.After(bound):
			t.Error("Run() does not end")
		}
	})
	return r
}

func (r *recorder) publish(s *state.Snapshot) {
	r.mu.Lock()
	r.snapshots = append(r.snapshots, s)
	r.mu.Unlock()
	select {
	case r.arrived <- struct{}{}:
	default:
	}
}

// all are the snapshots so far.
func (r *recorder) all() []*state.Snapshot {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]*state.Snapshot(nil), r.snapshots...)
}

// last is the newest snapshot, nil if there is none.
func (r *recorder) last() *state.Snapshot {
	if all := r.all(); len(all) > 0 {
		return all[len(all)-1]
	}
	return nil
}

// until waits for a snapshot that is as wanted.
func (r *recorder) until(what string, want func(*state.Snapshot) bool) *state.Snapshot {
	r.t.Helper()
	timeout := time.After(bound)
	for {
		if s := r.last(); s != nil && want(s) {
			return s
		}
		select {
		case <-r.arrived:
		case <-timeout:
			r.t.Fatalf("waited %v for %s; problems: %v", bound, what, r.source.Problems())
		}
	}
}

// eventually waits for something that no snapshot tells.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(bound); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited %v for %s", bound, what)
		}
	}
}

func key(name string) state.Key {
	return state.Key{Namespace: "web", Name: name}
}

func meta1(name string, labels map[string]string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: "web", Name: name, UID: types.UID("uid-" + name), Labels: labels}
}

func apiNode(name string, cidrs ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{PodCIDRs: cidrs}}
	n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.1"}, {Type: corev1.NodeInternalIP, Address: "2001:db8::1"}}
	return n
}

func apiNamespace(name string) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"kubernetes.io/metadata.name": name}}}
}

func apiPod(i int) *corev1.Pod {
	name := fmt.Sprintf("p%d", i)
	p := &corev1.Pod{ObjectMeta: meta1(name, map[string]string{"app": "web", "pod-template-hash": "5d8f9c7b6d"})}
	p.Spec.NodeName = "n1"
	p.Spec.Containers = []corev1.Container{{Name: "c", Image: "registry.example/web:1", Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}}}}
	p.Status.Phase = corev1.PodRunning
	p.Status.PodIPs = []corev1.PodIP{{IP: netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}).String()}, {IP: fmt.Sprintf("fd00::%x:%x", i>>16, i&0xffff)}}
	p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	return p
}

func apiService(name string, clusterIPs ...string) *corev1.Service {
	s := &corev1.Service{ObjectMeta: meta1(name, nil)}
	s.Spec = corev1.ServiceSpec{Type: corev1.ServiceTypeClusterIP, ClusterIPs: clusterIPs, Ports: []corev1.ServicePort{{Name: "http", Port: 80}}}
	if len(clusterIPs) > 0 {
		s.Spec.ClusterIP = clusterIPs[0]
	}
	return s
}

func apiSlice(name, service string, family discoveryv1.AddressType, addresses ...string) *discoveryv1.EndpointSlice {
	http, port, tcp := "http", int32(8080), corev1.ProtocolTCP
	s := &discoveryv1.EndpointSlice{
		ObjectMeta: meta1(name, map[string]string{discoveryv1.LabelServiceName: service}), AddressType: family,
		Ports: []discoveryv1.EndpointPort{{Name: &http, Port: &port, Protocol: &tcp}},
	}
	for _, a := range addresses {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{a}})
	}
	return s
}

// kubernetesSlices are the endpoints of default/kubernetes.
func kubernetesSlice(name string, servers ...string) *discoveryv1.EndpointSlice {
	tcp, https := corev1.ProtocolTCP, "https"
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: "kubernetes"}},
		AddressType: discoveryv1.AddressTypeIPv4,
	}
	for _, server := range servers {
		a := netip.MustParseAddrPort(server)
		port := int32(a.Port())
		if a.Addr().Is6() {
			s.AddressType = discoveryv1.AddressTypeIPv6
		}
		s.Ports = []discoveryv1.EndpointPort{{Name: &https, Port: &port, Protocol: &tcp}}
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{a.Addr().String()}})
	}
	return s
}
