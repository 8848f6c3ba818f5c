/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/* The ways of a flow's two directions: this node's pod, its stack, another node, or out of a device. Part of the slow path. */

#include "forward.h"
#include "sourceport.h"

/* Which of the two directions: index of the arrays of struct new_flow. */
#define FORWARD 0
#define REPLY 1

/* The device towards an address outside this node's pods, by the kernel's routes. */
static __always_inline int route_lookup(struct __sk_buff *skb, struct new_flow *nf)
{
	struct bpf_fib_lookup fib = {.ifindex = skb->ifindex, .l4_protocol = nf->post.proto};
	struct node_state *s = node_settings();
	long ret;

	/*
	 * Rules may go by the pod's own address; that of masquerade follows from the route, not the other way round. The host's loopback address
	 * has no route at all.
	 */
	fib_addrs(&fib, nf->flags & FLOW_VIA_HOST ? &nf->post.src : &nf->fwd.src, &nf->post.dst);
	ret = bpf_fib_lookup(skb, &fib, sizeof(fib), 0);
	if (fib_leads_out(ret)) {
		/* Service addresses are routed to the host's way to services, where nothing new can be said of this one. */
		if (s && fib.ifindex == s->host_ifindex)
			return -DROP_SERVICE_UNKNOWN_PORT;
		nf->action[FORWARD] = FLOW_TO_NETDEV;
		nf->out_ifindex[FORWARD] = fib.ifindex;
		fib_next_hop(&fib, ret, &nf->next_hop[FORWARD]);
		return 0;
	}
	if (ret == BPF_FIB_LKUP_RET_NOT_FWDED) {
		/* Local, or no route at all: the stack knows which, and answers "unreachable" itself. */
		nf->action[FORWARD] = FLOW_TO_STACK;
		return 0;
	}
	return -DROP_NO_ROUTE;
}

static __always_inline int way_to_node(struct new_flow *nf, __u32 direction, __u32 index)
{
	struct node_state *s = node_settings();
	struct node *n = node_by_index(index);

	if (!s || !s->overlay_ifindex || !n || !n->mtu)
		return -DROP_NO_ROUTE;
	nf->action[direction & 1] = FLOW_TO_NODE;
	nf->out_node[direction & 1] = index;
	nf->out_ifindex[direction & 1] = s->overlay_ifindex;
	nf->mtu[direction & 1] = n->mtu;
	return 0;
}

/*
 * What a pod sends to no pod of this node: through the overlay to another node or its pods, or where the kernel's routes lead, which
 * know the nodes that are reached without it.
 */
static __always_inline int way_from_pod(struct __sk_buff *skb, struct new_flow *nf)
{
	__u32 flags = node_addr_flags_of(&nf->post.dst);
	struct route *r;

	if ((flags & NODE_ADDR_LOCAL) || (nf->src.flags & ENDPOINT_ADOPTED)) {
		nf->action[FORWARD] = FLOW_TO_STACK;
		return 0;
	}
	if (flags & NODE_ADDR_REMOTE)
		return flags & NODE_ADDR_OVERLAY ? way_to_node(nf, FORWARD, flags >> NODE_ADDR_INDEX_SHIFT) : route_lookup(skb, nf);
	/* The stack would drop it as a martian, without a word. */
	if (addr_is_loopback(&nf->post.dst))
		return -DROP_NO_ROUTE;
	r = route_of(&nf->post.dst);
	if (r && (r->flags & ROUTE_LOCAL))
		return -DROP_NO_ROUTE;
	return r && (r->flags & ROUTE_OVERLAY) ? way_to_node(nf, FORWARD, r->node) : route_lookup(skb, nf);
}

/*
 * The device by which the kernel would send to the client of a forwarded flow; 0: none. The client as the backend sees it: this node, led
 * back to itself by another one's NodePort, sees that node.
 */
static __always_inline __u32 device_to_client(struct __sk_buff *skb, const struct new_flow *nf, struct addr *hop)
{
	struct bpf_fib_lookup fib = {.ifindex = skb->ifindex, .l4_protocol = nf->fwd.proto};
	long ret;

	fib_addrs(&fib, &nf->fwd.dst, &nf->post.src);
	ret = bpf_fib_lookup(skb, &fib, sizeof(fib), 0);
	if (!fib_leads_out(ret))
		return 0;
	if (hop)
		fib_next_hop(&fib, ret, hop);
	return fib.ifindex;
}

