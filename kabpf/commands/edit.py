"""kabpfctl edit: a policy file in an editor, which counts only when it is right."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from kabpf import output, root_files
from kabpf.apply.dropins import PERSISTENT
from kabpf.commands import check
from kabpf.commands.apply import apply
from kabpf.errors import PolicyError, RefusedError
from kabpf.kernel import dataplane, loading
from kabpf.policy import files, selectors, writer
from kabpf.runtime import locks
from kabpf.systemd import names

VARIABLES = ("SUDO_EDITOR", "VISUAL", "EDITOR")  # as sudoedit(8) has them
EDITORS = ("sensible-editor", "editor", "nano", "vim", "vi")  # as systemctl(1), but for the first
SCHEMA = Path("/usr/share/kabpf/policy.schema.json")
QUESTION = "(e)dit again, (d)iscard the changes and begin anew, or (q)uit? "


class _Target(NamedTuple):
    file: Path
    before: bytes | None  # what it holds
    text: bytes  # what the editor begins with


def edit(arguments: argparse.Namespace) -> int:
    """Edit a policy file; write and apply it when it is right."""
    if not (os.isatty(0) and os.isatty(1)):
        raise RefusedError("edit needs a terminal")
    editor = _editor()
    with _folder() as (folder, lock):
        file = _file(arguments.name)
        text = None
        while text is None:
            target = _target(file)
            text = _right_text(target, editor, folder, lock)
        if text == target.text:
            print(f"{output.shown(str(target.file))}: unchanged")
            return 0
        _write(target, text)
    return apply(arguments)


def _file(name: str) -> Path:
    """The file that a name means: that of a policy, a file, or a unit as systemctl(1) takes it. One
    of a package is edited as a file of the administrator's, which takes its place."""
    if name == files.SYSTEM.main.name:
        return files.SYSTEM.main
    stem = name.removesuffix(".yaml")
    found = _installed(stem)
    if not found and name == stem:
        stem = names.unit(name)
        found = _installed(stem)
        if not found and not selectors.named_by(stem, ""):
            raise RefusedError(f"edit {name}", hint="expected a unit, a policy or a policy file")
    file = found or PERSISTENT / f"{stem}.yaml"
    if file.parent in files.ENDING:
        raise RefusedError(f"{file} was written by a command, and ends with its cgroup")
    if "/" in stem or not files.has_policy_name(file.name):
        raise RefusedError(f"edit {name}", hint="expected a policy file's name")
    return file if file == files.SYSTEM.main else PERSISTENT / file.name


def _installed(stem: str) -> Path | None:
    """The file with this name, or with the policy of this name."""
    found = files.paths(files.SYSTEM)
    for file in found:
        if file.name == f"{stem}.yaml":
            return file
    for file in found:
        with contextlib.suppress(PolicyError):
            if any(draft.policy.name == stem for draft in files.read(file).policies):
                return file
    return None


def _target(file: Path) -> _Target:
    """A file as it is now. Raises RefusedError where writing it would take the place of a link."""
    if file.is_symlink():
        raise RefusedError(f"{file} is a link to {os.readlink(file)}", hint="expected a file")
    if os.path.lexists(file):
        content = files.content(file)
        return _Target(file, content, content)
    weaker = next((each for each in files.paths(files.SYSTEM) if each.name == file.name), None)
    return _Target(file, None, files.content(weaker) if weaker else _template(file).encode())


def _template(file: Path) -> str:
    lines = [f"# yaml-language-server: $schema={SCHEMA}"] if SCHEMA.exists() else []
    lines.append("# A policy file, see kabpf.yaml(5). Lines that begin with # are comments.")
    if own := selectors.named_by(file.stem, str(file)):
        covered = ", ".join(names.covered_by(own[0].text))
        lines.append(f"# By its name it selects {covered}; a select replaces that.")
        lines.append(f"#select: [{writer.selector(own[0])}]")
    else:
        lines.append("#select: [{unit: nginx.service}]")
    lines.append("#keepalive: {idle: 60s, interval: 10s, probes: 6}")
    lines.append("#mode: fill  # or override, enforce")
    return "\n".join(lines) + "\n"


