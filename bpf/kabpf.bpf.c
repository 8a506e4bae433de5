// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * kabpf's data plane: sets keepalive options on the TCP sockets of cgroups that a policy covers.
 *
 * Which policy a cgroup has is decided when the cgroup is made (kabpf_cgroup_mkdir), so that a
 * connection costs one look-up (kabpf_sockops). Sockets that were open before are visited once
 * (kabpf_retrofit). What applications ask for later is seen only while a policy needs it
 * (kabpf_setsockopt), or a monitor asks for it (kabpf_observe).
 *
 * No program here fails a connection or changes what another program decided: kabpf_sockops always
 * returns 1, leaves `reply` alone and asks for no callbacks, and what can't be set is only counted.
 */
#include "births.h"
#include "calls.h"
#include "connection_failed.h"
#include "holders.h"
#include "kabpf.h"
#include "kernel.h"
#include "maps.h"
#include "options.h"
#include "report.h"
#include "socket_list.h"
#include "visit.h"

/* The policy's own user timeout does not count yet: it would end a connect() that is slow. */
static __always_inline void set_connect_timeout(struct bpf_sock_ops *ctx, struct visit *v)
{
	struct bpf_sock *sk = ctx->sk;
	struct connecting fresh = { .set_ms = v->options->connect_timeout_ms }, *kept;

	fresh.before_ms = held(v, USER_TIMEOUT);
	if (!sk || !fresh.set_ms || fresh.set_ms == fresh.before_ms)
		return;
	if (fresh.before_ms && v->policy->mode == KABPF_FILL)
		return count_kept(v, USER_TIMEOUT);
	kept = bpf_sk_storage_get(&kabpf_connecting, sk, &fresh, BPF_SK_STORAGE_GET_F_CREATE);
	if (!kept)
		return count_failure(v, -ENOMEM);
	*kept = fresh;
	set_option(ctx, v, USER_TIMEOUT, SOL_TCP, TCP_USER_TIMEOUT, fresh.set_ms);
}

/* Undoes it when the connection is established, or connect() is called once more. What the
 * application has set meanwhile stays. A function of its own, because hardly any connection has a
 * user timeout by then. */
__noinline int kabpf_end_connect_timeout(struct bpf_sock_ops *ctx, __u32 now)
{
	struct bpf_sock *sk = ctx->sk;
	struct connecting *kept;
	int before;

	if (!sk)
		return 0;
	kept = bpf_sk_storage_get(&kabpf_connecting, sk, NULL, 0);
	if (!kept)
		return 0;
	before = kept->before_ms;
	if (kept->set_ms == now)
		bpf_setsockopt(ctx, SOL_TCP, TCP_USER_TIMEOUT, &before, sizeof(before));
	bpf_sk_storage_delete(&kabpf_connecting, sk);
	return 0;
}

SEC("sockops")
int kabpf_sockops(struct bpf_sock_ops *ctx)
{
	struct visit v = {};
	__u32 timeout;

	if (!find_direction(&v, ctx->op) || !ctx->sk)
		return 1;
	v.tp = bpf_skc_to_tcp_sock(ctx->sk);
	if (!v.tp)
		return 1;
	timeout = v.tp->inet_conn.icsk_user_timeout;
	if (timeout && v.direction == KABPF_OUT)
		kabpf_end_connect_timeout(ctx, timeout);
	v.cgroup = cgroup_of(v.tp);
	if (!v.cgroup || !begin_visit(&v, (void *)v.tp))
		return 1;
	if (ctx->op == BPF_SOCK_OPS_TCP_CONNECT_CB) {
		set_syn_retries(ctx, &v);
		set_connect_timeout(ctx, &v);
		if (is_heard_of(v.policy))
			kabpf_tell_new(ctx, v.outcomes, v.policy_id);
		return 1;
	}
	/* What an accepted connection has already was its listener's, from this policy or a former
	 * one; else the application's. */
	if (v.direction == KABPF_IN) {
		if (v.policy->flags & KABPF_LISTENERS && !keeps_alive(v.tp)) {
			find_ours(&v, v.policy_id, false);
			v.since = was_listeners_turned_off(&v) << KEEPALIVE;
		}
		find_former(&v, false);
	}
	set_options(ctx, &v);
	__sync_fetch_and_add(v.direction ? &v.counters->established : &v.counters->listening, 1);
	if (is_heard_of(v.policy))
		kabpf_tell_new(ctx, v.outcomes, v.policy_id);
	return 1;
}

