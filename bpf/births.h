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

/* The number of a name that selectors spell out, or 0. What is in front of the name is overwritten,
 * and the name itself where it has several pieces. */
static __always_inline __u64 number_of(char *name)
{
	__u64 number = 0, *found;
	int at;

	for (at = 0; at < KABPF_NAME; at += KABPF_PIECE) {
		bool is_last = !name[at + KABPF_PIECE - 1];
		struct kabpf_piece *piece = (void *)(name + at - sizeof(piece->above));

		piece->above = number;
		found = bpf_map_lookup_elem(&kabpf_names, piece);
		if (!found)
			return 0;
		number = *found;
		if (is_last)
			return number;
	}
	return 0;
}

/* The number of the set of globs that match the name, or 0. */
static __always_inline __u64 set_of(const char *name, __u32 generation)
{
	__u32 state, cell, number = 0, i;
	struct kabpf_globs_head *head;
	struct kabpf_block *block;
	void *blocks;

	blocks = bpf_map_lookup_elem(&kabpf_globs, &generation);
	if (!blocks)
		return 0;
	block = bpf_map_lookup_elem(blocks, &number);
	if (!block)
		return 0;
	head = (void *)block;
	state = head->first;
	for (i = 0; i < KABPF_NAME; i++) {
		__u8 byte = name[i];

		/* A sum: clang masks the parts of an "or" one by one, in whose bounds Linux 6.1
		 * does not believe. */
		cell = (state << (head->shift & 15)) + head->classes[byte];
		if (cell / KABPF_CELLS != number) {
			number = cell / KABPF_CELLS;
			block = bpf_map_lookup_elem(blocks, &number);
			if (!block)
				return 0;
		}
		state = block->cells[cell % KABPF_CELLS];
		if (!byte)
			return state;
	}
	return 0;
}

static __always_inline struct kabpf_birth *find_step(__u64 state, __u64 name)
{
	struct kabpf_step step = { .state = state, .name = name };

	return bpf_map_lookup_elem(&kabpf_births, &step);
}

/* This name here; or else this name anywhere and any name here together, of which the stronger
 * selector gives the policy. For a name that selectors don't spell out, neither here nor anywhere,
 * the set of globs that match it stands. False where nothing is known of such a child. */
static __always_inline bool find_birth(struct kabpf_birth *birth, char *name, __u64 state)
{
	__u32 generation = state % KABPF_GENERATIONS;
	__u64 anywhere = KABPF_STATE_ANYWHERE | generation, number, set;
	struct kabpf_birth *found = NULL, *rest;
	bool is_set = false;

	set = set_of(name, generation);
	number = number_of(name);
	if (number) {
		found = find_step(state, number);
		if (found)
			goto alone;
		found = find_step(anywhere, number);
	}
	if (!found && set) {
		found = find_step(state, set);
		if (found)
			goto alone;
		found = find_step(anywhere, set);
		is_set = true;
	}
	rest = find_step(state, 0);
	if (!found)
		found = rest;
	if (!found)
		return false;
	*birth = *found;
	if (!rest)
		return true;
	if (is_set && rest->ask)
		birth->ask = 1;
	if (birth->state == anywhere)
		birth->state = rest->state;
	if (rest->strength > birth->strength) {
		birth->policy_id = rest->policy_id;
		birth->strength = rest->strength;
	}
	return true;
alone:
	*birth = *found;
	return true;
}

static long forget_this(void *map, __u64 *id, struct kabpf_removed *removed, void *unused)
{
	__u64 key = *id;

	bpf_map_delete_elem(&kabpf_cgroups, &key);
	bpf_map_delete_elem(&kabpf_removed, &key);
	return 1; /* and no other */
}

/* Makes room where there is none: for a cgroup that is there, or was removed later. */
__noinline int kabpf_forget_removed(void)
{
	return bpf_for_each_map_elem(&kabpf_removed, forget_this, NULL, 0);
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
