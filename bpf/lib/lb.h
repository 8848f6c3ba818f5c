/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/* Service → backend, once per flow. */

#include "flow.h"
#include "policy.h"

static __always_inline struct service *service_find(const struct flow_key *key)
{
	struct frontend_key fk = {.addr = key->dst, .port = key->dport, .proto = key->proto};
	struct service *s;

	if (key->proto == IPPROTO_ICMP || key->proto == IPPROTO_ICMPV6)
		return NULL;
	s = bpf_map_lookup_elem(&services, &fk);
	if (s || !(node_addr_flags_of(&key->dst) & NODE_ADDR_NODEPORT))
		return s;
	/* NodePort: one entry for all addresses of the family. */
	if (addr_is_v4(&key->dst)) {
		fk.addr.w[3] = 0;
	} else {
		fk.addr.w[0] = 0;
		fk.addr.w[1] = 0;
		fk.addr.w[2] = 0;
		fk.addr.w[3] = 0;
	}
	return bpf_map_lookup_elem(&services, &fk);
}

static __always_inline int backend_still_serves(const struct flow *f)
{
	struct service_backend m = {.service_id = f->service_id, .addr = f->xlate.dst, .port = f->xlate.dport};

	return bpf_map_lookup_elem(&service_backends, &m) != NULL;
}

/*
 * Chooses a backend for nf->fwd and writes nf->post. 0: chosen, or no service at all. A pod that reaches itself sees the service
 * address as the client: its answer then comes back through us (contract row V12).
 */
__noinline int service_translate(struct new_flow *nf, __u32 scope)
{
	struct service *s;
	struct backend_key bk;
	struct backend *b;
	__u32 count;

	if (!nf)
		return -DROP_INVALID_CONFIG;
	s = service_find(&nf->fwd);
	if (!s)
		return 0;
	nf->service_id = s->id;
	nf->service_epoch = service_epoch(s->id);
	/* Again: what is read from here on is not older than the epoch. */
	s = service_find(&nf->fwd);
	if (!s)
		return 0;
	count = s->count[scope & 1];
	if (count == 0) {
		if (s->flags & (scope == SCOPE_EXTERNAL ? SERVICE_DROP_EXTERNAL : SERVICE_DROP_INTERNAL))
			return -DROP_SERVICE_NO_LOCAL;
		return -DROP_SERVICE_NO_BACKEND;
	}
	bk.list = s->list[scope & 1];
	bk.slot = bpf_get_prandom_u32() % count;
	b = bpf_map_lookup_elem(&backends, &bk);
	if (!b) {
		/* The list shrank since count was read: its first slot goes last. */
		bk.slot = 0;
		b = bpf_map_lookup_elem(&backends, &bk);
		if (!b)
			return -DROP_SERVICE_NO_BACKEND;
	}
	nf->post.dst = b->addr;
	nf->post.dport = b->port;
	if (addr_equal(&nf->post.dst, &nf->fwd.src))
		nf->post.src = nf->fwd.dst;
	nf->flags |= FLOW_SERVICE;
	return 0;
}
