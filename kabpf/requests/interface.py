"""The Varlink interface io.kabpf: what users may ask, as they see it."""

from __future__ import annotations

from kabpf.policy.options import REQUEST_KEYS
from kabpf.requests import varlink
from kabpf.requests.varlink import CallError

INTERFACE = "io.kabpf"
_OPTIONS = "\n".join(f"  {key}: ?string," for key in REQUEST_KEYS)

DESCRIPTION = f"""\
# TCP keepalive by policy, for cgroups that belong to the caller.
interface io.kabpf

# Activates a policy for a cgroup and all below it, until the cgroup is removed. It replaces a
# former one. The path is absolute in the cgroup2 tree. Options are spelled
# as in kabpf.yaml(5), but not as ranges: idle "60s", interval "10s", probes "6", user_timeout
# "90s", "auto" or "off", preset "aws-nlb". What is left out comes from the administrator's
# defaults, as they are now, unless defaults is false; and else stays as it is on each socket.
# Replies when the policy is active; updated is how many open sockets were changed, which existing
# false leaves alone.
method Attach(
  cgroup: string,
  keepalive: ?(on, off),
{_OPTIONS}
  defaults: ?bool,
  mode: ?(fill, override),
  existing: ?bool
) -> (
  cgroup: string,
  policy: string,
  file: string,
  options: object,
  updated: int
)

# Undoes Attach. Sockets keep the options that they have.
method Detach(cgroup: string) -> (removed: []string)

# The caller may not do that: another's cgroup, or not what the administrator lets users have.
error Denied (reason: string)

# The caller may, but it can't be done now.
error Refused (reason: string)
"""

INTERFACES = {varlink.SERVICE: varlink.DESCRIPTION, INTERFACE: DESCRIPTION}


def denied(reason: str) -> CallError:
    """The answer to a caller who may not do that."""
    return CallError(f"{INTERFACE}.Denied", reason=reason)


def refused(reason: str) -> CallError:
    """The answer to a caller who may, where it can't be done now."""
    return CallError(f"{INTERFACE}.Refused", reason=reason)
