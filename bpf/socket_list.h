/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/* What kabpf_list says of a socket: its options, who set them, and when it is probed next. */
#ifndef SOCKET_LIST_H
#define SOCKET_LIST_H

#include "kernel.h"
#include "maps.h"
#include "visit.h"

/* Whether the user timeout is there until the connection is established. */
static __always_inline bool is_connect_timeout(struct kabpf_socket *s, struct tcp_sock *tp)
{
	struct connecting *kept;

	if (s->state != BPF_TCP_SYN_SENT)
		return false;
	kept = bpf_sk_storage_get(&kabpf_connecting, tp, NULL, 0);
	return kept && kept->set_ms == s->user_timeout_ms;
}

/* Who set what neither the policy nor a former one gives. */
static __always_inline __u8 somebody_else(struct kabpf_cgroup *cgroup)
{
	return cgroup && !cgroup->forgot ? KABPF_BY_APPLICATION : KABPF_BY_UNKNOWN;
}

/* A value that is the policy's, or a former one's, is taken for theirs. */
static __always_inline __u8 who_set(struct visit *v, __u32 is_set, __u32 policys, __u32 which)
{
	if (!is_set)
		return KABPF_BY_SYSTEM;
	if (policys >> which & 1)
		return KABPF_BY_POLICY;
	return v->ours >> which & 1 ? KABPF_BY_FORMER : somebody_else(v->cgroup);
}

/* Keepalive that is on tells a policy from the application only by the numbers beside it. */
static __always_inline __u8 who_turned_on(struct visit *v, __u32 policys)
{
	if (policys >> SURELY_ON & 1)
		return KABPF_BY_POLICY;
	if (v->ours >> SURELY_ON & 1)
		return KABPF_BY_FORMER;
	return v->ours >> MAYBE_ON & 1 ? KABPF_BY_UNKNOWN : somebody_else(v->cgroup);
}

static __always_inline void put_setters(struct kabpf_socket *s, struct tcp_sock *tp,
					struct kabpf_cgroup *cgroup)
{
	struct visit v = { .tp = tp, .cgroup = cgroup };
	__u32 policys = 0;

	if (s->state != BPF_TCP_LISTEN)
		v.direction = direction_of((void *)tp);
	if (cgroup) {
		find_ours(&v, cgroup->policy_id, false);
		policys = v.ours;
		find_former(&v, false);
	}
	s->by[IDLE] = who_set(&v, tp->keepalive_time, policys, IDLE);
	s->by[INTERVAL] = who_set(&v, tp->keepalive_intvl, policys, INTERVAL);
	s->by[PROBES] = who_set(&v, tp->keepalive_probes, policys, PROBES);
	s->by[USER_TIMEOUT] = who_set(&v, tp->inet_conn.icsk_user_timeout, policys, USER_TIMEOUT);
	if (is_connect_timeout(s, tp))
		s->by[USER_TIMEOUT] = KABPF_BY_POLICY;
	if (s->keepalive)
		s->by[KEEPALIVE] = who_turned_on(&v, policys);
	else
		s->by[KEEPALIVE] = who_set(&v, v.ours & (NUMBERS | 1 << KEEPALIVE) || was_alive(tp),
					   policys, KEEPALIVE);
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
	return left > 0 ? (__u64)left * 1000 / kabpf_constants.hz : 0;
}

static __always_inline void put_options(struct kabpf_socket *s, struct tcp_sock *tp,
					struct net *net)
{
	__u32 idle = tp->keepalive_time ?: net->ipv4.sysctl_tcp_keepalive_time;
	__u32 interval = tp->keepalive_intvl ?: net->ipv4.sysctl_tcp_keepalive_intvl;

	s->keepalive = keeps_alive(tp);
	s->idle_s = idle / kabpf_constants.hz;
	s->interval_s = interval / kabpf_constants.hz;
	s->probes = tp->keepalive_probes ?: net->ipv4.sysctl_tcp_keepalive_probes;
	s->user_timeout_ms = tp->inet_conn.icsk_user_timeout;
	s->next_probe_ms = next_probe_ms(s, tp, idle);
}

static __always_inline void list_socket(struct seq_file *seq, struct tcp_sock *tp)
{
	struct kabpf_cgroup *cgroup;
	struct kabpf_socket s = {};
	struct sock_common *skc;

	if (!tp)
		return;
	skc = &tp->inet_conn.icsk_inet.sk.__sk_common;
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
	bpf_seq_write(seq, &s, sizeof(s));
}

#endif
