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
#include "masquerade.h"
#include "host.h"
#include "sender.h"
#include "vanished.h"

/*
 * May this entry's translation go on? Not when a SYN opens a new connection on the remains of an old one, and not when the backend
 * has left the service: for a UDP client (contract row U1), and for a SYN, whose old connection may have ended without a word. Nor, for
 * the same two, when there was no service and now there is one (row U2).
 */
static __always_inline int flow_keeps_translation(const struct pkt *p, const struct flow *f, __u32 epoch)
{
	struct flow *other = flow_other(f);

	/* The host's own connection, whose port had to move: the next one from the same port takes the same way, if it is still ours. */
	if (p->hook == HOOK_TO_NETDEV && !(f->flags & FLOW_REPLY))
		return !other || key_answers(&p->key, &other->xlate);
	if (pkt_opens_tcp(p) && (flow_is_closing(f, other) || flow_is_expired(IPPROTO_TCP, f, other, now_seconds())))
		return 0;
	/* The other end opens a connection of its own on the tuple of one that was established: its own policies decide. */
	if (pkt_opens_tcp(p) && (f->flags & FLOW_REPLY) && ((f->tcp | (other ? other->tcp : 0)) & FLOW_TCP_ESTABLISHED))
		return 0;
	if (f->flags & FLOW_REPLY)
		return 1;
	if (!(f->flags & FLOW_SERVICE))
		return !may_become_service(p) || !service_find(&p->key, p->hook, p->vni != VNI_PODS, 0);
	if (pkt_opens_tcp(p) || (p->key.proto == IPPROTO_UDP && f->service_epoch != epoch))
		return backend_still_serves(f) && !service_is_another(p, f);
	return 1;
}

/* What an entry that is there already says of its own direction. */
static __always_inline void recall_direction(struct new_flow *nf, const struct flow *f, __u32 direction)
{
	nf->out_ifindex[direction] = f->out_ifindex;
	nf->out_node[direction] = f->action == FLOW_TO_NODE ? f->out_node : 0;
	nf->mtu[direction] = f->mtu;
}

/*
 * A flow without entry, or whose translation has ended: the services choose. nf->dst is the pod that has the address asked for. Not inlined:
 * connect is short of stack.
 */
__noinline int first_tuples(struct __sk_buff *skb, const struct pkt *p, struct new_flow *nf)
{
	__u32 hash = 0;
	int ret;

	if (!p || !nf)
		return -DROP_INVALID_CONFIG;
	/* What the host sends to a service is no business of the way out. */
	if (p->hook == HOOK_TO_NETDEV)
		return 0;
	if (p->hook == HOOK_FROM_OVERLAY && p->vni != VNI_PODS) {
		nf->flags |= FLOW_FORWARDED | (p->vni == VNI_DSR ? FLOW_DSR : 0);
		hash = overlay_backend_hash(skb);
	}
	if (p->hook == HOOK_FROM_HOST) {
		ret = note_host(skb, nf);
		if (ret)
			return ret;
	}
	ret = service_translate(nf, p->hook, hash);
	return ret || p->hook != HOOK_FROM_HOST ? ret : host_tuples(nf);
}