/* What an open socket lacks of its policy; `to` is what bpf_setsockopt() takes for it. The caller
 * has its lock. */
static __always_inline void retrofit(void *ctx, void *to, struct visit *v, struct sock_common *skc)
{
	__u8 state = v->tp->inet_conn.icsk_inet.sk.__sk_common.skc_state;

	/* SOCK_DEAD: no process has it any more, and the kernel ends it by itself. In SYN_SENT it
	 * waits for what it gets when it is established, as without a visit. */
	if (has_flag(v->tp, bpf_core_enum_value(enum sock_flags, SOCK_DEAD)) ||
	    state == BPF_TCP_SYN_SENT || !v->cgroup || !v->cgroup->owed)
		return;
	if (state != BPF_TCP_LISTEN)
		v->direction = direction_of((void *)skc);
	if (!begin_visit(v, skc))
		return;
	find_former(v, true);
	/* Of a listener the kernel keeps no more than that it was given numbers for keepalive. */
	if (v->policy->mode == KABPF_FILL &&
	    (v->direction ? was_alive(v->tp) : has_keepalive_number(v->tp)))
		v->since = kabpf_either(v->since, 1 << KEEPALIVE);
	set_options(to, v);
	if (v->changed)
		__sync_fetch_and_add(&v->counters->updated, 1);
	if (kabpf_either(v->outcomes, v->outcomes >> 32) && is_heard_of(v->policy))
		tell_open(ctx, v);
}

/* Since Linux kernel commit 3cee6fb8e69e ("bpf: tcp: Support bpf_(get|set)sockopt in bpf tcp iter")
 * (in v5.15) the iterator may set options; since 04c7820b776f, same version, it holds the socket's
 * lock. Time-wait and request sockets come too; for them bpf_skc_to_tcp_sock() gives NULL. */
SEC("iter/tcp")
int kabpf_retrofit(struct bpf_iter__tcp *ctx)
{
	struct sock_common *skc = ctx->sk_common;
	struct visit v = {};

	if (!skc)
		return 0;
	v.tp = bpf_skc_to_tcp_sock(skc);
	if (!v.tp)
		return 0;
	v.cgroup = cgroup_of(v.tp);
	retrofit(ctx, v.tp, &v, skc);
	return 0;
}

/*
 * The same for one socket, where the iterator would wait for others': user space makes a call with
 * an option of our own, KABPF_LEVEL, on a copy of a descriptor (pidfd_getfd(2)). Linked only for
 * that time. Others may make the call as well, for sockets that they have: they get what they would
 * get anyway.
 *
 * Since Linux kernel commit 2c531639deb5 ("bpf: Add support for {set|get} socket options from
 * setsockopt BPF") (in v5.15) such a program may set options, with the socket's lock. It can't read
 * the kernel's struct, so it measures a copy.
 */
SEC("cgroup/setsockopt")
int kabpf_retrofit_one(struct bpf_sockopt *ctx)
{
	struct visit v = {};
	struct sock *sk;
	__u64 id;

	if (ctx->optlen < 0) /* another program's decision */
		return 1;
	length_of_copy(ctx, is_ours(ctx->level, ctx->optname));
	if (ctx->level != KABPF_LEVEL || !ctx->sk || !is_tcp(ctx->sk) ||
	    ctx->sk->protocol != IPPROTO_TCP)
		return 1;
	v.tp = bpf_sk_storage_get(&kabpf_copies, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!v.tp)
		return 1; /* the kernel refuses the call, and user space knows of it */
	sk = sock_of(ctx);
	if (!bpf_probe_read_kernel(v.tp, bpf_core_type_size(struct tcp_sock), sk)) {
		id = BPF_CORE_READ(sk, sk_cgrp_data.cgroup, kn, id);
		v.cgroup = bpf_map_lookup_elem(&kabpf_cgroups, &id);
		retrofit(ctx, ctx->sk, &v, (void *)sk);
		/* What nobody has accepted yet has no descriptor, and waits. */
		if (!v.tp->inet_conn.icsk_inet.sk.sk_ack_backlog)
			ctx->optlen = -1;
	}
	bpf_sk_storage_delete(&kabpf_copies, ctx->sk);
	return 1;
}

/* Linked only while a policy enforces its options, gives a range, or logs its sockets. Returns 1: 0
 * would be EPERM. */
