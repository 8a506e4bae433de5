/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/* The addresses of a connection, 128 bits each; an IPv4 one is v4-mapped. */
#ifndef ADDRESSES_H
#define ADDRESSES_H

#include "kernel.h"
#include "maps.h"
#include "options.h"

/* The peer's address as 128 bits, and whether the connection stays on this machine: to a loopback
 * address, or to the socket's own. */
static __always_inline bool read_peer(struct sock_common *skc, __u8 *address)
{
	__u32 own[4] = {}, *peer = (__u32 *)address;

	if (BPF_CORE_READ(skc, skc_family) == AF_INET6 &&
	    bpf_core_field_exists(skc->skc_v6_daddr)) {
		BPF_CORE_READ_INTO((struct in6_addr *)peer, skc, skc_v6_daddr);
		BPF_CORE_READ_INTO((struct in6_addr *)own, skc, skc_v6_rcv_saddr);
	} else {
		peer[2] = own[2] = bpf_htonl(0xffff);
		peer[3] = BPF_CORE_READ(skc, skc_daddr);
		own[3] = BPF_CORE_READ(skc, skc_rcv_saddr);
	}
	return stays_here(peer, own);
}

static __always_inline void put_ipv4(__u8 *to, __be32 address)
{
	to[10] = to[11] = 0xff;
	__builtin_memcpy(to + 12, &address, sizeof(address));
}

/* An IPv4 address is written v4-mapped, into zeros. */
static __always_inline void put_addresses(__u8 *local, __u8 *remote, struct sock_common *skc)
{
	if (BPF_CORE_READ(skc, skc_family) == AF_INET) {
		put_ipv4(local, BPF_CORE_READ(skc, skc_rcv_saddr));
		put_ipv4(remote, BPF_CORE_READ(skc, skc_daddr));
	} else if (bpf_core_field_exists(skc->skc_v6_daddr)) {
		BPF_CORE_READ_INTO((struct in6_addr *)local, skc, skc_v6_rcv_saddr);
		BPF_CORE_READ_INTO((struct in6_addr *)remote, skc, skc_v6_daddr);
	}
}

#endif
