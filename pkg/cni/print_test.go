// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"bytes"
	"encoding/json"
	"net"
	"reflect"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/google/go-cmp/cmp"
)

// fullResult has something in every field.
func fullResult(t *testing.T) *types100.Result {
	_, four, _ := net.ParseCIDR("10.0.0.5/32")
	_, six, _ := net.ParseCIDR("fd00::5/128")
	r := &types100.Result{
		CNIVersion: types100.ImplementedSpecVersion,
		Interfaces: []*types100.Interface{
			{Name: "mgy0"}, {Name: "eth0", Mac: "02:00:00:00:00:01", Mtu: 1400, Sandbox: `/run/netns/"a"`, SocketPath: "/s", PciID: "0000:00"},
		},
		IPs: []*types100.IPConfig{
			{Interface: types100.Int(1), Address: *four, Gateway: net.IPv4(169, 254, 1, 1)}, {Interface: types100.Int(0), Address: *six}, {Address: *six},
		},
		Routes: []*types.Route{
			{Dst: *four}, {Dst: *six, GW: net.ParseIP("fe80::1"), MTU: 1, AdvMSS: 2, Priority: 3, Table: types100.Int(0), Scope: types100.Int(253)},
		},
		DNS: types.DNS{Nameservers: []string{"10.0.0.1"}, Domain: "d", Search: []string{"s"}, Options: []string{"o"}},
	}
	for _, v := range []any{*r, *r.Interfaces[1], *r.IPs[0], *r.Routes[1]} {
		for i := range reflect.ValueOf(v).NumField() {
			if reflect.ValueOf(v).Field(i).IsZero() {
				t.Fatalf("%T: nothing in %s", v, reflect.TypeOf(v).Field(i).Name)
			}
		}
	}
	return r
}

func TestPrintedResultIsWhatTheLibraryPrints(t *testing.T) {
	for _, version := range versions {
		for name, r := range map[string]*types100.Result{"full": fullResult(t), "empty": {CNIVersion: types100.ImplementedSpecVersion}} {
			if name == "empty" && version < "1" {
				continue // has no such form
			}
			var got, want bytes.Buffer
			converted, err := r.GetAsVersion(version)
			if err != nil {
				t.Fatal(err)
			}
			if err := converted.PrintTo(&want); err != nil {
				t.Fatal(err)
			}
			if err := printTo(&got, r, version); err != nil {
				t.Errorf("%s, %s: %v", version, name, err)
			}
			var gotAny, wantAny any
			if err := json.Unmarshal(got.Bytes(), &gotAny); err != nil {
				t.Fatalf("%s, %s: %v: %s", version, name, err, got.Bytes())
			}
			if err := json.Unmarshal(want.Bytes(), &wantAny); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(wantAny, gotAny); diff != "" {
				t.Errorf("%s, %s (-want +got):\n%s", version, name, diff)
			}
		}
	}
}

func TestJournalIsWhatEncodingJSONWrites(t *testing.T) {
	var j journal
	v := reflect.ValueOf(&j).Elem()
	for i := range v.NumField() + 1 {
		want, err := json.Marshal(j)
		if err != nil {
			t.Fatal(err)
		}
		if got := j.encode(); string(got) != string(want) {
			t.Errorf("encode() = %s, want %s", got, want)
		}
		if i == v.NumField() {
			break
		}
		switch f := v.Field(i).Addr().Interface().(type) {
		case *string:
			*f = `"x" <`
		case *bool:
			*f = true
		default:
			t.Fatalf("no value for field %s", v.Type().Field(i).Name)
		}
	}
}