SEC("cgroup/setsockopt")
int kabpf_setsockopt(struct bpf_sockopt *ctx)
{
	int *value = ctx->optval, asked;
	struct kabpf_range *range;
	struct visit v = {};

	if (!is_for_policy(ctx) || !ctx->sk || (void *)(value + 1) > ctx->optval_end)
		return 1;
	asked = *value;
	if (!find_policy_of_call(ctx, &v))
		return 1;
	if (undoes(ctx, &v, asked)) {
		tell_turned_off(ctx, &v, asked);
		return 1;
	}
	if (ctx->level == SOL_SOCKET) {
		if (!asked == !v.options->keepalive || v.policy->mode != KABPF_ENFORCE)
			return 1;
		goto ignore;
	}
	range = range_of(v.options, ctx->optname);
	if (!range || !range->high || !is_valid(ctx->optname, asked))
		return 1;
	if (range->low < range->high) {
		__u32 clamped = asked;

		if (!clamped || clamped > range->high)
			clamped = range->high;
		else if (clamped < range->low)
			clamped = range->low;
		if (clamped != asked) {
			*value = clamped;
			ctx->optlen = sizeof(*value);
			if (is_heard_of(v.policy))
				kabpf_tell_set(ctx, asked, v.policy_id, v.direction, KABPF_CLAMPED);
			__sync_fetch_and_add(&v.counters->clamped, 1);
		}
		return 1;
	}
	if (v.policy->mode != KABPF_ENFORCE)
		return 1;
ignore:
	ctx->optlen = -1;
	if (is_heard_of(v.policy))
		kabpf_tell_set(ctx, asked, v.policy_id, v.direction, KABPF_IGNORED);
	__sync_fetch_and_add(&v.counters->ignored, 1);
	return 1;
}

/*
 * Changes nothing. Monitors have it linked as long as one of them asks who turns keepalive off, and
 * share the link, so that a call is seen once. Where kabpf_setsockopt is linked that tells of it;
 * while user space is linking that, for some microseconds, both may.
 */
SEC("cgroup/setsockopt")
int kabpf_observe(struct bpf_sockopt *ctx)
{
	int *value = ctx->optval, asked;
	struct visit v = {};

	if (is_setsockopt_linked() || !is_for_policy(ctx) || !ctx->sk ||
	    (void *)(value + 1) > ctx->optval_end)
		return 1;
	asked = *value;
	if (find_policy_of_call(ctx, &v) && undoes(ctx, &v, asked))
		tell_turned_off(ctx, &v, asked);
	return 1;
}

/* Runs inside the mkdir, before the directory can be seen. */
SEC("tp_btf/cgroup_mkdir")
int BPF_PROG(kabpf_cgroup_mkdir, struct cgroup *cgrp)
{
	struct kabpf_cgroup child = {}, *parent;
	struct kabpf_event event = {};
	struct kabpf_birth birth = {};
	__u64 id, parent_id;
	bool known;

	if (!in_cgroup2(cgrp))
		return 0;
	id = cgrp->kn->id;
	parent_id = cgrp->self.parent->cgroup->kn->id;
	/* Seen from a cgroup namespace, a parent that is not in the map is outside. */
	parent = bpf_map_lookup_elem(&kabpf_cgroups, &parent_id);
	if (!parent)
		return 0;
	bpf_probe_read_kernel_str(event.name, sizeof(event.name), cgrp->kn->name);
	known = find_birth(&birth, event.name, parent->state);
	child.contained = parent->contained;
	if (child.contained && birth.strength < KABPF_PATHS)
		birth.policy_id = birth.ask = 0;
	child.policy_id = birth.policy_id ? birth.policy_id : parent->policy_id;
	if (known && parent->state != KABPF_STATE_UNKNOWN)
		child.state = birth.state;
	if (bpf_map_update_elem(&kabpf_cgroups, &id, &child, BPF_ANY)) {
		kabpf_forget_removed();
		if (bpf_map_update_elem(&kabpf_cgroups, &id, &child, BPF_ANY))
			count_total(false);
	}
	if (child.state == KABPF_STATE_UNKNOWN || birth.ask)
		ask(id, parent_id, cgrp);
	if (is_heard())
		tell_birth(ctx, &event, cgrp, child.policy_id);
	return 0;
}

/* Sockets may outlive their cgroup, with whoever has them by then: it keeps its policy, and user
 * space has to know which one it would have. */
