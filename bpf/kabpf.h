/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/*
 * What the programs in kabpf.bpf.c and kabpf/kernel/abi.py both know: sizes, and the layout of
 * the constants and of every map key, map value and event. There is no other contract between them.
 */
#ifndef KABPF_H
#define KABPF_H

#include <linux/types.h>

/* Policies active at once, old and new ones together while a change is applied. */
#define KABPF_POLICIES 4096

/* As many cgroups as the memory controller can number (16 bits). */
#define KABPF_CGROUPS 65536

/* Removed ones that are remembered as long as sockets, or whatever else, refer to them. */
#define KABPF_REMOVED 16384

/* Rules for births, of one generation of globs; while a change of globs is applied two are there.
 */
#define KABPF_BIRTHS 65536

/* A directory name, and with it a unit name, has at most 255 bytes (NAME_MAX). */
#define KABPF_NAME 256

/* Bytes of a name that are looked up at once; a part of KABPF_NAME. */
#define KABPF_PIECE 64

/* Bytes; the events of about 900 births that nobody has read yet. */
#define KABPF_EVENTS (256 * 1024)

/* Of the layout of everything here: another one when any of it changes. */
#define KABPF_LAYOUT 10

/* The level of an option of setsockopt(2) that has kabpf_retrofit_one see to the socket. No
 * protocol has it, so that the kernel refuses it where that is not linked. */
#define KABPF_LEVEL 0x6b61

/* What that copies of the kernel's struct tcp_sock; 2,500 bytes, and more in a kernel for
 * debugging. */
#define KABPF_COPY 4096

/* Former policies that a cgroup remembers. */
#define KABPF_FORMER 4

/* Monitors at once. */
#define KABPF_MONITORS 8

/* The one of them that hears only of policies with KABPF_LOG, by a ring buffer of so many bytes. */
#define KABPF_LOGGER 0
#define KABPF_LOG_BYTES (256 * 1024)
/* Events of one policy in a quarter of a second: four times what is written. */
#define KABPF_LOG_PART 256

#define KABPF_NETWORKS 65536
#define KABPF_PORTS 65536

/* The state of a cgroup that only user space can resolve; so are the cgroups below it. */
#define KABPF_STATE_UNKNOWN 0

/* The state from which only selectors that apply anywhere in the tree go on; and below this bit of
 * every other state, the generation of globs that it belongs to. So a birth goes on by the globs
 * that its parent was resolved by. */
#define KABPF_STATE_ANYWHERE 8
#define KABPF_GENERATIONS 8

/* Selectors of at least this strength are exact paths. */
#define KABPF_PATHS 0x60001

/* Cells of 16 bits in a block of the automaton for globs. */
#define KABPF_CELLS 16384

/* What user space finds out before it loads the programs. */
struct kabpf_constants {
	__u32 hz; /* jiffies in a second */
	__u32 processors; /* that there may be */
};

/* What an option may be on a socket: one value if both are equal; left alone if both are 0. */
struct kabpf_range {
	__u32 low;
	__u32 high; /* what an unset option becomes */
};

struct kabpf_options {
	__u32 keepalive; /* 0: leave the socket alone, and in other modes than fill turn it off */
	__u32 jitter_percent; /* idle is spread over so much below its upper bound */
	struct kabpf_range idle_s;
	struct kabpf_range interval_s;
	struct kabpf_range probes;
	struct kabpf_range user_timeout_ms;
	__u32 syn_retries; /* 0: left alone */
	__u32 connect_timeout_ms; /* the user timeout until it is established; 0: none */
};

/* Where the application has an opinion: 0 its values stay, 1 the policy's count when a connection
 * is established, 2 and ever after. */
#define KABPF_FILL 0
#define KABPF_OVERRIDE 1
#define KABPF_ENFORCE 2

#define KABPF_OUT 1 /* outgoing connections are meant */
#define KABPF_IN 2 /* accepted connections are meant */
#define KABPF_LOOPBACK 4 /* connections over loopback are meant */
#define KABPF_PLAIN 8 /* every connection is meant, with the policy's own options */
#define KABPF_LISTENERS 16 /* keepalive for listeners, so that what they accept has it already */
#define KABPF_EXISTING 32 /* for user space: open sockets were meant */
#define KABPF_LOG 64 /* what happens to its sockets is told to the log */

