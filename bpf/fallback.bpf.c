// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * kabpf's data plane for kernels without BTF: bcc compiles it on the host, with UAPI types alone.
 *
 * It can't ask which cgroup a socket is in, nor what the socket has. So both programs are attached
 * to each cgroup that a policy names, and read from the attachment's storage which one it is; and
 * what applications set is written down from then on (kabpf_setsockopt). Of attachments above each
 * other the kernel runs the innermost first: that leaves a mark on the socket, and the others leave
 * the socket alone.
 *
 * The loader makes the maps; their descriptors are constants for the compiler.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/in.h>
#include <uapi/linux/tcp.h>
#include <asm/socket.h>
#include <linux/compiler.h>

#include "kabpf.h"

#define MAP(name) ((void *)bpf_pseudo_fd(1, name##_descriptor)) /* BPF_PSEUDO_MAP_FD */

static void *(*storage_of_socket)(void *map, struct bpf_sock *sk, void *value,
				  __u64 flags) = (void *)BPF_FUNC_sk_storage_get;
static void *(*storage_of_attachment)(void *map, __u64 flags) = (void *)BPF_FUNC_get_local_storage;
static __u64 (*cookie_of)(void *ctx) = (void *)BPF_FUNC_get_socket_cookie;

#include "options.h"

/* In kabpf_attached. */
struct attached {
	__u64 cgroup_id; /* 0: the loader has not written it yet */
	__u64 nested; /* 1: a cgroup above or below has an attachment, too */
};

/* In kabpf_known, a socket's storage; an accepted one begins with its listener's. */
struct known {
	__u32 idle_s; /* as the application set it, as are the next four; 0: it did not */
	__u32 interval_s;
	__u32 probes;
	__u32 user_timeout_ms;
	__u32 syn_retries;
	__u32 off; /* 1: it turned keepalive off after a policy may have turned it on */
	__u64 marked; /* the socket's cookie, which its listener's storage has not, and the op: */
	__u64 marked_op; /* handled by an inner attachment */
};

/* Whether keepalive is on; to set it to what it is does no harm. */
#define NOT_KNOWN 2

static __always_inline __u32 held(struct visit *v, enum option which)
{
	if (which == KEEPALIVE)
		return NOT_KNOWN;
	if (!v->known)
		return 0;
	switch (which) {
	case IDLE:
		return v->known->idle_s;
	case INTERVAL:
		return v->known->interval_s;
	case PROBES:
		return v->known->probes;
	case USER_TIMEOUT:
		return v->known->user_timeout_ms;
	case SYN_RETRIES:
		return v->known->syn_retries;
	case KEEPALIVE:
		break;
	}
	return 0;
}

static __always_inline bool was_turned_off(struct visit *v)
{
	return v->known && v->known->off;
}

static __always_inline __u32 second(void)
{
	return 1;
}

/* Nobody is told. */
static __always_inline bool is_heard(void)
{
	return false;
}

static __always_inline void note(struct visit *v, enum option which, __u64 outcome)
{
}

/* No later visit has to find the same again. */
static __always_inline __u32 hash_of(struct tcp_sock *tp)
{
	return bpf_get_prandom_u32();
}

/* Whether an inner attachment has handled this call; if not, it is handled now. */
static __always_inline bool is_handled(struct bpf_sock_ops *ctx, struct bpf_sock *sk,
				       struct visit *v)
{
	__u64 cookie = cookie_of(ctx);

	if (!v->known)
		v->known =
		    storage_of_socket(MAP(kabpf_known), sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!v->known)
		return false;
	if (v->known->marked == cookie && v->known->marked_op == ctx->op)
		return true;
	v->known->marked = cookie;
	v->known->marked_op = ctx->op;
	return false;
}

/* Both addresses as 128 bits. Without the barrier, here and below, the compiler makes one load of
 * the last ones in both branches, by an address in ctx, which the verifier refuses. */
static __always_inline void read_addresses(struct bpf_sock_ops *ctx, __u32 *peer, __u32 *own)
{
	if (ctx->family == AF_INET6) {
		peer[0] = ctx->remote_ip6[0];
		peer[1] = ctx->remote_ip6[1];
		peer[2] = ctx->remote_ip6[2];
		peer[3] = ctx->remote_ip6[3];
		own[0] = ctx->local_ip6[0];
		own[1] = ctx->local_ip6[1];
		own[2] = ctx->local_ip6[2];
		own[3] = ctx->local_ip6[3];
		barrier();
	} else {
		peer[2] = own[2] = bpf_htonl(0xffff);
		peer[3] = ctx->remote_ip4;
		own[3] = ctx->local_ip4;
	}
}

