/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/*
 * May a flow have this source port after translation? The answers' tuple must be nobody else's: no other flow's, and, where the source
 * is an address of this node, none of the node's own sockets'. connect.h searches and claims what is free.
 */

#include "flow.h"
#include "policy.h"

#define SOURCE_PORT_FIRST 1024
#define SOURCE_PORTS (65536 - SOURCE_PORT_FIRST)
#define SOURCE_PORT_STEP 39871
/*
 * With 50 000 flows to one place, 0.78 of the ports, 64 tries find none once in 8 million flows. The second half also takes what a
 * closing flow has left.
 */
#define SOURCE_PORT_TRIES 128

static __always_inline int is_icmp(__u8 proto)
{
	return proto == IPPROTO_ICMP || proto == IPPROTO_ICMPV6;
}

/*
 * The next try, from a random start. In steps of the golden ratio the tries lie evenly over the whole range, whichever stretches of it are
 * full or reserved: pods' kernels hand out ports in rows.
 */
static __always_inline void source_port_set(struct new_flow *nf, __u32 start, __u32 try)
{
	nf->post.sport = bpf_htons(SOURCE_PORT_FIRST + (start % SOURCE_PORTS + try * SOURCE_PORT_STEP) % SOURCE_PORTS);
	if (is_icmp(nf->post.proto))
		nf->post.dport = nf->post.sport;
}

/* An echo identifier is no port. */
static __always_inline int port_is_reserved(const struct new_flow *nf)
{
	__u32 port = bpf_ntohs(nf->post.sport), word = port / 64;
	__u64 *bits;

	if (is_icmp(nf->post.proto))
		return 0;
	bits = bpf_map_lookup_elem(&reserved_ports, &word);
	return bits && (*bits >> (port % 64) & 1);
}

/* The node's socket that has the tuple, looked up as the stack does for a packet from the other end. */
static __always_inline struct bpf_sock *host_socket(struct __sk_buff *skb, __u8 proto, const struct addr *node, __be16 port,
						    const struct addr *peer, __be16 peer_port)
{
	struct bpf_sock_tuple t = {};
	__u32 size = sizeof(t.ipv6);

	if (addr_is_v4(node)) {
		t.ipv4.saddr = peer->w[3];
		t.ipv4.daddr = node->w[3];
		t.ipv4.sport = peer_port;
		t.ipv4.dport = port;
		size = sizeof(t.ipv4);
	} else {
		__builtin_memcpy(t.ipv6.saddr, peer->w, 16);
		__builtin_memcpy(t.ipv6.daddr, node->w, 16);
		t.ipv6.sport = peer_port;
		t.ipv6.dport = port;
	}
	if (proto == IPPROTO_TCP)
		return bpf_skc_lookup_tcp(skb, &t, size, BPF_F_CURRENT_NETNS, 0);
	return bpf_sk_lookup_udp(skb, &t, size, BPF_F_CURRENT_NETNS, 0);
}

/* Does the node itself use the source port after translation: a connection, a listener, a bound UDP socket? */
__noinline int host_uses_port(struct __sk_buff *skb, struct new_flow *nf)
{
	const struct flow_key *k;
	struct bpf_sock *sk;

	if (!nf)
		return 1;
	k = &nf->post;
	if (k->proto != IPPROTO_TCP && k->proto != IPPROTO_UDP)
		return 0;
	sk = host_socket(skb, k->proto, &k->src, k->sport, &k->dst, k->dport);
	if (!sk)
		return 0;
	bpf_sk_release(sk);
	return 1;
}

/*
 * A client outside opens a connection through a service to the node's own port: has it one to that port directly, from the same port of
 * its own? A segment from the middle of a connection would find itself.
 */
__noinline int host_is_connected(struct __sk_buff *skb, struct new_flow *nf)
{
	const struct flow_key *k;
	struct bpf_sock *sk;
	int connected;

	if (!nf)
		return 1;
	k = &nf->post;
	if (k->proto != IPPROTO_TCP || !tcp_flags_open(nf->tcp_flags) || !(node_addr_flags_of(&k->dst) & NODE_ADDR_LOCAL))
		return 0;
	sk = host_socket(skb, IPPROTO_TCP, &k->dst, k->dport, &k->src, k->sport);
	if (!sk)
		return 0;
	connected = sk->state != BPF_TCP_LISTEN;
	bpf_sk_release(sk);
	return connected;
}

/*
 * The node itself has sent to a service: has it a socket of its own that talks to the backend directly, from the same port? Its answers would
 * be taken for those to this flow. A socket that is not connected may be the one that asks.
 */