/* A policy as user space resolved it. Never changed while a cgroup refers to it. */
struct kabpf_policy {
	struct kabpf_options options;
	__u32 mode;
	__u32 flags;
	__u64 destinations; /* a digest of its rows in kabpf_networks and kabpf_ports; 0: none */
	char name[KABPF_NAME]; /* for people; an unused slot of the array has none */
};

/* A peer's network, by policy; the value is the number of its rows in kabpf_ports. */
struct kabpf_network {
	__u32 bits; /* of what follows, that count: 32 and the network's */
	__u32 policy_id;
	__u8 address[16]; /* an IPv4 address is v4-mapped */
};

/* The options for a port of a network; 0 stands for every other port. */
struct kabpf_port {
	__u32 network;
	__u32 port;
};

/* What kabpf knows of one cgroup; the key is the cgroup id. */
struct kabpf_cgroup {
	__u64 state; /* how far the selectors have matched its path */
	__u32 policy_id; /* 0: none */
	__u8 owed; /* 1: open sockets still wait for kabpf_retrofit */
	__u8 succeeds; /* 1: by then each of them had what was_id[0] gives */
	__u8 forgot; /* 1: policies before those in was_id are not known any more */
	__u8 contained; /* 1: in a container that a selector names; paths alone go on below */
	__u32 was_id[KABPF_FORMER]; /* policies whose values sockets may still hold; 0: none */
};

/* A piece of a name that a selector spells out; the value is the number of the name up to its end.
 * The last piece of a name ends with a NUL, and the rest is zeros. */
struct kabpf_piece {
	__u64 above; /* the number of the name before it; 0: the first */
	char text[KABPF_PIECE];
};

/* Some of the automaton over the bytes of a name. A state has a row of 1 << shift cells, one for
 * each class of bytes, which say the next state; that of the byte behind the name says the number
 * of the set of globs that match, 0 for none. Blocks hold whole rows. */
struct kabpf_block {
	__u16 cells[KABPF_CELLS];
};

/* What the first block begins with, in place of its first rows. */
struct kabpf_globs_head {
	__u8 classes[256]; /* by byte */
	__u16 shift;
	__u16 first; /* state */
};

/* Where a cgroup was that is removed, and still has an entry; the key is the cgroup id. */
struct kabpf_removed {
	__u64 parent_id;
	char name[KABPF_NAME];
};

/* A step from a cgroup to a child. */
struct kabpf_step {
	__u64 state;
	__u64 name; /* the number of a name or of a set of globs; 0: any other name */
};

struct kabpf_birth {
	__u64 state;
	__u32 policy_id; /* 0: the parent's */
	__u32 ask; /* 1: a glob that only user space can match might say otherwise */
	__u32 strength; /* of the policy's selector */
	__u32 reserved;
};

struct kabpf_counters {
	__u64 established; /* connections established while the policy was active */
	__u64 listening; /* listeners opened */
	__u64 updated; /* open sockets that a retrofit changed */
	__u64 kept; /* sockets that kept a value of the application's */
	__u64 ignored; /* setsockopt(2) calls of applications that changed nothing */
	__u64 clamped; /* the same, whose value was brought into the policy's range */
	__u64 turned_off; /* the same, that undid the policy; while they are watched */
	__u64 failed; /* options that the kernel refused; kabpf_failures has the errnos */
	__u64 timed_out; /* connections that ended because of keepalive or the user timeout */
	__u64 timed_out_by_keepalive; /* of these, because no probe was answered */
};

struct kabpf_failure {
	__u32 policy_id;
	__u32 error; /* errno, positive */
};

/* One for the whole data plane. */
struct kabpf_totals {
	__u32 layout; /* KABPF_LAYOUT; the first member in every version */
	__u16 before_syn; /* 1: a policy gives what kabpf_sockops sets before the SYN */
	__u16 setsockopt; /* 1: a policy needs kabpf_setsockopt, which has to be linked */
	__u64 build; /* a digest of the object file that the programs and maps come from */
	__u64 events_dropped; /* because the ring buffer was full */
	__u64 unrecorded; /* births lost because the map of cgroups was full */
};

/* A new cgroup: one that user space has to resolve, or for monitors. */
struct kabpf_event {
	__u64 time_ns; /* CLOCK_MONOTONIC */
	__u64 cgroup_id;
	__u64 parent_id;
	char name[KABPF_NAME];
};

/* What next_probe_ms says where no probe is due. */
#define KABPF_NEVER 0xffffffff

