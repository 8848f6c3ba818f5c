// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

/*
 * What the shipped programs are compared with. Not part of Margay: compiled into the benchmark only. floor_program does the least that a
 * program with our flow table can do for a packet of a known flow; empty_program is what the kernel's test run itself costs.
 */

#include "headers/helpers.h"
#include "types.h"

const char gpl_compatible[] SEC("license") = "Dual BSD/GPL";

/* The benchmark puts the node's own flow table in its place, so that both programs look up in the same buckets. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct flow_key);
	__type(value, struct flow);
} flows SEC(".maps");

/* Addresses, protocol and ports of TCP without options before it. 0: not such a packet. */
static __always_inline int floor_key(void *data, void *end, struct flow_key *key)
{
	struct ethhdr *eth = data;
	struct iphdr *ip4 = data + sizeof(*eth);
	struct ipv6hdr *ip6 = data + sizeof(*eth);
	struct tcphdr *tcp;

	if (data + sizeof(*eth) + sizeof(*ip4) + sizeof(*tcp) > end)
		return 0;
	if (eth->h_proto == bpf_htons(ETH_P_IP)) {
		key->src.w[2] = key->dst.w[2] = bpf_htonl(0xffff);
		key->src.w[3] = ip4->saddr;
		key->dst.w[3] = ip4->daddr;
		key->proto = ip4->protocol;
		tcp = (void *)(ip4 + 1);
	} else {
		if (data + sizeof(*eth) + sizeof(*ip6) + sizeof(*tcp) > end)
			return 0;
		for (int i = 0; i < 4; i++) {
			key->src.w[i] = ip6->saddr[i];
			key->dst.w[i] = ip6->daddr[i];
		}
		key->proto = ip6->nexthdr;
		tcp = (void *)(ip6 + 1);
	}
	key->sport = tcp->source;
	key->dport = tcp->dest;
	return key->proto == IPPROTO_TCP;
}

SEC("tc")
int floor_program(struct __sk_buff *skb)
{
	void *data = (void *)(unsigned long)skb->data, *end = (void *)(unsigned long)skb->data_end;
	struct flow_key key = {};
	struct ethhdr *eth = data;
	struct flow *f;

	if (!floor_key(data, end, &key))
		return TC_ACT_SHOT;
	f = bpf_map_lookup_elem(&flows, &key);
	if (!f || data + sizeof(*eth) > end)
		return TC_ACT_SHOT;
	__builtin_memcpy(eth->h_dest, f->dst_mac, 6);
	return TC_ACT_OK;
}

SEC("tc")
int empty_program(struct __sk_buff *skb __attribute__((unused)))
{
	return TC_ACT_OK;
}
