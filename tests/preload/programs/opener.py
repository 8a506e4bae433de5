"""Opens a socket and becomes another program, which has it as descriptor 3:

    opener.py socket|listener CGROUP COMMAND...

A listener listens on a port of loopback. Between the two it moves to the cgroup."""

import os
import socket
import sys

INHERITED = 3

opened = socket.socket()
if sys.argv[1] == "listener":
    opened.bind(("127.0.0.1", 0))
    opened.listen()
with open(f"{sys.argv[2]}/cgroup.procs", "w") as procs:
    procs.write("0")
os.dup2(opened.fileno(), INHERITED)
os.set_inheritable(INHERITED, True)  # dup2() does nothing if it is 3 already
os.execvp(sys.argv[3], sys.argv[3:])
