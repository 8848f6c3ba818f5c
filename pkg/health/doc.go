// SPDX-License-Identifier: Apache-2.0

// Package health answers over HTTP what others ask of a service proxy: load balancers about one service (healthCheckNodePort, Services),
// about the node (/healthz and /livez, Proxy), and people and their tools about the agent (/metrics, /proxyMode and more, NewIntrospection).
// Rows named H are those of the kube-proxy contract in the design documents.
//
// It does not know what the maps hold or how they are written: the pipeline tells it. Nothing here ends the agent: an address that cannot
// be bound is a Condition, and is tried again.
//
// Sockets belong to the network namespace of the calling process, so several agents in namespaces of one machine do not meet. All types
// may be used by several goroutines.
package health

import "time"

// Condition is something that this package was asked for and cannot do; it lasts until that works.
type Condition struct {
	// Subject says what is missing: "metrics server", "health check of web/api".
	Subject string `json:"subject"`
	Error   string `json:"error"`
	// Since is when it began.
	Since time.Time `json:"since"`
}
