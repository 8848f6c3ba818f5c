/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/* The part of types.h that is about services, under the same rules. types.h includes it. */

/*
 * Where a service is reached. NodePort: addr is the family's unspecified address (::ffff:0.0.0.0 or ::) and the packet's
 * destination must be NODE_ADDR_NODEPORT. With SERVICE_HOST_PORT that address stands for all of this node's.
 */
struct frontend_key {
	struct addr addr;
	__be16 port;
	__u8 proto;
	__u8 pad;
};

/* Who asks decides which list of backends is used. */
enum service_scope {
	SCOPE_EXTERNAL = 0, /* the packet came from outside the node */
	SCOPE_INTERNAL = 1, /* it came from a local pod or from the node itself */
};

struct service {
	__u32 id;	 /* of the service port: shared by all its frontends; index of service_epochs */
	__u32 list[2];	 /* by enum service_scope: backend list */
	__u32 count[2];	 /* by enum service_scope: its length */
	__u32 flags;	 /* enum service_flags */
	__u32 affinity;	 /* session affinity by client address: seconds after the last new connection, 0 = none */
	__u8 maglev[2];	 /* by enum service_scope: size of the list's Maglev table, index of maglev_sizes; 0: chosen at random */
	__u16 reserved;
};

enum service_flags {
	SERVICE_DROP_EXTERNAL = 1, /* empty list for SCOPE_EXTERNAL means drop, not refuse: there are endpoints elsewhere */
	SERVICE_DROP_INTERNAL = 2, /* the same for SCOPE_INTERNAL */
	SERVICE_EXTERNAL_LOCAL = 4, /* external traffic policy Local */
	SERVICE_DSR = 8, /* the pod's node answers clients outside itself */
	SERVICE_INTERNAL_LOCAL = 16, /* internal traffic policy Local */
	SERVICE_SOURCE_RANGES = 32, /* only for sources in source_ranges */
	SERVICE_HOST_PORT = 64, /* a pod's hostPort: at this node's addresses, whether they have NodePorts or not */
};

struct backend_key {
	__u32 list;
	__u32 slot; /* 0 … count - 1; with BACKEND_BY_HASH the hash, or 0 */
};

/*
 * List that holds, by their hashes (backend_hash in lib/lb.h, bpf.BackendHash in Go), the backends of a service that are on this node:
 * BACKEND_BY_HASH | service id. So a node that only forwards tells ours which backend it has chosen. Slot 0, which is no hash, has one of
 * them, for a choice that has gone meanwhile; a list that is there always has it.
 */
enum backend_list {
	BACKEND_BY_HASH = 0x80000000,
};

/*
 * Service ids from HOST_PORT_FIRST on are those of hostPorts, one for each frontend; list HOST_PORT_LIST + id has the one backend. The plugin
 * takes an id by making that list, and gives it back by deleting it last.
 */
enum host_port_numbers {
	HOST_PORT_FIRST = 57344, /* to the end of service_epochs */
	HOST_PORT_LIST = 0x7fff0000,
};

struct backend {
	struct addr addr;
	__be16 port;
	__u16 flags; /* reserved, zero */
};

/* Set membership: is this address still a serving backend of the service port? The value is enum service_backend_flags. */
struct service_backend {
	__u32 service_id;
	struct addr addr;
	__be16 port;
	__u16 pad;
};

enum service_backend_flags {
	SERVICE_BACKEND_SERVING = 1, /* always */
	SERVICE_BACKEND_CLUSTER = 2, /* new connections may go to it under traffic policy Cluster */
	SERVICE_BACKEND_LOCAL = 4,   /* the same under Local */
};

/* One client's affinity to a service port, whichever of its frontends it asks. */
struct affinity_key {
	struct addr client;
	__u32 service_id;
};

struct affinity {
	struct addr addr; /* of the backend */
	__be16 port;
	__u16 pad;
	__u32 last_used; /* seconds, CLOCK_MONOTONIC: the last new connection */
};

/*
 * A part of a list's Maglev table: MAGLEV_CHUNK positions. The size is part of the key, so that a table that grows or shrinks is written
 * beside the one in use.
 */
struct maglev_key {
	__u32 list;
	__u16 chunk; /* position / MAGLEV_CHUNK */
	__u8 size;   /* index of maglev_sizes */
	__u8 pad;
};

#define MAGLEV_CHUNK 64 /* an entry fills a memory class of the kernel: docs/design/0007-maglev.md */

struct maglev_chunk {
	__u16 slot[MAGLEV_CHUNK]; /* of the list */
};

/* Prefix of sources that may use the load balancer addresses of a service port. */
struct source_range_key {
	__u32 prefixlen; /* 32 and bits of addr; IPv4: 32 + 96 + its own length */
	__u32 service_id;
	struct addr addr;
};

struct service_addr_key {
	__u32 prefixlen; /* bits of addr; IPv4: 96 + its own length */
	struct addr addr;
};

/* What an address is on which no frontend was found. The longest prefix says it; no entry: none of the services'. */
enum service_addr {
	SERVICE_ADDR_RANGE = 1,	 /* of the range that cluster addresses are taken from, and no service's */
	SERVICE_ADDR_ACTIVE = 2, /* a service's cluster address */
};

_Static_assert(sizeof(struct frontend_key) == 20, "frontend_key");
_Static_assert(sizeof(struct service) == 32, "service");
_Static_assert(sizeof(struct backend) == 20, "backend");
_Static_assert(sizeof(struct service_backend) == 24, "service_backend");
_Static_assert(sizeof(struct affinity_key) == 20, "affinity_key");
_Static_assert(sizeof(struct affinity) == 24, "affinity");
_Static_assert(sizeof(struct maglev_key) == 8, "maglev_key");
_Static_assert(sizeof(struct maglev_chunk) == 128, "maglev_chunk");
_Static_assert(sizeof(struct source_range_key) == 24, "source_range_key");
_Static_assert(sizeof(struct service_addr_key) == 20, "service_addr_key");
