// SPDX-License-Identifier: Apache-2.0

package endpoint

import (
	"encoding/json"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func TestReadNode(t *testing.T) {
	run := t.TempDir()
	if _, err := ReadNode(run); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("ReadNode without a file: %v, want %v", err, fs.ErrNotExist)
	}
	want := NewNode("n1", "vxlan", 1450, []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24"), netip.MustParsePrefix("fd00:1::/64")})
	data, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"as written": string(data), "cut off": string(data[:20]), "newer": `{"version":2}`, "no version": `{"mtu":1400}`,
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(filepath.Join(run, NodeFile), []byte(content), 0o644); err != nil {
				t.Fatal(err)
			}
			got, err := ReadNode(run)
			if name != "as written" {
				if err == nil {
					t.Errorf("ReadNode(%s) = %+v, want an error", content, got)
				}
				return
			}
			if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Prefix{})); err != nil || diff != "" {
				t.Errorf("ReadNode = %v (-want +got):\n%s", err, diff)
			}
		})
	}
}
