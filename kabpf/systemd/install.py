"""systemd's units for an installation by pip, which can only bring them along in the package."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from kabpf.errors import RefusedError

CARRIED = Path(__file__).parent / "shipped"

# The first line of what is written. A file without it is an administrator's.
MARK = "# Written by kabpfd --install-units, which replaces it; changes belong into drop-ins.\n"

# What ExecStart= takes as it is, and what ProtectHome= and PrivateTmp= hide.
_PLAIN = re.compile(r"[\w./+-]+", re.ASCII)
_HIDDEN = re.compile(r"/(home|root|run/user|tmp|var/tmp)/")


def units(root: Path, commands: Path, carried: Path = CARRIED) -> list[Path]:
    """Write the units for the commands in the directory `commands`; the files written.

    Everything is below `root`: units and tmpfiles.d in /etc, an empty /etc/kabpf/policy.d, and the
    commands. A systemd that runs there takes notice. Raises RefusedError where a package has the
    units, where a file is somebody else's, and where services could not run the commands.
    """
    for packaged in (root / "usr/lib/systemd/system", root / "lib/systemd/system"):
        if (packaged / "kabpf.service").exists():
            raise RefusedError(
                f"a package has {packaged / 'kabpf.service'}", hint="remove that package first"
            )
    _check_commands(root, commands)
    texts = {
        _target(root, unit.name): MARK + _with_commands(unit.read_text(), commands)
        for unit in sorted(carried.glob("*"))
    }
    if not texts:
        raise RefusedError(f"no units in {carried}", hint="install kabpf with pip first")
    for path in texts:
        if path.is_symlink() or (path.exists() and not path.read_bytes().startswith(MARK.encode())):
            raise RefusedError(f"{path} exists and was not written by kabpfd", hint="move it away")
    for path, text in texts.items():
        _write(path, text)
    os.makedirs(root / "etc/kabpf/policy.d", exist_ok=True)
    if (root / "run/systemd/system").exists():  # sd_booted(3)
        _run("systemd-tmpfiles", "--create", "kabpf.conf")
        _run("systemctl", "daemon-reload")
    return list(texts)


def _check_commands(root: Path, commands: Path) -> None:
    for path in (commands / "kabpfd", commands / "kabpfctl"):
        if not os.access(root / path.relative_to("/"), os.X_OK):
            raise RefusedError(f"no command {path}", hint="install kabpf with pip first")
        if not _PLAIN.fullmatch(str(path)) or _HIDDEN.match(str(path)):
            hint = "install it in a place such as /opt/kabpf"
            raise RefusedError(f"services can't run {path}", hint=hint)


def _target(root: Path, name: str) -> Path:
    if name == "kabpf.tmpfiles":
        return root / "etc/tmpfiles.d/kabpf.conf"
    return root / "etc/systemd/system" / name


def _with_commands(text: str, commands: Path) -> str:
    return text.replace("/usr/bin/kabpf", f"{commands}/kabpf")


def _write(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text)
        fresh.chmod(0o644)
        os.replace(fresh, path)
    except OSError as error:
        raise RefusedError(f"write {path}", error.errno or 0) from None


def _run(*command: str) -> None:
    if subprocess.run(command).returncode:
        raise RefusedError(f"{' '.join(command)} failed")
