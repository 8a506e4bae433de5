// SPDX-License-Identifier: MIT
/*
 * Makes the calls that the sockets of a language's run-time library make:
 *
 *   runtime go|java|hours|off before|after PORT
 *
 * Connects to PORT of 127.0.0.1, or with 0 listens, prints the port and accepts one connection;
 * sets its options before connect() or listen(), or after connect() or accept(); prints as JSON how
 * many of the calls were refused, and the connection's options.
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>

#include "options.h"

struct call {
	int level, name, value;
};

static const struct {
	const char *name;
	int family;
	struct call calls[6];
} runtimes[] = {
	/* newTCPConn() in net/tcpsock.go, since Go 1.23 */
	{ "go",
	  AF_INET,
	  { { IPPROTO_TCP, TCP_NODELAY, 1 },
	    { SOL_SOCKET, SO_KEEPALIVE, 1 },
	    { IPPROTO_TCP, TCP_KEEPIDLE, 15 },
	    { IPPROTO_TCP, TCP_KEEPINTVL, 15 },
	    { IPPROTO_TCP, TCP_KEEPCNT, 9 } } },
	/* Socket.setKeepAlive(true); every socket is one of IPv6. */
	{ "java", AF_INET6, { { SOL_SOCKET, SO_KEEPALIVE, 1 } } },
	/* The same, and ExtendedSocketOptions.TCP_KEEPIDLE. */
	{ "hours",
	  AF_INET6,
	  { { SOL_SOCKET, SO_KEEPALIVE, 1 }, { IPPROTO_TCP, TCP_KEEPIDLE, 7200 } } },
	{ "off", AF_INET, { { SOL_SOCKET, SO_KEEPALIVE, 0 } } },
};

static int refused;

static void set_options(int fd, const struct call *calls)
{
	for (; calls->name; calls++)
		refused += setsockopt(fd, calls->level, calls->name, &calls->value,
				      sizeof(calls->value)) != 0;
}

static socklen_t address(struct sockaddr_storage *to, int family, int port)
{
	struct sockaddr_in6 *v6 = (void *)to;
	struct sockaddr_in *v4 = (void *)to;

	memset(to, 0, sizeof(*to));
	if (family == AF_INET) {
		v4->sin_family = family;
		v4->sin_port = htons(port);
		v4->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
		return sizeof(*v4);
	}
	v6->sin6_family = family;
	v6->sin6_port = htons(port);
	v6->sin6_addr.s6_addr[10] = v6->sin6_addr.s6_addr[11] = 0xff;
	v6->sin6_addr.s6_addr[12] = 127;
	v6->sin6_addr.s6_addr[15] = 1;
	return sizeof(*v6);
}

static int accepted(int fd)
{
	struct sockaddr_storage own;
	socklen_t size = sizeof(own);
	struct pollfd readable = { .fd = fd, .events = POLLIN };

	if (listen(fd, 16) || getsockname(fd, (struct sockaddr *)&own, &size))
		return -1;
	printf("%d\n", ntohs(((struct sockaddr_in *)&own)->sin_port));
	fflush(stdout);
	return poll(&readable, 1, 10000) == 1 ? accept(fd, NULL, NULL) : -1;
}

/* As both run-time libraries do it: without blocking a thread. */
static int connected(int fd, const struct sockaddr *to, socklen_t size)
{
	struct pollfd writable = { .fd = fd, .events = POLLOUT };

	if (connect(fd, to, size) && errno != EINPROGRESS)
		return -1;
	if (poll(&writable, 1, 10000) != 1 || option(fd, SOL_SOCKET, SO_ERROR))
		return -1;
	return fd;
}

int main(int argc, char **argv)
{
	struct sockaddr_storage to;
	int fd, port, before;
	socklen_t size;
	unsigned int i;

	if (argc != 4)
		return 2;
	for (i = 0; i < sizeof(runtimes) / sizeof(*runtimes); i++)
		if (!strcmp(runtimes[i].name, argv[1]))
			break;
	if (i == sizeof(runtimes) / sizeof(*runtimes))
		return 2;
	before = !strcmp(argv[2], "before");
	port = atoi(argv[3]);
	size = address(&to, runtimes[i].family, port);
	fd = socket(runtimes[i].family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (!port && bind(fd, (struct sockaddr *)&to, size))
		return 1;
	if (before)
		set_options(fd, runtimes[i].calls);
	fd = port ? connected(fd, (struct sockaddr *)&to, size) : accepted(fd);
	if (fd < 0) {
		perror(port ? "connect" : "accept");
		return 1;
	}
	if (!before)
		set_options(fd, runtimes[i].calls);
	printf("{\"refused\": %d, ", refused);
	print_options(fd);
	printf("}\n");
	return 0;
}
