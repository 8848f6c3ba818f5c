// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"

	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/pins"
)

// attachments says whether the programs of the pinned build are on a device: nil when they are.
type attachments interface {
	PodAttached(ifindex int) error
	NetdevAttached(ifindex int) error
	NetdevPrograms(ifindex int) []string
	OverlayAttached(ifindex int) error
	// Linked says whether one of the programs is there as a tcx link, too.
	Linked(ifindex int, programs ...string) bool
}

// opened is the datapath of this build.
type opened struct{ *datapath.Datapath }

// NetdevPrograms names the programs that belong on a device of the node.
func (opened) NetdevPrograms(ifindex int) []string { return datapath.NetdevPrograms(ifindex) }

// openDatapath opens this build's programs.
func openDatapath(cfg datapath.Config) (*datapath.Datapath, error) {
	d, err := datapath.Open(cfg)
	if errors.Is(err, pins.ErrNotLoaded) {
		return nil, fmt.Errorf("the pinned programs are not those of this margayctl's build (%w): whether devices carry them is not known", err)
	}
	return d, err
}
