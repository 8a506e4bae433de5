/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/* What a setsockopt(2) of an application's means under the policy of its socket. */
#ifndef CALLS_H
#define CALLS_H

#include "kernel.h"
#include "maps.h"
#include "options.h"
#include "report.h"
#include "visit.h"

/* What the options mean that an application may set; NULL for any other. */
static __always_inline struct kabpf_range *range_of(struct kabpf_options *o, int name)
{
	switch (name) {
	case TCP_KEEPIDLE:
		return &o->idle_s;
	case TCP_KEEPINTVL:
		return &o->interval_s;
	case TCP_KEEPCNT:
		return &o->probes;
	case TCP_USER_TIMEOUT:
		return &o->user_timeout_ms;
	default:
		return NULL;
	}
}

/* Whether kabpf_setsockopt sees the calls. */
static __always_inline bool is_setsockopt_linked(void)
{
	__u32 zero = 0;
	struct kabpf_totals *totals = bpf_map_lookup_elem(&kabpf_totals, &zero);

	return totals && totals->setsockopt;
}

/* Whether a call sets an option of a policy's on a socket that has had its policy by then. What is
 * shorter than a number the kernel refuses. */
static __always_inline bool is_for_policy(struct bpf_sockopt *ctx)
{
	bool ours;
	long length;

	if (ctx->optlen < 0) /* another program's decision */
		return false;
	ours = is_ours(ctx->level, ctx->optname);
	length = length_of_copy(ctx, ours);
	return ours && length >= (long)sizeof(int) && ctx->sk && is_tcp(ctx->sk) &&
	       is_settled(ctx->sk);
}

/* False where no policy concerns the socket. */
static __always_inline bool find_policy_of_call(struct bpf_sockopt *ctx, struct visit *v)
{
	struct sock *sk = sock_of(ctx);
	__u64 id = BPF_CORE_READ(sk, sk_cgrp_data.cgroup, kn, id);

	v->cgroup = bpf_map_lookup_elem(&kabpf_cgroups, &id);
	if (!v->cgroup || !ctx->sk)
		return false;
	if (ctx->sk->state != BPF_TCP_LISTEN)
		v->direction = ctx->sk->protocol == IPPROTO_MPTCP ? direction_of_multipath(sk)
								  : direction_of(sk);
	return begin_visit(v, (void *)sk);
}

/* The socket that has the options. An MPTCP socket passes them on to its subflows, of which the
 * first stands for all; NULL where that is gone. */
static __always_inline struct tcp_sock *socket_with_options(struct bpf_sockopt *ctx)
{
	struct mptcp_sock *msk = (void *)sock_of(ctx);

	if (!ctx->sk || ctx->sk->protocol != IPPROTO_MPTCP)
		return (void *)msk;
	return (void *)BPF_CORE_READ(msk, first);
}

/* The number that the policy gave the socket, if that has it still; else 0. */
static __always_inline __u32 given_by(struct kabpf_options *o, struct tcp_sock *tp, int name)
{
	__u32 given, now, unit = 1;

	switch (name) {
	case TCP_KEEPIDLE:
		given = BPF_CORE_READ(tp, inet_conn.icsk_inet.sk.__sk_common.skc_hash);
		given = idle_by(o, spread(given));
		now = BPF_CORE_READ(tp, keepalive_time);
		unit = second();
		break;
	case TCP_KEEPINTVL:
		given = o->interval_s.high;
		now = BPF_CORE_READ(tp, keepalive_intvl);
		unit = second();
		break;
	case TCP_KEEPCNT:
		given = o->probes.high;
		now = BPF_CORE_READ(tp, keepalive_probes);
		break;
	default:
		given = o->user_timeout_ms.high;
		now = BPF_CORE_READ(tp, inet_conn.icsk_user_timeout);
	}
	return came_from(given, unit, now) ? given : 0;
}

/* Whether a call turns keepalive off, or replaces a number that the policy gave the socket. Under
 * `enforce` it does not come so far, and within a range the application may choose. */
static __always_inline bool undoes(struct bpf_sockopt *ctx, struct visit *v, int asked)
{
	struct tcp_sock *tp = socket_with_options(ctx);
	struct kabpf_range *range;
	__u64 flags;
	__u32 given;

	if (!v->options->keepalive || v->policy->mode == KABPF_ENFORCE || !tp)
		return false;
	if (ctx->level == SOL_SOCKET) {
		flags = BPF_CORE_READ(tp, inet_conn.icsk_inet.sk.__sk_common.skc_flags);
		return !asked && flags >> bpf_core_enum_value(enum sock_flags, SOCK_KEEPOPEN) & 1;
	}
	range = range_of(v->options, ctx->optname);
	if (!range || !is_exactly(*range) || !is_valid(ctx->optname, asked))
		return false;
	given = given_by(v->options, tp, ctx->optname);
	return given && asked != given;
}

static __always_inline void tell_turned_off(struct bpf_sockopt *ctx, struct visit *v, __u32 asked)
{
	if (is_heard_of(v->policy))
		kabpf_tell_set(ctx, asked, v->policy_id, v->direction, KABPF_TURNED_OFF);
	__sync_fetch_and_add(&v->counters->turned_off, 1);
}

#endif
