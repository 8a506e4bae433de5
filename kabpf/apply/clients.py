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
}
# These open a session by PAM, which pam_systemd(8) moves into a scope, unless it is in one already.
_SESSIONS = ("su", "runuser", "sudo")
_INSTEAD = {
    "podman": "podman run --cgroups=disabled",
    "su": "runuser -u USER -- COMMAND",
    "runuser": "runuser -u USER -- COMMAND",
    "sudo": "sudo -u USER COMMAND",
}
# These become the command that they are given.
_WRAPPERS = (
    "chrt", "doas", "env", "ionice", "nice", "nohup", "runuser", "setpriv", "setsid", "stdbuf",
    "sudo", "taskset", "time", "timeout",
)  # fmt: skip
# Options of theirs that have a value.
_VALUED = ("-u", "-g", "-G", "--user", "--group", "--groups", "--reuid", "--regid")


def started_elsewhere(words: Sequence[str], *, in_session: bool) -> str:
    """What there is to say of a command that starts its work in another cgroup, or nothing.
    `in_session` says that it is in a login session."""
    name = _wrapped(words)
    away = _CLIENTS.get(name, "")
    if name in _SESSIONS:
        away = "" if in_session else "a login session"
    if not away or (name == "podman" and "--cgroups=disabled" in words):
        return ""
    instead = f"; try: {_INSTEAD[name]}" if name in _INSTEAD else ""
    return f"{name}: {away} runs in another cgroup, which this policy does not cover{instead}"


def _wrapped(words: Sequence[str]) -> str:
    """The name of the first command that is no wrapper, or a wrapper that opens a session."""
    before = wrapper = ""
    for word in words:
        is_option = wrapper and (word.startswith("-") or "=" in word or word[:1].isdigit())
        name = os.path.basename(word)
        if _opens_session(wrapper, word):
            return wrapper
        if is_option or (wrapper and before in _VALUED):
            before = word
        elif name in _WRAPPERS:
            before, wrapper = "", name
        else:
            return name
    return ""


def _opens_session(wrapper: str, word: str) -> bool:
    """Whether an option makes runuser(1) or sudo(8) start a login shell."""
    if wrapper == "runuser":
        return word in ("-", "-l", "--login")
    return wrapper == "sudo" and word in ("-i", "--login")
