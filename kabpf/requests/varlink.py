"""Varlink's messages (varlink.org), bounded: a call, its reply or its error, in JSON up to a NUL.

What stands in a message is somebody else's: it is small, flat, UTF-8, without a key twice and
without fractions, or it is not taken at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

MESSAGE_MAX = 64 * 1024  # bytes, without the NUL
DEPTH_MAX = 8
NUMBER_MAX = 2**63 - 1  # Varlink's int

SERVICE = "org.varlink.service"
GET_INFO = f"{SERVICE}.GetInfo"
GET_DESCRIPTION = f"{SERVICE}.GetInterfaceDescription"
DESCRIPTION = """\
# What every Varlink service offers.
interface org.varlink.service

# Who the service is, and which interfaces it has.
method GetInfo() -> (
  vendor: string,
  product: string,
  version: string,
  url: string,
  interfaces: []string
)

# What an interface offers.
method GetInterfaceDescription(interface: string) -> (description: string)

error InterfaceNotFound (interface: string)
error MethodNotFound (method: string)
error MethodNotImplemented (method: string)
error InvalidParameter (parameter: string)
error PermissionDenied ()
error ExpectedMore ()
"""

_CALL_KEYS = {"method": str, "parameters": dict, "oneway": bool, "more": bool, "upgrade": bool}
_REPLY_KEYS = {"parameters": dict, "continues": bool, "error": str}
_NAME = r"[A-Za-z](?:-*[A-Za-z0-9])*(?:\.[A-Za-z0-9](?:-*[A-Za-z0-9])*)+\.[A-Z][A-Za-z0-9]*"
# One without an end goes up to the text's, as an end would be looked for from each quote in it.
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"?', re.DOTALL)


class MessageError(ValueError):
    """Bytes that are no message of Varlink, or a greater or deeper one than is taken here."""


class CallError(Exception):
    """What answers a call that fails: an error's name and its parameters."""

    def __init__(self, name: str, /, **parameters: Any) -> None:
        super().__init__(name)
        self.name = name
        self.parameters = parameters

    @classmethod
    def of_service(cls, name: str, /, **parameters: Any) -> CallError:
        """An error of org.varlink.service."""
        return cls(f"{SERVICE}.{name}", **parameters)


@dataclass(frozen=True)
class Call:
    """What a client sends. The flags are the protocol's: no answer is wanted, several are taken,
    and the connection is to speak another protocol afterwards."""

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    oneway: bool = False
    more: bool = False
    upgrade: bool = False

    @property
    def interface(self) -> str:
        """The method's name up to its last dot."""
        return self.method.rpartition(".")[0]


def parse_call(message: bytes) -> Call:
    """The call of a message, which comes without its NUL. Raises MessageError."""
    fields = _parse(message, _CALL_KEYS)
    method = fields.get("method", "")
    if not re.fullmatch(_NAME, method):
        raise MessageError("no name of a method")
    if fields.get("upgrade") and (fields.get("oneway") or fields.get("more")):
        raise MessageError("upgrade beside oneway or more")
    if fields.get("oneway") and fields.get("more"):
        raise MessageError("oneway beside more")
    return Call(**fields)


def parse_reply(message: bytes) -> Mapping[str, Any]:
    """The parameters of a reply, which comes without its NUL. Raises CallError for an error, and
    MessageError."""
    fields = _parse(message, _REPLY_KEYS)
    parameters: Mapping[str, Any] = fields.get("parameters", {})
    if "error" in fields:
        raise CallError(fields["error"], **parameters)
    return parameters


def call(method: str, parameters: Mapping[str, Any]) -> bytes:
    """The message of a call, with its NUL."""
    return _message({"method": method, "parameters": parameters})


def reply(parameters: Mapping[str, Any]) -> bytes:
    """The message of a reply, with its NUL."""
    return _message({"parameters": parameters})


def error(failed: CallError) -> bytes:
    """The message of an error, with its NUL."""
    return _message({"error": failed.name, "parameters": failed.parameters})


def checked(call: Call, types: Mapping[str, type], required: tuple[str, ...]) -> dict[str, Any]:
    """The parameters of a call that are not null, all known and of their types.

    Raises CallError with InvalidParameter.
    """
    given = {name: value for name, value in call.parameters.items() if value is not None}
    for name in (*call.parameters, *required):
        if name not in types or (name in required and name not in given):
            raise CallError.of_service("InvalidParameter", parameter=name)
        if name in given and type(given[name]) is not types[name]:  # a bool is no int here
            raise CallError.of_service("InvalidParameter", parameter=name)
    return given


def _message(content: Mapping[str, Any]) -> bytes:
    # Of ASCII alone, so that whatever a text has in it can be sent.
    return json.dumps(content, separators=(",", ":")).encode() + b"\0"


def _parse(message: bytes, types: Mapping[str, type]) -> dict[str, Any]:
    """A message's fields that are not null."""
    if len(message) > MESSAGE_MAX:
        raise MessageError(f"{len(message)} bytes, expected at most {MESSAGE_MAX}")
    try:
        text = message.decode()
        _check_depth(text)
        content = json.loads(
            text,
            object_pairs_hook=_pairs,
            parse_int=_integer,
            parse_float=_refused,
            parse_constant=_refused,
        )
        _check_texts(content)
    except (ValueError, RecursionError) as problem:
        raise MessageError(str(problem)) from None
    if not isinstance(content, dict):
        raise MessageError("not an object")
    given = {key: value for key, value in content.items() if value is not None}
    for key, value in given.items():
        if type(value) is not types.get(key):
            raise MessageError(
                f"{key[:20]!r}, expected one of {', '.join(types)}, each of its type"
            )
    return given


def _check_depth(text: str) -> None:
    """Before anything is built."""
    depth = 0
    for mark in re.findall(r"[\[\]{}]", _STRING.sub("", text)):
        depth += 1 if mark in "[{" else -1
        if depth > DEPTH_MAX:
            raise MessageError(f"nested too deep, expected at most {DEPTH_MAX} levels")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise MessageError("a key twice in one object")
    return content


def _integer(digits: str) -> int:
    value = int(digits) if len(digits) <= len(str(-NUMBER_MAX)) else NUMBER_MAX + 1
    if abs(value) > NUMBER_MAX:
        raise MessageError("a number of more than 64 bits")
    return value


def _refused(text: str) -> NoReturn:
    raise MessageError(f"{text[:20]}, expected no number but integers")


def _check_texts(value: Any) -> None:
    """Half a surrogate pair is no text: it can neither be encoded nor shown."""
    waiting = [value]
    for each in waiting:
        if isinstance(each, dict):
            waiting += [*each, *each.values()]
        elif isinstance(each, list):
            waiting += each
        elif isinstance(each, str):
            each.encode()
