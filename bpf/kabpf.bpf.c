// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * kabpf's data plane: sets keepalive options on the TCP sockets of cgroups that a policy covers.
 *
 * Which policy a cgroup has is decided when the cgroup is made (kabpf_birth), so that a connection
 * costs one look-up (kabpf_sockops). Sockets that were open before are visited once
 * (kabpf_retrofit). What applications ask for later is seen only while a policy needs it
 * (kabpf_setsockopt).
 *
 * No program here fails a connection or changes what another program decided: kabpf_sockops always
 * returns 1, leaves `reply` alone and asks for no callbacks, and what can't be set is only counted.
 */
#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/tcp.h>
#include <stdbool.h>
#include <asm/errno.h>
#include <asm/socket.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "kabpf.h"

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

struct ns_common {
	unsigned int inum;
};

struct netns_ipv4 {
	int sysctl_tcp_keepalive_time; /* jiffies */
	int sysctl_tcp_keepalive_intvl; /* jiffies */
	__u8 sysctl_tcp_keepalive_probes;
};

struct net {
	struct ns_common ns;
	struct netns_ipv4 ipv4;
};

typedef struct {
	struct net *net;
} possible_net_t;

struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	unsigned int skc_hash; /* of both addresses and ports, with a secret of this boot */
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	possible_net_t skc_net;
	struct in6_addr skc_v6_daddr; /* only with CONFIG_IPV6 */
	struct in6_addr skc_v6_rcv_saddr;
	unsigned long skc_flags;
	volatile unsigned char skc_state;
};

struct hlist_node {
	struct hlist_node **pprev;
};

struct timer_list {
	struct hlist_node entry;
	unsigned long expires; /* jiffies */
};

struct sock {
	struct sock_common __sk_common;
	struct timer_list sk_timer;
	struct sock_cgroup_data sk_cgrp_data;
	__u32 sk_max_ack_backlog; /* what listen() was given */
	int sk_err;
	int sk_err_soft; /* what ICMP said meanwhile */
	__u8 sk_userlocks : 4;
};

struct inet_sock {
	struct sock sk;
	__be16 inet_sport;
};

struct inet_bind_bucket {
	signed char fastreuse;
};

struct inet_connection_sock {
	struct inet_sock icsk_inet;
	struct inet_bind_bucket *icsk_bind_hash;
	__u8 icsk_syn_retries;
	__u8 icsk_retransmits;
	__u8 icsk_probes_out;
	struct timer_list icsk_keepalive_timer;
	struct {
		__u32 lrcvtime; /* jiffies */
	} icsk_ack;
	__u32 icsk_user_timeout; /* ms */
};

struct tcp_sock {
	struct inet_connection_sock inet_conn;
	__u32 rcv_tstamp; /* jiffies */
	__u32 snd_una;
	__u32 snd_nxt;
	__u32 write_seq;
	unsigned int keepalive_time; /* jiffies */
	unsigned int keepalive_intvl; /* jiffies */
	__u8 keepalive_probes;
};

struct task_struct {
	int tgid;
	char comm[16];
};

struct bpf_iter_meta {
	struct seq_file *seq;
};

struct bpf_iter__tcp {
	struct bpf_iter_meta *meta;
	struct sock_common *sk_common;
};

#pragma clang attribute pop

/* The loader puts the running kernel's values. */
enum sock_flags {
	SOCK_DEAD = 0,
	SOCK_KEEPOPEN = 3,
};

/* net/sock.h: the socket was bound to a port. */
#define SOCK_BINDPORT_LOCK 8

/* Jiffies in a second; user space sets it before it loads the programs. */
const volatile __u32 kabpf_hz = 250;

/* Processors that there may be; likewise. */
const volatile __u32 kabpf_cpus = 1;

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

