// SPDX-License-Identifier: Apache-2.0

package main

// hints says in a few words what a drop reason means; docs/drop-reasons.md says it at length. A test requires one for every reason.
var hints = map[string]string{
	"truncated":            "headers do not fit the packet",
	"unknown_ethertype":    "neither IPv4, IPv6 nor ARP",
	"unknown_protocol":     "only TCP, UDP and ICMP are carried",
	"spoofed_address":      "a pod sent from an address that is not its own",
	"spoofed_mac":          "a pod sent from a MAC that is not its own",
	"policy":               "denied by policy; see margayctl policy",
	"policy_pending":       "policy not known yet; is margay-agent running?",
	"service_no_backend":   "the service has no ready endpoint; the client was told",
	"service_no_local":     "Local traffic policy and no endpoint on this node",
	"no_route":             "the node has no route to the destination",
	"fragment":             "IP fragment without a whole transport header",
	"extension_header":     "unknown or too many IPv6 extension headers",
	"multicast":            "pods cannot send multicast or broadcast",
	"invalid_arp":          "harmless: pods need no ARP",
	"invalid_nd":           "harmless: pods need no neighbour discovery",
	"icmp_type":            "neither echo nor an ICMP error",
	"no_flow":              "ICMP error or reply of no known flow",
	"flow_table":           "the flow table took no entry; see margayctl status",
	"nat":                  "the packet could not be rewritten",
	"redirect":             "the kernel refused the device; is it gone or down?",
	"invalid_config":       "a map lacks an entry; restart margay-agent",
	"source_is_local":      "from outside, but claims an address of this node",
	"nat_collision":        "translated ports are taken; the client's retry helps",
	"service_unknown_port": "the service has no such port; see margayctl services",
	"overlay_source":       "encapsulated by no known node, or not from its own pods",
	"overlay_vni":          "VXLAN network number is not ours; see --vxlan-vni",
	"not_encapsulated":     "another node's pod address from outside the overlay",
	"no_source_port":       "masquerade has no free port towards the destination",
	"no_egress_address":    "the node has no address of this family to send from",
	"too_big":              "does not fit the path's MTU; the sender was told",
	"fragment_lost":        "the datagram's first fragment did not come in time",
}
