/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/*
 * Fragments of datagrams. Only the first one has ports: they are remembered for the later ones, which then go the flow's way like any
 * packet. A later one that comes before the first waits in held_fragments and comes in once more, by the same hook, when the first has
 * passed. Nothing is put together here: duplicates and overlaps are the receiver's business (RFC 8200 §4.5, RFC 5722).
 *
 * datagram.waiting is a stack without lock, linked through held_fragment.next. Whoever puts FIRST_FRAGMENT_SEEN there takes the stack away,
 * and whoever meets it need not wait; so none is forgotten between the two.
 */

#include "drop.h"
#include "parse.h"
#include "policy.h"

/* Seconds; as long as Linux keeps the fragments of a datagram (net.ipv4.ipfrag_time). */
#define FRAGMENT_TIMEOUT 30

/* More fragments than the largest datagram has at the smallest MTU of IPv6. */
#define RELEASE_MAX 64

/* How often to try again what another CPU got in the way of. */
#define FRAGMENT_TRIES 4

/* Of fragment_join: the tuple is complete. Else its result is final. */
#define FRAGMENT_JOINED 1

static __always_inline void fragment_key_of(const struct pkt *p, struct fragment_key *key)
{
	key->src = p->key.src;
	key->dst = p->key.dst;
	key->id = p->frag_id;
	key->proto = p->l3_proto == ETH_P_IP ? p->key.proto : 0;
	key->pad[0] = 0;
	key->pad[1] = 0;
	key->pad[2] = 0;
}

static __always_inline int fragment_key_equal(const struct fragment_key *a, const struct fragment_key *b)
{
	return a->id == b->id && a->proto == b->proto && addr_equal(&a->src, &b->src) && addr_equal(&a->dst, &b->dst);
}

/* Read after everything that was written before the value. */
static __always_inline __u32 datagram_waiting(struct datagram *d)
{
	return __sync_fetch_and_add(&d->waiting, 0);
}

static __always_inline int fragment_is_late(__u32 since)
{
	return (__s32)(now_seconds() - since) > FRAGMENT_TIMEOUT;
}

/* The datagram of a later fragment when its first one has been seen, or NULL. */
static __always_inline struct datagram *datagram_of(const struct pkt *p)
{
	struct fragment_key key;
	struct datagram *d;

	fragment_key_of(p, &key);
	d = bpf_map_lookup_elem(&fragments, &key);
	return d && datagram_waiting(d) == FIRST_FRAGMENT_SEEN && !fragment_is_late(d->seen) ? d : NULL;
}

/*
 * A packet on the overlay device without the metadata of its outer header: none but a fragment that had to wait, which has lost it on
 * coming in again. It was encapsulated like its first one, or release_one would not have let it go.
 */
__noinline int fragment_overlay(struct __sk_buff *skb, struct pkt *p)
{
	struct datagram *d;

	if (!p || parse_pulled(skb, p) || p->frag != FRAG_LATER)
		return -DROP_OVERLAY_SOURCE;
	d = datagram_of(p);
	if (!d)
		return -DROP_OVERLAY_SOURCE;
	p->outer = d->outer;
	p->vni = d->vni;
	return 0;
}

/* Completes the tuple of a later fragment. It must not reach into the headers that the first one was judged by (RFC 1858, RFC 3128). */
static __always_inline int fragment_tuple(struct pkt *p, const struct datagram *d)
{
	if (p->frag_at < d->headers)
		return -DROP_FRAGMENT;
	p->key.sport = d->sport;
	p->key.dport = d->dport;
	p->key.proto = d->proto;
	p->icmp_type = d->icmp_type;
	p->tcp_flags = d->tcp_flags;
	return FRAGMENT_JOINED;
}

/* Counted as the packet that it was; the one at hand is another. One of which the stack has got a copy is not lost. */
static __noinline void fragment_lost(const struct held_fragment *h)
{
	__u32 slot = DROP_FRAGMENT_LOST * 2 + (h->direction & 1);
	struct counter *c;
	struct event *e;

	if (h->passed)
		return;
	c = bpf_map_lookup_elem(&counters, &slot);
	if (c) {
		c->packets++;
		c->bytes += h->length;
	}
	if (!cfg_drop_events || !event_allowed())
		return;
	e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e)
		return;
	__builtin_memset(e, 0, sizeof(*e));
	e->time = bpf_ktime_get_coarse_ns();
	e->type = EVENT_DROP;
	e->hook = h->hook;
	e->direction = h->direction;
	e->reason = DROP_FRAGMENT_LOST;
	e->ifindex = h->ifindex;
	e->length = h->length;
	e->tuple.src = h->key.src;
	e->tuple.dst = h->key.dst;
	e->tuple.proto = h->proto;
	bpf_ringbuf_submit(e, 0);
}

