"""Waits until no process is left in a cgroup, and becomes the command that tidies up after it.

    watcher.py EVENTS LOCK COMMAND...

EVENTS is the cgroup's cgroup.events. LOCK is held by who makes the cgroup, until a process is in
it. There is one watcher for each cgroup: it imports nothing of kabpf, to stay small.
"""

import contextlib
import fcntl
import os
import select
import sys


def main(events: str, lock: str, *command: str) -> None:
    descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    os.close(descriptor)
    with contextlib.suppress(OSError):  # it is gone
        descriptor = os.open(events, os.O_RDONLY | os.O_CLOEXEC)
        poll = select.poll()
        poll.register(descriptor, select.POLLPRI)
        # To read is also to be ready for the next event.
        while b"populated 1" in os.pread(descriptor, 4096, 0):
            poll.poll()
    os.execv(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
