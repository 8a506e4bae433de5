/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/* What monitors and the log are told. */
#ifndef REPORT_H
#define REPORT_H

#include "addresses.h"
#include "kernel.h"
#include "maps.h"
#include "options.h"

static __always_inline bool is_heard(void)
{
	__u32 zero = 0;
	__u64 *all = bpf_map_lookup_elem(&kabpf_readers, &zero);

	return all && *all;
}

/* Whether anybody may read what happens under a policy. */
static __always_inline bool is_heard_of(struct kabpf_policy *policy)
{
	__u32 zero = 0;
	__u64 *all = bpf_map_lookup_elem(&kabpf_readers, &zero), others;

	if (!all || !*all)
		return false;
	if (policy->flags & KABPF_LOG)
		return true;
	others = *all;
	((__u8 *)&others)[KABPF_LOGGER] = 0;
	return others;
}

static __always_inline void count_lost(__u32 monitor)
{
	__u32 place = 1 + monitor;
	__u64 *lost = bpf_map_lookup_elem(&kabpf_readers, &place);

	if (lost)
		__sync_fetch_and_add(lost, 1);
}

/* Whether the log has room for one event more of this policy now. A race gives it some more. */
static __always_inline bool has_part(__u32 policy_id, __u64 now_ns)
{
	struct {
		__u64 window;
		__u64 events;
	} *part = bpf_map_lookup_elem(&kabpf_log_parts, &policy_id);

	if (!part)
		return false;
	if (part->window != now_ns >> 28) {
		part->window = now_ns >> 28;
		part->events = 0;
	}
	return __sync_fetch_and_add(&part->events, 1) < KABPF_LOG_PART;
}

/* To the log, if anybody reads it, as an event of this policy. */
static __always_inline void tell_log(void *data, __u64 size, __u32 policy_id, __u64 now_ns)
{
	__u32 zero = 0;
	__u8 *monitors = bpf_map_lookup_elem(&kabpf_readers, &zero);

	if (!monitors || !monitors[KABPF_LOGGER])
		return;
	if (!has_part(policy_id, now_ns) || bpf_ringbuf_output(&kabpf_log, data, size, 0))
		count_lost(KABPF_LOGGER);
}

/* To each monitor that reads. One that is not there any more is not told again, nor one whose perf
 * event is off, as its processor was away for a while; nobody waits for one that does not read. */
static __always_inline void tell(void *ctx, void *data, __u64 size)
{
	__u32 zero = 0, cpu = bpf_get_smp_processor_id();
	__u8 *monitors = bpf_map_lookup_elem(&kabpf_readers, &zero);

	if (!monitors)
		return;
	for (__u32 i = KABPF_LOGGER + 1; i < KABPF_MONITORS; i++) {
		long error;

		if (!monitors[i])
			continue;
		error = bpf_perf_event_output(ctx, &kabpf_monitors,
					      i * kabpf_constants.processors + cpu, data, size);
		if (error == -ENOENT || error == -EOPNOTSUPP)
			monitors[i] = 0;
		else if (error)
			count_lost(i);
	}
}

static __always_inline void put_socket(struct kabpf_report *r, struct sock *sk)
{
	struct sock_common *skc = &sk->__sk_common;

	r->time_ns = bpf_ktime_get_ns();
	r->cgroup_id = BPF_CORE_READ(sk, sk_cgrp_data.cgroup, kn, id);
	put_addresses(r->local, r->remote, skc);
	/* Of a failed connection skc_num is 0. */
	r->local_port = bpf_ntohs(BPF_CORE_READ((struct inet_sock *)sk, inet_sport));
	r->remote_port = bpf_ntohs(BPF_CORE_READ(skc, skc_dport));
	r->namespace = BPF_CORE_READ(skc, skc_net.net, ns.inum);
	r->family = BPF_CORE_READ(skc, skc_family);
}

/* As they are now. Not of an MPTCP socket. */
static __always_inline void put_values(struct kabpf_report *r, struct tcp_sock *tp)
{
	r->keepalive = BPF_CORE_READ(tp, inet_conn.icsk_inet.sk.__sk_common.skc_flags) >>
			   bpf_core_enum_value(enum sock_flags, SOCK_KEEPOPEN) &
		       1;
	r->idle_s = BPF_CORE_READ(tp, keepalive_time) / kabpf_constants.hz;
	r->interval_s = BPF_CORE_READ(tp, keepalive_intvl) / kabpf_constants.hz;
	r->probes = BPF_CORE_READ(tp, keepalive_probes);
	r->user_timeout_ms = BPF_CORE_READ(tp, inet_conn.icsk_user_timeout);
}

static __always_inline void put_process(struct kabpf_report *r)
{
	struct task_struct *task = (void *)bpf_get_current_task();

	r->pid = BPF_CORE_READ(task, tgid);
	BPF_CORE_READ_INTO(&r->command, task, comm);
}