/* The two tuples as the entry has them; without one, or where its translation has ended, as the packet has them, and nf->known is 0. */
static __always_inline int recall_tuples(struct __sk_buff *skb, const struct pkt *p, struct new_flow *nf, const struct flow *f)
{
	const struct addr none = {};
	__u32 epoch = f && (f->flags & FLOW_SERVICE) ? service_epoch(f->service_id) : 0;

	nf->flags = 0;
	nf->backend = none;
	nf->backend_port = 0;
	nf->service_id = 0;
	nf->service_epoch = 0;
	nf->rule_id = 0;
	nf->affinity = 0;
	nf->direction = EGRESS;
	nf->known = 0;
	nf->fresh = !f;
	nf->reply = 0;
	nf->tcp_flags = p->tcp_flags;
	for (int i = 0; i < 2; i++) {
		nf->out_ifindex[i] = 0;
		nf->out_node[i] = 0;
		nf->in_node[i] = 0;
		nf->mtu[i] = 0;
		nf->next_hop[i] = none;
	}
	nf->fwd = p->key;
	nf->post = p->key;
	/* The host's own packets to a service have entries of their own kind. */
	if (p->hook == HOOK_FROM_HOST && f && !(f->flags & FLOW_VIA_HOST))
		f = NULL;
	/* Nor does an entry of the host's own speak for who sends its tuple from elsewhere: policy would not be asked. */
	if ((p->hook == HOOK_FROM_NETDEV || p->hook == HOOK_FROM_OVERLAY) && f && (f->flags & (FLOW_FROM_HOST | FLOW_REPLY)) == FLOW_FROM_HOST)
		f = NULL;
	if (!f || !flow_keeps_translation(p, f, epoch))
		return 0;
	nf->known = 1;
	nf->flags = f->flags & (FLOW_SERVICE | FLOW_VIA_STACK | FLOW_VIA_HOST | FLOW_FROM_HOST | FLOW_FORWARDED | FLOW_DSR | FLOW_MASQUERADE |
				FLOW_TO_MAC);
	nf->backend_port = f->backend_port;
	if (f->backend_port)
		nf->backend = f->backend;
	if (nf->flags & FLOW_SERVICE) {
		nf->service_id = f->service_id;
		nf->service_epoch = epoch;
	}
	if (f->flags & FLOW_REPLY) {
		nf->reply = 1;
		recall_direction(nf, f, REPLY);
		mac_copy(nf->src.mac, f->dst_mac); /* FLOW_TO_MAC; a pod's are read again */
		mac_copy(nf->src.host_mac, f->src_mac);
		if (f->flags & FLOW_VIA_HOST)
			host_end(&nf->src, f->dst_mac);
		key_reverse(&nf->fwd, &f->xlate);
		key_reverse(&nf->post, &p->key);
		return 0;
	}
	nf->post = f->xlate;
	return p->hook == HOOK_FROM_HOST ? note_host(skb, nf) : 0;
}

/*
 * The pod that owns the address, or ifindex 0. Returns its epoch, which is older than what it is about. To know whose epoch to read first
 * takes a lookup of its own, but for a pod behind the device that the caller guesses.
 */
__noinline __u32 read_endpoint(const struct addr *a, struct endpoint *to, __u32 guess)
{
	__u32 epoch = endpoint_epoch(guess);
	struct endpoint *e;

	if (!a || !to)
		return 0;
	to->ifindex = 0;
	e = endpoint_of(a);
	if (e && e->ifindex != guess) {
		epoch = endpoint_epoch(e->ifindex);
		e = endpoint_of(a);
	}
	if (!e)
		return 0;
	*to = *e;
	return epoch;
}

static __always_inline void read_receiver(struct new_flow *nf, __u32 guess)
{
	nf->endpoint_epoch[1] = read_endpoint(&nf->post.dst, &nf->dst, guess);
}

/* Both tuples, and the pods of this node at either end: nf->src, nf->dst. */
static __always_inline int new_flow_ends(struct __sk_buff *skb, const struct pkt *p, struct new_flow *nf, const struct flow *f)
{
	__u32 last = nf->dst.ifindex; /* where this CPU's flow before went: a good guess */
	int ret = recall_tuples(skb, p, nf, f);

	nf->endpoint_epoch[2] = endpoint_epoch(EPOCH_SLOT_OUTSIDE);
	nf->endpoint_epoch[0] = read_endpoint(&nf->fwd.src, &nf->src, skb->ifindex);
	read_receiver(nf, last);
	if (nf->known)
		return ret;
	ret = first_tuples(skb, p, nf);
	if (nf->flags & FLOW_SERVICE)
		read_receiver(nf, last);
	return ret;
}

/*
 * Egress policy of the opener, then ingress policy of the other end. What the node itself sends is always allowed, and NetworkPolicy has
 * no say in what a pod sends to its node or, through a service, to itself (contract row N10). ClusterNetworkPolicy has (rows C4,
 * C7), but not where a pod uses its own address.
 */