/* To a backend that is this node itself, for a client whose packets another node has forwarded. */
static __always_inline int way_into_stack(struct __sk_buff *skb, struct new_flow *nf)
{
	nf->action[FORWARD] = FLOW_INTO_NETDEV;
	nf->out_ifindex[FORWARD] = device_to_client(skb, nf, NULL);
	return nf->out_ifindex[FORWARD] ? 0 : -DROP_NO_ROUTE;
}

/* Gives the end of a flow that the host's stack is the MACs by which a device of its own takes a packet. */
static __always_inline void host_end(struct endpoint *e, const __u8 *mac)
{
	mac_copy(e->mac, mac);
	mac_copy(e->host_mac, mac);
}

/*
 * What the host's stack sends to a service and that is for no pod of this node. To itself it comes back by the loopback device, because
 * both addresses are its own. Another node is reached as that node answers, whose stack knows of no overlay; its pods are where they are.
 */
static __always_inline int way_from_host(struct __sk_buff *skb, struct new_flow *nf)
{
	const __u8 loopback[6] = {};
	__u32 flags = node_addr_flags_of(&nf->post.dst);
	struct route *r;
	int ret;

	if (flags & NODE_ADDR_LOCAL) {
		/* What the stack only forwarded would be a martian there. */
		if (!(nf->flags & FLOW_FROM_HOST))
			return -DROP_NO_ROUTE;
		nf->action[FORWARD] = FLOW_TO_HOST;
		nf->out_ifindex[FORWARD] = LOOPBACK_IFINDEX;
		host_end(&nf->dst, loopback);
		return 0;
	}
	r = flags ? NULL : route_of(&nf->post.dst);
	if (r && (r->flags & ROUTE_LOCAL))
		return -DROP_NO_ROUTE;
	if (r && (r->flags & ROUTE_OVERLAY))
		return way_to_node(nf, FORWARD, r->node);
	ret = route_lookup(skb, nf);
	/* The stack has no second answer: it was the stack that sent the packet here. */
	return ret || nf->action[FORWARD] != FLOW_TO_NETDEV ? -DROP_NO_ROUTE : 0;
}

/* Where the opener's packets go. 1: nowhere that Margay serves; the packet is the host's. */
static __always_inline int choose_forward(struct __sk_buff *skb, struct new_flow *nf)
{
	if (nf->backend_port)
		return way_to_node(nf, FORWARD, node_of(&nf->backend));
	if (nf->dst.ifindex) {
		nf->action[FORWARD] = nf->flags & FLOW_VIA_STACK ? FLOW_TO_STACK : FLOW_TO_POD;
		nf->out_ifindex[FORWARD] = nf->dst.ifindex;
		return 0;
	}
	if (nf->flags & FLOW_VIA_HOST)
		return way_from_host(skb, nf);
	if (nf->src.ifindex)
		return way_from_pod(skb, nf);
	nf->action[FORWARD] = FLOW_TO_STACK;
	if (host_flow_is_ours(nf))
		return nf->flags & FLOW_FORWARDED ? way_into_stack(skb, nf) : 0;
	return nf->flags & FLOW_SERVICE ? -DROP_NO_ROUTE : 1;
}

/* The kernel's way from the pod's node to a client that another node has forwarded (direct server return). */
static __always_inline int way_to_client(struct __sk_buff *skb, struct new_flow *nf)
{
	nf->action[REPLY] = FLOW_TO_NETDEV;
	nf->out_ifindex[REPLY] = device_to_client(skb, nf, &nf->next_hop[REPLY]);
	return nf->out_ifindex[REPLY] ? 0 : -DROP_NO_ROUTE;
}

