"""Connects to the port of loopback that is its argument, says "ready", and waits to be killed."""

import signal
import socket
import sys

connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
print("ready", flush=True)
signal.pause()
