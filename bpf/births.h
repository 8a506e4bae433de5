/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/*
 * What happens at mkdir: which policy a new cgroup has, by its parent's state and its own name, and
 * whether user space is asked.
 */
#ifndef BIRTHS_H
#define BIRTHS_H

#include "kernel.h"
#include "maps.h"

/* The cgroup2 tree is hierarchy 0, in the kernel as in /proc/PID/cgroup (cgroup-v2.rst); ids of the
 * version 1 trees may be equal to ids of this one. */
static __always_inline bool in_cgroup2(struct cgroup *cgrp)
{
	return cgrp->root->hierarchy_id == 0;
}

/* This name here; or else this name anywhere and any name here together, of which the stronger
 * selector gives the policy. False where nothing is known of such a child. */
static __always_inline bool find_birth(struct kabpf_birth *birth, struct kabpf_step *step,
				       __u64 state)
{
	struct kabpf_birth *found, *rest;

	step->state = state;
	found = bpf_map_lookup_elem(&kabpf_births, step);
	if (found) {
		*birth = *found;
		return true;
	}
	step->state = KABPF_STATE_ANYWHERE;
	found = bpf_map_lookup_elem(&kabpf_births, step);
	step->state = state;
	__builtin_memset(step->name, 0, sizeof(step->name));
	rest = bpf_map_lookup_elem(&kabpf_births, step);
	if (!found)
		found = rest;
	if (!found)
		return false;
	*birth = *found;
	if (!rest)
		return true;
	if (birth->state == KABPF_STATE_ANYWHERE)
		birth->state = rest->state;
	if (rest->strength > birth->strength)
		birth->policy_id = rest->policy_id;
	return true;
}

static __always_inline void count_total(bool recorded)
{
	struct kabpf_totals *totals;
	__u32 zero = 0;

	totals = bpf_map_lookup_elem(&kabpf_totals, &zero);
	if (totals)
		__sync_fetch_and_add(recorded ? &totals->events_dropped : &totals->unrecorded, 1);
}

static __always_inline void ask(__u64 cgroup_id, __u64 parent_id, struct cgroup *cgrp)
{
	struct kabpf_event *event = bpf_ringbuf_reserve(&kabpf_events, sizeof(*event), 0);

	if (!event) {
		count_total(true);
		return;
	}
	event->time_ns = bpf_ktime_get_ns();
	event->cgroup_id = cgroup_id;
	event->parent_id = parent_id;
	bpf_probe_read_kernel_str(event->name, sizeof(event->name), cgrp->kn->name);
	bpf_ringbuf_submit(event, 0);
}

#endif
