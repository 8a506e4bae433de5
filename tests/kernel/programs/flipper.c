// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * Sets an option of a connected TCP socket from memory that another thread changes all the time.
 *
 *   flipper PORT LEVEL NAME FIRST SECOND LENGTH MILLISECONDS
 *
 * The value alternates between FIRST and SECOND; the length is in bytes. Writes each value that
 * getsockopt(2) has found after a call, once.
 */
#include <arpa/inet.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>

static _Atomic int *value;
static atomic_bool ended;
static int first, second;

static void *flip(void *unused)
{
	while (!ended) {
		*value = second;
		*value = first;
	}
	return unused;
}

static long long now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

int main(int argc, char **argv)
{
	struct sockaddr_in peer = { .sin_family = AF_INET };
	int fd, level, name, length, seen[16], count = 0, i;
	long long end;
	pthread_t other;

	if (argc != 8)
		return 2;
	peer.sin_port = htons(atoi(argv[1]));
	peer.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	level = atoi(argv[2]);
	name = atoi(argv[3]);
	first = atoi(argv[4]);
	second = atoi(argv[5]);
	length = atoi(argv[6]);
	value = calloc(1, length < 4 ? 4 : length);
	*value = first;
	fd = socket(AF_INET, SOCK_STREAM, 0);
	if (!value || fd < 0 || connect(fd, (void *)&peer, sizeof(peer)) ||
	    pthread_create(&other, NULL, flip, NULL))
		return 1;
	end = now_ms() + atoi(argv[7]);
	while (now_ms() < end) {
		socklen_t size = sizeof(int);
		int found;

		setsockopt(fd, level, name, (void *)value, length);
		if (getsockopt(fd, level, name, &found, &size))
			return 1;
		for (i = 0; i < count && seen[i] != found; i++)
			;
		if (i == count && count < 16) {
			seen[count++] = found;
			printf("%d\n", found);
		}
	}
	ended = true;
	pthread_join(other, NULL);
	return 0;
}
