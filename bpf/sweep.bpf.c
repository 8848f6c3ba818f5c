// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

/* Removal of dead flows. Runs in the kernel when the agent calls it, so that the table never travels to user space. */

#include "lib/flow.h"

const char gpl_compatible[] SEC("license") = "Dual BSD/GPL";

/*
 * Seconds that the entry lives at least, whatever the other direction says: that one can only have seen a later packet, and of every
 * pair that may go one of the two says so itself. A FIN counts when both have it, a reset in the entry that it passed, and a
 * connection is tentative when neither is established. So most entries are done with after one cache line, without a lookup.
 */
static __always_inline __u32 least_timeout(__u8 proto, const struct flow *f)
{
	if (proto == IPPROTO_TCP && !(f->tcp & FLOW_TCP_ESTABLISHED))
		return TIMEOUT_TCP_TENTATIVE;
	return flow_timeout(proto, f, f); /* its own FIN counts for both */
}

static __always_inline int surely_alive(__u8 proto, const struct flow *f, __u32 now)
{
	return (__s32)(now - f->last_seen) <= (__s32)least_timeout(proto, f);
}

/*
 * Both directions go together: what one of them knows of the connection, for example its reset, would be missing when the other is
 * looked at alone.
 */
static __always_inline void sweep_pair(const struct flow_key *k, const struct flow *f, struct sweep *s)
{
	struct flow_key other_key, back;
	struct flow *other;
	__u32 seen = f->last_seen;

	key_reverse(&other_key, &f->xlate);
	other = bpf_map_lookup_elem(&flows, &other_key);
	if (!flow_is_expired(k->proto, f, other, s->now))
		return;
	/* A packet may have passed since: then the flow lives. */
	if (f->last_seen != seen)
		return;
	if (other) {
		/* Where a new flow took the tuple, it is none of ours. */
		key_reverse(&back, &other->xlate);
		if (key_equal(&back, k) && bpf_map_delete_elem(&flows, &other_key) == 0)
			s->deleted++;
	}
	if (bpf_map_delete_elem(&flows, k) == 0)
		s->deleted++;
}

/* The context of an iterator over a map's elements; the kernel knows it by its BTF. */
struct map_elem {
	struct {
		void *seq;
	} *meta;
	void *map;
	const struct flow_key *key; /* NULL at the end, value too */
	struct flow *value;
};

/*
 * One entry of the walk in pieces: each read of the iterator goes on where the last one stopped, and in between the CPU is free for
 * others. What is read is one byte for each entry, the number of entries that went with it; so the reader's buffer says after how many a
 * read returns. The clock is read for every entry, because a program of this kind takes no input; not the coarse one, which it may not
 * call. Kernel 5.8, with BTF.
 */
SEC("iter/bpf_map_elem")
int sweep_flow(struct map_elem *c)
{
	const struct flow_key *k = c->key;
	struct flow *f = c->value;
	struct sweep s = {.now = bpf_ktime_get_ns() / 1000000000ULL};
	struct flow_key key;
	__u8 out;

	if (!k || !f)
		return 0;
	if (!surely_alive(k->proto, f, s.now)) {
		key = *k; /* no map's key may be elsewhere than on the stack */
		sweep_pair(&key, f, &s);
	}
	out = s.deleted;
	bpf_seq_write(c->meta->seq, &out, 1);
	return 0;
}

static long sweep_one(void *map, const void *key, void *value, void *ctx)
{
	const struct flow_key *k = key;
	struct sweep *s = ctx;

	(void)map;
	s->visited++;
	if (!surely_alive(k->proto, value, s->now))
		sweep_pair(k, value, s);
	return 0;
}

/* The whole walk at once, for kernels without BTF. Kernel 5.14 (syscall programs), 5.13 (bpf_for_each_map_elem). */
SEC("syscall")
int sweep_flows(struct sweep *s)
{
	struct sweep state = {.now = s->now};

	bpf_for_each_map_elem(&flows, sweep_one, &state, 0);
	s->visited = state.visited;
	s->deleted = state.deleted;
	return 0;
}