__noinline int host_talks_to(struct __sk_buff *skb, struct new_flow *nf)
{
	const struct flow_key *k;
	struct bpf_sock *sk;
	int connected;

	if (!nf)
		return 1;
	k = &nf->post;
	/* Two branches, because the verifier sees two types of sockets. */
	if (k->proto == IPPROTO_TCP) {
		if (!tcp_flags_open(nf->tcp_flags))
			return 0;
		sk = host_socket(skb, IPPROTO_TCP, &k->src, k->sport, &k->dst, k->dport);
		if (!sk)
			return 0;
		connected = sk->state != BPF_TCP_LISTEN;
		bpf_sk_release(sk);
		return connected;
	}
	if (k->proto != IPPROTO_UDP)
		return 0;
	sk = host_socket(skb, IPPROTO_UDP, &k->src, k->sport, &k->dst, k->dport);
	if (!sk)
		return 0;
	connected = sk->dst_port != 0;
	bpf_sk_release(sk);
	return connected;
}

/* The node's own sockets against this flow: none may have the source port where it is masqueraded, none the answers otherwise. */
static __always_inline int host_objects(struct __sk_buff *skb, struct new_flow *nf)
{
	if (nf->flags & FLOW_MASQUERADE)
		return host_uses_port(skb, nf);
	if (nf->flags & FLOW_VIA_HOST)
		return host_talks_to(skb, nf);
	/* A pod's address is none of the node's. */
	return nf->dst.ifindex ? 0 : host_is_connected(skb, nf);
}

/* Has the flow of this entry ended, or was it forgotten by both ends? */
static __always_inline int flow_is_dead(__u8 proto, const struct flow *f)
{
	struct flow *other = flow_other(f);

	return flow_is_closing(f, other) || flow_is_expired(proto, f, other, now_seconds());
}

/* Removes both entries of the flow that has this one: a packet of it that is late must not speak in its successor's name. */
static __always_inline void flow_forget(const struct flow_key *key, const struct flow *f)
{
	struct flow_key other_key;
	struct flow *other;

	key_reverse(&other_key, &f->xlate);
	other = bpf_map_lookup_elem(&flows, &other_key);
	if (other && key_answers(key, &other->xlate))
		bpf_map_delete_elem(&flows, &other_key);
	bpf_map_delete_elem(&flows, key);
}

enum source_port {
	SOURCE_FREE = 0,
	SOURCE_OURS = 1, /* the entry of the answers is this flow's own already */
	SOURCE_TAKEN = 2,
};

/* What becomes of another flow's entry for the answers. */
enum source_port_how {
	SOURCE_RESPECT = 0,
	SOURCE_TAKE_OVER = 1, /* what is left of a dead flow is free, too */
	SOURCE_UNSEEN = 2,    /* nobody has looked: who writes the entry finds out */
};

/* enum source_port of the source port in nf->post. how: enum source_port_how. */
__noinline int source_port_state(struct __sk_buff *skb, __u32 how)
{
	struct new_flow *nf = new_flow();
	struct flow *taken = NULL;

	if (!nf || ((nf->flags & FLOW_MASQUERADE) && port_is_reserved(nf)))
		return SOURCE_TAKEN;
	if (how != SOURCE_UNSEEN) {
		key_reverse(&nf->key, &nf->post);
		taken = bpf_map_lookup_elem(&flows, &nf->key);
	}
	if (taken && key_answers(&nf->fwd, &taken->xlate))
		return SOURCE_OURS;
	if (taken && (how != SOURCE_TAKE_OVER || !flow_is_dead(nf->key.proto, taken)))
		return SOURCE_TAKEN;
	if (host_objects(skb, nf))
		return SOURCE_TAKEN;
	if (taken)
		flow_forget(&nf->key, taken);
	return SOURCE_FREE;
}

/*
 * Would the answers to this flow of the node itself be taken for those to another one, which was translated to the same tuple? What a
 * dead flow has left there is removed.
 */
__noinline int answers_are_taken(void)
{
	struct new_flow *nf = new_flow();
	struct flow *taken;

	if (!nf)
		return 0;
	key_reverse(&nf->key, &nf->post);
	taken = bpf_map_lookup_elem(&flows, &nf->key);
	if (!taken || (taken->flags & (FLOW_REPLY | FLOW_NAT)) != (FLOW_REPLY | FLOW_NAT))
		return 0;
	if (!flow_is_dead(nf->key.proto, taken))
		return 1;
	flow_forget(&nf->key, taken);
	return 0;
}

/*
 * Neither end is a pod of this node. Most such flows are the host's and leave no entry; ours are those to a backend that is the node
 * itself, and those whose port had to move, because without that their answers would be another flow's.
 */
static __always_inline int host_flow_is_ours(const struct new_flow *nf)
{
	int from_host = (nf->flags & (FLOW_FROM_HOST | FLOW_MASQUERADE)) == (FLOW_FROM_HOST | FLOW_MASQUERADE);
	int sure = nf->known || (nf->flags & FLOW_SERVICE);

	if (!sure && nf->post.proto == IPPROTO_TCP && !tcp_flags_open(nf->tcp_flags))
		return 0;
	if (!from_host && !(node_addr_flags_of(&nf->post.dst) & NODE_ADDR_LOCAL))
		return 0;
	return sure || answers_are_taken();
}
