// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * kabpf's data plane: sets keepalive options on the TCP sockets of cgroups that a policy covers.
 *
 * Which policy a cgroup has is decided when the cgroup is made (kabpf_birth), so that a connection
 * costs one look-up (kabpf_sockops). Sockets that were open before are visited once
 * (kabpf_retrofit). An option that the application set itself stays as it is.
 *
 * No program here fails a connection or changes what another program decided: kabpf_sockops always
 * returns 1, leaves `reply` alone and asks for no callbacks, and what can't be set is only counted.
 */
#include <linux/bpf.h>
#include <linux/tcp.h>
#include <stdbool.h>
#include <asm/socket.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "kabpf.h"

#ifndef SOL_TCP
#define SOL_TCP 6
#endif

/*
 * The few kernel structures that are read; the loader finds the members' real offsets through BTF.
 */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct kernfs_node {
	const char *name;
	__u64 id;
};

struct cgroup_subsys_state {
	struct cgroup *cgroup;
	struct cgroup_subsys_state *parent;
};

struct cgroup_root {
	int hierarchy_id;
};

struct cgroup {
	struct cgroup_subsys_state self;
	struct kernfs_node *kn;
	struct cgroup_root *root;
};

struct sock_cgroup_data {
	/* Since Linux kernel commit 8520e224f547 ("bpf, cgroups: Fix cgroup v2 fallback on v1/v2
	 * mixed mode") (in v5.15) always the cgroup2 cgroup; before, a tagged word. */
	struct cgroup *cgroup;
};

struct sock_common {
	unsigned long skc_flags;
};

struct sock {
	struct sock_common __sk_common;
	struct sock_cgroup_data sk_cgrp_data;
};

struct inet_sock {
	struct sock sk;
};

struct inet_connection_sock {
	struct inet_sock icsk_inet;
	__u32 icsk_user_timeout; /* ms */
};

struct tcp_sock {
	struct inet_connection_sock inet_conn;
	unsigned int keepalive_time; /* jiffies */
	unsigned int keepalive_intvl; /* jiffies */
	__u8 keepalive_probes;
};

struct bpf_iter__tcp {
	struct sock_common *sk_common;
};

#pragma clang attribute pop

/* The loader puts the running kernel's values. */
enum sock_flags {
	SOCK_DEAD = 0,
	SOCK_KEEPOPEN = 3,
};

/* Jiffies in a second; user space sets it before it loads the programs. */
const volatile __u32 kabpf_hz = 250;

/* Policies by id. An array, because its look-up is inlined. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, KABPF_POLICIES);
	__type(key, __u32);
	__type(value, struct kabpf_policy);
} kabpf_policies SEC(".maps");

/* By policy id. Apart from the policies, whose cache lines are only read. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, KABPF_POLICIES);
	__type(key, __u32);
	__type(value, struct kabpf_counters);
} kabpf_counters SEC(".maps");

/* Every cgroup of the tree by its id. Not preallocated: most machines have a few hundred. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, KABPF_CGROUPS);
	__type(key, __u64);
	__type(value, struct kabpf_cgroup);
} kabpf_cgroups SEC(".maps");

/* The selectors as an automaton: from a parent's state, by the child's name, to the child's. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, KABPF_BIRTHS);
	__type(key, struct kabpf_step);
	__type(value, struct kabpf_birth);
} kabpf_births SEC(".maps");

/* How often which errno came, by policy. Empty on a healthy machine. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1024);
	__type(key, struct kabpf_failure);
	__type(value, __u64);
} kabpf_failures SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct kabpf_totals);
} kabpf_totals SEC(".maps");

/* Births that user space has to resolve. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, KABPF_EVENTS);
} kabpf_events SEC(".maps");

/* One socket on its way through a program, and the policy it is measured by. */
struct visit {
	struct tcp_sock *tp;
	struct kabpf_policy *policy;
	struct kabpf_policy *was; /* NULL: whatever is set, the application set it */
	struct kabpf_counters *counters;
	__u32 policy_id;
	__u32 changed;
};

static __always_inline void count_failure(struct visit *v, int error)
{
	struct kabpf_failure key = { .policy_id = v->policy_id, .error = -error };
	__u64 *count, one = 1;

	__sync_fetch_and_add(&v->counters->failed, 1);
	count = bpf_map_lookup_elem(&kabpf_failures, &key);
	if (count)
		__sync_fetch_and_add(count, 1);
	else
		bpf_map_update_elem(&kabpf_failures, &key, &one, BPF_NOEXIST);
}

