"""A process that holds a socket."""

import subprocess
import sys
from pathlib import Path

import pytest
from harness import PROGRAMS, entering


class HeldSocket:
    """A process that holds a socket's lock in a network namespace, and nothing else of it; as the
    user `uid` by then."""

    def __init__(self, cgroup: Path, namespace: str | None, uid: int | None = None) -> None:
        enter = ("ip", "netns", "exec", namespace) if namespace else ()
        command = [*enter, sys.executable, "-I", PROGRAMS / "holder.py"]
        self.process = subprocess.Popen(
            [*command, *([] if uid is None else [str(uid)])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=entering(cgroup),
        )
        assert self.process.stdout
        said = self.process.stdout.readline()
        if said.startswith("userfaultfd: "):
            self.let_go()
            pytest.skip(f"this kernel has no userfaultfd(2) (CONFIG_USERFAULTFD): {said.strip()}")
        assert said == "held\n"

    def idle(self) -> int:
        """Let go of the socket, where that is not done yet; the idle time it has by now, in s."""
        assert self.process.stdin and self.process.stdout
        print(file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def let_go(self) -> None:
        self.process.kill()
        self.process.communicate()
