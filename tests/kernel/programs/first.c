// SPDX-License-Identifier: MIT
/*
 * The program of a container, linked statically: its first system calls connect a socket to a
 * listener of its own. It prints the socket's idle time (TCP_KEEPIDLE) at once, and after how many
 * microseconds that was EXPECTED, or -1 if it was not within 2 s. With an argument it then stays;
 * with "pause" it does that alone, and with "end" nothing.
 */
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#ifndef EXPECTED
#define EXPECTED 61
#endif

static int idle_of(int fd)
{
	int idle = -1;
	socklen_t size = sizeof(idle);

	getsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, &size);
	return idle;
}

static long now_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000L + now.tv_nsec / 1000;
}

int main(int argc, char **argv)
{
	struct sockaddr_in address = { .sin_family = AF_INET,
				       .sin_addr = { htonl(INADDR_LOOPBACK) } };
	socklen_t size = sizeof(address);
	int listener = socket(AF_INET, SOCK_STREAM, 0), client = socket(AF_INET, SOCK_STREAM, 0);

	if (argc > 1 && !strcmp(argv[1], "pause"))
		return pause();
	if (argc > 1 && !strcmp(argv[1], "end"))
		return 0;
	if (bind(listener, (struct sockaddr *)&address, size) || listen(listener, 1) ||
	    getsockname(listener, (struct sockaddr *)&address, &size) ||
	    connect(client, (struct sockaddr *)&address, size)) {
		perror("connect");
		return 1;
	}
	int first = idle_of(client);
	long begin = now_us(), after = 0;
	while (idle_of(client) != EXPECTED && after >= 0) {
		usleep(100);
		after = now_us() - begin < 2000000 ? now_us() - begin : -1;
	}
	printf("%d %ld\n", first, after);
	fflush(stdout);
	if (argc > 1)
		pause();
	return 0;
}
