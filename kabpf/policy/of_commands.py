"""Where commands write policy files, beside those of people."""

from __future__ import annotations

from pathlib import Path

# Files there may say with which cgroup they end, and whose they are. Nothing watches the second,
# which is that of `kabpfctl run`.
RUNTIME, TRANSIENT = Path("/run/kabpf/policy.d"), Path("/run/kabpf/transient.d")
