"""Commands that have their work done elsewhere."""

from __future__ import annotations

import shlex

import pytest

from kabpf.apply.clients import started_elsewhere

RUNUSER = "try: runuser -u USER -- COMMAND"
AWAY = "runs in another cgroup, which this policy does not cover"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("docker run -it debian", f"docker: a container {AWAY}"),
        (
            "/usr/bin/podman run debian",
            f"podman: a container {AWAY}; try: podman run --cgroups=disabled",
        ),
        ("podman run --cgroups=disabled debian", ""),
        ("podman run --cgroups disabled debian", ""),
        ("docker-compose up", f"docker-compose: a container {AWAY}"),
        ("systemctl restart nginx", f"systemctl: a unit {AWAY}"),
        ("systemd-run --scope sleep 9", f"systemd-run: its command {AWAY}"),
        ("su - bob -c id", f"su: a login session {AWAY}; {RUNUSER}"),
        ("su bob -c id", f"su: a login session {AWAY}; {RUNUSER}"),
        ("runuser -l bob -c id", f"runuser: a login session {AWAY}; {RUNUSER}"),
        ("runuser - bob", f"runuser: a login session {AWAY}; {RUNUSER}"),
        ("runuser bob -lc id", f"runuser: a login session {AWAY}; {RUNUSER}"),
        ("runuser -c id -l bob", f"runuser: a login session {AWAY}; {RUNUSER}"),
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
        ("machinectl shell box", f"machinectl: a machine's shell {AWAY}"),
        ("snap run firefox", f"snap: an application {AWAY}"),
        ("flatpak run org.x", f"flatpak: an application {AWAY}"),
        ("sudo docker ps", f"docker: a container {AWAY}"),
        ("env -i A=1 nice -n 5 docker ps", f"docker: a container {AWAY}"),
        ("timeout 5 docker ps", f"docker: a container {AWAY}"),
        ("timeout -s TERM -k 5 1m docker ps", f"docker: a container {AWAY}"),
        ("env -C /srv A=1 docker ps", f"docker: a container {AWAY}"),
        ("taskset ff docker ps", f"docker: a container {AWAY}"),
        ("chroot /srv su", f"su: a login session {AWAY}; {RUNUSER}"),
        ("env", ""),
        ("sudo -u bob id", ""),
        ("nohup su - bob", f"su: a login session {AWAY}; {RUNUSER}"),
        ("nice -n 5 su - bob", f"su: a login session {AWAY}; {RUNUSER}"),
        ("sh -c 'su - bob'", f"su: a login session {AWAY}; {RUNUSER}"),
        ("/bin/sh -c 'exec su - bob'", f"su: a login session {AWAY}; {RUNUSER}"),
        ("bash -lc 'A=1 su - bob -c \"echo hi\"'", f"su: a login session {AWAY}; {RUNUSER}"),
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
    ],
)
def test_command_whose_work_is_elsewhere_is_told(command: str, said: str) -> None:
    """It is known by its name, also behind what becomes it; one that stays is not told of."""
    assert started_elsewhere(shlex.split(command), in_session=False) == said


def test_no_session_is_opened_inside_of_one() -> None:
    """There, what asks PAM for a session stays; what asks a manager does not."""
    for command in ("su - bob", "su bob -c id", "runuser -l bob", "sudo -i"):
        assert started_elsewhere(command.split(), in_session=True) == ""
    assert started_elsewhere(["run0"], in_session=True) != ""
