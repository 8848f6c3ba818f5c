// SPDX-License-Identifier: Apache-2.0

package object

import (
	"fmt"
	"hash/crc32"
	"testing"

	"github.com/margay-cni/margay/pkg/bpf"
)

// Build must change with the objects: programs of another build would be taken for ours.
func TestBuildIsOfTheseObjects(t *testing.T) {
	want := ""
	for _, object := range [][]byte{_PodBytes, _NetdevBytes, _OverlayBytes, _HostBytes, _SweepBytes} {
		want += fmt.Sprintf("%08x", crc32.ChecksumIEEE(object))
	}
	if got := bpf.Build(); got != want {
		t.Errorf("Build() = %s, want %s: run make generate", got, want)
	}
}