SEC("tp_btf/cgroup_rmdir")
int BPF_PROG(kabpf_cgroup_rmdir, struct cgroup *cgrp)
{
	struct kabpf_removed removed = {};
	__u64 id;

	if (!in_cgroup2(cgrp))
		return 0;
	id = cgrp->kn->id;
	if (!bpf_map_lookup_elem(&kabpf_cgroups, &id))
		return 0;
	removed.parent_id = cgrp->self.parent->cgroup->kn->id;
	bpf_probe_read_kernel_str(removed.name, sizeof(removed.name), cgrp->kn->name);
	if (!bpf_map_update_elem(&kabpf_removed, &id, &removed, BPF_ANY))
		return 0;
	kabpf_forget_removed();
	if (bpf_map_update_elem(&kabpf_removed, &id, &removed, BPF_ANY))
		bpf_map_delete_elem(&kabpf_cgroups, &id);
	return 0;
}

/* Comes when nothing refers to the cgroup any more, no socket, process or cached page: soon after
 * the rmdir, mostly (css_release_work_fn() in kernel/cgroup/cgroup.c). */
SEC("tp_btf/cgroup_release")
int BPF_PROG(kabpf_cgroup_release, struct cgroup *cgrp)
{
	__u64 id;

	if (!in_cgroup2(cgrp))
		return 0;
	id = cgrp->kn->id;
	bpf_map_delete_elem(&kabpf_cgroups, &id);
	bpf_map_delete_elem(&kabpf_removed, &id);
	return 0;
}

/*
 * Since Linux kernel commit e6a3e4434000 ("net: sock: add trace for socket errors") (in v5.14)
 * there is a tracepoint for errors alone, of which a connection that ends well has none; that for
 * changes of state is passed nine times by a connection over loopback.
 */
SEC("tp_btf/inet_sk_error_report")
int BPF_PROG(kabpf_connection_failed, struct sock *sk)
{
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);
	struct visit v = { .tp = tp };
	__u32 reason;

	if (!tp)
		return 0;
	reason = reason_of(tp);
	if (!reason)
		return 0;
	v.cgroup = cgroup_of(tp);
	if (!v.cgroup)
		return 0;
	v.policy_id = v.cgroup->policy_id;
	v.counters = bpf_map_lookup_elem(&kabpf_counters, &v.policy_id);
	if (!v.policy_id || !v.counters || is_told(sk, tp))
		return 0;
	if (reason == KABPF_KEEPALIVE || reason == KABPF_USER_TIMEOUT)
		__sync_fetch_and_add(&v.counters->timed_out, 1);
	if (reason == KABPF_KEEPALIVE)
		__sync_fetch_and_add(&v.counters->timed_out_by_keepalive, 1);
	if (is_heard())
		tell_failed(ctx, &v, reason);
	return 0;
}

/* Writes a kabpf_socket for each socket, except for time-wait and request sockets, which have no
 * options. */
SEC("iter/tcp")
int kabpf_list(struct bpf_iter__tcp *ctx)
{
	struct sock_common *skc = ctx->sk_common;

	if (skc)
		list_socket(ctx->meta->seq, bpf_skc_to_tcp_sock(skc));
	return 0;
}

/* The same for the sockets that processes have open, without a lock: where kabpf_list would wait
 * for one. A socket that several processes have comes several times. */
SEC("iter/task_file")
int kabpf_open_list(struct bpf_iter__task_file *ctx)
{
	struct sock *sk = socket_of(ctx);

	if (sk && sk->sk_protocol == IPPROTO_TCP)
		list_socket(ctx->meta->seq, bpf_skc_to_tcp_sock(sk));
	return 0;
}

/* Each descriptor that is held, and one of those that follow each other in one cgroup and one
 * network namespace. */
SEC("iter/task_file")
int kabpf_holders(struct bpf_iter__task_file *ctx)
{
	struct kabpf_holder h = {};

	if (find_holder(&h, ctx) &&
	    (h.flags & KABPF_HELD || !was_just_told(&h, ctx->meta->session_id)))
		tell_holder(&h, ctx);
	return 0;
}

/* Each descriptor of a socket that waits for kabpf_retrofit. */
SEC("iter/task_file")
int kabpf_owed(struct bpf_iter__task_file *ctx)
{
	struct kabpf_holder h = {};

	if (find_holder(&h, ctx) && h.flags & KABPF_OWED)
		tell_holder(&h, ctx);
	return 0;
}

char _license[] SEC("license") = "Dual MIT/GPL";
