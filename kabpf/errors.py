"""The exceptions of kabpf.

    KabpfError              something outside kabpf is wrong; the message says where and what
    ├── PolicyError         policy files, one line for each finding
    ├── UnsupportedError    this machine lacks something that kabpf needs
    ├── LimitError          this process may not open as many files as a step needs
    └── RefusedError        the kernel or the state of the machine refused one step
        ├── BpfError        bpf(2) refused it
        ├── NotUpdatedError  new sockets have what the policies say, open ones do not
        └── CommandError    the command of `kabpfctl run` can't be started

Anything else that is raised is a bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator


class KabpfError(Exception):
    """Something outside kabpf is wrong; the message is meant for an administrator."""

    status = 1  # that a command exits with


def _one_line(text: str) -> str:
    """A text in which the name of somebody's file or the value of a variable may stand."""
    return text.replace("\n", "\\n")


class PolicyError(KabpfError):
    """One or more findings in policy files, as `file:line: key: what, what was expected`.

    `since` is when what is wrong was changed last, in seconds since the epoch, where that is known.
    """

    def __init__(self, *findings: str, since: float | None = None) -> None:
        self.findings = tuple(map(_one_line, findings))
        super().__init__("\n".join(self.findings))
        self.since = since


@contextlib.contextmanager
def collected(findings: list[str]) -> Iterator[None]:
    """Adds what a PolicyError says to `findings` instead of raising it."""
    try:
        yield
    except PolicyError as error:
        findings += error.findings


class UnsupportedError(KabpfError):
    """This machine lacks something that kabpf needs; the message names it and the remedy."""


class LimitError(KabpfError):
    """This process, or the machine, may open no more files; `error` is one of LIMITS. Whatever it
    was to look at may be all right."""

    def __init__(self, step: str, error: int) -> None:
        super().__init__(f"{step}: {os.strerror(error)}; try: ulimit -n 1024")


LIMITS = (errno.EMFILE, errno.ENFILE)


class RefusedError(KabpfError):
    """One step was refused; `error` is its errno, or 0. A hint may have lines of its own."""

    def __init__(self, step: str, error: int = 0, hint: str = "") -> None:
        reason = f": {os.strerror(error)}" if error else ""
        # What was expected goes on with the sentence; what to do is one of its own.
        joint = ", " if hint.startswith("expected ") else "; "
        super().__init__(f"{_one_line(step)}{reason}{joint if hint else ''}{hint}")
        self.error = error


class BpfError(RefusedError):
    """bpf(2) refused a step, maybe because of another program, a limit or a missing right."""


class NotUpdatedError(RefusedError):
    """The policies are active for new sockets; some open ones could not be updated."""


class CommandError(RefusedError):
    """A command can't be started; the status is that of env(1): 127 where it does not exist, else
    126."""

    def __init__(self, command: str, error: int) -> None:
        super().__init__(f"run {command}", error)
        self.status = 127 if error == errno.ENOENT else 126


@contextlib.contextmanager
def all_refusals() -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Gives a context manager for each of several steps, of which one that is refused stops no
    other; raises what was refused as one RefusedError at the end, which is a BpfError with its
    errno where one of them was."""
    refused: list[RefusedError] = []

    @contextlib.contextmanager
    def step() -> Iterator[None]:
        try:
            yield
        except RefusedError as error:
            refused.append(error)

    yield step
    if refused:
        text = "; ".join(dict.fromkeys(map(str, refused)))
        of_bpf = next((error for error in refused if isinstance(error, BpfError)), None)
        together = BpfError(text) if of_bpf else RefusedError(text)
        together.error = of_bpf.error if of_bpf else 0
        raise together
