"""Commands that have their work done elsewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from kabpf.apply.clients import started_elsewhere

RUNUSER = "try: runuser -u USER -- COMMAND"
AWAY = "runs in another cgroup, which this policy does not cover"


PAGE = Path(__file__).parents[3] / "man/kabpfctl.1.rst"
CASES = [
    ("docker run -it debian", f"docker: a container {AWAY}"),
    (
        "podman run debian",
        f"podman: a container {AWAY}; try: podman run --cgroups=disabled",
    ),
    ("podman run --cgroups=disabled debian", ""),
    ("podman run --cgroups disabled debian", ""),
    ("docker-compose up", f"docker-compose: a container {AWAY}"),
    ("nerdctl run debian", f"nerdctl: a container {AWAY}"),
    ("ctr run docker.io/library/debian:12 box", f"ctr: a container {AWAY}"),
    ("/usr/bin/crictl exec box id", f"crictl: a container {AWAY}"),
    ("kubectl exec box -- id", f"kubectl: a pod {AWAY}"),
    ("lxc exec box -- id", f"lxc: an instance {AWAY}"),
    ("incus exec box -- id", f"incus: an instance {AWAY}"),
    ("systemctl restart nginx", f"systemctl: a unit {AWAY}"),
    ("systemd-run --scope sleep 9", f"systemd-run: its command {AWAY}"),
    ("su - bob -c id", f"su: a login session {AWAY}; {RUNUSER}"),
    ("su bob -c id", f"su: a login session {AWAY}; {RUNUSER}"),
    ("runuser -l bob -c id", f"runuser: a login session {AWAY}; {RUNUSER}"),
    ("runuser - bob", f"runuser: a login session {AWAY}; {RUNUSER}"),
    ("runuser bob -lc id", f"runuser: a login session {AWAY}; {RUNUSER}"),
    ("runuser -c id -l bob", f"runuser: a login session {AWAY}; {RUNUSER}"),
    ("setpriv --reuid bob id", ""),
    ("runuser bob -c id", ""),
    ("runuser -u bob -- id", ""),
    ("runuser -u bob ssh -l alice host", ""),
    ("runuser -u bob -- docker ps", f"docker: a container {AWAY}"),
    ("setpriv --reuid bob su", f"su: a login session {AWAY}; {RUNUSER}"),
    ("sudo -i -u bob id", f"sudo: a login session {AWAY}; try: sudo -u USER COMMAND"),
    ("sudo -iu bob id", f"sudo: a login session {AWAY}; try: sudo -u USER COMMAND"),
    ("sudo -ui id", ""),
    ("sudo -u bob grep -i x", ""),
    ("sudo -Eu bob docker ps", f"docker: a container {AWAY}"),
    ("sudo -u postgres docker ps", f"docker: a container {AWAY}"),
    ("run0 id", f"run0: its command {AWAY}"),
    ("cgexec -g cpu:box id", f"cgexec: its command {AWAY}"),
    (
        "systemd-nspawn --quiet --directory /srv/box",
        f"systemd-nspawn: a container {AWAY}; try: systemd-nspawn --keep-unit",
    ),
    ("systemd-nspawn --keep-unit --directory /srv/box", ""),
    ("machinectl shell box", f"machinectl: a machine's shell {AWAY}"),
    ("snap run firefox", f"snap: an application {AWAY}"),
    ("flatpak run org.x", f"flatpak: an application {AWAY}"),
    ("sudo docker ps", f"docker: a container {AWAY}"),
    ("env -i A=1 nice -n 5 docker ps", f"docker: a container {AWAY}"),
    ("timeout 5 docker ps", f"docker: a container {AWAY}"),
    ("timeout -s TERM -k 5 1m docker ps", f"docker: a container {AWAY}"),
    ("env -C /srv A=1 docker ps", f"docker: a container {AWAY}"),
    ("taskset ff docker ps", f"docker: a container {AWAY}"),
    ("setpriv --pdeathsig KILL docker ps", f"docker: a container {AWAY}"),
    ("setsid --wait docker ps", f"docker: a container {AWAY}"),
    ("flock --timeout 5 /run/x docker ps", f"docker: a container {AWAY}"),
    ("sudo --prompt x --user bob docker ps", f"docker: a container {AWAY}"),
    ("chroot /srv su", f"su: a login session {AWAY}; {RUNUSER}"),
    ("busybox su - bob", f"su: a login session {AWAY}; {RUNUSER}"),
    ("choom -n 500 -- docker ps", f"docker: a container {AWAY}"),
    ("dbus-run-session -- docker ps", f"docker: a container {AWAY}"),
    ("gosu bob docker ps", f"docker: a container {AWAY}"),
    ("nsenter -t 1 -n docker ps", f"docker: a container {AWAY}"),
    ("nsenter --target 1 --net docker ps", f"docker: a container {AWAY}"),
    ("pkexec --user bob docker ps", f"docker: a container {AWAY}"),
    ("prlimit --nofile=64 docker ps", f"docker: a container {AWAY}"),
    ("setarch -R docker ps", f"docker: a container {AWAY}"),
    ("setarch x86_64 -R docker ps", f"docker: a container {AWAY}"),
    ("strace -f -o /tmp/x docker ps", f"docker: a container {AWAY}"),
    ("systemd-cat -t box docker ps", f"docker: a container {AWAY}"),
    ("systemd-inhibit --why box docker ps", f"docker: a container {AWAY}"),
    ("env", ""),
    ("sudo -u bob id", ""),
    ("nohup su - bob", f"su: a login session {AWAY}; {RUNUSER}"),
    ("nice -n 5 su - bob", f"su: a login session {AWAY}; {RUNUSER}"),
    ("sh -c 'su - bob'", f"su: a login session {AWAY}; {RUNUSER}"),
    ("/bin/sh -c 'exec su - bob'", f"su: a login session {AWAY}; {RUNUSER}"),
    ("bash -lc 'A=1 su - bob -c \"echo hi\"'", f"su: a login session {AWAY}; {RUNUSER}"),
    ("fish -c 'su - bob'", f"su: a login session {AWAY}; {RUNUSER}"),
    ("tcsh -fc 'su - bob'", f"su: a login session {AWAY}; {RUNUSER}"),
    ("busybox sh -c 'exec su - bob'", f"su: a login session {AWAY}; {RUNUSER}"),
    ("bash -o pipefail -c 'docker ps' name", f"docker: a container {AWAY}"),
    ("dash -e -c -- 'su bob'", f"su: a login session {AWAY}; {RUNUSER}"),
    ("sh -c \"su - bob -c 'a; b | c'\"", f"su: a login session {AWAY}; {RUNUSER}"),
    ("sh -c \"sh -c 'su - bob'\"", f"su: a login session {AWAY}; {RUNUSER}"),
    ("timeout 5 sh -c 'nice docker ps'", f"docker: a container {AWAY}"),
    ("env -S 'su - bob'", f"su: a login session {AWAY}; {RUNUSER}"),
    ("env '-Ssu - bob'", f"su: a login session {AWAY}; {RUNUSER}"),
    ("env -iS 'A=1 su' - bob", f"su: a login session {AWAY}; {RUNUSER}"),
    ("env '--split-string=-i A=1 docker ps'", f"docker: a container {AWAY}"),
    ("env --split-string 'docker ps'", f"docker: a container {AWAY}"),
    ("env -S \"sh -c 'docker ps'\"", f"docker: a container {AWAY}"),
    ("sh -c 'runuser -u bob -- id'", ""),
    ("sh -c 'su - bob; true'", ""),
    ("sh -c 'true && su - bob'", ""),
    ("sh -c 'su - bob | cat'", ""),
    ("sh -c '$SHELL su'", ""),
    ("sh -c 'su - \"$1\"' sh bob", ""),
    ("sh -c", ""),
    ("sh", ""),
    ("sh su", ""),
    ('sh -c "su \'bob"', ""),
    ("bash script.sh -c 'su - bob'", ""),
    ("bash +c 'su - bob'", ""),
    ("env -S", ""),
    ("env -S '${X} ps'", ""),
    ("psql service=billing", ""),
    ("grep docker /etc/group", ""),
    ("./docker-entrypoint.sh", ""),
]


@pytest.mark.parametrize(("command", "said"), CASES)
def test_command_whose_work_is_elsewhere_is_told(command: str, said: str) -> None:
    """It is known by its name, also behind what becomes it; one that stays is not told of."""
    assert started_elsewhere(shlex.split(command), in_session=False) == said


def test_no_session_is_opened_inside_of_one() -> None:
    """There, what asks PAM for a session stays; what asks a manager does not."""
    for command in ("su - bob", "su bob -c id", "runuser -l bob", "sudo -i"):
        assert started_elsewhere(command.split(), in_session=True) == ""
    assert started_elsewhere(["run0"], in_session=True) != ""


def test_each_command_of_the_pages_table_has_a_case() -> None:
    """What the page says stays is not told of, and what leaves is."""
    table = re.search(
        r"^command +its processes [^\n]*\n=[^\n]*\n(.*?)\n=", PAGE.read_text(), re.M | re.S
    )
    assert table
    named = [
        (command, columns[1].startswith("leave"))
        for columns in (re.split(r"  +", row) for row in table[1].splitlines())
        for command in re.findall(r"\*\*(\w.*?)\*\*", columns[0])
    ]
    assert len(named) > 15
    told = [(f"{command} ", bool(said)) for command, said in CASES]
    for command, leaves in named:
        assert (leaves, command) in [
            (is_told, command) for case, is_told in told if case.startswith(f"{command} ")
        ]
