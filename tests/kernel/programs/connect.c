// SPDX-License-Identifier: MIT
/*
 * Connects to 127.0.0.1 and the given port, and prints the socket's five options as JSON. With
 * -DRAW it makes its system calls itself, as Go programs do: no function of libc sees the socket.
 */
#ifdef RAW
#define SOCKET(...) syscall(SYS_socket, __VA_ARGS__)
#define CONNECT(...) syscall(SYS_connect, __VA_ARGS__)
#define GETSOCKOPT(...) syscall(SYS_getsockopt, __VA_ARGS__)
#else
#define SOCKET socket
#define CONNECT connect
#endif

#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "options.h"

int main(int argc, char **argv)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_addr = { htonl(INADDR_LOOPBACK) } };
	int fd = SOCKET(AF_INET, SOCK_STREAM, 0);

	to.sin_port = htons(argc > 1 ? atoi(argv[1]) : 0);
	if (CONNECT(fd, (struct sockaddr *)&to, sizeof(to))) {
		perror("connect");
		return 1;
	}
	printf("{");
	print_options(fd);
	printf(", \"euid\": %d}\n", (int)geteuid());
	return 0;
}
