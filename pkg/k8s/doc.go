// SPDX-License-Identifier: Apache-2.0

// Package k8s is a source of snapshots: the Kubernetes API. It owns how the API server is found and stays found, what is listed and watched
// (rows I1 to I12 of the kube-proxy contract in the design documents), and how changes become snapshots. It does not know what is made of
// those, or how it reaches the kernel. docs/kubernetes-source.md and design note 0011 describe it.
//
// Objects are trimmed as they arrive, one at a time, and kept once, in the form of package state. Snapshots share them: a change costs a
// copy of one kind's table of pointers.
//
// The API server's absence is a problem to report, and changes nothing: what was known stays in force. Nothing at all is published
// before every kind has been read whole.
//
// All exported methods may be called by several goroutines; Run once.
package k8s