/* The port that was connected to. */
static __always_inline __u32 port_of(struct bpf_sock_ops *ctx, __u32 direction)
{
	__u32 port = ctx->local_port;

	barrier();
	if (direction == KABPF_OUT)
		port = bpf_ntohl(ctx->remote_port);
	return port;
}

/* What a policy with conditions gives a connection: NULL where it leaves it alone. */
static __always_inline struct kabpf_options *find_options(struct bpf_sock_ops *ctx, struct visit *v)
{
	struct kabpf_network network = { .bits = 32 + 128, .policy_id = v->policy_id };
	struct kabpf_options *options = NULL;
	__u32 own[4] = {}, *number;

	if (!(v->policy->flags & v->direction))
		return NULL;
	read_addresses(ctx, (__u32 *)network.address, own);
	if (stays_here((__u32 *)network.address, own) && !(v->policy->flags & KABPF_LOOPBACK))
		return NULL;
	if (!v->policy->destinations)
		return &v->policy->options;
	number = bpf_map_lookup_elem(MAP(kabpf_networks), &network);
	if (number)
		options = row_of(*number, port_of(ctx, v->direction));
	return options ? options : &v->policy->options;
}

/* False where no policy concerns the socket. */
static __always_inline bool begin_visit(struct bpf_sock_ops *ctx, struct bpf_sock *sk,
					struct visit *v)
{
	struct attached *attached = storage_of_attachment(MAP(kabpf_attached), 0);
	__u64 id = attached->cgroup_id;

	v->cgroup = bpf_map_lookup_elem(MAP(kabpf_cgroups), &id);
	if (!v->cgroup)
		return false;
	v->policy_id = v->cgroup->policy_id;
	v->known = storage_of_socket(MAP(kabpf_known), sk, NULL, 0);
	if (attached->nested && is_handled(ctx, sk, v))
		return false;
	if (!find_policy(v))
		return false;
	if (!v->direction)
		v->options = v->policy->flags & KABPF_LISTENERS ? &v->policy->options : NULL;
	else if (v->policy->flags & KABPF_PLAIN)
		v->options = &v->policy->options;
	else
		v->options = find_options(ctx, v);
	return v->options && acts(v->policy, v->options);
}

int kabpf_sockops(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct visit v = {};

	if (!find_direction(&v, ctx->op) || !sk || !begin_visit(ctx, sk, &v))
		return 1;
	if (ctx->op == BPF_SOCK_OPS_TCP_CONNECT_CB) {
		set_syn_retries(ctx, &v);
		return 1;
	}
	set_options(ctx, &v);
	__sync_fetch_and_add(v.direction ? &v.counters->established : &v.counters->listening, 1);
	return 1;
}

/* Writes down what an application sets. Returns 1: 0 would be EPERM. */
int kabpf_setsockopt(struct bpf_sockopt *ctx)
{
	int *value = ctx->optval, asked;
	struct bpf_sock *sk = ctx->sk;
	struct known *known;
	long length;
	bool ours;

	if (ctx->optlen < 0) /* another program's decision */
		return 1;
	ours = is_ours(ctx->level, ctx->optname) ||
	       (ctx->level == SOL_TCP && ctx->optname == TCP_SYNCNT);
	length = length_of_copy(ctx, ours);
	if (!ours)
		return 1;
	if (!sk || !is_tcp(sk))
		return 1;
	if (length < (long)sizeof(*value) || (void *)(value + 1) > ctx->optval_end)
		return 1;
	asked = *value;
	if (ctx->level == SOL_TCP && !is_valid(ctx->optname, asked))
		return 1;
	known = storage_of_socket(MAP(kabpf_known), sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!known)
		return 1;
	if (ctx->level == SOL_SOCKET)
		known->off = !asked && is_settled(sk);
	else if (ctx->optname == TCP_KEEPIDLE)
		known->idle_s = asked;
	else if (ctx->optname == TCP_KEEPINTVL)
		known->interval_s = asked;
	else if (ctx->optname == TCP_KEEPCNT)
		known->probes = asked;
	else if (ctx->optname == TCP_USER_TIMEOUT)
		known->user_timeout_ms = asked;
	else
		known->syn_retries = asked;
	return 1;
}