__noinline int judge(struct new_flow *nf)
{
	int from_host, itself, ret;

	if (!nf)
		return -DROP_INVALID_CONFIG;
	itself = addr_equal(&nf->fwd.src, &nf->post.dst);
	if (itself && addr_equal(&nf->fwd.src, &nf->fwd.dst))
		return 0;
	if (nf->src.ifindex && nf->src.policy_id[EGRESS] != POLICY_NONE) {
		ret = policy_check(nf, &nf->src, EGRESS, nf->dst.ifindex ? nf->dst.identity : identity_of(&nf->post.dst),
				   nf->dst.ifindex ? itself : node_addr_flags_of(&nf->post.dst) & NODE_ADDR_LOCAL);
		if (ret)
			return ret;
	}
	if (!nf->dst.ifindex || nf->dst.policy_id[INGRESS] == POLICY_NONE)
		return 0;
	/* What another node forwards may be from anybody who can send to that node under this one's address. */
	from_host = !nf->src.ifindex && !(nf->flags & FLOW_FORWARDED) &&
		    ((nf->flags & FLOW_FROM_HOST) || (node_addr_flags_of(&nf->fwd.src) & NODE_ADDR_LOCAL));
	if (from_host)
		return 0;
	return policy_check(nf, &nf->dst, INGRESS, nf->src.ifindex ? nf->src.identity : identity_of(&nf->fwd.src), itself);
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

/* Composes nf->entry, but for the time, and nf->key for one direction. */
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
	f->route_epoch = nf->route_epoch;
	f->service_id = nf->service_id;
	f->service_epoch = nf->service_epoch;
	f->in_ifindex = in->ifindex;
	f->out_ifindex = nf->out_ifindex[direction & 1];
	f->in_node = nf->in_node[direction & 1];
	f->out_node = nf->out_node[direction & 1];
	f->mtu = nf->mtu[direction & 1];
	f->backend_port = nf->backend_port;
	f->backend = nf->backend_port ? nf->backend : nf->next_hop[direction & 1];
	f->endpoint_epoch[0] = judged_epoch(nf, f->in_ifindex);
	f->action = nf->action[direction & 1];
	f->endpoint_epoch[1] = judged_epoch(nf, flow_out_slot(f));
	f->flags = nf->flags | (direction == REPLY ? FLOW_REPLY : 0) | (in->ifindex ? FLOW_IN_POD : 0);
	if (f->in_node)
		f->flags |= FLOW_IN_OVERLAY;
	else if (!in->ifindex && ((direction == FORWARD && (nf->flags & FLOW_FROM_HOST)) || (node_addr_flags_of(&nf->key.src) & NODE_ADDR_LOCAL)))
		f->flags |= FLOW_IN_NODE;
	f->tcp = 0;
	f->rule_id = nf->rule_id;
	mac_copy(f->in_mac, in->mac);
	mac_copy(f->dst_mac, out->mac);
	mac_copy(f->src_mac, out->host_mac);
	f->csum_diff = 0;
	if (!key_equal(&nf->key, &f->xlate)) {
		f->flags |= FLOW_NAT;
		f->csum_diff = csum_diff_addrs(&nf->key, &f->xlate);
	}
}

/*
 * What an entry that is there already knows better: what it has seen of the connection, and, when the packet at hand is of the other
 * direction, where its own packets come from.
 */
static __always_inline void keep_from_entry(struct new_flow *nf, __u32 direction, const struct flow *old)
{
	nf->entry.tcp = old->tcp;
	/*
	 * Whether its backend still serves, and whether its address has become a service's, is asked for the opener's own packets only
	 * (flow_keeps_translation): an answer must not say that it has been asked. Rows U2, U3.
	 */
	if (nf->reply && direction == FORWARD && nf->key.proto == IPPROTO_UDP) {
		nf->entry.service_epoch = old->service_epoch;
		nf->entry.endpoint_epoch[1] = old->endpoint_epoch[1];
	}
	if (direction == (nf->reply ? REPLY : FORWARD) || nf->entry.in_ifindex)
		return;
	nf->entry.in_node = old->in_node;
	nf->entry.flags = (nf->entry.flags & ~FLOW_IN_OVERLAY) | (old->flags & FLOW_IN_OVERLAY);
}

/*
 * Writes one direction's entry; an entry that is there already keeps what it has seen of the connection, and its place in the table where
 * nothing but that changes: a client that soon takes the same port again, or asks again. Finds the work space itself, because before 6.2
 * the verifier takes no argument of a global function as a map's key or value. BPF_NOEXIST: 1 where somebody was quicker.
 */