/* A slot of held_fragments for the caller alone, HELD_BUSY: a free one, or that of the one that has waited longest. */
static __always_inline struct held_fragment *held_take(__u32 *slot)
{
	__u32 zero = 0, *cursor = bpf_map_lookup_elem(&held_cursor, &zero), state;
	struct held_fragment *h;

	for (int i = 0; cursor && i < FRAGMENT_TRIES; i++) {
		*slot = __sync_fetch_and_add(cursor, 1) % HELD_FRAGMENTS;
		h = bpf_map_lookup_elem(&held_fragments, slot);
		if (!h)
			return NULL;
		state = h->state;
		if (state == HELD_BUSY || __sync_val_compare_and_swap(&h->state, state, HELD_BUSY) != state)
			continue;
		if (state == HELD_WAITING)
			fragment_lost(h);
		return h;
	}
	return NULL;
}

static __always_inline void held_put(struct held_fragment *h, __u32 state)
{
	__sync_lock_test_and_set(&h->state, state);
}

/*
 * The packet's bytes. Returns how many, or 0: too many. A function of its own, so that the number stays in a register: in 6.1 it loses its
 * bounds when it goes by the stack.
 */
static __noinline __u32 frame_load(struct __sk_buff *skb, __u8 *frame)
{
	__u32 len = skb->len;

	if (len <= L3_OFF || len > HELD_FRAME)
		return 0;
	return bpf_skb_load_bytes(skb, 0, frame, len) ? 0 : len;
}

/* 0, or -1: the packet cannot wait. */
static __always_inline int held_fill(struct __sk_buff *skb, const struct pkt *p, struct held_fragment *h)
{
	h->length = frame_load(skb, h->frame);
	fragment_key_of(p, &h->key);
	h->time = now_seconds();
	h->ifindex = skb->ifindex;
	h->outer = p->outer;
	h->vni = p->vni;
	h->hook = p->hook;
	h->direction = p->direction;
	h->proto = p->key.proto;
	return h->length ? 0 : -1;
}

/* The datagram that p belongs to, made where there is none. NULL: the map took none. */
static __always_inline struct datagram *datagram_make(const struct pkt *p)
{
	struct datagram fresh = {.seen = now_seconds()}, *d;
	struct fragment_key key;

	fragment_key_of(p, &key);
	d = bpf_map_lookup_elem(&fragments, &key);
	if (d)
		return d;
	bpf_map_update_elem(&fragments, &key, &fresh, BPF_NOEXIST);
	return bpf_map_lookup_elem(&fragments, &key);
}

/* Puts a filled slot on the datagram's stack. 0: it waits. FRAGMENT_JOINED or a drop reason: the first fragment has come meanwhile. */
static __always_inline int held_push(struct pkt *p, struct held_fragment *h, __u32 slot)
{
	struct datagram *d = datagram_make(p);
	__u32 waiting;

	for (int i = 0; d && i < FRAGMENT_TRIES; i++) {
		waiting = datagram_waiting(d);
		if (waiting != FIRST_FRAGMENT_SEEN)
			h->next = waiting;
		else if (fragment_is_late(d->seen))
			h->next = 0; /* that was another datagram with the same id */
		else
			return fragment_tuple(p, d);
		if (__sync_val_compare_and_swap(&d->waiting, waiting, slot + 1) == waiting)
			return 0;
	}
	return -DROP_FRAGMENT_LOST;
}

