"""Who may call what is said by TABLE and nowhere else; what is not in it is denied.

A cgroup is named by its path, which leads to an open directory, and from there on is that
directory: its owner decides, and the policy is tied to its id.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from kabpf.plan.state import Cgroup
from kabpf.policy.options import REQUEST_KEYS
from kabpf.requests import varlink
from kabpf.requests.cgroup_path import opened
from kabpf.requests.interface import INTERFACE, INTERFACES, denied
from kabpf.requests.methods import Request, attach, detach, get_description, get_info
from kabpf.requests.peercred import Peer
from kabpf.requests.varlink import Call, CallError


class Role(StrEnum):
    """What a caller is to the cgroup that a call names; to none, STRANGER or ROOT."""

    ROOT = "root"
    OWNER = "owner"
    STRANGER = "stranger"
    OUTSIDER = "outsider"  # not full: one of another user namespace, whatever its uid is


@dataclass(frozen=True)
class Rule:
    """Who may call a method, what its parameters are, and what does it."""

    callers: frozenset[Role]
    handle: Callable[[Request], Mapping[str, Any]]
    types: Mapping[str, type]
    required: tuple[str, ...]


def allowed(call: Call, peer: Peer) -> Request:
    """The call as a request. Raises CallError unless it is one of TABLE, well-formed, and allowed
    to the caller."""
    if call.interface not in INTERFACES:
        raise CallError.of_service("InterfaceNotFound", interface=call.interface)
    if call.method not in TABLE:
        raise CallError.of_service("MethodNotFound", method=call.method)
    rule = TABLE[call.method]
    if not peer.is_full and Role.OUTSIDER not in rule.callers:
        raise CallError.of_service("PermissionDenied")
    if call.upgrade:
        raise CallError.of_service("MethodNotImplemented", method=call.method)
    parameters = varlink.checked(call, rule.types, rule.required)
    cgroup, owner = NOWHERE, None
    if "cgroup" in rule.types:
        cgroup, owner = opened(parameters["cgroup"], peer.uid)
    if role(peer, owner) not in rule.callers:
        raise denied(f"{cgroup.path} belongs to uid {owner}, expected uid {peer.uid}")
    return Request(peer.uid, cgroup, parameters)


def role(peer: Peer, owner: int | None) -> Role:
    """What a caller is to a cgroup with this owner, or to none."""
    if not peer.is_full:
        return Role.OUTSIDER
    if peer.uid == 0:
        return Role.ROOT
    return Role.OWNER if peer.uid == owner else Role.STRANGER


NOWHERE = Cgroup(0, 0, "")
_EVERYBODY = frozenset(Role)
_OWNERS = frozenset({Role.ROOT, Role.OWNER})
_ATTACH = {
    "cgroup": str,
    **dict.fromkeys(("keepalive", *REQUEST_KEYS, "mode"), str),
    **dict.fromkeys(("defaults", "existing"), bool),
}
TABLE: Mapping[str, Rule] = {
    varlink.GET_INFO: Rule(_EVERYBODY, get_info, {}, ()),
    varlink.GET_DESCRIPTION: Rule(_EVERYBODY, get_description, {"interface": str}, ("interface",)),
    f"{INTERFACE}.Attach": Rule(_OWNERS, attach, _ATTACH, ("cgroup",)),
    f"{INTERFACE}.Detach": Rule(_OWNERS, detach, {"cgroup": str}, ("cgroup",)),
}
