/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/* Measures a socket by the policy of its cgroup, and by those that the cgroup had before. */
#ifndef VISIT_H
#define VISIT_H

#include "addresses.h"
#include "kernel.h"
#include "maps.h"
#include "options.h"

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
	return options && acts(policy, options) ? options : NULL;
}

/* Whether a connection's SYN was its own: acknowledged, it counts as a byte (tcp_ack() in
 * net/ipv4/tcp_input.c) that was not sent as data. The SYN-ACK of an accepted one is another
 * socket's. A FIN is such a byte, too. */
static __always_inline bool sent_syn(struct sock *sk)
{
	struct tcp_sock *tp = (void *)sk;
	__u8 state = BPF_CORE_READ(sk, __sk_common.skc_state);
	__u32 sent = BPF_CORE_READ(tp, snd_nxt) - BPF_CORE_READ(tp, snd_una);

	sent += BPF_CORE_READ(tp, bytes_acked);
	sent -= BPF_CORE_READ(tp, bytes_sent) - BPF_CORE_READ(tp, bytes_retrans);
	if (state != BPF_TCP_ESTABLISHED && state != BPF_TCP_CLOSE_WAIT)
		sent -= state != BPF_TCP_SYN_RECV;
	return sent == 1;
}

/* A connection's direction is not kept by the kernel. An accepted socket shares the listener's
 * port, which was bound, without having bound it (sk_clone_lock() in net/core/sock.c clears the
 * lock), and has the listener's backlog; a port that connect() chose is marked by -1
 * (__inet_hash_connect()). Without a backlog it may also be one that bind() chose, as for a
 * connection from an address. */
static __always_inline __u32 direction_of(struct sock *sk)
{
	struct inet_connection_sock *icsk = (void *)sk;
	struct inet_bind_bucket *bucket = BPF_CORE_READ(icsk, icsk_bind_hash);

	if (!bucket || BPF_CORE_READ(bucket, fastreuse) < 0 ||
	    BPF_CORE_READ_BITFIELD_PROBED(sk, sk_userlocks) & SOCK_BINDPORT_LOCK)
		return KABPF_OUT;
	return BPF_CORE_READ(sk, sk_max_ack_backlog) || !sent_syn(sk) ? KABPF_IN : KABPF_OUT;
}

/* An MPTCP socket has no port of its own; its subflows do, and each has its own direction. */
static __always_inline __u32 direction_of_multipath(struct sock *sk)
{
	struct mptcp_sock *msk = (void *)sk;

	if (!bpf_core_field_exists(msk->pm.server_side))
		return KABPF_OUT;
	return BPF_CORE_READ(msk, pm.server_side) ? KABPF_IN : KABPF_OUT;
}

/* Since Linux kernel commit 9544d60a2605 ("inet: change lport contribution to inet_ehashfn() and
 * inet6_ehashfn()") (in v6.15) the hashes of two connections to one peer differ by their ports
 * alone, in the lower bits; multiplied they differ in the upper ones, too. */
static __always_inline __u32 spread(__u32 hash)
{
	return hash * 0x9e3779b1;
}

static __always_inline __u32 hash_of(struct tcp_sock *tp)
{
	return spread(tp->inet_conn.icsk_inet.sk.__sk_common.skc_hash);
}

