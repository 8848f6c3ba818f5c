// SPDX-License-Identifier: Apache-2.0

package endpoint

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
)

// NodeFile is in the run directory. The agent writes it once it knows the cluster, and whenever what it says changes; it stays when the
// agent ends.
const NodeFile = "node.json"

// nodeVersion is the layout of Node.
const nodeVersion = 1

// Node is what the agent tells the plugin about this node.
type Node struct {
	// Version of the layout; readers refuse a newer one. NewNode sets it.
	Version int `json:"version"`
	// Name of the node.
	Name string `json:"name"`
	// RoutingMode is "vxlan", "direct" or "auto".
	RoutingMode string `json:"routingMode"`
	// MTU of pods' interfaces, in bytes, for pods whose conflist names none; 0 = not known.
	MTU int `json:"mtu,omitempty"`
	// PodCIDRs are the ranges that the cluster gave to this node's pods.
	PodCIDRs []netip.Prefix `json:"podCIDRs,omitempty"`
}

// NewNode returns a Node of the layout of this build.
func NewNode(name, mode string, mtu int, cidrs []netip.Prefix) Node {
	return Node{Version: nodeVersion, Name: name, RoutingMode: mode, MTU: mtu, PodCIDRs: cidrs}
}

// ReadNode returns what the agent wrote into the run directory. The error wraps fs.ErrNotExist when there is no file: no agent has run here
// since the machine started, or none has seen the cluster.
func ReadNode(run string) (Node, error) {
	path := filepath.Join(run, NodeFile)
	data, err := os.ReadFile(path)
	if err != nil {
		return Node{}, fmt.Errorf("read node file: %w", err)
	}
	var n Node
	if err := json.Unmarshal(data, &n); err != nil {
		return Node{}, fmt.Errorf("decode %s: %w", path, err)
	}
	if n.Version < 1 || n.Version > nodeVersion {
		return Node{}, fmt.Errorf("%s has layout %d, want %d", path, n.Version, nodeVersion)
	}
	return n, nil
}
