"""Transient scopes of systemd (systemd.scope(5)): has the manager move this process into one.

The manager listens on a socket of its own, for which no bus daemon is needed; systemctl(1) and
systemd-run(1) use it too. Spoken is D-Bus ("Message Protocol" in its specification): one call.
"""

from __future__ import annotations

import os
import re
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kabpf.errors import RefusedError
from kabpf.kernel import cgroups

if TYPE_CHECKING:
    import socket

# How long the manager may take, as where it is about to reload itself.
ANSWER_S = 30

_ANSWERS = "try: systemctl status"
_LINGERS = (
    "this user has no manager; log in, or ask an administrator to run: loginctl enable-linger {uid}"
)

MESSAGE_MAX = 1 << 20  # bytes; those of systemd have some hundreds
CALL, ERROR, SIGNAL = 1, 3, 4
PATH, INTERFACE, MEMBER, DESTINATION, SIGNATURE = 1, 2, 3, 6, 8

_ORDERS = {b"l": "<", b"B": ">"}
_OURS = b"l" if sys.byteorder == "little" else b"B"


def is_booted() -> bool:
    """Whether systemd is the init system (sd_booted(3))."""
    return Path("/run/systemd/system").is_dir()


def enter(name: str, description: str) -> str:
    """Move this process into a new scope; the scope's cgroup path.

    Root asks the system's manager, others ask their own. The scope is in the slice that the process
    is in, so that the limits of that hold on. Its end is the end of its last process. Raises
    RefusedError.
    """
    import socket  # here, because inside of a unit nobody is asked

    unit = f"{name}.scope"
    manager = Path("/run")
    if os.geteuid() != 0:
        manager = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}")
    address = manager / "systemd/private"
    slice = own_slice(cgroups.path_of_process("self"), is_root=os.geteuid() == 0)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as channel:
            channel.settimeout(ANSWER_S)
            channel.connect(str(address))
            _start(channel, unit, description, slice)
    except OSError as error:
        raise RefusedError(
            f"ask systemd at {address} for {unit}",
            error.errno or 0,
            _ANSWERS if os.geteuid() == 0 else _LINGERS.format(uid=os.geteuid()),
        ) from None
    path = cgroups.path_of_process("self")
    if not path.endswith(f"/{unit}"):
        raise RefusedError(f"systemd did not move this process into {unit}")
    return path


def unit_of(path: str) -> str:
    """The unit, as foo.service, that a cgroup path is in or below; "" where that is a slice or a
    manager, which are nobody's limits."""
    for name in reversed(path.split("/")):
        name = name.removeprefix("_")  # systemd escapes what looks like a file of the kernel's so
        if name.endswith(".slice") or name == "init.scope" or name.startswith("user@"):
            return ""
        if name.endswith((".service", ".scope", ".socket", ".mount", ".swap")):
            return name
    return ""


def is_in_session(path: str) -> bool:
    """Whether a cgroup path is in a login session, inside of which PAM makes no other."""
    return re.fullmatch(r"session-[^/]+\.scope", unit_of(path)) is not None


def own_slice(path: str, *, is_root: bool) -> str:
    """The slice of a manager that a cgroup path is in, or "" for the manager's default.

    Of a user's manager it is below user@UID.service; a process that is elsewhere is in none.
    """
    names = path.split("/")[1:]
    if not is_root:
        managers = [at for at, name in enumerate(names) if name.startswith("user@")]
        names = names[managers[0] + 1 :] if managers else []
    slices = []
    for name in names:
        if not name.endswith(".slice"):
            break
        slices.append(name)
    return slices[-1] if slices else ""


def _start(channel: socket.socket, unit: str, description: str, slice: str) -> None:
    uid = str(os.geteuid()).encode().hex()
    call = _call("StartTransientUnit", "ssa(sv)a(sa(sv))", _scope(unit, description, slice))
    channel.sendall(b"\0AUTH EXTERNAL %s\r\nBEGIN\r\n" % uid.encode() + call)
    stream = channel.makefile("rb")
    if not stream.readline(MESSAGE_MAX).startswith(b"OK "):
        raise RefusedError("systemd refuses this user: only the owner of the manager may do that")
    for message in _messages(stream.read):
        if message.kind == ERROR:
            raise RefusedError(f"systemd refuses {unit}: {message.values[0]}")
        # From the manager to all its clients: id, job, unit, result.
        if message.kind == SIGNAL and message.member == "JobRemoved" and unit in message.values:
            if message.values[-1] != "done":
                raise RefusedError(f"systemd could not start {unit}: result {message.values[-1]}")
            return
    raise RefusedError(f"systemd closed the connection before {unit} was there")