__noinline int store_direction(__u32 direction, __u64 how)
{
	struct new_flow *nf = new_flow();
	struct flow *old;
	long ret;

	if (!nf)
		return -DROP_INVALID_CONFIG;
	compose_entry(nf, direction);
	old = nf->fresh ? NULL : bpf_map_lookup_elem(&flows, &nf->key);
	if (old && nf->known)
		keep_from_entry(nf, direction, old);
	if (nf->key.proto == IPPROTO_TCP && direction == (nf->reply ? REPLY : FORWARD) && !(nf->flags & FLOW_DENIED))
		nf->entry.tcp = flow_tcp_after(nf->entry.tcp, nf->tcp_flags);
	if (old && how != BPF_NOEXIST && flow_says_same(old, &nf->entry)) {
		old->last_seen = nf->entry.last_seen;
		old->tick = nf->entry.tick;
		old->tcp = nf->entry.tcp;
		return 0;
	}
	ret = bpf_map_update_elem(&flows, &nf->key, &nf->entry, how);
	if (ret == -EEXIST)
		return 1;
	return ret ? -DROP_FLOW_TABLE : 0;
}

/*
 * Writes the answers' entry of a new flow, under a source port that makes their tuple this flow's alone: its own, or another one. Two flows
 * share the tuple when two pods' traffic leaves with one address of the node, or when one client reaches one backend by different
 * service addresses, or with and without one. Only the port changes; the address was decided before.
 */
static __always_inline int claim_answers(struct __sk_buff *skb, struct new_flow *nf)
{
	__u32 start = 0, masquerades = nf->flags & FLOW_MASQUERADE;
	int state, ret;

	/* As a rule nobody has the tuple, and the claim itself would tell. */
	if (nf->fresh && source_port_state(skb, SOURCE_UNSEEN) == SOURCE_FREE) {
		ret = store_direction(REPLY, BPF_NOEXIST);
		if (ret <= 0)
			return ret;
	}
	for (__u32 i = 0; i < SOURCE_PORT_TRIES; i++) {
		if (i == 1)
			start = bpf_get_prandom_u32();
		if (i)
			source_port_set(nf, start, i);
		state = source_port_state(skb, !masquerades || i >= SOURCE_PORT_TRIES / 2 ? SOURCE_TAKE_OVER : SOURCE_RESPECT);
		if (state != SOURCE_TAKEN) {
			ret = store_direction(REPLY, state == SOURCE_OURS ? BPF_ANY : BPF_NOEXIST);
			if (ret <= 0)
				return ret;
		}
	}
	return masquerades ? -DROP_NO_SOURCE_PORT : -DROP_NAT_COLLISION;
}

/* Both entries; the one for the packet at hand is written last and stays in nf->entry. */
__noinline int store_flow(struct __sk_buff *skb, struct new_flow *nf)
{
	int ret;

	if (!nf)
		return -DROP_INVALID_CONFIG;
	nf->entry.last_seen = now_seconds();
	nf->entry.tick = now_tick();
	/* The answers pass this node by. */
	if (nf->backend_port && (nf->flags & FLOW_DSR))
		return store_direction(FORWARD, BPF_ANY);
	if (nf->known || nf->backend_port)
		ret = store_direction(nf->reply ? FORWARD : REPLY, BPF_ANY);
	else
		ret = claim_answers(skb, nf);
	if (ret)
		return ret;
	return store_direction(nf->reply ? REPLY : FORWARD, BPF_ANY);
}

/* Policy says no. A flow that was allowed before keeps its translation, so that it can go on when policy allows it again. */
static __always_inline int deny(struct __sk_buff *skb, struct new_flow *nf, int reason)
{
	if (!nf->known || (reason != -DROP_POLICY && reason != -DROP_POLICY_PENDING))
		return reason;
	nf->flags |= FLOW_DENIED | (nf->direction == INGRESS ? FLOW_DENIED_INGRESS : 0);
	if (choose_ways(skb, nf) == 0)
		store_flow(skb, nf);
	return reason;
}

/*
 * Who opened the flow, where the host's stack hands a packet to a pod or to the outside. A packet of a local process came in on no device.
 * One to the outside shares this node's ports with masqueraded pods.
 */
