"""Metrics as text: what the client library itself would write, without most of the library."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from kabpf.observe import exposition

ACCEPT = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"


def families() -> list[Any]:
    library = exposition.library()
    info = library.InfoMetricFamily("a_build", "The version.", {"version": '1"\\'})
    gauge = library.GaugeMetricFamily("a_state", "A state\\ of\nthings.", 1.5e9)
    counter = library.CounterMetricFamily("a_calls", "Calls.", labels=["policy", "errno"])
    counter.add_metric(["web", "EPERM"], 3)
    counter.add_metric(['"\\\n', ""], 0)
    return [info, gauge, counter, library.CounterMetricFamily("a_none", "None.", labels=["a"])]


@pytest.mark.parametrize("accept", ["", "text/plain", ACCEPT])
def test_text_is_what_the_library_writes(accept: str) -> None:
    """In either format, byte for byte."""
    whole = pytest.importorskip("prometheus_client.exposition")

    class Collected:
        def collect(self) -> list[Any]:
            return families()

    encode, content_type = whole.choose_encoder(accept)
    found_type, text = exposition.encoded(families(), accept)
    assert text == encode(Collected())
    assert found_type == content_type


@pytest.mark.parametrize("accept", ["", ACCEPT])
def test_servers_of_the_library_are_not_imported(accept: str) -> None:
    """They take as long as all the rest of a scrape; it can be imported as a whole later."""
    pytest.importorskip("prometheus_client")
    code = (
        "import sys\nfrom kabpf.observe import exposition\n"
        "family = exposition.library().GaugeMetricFamily('a', 'A.', 1)\n"
        f"exposition.encoded([family], {accept!r})\n"
        "print(*sys.modules)\n"
        "import prometheus_client\nprometheus_client.generate_latest"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=True)
    imported = done.stdout.decode().split()
    assert "prometheus_client.metrics_core" in imported
    assert not {"http.server", "ssl", "prometheus_client"}.intersection(imported)
