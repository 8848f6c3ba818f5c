// SPDX-License-Identifier: Apache-2.0

// Package nodes has the tests of several nodes: built plugins and agents, real sockets and a router between them
// (internal/testutil/clustertest draws the topology).
package nodes
