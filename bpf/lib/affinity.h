/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/*
 * Session affinity by client address (contract row V11): a client's new connections go to the backend that its last one went to, until it
 * has opened none for a while. One entry for all frontends of a service port. It lives where backends are chosen: on the pod's
 * node, or the one at which a client outside asks.
 */

#include "flow.h"

/*
 * The backend of the client's last connection. 0: there is none, or it was too long ago, or the backend has left the list since
 * (enum service_backend_flags). The entry is copied before it is checked: the table hands memory on at once, even while we read.
 */
static __always_inline int affinity_find(const struct service *s, __u32 list, const struct addr *client, struct backend *to)
{
	struct affinity_key key = {.client = *client, .service_id = s->id};
	struct service_backend m = {.service_id = s->id};
	struct affinity *a = bpf_map_lookup_elem(&affinity, &key);
	__u32 *lists;

	if (!a || now_seconds() - a->last_used >= s->affinity)
		return 0;
	m.addr = a->addr;
	m.port = a->port;
	lists = bpf_map_lookup_elem(&service_backends, &m);
	if (!lists || !(*lists & list))
		return 0;
	to->addr = m.addr;
	to->port = m.port;
	to->flags = 0;
	return 1;
}

/*
 * Remembers the backend of a new flow that has been let pass, or that it is in use. Not earlier: a forged source must not
 * change where another client goes.
 */
static __always_inline void affinity_note(const struct new_flow *nf)
{
	struct affinity_key key = {.client = nf->fwd.src, .service_id = nf->service_id};
	struct affinity value = {}, *had;

	if (nf->known || !nf->affinity)
		return;
	value.last_used = now_seconds();
	/* Another node translates: then this one has noted its choice in nf->backend. */
	value.addr = nf->backend_port ? nf->backend : nf->post.dst;
	value.port = nf->backend_port ? nf->backend_port : nf->post.dport;
	had = bpf_map_lookup_elem(&affinity, &key);
	if (had && had->port == value.port && addr_equal(&had->addr, &value.addr)) {
		had->last_used = value.last_used;
		return;
	}
	bpf_map_update_elem(&affinity, &key, &value, BPF_ANY);
}
