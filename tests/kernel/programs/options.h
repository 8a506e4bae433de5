/* SPDX-License-Identifier: MIT */
/* A socket's five options as members of a JSON object. GETSOCKOPT may name another call. */
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <sys/socket.h>

#ifndef GETSOCKOPT
#define GETSOCKOPT getsockopt
#endif

static int option(int fd, int level, int name)
{
	int value = -1;
	socklen_t size = sizeof(value);

	GETSOCKOPT(fd, level, name, &value, &size);
	return value;
}

static void print_options(int fd)
{
	printf("\"keepalive\": %d, \"idle\": %d, \"interval\": %d, \"probes\": %d, "
	       "\"user_timeout\": %d",
	       option(fd, SOL_SOCKET, SO_KEEPALIVE), option(fd, IPPROTO_TCP, TCP_KEEPIDLE),
	       option(fd, IPPROTO_TCP, TCP_KEEPINTVL), option(fd, IPPROTO_TCP, TCP_KEEPCNT),
	       option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT));
}
