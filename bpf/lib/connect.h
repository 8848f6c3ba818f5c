/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/*
 * The slow path: a flow's first packet, and the first one after something that the flow depends on has changed. Ends with two
 * self-contained entries in the flow table, or with a drop. All hooks share it; what differs is which end may be whom.
 *
 * User space changes a map and then raises an epoch. So here every epoch is read before what it is about: a change in between leaves
 * an entry with an old epoch, which the next packet sends here again, and never an old verdict under a new epoch.
 */

#include "drop.h"
#include "forward.h"
#include "lb.h"

/* Which of the two entries: index of new_flow.action and new_flow.out_ifindex. */
#define FORWARD 0
#define REPLY 1

#define NAT_PORT_TRIES 16
#define NAT_PORT_FIRST 1024

static __always_inline __u32 packet_scope(const struct pkt *p)
{
	return p->hook == HOOK_FROM_POD ? SCOPE_INTERNAL : SCOPE_EXTERNAL;
}

/*
 * May this entry's translation go on? Not when a SYN opens a new connection on the remains of an old one, and not when the backend
 * has left the service: for a UDP client (contract row U1), and for a SYN, whose old connection may have ended without a word.
 */
static __always_inline int flow_keeps_translation(const struct pkt *p, const struct flow *f, __u32 epoch)
{
	struct flow *other = flow_other(f);

	if (pkt_opens_tcp(p) && (flow_is_closing(f, other) || flow_is_expired(IPPROTO_TCP, f, other, now_seconds())))
		return 0;
	/* The other end opens a connection of its own on the tuple of one that was established: its own policies decide. */
	if (pkt_opens_tcp(p) && (f->flags & FLOW_REPLY) && ((f->tcp | (other ? other->tcp : 0)) & FLOW_TCP_ESTABLISHED))
		return 0;
	if ((f->flags & (FLOW_SERVICE | FLOW_REPLY)) != FLOW_SERVICE)
		return 1;
	if (pkt_opens_tcp(p) || (p->key.proto == IPPROTO_UDP && f->service_epoch != epoch))
		return backend_still_serves(f);
	return 1;
}

/* The two tuples: from the entry where there is one, else from the packet and the services. */
static __always_inline int new_flow_tuples(const struct pkt *p, struct new_flow *nf, const struct flow *f)
{
	__u32 epoch = f && (f->flags & FLOW_SERVICE) ? service_epoch(f->service_id) : 0;

	nf->flags = 0;
	nf->service_id = 0;
	nf->service_epoch = 0;
	nf->rule_id = 0;
	nf->direction = EGRESS;
	nf->known = 0;
	nf->reply = 0;
	nf->tcp_flags = p->tcp_flags;
	nf->out_ifindex[FORWARD] = 0;
	nf->out_ifindex[REPLY] = 0;
	nf->fwd = p->key;
	nf->post = p->key;
	if (!f || !flow_keeps_translation(p, f, epoch))
		return service_translate(nf, packet_scope(p));
	nf->known = 1;
	nf->flags = f->flags & (FLOW_SERVICE | FLOW_VIA_STACK | FLOW_FROM_HOST);
	if (nf->flags & FLOW_SERVICE) {
		nf->service_id = f->service_id;
		nf->service_epoch = epoch;
	}
	if (f->flags & FLOW_REPLY) {
		nf->reply = 1;
		nf->out_ifindex[REPLY] = f->out_ifindex;
		key_reverse(&nf->fwd, &f->xlate);
		key_reverse(&nf->post, &p->key);
	} else {
		nf->post = f->xlate;
	}
	return 0;
}

/* The pod that owns the address, or ifindex 0. Returns its epoch, which is older than what it is about. */
static __always_inline __u32 read_endpoint(const struct addr *a, struct endpoint *to)
{
	struct endpoint *e = endpoint_of(a);
	__u32 epoch;

	to->ifindex = 0;
	if (!e)
		return 0;
	epoch = endpoint_epoch(e->ifindex);
	e = endpoint_of(a);
	if (e)
		*to = *e;
	return epoch;
}

/* Fills nf->src and nf->dst: the pods of this node at either end. */
static __always_inline void new_flow_endpoints(struct new_flow *nf)
{
	nf->endpoint_epoch[2] = endpoint_epoch(0);
	nf->endpoint_epoch[0] = read_endpoint(&nf->fwd.src, &nf->src);
	nf->endpoint_epoch[1] = read_endpoint(&nf->post.dst, &nf->dst);
}