static __always_inline void note_opener(const struct __sk_buff *skb, const struct pkt *p, struct new_flow *nf)
{
	if (nf->known || (p->hook != HOOK_TO_POD && p->hook != HOOK_TO_NETDEV))
		return;
	nf->flags |= FLOW_VIA_STACK | (p->hook == HOOK_TO_NETDEV ? FLOW_MASQUERADE : 0);
	if (skb->ingress_ifindex == 0)
		nf->flags |= FLOW_FROM_HOST;
}

/* The packet at hand says through which node its direction comes in. */
static __always_inline void note_sender_node(const struct pkt *p, struct new_flow *nf)
{
	if (p->hook == HOOK_FROM_OVERLAY)
		nf->in_node[nf->reply ? REPLY : FORWARD] = p->in_node;
}

/* The host's own, as far as its stack has a use for it: nothing is routed on from one node to another. */
static __always_inline int not_ours(const struct pkt *p)
{
	if (p->hook != HOOK_FROM_OVERLAY || (node_addr_flags_of(&p->key.dst) & NODE_ADDR_LOCAL))
		return TC_ACT_OK;
	return p->vni == VNI_PODS ? -DROP_NO_ROUTE : -DROP_NO_FLOW;
}

/*
 * A new connection that is the host's own, on the tuple of an old one that was translated: what follows must not be. Not for whoever
 * sends a SYN to a pod's masqueraded port from outside.
 */
static __always_inline void forget_direction(const struct pkt *p, struct new_flow *nf, const struct flow *f)
{
	if (p->hook == HOOK_TO_NETDEV || !(f->flags & FLOW_REPLY))
		bpf_map_delete_elem(&flows, &nf->fwd);
}

/*
 * f is the entry that cannot be used as it is, or NULL. Returns a tc action, minus a drop reason, or 0 = TC_ACT_OK for a packet
 * that is none of Margay's business (from_netdev, from_overlay). For a service without backends, and a packet that is too big, the hook
 * has an answer (has_answer).
 */
__noinline int connect(struct __sk_buff *skb, struct pkt *p, const struct flow *f)
{
	struct new_flow *nf = new_flow();
	int ret, source;

	if (!nf || !p)
		return -DROP_INVALID_CONFIG;
	nf->route_epoch = route_epoch();
	if (p->hook == HOOK_FROM_OVERLAY && !p->in_node)
		p->in_node = node_addr_flags_of(&p->outer) >> NODE_ADDR_INDEX_SHIFT;
	ret = new_flow_ends(skb, p, nf, f);
	note_sender_node(p, nf);
	source = check_source(skb, p, nf);
	if (source)
		return source;
	if (ret)
		return ret;
	/* The stack led the packet to a pod's device that the address is not registered for: there is no policy to judge it by. */
	if (p->hook == HOOK_TO_POD && (nf->reply ? nf->src.ifindex : nf->dst.ifindex) != skb->ifindex)
		return -DROP_INVALID_CONFIG;
	if (f && receiver_is_gone(skb, p, nf, f))
		return -DROP_SERVICE_NO_BACKEND;
	note_opener(skb, p, nf);
	if (!nf->known && (p->icmp_type == ICMPV6_ECHO_REPLY || (p->key.proto == IPPROTO_ICMP && p->icmp_type == ICMP_ECHOREPLY)))
		return (p->hook == HOOK_FROM_NETDEV || p->hook == HOOK_FROM_OVERLAY) && !nf->dst.ifindex ? not_ours(p) : -DROP_NO_FLOW;
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
	ret = choose_ways(skb, nf);
	if (ret > 0 && f && !nf->known)
		forget_direction(p, nf, f);
	if (ret)
		return ret < 0 ? ret : not_ours(p);
	if (!nf->known && nf->action[FORWARD] == FLOW_TO_NETDEV) {
		ret = masquerade(nf, nf->out_ifindex[FORWARD]);
		if (ret)
			return ret;
	}
	ret = store_flow(skb, nf);
	if (ret)
		return ret;
	affinity_note(nf);
	if (!nf->known && (node_flags() & NODE_VERDICT_EVENTS))
		emit(skb, p, EVENT_VERDICT, DROP_NONE);
	return forward(skb, p, &nf->entry, p->hook);
}
