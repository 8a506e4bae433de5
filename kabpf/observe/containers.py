"""What people call the containers that cgroups are of, as their engines know them."""

from __future__ import annotations

import contextlib
import functools
import time
from typing import TYPE_CHECKING

from kabpf.containers.facts import Container
from kabpf.containers.names import enclosing
from kabpf.plan.patterns import compiled

if TYPE_CHECKING:
    from kabpf.engines.engines import Engines

ID_PREFIX_MIN = 4  # digits of an id that stand for it
SHORT_ID = 12  # digits, as engines show it

# crun has processes in a cgroup of this name (cgroup.c: enter_cgroup_subsystem()).
_INNER = "/container"


def of(path: str) -> Container | None:
    """The container that a cgroup is of, or is in, as it is known now."""
    found = _found(path)
    return found[1] if found else None


def own(path: str) -> Container | None:
    """The container whose own cgroup this is."""
    found = _found(path)
    return found[1] if found and found[0] == path else None


def called(path: str) -> str | None:
    """What to call a cgroup of a container's, or None where no engine knows that: the container's
    name, in a pod behind those of namespace and pod; and the path below it."""
    found = _found(path)
    if found is None:
        return None
    own, container = found
    return name(container) + path[len(own) :].removeprefix(_INNER)


def name(container: Container) -> str:
    """What to call a container."""
    own = container.name or container.id[:SHORT_ID]
    if container.pod is None:
        return own
    return "/".join(filter(None, (container.pod.namespace, container.pod.name, own)))


def is_meant(path: str | None, text: str) -> bool:
    """Whether a cgroup is of a container, or in one, that is meant by this text: a name or glob, of
    the container, of its pod, or as `name` has it; or the beginning of its id."""
    container = of(path) if path else None
    if container is None:
        return False
    names = [container.name, name(container)]
    if container.pod:
        names += [container.pod.name, f"{container.pod.namespace}/{container.pod.name}"]
    is_id = len(text) >= ID_PREFIX_MIN and container.id.startswith(text)
    return is_id or any(compiled(text).match(each) for each in names)


def as_json(path: str | None) -> dict[str, object] | None:
    """The container that a cgroup is of, or is in."""
    container = of(path) if path else None
    if container is None:
        return None
    pod = container.pod
    return {
        "engine": container.engine,
        "id": container.id,
        "name": container.name,
        "image": container.image,
        "pod": pod and {"namespace": pod.namespace, "name": pod.name, "uid": pod.uid},
    }


def _found(path: str) -> tuple[str, Container] | None:
    found = enclosing(path)
    if found is None:
        return None
    own, identity = found
    with contextlib.suppress(LookupError):
        return own, _known(own, identity.id)
    return None


@functools.lru_cache(maxsize=4096)
def _known(path: str, id: str) -> Container:
    """Raises LookupError where nothing is known now, which may be another time."""
    container = _looked_up(path, id, int(time.monotonic()))
    if container is None:
        raise LookupError
    return container


@functools.lru_cache(maxsize=4096)
def _looked_up(path: str, id: str, second: int) -> Container | None:
    """Once a second, as an engine may write of it later; what there is no time for, then."""
    try:
        return _engines(second).facts(path, id)
    except TimeoutError:
        return None


@functools.lru_cache(maxsize=1)
def _engines(_second: int) -> Engines:
    from kabpf.engines.engines import Engines  # here, because most machines do without

    return Engines()