/* The destinations of policies. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, KABPF_NETWORKS);
	__type(key, struct kabpf_network);
	__type(value, __u32);
} kabpf_networks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, KABPF_PORTS);
	__type(key, struct kabpf_port);
	__type(value, struct kabpf_options);
} kabpf_ports SEC(".maps");

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

/* Perf events of monitors, one for each processor; user space multiplies the entries by their
 * number. Each is there as long as a process has the map open by which it was put in
 * (perf_event_fd_array_release() in kernel/bpf/arraymap.c), so that a monitor which was killed
 * leaves nothing. */
struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__uint(max_entries, KABPF_MONITORS);
	__type(key, __u32);
	__type(value, __u32);
} kabpf_monitors SEC(".maps");

/* The logger's. To open perf events takes CAP_SYS_ADMIN on Debian's kernels, which kabpfd is
 * without. What one that was killed did not read waits here. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, KABPF_LOG_BYTES);
} kabpf_log SEC(".maps");

/* Who listens, a byte for each monitor: 1 if it was there when it was last told something; and then
 * how much each one lost. On a machine without a monitor, a look at the first is all that they cost
 * a connection. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1 + KABPF_MONITORS);
	__type(key, __u32);
	__type(value, __u64);
} kabpf_listening SEC(".maps");

/* Deaths that were told, so that none is told twice: the last byte that was acknowledged, as a
 * socket may be connected again. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u32);
} kabpf_dead SEC(".maps");

#define MAP(name) (&(name))

#include "options.h"

/* Whether anybody may listen. */
static __always_inline bool is_heard(void)
{
	__u32 zero = 0;
	__u64 *all = bpf_map_lookup_elem(&kabpf_listening, &zero);

	return all && *all;
}

/* Whether anybody may listen to what happens under a policy. */
static __always_inline bool is_heard_of(struct kabpf_policy *policy)
{
	__u32 zero = 0;
	__u64 *all = bpf_map_lookup_elem(&kabpf_listening, &zero), others;

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
	__u64 *lost = bpf_map_lookup_elem(&kabpf_listening, &place);

	if (lost)
		__sync_fetch_and_add(lost, 1);
}

/* To each monitor that listens; the log only if `log`. One that is not there any more is not told
 * again, nor one whose perf event is off, as its processor was away for a while; nobody waits for
 * one that does not read. */
