/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/*
 * What is taken from the kernel: UAPI, and the few structures of its own that are read; the loader
 * finds the members' real offsets through BTF.
 */
#ifndef KERNEL_H
#define KERNEL_H

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

typedef struct {
	int owned; /* by a process, which may sleep */
} socket_lock_t;

struct sock {
	struct sock_common __sk_common;
	struct timer_list sk_timer;
	struct sock_cgroup_data sk_cgrp_data;
	socket_lock_t sk_lock;
	__u16 sk_type;
	__u16 sk_protocol;
	__u32 sk_ack_backlog; /* connections that wait for accept() */
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
	__u32 icsk_probes_tstamp; /* jiffies; 0: the peer's window is open */
	struct timer_list icsk_keepalive_timer;
	struct {
		__u32 lrcvtime; /* jiffies */
	} icsk_ack;
	__u32 icsk_user_timeout; /* ms */
};

struct tcp_sock {
	struct inet_connection_sock inet_conn;
	__u32 rcv_tstamp; /* jiffies */
	__u64 bytes_sent; /* retransmissions included */
	__u64 bytes_retrans;
	__u64 bytes_acked;
	__u32 snd_una;
	__u32 snd_nxt;
	__u32 write_seq;
	unsigned int keepalive_time; /* jiffies */
	unsigned int keepalive_intvl; /* jiffies */
	__u8 keepalive_probes;
};

struct mptcp_pm_data {
	bool server_side;
};

struct mptcp_sock {
	struct mptcp_pm_data pm;
	struct sock *first; /* of its subflows; may be NULL */
};

struct upid {
	int nr;
};

struct pid {
	unsigned int level;
	struct upid numbers[1]; /* one for each pid namespace, from the outermost */
};

struct task_struct {
	int tgid;
	struct task_struct *group_leader;
	struct pid *thread_pid;
	char comm[16];
};

struct bpf_iter_meta {
	struct seq_file *seq;
	__u64 session_id;
};

struct socket {
	struct sock *sk;
};

struct inode {
	unsigned long i_ino;
};

struct file {
	struct inode *f_inode;
};

struct bpf_iter__task_file {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
	__u32 fd;
	struct file *file;
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

static __always_inline bool has_flag(struct tcp_sock *tp, __u32 flag)
{
	return tp->inet_conn.icsk_inet.sk.__sk_common.skc_flags >> flag & 1;
}

static __always_inline bool keeps_alive(struct tcp_sock *tp)
{
	return has_flag(tp, bpf_core_enum_value(enum sock_flags, SOCK_KEEPOPEN));
}

static __always_inline struct timer_list *keepalive_timer(struct tcp_sock *tp)
{
	/* Since Linux kernel commit 08dfe370239e ("tcp: introduce icsk->icsk_keepalive_timer") (in
	 * v6.19 and in stable releases) sk_timer is another timer. */
	if (bpf_core_field_exists(tp->inet_conn.icsk_keepalive_timer))
		return &tp->inet_conn.icsk_keepalive_timer;
	return &tp->inet_conn.icsk_inet.sk.sk_timer;
}

/* Whether keepalive has been on while the socket was connecting or connected: that starts the timer
 * (tcp_set_keepalive() in net/ipv4/tcp_timer.c, tcp_finish_connect(), tcp_create_openreq_child()),
 * and stopping it leaves the time for which it was set. A listener has none. */
static __always_inline bool was_alive(struct tcp_sock *tp)
{
	return keepalive_timer(tp)->expires;
}

static __always_inline __u64 cgroup_id_of(struct tcp_sock *tp)
{
	return tp->inet_conn.icsk_inet.sk.sk_cgrp_data.cgroup->kn->id;
}

/* The kernel's struct sock behind the verifier's view of it, as a number: to be read by probes. */
static __always_inline struct sock *sock_of(struct bpf_sockopt *ctx)
{
	struct bpf_sock *seen = ctx->sk;
	struct sock *sk = NULL;

	bpf_probe_read_kernel(&sk, sizeof(sk), &seen);
	return sk;
}

static __always_inline __u32 silent_jiffies(struct tcp_sock *tp)
{
	__u32 now = bpf_jiffies64(), data = now - tp->inet_conn.icsk_ack.lrcvtime;
	__u32 any = now - tp->rcv_tstamp;

	return data < any ? data : any;
}

#endif
