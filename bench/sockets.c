// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * The sockets that are measured; bench.py and its modules start it and read what it prints.
 *
 * cycle CPU TURNS SOCK_OPS SETSOCKOPT CGROUP [own]
 *
 *     Connects, accepts and closes over and over, on one CPU. The descriptors are of programs to
 *     attach to CGROUP's, or -1. With `own` it sets the options itself.
 *
 * calls CPU TURNS SOCK_OPS SETSOCKOPT CGROUP nodelay|idle
 *
 *     Sets that option of a connection over and over, likewise.
 *
 * hold COUNT PORT NETWORK
 *
 *     Keeps so many connections, to 127.0.NETWORK.x:PORT, until standard input ends.
 *
 * load RATE SECONDS
 *
 *     Connects, accepts and closes so often a second; prints the number of connections, and the
 *     median of a cycle in nanoseconds.
 *
 * born DIRECTORY IDLE
 *
 *     Makes a cgroup, and says when a process in it saw the idle time on its connections.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/sched.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* As in connections.py. */
#define IDLE_S 60
#define INTERVAL_S 10
#define PROBES 6
#define USER_TIMEOUT_MS 120000

#define WARM_UP 4
#define TURN 20 /* cycles: about 400 us */
#define CALLS 1000 /* in a turn: about 200 us */
#define BACKLOG 4096
#define PER_ADDRESS 20000
#define BORN_LIMIT_NS 2000000000ULL

static unsigned long long now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

static void set(int fd, int level, int name, int value)
{
	if (setsockopt(fd, level, name, &value, sizeof(value)))
		err(1, "setsockopt %d", name);
}

static int get(int fd, int level, int name)
{
	socklen_t size = sizeof(int);
	int value;

	if (getsockopt(fd, level, name, &value, &size))
		err(1, "getsockopt %d", name);
	return value;
}

static void set_own_options(int fd)
{
	set(fd, IPPROTO_TCP, TCP_KEEPIDLE, IDLE_S);
	set(fd, IPPROTO_TCP, TCP_KEEPINTVL, INTERVAL_S);
	set(fd, IPPROTO_TCP, TCP_KEEPCNT, PROBES);
	set(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, USER_TIMEOUT_MS);
	set(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
}

/* The idle time, 0 where keepalive is off. */
static int idle(int fd)
{
	return get(fd, SOL_SOCKET, SO_KEEPALIVE) ? get(fd, IPPROTO_TCP, TCP_KEEPIDLE) : 0;
}

/* Only the C library's function is one that a preloaded library may replace. */
static int new_socket(bool by_library)
{
	int type = SOCK_STREAM | SOCK_CLOEXEC;
	int fd = by_library ? socket(AF_INET, type, 0) : syscall(SYS_socket, AF_INET, type, 0);

	if (fd < 0)
		err(1, "socket");
	return fd;
}

static int new_listener(struct sockaddr_in *address, bool by_library)
{
	socklen_t size = sizeof(*address);
	int fd = new_socket(by_library);

	/* The connections of an earlier measurement may still be closing. */
	set(fd, SOL_SOCKET, SO_REUSEADDR, 1);
	if (bind(fd, (struct sockaddr *)address, size))
		err(1, "bind");
	if (listen(fd, BACKLOG))
		err(1, "listen");
	if (getsockname(fd, (struct sockaddr *)address, &size))
		err(1, "getsockname");
	return fd;
}

static struct sockaddr_in loopback(int port)
{
	return (struct sockaddr_in){
		.sin_family = AF_INET,
		.sin_port = htons(port),
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK),
	};
}

/* A reset at close leaves no time-wait sockets behind. */
static int connect_to(struct sockaddr_in *address, bool by_library, bool own)
{
	struct linger reset = { .l_onoff = 1 };
	int fd = new_socket(by_library);

	if (setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset)))
		err(1, "setsockopt SO_LINGER");
	if (own)
		set_own_options(fd);
	if (connect(fd, (struct sockaddr *)address, sizeof(*address)))
		err(1, "connect");
	return fd;
}

static int accept_from(int listener, bool own)
{
	int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

	if (fd < 0)
		err(1, "accept");
	if (own)
		set_own_options(fd);
	return fd;
}

static unsigned int *new_array(int count)
{
	unsigned int *array = calloc(count, sizeof(*array));

	if (!array)
		err(1, "calloc");
	return array;
}

static int compare(const void *left, const void *right)
{
	unsigned int a = *(const unsigned int *)left, b = *(const unsigned int *)right;

	return (a > b) - (a < b);
}

/* Descriptors of programs and of the cgroup they are attached to. */
struct programs {
	int sock_ops; /* -1: none; so the next */
	int setsockopt;
	int cgroup;
	int links[2];
};