/* Does the packet come from where its source address lives? */
static __always_inline int check_source(struct __sk_buff *skb, const struct pkt *p, const struct new_flow *nf)
{
	const struct endpoint *sender = nf->reply ? &nf->dst : &nf->src;
	struct ethhdr *eth;

	if (p->hook == HOOK_FROM_POD) {
		eth = pkt_at(skb, 0, sizeof(*eth));
		if (!eth)
			return -DROP_TRUNCATED;
		if (sender->ifindex != skb->ifindex)
			return -DROP_SPOOFED_ADDRESS;
		return mac_equal(eth->h_source, sender->mac) ? 0 : -DROP_SPOOFED_MAC;
	}
	if (p->hook == HOOK_FROM_NETDEV && (sender->ifindex || (node_addr_flags_of(&p->key.src) & NODE_ADDR_LOCAL)))
		return -DROP_SOURCE_IS_LOCAL;
	return 0;
}

/*
 * Egress policy of the opener, then ingress policy of the other end. Traffic with the node itself is always allowed (contract row
 * N10), and so is a pod with itself.
 */
__noinline int judge(struct new_flow *nf)
{
	int from_host, ret;

	if (!nf)
		return -DROP_INVALID_CONFIG;
	if (addr_equal(&nf->fwd.src, &nf->post.dst))
		return 0;
	if (nf->src.ifindex && nf->src.policy_id[EGRESS] != POLICY_NONE &&
	    (nf->dst.ifindex || !(node_addr_flags_of(&nf->post.dst) & NODE_ADDR_LOCAL))) {
		ret = policy_check(nf, &nf->src, EGRESS, nf->dst.ifindex ? nf->dst.identity : identity_of(&nf->post.dst));
		if (ret)
			return ret;
	}
	if (!nf->dst.ifindex || nf->dst.policy_id[INGRESS] == POLICY_NONE)
		return 0;
	from_host = !nf->src.ifindex && ((nf->flags & FLOW_FROM_HOST) || (node_addr_flags_of(&nf->fwd.src) & NODE_ADDR_LOCAL));
	if (from_host)
		return 0;
	return policy_check(nf, &nf->dst, INGRESS, nf->src.ifindex ? nf->src.identity : identity_of(&nf->fwd.src));
}

/* The device towards an address outside this node's pods, by the kernel's routes. */
static __always_inline int route_lookup(struct __sk_buff *skb, struct new_flow *nf)
{
	struct bpf_fib_lookup fib = {.ifindex = skb->ifindex, .l4_protocol = nf->post.proto};
	long ret;

	if (addr_is_v4(&nf->post.dst)) {
		fib.family = AF_INET;
		fib.src[0] = nf->post.src.w[3];
		fib.dst[0] = nf->post.dst.w[3];
	} else {
		fib.family = AF_INET6;
		__builtin_memcpy(fib.src, nf->post.src.w, 16);
		__builtin_memcpy(fib.dst, nf->post.dst.w, 16);
	}
	ret = bpf_fib_lookup(skb, &fib, sizeof(fib), 0);
	if (ret == BPF_FIB_LKUP_RET_SUCCESS || ret == BPF_FIB_LKUP_RET_NO_NEIGH) {
		nf->action[FORWARD] = FLOW_TO_NETDEV;
		nf->out_ifindex[FORWARD] = fib.ifindex;
		return 0;
	}
	if (ret == BPF_FIB_LKUP_RET_NOT_FWDED) {
		/* Local, or no route at all: the stack knows which, and answers "unreachable" itself. */
		nf->action[FORWARD] = FLOW_TO_STACK;
		return 0;
	}
	/* Too large for the way: the stack says so to the sender. A translated packet would be quoted with the wrong address. */
	if (ret == BPF_FIB_LKUP_RET_FRAG_NEEDED && !(nf->flags & FLOW_SERVICE))
		return 1;
	return -DROP_NO_ROUTE;
}

/* Where the opener's packets go. 1: nowhere that Margay serves; the packet is the host's. */
static __always_inline int choose_forward(struct __sk_buff *skb, struct new_flow *nf)
{
	if (nf->dst.ifindex) {
		nf->action[FORWARD] = nf->flags & FLOW_VIA_STACK ? FLOW_TO_STACK : FLOW_TO_POD;
		nf->out_ifindex[FORWARD] = nf->dst.ifindex;
		return 0;
	}
	if (!nf->src.ifindex)
		return nf->flags & FLOW_SERVICE ? -DROP_NO_ROUTE : 1;
	if ((node_addr_flags_of(&nf->post.dst) & NODE_ADDR_LOCAL) || (nf->src.flags & ENDPOINT_ADOPTED)) {
		nf->action[FORWARD] = FLOW_TO_STACK;
		return 0;
	}
	return route_lookup(skb, nf);
}