/* As far as the addresses tell: the rest is seen when the fragment comes in again. */
static __always_inline int fragment_source(const struct __sk_buff *skb, const struct pkt *p)
{
	struct endpoint *sender = endpoint_of(&p->key.src);

	if (p->hook == HOOK_FROM_POD)
		return sender && sender->ifindex == skb->ifindex ? 0 : -DROP_SPOOFED_ADDRESS;
	if (p->hook == HOOK_FROM_NETDEV && (sender || (node_addr_flags_of(&p->key.src) & NODE_ADDR_LOCAL)))
		return -DROP_SOURCE_IS_LOCAL;
	if (p->hook == HOOK_FROM_OVERLAY && !(node_addr_flags_of(&p->outer) >> NODE_ADDR_INDEX_SHIFT))
		return -DROP_OVERLAY_SOURCE;
	return 0;
}

/* These say that the packet is not from whom it says. */
static __always_inline int fragment_is_forged(int ret)
{
	return ret == -DROP_SPOOFED_ADDRESS || ret == -DROP_SPOOFED_MAC || ret == -DROP_SOURCE_IS_LOCAL || ret == -DROP_OVERLAY_SOURCE ||
	       ret == -DROP_NOT_ENCAPSULATED;
}

/*
 * A later fragment whose first one has not been seen. Where the host's stack sends, fragments are in order, and it could not be sent in
 * again. What may be for the node itself must not suffer: its stack gets the fragment at once, and what waits is a copy.
 */
__noinline int fragment_hold(struct __sk_buff *skb, struct pkt *p)
{
	int outside, ret, to_stack;
	struct held_fragment *h;
	__u32 slot;

	if (!p)
		return -DROP_INVALID_CONFIG;
	ret = fragment_source(skb, p);
	if (ret)
		return ret;
	/* The host's, if it is no service's: it is better off without us than lost. */
	outside = p->hook == HOOK_TO_NETDEV || (p->hook == HOOK_FROM_NETDEV && !endpoint_of(&p->key.dst));
	if (skb->len > HELD_FRAME || (p->hook != HOOK_FROM_POD && p->hook != HOOK_FROM_NETDEV && p->hook != HOOK_FROM_OVERLAY))
		return outside ? TC_ACT_OK : -DROP_FRAGMENT;
	to_stack = outside && (node_addr_flags_of(&p->key.dst) & NODE_ADDR_LOCAL);
	h = held_take(&slot);
	if (!h)
		return outside ? TC_ACT_OK : -DROP_FRAGMENT_LOST;
	h->passed = !!to_stack;
	ret = held_fill(skb, p, h);
	if (ret) {
		held_put(h, HELD_FREE);
		return outside ? TC_ACT_OK : -DROP_FRAGMENT_LOST;
	}
	held_put(h, HELD_WAITING);
	ret = held_push(p, h, slot);
	if (ret) {
		held_put(h, HELD_FREE);
		return ret == -DROP_FRAGMENT_LOST && outside ? TC_ACT_OK : ret;
	}
	/* No drop: it will come again, or be counted as lost. */
	return to_stack ? TC_ACT_OK : TC_ACT_SHOT;
}

/* Makes the packet the frame, of len bytes. The sum that a NIC has made (CHECKSUM_COMPLETE) begins behind the Ethernet header. */
static __noinline int frame_store(struct __sk_buff *skb, const __u8 *frame, __u32 len)
{
	if (len <= L3_OFF || len > HELD_FRAME || bpf_skb_change_tail(skb, len, 0))
		return -1;
	if (bpf_skb_store_bytes(skb, 0, frame, L3_OFF, BPF_F_INVALIDATE_HASH))
		return -1;
	return bpf_skb_store_bytes(skb, L3_OFF, frame + L3_OFF, len - L3_OFF, BPF_F_RECOMPUTE_CSUM);
}

/* This CPU's work space; NULL only for the verifier. */
static __always_inline struct fragment_scratch *fragment_work(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&fragment_scratch, &zero);
}

/*
 * Sends the fragment in this slot in again, by the device that it came from, with the packet at hand as the means. Returns the next one
 * that waits, or 0. A slot that another datagram has taken ends the list: those behind it are older and gone as well.
 */