static int linked(int program, int cgroup, int type)
{
	union bpf_attr attributes = {};
	int link;

	if (program < 0)
		return -1;
	attributes.link_create.prog_fd = program;
	attributes.link_create.target_fd = cgroup;
	attributes.link_create.attach_type = type;
	link = syscall(SYS_bpf, BPF_LINK_CREATE, &attributes, sizeof(attributes));
	if (link < 0)
		err(1, "BPF_LINK_CREATE");
	return link;
}

static void attach(struct programs *programs)
{
	programs->links[0] = linked(programs->sock_ops, programs->cgroup, BPF_CGROUP_SOCK_OPS);
	programs->links[1] = linked(programs->setsockopt, programs->cgroup, BPF_CGROUP_SETSOCKOPT);
}

static void detach(struct programs *programs)
{
	close(programs->links[0]);
	close(programs->links[1]);
}

static void stay_on(int cpu)
{
	cpu_set_t only;

	CPU_ZERO(&only);
	CPU_SET(cpu, &only);
	if (sched_setaffinity(0, sizeof(only), &only))
		err(1, "sched_setaffinity %d", cpu);
}

/* 0 1 1 0 over and over; 0 1 at the end. */
static int way_of(int turn, int turns)
{
	return ((turn ^ turn >> 1) ^ (turns - 1)) & 1;
}

static void print_median(unsigned int *values, int count)
{
	qsort(values, count, sizeof(*values), compare);
	printf(" %u", values[count / 2]);
}

static void print_options(int fd)
{
	printf(" %d %d", idle(fd), get(fd, IPPROTO_TCP, TCP_USER_TIMEOUT));
}

/*
 * Way 0 has no options and no program; way 1 has what the arguments and a preloaded library say. In
 * turns, because the machine's speed changes all the time, and in one process, because two differ
 * by where their memory lies. Prints for each way the idle time and the user timeout of a client
 * and of an accepted socket; then for each way the median of a cycle in nanoseconds.
 */
static void cycle(int cpu, int turns, struct programs *programs, bool own)
{
	unsigned int *took_ns[2];
	struct sockaddr_in addresses[2] = { loopback(0), loopback(0) };
	int listeners[2], client, accepted;

	for (int way = 0; way < 2; way++)
		took_ns[way] = new_array(turns * TURN);
	stay_on(cpu);
	listeners[0] = new_listener(&addresses[0], false);
	attach(programs);
	listeners[1] = new_listener(&addresses[1], true);
	detach(programs);
	for (int i = 0; i < 2 * turns; i++) {
		int way = way_of(i, turns);

		if (way)
			attach(programs);
		for (int j = -WARM_UP; j < TURN; j++) {
			unsigned long long began = now_ns();

			client = connect_to(&addresses[way], way, way && own);
			accepted = accept_from(listeners[way], way && own);
			if (i >= 2 * turns - 2 && j == TURN - 1) {
				print_options(client);
				print_options(accepted);
			}
			close(client);
			close(accepted);
			if (j >= 0)
				took_ns[way][i / 2 * TURN + j] = now_ns() - began;
		}
		if (way)
			detach(programs);
	}
	for (int way = 0; way < 2; way++)
		print_median(took_ns[way], turns * TURN);
	printf("\n");
}

/* As `cycle`, with one connection for each way. Prints for each way the option's value in the end;
 * then the median of a turn of CALLS calls in nanoseconds. */
static void calls(int cpu, int turns, struct programs *programs, const char *option)
{
	int name = strcmp(option, "idle") ? TCP_NODELAY : TCP_KEEPIDLE;
	struct sockaddr_in address = loopback(0);
	int listener, clients[2];
	unsigned int *took_ns[2];

	stay_on(cpu);
	listener = new_listener(&address, false);
	for (int way = 0; way < 2; way++) {
		took_ns[way] = new_array(turns);
		if (way)
			attach(programs);
		clients[way] = connect_to(&address, false, false);
		set(clients[way], SOL_SOCKET, SO_KEEPALIVE, 1);
		accept_from(listener, false);
	}
	detach(programs);
	for (int i = 0; i < 2 * turns; i++) {
		int way = way_of(i, turns);
		unsigned long long began;

		if (way)
			attach(programs);
		began = now_ns();
		for (int j = 0; j < CALLS; j++)
			set(clients[way], IPPROTO_TCP, name, 1);
		took_ns[way][i / 2] = now_ns() - began;
		if (way)
			detach(programs);
	}
	for (int way = 0; way < 2; way++)
		printf(" %d", get(clients[way], IPPROTO_TCP, name));
	for (int way = 0; way < 2; way++)
		print_median(took_ns[way], turns);
	printf("\n");
}

/* Says 0 when all are open; then a line with an idle time is answered by the number of sockets
 * that have it. */