/* Who gave an option its value. */
#define KABPF_BY_SYSTEM 0 /* nobody: the sysctl's of its network namespace, or off */
#define KABPF_BY_APPLICATION 1
#define KABPF_BY_POLICY 2
#define KABPF_BY_FORMER 3 /* a policy that its cgroup had before */
#define KABPF_BY_UNKNOWN 4 /* the application, or a policy that is not known any more */

/* One socket, as kabpf_list writes it. */
struct kabpf_socket {
	__u64 cgroup_id;
	__u32 namespace; /* the inode number of its network namespace */
	__u32 policy_id; /* of its cgroup; 0: none */
	__u8 local[16]; /* both addresses: an IPv4 one is v4-mapped */
	__u8 remote[16];
	__u16 local_port;
	__u16 remote_port;
	__u16 family;
	__u8 state; /* as in tcp_states.h of the kernel */
	__u8 keepalive;
	__u32 idle_s; /* this and the next three: the active values */
	__u32 interval_s;
	__u32 probes;
	__u32 user_timeout_ms; /* 0: none */
	__u32 next_probe_ms; /* from now, if the connection stays silent */
	__u8 by[8]; /* idle, interval, probes, user timeout, keepalive */
	__u32 reserved;
};

#define KABPF_HELD 1 /* a process has the socket's lock */
#define KABPF_OWED 2 /* its cgroup's open sockets still wait for kabpf_retrofit */

/* A descriptor of a TCP socket, as kabpf_holders and kabpf_owed write it. */
struct kabpf_holder {
	__u64 cgroup_id; /* the socket's */
	__u64 inode; /* the socket's */
	__u32 namespace; /* the inode number of its network namespace */
	__u32 pid;
	__u32 descriptor;
	__u32 flags; /* KABPF_HELD and so on */
};

/* Why a connection failed. */
#define KABPF_KEEPALIVE 1 /* probes were not answered, for the user timeout where there is one */
#define KABPF_USER_TIMEOUT 2 /* data were not acknowledged, or could not be sent, for so long */
#define KABPF_RETRANSMISSION 3 /* data were not acknowledged */
#define KABPF_ZERO_WINDOW 4 /* data could not be sent */

/* What became of each option of a socket: so many bits each, in the order of kabpf_socket.by, the
 * SYN retries last. An errno; or that it was set; or kept as the application had it; or 0. */
#define KABPF_OUTCOME_BITS 10
#define KABPF_SET 1023
#define KABPF_KEPT 1022

/* What kabpf_report tells of. */
#define KABPF_NEW 0 /* a connection was established, or a socket listens */
#define KABPF_OPEN 1 /* kabpf_retrofit has updated it */
#define KABPF_IGNORED 2 /* a setsockopt(2) returned success and changed nothing */
#define KABPF_CLAMPED 3 /* a setsockopt(2) was brought into a range */
#define KABPF_TIMED_OUT 4 /* a connection failed */
#define KABPF_CALLED 5 /* connect(2), so that the process is known later */
#define KABPF_TURNED_OFF 6 /* a setsockopt(2) undid what the policy had set */

/* Something that happened to a socket of a covered cgroup, for monitors. A new cgroup is told of by
 * a kabpf_event. */
struct kabpf_report {
	__u64 time_ns; /* CLOCK_MONOTONIC */
	__u64 cgroup_id;
	__u64 outcomes; /* of a new or open socket */
	__u32 policy_id;
	__u32 pid; /* 0: unknown */
	char command[16];
	__u8 local[16]; /* both addresses: an IPv4 one is v4-mapped */
	__u8 remote[16];
	__u16 local_port;
	__u16 remote_port;
	__u32 namespace; /* the inode number of its network namespace */
	__u16 family;
	__u8 what;
	__u8 direction; /* KABPF_OUT or KABPF_IN; 0: a listener */
	__u32 keepalive; /* this and the next four: as the socket has them now */
	__u32 idle_s; /* 0, also below: not set on the socket */
	__u32 interval_s;
	__u32 probes;
	__u32 user_timeout_ms;
	__u32 option; /* of setsockopt(2), in the order of kabpf_socket.by */
	__u32 asked; /* what for, in the option's unit */
	__u32 reason; /* of a failed connection, as the next three */
	__u32 error; /* errno */
	__u32 silent_ms; /* since the last receipt */
	__u32 sent; /* probes, or retransmissions, that were not answered */
	__u32 closed_ms; /* since the first probe of the peer's closed window; 0: it was open */
	__u32 reserved;
};

#endif
