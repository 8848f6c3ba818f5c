/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/*
 * Every struct and enum that user space sees. bpf2go turns this header into the Go types of pkg/bpf, so the C text here is the
 * only definition. Rules: fixed-width types, explicit padding (always zero), sizes asserted. A field whose type is __be16 or
 * __be32, and every struct addr, is in network byte order; everything else is in the byte order of the machine.
 *
 * The layout of a pinned map is a promise to the running node: a change means a new map name (maps.h) and a migration.
 */

#include "headers/kernel.h"

/* An IPv6 address, or an IPv4 address in its IPv4-mapped form (::ffff:a.b.c.d). The only form the maps know. */
struct addr {
	union {
		__u8 b[16];
		__be32 w[4];
	};
};

/* The pod's policy direction: EGRESS is what the pod sends, INGRESS what it receives. Index of two-element arrays. */
enum direction {
	EGRESS = 0,
	INGRESS = 1,
};

/* Hooks are named as the host sees them. */
enum hook {
	HOOK_FROM_POD = 1,
	HOOK_TO_POD = 2,
	HOOK_FROM_NETDEV = 3,
	HOOK_TO_NETDEV = 4,
	HOOK_FROM_OVERLAY = 5,
	HOOK_TO_OVERLAY = 6,
	HOOK_FROM_HOST = 7,
	HOOK_TO_LOOPBACK = 8,
};

/* Identities below IDENTITY_FIRST have a fixed meaning; the agent allocates the others, node-locally. */
enum identity {
	IDENTITY_WORLD = 0,	  /* no ipcache entry: outside the cluster */
	IDENTITY_HOST = 1,	  /* an address of this node */
	IDENTITY_REMOTE_NODE = 2, /* an address of another node */
	IDENTITY_POD_UNKNOWN = 3, /* a local pod that the agent has not classified yet */
	IDENTITY_FIRST = 16,
	IDENTITY_ANY = 0xffffffff, /* wildcard in policy_key, never the identity of an address */
};

/* Policy ids below POLICY_FIRST have a fixed meaning; the agent allocates the others, one for each distinct set of rules. */
enum policy_id {
	POLICY_NONE = 0,      /* not isolated: everything is allowed, no lookup */
	POLICY_NODE_ONLY = 1, /* policy not known yet: only traffic with this node (drop reason policy_pending) */
	POLICY_FIRST = 16,
};

/*
 * Why a packet was dropped. Append only, numbers are never reused: they are in counters, events and dashboards.
 * The Go names come from this enum's BTF (bpf.DropReason), lower-cased and without the prefix.
 */
enum drop_reason {
	DROP_NONE = 0,
	DROP_TRUNCATED = 1,	       /* header lengths do not fit the packet */
	DROP_UNKNOWN_ETHERTYPE = 2,    /* neither IPv4, IPv6 nor ARP */
	DROP_UNKNOWN_PROTOCOL = 3,     /* transport protocol that Margay does not carry */
	DROP_SPOOFED_ADDRESS = 4,      /* source address does not belong to the device */
	DROP_SPOOFED_MAC = 5,	       /* source MAC does not belong to the device */
	DROP_POLICY = 6,	       /* denied by policy; the event names the rule */
	DROP_POLICY_PENDING = 7,       /* the pod's policy is not known yet (policyPending) */
	DROP_SERVICE_NO_BACKEND = 8,   /* service without endpoints, or connection whose pod has vanished; the client was told */
	DROP_SERVICE_NO_LOCAL = 9,     /* Local traffic policy and no endpoint here */
	DROP_NO_ROUTE = 10,	       /* no route to the destination */
	DROP_FRAGMENT = 11,	       /* IP fragment without a whole transport header to judge it by, its own or its first one's */
	DROP_EXTENSION_HEADER = 12,    /* IPv6 extension header not known, or too many of them */
	DROP_MULTICAST = 13,	       /* multicast or broadcast from a pod */
	DROP_INVALID_ARP = 14,	       /* ARP that is no Ethernet/IPv4 request from the pod's own address */
	DROP_INVALID_ND = 15,	       /* neighbour discovery that is no solicitation from the pod's own address */
	DROP_ICMP_TYPE = 16,	       /* ICMP message that is neither echo nor an error */
	DROP_NO_FLOW = 17,	       /* ICMP error or echo reply that belongs to no known flow */
	DROP_FLOW_TABLE = 18,	       /* the flow table refused an entry */
	DROP_NAT = 19,		       /* address rewrite failed */
	DROP_REDIRECT = 20,	       /* the kernel refused the redirect */
	DROP_INVALID_CONFIG = 21,      /* a map that must have an entry has none */
	DROP_SOURCE_IS_LOCAL = 22,     /* packet from outside claims an address of this node or of one of its pods */
	DROP_NAT_COLLISION = 23,       /* the translated tuple is taken by another flow */
	DROP_SERVICE_UNKNOWN_PORT = 24, /* port that the service address does not serve; the client was told (RST, port unreachable) */
	DROP_OVERLAY_SOURCE = 25,      /* encapsulated by an address that is no node's, or with an inner source that is not that node's */
	DROP_OVERLAY_VNI = 26,	       /* encapsulated under a network number that is not ours */
	DROP_NOT_ENCAPSULATED = 27,    /* from outside, under an address of another node's pods, which come through the overlay only */
	DROP_NO_SOURCE_PORT = 28,      /* masquerade: every source port that may be used towards this destination is taken */
	DROP_NO_EGRESS_ADDRESS = 29,   /* masquerade: this node has no address to send from */
	DROP_TOO_BIG = 30,	       /* does not fit the way ahead; the sender was told */
	DROP_FRAGMENT_LOST = 31,       /* IP fragment that waited for the first of its datagram in vain */
	DROP_SOURCE_RANGE = 32,	       /* the load balancer address is open to other sources only (loadBalancerSourceRanges) */
	DROP_SERVICE_UNALLOCATED = 33, /* address of the service range that no service has */
	DROP_REASONS = 34,	       /* count; keep last */
};

