/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/* What kabpf_list says of a socket: its options, who set them, and when it is probed next. */
#ifndef SOCKET_LIST_H
#define SOCKET_LIST_H

#include "kernel.h"
#include "maps.h"
#include "visit.h"

/* Whether the policy turns keepalive on and leaves the rest to the system. */
static __always_inline bool gives_no_number(struct visit *v)
{
	struct kabpf_options *o;

	if (!begin_visit(v, (void *)v->tp))
		return false;
	o = v->options;
	return o->keepalive && !o->idle_s.high && !o->interval_s.high && !o->probes.high &&
	       !o->user_timeout_ms.high;
}

/* Whether the user timeout is there until the connection is established. */
static __always_inline bool is_connect_timeout(struct kabpf_socket *s, struct tcp_sock *tp)
{
	struct connecting *kept;

	if (s->state != BPF_TCP_SYN_SENT)
		return false;
	kept = bpf_sk_storage_get(&kabpf_connecting, tp, NULL, 0);
	return kept && kept->set_ms == s->user_timeout_ms;
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
	__u32 policys = 0, formers, off = 1 << KEEPALIVE;

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
	if (is_connect_timeout(s, tp))
		s->by[USER_TIMEOUT] = KABPF_BY_POLICY;
	/* Values of ours without keepalive: the application turned it off, or a policy. */
	if (s->keepalive)
		s->by[KEEPALIVE] = who_set(true, policys & ~off || (cgroup && gives_no_number(&v)),
					   formers & ~off);
	else
		s->by[KEEPALIVE] = who_set(formers, policys & off, formers & off);
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
