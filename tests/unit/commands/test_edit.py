"""kabpfctl edit: which file, which editor, and that only what is right is written."""

from __future__ import annotations

import argparse
import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from kabpfctl import kabpfctl

from kabpf.commands import edit
from kabpf.errors import RefusedError
from kabpf.policy import files
from kabpf.runtime import locks

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="it needs root to own policy files")

RIGHT = "keepalive: {idle: 60s}\n"
WRONG = "keepalive: {idle: 10h}\n"
Editor = Callable[..., Path]


class Machine:
    """Policy directories, what was answered and applied, and the texts that editors got."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run = root / "run"
        self.policies, self.package = root / "etc/policy.d", root / "usr/policy.d"
        self.commands = self.run / "policy.d"
        for directory in (self.policies, self.package, self.commands):
            directory.mkdir(parents=True)
        self.answers: list[str] = []
        self.applied = 0

    def edit(self, name: str) -> int:
        return edit.edit(argparse.Namespace(name=name))

    def seen(self) -> list[str]:
        """What each run of the editor found in the file."""
        count = len(list(self.root.glob("seen-*")))
        return [(self.root / f"seen-{number}").read_text() for number in range(count)]

    def left(self) -> list[str]:
        """The names of all files of the administrator's, and of what lies in the run directory."""
        found = [*(self.root / "etc").rglob("*"), *self.run.glob("edit*")]
        return sorted(path.name for path in found if path.is_file() or "edit" in path.name)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine without policy files, and with a terminal."""
    made = Machine(tmp_path)
    drop_ins = (made.policies, made.commands, made.package)
    monkeypatch.setattr(files, "SYSTEM", files.Directories(tmp_path / "etc/policy.yaml", drop_ins))
    monkeypatch.setattr(files, "ENDING", (made.commands,))
    monkeypatch.setattr(edit, "PERSISTENT", made.policies)
    monkeypatch.setattr(locks, "RUN", made.run)
    monkeypatch.setattr(os, "isatty", lambda _: True)
    monkeypatch.setattr("builtins.input", lambda _: made.answers.pop(0))

    def apply(arguments: argparse.Namespace) -> int:
        made.applied += 1
        return 0

    monkeypatch.setattr(edit, "apply", apply)
    for variable in edit.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    return made


@pytest.fixture
def editor(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Editor:
    """Makes $EDITOR a script, which notes what it gets; of several, each is for one run."""

    def make(*scripts: str) -> Path:
        path = machine.root / "editor"
        cases = "".join(f"{number}) {script} ;;\n" for number, script in enumerate(scripts))
        path.write_text(
            f"#!/bin/sh\nset -e\nn=$(ls {machine.root}/seen-* 2>/dev/null | wc -l)\n"
            f'cp -- "$1" {machine.root}/seen-$n\ncase $n in\n{cases}*) exit 9 ;;\nesac\n'
        )
        path.chmod(0o755)
        monkeypatch.setenv("EDITOR", str(path))
        return path

    return make


def put(text: str) -> str:
    return f"printf '%s' '{text}' >\"$1\""


def test_new_file_is_written_and_applied(machine: Machine, editor: Editor) -> None:
    """It belongs to root with mode 0644, whatever mode the editor left, and nothing else is left,
    as an editor's backup."""
    editor(f'cp "$1" "$1~"; {put(RIGHT)}; chmod 600 "$1"; touch $(dirname $1)/.swp $1.yaml')
    assert machine.edit("nginx") == 0
    file = machine.policies / "nginx.service.yaml"
    assert file.read_text() == RIGHT
    status = file.stat()
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (0, 0o644)
    assert machine.left() == ["edit.lock", "nginx.service.yaml"]
    assert machine.applied == 1


