// SPDX-License-Identifier: Apache-2.0

package jsonwrite

import (
	"encoding/json"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestObject(t *testing.T) {
	var o Object
	o.String("empty", "")
	o.OmitString("left out", "")
	o.OmitInt("left out", 0)
	o.OmitTrue("left out", false)
	o.Int("n", -3)
	o.OmitInt("m", 4)
	o.OmitTrue("yes", true)
	o.OmitString("s", "t")
	o.Raw("list", List(Text("a"), []byte("1")))
	if err := o.Any("any", map[string]int{"x": 1}); err != nil {
		t.Fatal(err)
	}
	if err := o.Any("bad", make(chan int)); err == nil {
		t.Error("Any() of a channel = nil, want an error")
	}
	want := `{"empty":"","n":-3,"m":4,"yes":true,"s":"t","list":["a",1],"any":{"x":1}}`
	if diff := cmp.Diff(want, string(o.Bytes())); diff != "" {
		t.Errorf("Bytes() (-want +got):\n%s", diff)
	}
	if got := string(new(Object).Bytes()); got != "{}" {
		t.Errorf("empty object is %s", got)
	}
	if got := string(List()); got != "[]" {
		t.Errorf("empty list is %s", got)
	}
}

func FuzzText(f *testing.F) {
	for _, s := range []string{"", "plain", "a\"b\\c", "<&>", "\x00\x1f\x7f", "é\u2028", "\xff\xfe", "tab\t"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		want, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		if got := Text(s); string(got) != string(want) {
			t.Errorf("Text(%q) = %s, want %s", s, got, want)
		}
	})
}
