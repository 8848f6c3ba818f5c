// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

/* Removal of dead flows. Runs in the kernel when the agent calls it, so that the table never travels to user space. */

#include "lib/flow.h"

const char gpl_compatible[] SEC("license") = "Dual BSD/GPL";

/*
 * Both directions go together: what one of them knows of the connection, for example its reset, would be missing when the other is
 * looked at alone.
 */
static long sweep_one(void *map, const void *key, void *value, void *ctx)
{
	const struct flow_key *k = key;
	struct flow *f = value;
	struct sweep *s = ctx;
	struct flow_key other_key, back;
	struct flow *other;
	__u32 seen = f->last_seen;

	(void)map;
	s->visited++;
	key_reverse(&other_key, &f->xlate);
	other = bpf_map_lookup_elem(&flows, &other_key);
	if (!flow_is_expired(k->proto, f, other, s->now))
		return 0;
	/* A packet may have passed since: then the flow lives. */
	if (f->last_seen != seen)
		return 0;
	if (other) {
		/* Where a new flow took the tuple, it is none of ours. */
		key_reverse(&back, &other->xlate);
		if (key_equal(&back, k) && bpf_map_delete_elem(&flows, &other_key) == 0)
			s->deleted++;
	}
	if (bpf_map_delete_elem(&flows, k) == 0)
		s->deleted++;
	return 0;
}

/* Kernel 5.14 (syscall programs), 5.13 (bpf_for_each_map_elem). */
SEC("syscall")
int sweep_flows(struct sweep *s)
{
	struct sweep state = {.now = s->now};

	bpf_for_each_map_elem(&flows, sweep_one, &state, 0);
	s->visited = state.visited;
	s->deleted = state.deleted;
	return 0;
}
