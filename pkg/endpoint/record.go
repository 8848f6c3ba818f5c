// SPDX-License-Identifier: Apache-2.0

// Package endpoint owns the record files under <run>/endpoints: one JSON file for each pod interface that Margay serves, written by the
// CNI plugin before ADD returns and removed by DEL. They are the truth from which the agent can rebuild the maps, and where everything
// that shows addresses finds pod names. It also owns the layout of <run>/node.json, by which the agent tells the plugin what holds for
// every pod of the node. All are written to a temporary file and renamed, so a reader never sees half of one.
package endpoint

import (
	"net/netip"
	"time"
)

// Values of Record.Policy: the policies that the agent had published for the pod, none, or those of a pod whose policies are not known.
const (
	StartedPublished = "published"
	StartedOpen      = "open"
	StartedNodeOnly  = "node-only"
)

// Record is one pod interface.
type Record struct {
	// Version of the record's layout; readers refuse a newer one.
	Version int `json:"version"`
	// ContainerID and IfName are CNI_CONTAINERID and CNI_IFNAME: together they name the attachment.
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifName"`
	// Netns is CNI_NETNS, the path of the pod's network namespace at ADD.
	Netns string `json:"netns"`
	// NetnsID tells that namespace from another one that gets the same path later: device and inode of its file, "4:4026532008". Empty in
	// records of builds that did not write it.
	NetnsID string `json:"netnsID,omitempty"`
	// HostNetnsID is the same of the node's network namespace, in which HostIfindex and HostIfName mean something.
	HostNetnsID string `json:"hostNetnsID,omitempty"`
	// Network is the name of the CNI network (the conflist's name).
	Network string `json:"network"`
	// IPAM is the IPAM plugin that gave the addresses, empty for an adopted interface; IPAMRun the run directory of its leases, if that is
	// margay-ipam with one of its own.
	IPAM    string `json:"ipam,omitempty"`
	IPAMRun string `json:"ipamRunDir,omitempty"`
	// Namespace, Name and UID are the pod's, from CNI_ARGS; empty where the runtime knows no pods.
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	UID       string `json:"uid,omitempty"`
	// Labels come from the args.cni.labels convention, for machines without Kubernetes.
	Labels map[string]string `json:"labels,omitempty"`
	// Addresses of the pod's interface.
	Addresses []netip.Addr `json:"addresses"`
	// MAC of the pod's interface, HostMAC of the host-side device.
	MAC     string `json:"mac"`
	HostMAC string `json:"hostMAC"`
	// HostIfName and HostIfindex name the host-side device.
	HostIfName  string `json:"hostIfName"`
	HostIfindex int    `json:"hostIfindex"`
	// Adopted says that another plugin made the interface.
	Adopted bool `json:"adopted,omitempty"`
	// FollowMTU says that the node, not the conflist or another plugin, decides about the interface's MTU: the agent changes it, at both
	// ends, when the node's changes.
	FollowMTU bool `json:"followMTU,omitempty"`
	// Policy says what the pod started with: StartedPublished, StartedOpen or StartedNodeOnly (architecture promise 2).
	Policy string `json:"policy,omitempty"`
	// HostPorts are the ports of the node that lead to the pod.
	HostPorts []HostPort `json:"hostPorts,omitempty"`
	// Created is when ADD registered the endpoint.
	Created time.Time `json:"created"`
}
