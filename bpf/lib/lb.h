/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/* Service → backend, once per flow. */

#include "affinity.h"
#include "maglev.h"
#include "policy.h"

/*
 * Sixteen bits of a backend's address and port, never 0: what a forwarding node says of its choice (bpf.BackendHash in Go is the same).
 */
static __always_inline __u32 backend_hash(const struct addr *a, __be16 port)
{
	__u32 h = port;

	for (int i = 0; i < 4; i++)
		h = (h ^ a->w[i]) * 0x9e3779b1;
	h >>= 16;
	return h ? h : 1;
}

/* May the address have NodePorts, for what comes by this hook? Of another node: when a pod asks, or that node forwards the question. */
static __always_inline int has_nodeports(__u32 addr_flags, __u32 hook)
{
	if (addr_flags & NODE_ADDR_LOCAL)
		return addr_flags & NODE_ADDR_NODEPORT;
	/* The node that forwards knows its addresses better than we. */
	return hook == HOOK_FROM_OVERLAY || (hook == HOOK_FROM_POD && (addr_flags & NODE_ADDR_NODEPORT));
}

/*
 * The loopback addresses, which are not in node_addrs because nobody but the node itself may ask there: hostPorts are served on them, NodePorts
 * where that is switched on (contract row V7).
 */
static __always_inline __u32 localhost_flags(const struct addr *a)
{
	__u32 flag = addr_is_v4(a) ? NODE_LOCALHOST_IPV4 : NODE_LOCALHOST_IPV6;

	return NODE_ADDR_LOCAL | (node_flags() & flag ? NODE_ADDR_NODEPORT : 0);
}

/* What a pod or a machine outside sends to a loopback address must not reach a hostPort there. */
static __always_inline int comes_from_elsewhere(__u32 hook)
{
	return hook == HOOK_FROM_POD || hook == HOOK_FROM_NETDEV || hook == HOOK_FROM_OVERLAY;
}

/*
 * forwarded: another node has sent the question on (VNI_FORWARDED, VNI_DSR). to_pod: a pod of this node has the address, so no node does; 0
 * where nobody has asked yet.
 */
static __always_inline struct service *service_find(const struct flow_key *key, __u32 hook, __u32 forwarded, __u32 to_pod)
{
	struct frontend_key fk = {.addr = key->dst, .port = key->dport, .proto = key->proto};
	struct service *s;
	__u32 flags;
	int nodeports;

	if (key->proto == IPPROTO_ICMP || key->proto == IPPROTO_ICMPV6)
		return NULL;
	if (addr_is_loopback(&key->dst) && comes_from_elsewhere(hook))
		return NULL;
	s = bpf_map_lookup_elem(&services, &fk);
	if (s || to_pod)
		return s;
	if (hook == HOOK_FROM_HOST && addr_is_loopback(&key->dst))
		flags = localhost_flags(&key->dst);
	else
		flags = node_addr_flags_of(&key->dst);
	/* Between pods nothing is forwarded: that a pod's port has the number of a NodePort means nothing. */
	if (hook == HOOK_FROM_OVERLAY && !forwarded && !(flags & NODE_ADDR_LOCAL))
		return NULL;
	nodeports = has_nodeports(flags, hook);
	if (!nodeports && !(flags & NODE_ADDR_LOCAL))
		return NULL;
	/* NodePort or hostPort: one entry for all addresses of the family. */
	if (addr_is_v4(&key->dst)) {
		fk.addr.w[3] = 0;
	} else {
		fk.addr.w[0] = 0;
		fk.addr.w[1] = 0;
		fk.addr.w[2] = 0;
		fk.addr.w[3] = 0;
	}
	s = bpf_map_lookup_elem(&services, &fk);
	if (s && !nodeports && !(s->flags & SERVICE_HOST_PORT))
		return NULL;
	/* A pod's question to another node is answered here, unless that node wants its own backends to be used. */
	if (s && hook == HOOK_FROM_POD && (flags & NODE_ADDR_REMOTE) && (s->flags & SERVICE_EXTERNAL_LOCAL))
		return NULL;
	return s;
}

