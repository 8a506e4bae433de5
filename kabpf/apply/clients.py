"""Commands whose work is done by processes in other cgroups, which a policy of their own misses."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

# By their names, with what it is that runs elsewhere.
_CLIENTS = {
    **dict.fromkeys(("docker", "podman", "nerdctl", "ctr", "crictl"), "a container"),
    **dict.fromkeys(("docker-compose", "podman-compose"), "a container"),
    **dict.fromkeys(("lxc", "lxc-attach", "lxc-start", "incus"), "an instance"),
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
# These become the command that they are given: the letters of their options that have a value, and
# how many other words come before the command.
_WRAPPERS = {
    "chroot": ("", 1),
    "chrt": ("DPT", 1),
    "doas": ("Cu", 0),
    "env": ("Cu", 0),
    "flock": ("Ew", 1),
    "ionice": ("cn", 0),
    "nice": ("n", 0),
    "nohup": ("", 0),
    "runuser": ("Gcgsuw", 1),  # the user, or with -u none
    "setpriv": ("", 0),
    "setsid": ("", 0),
    "stdbuf": ("eio", 0),
    "sudo": ("CDRTUghprtu", 0),
    "taskset": ("", 1),
    "time": ("fo", 0),
    "timeout": ("ks", 1),
    "unshare": ("GRSlw", 0),
}
# Long options of theirs whose value may be the next word.
_VALUED = (
    *("--user", "--group", "--groups", "--reuid", "--regid", "--signal", "--kill-after"),
    *("--adjustment", "--chdir", "--unset", "--class", "--classdata"),
)
_LOGIN = {"runuser": "l", "sudo": "i"}  # what makes them open a session


def started_elsewhere(words: Sequence[str], *, in_session: bool) -> str:
    """What there is to say of a command that starts its work in another cgroup, or nothing.
    `in_session` says that it is in a login session."""
    name = _wrapped(words)
    away = _CLIENTS.get(name, "")
    if name in _SESSIONS:
        away = "" if in_session else "a login session"
    if not away or (name == "podman" and "--cgroups disabled" in " ".join(words).replace("=", " ")):
        return ""
    instead = f"; try: {_INSTEAD[name]}" if name in _INSTEAD else ""
    return f"{name}: {away} runs in another cgroup, which this policy does not cover{instead}"


def _wrapped(words: Sequence[str]) -> str:
    """The name of the first command that is no wrapper, or a wrapper that opens a session."""
    wrapper, valued, others = "", "", 0
    rest = iter(words)
    for word in rest:
        name = os.path.basename(word)
        if wrapper and word.startswith("-"):
            letters, value = _split(word, valued)
            if _opens_session(wrapper, word, letters):
                return wrapper
            if wrapper == "runuser" and (word.startswith("--user") or value.startswith("u")):
                others = 0
            if word in _VALUED or len(value) == 1:
                next(rest, "")
        elif wrapper and "=" in word:
            continue
        elif others:
            others -= 1
        elif name in _WRAPPERS:
            wrapper = name
            valued, others = _WRAPPERS[name]
        else:
            return name
    return ""


def _split(word: str, valued: str) -> tuple[str, str]:
    """The letters of an option that have no value, and the one that has, with its value if that is
    in the same word; of a long option nothing."""
    if word.startswith("--"):
        return "", ""
    match = re.search(f"[{valued}]", word) if valued else None
    at = match.start() if match else len(word)
    return word[1:at], word[at:]


def _opens_session(wrapper: str, word: str, letters: str) -> bool:
    """Whether an option makes runuser(1) or sudo(8) start a login shell."""
    if wrapper not in _LOGIN:
        return False
    return _LOGIN[wrapper] in letters or word == "--login" or (wrapper, word) == ("runuser", "-")
