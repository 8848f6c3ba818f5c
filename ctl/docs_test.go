// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/margay-cni/margay/pkg/flow"
)

// TestDocumented: docs/margayctl.md names every command, every flag and every JSON field.
func TestDocumented(t *testing.T) {
	data, err := os.ReadFile("../docs/margayctl.md")
	if err != nil {
		t.Fatal(err)
	}
	doc := string(data)
	want := func(kind, text string) {
		if !strings.Contains(doc, text) {
			t.Errorf("docs/margayctl.md lacks the %s %s", kind, text)
		}
	}
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		for _, flag := range regexp.MustCompile(`--[a-z]+`).FindAllString(c.LocalFlags().FlagUsages(), -1) {
			want("flag", flag)
		}
		for _, sub := range c.Commands() {
			want("command", "`"+sub.CommandPath()+"`")
			walk(sub)
		}
	}
	walk(newRoot(&app{}))
	for _, v := range []any{nodeStatus{}, nodeList{}, endpointList{}, serviceList{}, flowList{}, policyList{}, dropList{}, flow.Event{}} {
		for _, name := range jsonNames(reflect.TypeOf(v)) {
			if !strings.Contains(doc, "`"+name+"`") && !strings.Contains(doc, "`"+name+"[]`") {
				t.Errorf("docs/margayctl.md lacks the field %s of %T", name, v)
			}
		}
	}
}

// jsonNames returns the names of a type's fields, and of theirs.
func jsonNames(typ reflect.Type) []string {
	for typ.Kind() == reflect.Pointer || typ.Kind() == reflect.Slice {
		typ = typ.Elem()
	}
	if typ.Kind() != reflect.Struct {
		return nil
	}
	var names []string
	for i := range typ.NumField() {
		f := typ.Field(i)
		if name, _, _ := strings.Cut(f.Tag.Get("json"), ","); name != "" {
			names = append(names, name)
		}
		names = append(names, jsonNames(f.Type)...)
	}
	return names
}