class _Writer:
    """Marshals values one after the other; `raw` begins where a message or its body does."""

    def __init__(self, raw: bytes = b"") -> None:
        self.raw = raw

    def align(self, size: int) -> None:
        self.raw += bytes(-len(self.raw) % size)

    def number(self, number: int) -> None:
        self.align(4)
        self.raw += struct.pack("=I", number)

    def string(self, text: str) -> None:
        data = os.fsencode(text)
        self.number(len(data))
        self.raw += data + b"\0"

    def signature(self, text: str) -> None:
        self.raw += bytes([len(text)]) + text.encode() + b"\0"

    @contextmanager
    def array(self, align: int) -> Iterator[None]:
        """What is written inside are its items, each aligned to so many bytes."""
        self.number(0)
        at = len(self.raw)
        self.align(align)
        start = len(self.raw)
        yield
        length = struct.pack("=I", len(self.raw) - start)
        self.raw = self.raw[: at - 4] + length + self.raw[at:]


def _scope(unit: str, description: str, slice: str) -> bytes:
    """The arguments of StartTransientUnit: name, mode, properties, and no other units."""
    body = _Writer()
    body.string(unit)
    body.string("fail")
    properties = {"Description": description, "CollectMode": "inactive-or-failed"}
    if slice:
        properties["Slice"] = slice
    with body.array(8):
        for key, text in properties.items():
            body.align(8)
            body.string(key)
            body.signature("s")
            body.string(text)
        body.align(8)
        body.string("PIDs")
        body.signature("au")
        with body.array(4):
            body.number(os.getpid())
    with body.array(8):
        pass
    return body.raw


def _call(member: str, signature: str, body: bytes) -> bytes:
    manager = "org.freedesktop.systemd1"
    fields = [
        (PATH, "o", "/org/freedesktop/systemd1"),
        (INTERFACE, "s", f"{manager}.Manager"),
        (MEMBER, "s", member),
        (DESTINATION, "s", manager),
    ]
    message = _Writer(_OURS + bytes([CALL, 0, 1]))
    message.number(len(body))
    message.number(1)  # the serial
    with message.array(8):
        for code, kind, text in fields:
            message.align(8)
            message.raw += bytes([code])
            message.signature(kind)
            message.string(text)
        message.align(8)
        message.raw += bytes([SIGNATURE])
        message.signature("g")
        message.signature(signature)
    message.align(8)
    return message.raw + body


class _Message(NamedTuple):
    kind: int
    member: str
    values: tuple[str, ...]  # of its body, as far as they are numbers and strings


def _messages(read: Callable[[int], bytes]) -> Iterator[_Message]:
    """The messages of a stream, up to its end."""
    while len(head := read(16)) == 16:
        order = _ORDERS[head[:1]]
        length, _, fields_length = struct.unpack(f"{order}III", head[4:])
        if length + fields_length > MESSAGE_MAX:
            return
        padding = -fields_length % 8
        fields = read(fields_length + padding)[:fields_length]
        body = read(length)
        texts: dict[int, str] = {}
        at = 0
        while at < fields_length:
            code = at + -at % 8
            kind, at = _value(fields, code + 1, "g", order)
            texts[fields[code]], at = _value(fields, at, kind, order)
        values: list[str] = []
        at = 0
        for kind in texts.get(SIGNATURE, ""):
            if kind not in "uosg":
                break
            value, at = _value(body, at, kind, order)
            values.append(value)
        yield _Message(head[1], texts.get(MEMBER, ""), tuple(values))


def _value(raw: bytes, at: int, kind: str, order: str) -> tuple[str, int]:
    """A number, a string, a path or a signature as text, and where it ends."""
    if kind == "g":
        end = at + 1 + raw[at]
        return raw[at + 1 : end].decode(), end + 1
    at += -at % 4
    (number,) = struct.unpack_from(f"{order}I", raw, at)
    if kind == "u":
        return str(number), at + 4
    end = at + 4 + number
    return raw[at + 4 : end].decode(errors="replace"), end + 1
