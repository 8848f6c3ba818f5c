// SPDX-License-Identifier: Apache-2.0

package state

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"testing"
	"unsafe"
)

// randomPod has one of a few sets of everything, and now and then labels that look alike.
func randomPod(r *rand.Rand) *Pod {
	p := &Pod{Key: Key{Namespace: fmt.Sprint("ns", r.IntN(2)), Name: fmt.Sprint("p", r.IntN(100))}, Node: fmt.Sprint("n", r.IntN(3))}
	switch r.IntN(4) {
	case 0:
		p.Labels = map[string]string{"a": "b", "c": fmt.Sprint(r.IntN(3))}
	case 1:
		p.Labels = map[string]string{"a": "bc", "": fmt.Sprint(r.IntN(3))}
	case 2:
		p.Labels = map[string]string{"ab": "c", "c": ""}
	}
	for range r.IntN(3) {
		p.Ports = append(p.Ports, ContainerPort{Name: []string{"", "web"}[r.IntN(2)], Protocol: []Protocol{TCP, UDP}[r.IntN(2)], Port: uint16(r.IntN(3) * 128)})
	}
	p.IPs = []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(r.IntN(256))})}
	return p
}

// Whatever is shared, no object says anything else than before, and equal sets of labels are the identical one.
func TestInterner(t *testing.T) {
	var i Interner
	r := rand.New(rand.NewPCG(6, 6))
	shared := map[string]uintptr{}
	for range 5000 {
		p := randomPod(r)
		want := *p
		want.Labels = maps.Clone(p.Labels)
		want.Ports = append([]ContainerPort(nil), p.Ports...)
		got := i.Pod(p)
		if !reflect.DeepEqual(*got, want) {
			t.Fatalf("Pod() = %+v, want %+v", *got, want)
		}
		if len(got.Labels) > 0 {
			text, at := fmt.Sprint(got.Labels), reflect.ValueOf(got.Labels).Pointer()
			if first, known := shared[text]; known && first != at {
				t.Fatalf("labels %s are not shared", text)
			}
			shared[text] = at
		}
	}
	s := &EndpointSlice{Key: Key{Namespace: "ns", Name: "s"}, Service: Key{Namespace: "ns", Name: "w"}, Ports: []SlicePort{{Name: "web", Protocol: TCP, Port: 80}}}
	s.Endpoints = []Endpoint{{Node: "n1", Zone: "z"}, {Node: string([]byte("n1"))}}
	want := &EndpointSlice{Key: s.Key, Service: s.Service, Ports: []SlicePort{{Name: "web", Protocol: TCP, Port: 80}}, Endpoints: []Endpoint{{Node: "n1", Zone: "z"}, {Node: "n1"}}}
	if got := i.EndpointSlice(s); !reflect.DeepEqual(got, want) {
		t.Errorf("EndpointSlice() = %+v, want %+v", got, want)
	}
	if unsafe.StringData(s.Endpoints[0].Node) != unsafe.StringData(s.Endpoints[1].Node) {
		t.Error("the name of a node is not shared")
	}
	if i.Pod(nil) != nil || i.EndpointSlice(nil) != nil {
		t.Error("something is made of nothing")
	}
}

// A shelf forgets, sooner or later, what nobody has any more.
func TestInternerForgets(t *testing.T) {
	var i Interner
	for n := range 3 * shelfRoom {
		i.Pod(&Pod{Labels: map[string]string{"pod-template-hash": fmt.Sprint(n)}})
	}
	if n := len(i.labels.values); n > shelfRoom {
		t.Errorf("%d sets of labels are remembered, want at most %d", n, shelfRoom)
	}
}
