// SPDX-License-Identifier: GPL-2.0 OR MIT
/* Somebody else's program on setsockopt(2): ignores a TCP_KEEPIDLE of 20 s, makes others 40 s. */
#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/tcp.h>
#include <bpf/bpf_helpers.h>

SEC("cgroup/setsockopt")
int rewriter(struct bpf_sockopt *ctx)
{
	int *value = ctx->optval;

	if (ctx->level != IPPROTO_TCP || ctx->optname != TCP_KEEPIDLE)
		return 1;
	if ((void *)(value + 1) > ctx->optval_end)
		return 1;
	if (*value == 20)
		ctx->optlen = -1;
	else
		*value = 40;
	return 1;
}

char _license[] SEC("license") = "Dual MIT/GPL";
