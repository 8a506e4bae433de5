"""Connects by a process of another user namespace, which ends, and has another one take its number;
then a third one says what `kabpf.requests.peercred` takes who connected for. As root, in a pid
namespace of its own.

  reused.py UID OTHER_UID OPTION    OPTION: the number of SO_PEERPIDFD, or one that is none"""

import socket
import subprocess
import sys
from pathlib import Path

SLEEP = ["sleep", "60"]
PYTHON = ("/usr/bin/python3", "-I", "-S", "-c")
ADDRESS = "\0kabpf-reused"
CONNECT = f"import socket; socket.socket(socket.AF_UNIX).connect({ADDRESS!a})"
LOOK = (
    "import socket, sys\n"
    "from kabpf.requests import peercred\n"
    "peercred.SO_PEERPIDFD = int(sys.argv[1])\n"
    "print(peercred.peer(socket.socket(fileno=0)))\n"
)

uid, other_uid, option = sys.argv[1:]
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(ADDRESS)
    listener.listen()
    client = subprocess.Popen(["unshare", "--user", *PYTHON, CONNECT], user=int(uid))
    connection, _ = listener.accept()
    client.wait()
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(client.pid - 1))
    other = subprocess.Popen(SLEEP, user=int(other_uid))
    try:
        assert other.pid == client.pid
        subprocess.run([sys.executable, "-P", "-c", LOOK, option], stdin=connection, check=True)
    finally:
        other.kill()
