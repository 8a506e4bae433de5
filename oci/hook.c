// SPDX-License-Identifier: MIT
/*
 * An OCI hook (createRuntime): tells kabpfd of a container whose processes are in its cgroup and
 * have not started yet, and waits for the answer, so that a policy that names it covers its first
 * socket.
 *
 * A container never fails to start by this: whatever goes wrong, and after 0.2 s in any case, it
 * ends with status 0 and has printed nothing.
 *
 * In: the container's state (runtime.md of the OCI runtime specification), all of it, as a runtime
 * may take a broken pipe for a failure. Out, to kabpfd: one line of JSON with id, cgroup, bundle
 * and pid.
 */

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#define DEADLINE_US 200000
#define STATE_MAX (8 << 20) /* bytes; annotations are in it */
#define CGROUP_MAX (64 << 10) /* bytes; a path may be longer than PATH_MAX */

#ifndef SOCKET
#define SOCKET "/run/kabpf/containers.socket"
#endif

/* A part of the state as it stands there. */
struct text {
	const char *start;
	size_t size;
};

static void give_up(int signal)
{
	(void)signal;
	_exit(0);
}

static void limit_time(void)
{
	struct itimerval timer = { .it_value.tv_usec = DEADLINE_US };
	sigset_t alarms;

	signal(SIGPIPE, SIG_IGN);
	signal(SIGALRM, give_up);
	sigemptyset(&alarms);
	sigaddset(&alarms, SIGALRM);
	sigprocmask(SIG_UNBLOCK, &alarms, NULL);
	setitimer(ITIMER_REAL, &timer, NULL);
}

/* All that can be read up to the end, with a NUL behind it; what has no room is read and dropped.
 */
static char *read_all(FILE *from, size_t room)
{
	char *text = malloc(room + 1), dropped[4096];

	if (!text)
		return NULL;
	size_t size = fread(text, 1, room, from);
	if (fread(dropped, 1, sizeof(dropped), from)) {
		while (fread(dropped, 1, sizeof(dropped), from))
			;
		size = 0; /* half a state tells nothing */
	}
	text[size] = 0;
	return text;
}

static const char *after_string(const char *at)
{
	for (at++; *at && *at != '"'; at++)
		if (*at == '\\' && at[1])
			at++;
	return *at ? at + 1 : at;
}

/* What follows a value and the blanks after it. */
static const char *after_value(const char *at)
{
	int depth = 0;

	if (!*at)
		return at;
	do {
		if (*at == '"') {
			at = after_string(at);
			continue;
		}
		depth += *at == '{' || *at == '[';
		depth -= *at == '}' || *at == ']';
		at++;
	} while (*at && (depth > 0 || !strchr(",}]", *at)));
	return at;
}

static const char *after_blanks(const char *at)
{
	return at + strspn(at, " \t\r\n");
}

/* A member of the outermost object; without size where it is not there. */
static struct text member(const char *state, const char *name)
{
	const char *at = after_blanks(state);

	while (*at == '{' || *at == ',') {
		const char *key = after_blanks(at + 1);
		if (*key != '"')
			break;
		const char *end = after_string(key);
		const char *value = after_blanks(end);
		if (*value != ':')
			break;
		value = after_blanks(value + 1);
		at = after_value(value);
		const char *last = at; /* a line feed would end the request */
		while (last > value && strchr(" \t\r\n", last[-1]))
			last--;
		if ((size_t)(end - key) == strlen(name) + 2 &&
		    !strncmp(key + 1, name, strlen(name)))
			return (struct text){ value, last - value };
	}
	return (struct text){ "", 0 };
}

/* The path of a process in the cgroup2 tree, as /proc/PID/cgroup has it (cgroups(7)). */
static char *cgroup_of(long process)
{
	char file[64], *lines;
	FILE *from;

	snprintf(file, sizeof(file), "/proc/%ld/cgroup", process);
	from = fopen(file, "re");
	if (!from || !(lines = read_all(from, CGROUP_MAX)))
		return NULL;
	for (char *line = strtok(lines, "\n"); line; line = strtok(NULL, "\n"))
		if (!strncmp(line, "0::", 3))
			return line + 3;
	return NULL;
}

static void write_string(FILE *to, const char *text)
{
	fputc('"', to);
	for (; *text; text++) {
		unsigned char byte = *text;
		if (byte < ' ' || byte == '"' || byte == '\\')
			fprintf(to, "\\u%04x", byte);
		else
			fputc(byte, to);
	}
	fputc('"', to);
}

static FILE *open_socket(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX, .sun_path = SOCKET };
	int channel = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (channel < 0 || connect(channel, (struct sockaddr *)&address, sizeof(address)))
		return NULL;
	return fdopen(channel, "r+");
}

static void ask(const char *state)
{
	struct text id = member(state, "id"), bundle = member(state, "bundle");
	long process = strtol(member(state, "pid").start, NULL, 10);
	char *cgroup;
	FILE *kabpfd;

	if (*id.start != '"' || *bundle.start != '"' || process <= 0)
		return;
	/* Where no policy names containers there is no socket, and nothing else to do. */
	kabpfd = open_socket();
	if (!kabpfd || !(cgroup = cgroup_of(process)))
		return;
	fprintf(kabpfd, "{\"id\": %.*s, \"cgroup\": ", (int)id.size, id.start);
	write_string(kabpfd, cgroup);
	fprintf(kabpfd, ", \"bundle\": %.*s, \"pid\": %ld}\n", (int)bundle.size, bundle.start,
		process);
	fflush(kabpfd);
	for (int byte = 0; byte != EOF && byte != '\n';)
		byte = fgetc(kabpfd);
}

int main(void)
{
	limit_time();
	char *state = read_all(stdin, STATE_MAX);
	if (state)
		ask(state);
	_exit(0);
}