static __always_inline __u32 second(void)
{
	return kabpf_constants.hz;
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

/* Bits of visit.ours beside those of options: a policy gives keepalive, and may have turned it on;
 * it surely has, as a number of its own stands beside it, or it gives none. */
#define MAYBE_ON 6
#define SURELY_ON 7

#define NUMBERS (1 << IDLE | 1 << INTERVAL | 1 << PROBES | 1 << USER_TIMEOUT)

/* Unless a policy of ours turned it off: it is known, or numbers of ours stand without it. */
static __always_inline bool was_turned_off(struct visit *v)
{
	return !(v->ours >> KEEPALIVE & 1) && (v->ours & NUMBERS || v->since >> KEEPALIVE & 1);
}

/* Whether a socket has each number that a policy gives, whoever set it. */
static __always_inline bool has_all(struct tcp_sock *tp, struct kabpf_options *o)
{
	return (!o->idle_s.high || tp->keepalive_time) &&
	       (!o->interval_s.high || tp->keepalive_intvl) &&
	       (!o->probes.high || tp->keepalive_probes) &&
	       (!o->user_timeout_ms.high || tp->inet_conn.icsk_user_timeout);
}

/* Whether an accepted connection is without keepalive because its listener's was turned off: a
 * listener has all that its policy gives by then, keepalive among it. */
static __always_inline bool was_listeners_turned_off(struct visit *v)
{
	return v->policy->mode == KABPF_FILL && v->policy->flags & KABPF_EXISTING &&
	       !v->cgroup->owed && has_all(v->tp, v->options);
}

/* What was brought to a range's lower bound stays the application's. */
static __always_inline bool came_from(__u32 preferred, __u32 unit, __u32 now)
{
	return now && now == preferred * unit;
}

static __always_inline bool has_keepalive_number(struct tcp_sock *tp)
{
	return tp->keepalive_time || tp->keepalive_intvl || tp->keepalive_probes;
}

/* Whether a policy turns keepalive on and leaves the rest to the system. */
static __always_inline bool gives_no_number(struct kabpf_options *o)
{
	return !o->idle_s.high && !o->interval_s.high && !o->probes.high &&
	       !o->user_timeout_ms.high;
}

/* A global function is verified once, and its result is any number to those that call it, since
 * Linux kernel commit 51c39bb1d5d1 ("bpf: Introduce function-by-function verification") (in v5.6).
 * With the bits in sight, the verifier follows each combination of them through all that comes
 * later. */
__noinline int kabpf_either(int bits, int others)
{
	return bits | others;
}

static __always_inline bool is_exactly(struct kabpf_range given)
{
	return given.high && given.low == given.high;
}

/* Which options the application set after a former policy had its turn. That of `fill` has left
 * other values as they were, and counts for its like alone; but it has filled what is unset now. */
static __always_inline __u32 find_since(struct visit *v, struct kabpf_policy *was,
					struct kabpf_options *o, bool succeeds)
{
	struct tcp_sock *tp = v->tp;
	__u32 timeout = tp->inet_conn.icsk_user_timeout;
	__u32 since = kabpf_either(0, (keeps_alive(tp) != o->keepalive) << KEEPALIVE);

	if (was->mode == KABPF_FILL && v->policy->mode != KABPF_FILL)
		return 0;
	if (!timeout)
		since = kabpf_either(since, (succeeds && is_exactly(o->user_timeout_ms))
						<< USER_TIMEOUT);
	if (was->mode == KABPF_FILL)
		return since;
	since = kabpf_either(since, (is_exactly(o->idle_s) && tp->keepalive_time) << IDLE);
	since = kabpf_either(since, (is_exactly(o->interval_s) && tp->keepalive_intvl) << INTERVAL);
	since = kabpf_either(since, (is_exactly(o->probes) && tp->keepalive_probes) << PROBES);
	return kabpf_either(since, (is_exactly(o->user_timeout_ms) && timeout) << USER_TIMEOUT);
}

/* Tells the values that a policy set, mostly a former one, from those the application chose; at a
 * visit also what it chose when that policy had had its turn: as all sockets had of the one just
 * before, those with a number of its own, and a listener that lacks none of its numbers. */
static __always_inline void find_ours(struct visit *v, __u32 was_id, bool visits)
{
	struct tcp_sock *tp = v->tp;
	struct kabpf_policy *was = bpf_map_lookup_elem(&kabpf_policies, &was_id);
	__u32 timeout = tp->inet_conn.icsk_user_timeout, hz = kabpf_constants.hz;
	struct kabpf_options *o;
	__u32 ours;

	if (!was)
		return;
	o = options_of(was, was_id, (void *)tp, v->direction);
	if (!o)
		return;
	ours = kabpf_either(o->keepalive << MAYBE_ON, (!o->keepalive && !keeps_alive(tp))
							  << KEEPALIVE);
	ours = kabpf_either(ours, came_from(idle_of(o, tp), hz, tp->keepalive_time) << IDLE);
	ours =
	    kabpf_either(ours, came_from(o->interval_s.high, hz, tp->keepalive_intvl) << INTERVAL);
	ours = kabpf_either(ours, came_from(o->probes.high, 1, tp->keepalive_probes) << PROBES);
	ours = kabpf_either(ours, came_from(o->user_timeout_ms.high, 1, timeout) << USER_TIMEOUT);
	ours = kabpf_either(ours, (o->keepalive && (ours & NUMBERS || gives_no_number(o)))
				      << SURELY_ON);
	v->ours = kabpf_either(v->ours, ours);
	if (visits) {
		bool succeeds = v->cgroup->succeeds && was_id == v->cgroup->was_id[0];
		bool met = !v->direction && was->mode == KABPF_FILL && !gives_no_number(o);

		if (succeeds || ours & NUMBERS || (met && has_all(tp, o)))
			v->since = kabpf_either(v->since, find_since(v, was, o, succeeds));
	}
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

static __always_inline void find_former(struct visit *v, bool visits)
{
	for (int i = 0; i < KABPF_FORMER; i++) {
		__u32 was_id = v->cgroup->was_id[i];

		if (!was_id)
			break;
		find_ours(v, was_id, visits);
	}
}

#endif
