/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/* Which processes have TCP sockets open, and in which network namespaces: told without a lock of
 * any socket, by the descriptors of processes. */
#ifndef HOLDERS_H
#define HOLDERS_H

#include "kabpf.h"
#include "kernel.h"
#include "maps.h"
#include "options.h"

/* What was written last, of which reader; so that a process with thousands of sockets in one
 * namespace and one cgroup is told of once. Two readers at once are told more often. */
__u64 kabpf_last_holder = 0;

static __always_inline bool is_tcp_sock(struct sock *sk)
{
	__u16 family = sk->__sk_common.skc_family;

	return (family == AF_INET || family == AF_INET6) && sk->sk_type == SOCK_STREAM &&
	       (sk->sk_protocol == IPPROTO_TCP || sk->sk_protocol == IPPROTO_MPTCP);
}

/* The TCP or MPTCP socket of a descriptor; NULL where that is of something else. Since Linux kernel
 * commit b60da4955f53 ("bpf: Only provide bpf_sock_from_file with CONFIG_NET") (in v5.11) it can be
 * had; the iterator holds the file, and so the socket. */
static __always_inline struct sock *socket_of(struct bpf_iter__task_file *ctx)
{
	struct file *file = ctx->file;
	struct socket *socket;
	struct sock *sk;

	if (!file)
		return NULL;
	socket = bpf_sock_from_file(file);
	if (!socket)
		return NULL;
	sk = socket->sk;
	return sk && is_tcp_sock(sk) ? sk : NULL;
}

static __always_inline bool was_just_told(struct kabpf_holder *h, __u64 session)
{
	__u64 key = h->cgroup_id * 0x9e3779b97f4a7c15 ^ (session << 32 | h->namespace);
	bool same = kabpf_last_holder == key;

	kabpf_last_holder = key;
	return same;
}

/* A process's number as the reader sees it, in whose pid namespace it is. */
static __always_inline __u32 pid_of(struct task_struct *task)
{
	struct task_struct *reader = (void *)bpf_get_current_task();
	unsigned int level = BPF_CORE_READ(reader, thread_pid, level);
	struct pid *pid = BPF_CORE_READ(task, group_leader, thread_pid);
	int nr = 0;

	/* Its elements are longer in the kernel than here. */
	bpf_probe_read_kernel(&nr, sizeof(nr),
			      (void *)pid + bpf_core_field_offset(struct pid, numbers) +
				  level * bpf_core_type_size(struct upid) +
				  bpf_core_field_offset(struct upid, nr));
	return nr;
}

static __always_inline bool find_holder(struct kabpf_holder *h, struct bpf_iter__task_file *ctx)
{
	struct sock *sk = socket_of(ctx);
	struct kabpf_cgroup *cgroup;

	if (!sk || !ctx->task)
		return false;
	h->cgroup_id = sk->sk_cgrp_data.cgroup->kn->id;
	h->namespace = sk->__sk_common.skc_net.net->ns.inum;
	if (sk->sk_lock.owned)
		h->flags |= KABPF_HELD;
	cgroup = bpf_map_lookup_elem(&kabpf_cgroups, &h->cgroup_id);
	if (cgroup && cgroup->owed)
		h->flags |= KABPF_OWED;
	return true;
}

static __always_inline void tell_holder(struct kabpf_holder *h, struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;

	if (!task || !file)
		return;
	h->inode = file->f_inode->i_ino;
	h->pid = pid_of(task);
	h->descriptor = ctx->fd;
	/* What finds no room in a piece the kernel shows again for the next (bpf_seq_read()). */
	if (bpf_seq_write(ctx->meta->seq, h, sizeof(*h)))
		kabpf_last_holder = 0;
}

#endif
