// SPDX-License-Identifier: GPL-2.0 OR MIT
/* Somebody else's sock_ops program: counts established connections. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} neighbour_seen SEC(".maps");

SEC("sockops")
int neighbour(struct bpf_sock_ops *ctx)
{
	__u32 zero = 0;
	__u64 *seen = bpf_map_lookup_elem(&neighbour_seen, &zero);

	if (seen && (ctx->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB ||
		     ctx->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB))
		__sync_fetch_and_add(seen, 1);
	return 1;
}

char _license[] SEC("license") = "Dual MIT/GPL";