static __always_inline void tell(void *ctx, void *data, __u64 size, bool log)
{
	__u32 zero = 0, cpu = bpf_get_smp_processor_id();
	__u8 *monitors = bpf_map_lookup_elem(&kabpf_listening, &zero);

	if (!monitors)
		return;
	if (log && monitors[KABPF_LOGGER] && bpf_ringbuf_output(&kabpf_log, data, size, 0))
		count_lost(KABPF_LOGGER);
	for (__u32 i = KABPF_LOGGER + 1; i < KABPF_MONITORS; i++) {
		long error;

		if (!monitors[i])
			continue;
		error =
		    bpf_perf_event_output(ctx, &kabpf_monitors, i * kabpf_cpus + cpu, data, size);
		if (error == -ENOENT || error == -EOPNOTSUPP)
			monitors[i] = 0;
		else if (error)
			count_lost(i);
	}
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

static __always_inline void put_socket(struct kabpf_report *r, struct sock *sk)
{
	struct sock_common *skc = &sk->__sk_common;

	r->time_ns = bpf_ktime_get_ns();
	r->cgroup_id = BPF_CORE_READ(sk, sk_cgrp_data.cgroup, kn, id);
	put_addresses(r->local, r->remote, skc);
	/* Of a dead one skc_num is 0. */
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
	r->idle_s = BPF_CORE_READ(tp, keepalive_time) / kabpf_hz;
	r->interval_s = BPF_CORE_READ(tp, keepalive_intvl) / kabpf_hz;
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
	tell(ctx, r, sizeof(*r), policy && policy->flags & KABPF_LOG);
}

static __always_inline bool has_flag(struct tcp_sock *tp, __u32 flag)
{
	return tp->inet_conn.icsk_inet.sk.__sk_common.skc_flags >> flag & 1;
}

static __always_inline bool keeps_alive(struct tcp_sock *tp)
{
	return has_flag(tp, bpf_core_enum_value(enum sock_flags, SOCK_KEEPOPEN));
}

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

/* What a policy with conditions gives a connection: NULL where it leaves it alone.
 * Not inlined, because a socket is measured by former policies, too. */
static __noinline struct kabpf_options *find_options(struct kabpf_policy *policy, __u32 policy_id,
						     struct sock_common *skc, __u32 direction)
{
	struct kabpf_network network = { .bits = 32 + 128, .policy_id = policy_id };
	struct kabpf_options *options = NULL;
	__u32 *number, port;
	bool local;

	if (!(policy->flags & direction))
		return NULL;
	local = read_peer(skc, network.address);
	if (local && !(policy->flags & KABPF_LOOPBACK))
		return NULL;
	if (!policy->destinations)
		return &policy->options;
	number = bpf_map_lookup_elem(&kabpf_networks, &network);
	if (number) {
		port = direction == KABPF_OUT ? bpf_ntohs(BPF_CORE_READ(skc, skc_dport))
					      : BPF_CORE_READ(skc, skc_num);
		options = row_of(*number, port);
	}
	return options ? options : &policy->options;
}

static __always_inline struct kabpf_options *
options_of(struct kabpf_policy *policy, __u32 policy_id, struct sock_common *skc, __u32 direction)
{
	struct kabpf_options *options = &policy->options;

	if (!direction)
		return policy->flags & KABPF_LISTENERS ? options : NULL;
	if (!(policy->flags & KABPF_PLAIN))
		options = find_options(policy, policy_id, skc, direction);
	return options && options->keepalive ? options : NULL;
}

/* A connection's direction is not kept by the kernel. An accepted socket shares the listener's
 * port, which was bound, without having bound it (sk_clone_lock() in net/core/sock.c clears the
 * lock), and has the listener's backlog; a port that connect() chose is marked by -1
 * (__inet_hash_connect()). A connection from a listener without any backlog counts as outgoing. */
static __always_inline __u32 direction_of(struct sock *sk)
{
	struct inet_connection_sock *icsk = (void *)sk;
	struct inet_bind_bucket *bucket = BPF_CORE_READ(icsk, icsk_bind_hash);

	if (!bucket || BPF_CORE_READ(bucket, fastreuse) < 0 ||
	    BPF_CORE_READ_BITFIELD_PROBED(sk, sk_userlocks) & SOCK_BINDPORT_LOCK)
		return KABPF_OUT;
	return BPF_CORE_READ(sk, sk_max_ack_backlog) ? KABPF_IN : KABPF_OUT;
}

/* Since Linux kernel commit 9544d60a2605 ("inet: change lport contribution to inet_ehashfn() and
 * inet6_ehashfn()") (in v6.15) the hashes of two connections to one peer differ by their ports
 * alone, in the lower bits; multiplied they differ in the upper ones, too. */
static __always_inline __u32 hash_of(struct tcp_sock *tp)
{
	return tp->inet_conn.icsk_inet.sk.__sk_common.skc_hash * 0x9e3779b1;
}

static __always_inline __u32 second(void)
{
	return kabpf_hz;
}

static __always_inline __u32 held(struct visit *v, enum option which)
{
	switch (which) {
	case IDLE:
		return v->tp->keepalive_time;
	case INTERVAL:
		return v->tp->keepalive_intvl;
	case PROBES:
		return v->tp->keepalive_probes;
	case USER_TIMEOUT:
		return v->tp->inet_conn.icsk_user_timeout;
	case KEEPALIVE:
		return keeps_alive(v->tp);
	case SYN_RETRIES:
		return v->tp->inet_conn.icsk_syn_retries;
	}
}

static __always_inline void note(struct visit *v, enum option which, __u64 outcome)
{
	v->outcomes |= outcome << which * KABPF_OUTCOME_BITS;
}

/* What was brought to a range's lower bound stays the application's. */
static __always_inline bool came_from(__u32 preferred, __u32 unit, __u32 now)
{
	return now && now == preferred * unit;
}

/* A global function is verified once, and its result is any number to those that call it, since
 * Linux kernel commit 51c39bb1d5d1 ("bpf: Introduce function-by-function verification") (in v5.6).
 * With the bits in sight, the verifier follows each combination of them through all that comes
 * later. */
__noinline int kabpf_either(int bits, int others)
{
	return bits | others;
}

/* Tells the values that a policy set, mostly a former one, from those the application chose. */
static __always_inline void find_ours(struct visit *v, __u32 was_id)
{
	struct tcp_sock *tp = v->tp;
	struct kabpf_policy *was = bpf_map_lookup_elem(&kabpf_policies, &was_id);
	struct kabpf_options *o;
	__u32 ours = 0;

	if (!was)
		return;
	o = options_of(was, was_id, (void *)tp, v->direction);
	if (!o)
		return;
	if (came_from(idle_of(o, tp), kabpf_hz, tp->keepalive_time))
		ours |= 1 << IDLE;
	if (came_from(o->interval_s.high, kabpf_hz, tp->keepalive_intvl))
		ours |= 1 << INTERVAL;
	if (came_from(o->probes.high, 1, tp->keepalive_probes))
		ours |= 1 << PROBES;
	if (came_from(o->user_timeout_ms.high, 1, tp->inet_conn.icsk_user_timeout))
		ours |= 1 << USER_TIMEOUT;
	v->ours = kabpf_either(v->ours, ours);
}

static __always_inline __u64 cgroup_id_of(struct tcp_sock *tp)
{
	return tp->inet_conn.icsk_inet.sk.sk_cgrp_data.cgroup->kn->id;
}

static __always_inline struct kabpf_cgroup *cgroup_of(struct tcp_sock *tp)
{
	__u64 id = cgroup_id_of(tp);

	return bpf_map_lookup_elem(&kabpf_cgroups, &id);
}

/* False where no policy concerns the socket. */
static __always_inline bool begin_visit(struct visit *v, struct sock_common *skc)
{
	v->policy_id = v->cgroup->policy_id;
	if (!v->policy_id)
		return false;
	if (!find_policy(v))
		return false;
	v->options = options_of(v->policy, v->policy_id, skc, v->direction);
	return v->options;
}

static __always_inline void find_former(struct visit *v)
{
	for (int i = 0; i < KABPF_FORMER; i++) {
		__u32 was_id = v->cgroup->was_id[i];

		if (!was_id)
			break;
		find_ours(v, was_id);
	}
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

SEC("sockops")
int kabpf_sockops(struct bpf_sock_ops *ctx)
{
	struct visit v = {};

	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		if (!syn_retries_wanted() && !is_heard())
			return 1;
		v.direction = KABPF_OUT;
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		v.direction = KABPF_OUT;
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		v.direction = KABPF_IN;
		break;
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
		break;
	default:
		return 1;
	}
	if (!ctx->sk)
		return 1;
	v.tp = bpf_skc_to_tcp_sock(ctx->sk);
	if (!v.tp)
		return 1;
	v.cgroup = cgroup_of(v.tp);
	if (!v.cgroup || !begin_visit(&v, (void *)v.tp))
		return 1;
	if (ctx->op == BPF_SOCK_OPS_TCP_CONNECT_CB) {
		set_syn_retries(ctx, &v);
		if (is_heard_of(v.policy))
			kabpf_tell_new(ctx, v.outcomes, v.policy_id);
		return 1;
	}
	/* What an accepted connection has already was its listener's, from this policy or a former
	 * one; else the application's. */
	if (v.direction == KABPF_IN) {
		if (v.policy->flags & KABPF_LISTENERS && !keeps_alive(v.tp))
			find_ours(&v, v.policy_id);
		find_former(&v);
	}
	set_options(ctx, &v);
	__sync_fetch_and_add(v.direction ? &v.counters->established : &v.counters->listening, 1);
	if (is_heard_of(v.policy))
		kabpf_tell_new(ctx, v.outcomes, v.policy_id);
	return 1;
}

static __always_inline void tell_open(void *ctx, struct visit *v)
{
	struct kabpf_report r = { .what = KABPF_OPEN, .outcomes = v->outcomes };

	put_socket(&r, (void *)v->tp);
	put_values(&r, v->tp);
	r.direction = v->direction;
	tell_report(ctx, &r, v->policy_id);
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
	/* A dead socket is one that no process has any more; the kernel ends it by itself. */
	if (!v.tp || has_flag(v.tp, bpf_core_enum_value(enum sock_flags, SOCK_DEAD)))
		return 0;
	v.cgroup = cgroup_of(v.tp);
	if (!v.cgroup || !v.cgroup->owed)
		return 0;
	if (skc->skc_state != BPF_TCP_LISTEN)
		v.direction = direction_of((void *)v.tp);
	if (!begin_visit(&v, skc))
		return 0;
	find_former(&v);
	set_options(v.tp, &v);
	if (v.changed)
		__sync_fetch_and_add(&v.counters->retrofitted, 1);
	if (kabpf_either(v.outcomes, v.outcomes >> 32) && is_heard_of(v.policy))
		tell_open(ctx, &v);
	return 0;
}

/* The kernel's struct sock behind the verifier's view of it, as a number: to be read by probes. */
static __always_inline struct sock *sock_of(struct bpf_sockopt *ctx)
{
	struct bpf_sock *seen = ctx->sk;
	struct sock *sk = NULL;

	bpf_probe_read_kernel(&sk, sizeof(sk), &seen);
	return sk;
}

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

/* A setsockopt(2) that was not obeyed as it was made. */
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

/* Linked only while a policy enforces its options, or gives a range. Returns 1: 0 would be EPERM.
 */
SEC("cgroup/setsockopt")
int kabpf_setsockopt(struct bpf_sockopt *ctx)
{
	int *value = ctx->optval, asked;
	struct kabpf_range *range;
	struct visit v = {};
	long length = ctx->optlen;
	struct sock *sk;
	__u64 id;

	if (length < 0) /* another program's decision */
		return 1;
	/* The kernel lends us one page. Where there is more it takes the value from our page, or
	 * answers EFAULT, unless it is told that nothing was changed. */
	if (length > (long)(ctx->optval_end - ctx->optval))
		ctx->optlen = 0;
	if (!is_ours(ctx->level, ctx->optname) || !ctx->sk || !is_tcp(ctx->sk) ||
	    !is_settled(ctx->sk))
		return 1;
	if (length < (long)sizeof(*value) || (void *)(value + 1) > ctx->optval_end)
		return 1; /* the kernel says what is wrong with it, here and below */
	asked = *value;
	sk = sock_of(ctx);
	id = BPF_CORE_READ(sk, sk_cgrp_data.cgroup, kn, id);
	v.cgroup = bpf_map_lookup_elem(&kabpf_cgroups, &id);
	if (!v.cgroup)
		return 1;
	if (ctx->sk->state != BPF_TCP_LISTEN)
		v.direction = direction_of(sk);
	if (!begin_visit(&v, (void *)sk))
		return 1;
	if (ctx->level == SOL_SOCKET) {
		if (asked || v.policy->mode != KABPF_ENFORCE)
			return 1;
		goto swallow;
	}
	range = range_of(v.options, ctx->optname);
	if (!range || !range->high || !is_valid(ctx->optname, asked))
		return 1;
	if (range->low < range->high) {
		__u32 limited = asked;

		if (!limited || limited > range->high)
			limited = range->high;
		else if (limited < range->low)
			limited = range->low;
		if (limited != asked) {
			*value = limited;
			ctx->optlen = sizeof(*value);
			if (is_heard_of(v.policy))
				kabpf_tell_set(ctx, asked, v.policy_id, v.direction, KABPF_LIMITED);
			__sync_fetch_and_add(&v.counters->limited, 1);
		}
		return 1;
	}
	if (v.policy->mode != KABPF_ENFORCE)
		return 1;
swallow:
	ctx->optlen = -1;
	if (is_heard_of(v.policy))
		kabpf_tell_set(ctx, asked, v.policy_id, v.direction, KABPF_SWALLOWED);
	__sync_fetch_and_add(&v.counters->swallowed, 1);
	return 1;
}

/* This name here; or else this name anywhere and any name here together, of which the stronger
 * selector gives the policy. False where nothing is known of such a child. */
static __always_inline bool find_birth(struct kabpf_birth *birth, struct kabpf_step *step,
				       __u64 state)
{
	struct kabpf_birth *found, *rest;

	step->state = state;
	found = bpf_map_lookup_elem(&kabpf_births, step);
	if (found) {
		*birth = *found;
		return true;
	}
	step->state = KABPF_STATE_ANYWHERE;
	found = bpf_map_lookup_elem(&kabpf_births, step);
	step->state = state;
	__builtin_memset(step->name, 0, sizeof(step->name));
	rest = bpf_map_lookup_elem(&kabpf_births, step);
	if (!found)
		found = rest;
	if (!found)
		return false;
	*birth = *found;
	if (!rest)
		return true;
	if (birth->state == KABPF_STATE_ANYWHERE)
		birth->state = rest->state;
	if (rest->strength > birth->strength)
		birth->policy_id = rest->policy_id;
	return true;
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
	event->time_ns = bpf_ktime_get_ns();
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

/* So that a monitor knows the path of a cgroup that is gone by the time it reads of its sockets. */
static __always_inline void tell_birth(void *ctx, struct kabpf_event *event, struct cgroup *cgrp)
{
	event->time_ns = bpf_ktime_get_ns();
	event->cgroup_id = cgrp->kn->id;
	event->parent_id = cgrp->self.parent->cgroup->kn->id;
	bpf_probe_read_kernel_str(event->name, sizeof(event->name), cgrp->kn->name);
	tell(ctx, event, sizeof(*event), true);
}

/* Runs inside the mkdir, before the directory can be seen. */
SEC("tp_btf/cgroup_mkdir")
int BPF_PROG(kabpf_birth, struct cgroup *cgrp)
{
	struct kabpf_cgroup child = {}, *parent;
	struct kabpf_event event = {};
	/* The stack has no room for both. */
	struct kabpf_step *step = (void *)&event.parent_id;
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
	bpf_probe_read_kernel_str(step->name, sizeof(step->name), cgrp->kn->name);
	known = find_birth(&birth, step, parent->state);
	child.policy_id = birth.policy_id ? birth.policy_id : parent->policy_id;
	if (known && parent->state != KABPF_STATE_UNKNOWN)
		child.state = birth.state;
	if (bpf_map_update_elem(&kabpf_cgroups, &id, &child, BPF_ANY))
		count_total(false);
	if (child.state == KABPF_STATE_UNKNOWN || birth.ask)
		ask(id, parent_id, cgrp);
	if (is_heard())
		tell_birth(ctx, &event, cgrp);
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

static __always_inline __u32 silent_jiffies(struct tcp_sock *tp)
{
	__u32 now = bpf_jiffies64(), data = now - tp->inet_conn.icsk_ack.lrcvtime;
	__u32 any = now - tp->rcv_tstamp;

	return data < any ? data : any;
}

/*
 * Why the kernel gave up a connection that a process still holds; 0 where another error is told, or
 * none. tcp_write_err() in net/ipv4/tcp_timer.c gives the error, for every timer: ETIMEDOUT, or
 * what ICMP had said. A connection that was never established has received nothing.
 *
 * The keepalive timer waits as long as anything is to be sent or acknowledged, the retransmission
 * timer acts while something is unacknowledged, and the third while the peer's window is closed.
 */
static __always_inline __u32 death_of(struct tcp_sock *tp)
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
	__u32 last = tp->snd_una, *told = bpf_sk_storage_get(&kabpf_dead, sk, NULL, 0);

	if (!told)
		bpf_sk_storage_get(&kabpf_dead, sk, &last, BPF_SK_STORAGE_GET_F_CREATE);
	else if (*told == last)
		return true;
	else
		*told = last;
	return false;
}

static __always_inline void tell_death(void *ctx, struct visit *v, __u32 reason)
{
	struct kabpf_report r = { .what = KABPF_DIED, .reason = reason };
	struct inet_connection_sock *icsk = &v->tp->inet_conn;

	put_socket(&r, (void *)v->tp);
	put_values(&r, v->tp);
	/* Its port is given up; see direction_of(). */
	r.direction = icsk->icsk_inet.sk.sk_max_ack_backlog ? KABPF_IN : KABPF_OUT;
	r.error = icsk->icsk_inet.sk.sk_err;
	r.silent_ms = (__u64)silent_jiffies(v->tp) * 1000 / kabpf_hz;
	r.sent = icsk->icsk_retransmits ?: icsk->icsk_probes_out;
	tell_report(ctx, &r, v->policy_id);
}

/*
 * Since Linux kernel commit e6a3e4434000 ("net: sock: add trace for socket errors") (in v5.14)
 * there is a tracepoint for errors alone, of which a connection that ends well has none; that for
 * changes of state is passed nine times by a connection over loopback.
 */
SEC("tp_btf/inet_sk_error_report")
int BPF_PROG(kabpf_closed, struct sock *sk)
{
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);
	struct visit v = { .tp = tp };
	__u32 reason;

	if (!tp)
		return 0;
	reason = death_of(tp);
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
		__sync_fetch_and_add(&v.counters->died, 1);
	if (is_heard())
		tell_death(ctx, &v, reason);
	return 0;
}

/* Whether the policy turns keepalive on and leaves the rest to the system. */
static __always_inline bool gives_no_number(struct visit *v)
{
	struct kabpf_options *o;

	if (!begin_visit(v, (void *)v->tp))
		return false;
	o = v->options;
	return !o->idle_s.high && !o->interval_s.high && !o->probes.high &&
	       !o->user_timeout_ms.high;
}

/* A value that is the policy's, or a former one's, is taken for theirs. */
static __always_inline __u8 who_set(bool is_set, __u32 policys, __u32 formers)
{
	if (!is_set)
		return KABPF_BY_SYSTEM;
	if (policys)
		return KABPF_BY_POLICY;
	return formers ? KABPF_BY_FORMER : KABPF_BY_APPLICATION;
}

static __always_inline void put_setters(struct kabpf_socket *s, struct tcp_sock *tp,
					struct kabpf_cgroup *cgroup)
{
	struct visit v = { .tp = tp };
	__u32 policys = 0, formers;

	if (s->state != BPF_TCP_LISTEN)
		v.direction = direction_of((void *)tp);
	if (cgroup) {
		v.cgroup = cgroup;
		find_ours(&v, cgroup->policy_id);
		policys = v.ours;
		find_former(&v);
	}
	formers = v.ours;
	s->by[IDLE] = who_set(tp->keepalive_time, policys & 1 << IDLE, formers & 1 << IDLE);
	s->by[INTERVAL] =
	    who_set(tp->keepalive_intvl, policys & 1 << INTERVAL, formers & 1 << INTERVAL);
	s->by[PROBES] = who_set(tp->keepalive_probes, policys & 1 << PROBES, formers & 1 << PROBES);
	s->by[USER_TIMEOUT] = who_set(tp->inet_conn.icsk_user_timeout, policys & 1 << USER_TIMEOUT,
				      formers & 1 << USER_TIMEOUT);
	/* Values of ours without keepalive: the application turned it off. */
	if (s->keepalive)
		s->by[KEEPALIVE] =
		    who_set(true, policys || (cgroup && gives_no_number(&v)), formers);
	else
		s->by[KEEPALIVE] = who_set(formers, false, false);
}

static __always_inline struct timer_list *keepalive_timer(struct tcp_sock *tp)
{
	/* Since Linux kernel commit 08dfe370239e ("tcp: introduce icsk->icsk_keepalive_timer") (in
	 * v6.19 and in stable releases) sk_timer is another timer. */
	if (bpf_core_field_exists(tp->inet_conn.icsk_keepalive_timer))
		return &tp->inet_conn.icsk_keepalive_timer;
	return &tp->inet_conn.icsk_inet.sk.sk_timer;
}

/* Whether the timer's end is a probe: before a connection is established and after its last close
 * it is not (tcp_keepalive_timer() in net/ipv4/tcp_timer.c). */
static __always_inline bool probes(struct kabpf_socket *s, struct tcp_sock *tp)
{
	if (!s->keepalive || s->state == BPF_TCP_SYN_SENT || !keepalive_timer(tp)->entry.pprev)
		return false;
	return s->state != BPF_TCP_FIN_WAIT2 ||
	       !has_flag(tp, bpf_core_enum_value(enum sock_flags, SOCK_DEAD));
}

/* When the timer ends, a probe goes out if the last receipt is `idle` jiffies ago (same function);
 * if not, the timer is set to when it will be. */
static __always_inline __u32 next_probe_ms(struct kabpf_socket *s, struct tcp_sock *tp, __u32 idle)
{
	__s32 timer, left = idle - silent_jiffies(tp);

	if (!probes(s, tp))
		return KABPF_NEVER;
	timer = (__u32)keepalive_timer(tp)->expires - (__u32)bpf_jiffies64();
	if (left < timer)
		left = timer;
	return left > 0 ? (__u64)left * 1000 / kabpf_hz : 0;
}

static __always_inline void put_options(struct kabpf_socket *s, struct tcp_sock *tp,
					struct net *net)
{
	__u32 idle = tp->keepalive_time ?: net->ipv4.sysctl_tcp_keepalive_time;
	__u32 interval = tp->keepalive_intvl ?: net->ipv4.sysctl_tcp_keepalive_intvl;

	s->keepalive = keeps_alive(tp);
	s->idle_s = idle / kabpf_hz;
	s->interval_s = interval / kabpf_hz;
	s->probes = tp->keepalive_probes ?: net->ipv4.sysctl_tcp_keepalive_probes;
	s->user_timeout_ms = tp->inet_conn.icsk_user_timeout;
	s->next_probe_ms = next_probe_ms(s, tp, idle);
}

/* Writes a kabpf_socket for each socket, except for time-wait and request sockets, which have no
 * options. */
SEC("iter/tcp")
int kabpf_list(struct bpf_iter__tcp *ctx)
{
	struct sock_common *skc = ctx->sk_common;
	struct kabpf_socket s = {};
	struct kabpf_cgroup *cgroup;
	struct tcp_sock *tp;

	if (!skc)
		return 0;
	tp = bpf_skc_to_tcp_sock(skc);
	if (!tp)
		return 0;
	s.cgroup_id = cgroup_id_of(tp);
	cgroup = bpf_map_lookup_elem(&kabpf_cgroups, &s.cgroup_id);
	if (cgroup)
		s.policy_id = cgroup->policy_id;
	s.namespace = skc->skc_net.net->ns.inum;
	s.state = skc->skc_state;
	s.family = skc->skc_family;
	s.local_port = skc->skc_num;
	s.remote_port = bpf_ntohs(skc->skc_dport);
	put_addresses(s.local, s.remote, skc);
	put_options(&s, tp, skc->skc_net.net);
	put_setters(&s, tp, cgroup);
	bpf_seq_write(ctx->meta->seq, &s, sizeof(s));
	return 0;
}

char _license[] SEC("license") = "Dual MIT/GPL";
