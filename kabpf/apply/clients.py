"""Commands whose work is done by processes in other cgroups, which a policy of their own misses."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterable, Sequence

# By their names, with what it is that runs elsewhere.
_CLIENTS = {
    **dict.fromkeys(("docker", "podman", "nerdctl", "ctr", "crictl"), "a container"),
    **dict.fromkeys(
        ("docker-compose", "podman-compose", "podman-remote", "buildah"), "a container"
    ),
    **dict.fromkeys(("lxc", "lxc-attach", "lxc-execute", "lxc-start", "incus"), "an instance"),
    **dict.fromkeys(("snap", "flatpak"), "an application"),
    **dict.fromkeys(("cgexec", "run0", "systemd-run"), "its command"),
    **dict.fromkeys(("at", "batch"), "a job"),
    "kubectl": "a pod",
    "systemctl": "a unit",
    "machinectl": "a machine's shell",
    "systemd-nspawn": "a container",
    **dict.fromkeys(("systemd-vmspawn", "virsh"), "a machine"),
}
# These open a session by PAM, which pam_systemd(8) moves into a scope, unless it is in one already.
_SESSIONS = ("su", "runuser", "sudo")
_INSTEAD = {
    "podman": "podman run --cgroups=disabled",
    "systemd-nspawn": "systemd-nspawn --keep-unit",
    "su": "runuser -u USER -- COMMAND",
    "runuser": "runuser -u USER -- COMMAND",
    "sudo": "sudo -u USER COMMAND",
}
_STAYING = {"podman": "--cgroups disabled", "systemd-nspawn": "--keep-unit"}  # the option for it
# These become the command that they are given: the letters of their options that have a value, and
# how many other words come before the command.
_WRAPPERS = {
    "busybox": ("", 0),
    "choom": ("n", 0),
    "chroot": ("", 1),
    "chrt": ("DPT", 1),
    "dbus-run-session": ("", 0),
    "doas": ("Cu", 0),
    "eatmydata": ("", 0),
    "env": ("CSu", 0),
    "fakeroot": ("bil", 0),
    "flock": ("Ew", 1),
    "gosu": ("", 1),
    "ionice": ("cn", 0),
    **dict.fromkeys(("i386", "linux32", "linux64", "setarch", "x86_64"), ("", 0)),
    "nice": ("n", 0),
    "nohup": ("", 0),
    "nsenter": ("GSt", 0),
    "pkexec": ("", 0),
    "prlimit": ("", 0),
    "runuser": ("Gcgsuw", 1),  # the user, or with -u none
    "setpriv": ("", 0),
    "setsid": ("", 0),
    "stdbuf": ("eio", 0),
    "strace": ("abeEIoOpPsSuUX", 0),
    "sudo": ("CDRTUghprtu", 0),
    "systemd-cat": ("pt", 0),
    "systemd-inhibit": ("", 0),
    "taskset": ("", 1),
    "time": ("fo", 0),
    "timeout": ("ks", 1),
    "uclampset": ("mM", 0),
    "unshare": ("GRSlw", 0),
}
# Long options of theirs whose value may be the next word.
_VALUED = (
    *("--user", "--group", "--groups", "--signal", "--kill-after", "--adjustment", "--unset"),
    *("--ruid", "--euid", "--reuid", "--rgid", "--egid", "--regid", "--pdeathsig"),  # setpriv's
    *("--inh-caps", "--ambient-caps", "--bounding-set", "--securebits"),
    *("--chdir", "--chroot", "--close-from", "--command-timeout", "--host"),  # sudo's
    *("--other-user", "--prompt", "--role", "--type"),
    *("--setuid", "--setgid", "--root", "--wd"),  # unshare's
    *("--class", "--classdata", "--sched-runtime", "--sched-period", "--sched-deadline"),
    *("--input", "--output", "--error", "--format", "--timeout", "--conflict-exit-code"),
    *("--target", "--identifier", "--priority", "--mode", "--what", "--who", "--why"),
)
_LOGIN = {"runuser": "l", "sudo": "i"}  # what makes them open a session
# These run a text, and have the letters of their options that take a value.
_SHELLS = {
    **dict.fromkeys(("ash", "dash", "ksh", "mksh", "posh", "sh", "yash", "zsh"), "o"),
    **dict.fromkeys(("bash", "rbash"), "oO"),
    **dict.fromkeys(("csh", "fish", "tcsh"), ""),
}
_KNOWN = 1 << 16  # characters of a text; with more nobody knows
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_EXPANDED = re.compile(r"[$`\\*?\[~{!#]")  # what only the shell knows when it runs, if unquoted


def started_elsewhere(words: Sequence[str], *, in_session: bool) -> str:
    """What there is to say of a command that starts its work in another cgroup, or nothing.
    `in_session` says that it is in a login session."""
    name = _wrapped(words)
    away = _CLIENTS.get(name, "")
    if name in _SESSIONS:
        away = "" if in_session else "a login session"
    stays = name in _STAYING and _STAYING[name] in " ".join(words).replace("=", " ")
    if not away or stays:
        return ""
    instead = f"; try: {_INSTEAD[name]}" if name in _INSTEAD else ""
    return f"{name}: {away} runs in another cgroup, which this policy does not cover{instead}"


def _wrapped(words: Sequence[str]) -> str:
    """The name of the first command that is no wrapper, or a wrapper that opens a session; "" where
    it is not known."""
    wrapper, valued, others = "", "", 0
    rest = deque(words)
    while rest:
        word = rest.popleft()
        name = os.path.basename(word)
        if wrapper and word.startswith("-"):
            letters, value = _split(word, valued)
            if _opens_session(wrapper, word, letters):
                return wrapper
            if wrapper == "env" and (value.startswith("S") or word.startswith("--split-string")):
                text = value[1:] or word.partition("=")[2] or (rest.popleft() if rest else "")
                rest.extendleft(reversed(_words(text)))
                continue
            if wrapper == "runuser" and (word.startswith("--user") or value.startswith("u")):
                others = 0
            if rest and (word in _VALUED or len(value) == 1):
                rest.popleft()
        elif wrapper and "=" in word:
            continue
        elif others:
            others -= 1
        elif name in _WRAPPERS:
            wrapper = name
            valued, others = _WRAPPERS[name]
        elif name in _SHELLS:
            return _wrapped(_command(rest, _SHELLS[name]))
        else:
            return name
    return ""


def _command(rest: Iterable[str], valued: str) -> list[str]:
    """The words of the one simple command that a shell with these arguments runs; none where it is
    not one, or not known."""
    words = iter(rest)
    is_text = False
    for word in words:
        if word in ("-", "--") or word[:1] not in ("-", "+"):
            text = next(words, "") if word in ("-", "--") else word
            return _simple(text) if is_text else []
        letters, value = _split(word, valued)
        is_text |= word[0] == "-" and "c" in letters
        if len(value) == 1:
            next(words, "")
    return []


def _simple(text: str) -> list[str]:
    words = _words(text, is_shell=True)
    while words and (_ASSIGNMENT.match(words[0]) or words[0] in ("exec", "command")):
        del words[0]
    return words


def _words(text: str, *, is_shell: bool = False) -> list[str]:
    """The words of a text; none where it takes more than a look at quotes to tell them."""
    import shlex  # here, because it takes 1 ms and few commands have such a text

    if len(text) > _KNOWN:
        return []
    if _EXPANDED.search(re.sub(r"'[^']*'", "", text)):
        return []
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|<>()\n" if is_shell else False)
    lexer.whitespace_split = True
    lexer.commenters = ""
    lexer.whitespace = " \t" if is_shell else " \t\n"
    try:
        words = list(lexer)
    except ValueError:  # a quotation without an end
        return []
    return [] if is_shell and any(set(word) <= set(";&|<>()\n") for word in words) else words


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