/* Does the kernel's route to the client lead out of the device that the answers have? Notes the next hop there. */
static __always_inline int route_back(struct __sk_buff *skb, struct new_flow *nf)
{
	struct bpf_fib_lookup fib = {.ifindex = nf->out_ifindex[REPLY], .l4_protocol = nf->fwd.proto};
	long ret;

	fib_addrs(&fib, &nf->fwd.dst, &nf->fwd.src);
	ret = bpf_fib_lookup(skb, &fib, sizeof(fib), BPF_FIB_LOOKUP_OUTPUT);
	if (!fib_leads_out(ret) || fib.ifindex != nf->out_ifindex[REPLY])
		return 0;
	fib_next_hop(&fib, ret, &nf->next_hop[REPLY]);
	return 1;
}

/*
 * By the device that the packet at hand came in on: to the kernel's next hop there. If the kernel knows none, because its route to the
 * client is by another device, then to the neighbour that the packet came from. (IPv4 would take the client for a neighbour, IPv6 the
 * other device's gateway.)
 */
static __always_inline int way_back(struct __sk_buff *skb, struct new_flow *nf)
{
	struct ethhdr *eth;

	nf->out_ifindex[REPLY] = skb->ifindex;
	if (route_back(skb, nf))
		return 0;
	eth = pkt_at(skb, 0, sizeof(*eth));
	if (!eth)
		return -DROP_TRUNCATED;
	/* A device without link layer has no neighbours. */
	if (mac_is_zero(eth->h_source))
		return 0;
	nf->flags |= FLOW_TO_MAC;
	mac_copy(nf->src.mac, eth->h_source);
	mac_copy(nf->src.host_mac, eth->h_dest);
	return 0;
}

/* Where the answers go. */
static __always_inline int choose_reply(struct __sk_buff *skb, struct new_flow *nf)
{
	if (!nf->reply)
		nf->flags &= ~FLOW_TO_MAC;
	if (nf->src.ifindex) {
		nf->action[REPLY] = FLOW_TO_POD;
		nf->out_ifindex[REPLY] = nf->src.ifindex;
		return 0;
	}
	if (nf->flags & FLOW_VIA_HOST) {
		/* note_host, or the entry, has told the device. */
		nf->action[REPLY] = FLOW_TO_HOST;
		return 0;
	}
	if (nf->flags & FLOW_VIA_STACK) {
		nf->action[REPLY] = FLOW_TO_STACK;
		nf->out_ifindex[REPLY] = 0;
		return 0;
	}
	/* An answer at hand takes the way that it has. */
	if (nf->reply && nf->out_node[REPLY])
		return way_to_node(nf, REPLY, nf->out_node[REPLY]);
	if (!nf->reply && nf->in_node[FORWARD])
		return nf->flags & FLOW_DSR ? way_to_client(skb, nf) : way_to_node(nf, REPLY, nf->in_node[FORWARD]);
	/* By the device that the opener came in on, whatever the routes say. */
	nf->action[REPLY] = FLOW_TO_NETDEV;
	if (!nf->reply)
		return way_back(skb, nf);
	route_back(skb, nf);
	return 0;
}

/*
 * The MTU of the devices that the flow leaves this node by. Not that of a route: where a hop behind the device takes less, that hop
 * says so, and its error reaches the sender. A changed MTU comes with a new route epoch.
 */
static __always_inline void note_mtu(struct __sk_buff *skb, struct new_flow *nf)
{
	__u32 mtu;

	for (int i = FORWARD; i <= REPLY; i++) {
		if (nf->action[i] != FLOW_TO_NETDEV)
			continue;
		mtu = 1; /* in: a length that the helper compares; out: the device's MTU */
		nf->mtu[i] = bpf_check_mtu(skb, nf->out_ifindex[i], &mtu, 0, 0) < 0 || mtu > 0xffff ? 0 : mtu;
	}
}

/* Both ways; not inlined: connect is short of stack. 1: the packet is the host's; minus a drop reason: there is none. */
__noinline int choose_ways(struct __sk_buff *skb, struct new_flow *nf)
{
	int ret;

	if (!nf)
		return -DROP_INVALID_CONFIG;
	ret = choose_forward(skb, nf);
	if (ret)
		return ret;
	/* The answers come from where the opener's packets go. */
	nf->in_node[REPLY] = nf->in_node[REPLY] ? nf->in_node[REPLY] : nf->out_node[FORWARD];
	ret = choose_reply(skb, nf);
	if (!ret)
		note_mtu(skb, nf);
	return ret;
}