static __always_inline void set_option(void *to, struct visit *v, int level, int name, int value)
{
	int error = bpf_setsockopt(to, level, name, &value, sizeof(value));

	if (error)
		count_failure(v, error);
	else
		v->changed = 1;
}

/* Sets one number unless the application did: `now` is what the socket has, 0 for unset, `ours`
 * what it would have from an earlier policy, `wanted` what it would have from this one. */
static __always_inline void fill(void *to, struct visit *v, int name, __u32 value, __u32 now,
				 __u32 ours, __u32 wanted)
{
	if (!value || now == wanted)
		return;
	if (now && now != ours)
		__sync_fetch_and_add(&v->counters->left, 1);
	else
		set_option(to, v, SOL_TCP, name, value);
}

static __always_inline bool has_flag(struct tcp_sock *tp, __u32 flag)
{
	return tp->inet_conn.icsk_inet.sk.__sk_common.skc_flags >> flag & 1;
}

static __always_inline void fill_options(void *to, struct visit *v)
{
	struct kabpf_policy *p = v->policy, *was = v->was;
	struct tcp_sock *tp = v->tp;

	if (!p->keepalive)
		return;
	fill(to, v, TCP_KEEPIDLE, p->idle_s, tp->keepalive_time, was ? was->idle_s * kabpf_hz : 0,
	     p->idle_s * kabpf_hz);
	fill(to, v, TCP_KEEPINTVL, p->interval_s, tp->keepalive_intvl,
	     was ? was->interval_s * kabpf_hz : 0, p->interval_s * kabpf_hz);
	fill(to, v, TCP_KEEPCNT, p->probes, tp->keepalive_probes, was ? was->probes : 0, p->probes);
	fill(to, v, TCP_USER_TIMEOUT, p->user_timeout_ms, tp->inet_conn.icsk_user_timeout,
	     was ? was->user_timeout_ms : 0, p->user_timeout_ms);
	/* Last, because it arms the timer; the other way round would arm it twice. */
	if (!has_flag(tp, bpf_core_enum_value(enum sock_flags, SOCK_KEEPOPEN)))
		set_option(to, v, SOL_SOCKET, SO_KEEPALIVE, 1);
}

static __always_inline struct kabpf_cgroup *cgroup_of(struct tcp_sock *tp)
{
	__u64 id = tp->inet_conn.icsk_inet.sk.sk_cgrp_data.cgroup->kn->id;

	return bpf_map_lookup_elem(&kabpf_cgroups, &id);
}

/* False where no policy concerns the socket. */
static __always_inline bool begin_visit(struct visit *v, struct tcp_sock *tp,
					struct kabpf_cgroup *cgroup)
{
	__u32 was_id = cgroup->was_id;

	v->tp = tp;
	v->policy_id = cgroup->policy_id;
	if (!v->policy_id)
		return false;
	v->policy = bpf_map_lookup_elem(&kabpf_policies, &v->policy_id);
	v->counters = bpf_map_lookup_elem(&kabpf_counters, &v->policy_id);
	if (was_id)
		v->was = bpf_map_lookup_elem(&kabpf_policies, &was_id);
	return v->policy && v->counters;
}

