// SPDX-License-Identifier: Apache-2.0

package dump_test

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/margay-cni/margay/pkg/dump"
)

func TestWhole(t *testing.T) {
	refused := errors.New("refused")
	for name, c := range map[string]struct {
		interrupted int
		then        error
		want        []int
		err         error
	}{
		"not interrupted":  {0, nil, []int{1, 2}, nil},
		"twice":            {2, nil, []int{1, 2}, nil},
		"always":           {1 << 30, nil, nil, netlink.ErrDumpInterrupted},
		"refused":          {0, refused, []int{1, 2}, refused},
		"refused at last":  {3, refused, []int{1, 2}, refused},
		"the last of many": {31, nil, []int{1, 2}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			calls := 0
			got, err := dump.Whole(func() ([]int, error) {
				if calls++; calls <= c.interrupted {
					return []int{1}, netlink.ErrDumpInterrupted
				}
				return []int{1, 2}, c.then
			})
			if diff := cmp.Diff(c.want, got); diff != "" || !errors.Is(err, c.err) {
				t.Errorf("Whole() = %v, %v, want %v, %v", got, err, c.want, c.err)
			}
		})
	}
}
