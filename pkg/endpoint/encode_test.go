// SPDX-License-Identifier: Apache-2.0

package endpoint

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"testing"
	"time"
)

// TestRecordFileIsWhatEncodingJSONWrites sets one field after the other, so that a new one cannot be forgotten.
func TestRecordFileIsWhatEncodingJSONWrites(t *testing.T) {
	var r Record
	check := func(what string) {
		want, err := json.Marshal(&r)
		if err != nil {
			t.Fatal(err)
		}
		got, err := r.encode()
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != string(want)+"\n" {
			t.Errorf("%s:\nencode() %s\nwant     %s", what, got, want)
		}
	}
	check("empty")
	v := reflect.ValueOf(&r).Elem()
	for i := range v.NumField() {
		name := v.Type().Field(i).Name
		switch f := v.Field(i).Addr().Interface().(type) {
		case *string:
			*f = fmt.Sprintf(`<"%s" é>`, name)
		case *int:
			*f = -i
		case *bool:
			*f = true
		case *map[string]string:
			*f = map[string]string{"b": "2", "a": `"1"`}
		case *[]netip.Addr:
			*f = []netip.Addr{}
			check("no address")
			*f = []netip.Addr{netip.MustParseAddr("10.0.0.5"), netip.MustParseAddr("fd00::5"), {}}
		case *[]HostPort:
			*f = []HostPort{{Protocol: "tcp", Host: netip.MustParseAddrPort("[::]:80"), ID: 7}}
		case *time.Time:
			*f = time.Date(2026, 1, 2, 3, 4, 5, 678, time.UTC)
		default:
			t.Fatalf("no value for field %s", name)
		}
		check(name)
	}
}