/* A packet's addresses as the flow table sees them. ICMP echo: the identifier is both ports. */
struct flow_key {
	struct addr src;
	struct addr dst;
	__be16 sport;
	__be16 dport;
	__u8 proto;
	__u8 pad[3];
};

enum flow_action {
	FLOW_TO_STACK = 1, /* the host's own stack */
	FLOW_TO_POD = 2,   /* MACs, then bpf_redirect_peer(out_ifindex) */
	FLOW_TO_NETDEV = 3, /* bpf_redirect_neigh(out_ifindex), to next_hop or by the kernel's route */
	FLOW_TO_NODE = 4,   /* encapsulated to out_node, by the programs or by the overlay device out_ifindex */
	FLOW_INTO_NETDEV = 5, /* the host's own stack, as if it had come in by out_ifindex */
	FLOW_TO_HOST = 6,   /* MACs, then the host's own stack, as the answer to what it sent by out_ifindex */
};

enum flow_flags {
	FLOW_REPLY = 1,	     /* this direction answers the one that opened the flow */
	FLOW_NAT = 2,	     /* rewrite to xlate */
	FLOW_DENIED = 4,     /* policy turned against the flow: drop, keep the NAT binding */
	FLOW_IN_POD = 8,     /* packets come from a pod: in_ifindex and in_mac are its own */
	FLOW_SERVICE = 16,   /* service_id and service_epoch are valid */
	FLOW_VIA_STACK = 32, /* opened by a packet from the host's stack: its answers go back there */
	FLOW_FROM_HOST = 64, /* opened by a process of the node itself: policy does not apply (contract row N10) */
	FLOW_DENIED_INGRESS = 128, /* with FLOW_DENIED: by the receiver's ingress policy */
	FLOW_IN_NODE = 256, /* packets come from the node itself: nobody outside may send them */
	FLOW_IN_OVERLAY = 512,	/* packets come through the overlay, from in_node */
	FLOW_MASQUERADE = 1024, /* the opener's source becomes an address of this node, with a port that was chosen for it */
	FLOW_FORWARDED = 2048,	/* with FLOW_TO_NODE: service traffic under the client's own address, VNI_FORWARDED */
	FLOW_DSR = 4096,	/* a forwarded flow whose answers the pod's node sends to the client itself */
	FLOW_VIA_HOST = 8192,	/* opened by a packet that the host's stack sent to a service (from_host) */
	FLOW_TO_MAC = 16384,	/* with FLOW_TO_NETDEV, of the answers: to dst_mac, because the kernel has no route there by the device */
};

