// SPDX-License-Identifier: MIT
/*
 * Has one connection, as the words before the port ask for:
 *
 *   client [WORD...] PORT
 *
 *   inet6, nonblocking, datagram, raw   which kind of socket is connected to PORT of loopback
 *   accept                              listens on a port of its own, which it prints, and accepts
 *   inherited                           goes on with descriptor 3, which is a socket already
 *   20-before, off-before               sets TCP_KEEPIDLE to 20 s, or SO_KEEPALIVE off, before that
 *   20-after, off-after                 the same when it is connected
 *
 * Prints "ready" and waits to be killed.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define INHERITED 3
#define DEADLINE_MS 10000

static int words;
static char **word;

static int asked(const char *what)
{
	for (int i = 0; i < words; i++)
		if (!strcmp(word[i], what))
			return 1;
	return 0;
}

static void check(int result, const char *step)
{
	if (result < 0) {
		perror(step);
		exit(1);
	}
}

static void set(int fd, int level, int name, int value)
{
	check(setsockopt(fd, level, name, &value, sizeof(value)), "setsockopt");
}

static void set_own(int fd, const char *idle, const char *off)
{
	if (asked(idle)) {
		set(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
		set(fd, IPPROTO_TCP, TCP_KEEPIDLE, 20);
	}
	if (asked(off))
		set(fd, SOL_SOCKET, SO_KEEPALIVE, 0);
}

static int opened(void)
{
	int family = asked("inet6") ? AF_INET6 : AF_INET;
	int kind = asked("nonblocking") ? SOCK_NONBLOCK | SOCK_CLOEXEC : 0;

	if (asked("inherited"))
		return INHERITED;
	if (asked("datagram"))
		return socket(family, SOCK_DGRAM | kind, 0);
	if (asked("raw"))
		return socket(family, SOCK_RAW | kind, IPPROTO_ICMP);
	return socket(family, SOCK_STREAM | kind, 0);
}

static void connect_to(int fd, int port)
{
	struct sockaddr_in6 v6 = { .sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT };
	struct sockaddr_in v4 = { .sin_family = AF_INET, .sin_addr = { htonl(INADDR_LOOPBACK) } };
	struct pollfd writable = { .fd = fd, .events = POLLOUT };
	int is_v6 = asked("inet6"), result;

	v4.sin_port = v6.sin6_port = htons(port);
	result = connect(fd, is_v6 ? (struct sockaddr *)&v6 : (struct sockaddr *)&v4,
			 is_v6 ? sizeof(v6) : sizeof(v4));
	if (result && errno == EINPROGRESS)
		result = poll(&writable, 1, DEADLINE_MS) == 1 ? 0 : -1;
	check(result, "connect");
}

static int accepted(int fd)
{
	struct sockaddr_in own;
	socklen_t size = sizeof(own);

	check(listen(fd, 16), "listen");
	check(getsockname(fd, (struct sockaddr *)&own, &size), "getsockname");
	printf("%d\n", ntohs(own.sin_port));
	fflush(stdout);
	return accept(fd, NULL, NULL);
}

int main(int argc, char **argv)
{
	int fd;

	words = argc - 1;
	word = argv + 1;
	fd = opened();
	check(fd, "socket");
	set_own(fd, "20-before", "off-before");
	if (asked("accept"))
		fd = accepted(fd);
	else
		connect_to(fd, argc > 1 ? atoi(argv[argc - 1]) : 0);
	check(fd, "accept");
	set_own(fd, "20-after", "off-after");
	puts("ready");
	fflush(stdout);
	for (;;)
		pause();
}
