"""Compiles fallback.bpf.c by bcc, in a process of its own.

bcc brings a compiler of 150 MB into the process that imports it. So nothing else does: this module
runs itself, and answers with the programs' instructions.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from kabpf import root_files
from kabpf.errors import RefusedError, UnsupportedError

SOURCES = Path(__file__).parents[1] / "bpf"
SOURCE = "fallback.bpf.c"
PROGRAMS = ("kabpf_sockops", "kabpf_setsockopt")
KEPT = Path("/run/kabpf/fallback.json")
KEPT_MAX = 1 << 24  # bytes; two programs of a million instructions at most, in hexadecimal
PACKAGE = "python3-bpfcc"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
COMPILE_S = 120  # two on most machines; more where the processor is emulated
ROOM_MB = 150  # what the compiler needs


def programs(maps: tuple[str, ...], digest: int) -> dict[str, bytes]:
    """The instructions of the programs, by name; in the place of a map's descriptor they have its
    place in `maps`. `digest` is that of the sources.

    Raises UnsupportedError where bcc does not compile them, or RefusedError. What it compiled it
    keeps until the next boot.
    """
    if not (compiled := _kept(maps, digest)):
        compiled = _compiled(maps)
        _keep(_key(maps, digest), compiled)
    return compiled


def is_kept(maps: tuple[str, ...], digest: int) -> bool:
    """Whether `programs` has what it would compile."""
    return bool(_kept(maps, digest))


def forget() -> None:
    """Have the programs compiled again when they are asked for next."""
    KEPT.unlink(missing_ok=True)


def _kept(maps: tuple[str, ...], digest: int) -> dict[str, bytes]:
    """What was kept, or nothing where that is of something else, or damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        kept = json.loads(root_files.read(KEPT, KEPT_MAX))
        if kept["key"] == _key(maps, digest):
            return {name: bytes.fromhex(kept["programs"][name]) for name in PROGRAMS}
    return {}


def _key(maps: tuple[str, ...], digest: int) -> dict[str, Any]:
    return {"digest": digest, "release": os.uname().release, "maps": list(maps)}


def _keep(key: dict[str, Any], programs: dict[str, bytes]) -> None:
    code = {name: instructions.hex() for name, instructions in programs.items()}
    with contextlib.suppress(OSError):
        content = json.dumps({"key": key, "programs": code}).encode()
        root_files.replace(KEPT, content, mode=0o600)


def _compiled(maps: tuple[str, ...]) -> dict[str, bytes]:
    import subprocess  # here, because they take 5 ms
    import tempfile

    command = [sys.executable, "-P", "-m", "kabpf.kernel.bcc_compile", *maps]
    try:
        # bcc looks for kernel headers in $TMPDIR, under a name that anybody can make in /tmp
        # (get_proc_kheaders() in src/cc/frontends/clang/kbuild_helper.cc), and obeys variables.
        with tempfile.TemporaryDirectory(prefix="kabpf-compile-") as directory:  # of mode 0700
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=COMPILE_S,
                env=_environment(directory),
            )
    except subprocess.TimeoutExpired:
        raise RefusedError(f"compile {SOURCES / SOURCE}: not done after {COMPILE_S} s") from None
    if done.returncode < 0:
        raise RefusedError(
            f"compile {SOURCES / SOURCE}: {signal.Signals(-done.returncode).name}",
            hint=f"the compiler needs {ROOM_MB} MB of memory",
        )
    if done.returncode:
        raise UnsupportedError(
            f"bcc can't compile {SOURCES / SOURCE}; do the kernel headers fit? It says:\n"
            f"{done.stderr.strip()}"
        )
    return {name: bytes.fromhex(code) for name, code in json.loads(done.stdout).items()}


def _environment(directory: str) -> dict[str, str]:
    """The compiler's; of the caller's it has where the kernel's sources are."""
    own = {"PATH": PATH, "TMPDIR": directory, "HOME": directory, "LC_ALL": "C.UTF-8"}
    sources = os.environ.get("BCC_KERNEL_SOURCE")
    return {**own, "BCC_KERNEL_SOURCE": sources} if sources else own


class Lack(NamedTuple):
    """What is missing to compile with, and the packages of Debian that have it."""

    reason: str
    packages: tuple[str, ...]

    def __str__(self) -> str:
        packages = f"package{'s' if len(self.packages) > 1 else ''} {' and '.join(self.packages)}"
        return f"{self.reason}; install the {packages}"


def missing() -> Lack | None:
    """What is missing to compile with, if anything."""
    headers = f"linux-headers-{os.uname().release}"
    if find_spec("bcc") is None and not _has_headers():
        return Lack("bcc and the kernel's headers are missing", (PACKAGE, headers))
    if find_spec("bcc") is None:
        return Lack("bcc is missing", (PACKAGE,))
    return None if _has_headers() else Lack("the kernel's headers are missing", (headers,))


def _has_headers() -> bool:
    release = os.uname().release
    # Where bcc looks (src/cc/frontends/clang/loader.cc); kheaders is a module that it loads itself.
    places = (
        os.environ.get("BCC_KERNEL_SOURCE", ""),
        f"/lib/modules/{release}/build",
        "/sys/kernel/kheaders.tar.xz",
        *glob.glob(f"/lib/modules/{release}/kernel/kernel/kheaders.ko*"),
    )
    return any(map(os.path.exists, places))


def _compile(maps: list[str]) -> dict[str, str]:
    from bcc import BPF

    places = [f"-D{name}_descriptor={place}" for place, name in enumerate(maps)]
    compiled = BPF(text=(SOURCES / SOURCE).read_text(), cflags=[f"-I{SOURCES}", *places])
    return {name: compiled.dump_func(name.encode()).hex() for name in PROGRAMS}


if __name__ == "__main__":
    print(json.dumps(_compile(sys.argv[1:])))
