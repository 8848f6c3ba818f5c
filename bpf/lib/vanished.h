/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/* What has come or gone since a flow's entries were made: services at its address, the pod at its other end. Part of the slow path. */

#include "masquerade.h"
#include "route.h"

/* A client whose first packets were sent before there was a service (contract row U2): a connection that stands goes on. */
static __always_inline int may_become_service(const struct pkt *p)
{
	return p->key.proto == IPPROTO_UDP || pkt_opens_tcp(p);
}

/* Has another service got the address meanwhile? While nobody has it, what began goes on. */
static __always_inline int service_is_another(const struct pkt *p, const struct flow *f)
{
	struct service *s;

	/* Another node's question, which that node knows better. */
	if (p->hook == HOOK_FROM_OVERLAY)
		return 0;
	s = service_find(&p->key, p->hook, 0, 0);
	return s && s->id != f->service_id;
}

/* The pods' devices come and go by other hands than the maps' writers'. */
static __always_inline int device_is_gone(struct __sk_buff *skb, __u32 ifindex)
{
	__u32 len = 1;

	return bpf_check_mtu(skb, ifindex, &len, 0, 0) == -ENODEV;
}

/*
 * A connection through a service whose backend was on another node, which is not there any more. Only leaving the service means nothing:
 * connections that stand go on. Where pods are masqueraded, a pod's own address went to the cluster's addresses only.
 */
static __always_inline int node_is_gone(const struct new_flow *nf, const struct flow *f)
{
	const struct addr *to = nf->backend_port ? &nf->backend : &nf->post.dst;

	if (!(f->flags & FLOW_SERVICE) || node_of(to) || backend_still_serves(f))
		return 0;
	if (f->action == FLOW_TO_NODE)
		return 1;
	if (f->action != FLOW_TO_NETDEV || !nf->src.ifindex || (f->flags & FLOW_MASQUERADE))
		return 0;
	return (node_flags() & NODE_MASQUERADE) && !knows_pods(to);
}

/*
 * Has the pod at the other end of a TCP connection vanished without a goodbye? Nobody will ever answer in its name, so we do: the client
 * hears of it by a reset, instead of sending until it gives up. Flows of other nodes' clients are known here without their service.
 */
__noinline int receiver_is_gone(struct __sk_buff *skb, struct pkt *p, struct new_flow *nf, const struct flow *f)
{
	if (!p || !nf || !f || p->key.proto != IPPROTO_TCP || pkt_opens_tcp(p) || !nf->known || nf->reply)
		return 0;
	/* These have no way back to the sender. */
	if (p->hook == HOOK_TO_POD || p->hook == HOOK_TO_NETDEV || (f->flags & FLOW_DENIED))
		return 0;
	if (nf->dst.ifindex)
		return device_is_gone(skb, nf->dst.ifindex);
	return f->action == FLOW_TO_POD ? !node_of(&nf->post.dst) : node_is_gone(nf, f);
}
