// SPDX-License-Identifier: Apache-2.0

// Package e2e tests a network on a real Kubernetes cluster (package lab): what kubelet, containerd, the API server and the network do
// together, as pods, nodes and a client outside see it. Run it with `make test-cluster`, or with
// `go test -tags cluster ./test/cluster/e2e -cluster NAME` on a cluster that is up.
//
// A test sends from where its subject is: from sockets that it opens in the network namespace of a pod, a node or the client (place). That
// is the same to a network as a process in there, takes a millisecond where kubectl exec takes a second, and tells a refusal from
// silence. Each test has a namespace of its own (space), and asks in every family of the cluster.
package e2e
