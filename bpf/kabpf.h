/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/*
 * What the programs in kabpf.bpf.c and kabpf/dataplane.py both know: sizes, and the layout of every
 * map key, map value and event. There is no other contract between them.
 */
#ifndef KABPF_H
#define KABPF_H

#include <linux/types.h>

/* Policies in force at once, old and new ones together while a change is applied. */
#define KABPF_POLICIES 4096

/* As many cgroups as the memory controller can number (16 bits). */
#define KABPF_CGROUPS 65536

#define KABPF_BIRTHS 65536

/* A directory name, and with it a unit name, has at most 255 bytes (NAME_MAX). */
#define KABPF_NAME 256

/* Bytes; the events of about 900 births that nobody has read yet. */
#define KABPF_EVENTS (256 * 1024)

/* The state of a cgroup that only user space can resolve; so are the cgroups below it. */
#define KABPF_STATE_UNKNOWN 0

/* The state from which only selectors that apply anywhere in the tree go on. */
#define KABPF_STATE_ANYWHERE 1

/* A policy as user space resolved it. Never changed while a cgroup refers to it. */
struct kabpf_policy {
	__u32 keepalive; /* 0: leave the sockets alone */
	__u32 idle_s; /* this and the next three: 0 leaves the option alone */
	__u32 interval_s;
	__u32 probes;
	__u32 user_timeout_ms;
	char name[KABPF_NAME]; /* for people; an unused slot of the array has none */
	__u32 reserved;
};

/* What kabpf knows of one cgroup; the key is the cgroup id. */
struct kabpf_cgroup {
	__u64 state; /* how far the selectors have matched its path */
	__u32 policy_id; /* 0: none */
	__u32 was_id; /* the policy whose values open sockets may still hold; 0: none */
	__u32 owed; /* 1: open sockets still wait for kabpf_retrofit */
	__u32 reserved;
};

/* A step from a cgroup to a child of this name; no name stands for every other name. */
struct kabpf_step {
	__u64 state;
	char name[KABPF_NAME];
};

struct kabpf_birth {
	__u64 state;
	__u32 policy_id; /* 0: the parent's */
	__u32 ask; /* 1: a glob that only user space can match might say otherwise */
};

struct kabpf_counters {
	__u64 established; /* connections established while the policy was in force */
	__u64 listening; /* listeners opened */
	__u64 retrofitted; /* open sockets that a retrofit changed */
	__u64 left; /* options left as the application had set them */
	__u64 failed; /* options that the kernel refused; kabpf_failures has the errnos */
	__u64 reserved[3]; /* a cache line each */
};

struct kabpf_failure {
	__u32 policy_id;
	__u32 error; /* errno, positive */
};

/* One for the whole data plane. */
struct kabpf_totals {
	__u64 build; /* a digest of the object file that the programs and maps come from */
	__u64 asked_in_vain; /* events lost because the ring buffer was full */
	__u64 unrecorded; /* births lost because the map of cgroups was full */
};

/* A cgroup that user space has to resolve. */
struct kabpf_event {
	__u64 cgroup_id;
	__u64 parent_id;
	char name[KABPF_NAME];
};

#endif