/* Where the answers go. */
static __always_inline void choose_reply(struct __sk_buff *skb, struct new_flow *nf)
{
	if (nf->src.ifindex) {
		nf->action[REPLY] = FLOW_TO_POD;
		nf->out_ifindex[REPLY] = nf->src.ifindex;
	} else if (nf->flags & FLOW_VIA_STACK) {
		nf->action[REPLY] = FLOW_TO_STACK;
		nf->out_ifindex[REPLY] = 0;
	} else {
		/* By the device that the opener came in on, whatever the routes say. */
		nf->action[REPLY] = FLOW_TO_NETDEV;
		if (!nf->reply)
			nf->out_ifindex[REPLY] = skb->ifindex;
	}
}

/* The epoch of a slot (flow_out_slot) that the flow was judged under. */
static __always_inline __u32 judged_epoch(const struct new_flow *nf, __u32 slot)
{
	if (slot && slot == nf->src.ifindex)
		return nf->endpoint_epoch[0];
	if (slot && slot == nf->dst.ifindex)
		return nf->endpoint_epoch[1];
	return nf->endpoint_epoch[2];
}

/* Composes nf->entry and nf->key for one direction. */
static __always_inline void compose_entry(struct new_flow *nf, __u32 direction)
{
	const struct endpoint *in = direction == FORWARD ? &nf->src : &nf->dst;
	const struct endpoint *out = direction == FORWARD ? &nf->dst : &nf->src;
	struct flow *f = &nf->entry;

	if (direction == FORWARD) {
		nf->key = nf->fwd;
		f->xlate = nf->post;
	} else {
		key_reverse(&nf->key, &nf->post);
		key_reverse(&f->xlate, &nf->fwd);
	}
	f->last_seen = now_seconds();
	f->tick = now_tick();
	f->route_epoch = nf->route_epoch;
	f->service_id = nf->service_id;
	f->service_epoch = nf->service_epoch;
	f->in_ifindex = in->ifindex;
	f->out_ifindex = nf->out_ifindex[direction & 1];
	f->endpoint_epoch[0] = judged_epoch(nf, f->in_ifindex);
	f->action = nf->action[direction & 1];
	f->endpoint_epoch[1] = judged_epoch(nf, flow_out_slot(f));
	f->flags = nf->flags | (direction == REPLY ? FLOW_REPLY : 0) | (in->ifindex ? FLOW_IN_POD : 0);
	if (!in->ifindex && ((direction == FORWARD && (nf->flags & FLOW_FROM_HOST)) || (node_addr_flags_of(&nf->key.src) & NODE_ADDR_LOCAL)))
		f->flags |= FLOW_IN_NODE;
	f->tcp = 0;
	f->rule_id = nf->rule_id;
	__builtin_memcpy(f->in_mac, in->mac, 6);
	__builtin_memcpy(f->dst_mac, out->mac, 6);
	__builtin_memcpy(f->src_mac, out->host_mac, 6);
	f->csum_diff = 0;
	if (!key_equal(&nf->key, &f->xlate)) {
		f->flags |= FLOW_NAT;
		f->csum_diff = csum_diff_addrs(&nf->key, &f->xlate);
	}
}

/* This CPU's work space; NULL only for the verifier. */
static __always_inline struct new_flow *new_flow(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&scratch, &zero);
}

/*
 * Writes one direction's entry; an entry that is there already keeps what it has seen of the connection. Finds the work space itself,
 * because before 6.2 the verifier takes no argument of a global function as a map's key or value.
 */
__noinline int store_direction(__u32 direction)
{
	struct new_flow *nf = new_flow();
	struct flow *old;

	if (!nf)
		return -DROP_INVALID_CONFIG;
	compose_entry(nf, direction);
	if (nf->known) {
		old = bpf_map_lookup_elem(&flows, &nf->key);
		if (old)
			nf->entry.tcp = old->tcp;
	}
	if (nf->key.proto == IPPROTO_TCP && direction == (nf->reply ? REPLY : FORWARD) && !(nf->flags & FLOW_DENIED))
		nf->entry.tcp = flow_tcp_after(nf->entry.tcp, nf->tcp_flags);
	return bpf_map_update_elem(&flows, &nf->key, &nf->entry, BPF_ANY) ? -DROP_FLOW_TABLE : 0;
}

/* Is the answering tuple free, or ours already, or left over from a dead flow? */
static __always_inline int reply_key_is_free(const struct new_flow *nf)
{
	struct flow_key key, want;
	struct flow *taken, *other;

	key_reverse(&key, &nf->post);
	taken = bpf_map_lookup_elem(&flows, &key);
	if (!taken)
		return 1;
	key_reverse(&want, &nf->fwd);
	if (key_equal(&taken->xlate, &want))
		return 1;
	other = flow_other(taken);
	return flow_is_closing(taken, other) || flow_is_expired(key.proto, taken, other, now_seconds());
}

