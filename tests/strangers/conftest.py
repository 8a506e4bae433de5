"""The tier of strangers: what users, their files and their processes can do to root's kabpf.

Each attempt is made by a user without rights, in a cgroup of its own, within bounds of time, memory
and processes; it ends with the test, and what a killed session left ends with the next one.

A session is set up as that of the kernel tier, with its fixtures."""

from __future__ import annotations

import importlib.util
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PATIENCE, entering

USER = 4242


def _fixtures_of_the_kernel_tier() -> dict[str, Any]:
    file = Path(__file__).parents[1] / "kernel/conftest.py"
    spec = importlib.util.spec_from_file_location("kernel_fixtures", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: value for name, value in vars(module).items() if not name.startswith("__")}


globals().update(_fixtures_of_the_kernel_tier())


def setpriv(uid: int) -> tuple[str, ...]:
    """A command that starts another one as a user without rights."""
    who = (f"--reuid={uid}", f"--regid={uid}", "--clear-groups")
    return ("setpriv", *who, "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")


@pytest.fixture
def own(make_cgroup: Callable[[str], Path]) -> Path:
    """A cgroup that was given to USER, who may make others in it."""
    cgroup = make_cgroup("own")
    for each in (cgroup, cgroup / "cgroup.procs", cgroup / "cgroup.subtree_control"):
        os.chown(each, USER, USER)
    return cgroup


def _bounded(cgroup: Path | None) -> Callable[[], None]:
    enter = entering(cgroup)

    def prepare() -> None:
        enter()
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 26, 1 << 26))
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))

    return prepare


@pytest.fixture
def stranger() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a program of a user's, which is killed at the test's end."""
    started: list[subprocess.Popen[bytes]] = []

    def start(
        *command: object, uid: int = USER, cgroup: Path | None = None, **how: Any
    ) -> subprocess.Popen[bytes]:
        # It ends with this process, too, however that ends.
        words = [*setpriv(uid), "--pdeathsig=KILL", *map(os.fspath, map(_word, command))]
        how = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "cwd": "/"} | how
        started.append(subprocess.Popen(words, preexec_fn=_bounded(cgroup), **how))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=20 * PATIENCE)


def _word(word: object) -> str | bytes | os.PathLike[str]:
    return word if isinstance(word, str | bytes | os.PathLike) else str(word)


@pytest.fixture
def python(stranger: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a program in Python, given as text."""

    def start(code: str, *arguments: object, **how: Any) -> Any:
        return stranger("/usr/bin/python3", "-I", "-S", "-c", code, *arguments, **how)

    return start


@pytest.fixture
def command(own_mounts: Path) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Runs kabpfctl from its first instruction, as the locale is read there; within a bound, of
    which a command that waits for a stranger would run out."""

    def run(
        *words: str | bytes, seconds: float = 20, uid: int = 0, **environment: str
    ) -> subprocess.CompletedProcess[bytes]:
        program = str(Path(sys.executable).with_name("kabpfctl"))
        starter = setpriv(uid) if uid else ()
        return subprocess.run(
            [*starter, program, *words],
            env={**os.environ, "PYTHONUTF8": "", **environment} if environment else None,
            capture_output=True,
            timeout=seconds * PATIENCE,
            stdin=subprocess.DEVNULL,
            cwd="/",
        )

    return run
