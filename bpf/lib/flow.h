/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/*
 * The flow table: is an entry still good for this packet, what does the packet tell us about the connection, and when has an
 * entry lived long enough. Which entries there are is decided in connect.h.
 */

#include "parse.h"

/*
 * Seconds without a packet in either direction after which a flow may go. TCP: RFC 5382 REQ-5 asks for 2 h 4 min at least, Linux
 * keepalive begins at 2 h. UDP: RFC 4787 REQ-5. Tentative: no answer seen yet.
 */
#define TIMEOUT_TCP (2 * 60 * 60 + 10 * 60)
#define TIMEOUT_TCP_CLOSING 120
#define TIMEOUT_TCP_TENTATIVE 60
#define TIMEOUT_UDP 300
#define TIMEOUT_SCTP 210 /* several heartbeats, one of which comes every 30 s (RFC 9260 §8.3) */
#define TIMEOUT_OTHER 60

static __always_inline __u32 endpoint_epoch(__u32 ifindex)
{
	__u32 slot = ifindex & (ENDPOINT_EPOCHS - 1);
	__u32 *epoch = bpf_map_lookup_elem(&endpoint_epochs, &slot);

	return epoch ? *epoch : 0;
}

static __always_inline __u32 service_epoch(__u32 id)
{
	__u32 *epoch = bpf_map_lookup_elem(&service_epochs, &id);

	return epoch ? *epoch : 0;
}

static __always_inline __u32 route_epoch(void)
{
	return endpoint_epoch(EPOCH_SLOT_ROUTES);
}

static __always_inline __u32 node_flags(void)
{
	struct node_state *s = node_settings();

	return s ? s->flags : 0;
}

/*
 * Slot of endpoint_epochs for where the entry's packets go. That of the outside, the node itself included, is raised when a pod gets an
 * address, because flows may have been under way to that address before.
 */
static __always_inline __u32 flow_out_slot(const struct flow *f)
{
	return f->action >= FLOW_TO_NETDEV ? EPOCH_SLOT_OUTSIDE : f->out_ifindex;
}

/* Nothing that the entry was computed from has changed since. Array lookups: a few instructions each, no hash. */
static __always_inline int flow_is_current(const struct flow *f)
{
	if (f->route_epoch != route_epoch())
		return 0;
	if (f->endpoint_epoch[0] != endpoint_epoch(f->in_ifindex) || f->endpoint_epoch[1] != endpoint_epoch(flow_out_slot(f)))
		return 0;
	return !(f->flags & FLOW_SERVICE) || f->service_epoch == service_epoch(f->service_id);
}

static __always_inline int tcp_flags_open(__u8 tcp_flags)
{
	return (tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

/* A SYN opens a connection: it is judged anew even where an entry exists (reused source port, RFC 9293 §3.6.1). */
static __always_inline int pkt_opens_tcp(const struct pkt *p)
{
	return tcp_flags_open(p->tcp_flags);
}

/* enum flow_tcp of a direction in which a segment with these flags has passed. */
static __always_inline __u8 flow_tcp_after(__u8 tcp, __u8 tcp_flags)
{
	if (tcp_flags & TCP_RST)
		return tcp | FLOW_TCP_RST;
	if (tcp_flags & TCP_FIN)
		return tcp | FLOW_TCP_FIN;
	if (tcp_flags & TCP_SYN)
		return tcp | FLOW_TCP_SYN;
	/* Traffic goes on: a reset that the other end did not believe must not shorten the flow's life. */
	return (tcp | FLOW_TCP_ESTABLISHED) & ~FLOW_TCP_RST;
}

/* What this packet tells about the connection. Stores only what is new: a clean cache line stays clean. */
static __always_inline void flow_note_packet(struct flow *f, const struct pkt *p)
{
	__u16 tick = now_tick();
	__u8 tcp;

	if (f->tick != tick) {
		f->tick = tick;
		f->last_seen = now_seconds();
	}
	if (p->key.proto != IPPROTO_TCP)
		return;
	tcp = flow_tcp_after(f->tcp, p->tcp_flags);
	if (tcp != f->tcp)
		f->tcp = tcp;
}

/* Both directions have said goodbye, or one has broken off. */
static __always_inline int flow_is_closing(const struct flow *f, const struct flow *other)
{
	__u8 both = f->tcp & (other ? other->tcp : FLOW_TCP_FIN);

	return (both & FLOW_TCP_FIN) || ((f->tcp | (other ? other->tcp : 0)) & FLOW_TCP_RST);
}

static __always_inline __u32 flow_timeout(__u8 proto, const struct flow *f, const struct flow *other)
{
	if (proto == IPPROTO_UDP)
		return TIMEOUT_UDP;
	if (proto == IPPROTO_SCTP)
		return TIMEOUT_SCTP;
	if (proto != IPPROTO_TCP)
		return TIMEOUT_OTHER;
	if (flow_is_closing(f, other))
		return TIMEOUT_TCP_CLOSING;
	if (!((f->tcp | (other ? other->tcp : 0)) & FLOW_TCP_ESTABLISHED))
		return TIMEOUT_TCP_TENTATIVE;
	return TIMEOUT_TCP;
}

/* Neither direction has seen a packet for the flow's timeout. other may be NULL: it was evicted. */
static __always_inline int flow_is_expired(__u8 proto, const struct flow *f, const struct flow *other, __u32 now)
{
	__u32 seen = f->last_seen;

	if (other && (__s32)(other->last_seen - seen) > 0)
		seen = other->last_seen;
	return (__s32)(now - seen) > (__s32)flow_timeout(proto, f, other);
}

/* What changes in an entry with every packet; the rest is as the slow path wrote it. */
static const union {
	struct flow f;
	__u64 words[sizeof(struct flow) / 8];
} flow_seen = {.f = {.last_seen = ~0U, .tcp = 0xff, .tick = 0xffff}};

/* Do two entries say the same, but for when a packet was seen, and which? */
static __always_inline int flow_says_same(const struct flow *a, const struct flow *b)
{
	const __u64 *x = (const __u64 *)a, *y = (const __u64 *)b;
	__u64 differ = 0;

#pragma unroll
	for (__u32 i = 0; i < sizeof(struct flow) / 8; i++)
		differ |= (x[i] ^ y[i]) & ~flow_seen.words[i];
	return differ == 0;
}

/* The entry of the other direction, or NULL. */
static __always_inline struct flow *flow_other(const struct flow *f)
{
	struct flow_key key;

	key_reverse(&key, &f->xlate);
	return bpf_map_lookup_elem(&flows, &key);
}
