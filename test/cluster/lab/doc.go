// SPDX-License-Identifier: Apache-2.0

// Package lab is a Kubernetes cluster on one machine, for tests: real kube-apiserver, etcd, kubelets and containerds in fake machines
// that are namespaces (package machine). It owns everything of a cluster, and that lies in three places only: one state directory, cgroups
// below margay-cluster-ID, and the machines' first processes, recorded with their start times. No link, route, mount or namespace name is
// ever made in the real machine, so killing these processes and removing those directories leaves nothing (Down).
//
// The control plane runs in the machine "control", which is the router between the nodes as well: its bridge "fabric" is the nodes'
// network, and the external client is one hop behind it. A cluster is used by one process at a time; Up, Down and PowerOn hold no lock
// against each other within a process.
package lab
