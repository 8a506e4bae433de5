// SPDX-License-Identifier: GPL-2.0 OR MIT
/* Somebody else's program on setsockopt(2): passes on what is longer than a page as it was, as
 * cgroup_bpf_run_filter_setsockopt() wants it. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

SEC("cgroup/setsockopt")
int passer(struct bpf_sockopt *ctx)
{
	if (ctx->optlen > (long)(ctx->optval_end - ctx->optval))
		ctx->optlen = 0;
	return 1;
}

char _license[] SEC("license") = "Dual MIT/GPL";
