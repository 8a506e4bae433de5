/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/* Why the kernel gave up a connection, and whether that was told. */
#ifndef CONNECTION_FAILED_H
#define CONNECTION_FAILED_H

#include "kernel.h"
#include "maps.h"

/*
 * Why the kernel gave up a connection that a process still holds; 0 where another error is told, or
 * none. tcp_write_err() in net/ipv4/tcp_timer.c gives the error, for every timer: ETIMEDOUT, or
 * what ICMP had said. A connection that was never established has received nothing.
 *
 * The keepalive timer waits as long as anything is to be sent or acknowledged, the retransmission
 * timer acts while something is unacknowledged, and the third while the peer's window is closed.
 */
static __always_inline __u32 reason_of(struct tcp_sock *tp)
{
	struct sock *sk = &tp->inet_conn.icsk_inet.sk;
	int error = sk->sk_err;

	if (!error || (error != ETIMEDOUT && error != sk->sk_err_soft))
		return 0;
	if (!tp->inet_conn.icsk_ack.lrcvtime ||
	    has_flag(tp, bpf_core_enum_value(enum sock_flags, SOCK_DEAD)))
		return 0;
	if (tp->snd_una == tp->write_seq)
		return KABPF_KEEPALIVE;
	if (tp->inet_conn.icsk_user_timeout)
		return KABPF_USER_TIMEOUT;
	return tp->snd_una == tp->snd_nxt ? KABPF_ZERO_WINDOW : KABPF_RETRANSMISSION;
}

/* With the error unread, the kernel reports whatever else comes as one: what MSG_ZEROCOPY gives
 * back, time stamps. */
static __always_inline bool is_told(struct sock *sk, struct tcp_sock *tp)
{
	__u32 last = tp->snd_una, *told = bpf_sk_storage_get(&kabpf_told, sk, NULL, 0);

	if (!told)
		bpf_sk_storage_get(&kabpf_told, sk, &last, BPF_SK_STORAGE_GET_F_CREATE);
	else if (*told == last)
		return true;
	else
		*told = last;
	return false;
}

#endif