/* TCP flags seen in one direction of a flow. */
enum flow_tcp {
	FLOW_TCP_SYN = 1,
	FLOW_TCP_FIN = 2,
	FLOW_TCP_RST = 4,
	FLOW_TCP_ESTABLISHED = 8, /* something beyond the SYN passed */
	FLOW_TCP_BULK = 16, /* of every protocol: a short while ago something came that only the overlay device can decapsulate */
	FLOW_TCP_BULK_TICK = 32, /* from this bit on: when that was, the lowest bits of a tick */
};

/*
 * One direction of a flow, self-contained: everything that a known packet needs is in this one entry.
 * The other direction's key is xlate with source and destination exchanged.
 */
struct flow {
	__u32 last_seen;	/* seconds, CLOCK_MONOTONIC; written at most once a second */
	__u32 route_epoch;	/* endpoint_epochs of EPOCH_SLOT_ROUTES */
	__u32 endpoint_epoch[2]; /* endpoint_epochs of in_ifindex, and of flow_out_slot */
	__u32 service_id;	/* with FLOW_SERVICE */
	__u32 service_epoch;
	__u32 in_ifindex;	/* with FLOW_IN_POD: device its packets come from; else 0 */
	__u32 out_ifindex;	/* device its packets leave by; also the pod's device where the host's stack takes them there */
	__u8 in_mac[6];		/* with FLOW_IN_POD: source MAC its packets must have */
	__u8 dst_mac[6];	/* FLOW_TO_POD, FLOW_TO_HOST: written into the packet */
	__u8 src_mac[6];
	__u8 action;		/* enum flow_action */
	__u8 tcp;		/* enum flow_tcp */
	__u16 flags;		/* enum flow_flags */
	__u16 mtu;		/* of the way ahead, bytes from the IP header; 0: not checked */
	__u16 tick;		/* when last_seen was written, in a unit of the programs' own */
	__be16 backend_port;	/* with backend */
	__u32 csum_diff;	/* with FLOW_NAT: one's complement difference of the addresses */
	struct flow_key xlate;	/* the tuple after translation; equals the key without FLOW_NAT */
	union {
		struct addr backend;  /* with backend_port: FLOW_FORWARDED and FLOW_SERVICE: chosen here, translated to by out_node */
		struct addr next_hop; /* without, with FLOW_TO_NETDEV: neighbour that its packets go to; zero: the kernel looks it up */
	};
	__u32 rule_id;		/* rule that allowed, or with FLOW_DENIED denied, it; 0 = no policy */
	__u16 in_node;		/* with FLOW_IN_OVERLAY: index of nodes */
	__u16 out_node;		/* with FLOW_TO_NODE: index of nodes */
};

/* A pod interface. Key of the map: each of its addresses. */
struct endpoint {
	__u32 ifindex;	    /* host-side device */
	__u32 identity;
	__u32 policy_id[2]; /* by enum direction */
	__u32 flags;	    /* enum endpoint_flags */
	__u8 mac[6];	    /* of the pod's interface */
	__u8 host_mac[6];   /* of the host-side device: the pod's gateway */
};

enum endpoint_flags {
	ENDPOINT_ADOPTED = 1, /* another plugin made the interface: ARP, ND and unknown destinations go to the stack */
	ENDPOINT_PENDING = 2, /* policy was not known at ADD */
};

/* Hash of a pod's namespace, name and UID; of a namespace alone for its summary; of nothing for the node's summary. */
struct pending_key {
	__u8 hash[16];
};

struct pending {
	__u32 identity;
	__u32 policy_id[2]; /* by enum direction */
	__u32 flags;	    /* enum pending_flags */
};

enum pending_flags {
	PENDING_POD = 1,      /* a pod: identity and policy_id are its own */
	PENDING_OPEN = 2,     /* a namespace in which no policy could select a pod (or, node summary: no policy anywhere) */
	PENDING_RESTRICTED = 4, /* a namespace with policies (or, node summary: policies exist) */
};

struct ipcache_key {
	__u32 prefixlen; /* bits of addr; IPv4: 96 + its own length */
	struct addr addr;
};

struct ipcache_entry {
	__u32 identity;
	__u32 flags;	  /* reserved, zero */
	struct addr node; /* node that the address lives on; zero: this one, or outside the cluster */
};

