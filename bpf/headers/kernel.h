/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/*
 * The part of the kernel's user API that the programs use: fixed-width types, packet headers, program context, constants.
 * Written by hand instead of generated: these layouts are frozen by the kernel, the programs build without any system header,
 * and a reader sees all that Margay depends on. struct sk_buff is the one exception.
 */

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef signed int __s32;
typedef signed long long __s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u32 __wsum;

#define NULL ((void *)0)
#define SEC(name) __attribute__((section(name), used))
#define __always_inline inline __attribute__((always_inline))
#define __noinline __attribute__((noinline))
#define __ksym __attribute__((section(".ksyms"), weak)) /* a kernel function; NULL where the kernel does not have it */
#define __uint(name, val) int(*name)[val]
#define __type(name, val) typeof(val) *name
#define offsetof(type, member) __builtin_offsetof(type, member)
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define bpf_htons(x) ((__be16)__builtin_bswap16(x))
#define bpf_htonl(x) ((__be32)__builtin_bswap32(x))
#else
#define bpf_htons(x) ((__be16)(x))
#define bpf_htonl(x) ((__be32)(x))
#endif
#define bpf_ntohs(x) bpf_htons(x)
#define bpf_ntohl(x) bpf_htonl(x)

/* Map types and flags, linux/bpf.h. */
enum {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
	BPF_MAP_TYPE_LRU_HASH = 9,
	BPF_MAP_TYPE_LPM_TRIE = 11,
	BPF_MAP_TYPE_RINGBUF = 27,
};

enum {
	BPF_ANY = 0,
	BPF_NOEXIST = 1,
	BPF_EXIST = 2,
};

#define BPF_F_NO_PREALLOC (1U << 0)
#define BPF_F_PSEUDO_HDR (1ULL << 4)
#define BPF_F_MARK_MANGLED_0 (1ULL << 5)
#define BPF_F_RECOMPUTE_CSUM (1ULL << 0)
#define BPF_F_INGRESS (1ULL << 0)	 /* of bpf_redirect */
#define BPF_F_TUNINFO_IPV6 (1ULL << 0)	 /* of the tunnel key helpers */
#define BPF_F_ZERO_CSUM_TX (1ULL << 1)
#define BPF_RB_NO_WAKEUP (1ULL << 0)
#define BPF_ADJ_ROOM_MAC 1
#define BPF_F_ADJ_ROOM_FIXED_GSO (1ULL << 0)
#define BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 (1ULL << 1)
#define BPF_F_ADJ_ROOM_ENCAP_L4_UDP (1ULL << 4)
#define BPF_F_ADJ_ROOM_NO_CSUM_RESET (1ULL << 5)
#define BPF_F_ADJ_ROOM_ENCAP_L2_ETH (1ULL << 6)	    /* 5.11 */
#define BPF_F_ADJ_ROOM_DECAP_L3_IPV6 (1ULL << 8)	    /* 6.3 */
#define BPF_F_ADJ_ROOM_ENCAP_L2(len) ((__u64)(len) << 56) /* bytes of the inner Ethernet header */
#define BPF_CSUM_LEVEL_DEC 2 /* of bpf_csum_level */
#define BPF_F_INGRESS (1ULL << 0)
#define BPF_F_INVALIDATE_HASH (1ULL << 1)

/* Verdicts of tc programs, linux/pkt_cls.h. */
#define TC_ACT_UNSPEC (-1)
#define TC_ACT_OK 0
#define TC_ACT_SHOT 2
#define TC_ACT_REDIRECT 7

#define PACKET_HOST 0
#define LOOPBACK_IFINDEX 1 /* in every network namespace */

struct __sk_buff {
	__u32 len;
	__u32 pkt_type;
	__u32 mark;
	__u32 queue_mapping;
	__u32 protocol;
	__u32 vlan_present;
	__u32 vlan_tci;
	__u32 vlan_proto;
	__u32 priority;
	__u32 ingress_ifindex;
	__u32 ifindex;
	__u32 tc_index;
	__u32 cb[5];
	__u32 hash;
	__u32 tc_classid;
	__u32 data;
	__u32 data_end;
	__u32 napi_id;
	__u32 family;
	__u32 remote_ip4;
	__u32 local_ip4;
	__u32 remote_ip6[4];
	__u32 local_ip6[4];
	__u32 remote_port;
	__u32 local_port;
	__u32 data_meta;
	__u64 flow_keys; /* pointers in the kernel's declaration; not used here */
	__u64 tstamp;
	__u32 wire_len;
	__u32 gso_segs;
	__u64 sk;
	__u32 gso_size;
	__u8 tstamp_type;
	__u8 pad[3];
	__u64 hwtstamp;
};