static __always_inline void tell_report(void *ctx, struct kabpf_report *r, __u32 policy_id)
{
	struct kabpf_policy *policy = bpf_map_lookup_elem(&kabpf_policies, &policy_id);

	r->policy_id = policy_id;
	tell(ctx, r, sizeof(*r));
	if (policy && policy->flags & KABPF_LOG)
		tell_log(r, sizeof(*r), policy_id, r->time_ns);
}

/* What happened to a connection or a listener. The kernel works for the process in connect(2) and
 * listen(2), and mostly for somebody else when a connection is established. */
__noinline int kabpf_tell_new(struct bpf_sock_ops *ctx, __u64 outcomes, __u32 policy_id)
{
	struct kabpf_report r = { .what = KABPF_NEW, .outcomes = outcomes };
	struct tcp_sock *tp;
	int op = ctx->op;

	if (!ctx->sk)
		return 0;
	tp = bpf_skc_to_tcp_sock(ctx->sk);
	if (!tp)
		return 0;
	put_socket(&r, (void *)tp);
	put_values(&r, tp);
	if (op == BPF_SOCK_OPS_TCP_CONNECT_CB)
		r.what = KABPF_CALLED;
	if (op == BPF_SOCK_OPS_TCP_CONNECT_CB || op == BPF_SOCK_OPS_TCP_LISTEN_CB)
		put_process(&r);
	if (op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		r.direction = KABPF_IN;
	else if (op != BPF_SOCK_OPS_TCP_LISTEN_CB)
		r.direction = KABPF_OUT;
	tell_report(ctx, &r, policy_id);
	return 0;
}

static __always_inline void tell_open(void *ctx, struct visit *v)
{
	struct kabpf_report r = { .what = KABPF_OPEN, .outcomes = v->outcomes };

	put_socket(&r, (void *)v->tp);
	put_values(&r, v->tp);
	r.direction = v->direction;
	tell_report(ctx, &r, v->policy_id);
}

static __always_inline enum option option_of(int level, int name)
{
	if (level == SOL_SOCKET)
		return KEEPALIVE;
	switch (name) {
	case TCP_KEEPIDLE:
		return IDLE;
	case TCP_KEEPINTVL:
		return INTERVAL;
	case TCP_KEEPCNT:
		return PROBES;
	default:
		return USER_TIMEOUT;
	}
}

/* A setsockopt(2) that was ignored, clamped, or undid the policy. */
__noinline int kabpf_tell_set(struct bpf_sockopt *ctx, __u32 asked, __u32 policy_id,
			      __u32 direction, __u32 what)
{
	struct kabpf_report r = { .what = what, .asked = asked, .direction = direction };
	struct sock *sk = sock_of(ctx);

	put_socket(&r, sk);
	if (ctx->sk && ctx->sk->protocol == IPPROTO_TCP)
		put_values(&r, (void *)sk);
	put_process(&r);
	r.option = option_of(ctx->level, ctx->optname);
	tell_report(ctx, &r, policy_id);
	return 0;
}

/* So that a monitor knows the path of a cgroup that is gone by the time it reads of its sockets. In
 * the log a birth is one of the events of the cgroup's policy, or of those without one. */
static __always_inline void tell_birth(void *ctx, struct kabpf_event *event, struct cgroup *cgrp,
				       __u32 policy_id)
{
	event->time_ns = bpf_ktime_get_ns();
	event->cgroup_id = cgrp->kn->id;
	event->parent_id = cgrp->self.parent->cgroup->kn->id;
	bpf_probe_read_kernel_str(event->name, sizeof(event->name), cgrp->kn->name);
	tell(ctx, event, sizeof(*event));
	tell_log(event, sizeof(*event), policy_id, event->time_ns);
}

/* For how long the peer's window has been closed, as far as it was probed: the kernel counts from
 * the first probe, whether the peer answers or not (tcp_probe_timer() in net/ipv4/tcp_timer.c). */
static __always_inline __u32 closed_ms(struct tcp_sock *tp)
{
	__u32 since = tp->inet_conn.icsk_probes_tstamp;

	if (!since || tp->snd_una != tp->snd_nxt || tp->snd_una == tp->write_seq)
		return 0;
	return (__u64)((__u32)bpf_jiffies64() - since) * 1000 / kabpf_constants.hz;
}

static __always_inline void tell_failed(void *ctx, struct visit *v, __u32 reason)
{
	struct kabpf_report r = { .what = KABPF_TIMED_OUT, .reason = reason };
	struct inet_connection_sock *icsk = &v->tp->inet_conn;

	put_socket(&r, (void *)v->tp);
	put_values(&r, v->tp);
	/* Its port is given up; see direction_of(). */
	r.direction = icsk->icsk_inet.sk.sk_max_ack_backlog ? KABPF_IN : KABPF_OUT;
	r.error = icsk->icsk_inet.sk.sk_err;
	r.silent_ms = (__u64)silent_jiffies(v->tp) * 1000 / kabpf_constants.hz;
	r.sent = icsk->icsk_retransmits ?: icsk->icsk_probes_out;
	r.closed_ms = closed_ms(v->tp);
	tell_report(ctx, &r, v->policy_id);
}

#endif