/* Value of node_addrs: these flags, and with NODE_ADDR_REMOTE the node's index of nodes in the upper 16 bits. */
enum node_addr_flags {
	NODE_ADDR_LOCAL = 1,	/* address of this node */
	NODE_ADDR_NODEPORT = 2, /* NodePorts are served on it */
	NODE_ADDR_REMOTE = 4,	/* address of another node */
	NODE_ADDR_OVERLAY = 8,	/* with NODE_ADDR_REMOTE: pods reach it through the overlay */
};

#define NODE_ADDR_INDEX_SHIFT 16

/* Another node. Index of the map nodes: from 1; flows, routes and node_addrs name nodes by it. */
struct node {
	struct addr addr;  /* outer destination, and the only outer source that is believed; zero: no such node */
	struct addr local; /* outer source: this node's address of the same family */
	__u16 mtu;	   /* largest inner packet that fits the way there, bytes from the IP header */
	__u16 flags;	   /* enum node_tunnel_flags */
	__u32 ifindex;	   /* the programs encapsulate, and send by this device; only between IPv4 addresses; 0: the overlay device does it */
};

enum node_tunnel_flags {
	NODE_ON_LINK = 1, /* with ifindex: addr is a neighbour's there; else the kernel's routes know the next hop */
};

struct route_key {
	__u32 prefixlen; /* bits of addr; IPv4: 96 + its own length */
	struct addr addr;
};

/* Where a prefix is. No entry: outside the cluster. */
struct route {
	__u16 node;  /* index of nodes: pods of that node; 0: none's */
	__u16 flags; /* enum route_flags */
};

enum route_flags {
	ROUTE_OVERLAY = 1,	 /* encapsulated to the node; else by the kernel's routes */
	ROUTE_LOCAL = 2,	 /* this node's pod range: an address without endpoint is nowhere */
	ROUTE_NO_MASQUERADE = 4, /* pods keep their own address towards it */
};

/* The addresses that pods' traffic leaves a device with when it is masqueraded; zero: none of that family. */
struct egress_addrs {
	struct addr v4;
	struct addr v6;
};

/* Services: frontends, backends, and how one is chosen. */
#include "service.h"

/* Prefix lengths of policy_key: the fields that are always compared, then protocol, then port bits. */
enum policy_prefix {
	POLICY_PREFIX_BASE = 72,  /* any protocol */
	POLICY_PREFIX_PROTO = 80, /* that protocol, any port */
	POLICY_PREFIX_PORT = 96,  /* that protocol and port; 81 to 95: the port's leading bits */
};

struct policy_key {
	__u32 prefixlen;
	__u32 policy_id;
	__u32 identity; /* of the peer, or IDENTITY_ANY */
	__u8 direction;
	__u8 proto;
	__be16 port; /* destination port after service translation */
};

enum policy_verdict {
	VERDICT_ALLOW = 1,
	VERDICT_DENY = 2,
};

enum policy_entry_flags {
	/* A ClusterNetworkPolicy denies: holds also from a pod to its own node, and for a pod that reaches itself through a service. */
	POLICY_ENTRY_CLUSTER = 1,
};

/*
 * A packet may match one entry for its peer's identity and one for IDENTITY_ANY. The lower rank decides, then deny.
 * Within one identity the longest prefix hides the shorter ones; the compiler has already settled their order.
 * No entry: deny.
 */
struct policy_entry {
	__u32 verdict; /* enum policy_verdict */
	__u32 rank;
	__u32 rule_id;
	__u32 flags; /* enum policy_entry_flags */
};

struct counter {
	__u64 packets;
	__u64 bytes;
};

/* What the agent has switched on. One entry. */
struct node_state {
	__u32 flags; /* enum node_flags */
	__u32 overlay_ifindex; /* the VXLAN device; 0: there is none */
	__u32 vni;	       /* first of enum overlay_vni */
	__be16 overlay_port;   /* UDP */
	__u16 reserved;
	__u32 host_ifindex;    /* device by which the host's stack sends to services; 0: there is none */
};

enum node_flags {
	NODE_VERDICT_EVENTS = 1, /* write an event for every new flow that policy let pass */
	NODE_MASQUERADE = 2,	 /* pods' traffic to outside the cluster leaves with this node's address */
	NODE_LOCALHOST_IPV4 = 4, /* the node itself finds NodePorts on 127.0.0.0/8 */
	NODE_LOCALHOST_IPV6 = 8, /* and on ::1 */
};

