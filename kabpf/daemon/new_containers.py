"""Containers that are just being made: which of their cgroups to look at, besides those that the
kernel asks about."""

from __future__ import annotations

import select
from collections.abc import Collection, Iterable

from kabpf.apply.containers import Containers
from kabpf.containers import names
from kabpf.daemon.container_requests import ContainerRequests, Request
from kabpf.daemon.late_containers import LateContainers
from kabpf.engines.engines import Engines
from kabpf.errors import KabpfError, RefusedError
from kabpf.kernel.cgroups import CgroupTree
from kabpf.kernel.dataplane import Born

LOOK_S = 0.2  # of a processor in engines' databases, each time: hooks and commands wait


class NewContainers:
    """Those that hooks ask about, and those that no engine knew when the kernel asked. `poll` ends
    when there are requests."""

    def __init__(self, tree: CgroupTree, poll: select.epoll) -> None:
        self._tree, self._poll = tree, poll
        self._late = LateContainers()
        self._requests = ContainerRequests()
        self._poll.register(self._requests, select.EPOLLIN)
        self._asked: list[tuple[Request, Born]] = []

    def close(self) -> None:
        """Hear no more; who waits is told so."""
        self.refuse("kabpfd ends")
        self._poll.unregister(self._requests)
        self._requests.close()

    def renew(self) -> None:
        """Be found by hooks again where the socket was removed."""
        self._requests.renew()

    @property
    def due(self) -> float | None:
        """When a cgroup is to be looked at again, or None."""
        return self._late.due

    def hear(self) -> bool:
        """Receive requests; whether `births` has any."""
        for request in self._requests.receive():
            try:
                self._asked.append((request, self._born(request)))
            except KabpfError as error:
                self._requests.answer(request, str(error))
        return bool(self._asked) or self._late.are_due

    def births(self) -> list[Born]:
        """The cgroups to look at now; `looked` says how that went."""
        return [*self._late.take(), *(born for _, born in self._asked)]

    def containers(self) -> Containers:
        """What looks up the containers of cgroups."""
        return Containers(self._tree, Engines(seconds=LOOK_S))

    def looked(self, births: Iterable[Born], unknown: Collection[int]) -> None:
        """These were looked at, and of those whose ids are `unknown` no engine knows anything.
        Tells who waits that the entries are written."""
        self._late.looked(births, unknown)
        for request, born in self._asked:
            is_unknown = born.id in unknown
            self._requests.answer(request, _UNKNOWN if is_unknown else "")
        self._asked.clear()

    def refuse(self, why: str) -> None:
        """Tell who waits that the cgroups were not looked at. For those that no engine knew it was
        a look, and they do not wait for ever."""
        due = self._late.take()
        self._late.looked(due, {born.id for born in due})
        for request, _ in self._asked:
            self._requests.answer(request, why)
        self._asked.clear()

    def _born(self, request: Request) -> Born:
        found = names.enclosing(request.cgroup)  # the runtime may be in a cgroup below
        if found is None:
            raise RefusedError(f"cgroup {request.cgroup} is not a container's")
        cgroup = self._tree.find(found[0])
        return Born(cgroup.id, cgroup.parent_id, cgroup.name)


_UNKNOWN = "no engine knows this container yet"
