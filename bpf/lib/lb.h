/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/* Service → backend, once per flow. */

#include "flow.h"
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

static __always_inline struct service *service_find(const struct flow_key *key, __u32 hook)
{
	struct frontend_key fk = {.addr = key->dst, .port = key->dport, .proto = key->proto};
	struct service *s;
	__u32 flags;

	if (key->proto == IPPROTO_ICMP || key->proto == IPPROTO_ICMPV6)
		return NULL;
	s = bpf_map_lookup_elem(&services, &fk);
	if (s)
		return s;
	flags = node_addr_flags_of(&key->dst);
	if (!has_nodeports(flags, hook))
		return NULL;
	/* NodePort: one entry for all addresses of the family. */
	if (addr_is_v4(&key->dst)) {
		fk.addr.w[3] = 0;
	} else {
		fk.addr.w[0] = 0;
		fk.addr.w[1] = 0;
		fk.addr.w[2] = 0;
		fk.addr.w[3] = 0;
	}
	s = bpf_map_lookup_elem(&services, &fk);
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

/* A backend of the list, uniformly at random. NULL: it has none. */
static __always_inline struct backend *backend_choose(__u32 list, __u32 count)
{
	struct backend_key bk = {.list = list, .slot = bpf_get_prandom_u32() % count};
	struct backend *b = bpf_map_lookup_elem(&backends, &bk);

	if (b)
		return b;
	/* The list shrank since count was read: its first slot goes last. */
	bk.slot = 0;
	return bpf_map_lookup_elem(&backends, &bk);
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

/* Is the backend on another node? Returns its index, or 0. */
static __always_inline __u32 backend_node(const struct backend *b)
{
	return endpoint_of(&b->addr) ? 0 : node_of(&b->addr);
}

/*
 * A client outside asks for a backend on another node: that node translates, because it has the answers too, and the packet goes there
 * as it is. So the client's address is kept, and translation is known where the pod is.
 */
static __always_inline void service_forward(struct new_flow *nf, const struct service *s, const struct backend *b, __u32 node)
{
	nf->flags |= FLOW_FORWARDED | (s->flags & SERVICE_DSR ? FLOW_DSR : 0);
	nf->backend = b->addr;
	nf->backend_port = b->port;
	nf->out_node[0] = node;
}

/*
 * Chooses a backend for nf->fwd and writes nf->post. 0: chosen, or no service at all. hash: what a forwarding node says of its choice,
 * only with nf->flags & FLOW_FORWARDED. A pod that reaches itself sees the service address as the client: its answer then comes
 * back through us (contract row V12).
 */
__noinline int service_translate(struct new_flow *nf, __u32 hook, __u32 hash)
{
	__u32 scope = hook == HOOK_FROM_POD ? SCOPE_INTERNAL : SCOPE_EXTERNAL, node;
	struct service *s;
	struct backend *b;

	if (!nf)
		return -DROP_INVALID_CONFIG;
	s = service_find(&nf->fwd, hook);
	if (!s)
		return 0;
	nf->service_id = s->id;
	nf->service_epoch = service_epoch(s->id);
	/* Again: what is read from here on is not older than the epoch. */
	s = service_find(&nf->fwd, hook);
	if (!s)
		return 0;
	if (nf->flags & FLOW_FORWARDED) {
		b = backend_here(s, hash);
		if (!b)
			return -DROP_SERVICE_NO_LOCAL;
	} else {
		if (s->count[scope] == 0) {
			if (s->flags & (scope == SCOPE_EXTERNAL ? SERVICE_DROP_EXTERNAL : SERVICE_DROP_INTERNAL))
				return -DROP_SERVICE_NO_LOCAL;
			return -DROP_SERVICE_NO_BACKEND;
		}
		b = backend_choose(s->list[scope], s->count[scope]);
		if (!b)
			return -DROP_SERVICE_NO_BACKEND;
		node = hook == HOOK_FROM_POD ? 0 : backend_node(b);
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
	if (addr_equal(&nf->post.dst, &nf->fwd.src))
		nf->post.src = nf->fwd.dst;
	return 0;
}
