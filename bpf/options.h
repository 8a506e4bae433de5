/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/*
 * What each data plane does with a socket: measures what it has by a policy, and sets the rest.
 *
 * How to find out what it has is each one's own affair: whoever includes this has the maps, defines
 * MAP(name), what the helpers take for one, and the functions that are only declared here.
 */
#ifndef OPTIONS_H
#define OPTIONS_H

#ifndef SOL_TCP
#define SOL_TCP 6
#endif

#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif

/* linux/socket.h and asm/socket.h keep these to themselves. */
#define AF_INET 2
#define AF_INET6 10
#define SOCK_STREAM 1

/* net/tcp.h; MAX_TCP_KEEPINTVL is the first of them, too. */
#define MAX_TCP_KEEPIDLE 32767
#define MAX_TCP_KEEPCNT 127

/* Bits of visit.ours, and places in kabpf_socket.by and in visit.outcomes. */
enum option {
	IDLE,
	INTERVAL,
	PROBES,
	USER_TIMEOUT,
	KEEPALIVE,
	SYN_RETRIES
};

/* One socket on its way through a program, and the policy it is measured by. */
struct visit {
	struct tcp_sock *tp; /* where the program can read the kernel's structures */
	struct known *known; /* where it can't */
	struct kabpf_cgroup *cgroup;
	struct kabpf_policy *policy;
	struct kabpf_options *options;
	struct kabpf_counters *counters;
	__u32 policy_id;
	__u32 direction; /* KABPF_OUT or KABPF_IN; 0: a listener */
	__u32 ours; /* bits of the options whose values came from a former policy */
	__u32 since; /* of those not ours that it set when a former policy had had its turn */
	__u32 changed;
	__u32 has_kept; /* an option as the application had set it */
	__u64 outcomes; /* as in kabpf.h, where the program notes them */
};

/* What the socket has of an option, in units of `second`, ms, or their number; 0 for unset. */
static __always_inline __u32 held(struct visit *v, enum option which);

static __always_inline __u32 second(void);

/* Whether anybody may read what is told. */
static __always_inline bool is_heard(void);

/* What became of an option, for monitors. */
static __always_inline void note(struct visit *v, enum option which, __u64 outcome);

/* Whether the application turned keepalive off after it had been on. */
static __always_inline bool was_turned_off(struct visit *v);

/* By which jitter is spread. */
static __always_inline __u32 hash_of(struct tcp_sock *tp);

static __always_inline bool find_policy(struct visit *v)
{
	v->policy = bpf_map_lookup_elem(MAP(kabpf_policies), &v->policy_id);
	v->counters = bpf_map_lookup_elem(MAP(kabpf_counters), &v->policy_id);
	return v->policy && v->counters;
}

/* Whether the options say anything of a socket: `off` does, where the application has no say. */
static __always_inline bool acts(struct kabpf_policy *policy, struct kabpf_options *options)
{
	return options->keepalive || policy->mode != KABPF_FILL;
}

static __always_inline bool is_wanted_before_syn(void)
{
	struct kabpf_totals *totals;
	__u32 zero = 0;

	totals = bpf_map_lookup_elem(MAP(kabpf_totals), &zero);
	return totals && totals->before_syn;
}

/* False for a callback that a policy says nothing of. Before the SYN only what bounds connect() is
 * set, and monitors learn which process calls. */
static __always_inline bool find_direction(struct visit *v, __u32 op)
{
	switch (op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		if (!is_wanted_before_syn() && !is_heard())
			return false;
		v->direction = KABPF_OUT;
		return true;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		v->direction = KABPF_OUT;
		return true;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		v->direction = KABPF_IN;
		return true;
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
		return true;
	default:
		return false;
	}
}

static __always_inline void count_failure(struct visit *v, int error)
{
	struct kabpf_failure key = { .policy_id = v->policy_id, .error = -error };
	__u64 *count, one = 1;

	__sync_fetch_and_add(&v->counters->failed, 1);
	count = bpf_map_lookup_elem(MAP(kabpf_failures), &key);
	if (count)
		__sync_fetch_and_add(count, 1);
	else
		bpf_map_update_elem(MAP(kabpf_failures), &key, &one, BPF_NOEXIST);
}

static __always_inline void set_option(void *to, struct visit *v, enum option which, int level,
				       int name, int value)
{
	int error = bpf_setsockopt(to, level, name, &value, sizeof(value));

	if (error) {
		note(v, which, -error);
		count_failure(v, error);
	} else {
		note(v, which, KABPF_SET);
		v->changed = 1;
	}
}

static __always_inline void count_kept(struct visit *v, enum option which)
{
	note(v, which, KABPF_KEPT);
	if (v->has_kept) /* it counts sockets */
		return;
	v->has_kept = 1;
	__sync_fetch_and_add(&v->counters->kept, 1);
}

/* Idle in seconds for an unset option of a socket with this hash. */
static __always_inline __u32 idle_by(struct kabpf_options *o, __u32 hash)
{
	__u32 idle_s = o->idle_s.high;
	__u64 spread;

	if (!o->jitter_percent)
		return idle_s;
	spread = (__u64)idle_s * o->jitter_percent / 100;
	idle_s -= (spread + 1) * (hash >> 8) >> 24;
	return idle_s < o->idle_s.low && o->idle_s.low < o->idle_s.high ? o->idle_s.low : idle_s;
}

/* The same again at every visit. */
static __always_inline __u32 idle_of(struct kabpf_options *o, struct tcp_sock *tp)
{
	return idle_by(o, hash_of(tp));
}

/* Whether the application's is the last word: where only the first counts, and it came later. */
static __always_inline bool is_kept(struct visit *v, enum option which)
{
	return v->policy->mode != KABPF_ENFORCE && (v->since & ~v->ours) >> which & 1;
}