/*
 * The kernel's own packet, as far as it is read here. No layout is promised: the loader finds the field by the kernel's BTF, also where it
 * is today.
 */
struct sk_buff {
	__u8 ip_summed : 2; /* enum ip_summed */
	__u8 encapsulation : 1; /* inner_* say where the headers in the tunnel are */
} __attribute__((preserve_access_index));

/* How the transport checksum in a packet stands, linux/skbuff.h. */
enum ip_summed {
	CHECKSUM_NONE = 0,	  /* whole, nobody has looked */
	CHECKSUM_UNNECESSARY = 1, /* whole, and right */
	CHECKSUM_COMPLETE = 2,	  /* whole; beside it the NIC's sum of all bytes behind the Ethernet header */
	CHECKSUM_PARTIAL = 3,	  /* so far of the pseudo header alone: a device, or who needs it, computes the rest */
};

/* What __builtin_preserve_field_info is asked for. */
enum {
	FIELD_BYTE_OFFSET = 0,
	FIELD_EXISTS = 2,
	FIELD_LSHIFT_U64 = 4, /* of the field's bytes as a 64-bit number: what lies above the field falls off */
	FIELD_RSHIFT_U64 = 5, /* and then what lies below */
};

/* bpf_fib_lookup, linux/bpf.h. */
#define BPF_FIB_LOOKUP_DIRECT (1U << 0)
#define BPF_FIB_LOOKUP_OUTPUT (1U << 1)
#define BPF_FIB_LKUP_RET_SUCCESS 0
#define BPF_FIB_LKUP_RET_NOT_FWDED 4
#define BPF_FIB_LKUP_RET_NO_NEIGH 7
#define BPF_FIB_LKUP_RET_FRAG_NEEDED 8

/*
 * Outer header of an encapsulated packet. IPv4 addresses are in the byte order of the machine, IPv6 addresses in network byte order.
 * local_*: kernel 6.0.
 */
struct bpf_tunnel_key {
	__u32 tunnel_id;
	union {
		__u32 remote_ipv4;
		__be32 remote_ipv6[4];
	};
	__u8 tunnel_tos;
	__u8 tunnel_ttl;
	__u16 tunnel_ext;
	__u32 tunnel_label;
	union {
		__u32 local_ipv4;
		__be32 local_ipv6[4];
	};
};

/* Option of a VXLAN tunnel key: the group policy extension (draft-smith-vxlan-group-policy), 16 bits of it. */
struct vxlan_metadata {
	__u32 gbp;
};

/* Next hop of bpf_redirect_neigh, linux/bpf.h. */
struct bpf_redir_neigh {
	__u32 nh_family;
	union {
		__be32 ipv4_nh;
		__be32 ipv6_nh[4];
	};
};

struct bpf_fib_lookup {
	__u8 family;
	__u8 l4_protocol;
	__be16 sport;
	__be16 dport;
	__u16 tot_len; /* out: MTU of the route */
	__u32 ifindex;
	__be32 flowinfo; /* IPv6; IPv4: type of service in the first byte; out: metric */
	__be32 src[4];
	__be32 dst[4];
	__be16 vlan_proto;
	__be16 vlan_tci;
	__u8 smac[6];
	__u8 dmac[6];
};

/* A socket, linux/bpf.h, as far as it is read here. */
struct bpf_sock {
	__u32 bound_dev_if;
	__u32 family;
	__u32 type;
	__u32 protocol;
	__u32 mark;
	__u32 priority;
	__be32 src_ip4;
	__be32 src_ip6[4];
	__u32 src_port;
	__be16 dst_port;
	__u16 pad;
	__be32 dst_ip4;
	__be32 dst_ip6[4];
	__u32 state;
};

/* Of a packet to the socket: its source is the other end. */
struct bpf_sock_tuple {
	union {
		struct {
			__be32 saddr;
			__be32 daddr;
			__be16 sport;
			__be16 dport;
		} ipv4;
		struct {
			__be32 saddr[4];
			__be32 daddr[4];
			__be16 sport;
			__be16 dport;
		} ipv6;
	};
};

#define EEXIST 17
#define ENODEV 19
#define BPF_F_CURRENT_NETNS ((__u64)-1)
#define BPF_TCP_LISTEN 10

