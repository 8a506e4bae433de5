"""What podman has on disk of a container: the bundle, and its database, where labels are.

libpod writes both before the OCI runtime makes the container (libpod/container_internal.go,
init()); its API would wait for the lock that `podman start` holds meanwhile."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from kabpf.containers.facts import Container, Pod
from kabpf.engines import bolt, files, storage
from kabpf.engines.files import Budget

SQLITE = "db.sql"  # libpod/sqlite_state.go, since podman 4.8
BOLT = "libpod/bolt_state.db"  # libpod/boltdb_state.go
_STEPS = 1000  # of SQLite's machine between two looks at the clock


def lacks(root: Path) -> str | None:
    """What can't be told of the containers of root's podman here, and why; None where there is no
    podman."""
    store = storage.graph_root(root)
    problem = files.lacks(store, SQLITE)
    return files.lacks(store, BOLT) if problem is None else problem


def facts(root: Path, path: str, id: str, budget: Budget) -> Container | None:
    """A container by its cgroup's path and its id. Raises OSError where podman has none, and
    TimeoutError where the budget is used up before."""
    bundle = storage.bundle(root, id)
    if bundle.annotations.get("io.container.manager") != "libpod" or bundle.cgroup != path:
        return None
    with budget.spent():
        config, pod = _configs(storage.graph_root(root), id, budget)
    return Container(
        id=id,
        engine="podman",
        name=files.text(config.get("name")),
        # The second one is of podman 4 and before, where an image was given by its id.
        image=files.text(config.get("RawImageName") or config.get("rootfsImageName")),
        labels=files.texts(files.inside(config, "labels")),
        annotations=bundle.annotations,
        pod=_pod(pod) if pod else None,
    )


def _pod(config: dict[str, Any]) -> Pod:
    labels = files.texts(files.inside(config, "labels"))
    return Pod("", files.text(config.get("name")), files.text(config.get("id")), labels)


_Configs = tuple[dict[str, Any], dict[str, Any]]


def _configs(store: Path, id: str, budget: Budget) -> _Configs:
    """What podman's database has of a container, and of its pod. Raises OSError."""
    if (store / SQLITE).exists():
        return _by_sqlite(store, id, budget)
    descriptor = files.opened(store, BOLT)
    try:
        return bolt.look(descriptor, lambda view: _by_bolt(view, id))
    finally:
        os.close(descriptor)


def _by_bolt(view: bolt.View, id: str) -> _Configs:
    """See boltdb_state_internal.go."""
    config = files.decoded(view.value(b"ctr", id.encode(), b"config") or b"")
    pod = files.text(config.get("pod"))
    found = pod and view.value(b"pod", os.fsencode(pod), b"config")
    return config, files.decoded(found) if found else {}


def _by_sqlite(store: Path, id: str, budget: Budget) -> _Configs:
    import sqlite3  # 5 ms, where podman has such a database

    os.close(files.opened(store, SQLITE))  # it is a file, and no link leads to it
    # Read alone: without the journal of a killed podman, which is podman's to play back.
    place = f"{(store / SQLITE).absolute().as_uri()}?mode=ro"
    try:
        try:
            with budget.waiting() as seconds:
                found = _row(place, id, seconds, budget)
        except sqlite3.OperationalError:
            if budget.is_over:
                raise
            # Locked, as a container's removal has it on a busy machine, so without its lock. The
            # row is older than the start, and what is torn is no JSON.
            found = _row(f"{place}&immutable=1", id, 0, budget)
    except sqlite3.Error as error:
        if budget.is_over:
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None
        raise OSError(errno.EIO, str(error)) from None
    if not found:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    config, pod = (each.encode() if isinstance(each, str) else each or b"" for each in found)
    return files.decoded(config), files.decoded(pod) if pod else {}


def _row(
    place: str, id: str, lock_s: float, budget: Budget
) -> tuple[bytes | str, bytes | str | None] | None:
    """A container's JSON and its pod's. Raises sqlite3.Error."""
    import sqlite3

    database = sqlite3.connect(place, uri=True, timeout=lock_s)
    try:
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, files.BYTES_MAX)
        database.set_progress_handler(lambda: budget.is_over, _STEPS)
        row: tuple[bytes | str, bytes | str | None] | None = database.execute(
            "SELECT c.JSON, p.JSON FROM ContainerConfig AS c"
            " LEFT JOIN PodConfig AS p ON p.ID = c.PodID WHERE c.ID = ?",
            (id,),
        ).fetchone()
        return row
    finally:
        database.close()
