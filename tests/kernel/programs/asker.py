"""Asks at a Unix socket: sends what is on standard input, and writes what is answered until the
other end is done.

  asker.py SOCKET"""

import socket
import sys

with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(sys.argv[1])
    try:
        connection.sendall(sys.stdin.buffer.read())
        connection.shutdown(socket.SHUT_WR)
        while answer := connection.recv(65536):
            sys.stdout.buffer.write(answer)
    except (BrokenPipeError, ConnectionResetError):
        pass