/*
 * Two flows from one client port to one backend, by different service addresses or with and without one, would share the answering
 * tuple. The second gets another client port; its address stays.
 */
static __always_inline int avoid_collision(struct new_flow *nf)
{
	if (nf->post.proto != IPPROTO_TCP && nf->post.proto != IPPROTO_UDP)
		return reply_key_is_free(nf) ? 0 : -DROP_NAT_COLLISION;
	for (int i = 0; i < NAT_PORT_TRIES; i++) {
		if (reply_key_is_free(nf))
			return 0;
		nf->post.sport = bpf_htons(NAT_PORT_FIRST + bpf_get_prandom_u32() % (65536 - NAT_PORT_FIRST));
	}
	return -DROP_NAT_COLLISION;
}

/* Both entries; the one for the packet at hand is written last and stays in nf->entry. */
__noinline int store_flow(struct new_flow *nf)
{
	int ret;

	if (!nf)
		return -DROP_INVALID_CONFIG;
	if (!nf->known) {
		ret = avoid_collision(nf);
		if (ret)
			return ret;
	}
	ret = store_direction(nf->reply ? FORWARD : REPLY);
	if (ret)
		return ret;
	return store_direction(nf->reply ? REPLY : FORWARD);
}

/* Policy says no. A flow that was allowed before keeps its translation, so that it can go on when policy allows it again. */
static __always_inline int deny(struct __sk_buff *skb, struct new_flow *nf, int reason)
{
	int ret;

	if (!nf->known || (reason != -DROP_POLICY && reason != -DROP_POLICY_PENDING))
		return reason;
	nf->flags |= FLOW_DENIED | (nf->direction == INGRESS ? FLOW_DENIED_INGRESS : 0);
	ret = choose_forward(skb, nf);
	if (ret)
		return reason;
	choose_reply(skb, nf);
	store_flow(nf);
	return reason;
}

/* Who opened the flow, where the host's stack hands a packet to a pod. A packet of a local process came in on no device. */
static __always_inline void note_opener(const struct __sk_buff *skb, const struct pkt *p, struct new_flow *nf)
{
	if (nf->known || p->hook != HOOK_TO_POD)
		return;
	nf->flags |= FLOW_VIA_STACK;
	if (skb->ingress_ifindex == 0)
		nf->flags |= FLOW_FROM_HOST;
}

/*
 * f is the entry that cannot be used as it is, or NULL. Returns a tc action, minus a drop reason, or 0 = TC_ACT_OK for a packet
 * that is none of Margay's business (from_netdev only). A service without backends returns -DROP_SERVICE_NO_BACKEND: the hook
 * answers.
 */
__noinline int connect(struct __sk_buff *skb, struct pkt *p, const struct flow *f)
{
	struct new_flow *nf = new_flow();
	int ret, source;

	if (!nf || !p)
		return -DROP_INVALID_CONFIG;
	nf->route_epoch = route_epoch();
	ret = new_flow_tuples(p, nf, f);
	new_flow_endpoints(nf);
	source = check_source(skb, p, nf);
	if (source)
		return source;
	if (ret)
		return ret;
	/* The stack led the packet to a pod's device that the address is not registered for: there is no policy to judge it by. */
	if (p->hook == HOOK_TO_POD && (nf->reply ? nf->src.ifindex : nf->dst.ifindex) != skb->ifindex)
		return -DROP_INVALID_CONFIG;
	note_opener(skb, p, nf);
	if (!nf->known && (p->icmp_type == ICMPV6_ECHO_REPLY || (p->key.proto == IPPROTO_ICMP && p->icmp_type == ICMP_ECHOREPLY)))
		return p->hook == HOOK_FROM_NETDEV && !nf->dst.ifindex ? TC_ACT_OK : -DROP_NO_FLOW;
	ret = judge(nf);
	p->rule_id = nf->rule_id;
	if (ret) {
		p->direction = nf->direction;
		ret = deny(skb, nf, ret);
		/* The event shows what policy judged: the tuple after translation. */
		if (nf->reply)
			key_reverse(&p->key, &nf->fwd);
		else
			p->key = nf->post;
		return ret;
	}
	ret = choose_forward(skb, nf);
	if (ret)
		return ret < 0 ? ret : TC_ACT_OK;
	choose_reply(skb, nf);
	ret = store_flow(nf);
	if (ret)
		return ret;
	if (!nf->known && (node_flags() & NODE_VERDICT_EVENTS))
		emit(skb, p, EVENT_VERDICT, DROP_NONE);
	return forward(skb, p, &nf->entry);
}
