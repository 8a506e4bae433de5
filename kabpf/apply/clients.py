"""Commands whose work is done by processes in other cgroups, which a policy of their own misses."""

from __future__ import annotations

import os
from collections.abc import Sequence

# By their names, with what it is that runs elsewhere.
_CLIENTS = {
    **dict.fromkeys(("docker", "podman", "nerdctl", "ctr", "crictl"), "a container"),
    **dict.fromkeys(("lxc", "incus"), "an instance"),
    **dict.fromkeys(("snap", "flatpak"), "an application"),
    **dict.fromkeys(("systemd-run", "run0"), "its command"),
    **dict.fromkeys(("at", "batch"), "a job"),
    "kubectl": "a pod",
    "systemctl": "a unit",
    "machinectl": "a machine's shell",
    "virsh": "a machine",
    "su": "a login session",
}
# These become the command that they are given.
_WRAPPERS = (
    "chrt", "doas", "env", "ionice", "nice", "nohup", "setpriv", "setsid", "stdbuf", "sudo",
    "taskset", "time", "timeout",
)  # fmt: skip


def started_elsewhere(words: Sequence[str]) -> str:
    """What there is to say of a command that starts its work in another cgroup, or nothing."""
    name = os.path.basename(_wrapped(words))
    if name not in _CLIENTS or (name == "podman" and "--cgroups=disabled" in words):
        return ""
    return f"{name}: {_CLIENTS[name]} runs in another cgroup, which this policy does not cover"


def _wrapped(words: Sequence[str]) -> str:
    """The first word that is a command and not a wrapper, an option, a number or a variable."""
    for index, word in enumerate(words):
        is_argument = word.startswith("-") or "=" in word or word[:1].isdigit()
        if os.path.basename(word) not in _WRAPPERS and not (index and is_argument):
            return word
    return ""