static void hold(int count, int port, int network)
{
	struct sockaddr_in anywhere = loopback(port), address = anywhere;
	struct rlimit limit = { 2 * count + 64, 2 * count + 64 };
	unsigned int *fds = new_array(2 * count);
	int listener, wanted = 0, found = 0;

	if (setrlimit(RLIMIT_NOFILE, &limit))
		err(1, "setrlimit RLIMIT_NOFILE %d", 2 * count + 64);
	anywhere.sin_addr.s_addr = htonl(INADDR_ANY);
	listener = new_listener(&anywhere, false);
	for (int i = 0; i < count; i++) {
		/* An address has fewer ports than there are connections. */
		address.sin_addr.s_addr = htonl((127 << 24) + (network << 8) + 1 + i / PER_ADDRESS);
		fds[2 * i] = connect_to(&address, false, false);
		fds[2 * i + 1] = accept_from(listener, false);
	}
	do {
		printf("%d\n", found);
		fflush(stdout);
		if (scanf("%d", &wanted) != 1)
			break;
		found = 0;
		for (int i = 0; i < 2 * count; i++)
			found += idle(fds[i]) == wanted;
	} while (true);
}

static void load(int rate, int seconds)
{
	unsigned long long began = now_ns(), end = began + seconds * 1000000000ULL;
	struct sockaddr_in address = loopback(0);
	int listener = new_listener(&address, false);
	unsigned int *took_ns = new_array(rate * seconds);
	int done = 0;

	for (; done < rate * seconds && now_ns() < end; done++) {
		unsigned long long due = began + done * 1000000000ULL / rate, now = now_ns();
		int client, accepted;

		for (; now < due; now = now_ns())
			usleep((due - now) / 1000);
		client = connect_to(&address, false, false);
		accepted = accept_from(listener, false);
		close(client);
		close(accepted);
		took_ns[done] = now_ns() - now;
	}
	printf("%d", done);
	print_median(took_ns, done);
	printf("\n");
}

/* In the new cgroup: prints the nanoseconds from `made_ns` until a new connection had the idle
 * time, until the first one had it, and whether the first had it from the start. */
static void look(struct sockaddr_in *address, int listener, int wanted, unsigned long long made_ns)
{
	int first = connect_to(address, false, false),
	    first_accepted = accept_from(listener, false);
	bool at_once = idle(first) == wanted;
	unsigned long long fresh_ns = 0, first_ns = 0, passed_ns = 0;

	while (!(fresh_ns && first_ns)) {
		int client = connect_to(address, false, false),
		    accepted = accept_from(listener, false);

		passed_ns = now_ns() - made_ns;
		if (passed_ns > BORN_LIMIT_NS)
			errx(1, "no idle time of %d s after 2 s", wanted);
		if (!fresh_ns && idle(client) == wanted)
			fresh_ns = passed_ns;
		if (!first_ns && idle(first) == wanted)
			first_ns = passed_ns;
		close(client);
		close(accepted);
	}
	close(first);
	close(first_accepted);
	printf("%llu %llu %d\n", fresh_ns, first_ns, at_once);
}

/* Makes the cgroup, and starts a process inside it as systemd does a service. */
static void born(const char *directory, int wanted)
{
	struct sockaddr_in address = loopback(0);
	struct clone_args arguments = { .flags = CLONE_INTO_CGROUP, .exit_signal = SIGCHLD };
	int listener = new_listener(&address, false), status;
	unsigned long long made_ns;
	pid_t child;

	if (mkdir(directory, 0755))
		err(1, "mkdir %s", directory);
	made_ns = now_ns();
	arguments.cgroup = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	child = syscall(SYS_clone3, &arguments, sizeof(arguments));
	if (child < 0)
		err(1, "clone3");
	if (child == 0) {
		look(&address, listener, wanted, made_ns);
		exit(0);
	}
	if (waitpid(child, &status, 0) != child || status)
		errx(1, "the process in %s failed", directory);
	if (rmdir(directory))
		err(1, "rmdir %s", directory);
}

int main(int argc, char **argv)
{
	struct programs programs;

	if (argc >= 7)
		programs = (struct programs){ atoi(argv[4]), atoi(argv[5]), atoi(argv[6]) };
	if (argc >= 7 && !strcmp(argv[1], "cycle"))
		cycle(atoi(argv[2]), atoi(argv[3]), &programs, argc > 7);
	else if (argc == 8 && !strcmp(argv[1], "calls"))
		calls(atoi(argv[2]), atoi(argv[3]), &programs, argv[7]);
	else if (argc == 5 && !strcmp(argv[1], "hold"))
		hold(atoi(argv[2]), atoi(argv[3]), atoi(argv[4]));
	else if (argc == 4 && !strcmp(argv[1], "load"))
		load(atoi(argv[2]), atoi(argv[3]));
	else if (argc == 4 && !strcmp(argv[1], "born"))
		born(argv[2], atoi(argv[3]));
	else
		errx(2, "wrong arguments, expected cycle, calls, hold, load or born with theirs");
	return 0;
}
