"""Waits until no process is left in a cgroup, and becomes the command that tidies up after it.

    watcher.py CGROUP DROP_IN RUN COMMAND...

CGROUP is its directory, and DROP_IN its policy file. RUN is the directory of the locks: the process
that makes the cgroup holds RUN/lock until a process is in it, and the command RUN/prune.lock. There
is one watcher for each cgroup: it imports nothing of kabpf, to stay small.
"""

import contextlib
import fcntl
import os
import select
import sys

# The kernel tells of the second of two changes within 10 ms by a timer, which goes with the cgroup;
# of the removal it tells nothing (cgroup_file_notify(), cgroup_rm_file(); since Linux kernel commit
# b12e35832805 ("cgroup: Limit event generation frequency") (in v4.16)).
UNTOLD_MS = 100


def main(cgroup: str, drop_in: str, run: str, *command: str) -> None:
    """Wait, and become the command unless somebody else has tidied up."""
    descriptor = os.open(f"{run}/lock", os.O_RDWR | os.O_CLOEXEC)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    os.close(descriptor)
    with contextlib.suppress(OSError):  # it is gone
        descriptor = os.open(f"{cgroup}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        poll = select.poll()
        poll.register(descriptor, select.POLLPRI)
        wait_ms: int | None = UNTOLD_MS
        # To read is also to be ready for the next event. What is gone can't be read.
        while b"populated 1" in os.pread(descriptor, 4096, 0):
            wait_ms = UNTOLD_MS if poll.poll(wait_ms) else None
    # One at a time, as each tidies up after all that have ended.
    descriptor = os.open(f"{run}/prune.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    if os.path.exists(cgroup) or os.path.exists(drop_in):
        os.set_inheritable(descriptor, True)
        os.execv(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
