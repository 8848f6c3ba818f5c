// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

/*
 * No program: the object whose BTF bpf2go turns into the Go types, and whose map definitions pkg/datapath creates and pins.
 */

#include "maps.h"

/* A type reaches BTF only when something refers to it. */
const enum direction *unused_direction SEC("unused");
const enum hook *unused_hook SEC("unused");
const enum identity *unused_identity SEC("unused");
const enum policy_id *unused_policy_id SEC("unused");
const enum drop_reason *unused_drop_reason SEC("unused");
const enum flow_action *unused_flow_action SEC("unused");
const enum flow_flags *unused_flow_flags SEC("unused");
const enum flow_tcp *unused_flow_tcp SEC("unused");
const enum endpoint_flags *unused_endpoint_flags SEC("unused");
const enum pending_flags *unused_pending_flags SEC("unused");
const enum node_addr_flags *unused_node_addr_flags SEC("unused");
const enum epoch_slots *unused_epoch_slots SEC("unused");
const enum node_flags *unused_node_flags SEC("unused");
const enum service_scope *unused_service_scope SEC("unused");
const enum service_flags *unused_service_flags SEC("unused");
const enum policy_prefix *unused_policy_prefix SEC("unused");
const enum policy_verdict *unused_policy_verdict SEC("unused");
const enum policy_entry_flags *unused_policy_entry_flags SEC("unused");
const enum route_flags *unused_route_flags SEC("unused");
const enum node_tunnel_flags *unused_node_tunnel_flags SEC("unused");
const enum overlay_vni *unused_overlay_vni SEC("unused");
const enum backend_list *unused_backend_list SEC("unused");
const enum service_backend_flags *unused_service_backend_flags SEC("unused");
const enum service_addr *unused_service_addr SEC("unused");
const enum host_port_numbers *unused_host_port_numbers SEC("unused");
const enum event_type *unused_event_type SEC("unused");
const struct event *unused_event SEC("unused");
const struct sweep *unused_sweep SEC("unused");