__noinline __u32 release_one(struct __sk_buff *skb, __u32 slot, __u32 unwanted)
{
	struct held_fragment *h = bpf_map_lookup_elem(&held_fragments, &slot);
	struct fragment_scratch *work = fragment_work();
	__u32 next;

	if (!h || !work || __sync_val_compare_and_swap(&h->state, HELD_WAITING, HELD_BUSY) != HELD_WAITING)
		return 0;
	if (!fragment_key_equal(&h->key, &work->key)) {
		held_put(h, HELD_WAITING);
		return 0;
	}
	next = h->next;
	if (unwanted && h->passed)
		goto free;
	if (!addr_equal(&h->outer, &work->first.outer) || h->vni != work->first.vni || fragment_is_late(h->time) ||
	    frame_store(skb, h->frame, h->length) || bpf_clone_redirect(skb, h->ifindex, BPF_F_INGRESS)) {
		h->passed = 0;
		fragment_lost(h);
	}
free:
	held_put(h, HELD_FREE);
	return next;
}

/* Every fragment from this slot + 1 on. The packet at hand is afterwards what it was; where that fails it is lost. */
static __always_inline int release_all(struct __sk_buff *skb, struct fragment_scratch *work, __u32 waiting, __u32 unwanted)
{
	__u32 len = frame_load(skb, work->frame);

	/* Longer than what waits for it: nothing can be sent by it. Those that wait are counted when others take their slots. */
	if (!len)
		return 0;
	for (int i = 0; i < RELEASE_MAX && waiting; i++)
		waiting = release_one(skb, waiting - 1, unwanted);
	return frame_store(skb, work->frame, len) ? -DROP_FRAGMENT_LOST : 0;
}

/* Puts what the later fragments need into the map. Returns the slot + 1 of the last one that has come already, or 0. */
static __always_inline __u32 datagram_open(struct fragment_scratch *work)
{
	struct datagram *first = &work->first, *d = bpf_map_lookup_elem(&fragments, &work->key);
	__u32 waiting;

	if (!d) {
		if (!bpf_map_update_elem(&fragments, &work->key, first, BPF_NOEXIST))
			return 0;
		d = bpf_map_lookup_elem(&fragments, &work->key);
		if (!d)
			return 0;
	}
	d->seen = first->seen;
	d->sport = first->sport;
	d->dport = first->dport;
	d->outer = first->outer;
	d->vni = first->vni;
	d->proto = first->proto;
	d->icmp_type = first->icmp_type;
	d->tcp_flags = first->tcp_flags;
	d->headers = first->headers;
	waiting = __sync_lock_test_and_set(&d->waiting, FIRST_FRAGMENT_SEEN);
	return waiting == FIRST_FRAGMENT_SEEN ? 0 : waiting;
}

/*
 * Before the flow is looked up: FRAGMENT_JOINED when p->key is complete, else a tc action or minus a drop reason. Of a first fragment
 * everything is kept in the work space that later steps may change.
 */
__noinline int fragment_begin(struct __sk_buff *skb, struct pkt *p)
{
	struct fragment_scratch *work = fragment_work();
	struct datagram *d;

	if (!p || !work)
		return -DROP_INVALID_CONFIG;
	if (p->frag == FRAG_LATER) {
		d = datagram_of(p);
		return d ? fragment_tuple(p, d) : fragment_hold(skb, p);
	}
	fragment_key_of(p, &work->key);
	work->first = (struct datagram){
		.waiting = FIRST_FRAGMENT_SEEN,
		.seen = now_seconds(),
		.sport = p->key.sport,
		.dport = p->key.dport,
		.outer = p->outer,
		.vni = p->vni,
		.proto = p->key.proto,
		.icmp_type = p->icmp_type,
		.tcp_flags = p->tcp_flags,
		.headers = p->frag_at,
	};
	return FRAGMENT_JOINED;
}

/*
 * After the first fragment has gone its flow's way, with this result: now the later ones may follow, and not sooner, or they might open
 * the flow themselves and choose another backend. A forged one opens nothing.
 */
__noinline int fragment_end(struct __sk_buff *skb, struct pkt *p, int ret)
{
	struct fragment_scratch *work = fragment_work();
	struct flow_key key;
	__u32 waiting;
	int lost, unwanted;

	if (!p || !work || fragment_is_forged(ret))
		return ret;
	waiting = datagram_open(work);
	if (likely(!waiting))
		return ret;
	/* Without a flow it is the host's, whose stack has got the others already. */
	key = p->key;
	unwanted = ret == TC_ACT_OK && !bpf_map_lookup_elem(&flows, &key);
	lost = release_all(skb, work, waiting, unwanted);
	return ret >= 0 && lost ? lost : ret;
}
