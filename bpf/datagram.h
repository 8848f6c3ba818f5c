/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/* What the maps hold of fragmented datagrams. Only the programs read and write it (lib/fragment.h); the rules of types.h hold. */

#include "types.h"

/* Tells the fragmented datagrams between two addresses apart. */
struct fragment_key {
	struct addr src;
	struct addr dst;
	__be32 id;
	__u8 proto; /* IPv4 (RFC 791); IPv6: 0 (RFC 8200 §4.5) */
	__u8 pad[3];
};

/* A fragmented datagram: what its later fragments need from the first one, and those that came before it. */
struct datagram {
	__u32 waiting; /* the fragment of held_fragments that came last, as its slot + 1; 0: none; FIRST_FRAGMENT_SEEN: none needs to */
	__u32 seen;    /* seconds, CLOCK_MONOTONIC: when the first fragment came, or the first that waits */
	__be16 sport;
	__be16 dport;
	__u8 proto;
	__u8 icmp_type; /* 0 unless ICMP */
	__u8 tcp_flags; /* 0 unless TCP */
	__u8 headers;	/* 8-byte units that no later fragment may reach into */
	__u8 vni;	/* from_overlay: as in struct pkt, of the first fragment */
	__u8 pad;
	struct addr outer;
};

#define FIRST_FRAGMENT_SEEN 0xffffffff

enum held_state {
	HELD_FREE = 0,
	HELD_BUSY = 1, /* a program reads or writes the slot */
	HELD_WAITING = 2,
};

#define HELD_FRAGMENTS 1024
#define HELD_FRAME 1520 /* bytes from the Ethernet header */

/* A later fragment that waits for the first one of its datagram. */
struct held_fragment {
	__u32 state; /* enum held_state */
	__u32 next;  /* slot + 1 of the one that came before it; 0: none */
	__u32 time;  /* seconds, CLOCK_MONOTONIC */
	__u32 ifindex; /* device that it came in on */
	struct fragment_key key;
	struct addr outer;
	__u16 length; /* bytes from the Ethernet header */
	__u8 hook;	/* enum hook */
	__u8 direction; /* enum direction */
	__u8 proto;
	__u8 passed; /* the host's stack has got one already */
	__u8 vni;    /* from_overlay: as in struct pkt */
	__u8 pad;
	__u8 frame[HELD_FRAME];
};

/* The first fragment of a datagram that is being handled. */
struct fragment_scratch {
	struct fragment_key key;
	struct datagram first;
	__u32 pad;
	__u8 frame[HELD_FRAME]; /* what it has become, while the packet is used to send others */
};

_Static_assert(sizeof(struct fragment_key) == 40, "fragment_key");
_Static_assert(sizeof(struct datagram) == 36, "datagram");
_Static_assert(sizeof(struct held_fragment) == 80 + HELD_FRAME, "held_fragment");
