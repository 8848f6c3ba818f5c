// SPDX-License-Identifier: Apache-2.0

//go:build tools

// Package tools names what the test cluster builds from this module: containerd, its shim and its client.
package tools

import (
	_ "github.com/containerd/containerd/v2/cmd/containerd"
	_ "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2"
	_ "github.com/containerd/containerd/v2/cmd/ctr"
)
