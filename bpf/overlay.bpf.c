// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

/* The two programs on the overlay device, a VXLAN device in collect-metadata mode: the outer header is skb metadata on both ways. */

#include "lib/established.h"

const char gpl_compatible[] SEC("license") = "Dual BSD/GPL";

/* tc ingress of the overlay device: what other nodes send, decapsulated. */
SEC("tc")
int from_overlay(struct __sk_buff *skb)
{
	(void)skb;
	return TC_ACT_OK;
}

/* tc egress of it: what this node's own stack sends to other nodes' pods, and what our programs redirect there. */
SEC("tc")
int to_overlay(struct __sk_buff *skb)
{
	(void)skb;
	return TC_ACT_OK;
}
