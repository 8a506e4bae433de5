"""Where podman and CRI-O keep containers: both use containers/storage.

A container's bundle is in the graph root, and in the run root where podman's store is transient
(libpod/container_internal.go, bundlePath()) and with CRI-O (server/container_create.go)."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import tomllib
from pathlib import Path
from typing import Any

from kabpf.engines import bundles, files
from kabpf.engines.bundles import Bundle

GRAPH_ROOT, RUN_ROOT = "var/lib/containers/storage", "run/containers/storage"
# The second one has what the first leaves out (containers-storage.conf(5)).
SETTINGS = ("etc/containers/storage.conf", "usr/share/containers/storage.conf")
DRIVERS = ("overlay", "vfs", "btrfs", "zfs")


def graph_root(root: Path) -> Path:
    """The directory of the store."""
    return _directory(root, "graphroot", GRAPH_ROOT)


def bundle(root: Path, id: str) -> Bundle:
    """The bundle of a container. Raises OSError where there is none."""
    problem: OSError = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    for directory in (graph_root(root), _directory(root, "runroot", RUN_ROOT)):
        for driver in DRIVERS:
            try:
                return bundles.read(directory, f"{driver}-containers/{id}/userdata")
            except FileNotFoundError:
                continue
            except OSError as error:
                problem = error
    raise problem


def _directory(root: Path, key: str, usual: str) -> Path:
    for name in SETTINGS:
        with contextlib.suppress(OSError):
            if named := files.text(_settings(files.read(root, name)).get(key)):
                return root / named.lstrip("/")
    return root / usual


@functools.lru_cache(maxsize=len(SETTINGS))  # it takes longer than a container's own files
def _settings(content: bytes) -> dict[str, Any]:
    """The table `storage` of a storage.conf; empty where that is wrong."""
    try:
        return files.inside(tomllib.loads(content.decode()), "storage")
    except (ValueError, RecursionError):
        return {}
