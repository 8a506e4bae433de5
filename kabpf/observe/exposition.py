"""Metrics as text, by Prometheus's client library.

To import that as a whole is to import its servers and collectors, which takes longer than all the
rest of a scrape. So its parts are imported alone, past the package's own __init__.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from typing import Any

from kabpf.errors import UnsupportedError

OPENMETRICS = "application/openmetrics-text"
_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_PACKAGE = "prometheus_client"


@functools.cache
def library() -> Any:
    """The module of the library that has families of metrics. Raises UnsupportedError where it is
    not installed."""
    return _part("metrics_core")


def encoded(families: Iterable[Any], accept: str) -> tuple[str, bytes]:
    """The media type and text of families: OpenMetrics where the Accept header names it, else
    Prometheus's own, which node_exporter reads too."""
    if not any(each.partition(";")[0].strip() == OPENMETRICS for each in accept.split(",")):
        return _TEXT, "".join(_lines(families)).encode()
    openmetrics = _part("openmetrics.exposition")

    class Collected:
        def collect(self) -> Iterable[Any]:
            return families

    return openmetrics.CONTENT_TYPE_LATEST, openmetrics.generate_latest(Collected())


def _lines(families: Iterable[Any]) -> Iterator[str]:
    """What the library's own writer makes of counters, gauges and infos; it comes with a server."""
    number = _part("utils").floatToGoString
    for family in families:
        kind = {"info": "gauge"}.get(family.type, family.type)
        name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
        help = family.documentation.replace("\\", r"\\").replace("\n", r"\n")
        yield f"# HELP {name} {help}\n# TYPE {name} {kind}\n"
        for sample in family.samples:
            pairs = ",".join(
                f'{key}="{_quoted(text)}"' for key, text in sorted(sample.labels.items())
            )
            yield f"{sample.name}{{{pairs}}} " if pairs else f"{sample.name} "
            yield f"{number(sample.value)}\n"


def _quoted(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _part(name: str) -> Any:
    try:
        with _package():
            return import_module(f"{_PACKAGE}.{name}")
    except ImportError:
        raise UnsupportedError(
            "the Prometheus client library is missing; try: apt install python3-prometheus-client"
        ) from None


@contextmanager
def _package() -> Iterator[None]:
    """The package, so that its parts are found, without what its __init__ does."""
    if _PACKAGE in sys.modules:
        yield
        return
    if (spec := find_spec(_PACKAGE)) is None:
        raise ImportError
    sys.modules[_PACKAGE] = module_from_spec(spec)
    try:
        yield
    finally:
        del sys.modules[_PACKAGE]
