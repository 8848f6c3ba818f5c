// SPDX-License-Identifier: Apache-2.0

// Package bpf holds what bpf2go generates from bpf/: the Go form of every type in bpf/types.h, and the compiled objects. It gives
// the generated names a friendly form, converts byte order in constructors, and names enum values from the object's own BTF.
// It is the only importer of the embedded objects, and knows neither netlink nor Kubernetes.
package bpf
