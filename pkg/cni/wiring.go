// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"

	"github.com/margay-cni/margay/pkg/datapath"
)

// The functions here turn *datapath.Datapath into the interface that the verbs use. A nil pointer must not become a non-nil interface.

func ensureDatapath(ctx context.Context, cfg datapath.Config) (dataplane, error) {
	d, err := datapath.Ensure(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return d, nil
}

func openDatapath(cfg datapath.Config) (dataplane, error) {
	d, err := datapath.Open(cfg)
	if err != nil {
		return nil, err
	}
	return d, nil
}
