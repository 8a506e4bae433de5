/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/* The maps, and the constants that user space sets. */
#ifndef MAPS_H
#define MAPS_H

#include "kabpf.h"
#include "kernel.h"

/* All of the read-only data, which user space writes as a whole. */
const volatile struct kabpf_constants kabpf_constants = { .hz = 250, .processors = 1 };

/* Policies by id. An array, because its look-up is inlined. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, KABPF_POLICIES);
	__type(key, __u32);
	__type(value, struct kabpf_policy);
} kabpf_policies SEC(".maps");

/* By policy id. Apart from the policies, whose cache lines are only read. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, KABPF_POLICIES);
	__type(key, __u32);
	__type(value, struct kabpf_counters);
} kabpf_counters SEC(".maps");

/* The destinations of policies. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, KABPF_NETWORKS);
	__type(key, struct kabpf_network);
	__type(value, __u32);
} kabpf_networks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, KABPF_PORTS);
	__type(key, struct kabpf_port);
	__type(value, struct kabpf_options);
} kabpf_ports SEC(".maps");

/* Every cgroup of the tree by its id. Not preallocated: most machines have a few hundred. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, KABPF_CGROUPS);
	__type(key, __u64);
	__type(value, struct kabpf_cgroup);
} kabpf_cgroups SEC(".maps");

/* Those of them that are removed. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, KABPF_REMOVED);
	__type(key, __u64);
	__type(value, struct kabpf_removed);
} kabpf_removed SEC(".maps");

/* The selectors as an automaton: from a parent's state, by the child's name, to the child's. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 2 * KABPF_BIRTHS);
	__type(key, struct kabpf_step);
	__type(value, struct kabpf_birth);
} kabpf_births SEC(".maps");

/* The names that selectors spell out, by pieces: a short key costs less than a whole name. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, KABPF_BIRTHS);
	__type(key, struct kabpf_piece);
	__type(value, __u64);
} kabpf_names SEC(".maps");

/* Since Linux kernel commit 4a8f87e60f6d ("bpf: Allow for map-in-map with dynamic inner array map
 * entries") (in v5.10) arrays in a map may differ in size. */
struct kabpf_blocks {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_INNER_MAP);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(struct kabpf_block));
};

/* The automaton for globs of each generation; none where there are no globs. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, KABPF_GENERATIONS);
	__type(key, __u32);
	__array(values, struct kabpf_blocks);
} kabpf_globs SEC(".maps");

/* For user space: a digest of each generation of globs; 0 where there is none. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, KABPF_GENERATIONS);
	__type(key, __u32);
	__type(value, __u64);
} kabpf_digests SEC(".maps");

/* How often which errno came, by policy. Empty on a healthy machine. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1024);
	__type(key, struct kabpf_failure);
	__type(value, __u64);
} kabpf_failures SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct kabpf_totals);
} kabpf_totals SEC(".maps");

/* Births that user space has to resolve. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, KABPF_EVENTS);
} kabpf_events SEC(".maps");

/* Perf events of monitors, one for each processor; user space multiplies the entries by their
 * number. Each is there as long as a process has the map open by which it was put in
 * (perf_event_fd_array_release() in kernel/bpf/arraymap.c), so that a monitor which was killed
 * leaves nothing. */
struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__uint(max_entries, KABPF_MONITORS);
	__type(key, __u32);
	__type(value, __u32);
} kabpf_monitors SEC(".maps");

/* The logger's. To open perf events needs CAP_SYS_ADMIN on Debian's kernels, which kabpfd is
 * without. What one that was killed did not read waits here. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, KABPF_LOG_BYTES);
} kabpf_log SEC(".maps");

/* How much of that each policy has had lately, by its id, and cgroups without one, by 0: one that
 * fills it would leave the others no room. Nobody else reads it, so it is not pinned. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, KABPF_POLICIES);
	__type(key, __u32);
	__type(
	    value, struct {
		    __u64 window;
		    __u64 events;
	    });
} kabpf_log_parts SEC(".maps");

/* Who reads what is told, a byte for each monitor: 1 if it was there when it was last told
 * something; then how much each one lost; and at last the id of the link of kabpf_observe that
 * monitors share, for user space. On a machine without a monitor, a look at the first is all that
 * they cost a connection. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2 + KABPF_MONITORS);
	__type(key, __u32);
	__type(value, __u64);
} kabpf_readers SEC(".maps");

/* Failed connections that were told, so that none is told twice: the last byte that was
 * acknowledged, as a socket may be connected again. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u32);
} kabpf_told SEC(".maps");

/* A socket's user timeout while a policy's connect timeout stands in its place. */
struct connecting {
	__u32 set_ms; /* by which the policy's is told from what the application sets meanwhile */
	__u32 before_ms;
};

/* Of sockets that connect under such a policy, alone. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct connecting);
} kabpf_connecting SEC(".maps");

/* A socket as kabpf_retrofit_one measures it, for as long as that has its lock. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(
	    value, struct { char bytes[KABPF_COPY]; });
} kabpf_copies SEC(".maps");

/* For options.h, which comes after this. */
#define MAP(name) (&(name))

#endif