/* Packet headers. */
#define ETH_P_IP 0x0800
#define ETH_P_ARP 0x0806
#define ETH_P_IPV6 0x86DD
#define AF_INET 2
#define AF_INET6 10

#define IPPROTO_ICMP 1
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_ICMPV6 58
#define IPPROTO_SCTP 132

#define IPPROTO_HOPOPTS 0
#define IPPROTO_ROUTING 43
#define IPPROTO_FRAGMENT 44
#define IPPROTO_AH 51
#define IPPROTO_NONE 59
#define IPPROTO_DSTOPTS 60

struct ethhdr {
	__u8 h_dest[6];
	__u8 h_source[6];
	__be16 h_proto;
};

struct iphdr {
	__u8 version_ihl;
	__u8 tos;
	__be16 tot_len;
	__be16 id;
	__be16 frag_off;
	__u8 ttl;
	__u8 protocol;
	__u16 check;
	__be32 saddr;
	__be32 daddr;
};

#define IP_MF 0x2000
#define IP_OFFSET 0x1fff /* 8-byte units */

struct ipv6hdr {
	__u8 version_class;
	__u8 flow_label[3];
	__be16 payload_len;
	__u8 nexthdr;
	__u8 hop_limit;
	__be32 saddr[4];
	__be32 daddr[4];
};

struct ipv6_opt {
	__u8 nexthdr;
	__u8 hdrlen; /* 8-byte units, not counting the first */
};

struct ipv6_frag {
	__u8 nexthdr;
	__u8 reserved;
	__be16 frag_off; /* IP6_OFFSET: bytes; IP6_MF */
	__be32 id;
};

#define IP6_MF 0x0001
#define IP6_OFFSET 0xfff8

struct tcphdr {
	__be16 source;
	__be16 dest;
	__be32 seq;
	__be32 ack_seq;
	__u8 doff; /* upper four bits: 32-bit words */
	__u8 flags;
	__be16 window;
	__u16 check;
	__be16 urg_ptr;
};

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

/* RFC 7348 §5, with the group policy extension (draft-smith-vxlan-group-policy §2.1). */
struct vxlanhdr {
	__u8 flags;
	__u8 gbp_flags;
	__be16 gbp;
	__be32 vni; /* the upper 24 bits */
};

struct udphdr {
	__be16 source;
	__be16 dest;
	__be16 len;
	__u16 check;
};

struct icmphdr {
	__u8 type;
	__u8 code;
	__u16 checksum;
	__be16 id; /* echo */
	__be16 sequence; /* echo; too big: the MTU, of ICMPv6 its lower half */
};

#define ICMP_ECHOREPLY 0
#define ICMP_DEST_UNREACH 3
#define ICMP_ECHO 8
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETERPROB 12
#define ICMP_PORT_UNREACH 3
#define ICMP_FRAG_NEEDED 4

#define ICMPV6_DEST_UNREACH 1
#define ICMPV6_PKT_TOOBIG 2
#define ICMPV6_TIME_EXCEED 3
#define ICMPV6_PARAMPROB 4
#define ICMPV6_PORT_UNREACH 4
#define ICMPV6_ECHO_REQUEST 128
#define ICMPV6_ECHO_REPLY 129
#define ICMPV6_ND_FIRST 133
#define ICMPV6_ND_SOLICIT 135
#define ICMPV6_ND_ADVERT 136
#define ICMPV6_ND_LAST 137

struct arphdr {
	__be16 hrd;
	__be16 pro;
	__u8 hln;
	__u8 pln;
	__be16 op;
	__u8 sha[6];
	__u8 spa[4];
	__u8 tha[6];
	__u8 tpa[4];
} __attribute__((packed));

#define ARPHRD_ETHER 1
#define ARPOP_REQUEST 1
#define ARPOP_REPLY 2

/* Neighbour solicitation and advertisement, with one link-layer address option (RFC 4861 §4.3, §4.4). */
struct nd_msg {
	__u8 type;
	__u8 code;
	__u16 checksum;
	__be32 flags;
	__be32 target[4];
};

struct nd_opt {
	__u8 type;
	__u8 len; /* 8-byte units */
	__u8 mac[6];
};

#define ND_OPT_TARGET_LL 2
#define ND_ADVERT_SOLICITED 0x40000000
#define ND_ADVERT_OVERRIDE 0x20000000
#define ND_ADVERT_ROUTER 0x80000000