static __always_inline int backend_still_serves(const struct flow *f)
{
	struct service_backend m = {.service_id = f->service_id, .addr = f->xlate.dst, .port = f->xlate.dport};

	/* Another node translates: the entry remembers to what. */
	if (f->backend_port) {
		m.addr = f->backend;
		m.port = f->backend_port;
	}

	return bpf_map_lookup_elem(&service_backends, &m) != NULL;
}

/* The list that the scope uses, as enum service_backend_flags says it. */
static __always_inline __u32 list_flag(const struct service *s, __u32 scope)
{
	if ((s->flags & SERVICE_INTERNAL_LOCAL) || (scope == SCOPE_EXTERNAL && (s->flags & SERVICE_EXTERNAL_LOCAL)))
		return SERVICE_BACKEND_LOCAL;
	return SERVICE_BACKEND_CLUSTER;
}

/*
 * A backend of the scope's list, which is not empty, for a new flow: the one that the client had, or by the flow's hash, or uniformly at
 * random.
 */
static __always_inline int backend_choose(const struct service *s, __u32 scope, const struct flow_key *key, struct backend *to)
{
	struct backend_key bk = {.list = s->list[scope]};
	struct backend *b;

	if (s->affinity && affinity_find(s, list_flag(s, scope), &key->src, to))
		return 0;
	bk.slot = maglev_slot(s, scope, key);
	/* No table, or one that is newer than our copy of the service. */
	if (bk.slot >= s->count[scope])
		bk.slot = bpf_get_prandom_u32() % s->count[scope];
	b = bpf_map_lookup_elem(&backends, &bk);
	if (!b) {
		/* The list shrank since count was read: its first slot goes last. */
		bk.slot = 0;
		b = bpf_map_lookup_elem(&backends, &bk);
	}
	if (!b)
		return -DROP_SERVICE_NO_BACKEND;
	*to = *b;
	return 0;
}

/*
 * A backend on this node, for a flow that another node forwarded: the one that it has chosen, or, when that has gone meanwhile or it did
 * not say, another one that we have.
 */
static __always_inline struct backend *backend_here(const struct service *s, __u32 hash)
{
	struct backend_key bk = {.list = BACKEND_BY_HASH | s->id, .slot = hash};
	struct backend *b = bpf_map_lookup_elem(&backends, &bk);

	if (b)
		return b;
	bk.slot = 0;
	return bpf_map_lookup_elem(&backends, &bk);
}

/* May the source use the load balancer address (contract row V10)? */
static __always_inline int source_allowed(const struct service *s, const struct addr *src)
{
	struct source_range_key key = {.prefixlen = 32 + 128, .service_id = s->id, .addr = *src};

	return !(s->flags & SERVICE_SOURCE_RANGES) || bpf_map_lookup_elem(&source_ranges, &key);
}

/*
 * What no frontend was found for: the services' addresses are nobody else's, a pod of this node's included, so nothing there is routed on
 * (contract row V9). What another node has forwarded is left alone, because that node may know the service earlier than we.
 */
static __always_inline int service_missing(const struct flow_key *key, __u32 hook, __u32 to_pod)
{
	struct service_addr_key k = {.prefixlen = 128, .addr = key->dst};
	__u32 *what;

	if (to_pod)
		return 0;
	if (hook != HOOK_FROM_POD && hook != HOOK_FROM_NETDEV && hook != HOOK_FROM_HOST)
		return 0;
	what = bpf_map_lookup_elem(&service_addrs, &k);
	if (!what)
		return 0;
	return *what == SERVICE_ADDR_ACTIVE ? -DROP_SERVICE_UNKNOWN_PORT : -DROP_SERVICE_UNALLOCATED;
}

