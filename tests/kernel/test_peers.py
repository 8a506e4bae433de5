"""Who is at the other end of a socket, where their process's number has come round."""

import errno
import os
import socket
import subprocess
import sys

import pytest
from harness import PROGRAMS

from kabpf.requests.peercred import SO_PEERPIDFD

UID, ROOT = 4242, 0
NO_OPTION = 32767  # as SO_PEERPIDFD is before Linux 6.5


def knows_option() -> bool:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            os.close(ours.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD))
        except OSError as error:
            assert error.errno == errno.ENOPROTOOPT
            return False
    return True


OTHERS = [(ROOT, SO_PEERPIDFD), (ROOT, NO_OPTION), *[(UID, SO_PEERPIDFD)] * knows_option()]


@pytest.mark.parametrize(("other_uid", "option"), OTHERS)
def test_process_that_took_the_number_does_not_count(other_uid, option):
    """One that left its user namespace by its end counts for no process outside that has its number
    then; where the kernel can't tell, for none of another user."""
    own = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    program = (sys.executable, "-P", PROGRAMS / "reused.py", UID, other_uid, option)
    done = subprocess.run([*own, *map(str, program)], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"Peer(uid={UID}, is_full=False)\n", "")