def test_template_names_the_unit_and_the_schema(
    machine: Machine, editor: Editor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file that is not there yet begins with comments; unchanged, it is not written."""
    monkeypatch.setattr(edit, "SCHEMA", tmp_path)
    editor("true")
    assert machine.edit("nginx.service") == 0
    (template,) = machine.seen()
    assert template.startswith(f"# yaml-language-server: $schema={tmp_path}\n")
    assert "nginx.service, nginx.socket" in template
    assert "\n#select: [{unit: nginx.service}]\n" in template
    assert all(line.startswith("#") for line in template.splitlines())
    assert (machine.left(), machine.applied) == (["edit.lock"], 0)


def test_template_without_its_comment_signs_is_right(machine: Machine, editor: Editor) -> None:
    """Its lines are ready to be used, also for a template of units and a glob."""
    editor(*["sed -i 's/^#\\([a-z]\\)/\\1/' \"$1\""] * 3)
    for name in ("postgresql@.service", "*-fpm.service", "10-any.yaml"):
        assert machine.edit(name) == 0
    assert machine.applied == 3


def test_unchanged_file_is_not_applied(
    machine: Machine, editor: Editor, capsys: pytest.CaptureFixture[str]
) -> None:
    """A text that stays the same does nothing, even where it is wrong."""
    file = machine.policies / "a.service.yaml"
    file.write_text(WRONG)
    editor('touch "$1"')
    assert machine.edit("a") == 0
    assert capsys.readouterr().out == f"{file}: unchanged\n"
    assert machine.applied == 0


def test_wrong_text_is_edited_again(
    machine: Machine, editor: Editor, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names the file that would be written; the next run has the text of the last."""
    machine.answers = ["x", "e"]
    editor(put(WRONG), put(RIGHT))
    assert machine.edit("a") == 0
    file = machine.policies / "a.service.yaml"
    assert capsys.readouterr().err.startswith(f"{file}:1: keepalive.idle: 10h is not in 1 to 32767")
    assert machine.seen()[1] == WRONG
    assert file.read_text() == RIGHT
    assert machine.applied == 1


def test_wrong_text_is_given_up(machine: Machine, editor: Editor) -> None:
    """q leaves the file as it was, and so does the end of the input."""
    file = machine.policies / "a.service.yaml"
    file.write_text(RIGHT)
    machine.answers = ["q"]
    editor(put(WRONG))
    with pytest.raises(RefusedError, match=f"{file} is unchanged"):
        machine.edit("a")
    assert (file.read_text(), machine.applied) == (RIGHT, 0)
    assert machine.left() == ["a.service.yaml", "edit.lock"]


def test_changes_are_discarded(machine: Machine, editor: Editor) -> None:
    """d begins anew with the file as it is."""
    file = machine.policies / "a.service.yaml"
    file.write_text(RIGHT)
    machine.answers = ["d"]
    editor(put(WRONG), put("keepalive: off\n"))
    assert machine.edit("a") == 0
    assert machine.seen() == [RIGHT, RIGHT]
    assert file.read_text() == "keepalive: off\n"


def test_file_is_checked_beside_all_others(machine: Machine, editor: Editor) -> None:
    """What makes another file wrong is not written; what was wrong there before does not matter."""
    main = machine.root / "etc/policy.yaml"
    main.write_text("defaults: {interval: 10s, probes: 6}\n")
    (machine.policies / "a.service.yaml").write_text("keepalive: {idle: 9, user_timeout: auto}\n")
    machine.answers = ["q"]
    editor(put("defaults: {interval: 10s}\n"), put(RIGHT))
    with pytest.raises(RefusedError):
        machine.edit("policy.yaml")
    (machine.policies / "b.service.yaml").write_text(WRONG)
    assert machine.edit("c") == 0
    assert (machine.policies / "c.service.yaml").read_text() == RIGHT


@pytest.mark.parametrize("answer", [KeyboardInterrupt, EOFError])
def test_nothing_is_left_at_an_interrupted_question(
    machine: Machine, editor: Editor, monkeypatch: pytest.MonkeyPatch, answer: type[BaseException]
) -> None:
    """Ctrl-C and Ctrl-D at the question leave everything as it was."""

    def interrupted(_: str) -> str:
        raise answer

    monkeypatch.setattr("builtins.input", interrupted)
    editor(put(WRONG))
    with pytest.raises((KeyboardInterrupt, RefusedError)):
        machine.edit("a")
    assert (machine.left(), machine.applied) == (["edit.lock"], 0)


@pytest.mark.parametrize("signal", ["TERM", "HUP"])
def test_nothing_is_left_at_a_signal(machine: Machine, editor: Editor, signal: str) -> None:
    """A signal that ends the command while the editor runs leaves everything as it was."""
    editor(f"{put(RIGHT)}; kill -{signal} $PPID; exec sleep 60")
    with pytest.raises(SystemExit):
        machine.edit("a")
    assert (machine.left(), machine.applied) == (["edit.lock"], 0)


def test_interrupt_is_the_editors(machine: Machine, editor: Editor) -> None:
    """Ctrl-C in the editor does not end the command."""
    editor(f"kill -INT $PPID; {put(RIGHT)}")
    assert machine.edit("a") == 0
    assert machine.applied == 1


def test_what_a_killed_one_left_is_removed(machine: Machine, editor: Editor) -> None:
    """The copy of a command that was killed is no one's, and closed to others before."""
    folder = machine.run / "edit"
    folder.mkdir()
    (folder / "x.yaml").write_text(WRONG)
    editor(f"test $(stat -c %a {folder}) = 700; test ! -e {folder}/x.yaml; {put(RIGHT)}")
    assert machine.edit("a") == 0
    assert not folder.exists()


def test_one_runs_at_a_time(machine: Machine, editor: Editor) -> None:
    """Another one is refused, and takes nothing away from the first."""
    editor("true")
    lock = locks.open_lock(machine.run, "edit.lock")
    fcntl.flock(lock, fcntl.LOCK_EX)
    (machine.run / "edit").mkdir()
    with pytest.raises(RefusedError, match="another kabpfctl edit is running"):
        machine.edit("a")
    assert (machine.run / "edit").exists()
    os.close(lock)


def test_editor_keeps_the_lock(machine: Machine, editor: Editor) -> None:
    """So another command leaves its copy alone even where its own command was killed."""
    editor(f"ls -l /proc/$$/fd | grep -q {machine.run}/edit.lock; {put(RIGHT)}")
    assert machine.edit("a") == 0


def test_file_that_somebody_changed_meanwhile_is_kept(machine: Machine, editor: Editor) -> None:
    """What somebody else wrote is not overwritten."""
    file = machine.policies / "a.service.yaml"
    editor(f"{put(RIGHT)}; echo 'keepalive: off' >{file}")
    with pytest.raises(RefusedError, match="was changed meanwhile"):
        machine.edit("a")
    assert file.read_text() == "keepalive: off\n"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("nginx", "policy.d/nginx.service.yaml"),
        ("nginx.service", "policy.d/nginx.service.yaml"),
        ("sshd.socket", "policy.d/sshd.socket.yaml"),
        ("nginx.service.yaml", "policy.d/nginx.service.yaml"),
        ("10-more.yaml", "policy.d/10-more.yaml"),
        ("20-two", "policy.d/20-two.yaml"),
        ("cloud", "policy.d/20-two.yaml"),
        ("policy.yaml", "policy.yaml"),
    ],
)
def test_name_means_a_file(machine: Machine, editor: Editor, name: str, file: str) -> None:
    """A unit's file, a file's own name, or the file that holds a policy."""
    two = "policies: {cloud: {select: [{unit: a.service}], keepalive: on}}\n"
    (machine.policies / "20-two.yaml").write_text(two)
    editor(put("policies: {}\n"))
    assert machine.edit(name) == 0
    assert (machine.root / "etc" / file).read_text() == "policies: {}\n"


