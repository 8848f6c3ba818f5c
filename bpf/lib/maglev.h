/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/*
 * Consistent hashing (Eisenbud et al., "Maglev", NSDI 2016, §3.4): a table from hash to slot, computed by user space from the backends'
 * addresses alone, so that every node chooses alike and few flows move when a backend comes or goes. docs/design/0007-maglev.md.
 */

#include "pkt.h"

/*
 * Sizes of tables: primes, each the largest below a power of two. pkg/service has the same. 0: no table. As many as a mask can bound an index
 * to, which the verifier understands better than a comparison.
 */
#define MAGLEV_SIZES 16

const __u32 maglev_sizes[MAGLEV_SIZES] = {
	0, 251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521, 131071, 262139, 524287, 1048573,
};

static __always_inline __u32 maglev_mix(__u32 h, __u32 word)
{
	h = (h ^ word) * 0x9e3779b1;
	return h ^ (h >> 15);
}

/*
 * What a flow is told by: bpf.MaglevHash in Go is the same. The address that was asked is left out, because that of a NodePort differs
 * from node to node. With affinity the client's address alone.
 */
static __always_inline __u32 maglev_hash(const struct flow_key *key, int by_client)
{
	__u32 h = 0;

	for (int i = 0; i < 4; i++)
		h = maglev_mix(h, key->src.w[i]);
	if (!by_client) {
		h = maglev_mix(h, key->sport | (__u32)key->dport << 16);
		h = maglev_mix(h, key->proto);
	}
	h *= 0x85ebca6b;
	h ^= h >> 13;
	h *= 0xc2b2ae35;
	return h ^ (h >> 16);
}

/* The slot that the table of the scope's list has for the flow. count: there is none, or it is not whole. */
static __always_inline __u32 maglev_slot(const struct service *s, __u32 scope, const struct flow_key *key)
{
	struct maglev_key mk = {.list = s->list[scope], .size = s->maglev[scope]};
	__u32 size = maglev_sizes[mk.size & (MAGLEV_SIZES - 1)], position;
	struct maglev_chunk *chunk;

	if (!size)
		return s->count[scope];
	position = (__u64)maglev_hash(key, s->affinity != 0) * size >> 32;
	mk.chunk = position / MAGLEV_CHUNK;
	chunk = bpf_map_lookup_elem(&maglev, &mk);
	return chunk ? chunk->slot[position % MAGLEV_CHUNK] : s->count[scope];
}