/* Is the backend on another node? Returns its index, or 0. */
static __always_inline __u32 backend_node(const struct backend *b)
{
	return endpoint_of(&b->addr) ? 0 : node_of(&b->addr);
}

/* Chooses a backend, as the node that decides. */
static __always_inline int service_choose(struct new_flow *nf, const struct service *s, __u32 scope, struct backend *to)
{
	if (!source_allowed(s, &nf->fwd.src))
		return -DROP_SOURCE_RANGE;
	if (s->count[scope] == 0) {
		if (s->flags & (scope == SCOPE_EXTERNAL ? SERVICE_DROP_EXTERNAL : SERVICE_DROP_INTERNAL))
			return -DROP_SERVICE_NO_LOCAL;
		return -DROP_SERVICE_NO_BACKEND;
	}
	nf->affinity = s->affinity;
	return backend_choose(s, scope, &nf->fwd, to);
}

/*
 * A client outside asks for a backend on another node: that node translates, because it has the answers too, and the packet goes there
 * as it is. So the client's address is kept, and translation is known where the pod is.
 */
static __always_inline void service_forward(struct new_flow *nf, const struct service *s, const struct backend *b, __u32 node)
{
	__u32 dsr = s->flags & SERVICE_DSR;

	/* A node that is led back to itself: it cannot send itself an answer with an address of ours. */
	if (dsr && node_of(&nf->fwd.src) == node)
		dsr = 0;
	nf->flags |= FLOW_FORWARDED | (dsr ? FLOW_DSR : 0);
	nf->backend = b->addr;
	nf->backend_port = b->port;
	nf->out_node[0] = node;
}

/*
 * Chooses a backend for nf->fwd and writes nf->post. nf->dst is the pod of this node that has the address asked for; 0: chosen, or no
 * service at all. hash: what a forwarding node says of its choice, only with nf->flags & FLOW_FORWARDED. A pod that reaches itself sees the service address as the client: its answer then comes
 * back through us (contract row V12).
 */
__noinline int service_translate(struct new_flow *nf, __u32 hook, __u32 hash)
{
	__u32 inside = hook == HOOK_FROM_POD || hook == HOOK_FROM_HOST, scope = inside ? SCOPE_INTERNAL : SCOPE_EXTERNAL, node;
	struct backend chosen, *b = &chosen;
	struct service *s;
	__u32 to_pod;
	int ret;

	if (!nf)
		return -DROP_INVALID_CONFIG;
	to_pod = nf->dst.ifindex;
	s = service_find(&nf->fwd, hook, nf->flags & FLOW_FORWARDED, to_pod);
	if (!s)
		return service_missing(&nf->fwd, hook, to_pod);
	nf->service_id = s->id;
	nf->service_epoch = service_epoch(s->id);
	/* Again: what is read from here on is not older than the epoch. */
	s = service_find(&nf->fwd, hook, nf->flags & FLOW_FORWARDED, to_pod);
	if (!s)
		return service_missing(&nf->fwd, hook, to_pod);
	if (nf->flags & FLOW_FORWARDED) {
		b = backend_here(s, hash);
		if (!b)
			return -DROP_SERVICE_NO_LOCAL;
	} else {
		ret = service_choose(nf, s, scope, &chosen);
		if (ret)
			return ret;
		node = inside ? 0 : backend_node(b);
		if (node) {
			/* Sent by a pod whose node will soon know the service itself: forwarded once more it would not be believed. */
			if (hook != HOOK_FROM_NETDEV)
				return -DROP_SERVICE_NO_LOCAL;
			nf->flags |= FLOW_SERVICE;
			service_forward(nf, s, b, node);
			return 0;
		}
	}
	nf->flags |= FLOW_SERVICE;
	nf->post.dst = b->addr;
	nf->post.dport = b->port;
	/* The host's stack brings its own answers to to_loopback. */
	if (addr_equal(&nf->post.dst, &nf->fwd.src) && hook != HOOK_FROM_HOST)
		nf->post.src = nf->fwd.dst;
	return 0;
}
