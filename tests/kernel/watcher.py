"""A kabpfctl monitor, whose events a test reads."""

import ctypes
import errno
import json
import os
import select
import subprocess
import time

import output_schema
from harness import BIN, PATIENCE, PINS, wait_until
from headers import lack


def require_perf_events():
    """Monitors listen by these; a container's filter of system calls may refuse it."""
    perf_event_open = 298 if os.uname().machine == "x86_64" else 241
    ctypes.CDLL(None, use_errno=True).syscall(perf_event_open, None, 0, -1, -1, 0)
    if ctypes.get_errno() != errno.EFAULT:
        lack("the kernel refuses perf_event_open(2), as in a container that filters it", "kernel")


class Watcher:
    """A kabpfctl monitor that hears of everything from now on."""

    def __init__(self, *arguments):
        listening = self.listeners()
        self.process = subprocess.Popen(
            [BIN / "kabpfctl", "monitor", "--json", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.rest = b""
        wait_until(lambda: self.listeners() > listening, "a monitor", 20)

    @staticmethod
    def listeners():
        """How many monitors the data plane knows of."""
        if not PINS.exists():
            return 0
        command = ["bpftool", "--json", "map", "lookup", "pinned", str(PINS / "kabpf_readers")]
        found = json.loads(subprocess.check_output([*command, "key", "0", "0", "0", "0"]))
        return found["formatted"]["value"].bit_count()

    def next(self, seconds=10):
        """The next event; None where there is none for so long."""
        output = self.process.stdout.fileno()
        deadline = time.monotonic() + seconds * PATIENCE
        while b"\n" not in self.rest:
            if not select.select([output], [], [], max(0, deadline - time.monotonic()))[0]:
                return None
            piece = os.read(output, 1 << 16)
            assert piece, self.process.stderr.read()
            self.rest += piece
        line, _, self.rest = self.rest.partition(b"\n")
        return output_schema.held("monitor", line.decode())

    def until(self, event):
        """The first event of this kind; there has to be one."""
        while (found := self.next()) and found["event"] != event:
            pass
        assert found, f"no event {event}"
        return found

    def end(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()