@pytest.mark.parametrize(
    "name", ["", "a/b", "../x.yaml", "/etc/passwd", ".x.yaml", "a b", "x" * 300]
)
def test_other_name_is_refused(machine: Machine, editor: Editor, name: str) -> None:
    """What names no file of the policy directories is no name."""
    editor(put(RIGHT))
    with pytest.raises(RefusedError):
        machine.edit(name)
    assert (machine.seen(), machine.left()) == ([], ["edit.lock"])


def test_file_of_a_package_is_edited_as_one_in_its_place(machine: Machine, editor: Editor) -> None:
    """The package's file stays; the administrator's begins with its text."""
    (machine.package / "a.service.yaml").write_text(RIGHT)
    editor(put("keepalive: off\n"))
    assert machine.edit("a") == 0
    assert machine.seen() == [RIGHT]
    assert (machine.package / "a.service.yaml").read_text() == RIGHT
    assert (machine.policies / "a.service.yaml").read_text() == "keepalive: off\n"


def test_files_of_commands_and_links_are_refused(machine: Machine, editor: Editor) -> None:
    """What `attach` wrote it would replace; a link's target belongs to who made the link."""
    editor(put(RIGHT))
    (machine.commands / "zz-attach-a.yaml").write_text(RIGHT + "select: [{cgroup: /a}]\n")
    (machine.policies / "b.service.yaml").symlink_to("/dev/null")
    for name in ("zz-attach-a", "b"):
        with pytest.raises(RefusedError):
            machine.edit(name)
    assert machine.seen() == []


def test_editor_is_chosen_by_variables(
    machine: Machine, editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """$SUDO_EDITOR comes before $VISUAL, and that before $EDITOR; words are its arguments."""
    script = editor("exit 1", put(RIGHT))
    monkeypatch.setenv("VISUAL", "/nowhere/editor")
    with pytest.raises(RefusedError, match="run /nowhere/editor: No such file"):
        machine.edit("a")
    monkeypatch.setenv("SUDO_EDITOR", f"env A=b '{script}'")
    with pytest.raises(RefusedError, match="env ended with status 1"):
        machine.edit("a")
    assert machine.edit("a") == 0
    assert machine.applied == 1


def test_it_needs_a_terminal() -> None:
    """Without one nothing is edited."""
    outcome = kabpfctl("edit", "nginx")
    assert (outcome.status, outcome.output) == (1, "")
    assert outcome.errors.startswith("kabpfctl: edit needs a terminal")
