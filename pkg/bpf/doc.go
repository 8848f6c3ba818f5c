// SPDX-License-Identifier: Apache-2.0

// Package bpf holds the Go form of every type in bpf/types.h, as bpf2go generates it from their BTF. It gives the generated names a friendly
// form and converts byte order in constructors. It needs no BPF library, and knows neither netlink nor Kubernetes: the CNI plugin, which
// runs for a few milliseconds, links it. The compiled objects are in pkg/bpf/object.
package bpf