/* VXLAN network numbers: node_state.vni plus one of these. */
enum overlay_vni {
	VNI_PODS = 0,	   /* from and to addresses of the two nodes and their pods */
	VNI_FORWARDED = 1, /* service traffic from and to any client; answers come back through the node that forwarded it */
	VNI_DSR = 2,	   /* the same, but the pod's node answers the client itself */
};

/*
 * Slots of endpoint_epochs: a power of two, so that the index is a mask. The first two belong to no pod: no device has index 0, and 1 is
 * the loopback device.
 */
enum epoch_slots {
	EPOCH_SLOT_OUTSIDE = 0, /* everything that is no pod of this node; raised when a pod gets an address */
	EPOCH_SLOT_ROUTES = 1,	/* the node's routes */
	ENDPOINT_EPOCHS = 16384,
};

/* A flow that is being judged: both tuples of the direction that opened it, and what its two entries will be made of. */
struct new_flow {
	struct flow_key fwd;  /* as the opener sends it */
	struct flow_key post; /* after translation */
	struct flow entry;    /* the one being written */
	struct endpoint src;  /* ifindex 0: no pod of this node */
	struct endpoint dst;
	struct addr next_hop[2]; /* neighbour that they go to, as in struct flow */
	struct addr backend;  /* with FLOW_FORWARDED, on the node that forwards: chosen here; else zero */
	__u32 affinity;	      /* seconds for which the client is to have the backend again; 0: nothing to remember */
	__u32 out_ifindex[2]; /* where the opener's packets, and the answers, leave: device, 0 = not known yet */
	__u32 service_id;
	__u32 service_epoch;
	__u32 endpoint_epoch[3]; /* of src, of dst, and slot 0 (flow_out_slot) */
	__u32 route_epoch;
	__u32 rule_id;
	__u16 flags; /* enum flow_flags common to both directions */
	__be16 backend_port;
	__u16 in_node[2];  /* node that the opener's packets, and the answers, come from through the overlay; 0: not so */
	__u16 out_node[2]; /* with FLOW_TO_NODE: node that they go to */
	__u16 mtu[2];	   /* of the way that they go; 0: not checked */
	__u8 action[2];
	__u8 known;	/* the flow has entries already: its translation stays */
	__u8 fresh;	/* the packet at hand has found no entry */
	__u8 reply;	/* the packet at hand is an answer */
	__u8 direction; /* enum direction: whose policy decided */
	__u8 tcp_flags; /* of the packet at hand */
	__u8 pad;
	struct flow_key key; /* of entry */
};

enum event_type {
	EVENT_DROP = 1,
	EVENT_VERDICT = 2, /* a new flow was let pass (only with NODE_VERDICT_EVENTS) */
};

struct event {
	__u64 time; /* nanoseconds, CLOCK_MONOTONIC */
	__u8 type;	/* enum event_type */
	__u8 hook;	/* enum hook */
	__u8 direction; /* enum direction */
	__u8 reason;	/* enum drop_reason */
	__u32 ifindex;	/* device of the hook */
	__u32 rule_id;
	__u32 length; /* bytes from the Ethernet header */
	struct flow_key tuple; /* at the hook; policy drops: after service translation */
};

/* Rate limit of events, per CPU. */
struct event_budget {
	__u32 second;
	__u32 used;
};

/* Input and output of the sweep_flows program. */
struct sweep {
	__u32 now;	/* in: seconds, CLOCK_MONOTONIC */
	__u32 visited;	/* out */
	__u32 deleted;	/* out */
	__u32 reserved;
};

_Static_assert(sizeof(struct addr) == 16, "addr");
_Static_assert(sizeof(struct flow_key) == 40, "flow_key");
_Static_assert(sizeof(struct flow) == 128, "flow");
_Static_assert(sizeof(struct endpoint) == 32, "endpoint");
_Static_assert(sizeof(struct ipcache_key) == 20, "ipcache_key");
_Static_assert(sizeof(struct ipcache_entry) == 24, "ipcache_entry");
_Static_assert(sizeof(struct policy_key) == 16, "policy_key");
_Static_assert(sizeof(struct event) == 64, "event");
_Static_assert(sizeof(struct node) == 40, "node");
_Static_assert(sizeof(struct route) == 4, "route");
_Static_assert(sizeof(struct node_state) == 20, "node_state");
