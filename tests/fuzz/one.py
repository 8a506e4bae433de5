"""Fuzzes one target in a process of its own, or names all targets.

one.py [TARGET N]
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kabpf"]):
    import targets

BYTES_MAX = 16384  # the good inputs that are longer are not changed
SECONDS_MAX = 20  # by the clock, on a busy machine too
MEMORY_MAX = 512  # MiB

if len(sys.argv) == 1:
    print(*targets.TARGETS)
    sys.exit()

name, inputs = sys.argv[1:]
directory = Path("build/fuzz") / name
corpus = directory / "corpus"
corpus.mkdir(parents=True, exist_ok=True)
for number, content in enumerate(targets.seeds(name)):
    (corpus / f"seed-{number}").write_bytes(content)
atheris.Setup(
    [
        sys.argv[0], str(corpus), f"-artifact_prefix={directory}/", f"-runs={inputs}",
        f"-max_len={BYTES_MAX}", f"-timeout={SECONDS_MAX}", f"-rss_limit_mb={MEMORY_MAX}",
        "-print_final_stats=1", "-verbosity=0",
    ],
    targets.TARGETS[name],
)  # fmt: skip
atheris.Fuzz()