static __always_inline void set_number(void *to, struct visit *v, enum option which, int name,
				       struct kabpf_range range, __u32 preferred, __u32 unit)
{
	__u32 value = preferred, now = held(v, which);

	if (!preferred || now == preferred * unit)
		return;
	/* No other can be unset again. */
	if (which == USER_TIMEOUT && !now && range.low == range.high && is_kept(v, which))
		return count_kept(v, which);
	if (now && !(v->ours >> which & 1)) {
		if (range.low == range.high) {
			if (v->policy->mode == KABPF_FILL || is_kept(v, which))
				return count_kept(v, which);
		} else if (now >= range.low * unit && now <= range.high * unit) {
			return count_kept(v, which);
		} else if (now < range.low * unit) {
			value = range.low;
		}
	}
	set_option(to, v, which, SOL_TCP, name, value);
}

static __always_inline void set_options(void *to, struct visit *v)
{
	struct kabpf_options *o = v->options;

	set_number(to, v, IDLE, TCP_KEEPIDLE, o->idle_s, idle_of(o, v->tp), second());
	set_number(to, v, INTERVAL, TCP_KEEPINTVL, o->interval_s, o->interval_s.high, second());
	set_number(to, v, PROBES, TCP_KEEPCNT, o->probes, o->probes.high, 1);
	set_number(to, v, USER_TIMEOUT, TCP_USER_TIMEOUT, o->user_timeout_ms,
		   o->user_timeout_ms.high, 1);
	/* Where keepalive is off, none of the numbers is given. */
	if (held(v, KEEPALIVE) == o->keepalive)
		return;
	if (v->policy->mode == KABPF_FILL ? was_turned_off(v) : is_kept(v, KEEPALIVE))
		return count_kept(v, KEEPALIVE);
	/* Last, because it arms the timer; the other way round would arm it twice. */
	set_option(to, v, KEEPALIVE, SOL_SOCKET, SO_KEEPALIVE, o->keepalive);
}

static __always_inline void set_syn_retries(void *to, struct visit *v)
{
	__u32 now = held(v, SYN_RETRIES), retries = v->options->syn_retries;

	if (!retries || now == retries)
		return;
	if (now && v->policy->mode == KABPF_FILL)
		return count_kept(v, SYN_RETRIES);
	set_option(to, v, SYN_RETRIES, SOL_TCP, TCP_SYNCNT, retries);
}

/* Whether a connection stays on this machine: to a loopback address, or to the socket's own. Both
 * addresses have 128 bits; an IPv4 one is v4-mapped. */
static __always_inline bool stays_here(__u32 *peer, __u32 *own)
{
	__u32 differs;

	differs = (peer[0] ^ own[0]) | (peer[1] ^ own[1]) | (peer[2] ^ own[2]) | (peer[3] ^ own[3]);
	if (!differs)
		return true;
	if (peer[0] || peer[1])
		return false;
	return peer[2] ? peer[2] == bpf_htonl(0xffff) && ((__u8 *)peer)[12] == 127
		       : peer[3] == bpf_htonl(1);
}

/* The row for a port of a network; NULL where the network has none that fits. */
static __always_inline struct kabpf_options *row_of(__u32 network, __u32 port)
{
	struct kabpf_port key = { .network = network, .port = port };
	struct kabpf_options *options;

	options = bpf_map_lookup_elem(MAP(kabpf_ports), &key);
	if (options)
		return options;
	key.port = 0;
	return bpf_map_lookup_elem(MAP(kabpf_ports), &key);
}

/* What the kernel takes (do_tcp_setsockopt()). */
static __always_inline bool is_valid(int name, int asked)
{
	if (name == TCP_USER_TIMEOUT)
		return asked >= 0;
	return asked >= 1 && asked <= (name == TCP_KEEPCNT ? MAX_TCP_KEEPCNT : MAX_TCP_KEEPIDLE);
}

static __always_inline bool is_ours(int level, int name)
{
	if (level == SOL_SOCKET)
		return name == SO_KEEPALIVE;
	return level == SOL_TCP && (name == TCP_KEEPIDLE || name == TCP_KEEPINTVL ||
				    name == TCP_KEEPCNT || name == TCP_USER_TIMEOUT);
}

/*
 * How many bytes of an option's value the kernel takes from the buffer that it lends: of a longer
 * one, and of one that another program passed on as the caller's, it would read the caller's memory
 * a second time, where a thread can have changed what was looked at. So the kernel is given the
 * copy of the number. 0 stands for "as the caller gave it", and is left to options that are not
 * ours. The buffer has 16 bytes also for shorter values (__cgroup_bpf_run_filter_setsockopt() in
 * kernel/bpf/cgroup.c), so that in one of 16 bytes a length of 0 may be the caller's.
 */
static __always_inline long length_of_copy(struct bpf_sockopt *ctx, bool ours)
{
	long length = ctx->optlen, room = ctx->optval_end - ctx->optval;

	if (length <= room && (length || room <= 16))
		return length;
	ctx->optlen = ours ? sizeof(int) : 0;
	return ctx->optlen;
}

static __always_inline bool is_tcp(struct bpf_sock *sk)
{
	return (sk->family == AF_INET || sk->family == AF_INET6) && sk->type == SOCK_STREAM &&
	       (sk->protocol == IPPROTO_TCP || sk->protocol == IPPROTO_MPTCP);
}

/* Before it is connected a socket takes what the application asks for; what the policy says of it
 * comes when it is. */
static __always_inline bool is_settled(struct bpf_sock *sk)
{
	return sk->state != BPF_TCP_CLOSE && sk->state != BPF_TCP_SYN_SENT;
}

#endif