def _right_text(target: _Target, editor: list[str], folder: Path, lock: int) -> bytes | None:
    """What the editor makes of a file, once that is right; None to begin anew. Raises RefusedError
    where the user gives up."""
    copy = folder / "copy" / target.file.name
    shutil.rmtree(copy.parent, ignore_errors=True)
    root_files.replace(copy, target.text, mode=0o600)
    while True:
        _run([*editor, str(copy)], lock)
        try:
            text = files.content(copy)
            findings = [] if text == target.text else _findings(target, text, folder)
        except PolicyError as error:  # of the copy itself
            findings = [each.replace(str(copy), str(target.file)) for each in error.findings]
        if not findings:
            return text
        print("\n".join(map(output.shown, findings)), file=sys.stderr)
        answer = _answer()
        if answer == "q":
            raise RefusedError(f"{target.file} is unchanged")
        if answer == "d":
            return None


def _findings(target: _Target, text: bytes, folder: Path) -> list[str]:
    """What `check` refuses of a file's new text beside all other files; not what is wrong in these
    already, which `apply` says."""
    checked = folder / "checked" / target.file.name
    root_files.replace(checked, text, mode=0o644)
    if target.file == files.SYSTEM.main:
        directories = files.SYSTEM._replace(main=checked)
    else:
        drop_ins = (checked.parent, *files.SYSTEM.drop_ins)
        directories = files.SYSTEM._replace(drop_ins=drop_ins)
    loader = loading.loader(dataplane.PINS)
    before = check.checked("", partial(files.load, files.SYSTEM), loader)["errors"]
    after = check.checked("", partial(files.load, directories), loader)
    named = {
        key: [each.replace(str(checked), str(target.file)) for each in after[key]]
        for key in ("errors", "warnings")
    }
    for warning in named["warnings"]:
        print(f"warning: {output.shown(warning)}", file=sys.stderr)
    own = f"{target.file}:"
    return [each for each in named["errors"] if each.startswith(own) or each not in before]


def _write(target: _Target, text: bytes) -> None:
    now = files.content(target.file) if os.path.lexists(target.file) else None
    if now != target.before:
        raise RefusedError(f"{target.file} was changed meanwhile", hint="try again")
    try:
        root_files.replace(target.file, text, mode=0o644, sync=True)
    except OSError as error:
        raise RefusedError(f"write {target.file}", error.errno or 0) from None


def _answer() -> str:
    while True:
        try:
            answer = input(QUESTION)[:1].lower()
        except EOFError:
            return "q"
        if answer in ("e", "d", "q"):
            return answer


def _editor() -> list[str]:
    """The words of the user's editor."""
    for variable in VARIABLES:
        value = os.environ.get(variable, "")
        try:
            words = shlex.split(value)
        except ValueError as error:
            raise RefusedError(f"{variable}={value}: {error}", hint="expected a command") from None
        if words:
            return words
    found = next((each for each in EDITORS if shutil.which(each)), None)
    if found is None:
        raise RefusedError("no editor", hint=f"install one of {', '.join(EDITORS)}, or set $EDITOR")
    return [found]


def _run(command: list[str], lock: int) -> None:
    """Run the editor, to which interrupts from the terminal are. It keeps the lock, too, so that
    its file stays where this process is killed."""
    at_terminal = (signal.SIGINT, signal.SIGQUIT)
    handlers = {number: signal.signal(number, lambda *_: None) for number in at_terminal}
    try:
        status = subprocess.run(command, pass_fds=[lock]).returncode
    except OSError as error:
        raise RefusedError(f"run {command[0]}", error.errno or 0) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if status:
        ended = f"by signal {-status}" if status < 0 else f"with status {status}"
        raise RefusedError(f"{command[0]} ended {ended}", hint="nothing was changed")


@contextlib.contextmanager
def _folder() -> Iterator[tuple[Path, int]]:
    """A directory that root alone can enter, gone at the end, also by a signal, and the lock by
    which it is one editor's. What a killed one left there is removed first."""
    folder = locks.RUN / "edit"
    lock = locks.open_lock(locks.RUN, "edit.lock")
    former = {}
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RefusedError("another kabpfctl edit is running") from None
        former = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGHUP)}
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(mode=0o700)
            yield folder, lock
        except OSError as error:
            raise RefusedError(f"write {folder}", error.errno or 0) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        os.close(lock)


def _end(number: int, _: object) -> None:
    raise SystemExit(128 + number)