SEC("sockops")
int kabpf_sockops(struct bpf_sock_ops *ctx)
{
	bool listens = ctx->op == BPF_SOCK_OPS_TCP_LISTEN_CB;
	struct kabpf_cgroup *cgroup;
	struct visit v = {};
	struct tcp_sock *tp;

	if (!listens && ctx->op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB &&
	    ctx->op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		return 1;
	if (!ctx->sk)
		return 1;
	tp = bpf_skc_to_tcp_sock(ctx->sk);
	if (!tp)
		return 1;
	cgroup = cgroup_of(tp);
	if (!cgroup || !begin_visit(&v, tp, cgroup))
		return 1;
	fill_options(ctx, &v);
	__sync_fetch_and_add(listens ? &v.counters->listening : &v.counters->established, 1);
	return 1;
}

/* Since Linux kernel commit 3cee6fb8e69e ("bpf: tcp: Support bpf_(get|set)sockopt in bpf tcp iter")
 * (in v5.15) the iterator may set options; since 04c7820b776f, same version, it holds the socket's
 * lock. Time-wait and request sockets come too; for them bpf_skc_to_tcp_sock() gives NULL. */
SEC("iter/tcp")
int kabpf_retrofit(struct bpf_iter__tcp *ctx)
{
	struct sock_common *skc = ctx->sk_common;
	struct kabpf_cgroup *cgroup;
	struct visit v = {};
	struct tcp_sock *tp;

	if (!skc)
		return 0;
	tp = bpf_skc_to_tcp_sock(skc);
	/* A dead socket is one that no process has any more; the kernel ends it by itself. */
	if (!tp || has_flag(tp, bpf_core_enum_value(enum sock_flags, SOCK_DEAD)))
		return 0;
	cgroup = cgroup_of(tp);
	if (!cgroup || !cgroup->owed || !begin_visit(&v, tp, cgroup))
		return 0;
	fill_options(tp, &v);
	if (v.changed)
		__sync_fetch_and_add(&v.counters->retrofitted, 1);
	return 0;
}

/* In the order: this name here, this name anywhere, any name here. */
static __always_inline struct kabpf_birth *find_birth(struct kabpf_step *step, __u64 state)
{
	struct kabpf_birth *birth;

	step->state = state;
	birth = bpf_map_lookup_elem(&kabpf_births, step);
	if (birth)
		return birth;
	step->state = KABPF_STATE_ANYWHERE;
	birth = bpf_map_lookup_elem(&kabpf_births, step);
	if (birth)
		return birth;
	step->state = state;
	__builtin_memset(step->name, 0, sizeof(step->name));
	return bpf_map_lookup_elem(&kabpf_births, step);
}

static __always_inline void count_total(bool recorded)
{
	struct kabpf_totals *totals;
	__u32 zero = 0;

	totals = bpf_map_lookup_elem(&kabpf_totals, &zero);
	if (totals)
		__sync_fetch_and_add(recorded ? &totals->asked_in_vain : &totals->unrecorded, 1);
}

static __always_inline void ask(__u64 cgroup_id, __u64 parent_id, struct cgroup *cgrp)
{
	struct kabpf_event *event = bpf_ringbuf_reserve(&kabpf_events, sizeof(*event), 0);

	if (!event) {
		count_total(true);
		return;
	}
	event->cgroup_id = cgroup_id;
	event->parent_id = parent_id;
	bpf_probe_read_kernel_str(event->name, sizeof(event->name), cgrp->kn->name);
	bpf_ringbuf_submit(event, 0);
}

/* The cgroup2 tree is hierarchy 0, in the kernel as in /proc/PID/cgroup (cgroup-v2.rst); ids of the
 * version 1 trees may be equal to ids of this one. */
static __always_inline bool in_cgroup2(struct cgroup *cgrp)
{
	return cgrp->root->hierarchy_id == 0;
}

/* Runs inside the mkdir, before the directory can be seen. */
SEC("tp_btf/cgroup_mkdir")
int BPF_PROG(kabpf_birth, struct cgroup *cgrp)
{
	struct kabpf_cgroup child = {}, *parent;
	struct kabpf_step step = {};
	struct kabpf_birth *birth;
	__u64 id, parent_id;

	if (!in_cgroup2(cgrp))
		return 0;
	id = cgrp->kn->id;
	parent_id = cgrp->self.parent->cgroup->kn->id;
	/* Seen from a cgroup namespace, a parent that is not in the map is outside. */
	parent = bpf_map_lookup_elem(&kabpf_cgroups, &parent_id);
	if (!parent)
		return 0;
	child.policy_id = parent->policy_id;
	bpf_probe_read_kernel_str(step.name, sizeof(step.name), cgrp->kn->name);
	birth = find_birth(&step, parent->state);
	if (birth && birth->policy_id)
		child.policy_id = birth->policy_id;
	if (birth && parent->state != KABPF_STATE_UNKNOWN)
		child.state = birth->state;
	if (bpf_map_update_elem(&kabpf_cgroups, &id, &child, BPF_ANY))
		count_total(false);
	if (child.state == KABPF_STATE_UNKNOWN || birth->ask)
		ask(id, parent_id, cgrp);
	return 0;
}

SEC("tp_btf/cgroup_rmdir")
int BPF_PROG(kabpf_death, struct cgroup *cgrp)
{
	__u64 id;

	if (!in_cgroup2(cgrp))
		return 0;
	id = cgrp->kn->id;
	bpf_map_delete_elem(&kabpf_cgroups, &id);
	return 0;
}

char _license[] SEC("license") = "Dual MIT/GPL";
