/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/*
 * The one exit of every program. A step returns a tc action, or minus a drop reason; finish() counts the drop, samples an event
 * and turns it into the action. Nothing else may drop a packet.
 */

#include "../config.h"
#include "pkt.h"

static __always_inline int event_allowed(void)
{
	__u32 zero = 0, now = now_seconds();
	struct event_budget *b = bpf_map_lookup_elem(&event_budget, &zero);

	if (!b)
		return 0;
	if (b->second != now) {
		b->second = now;
		b->used = 0;
	}
	if (b->used >= cfg_event_rate)
		return 0;
	b->used++;
	return 1;
}

__noinline int emit(struct __sk_buff *skb, struct pkt *p, __u32 type, __u32 reason)
{
	struct event *e;

	if (!p || !event_allowed())
		return 0;
	e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e)
		return 0;
	e->time = bpf_ktime_get_coarse_ns();
	e->type = type;
	e->hook = p->hook;
	e->direction = p->direction;
	e->reason = reason;
	e->ifindex = skb->ifindex;
	e->rule_id = p->rule_id;
	e->length = skb->len;
	e->tuple = p->key;
	bpf_ringbuf_submit(e, 0);
	return 0;
}

static __always_inline void count_drop(struct __sk_buff *skb, struct pkt *p, __u32 reason)
{
	__u32 slot = reason * 2 + (p->direction & 1);
	struct counter *c = bpf_map_lookup_elem(&counters, &slot);

	if (!c)
		return;
	c->packets++;
	c->bytes += skb->len;
}

/* The packet is answered on the spot (refused service): counted like a drop, but the answer travels. */
static __always_inline void note_drop(struct __sk_buff *skb, struct pkt *p, __u32 reason)
{
	count_drop(skb, p, reason);
	if (cfg_drop_events)
		emit(skb, p, EVENT_DROP, reason);
}

static __always_inline int finish(struct __sk_buff *skb, struct pkt *p, int ret)
{
	if (likely(ret >= 0))
		return ret;
	note_drop(skb, p, -ret);
	return TC_ACT_SHOT;
}
