"""How long `kabpfctl import` takes on a machine of some size."""

from __future__ import annotations

import time
from pathlib import Path

from kabpf.migration import proposals

UNITS, PROCESSES = 300, 2000
MAPPINGS = 100
SECONDS_MAX = 2  # of CPU time

UNIT = """\
[Unit]
Description=An application
After=network.target
[Service]
EnvironmentFile=-/etc/default/app-{n}
ExecStartPre=/bin/sh -c 'mkdir -p /run/app-{n}'
ExecStart=/bin/bash /opt/app-{n}/start.sh --flag
ExecReload=/bin/kill -HUP $MAINPID
[Install]
WantedBy=multi-user.target
"""
SCRIPT = """\
#!/bin/bash
HERE=$(dirname "$0")
{tests}{preload}exec "$HERE/app" "$@"
"""
TEST = 'if [ -z "$OPTION_{n}" ]; then OPTION_{n}=/opt/option-{n}; export OPTION_{n}; fi\n'
PRELOAD = "LD_PRELOAD=/usr/lib/libdontdie.so DD_TCP_KEEPALIVE_TIME=60 "


def test_a_large_machine_takes_no_time(tmp_path: Path) -> None:
    """300 units with a script each, of which every tenth preloads, and 2,000 processes."""
    root, proc = tmp_path / "root", tmp_path / "proc"
    tests = "".join(TEST.format(n=n) for n in range(12))
    for n in range(UNITS):
        unit = root / f"usr/lib/systemd/system/app-{n}.service"
        script, defaults = root / f"opt/app-{n}/start.sh", root / f"etc/default/app-{n}"
        for path in (unit, script, defaults):
            path.parent.mkdir(parents=True, exist_ok=True)
        unit.write_text(UNIT.format(n=n))
        script.write_text(SCRIPT.format(tests=tests, preload="" if n % 10 else PRELOAD))
        defaults.write_text("# What the application is started with.\nOPTIONS=-x\n")
    maps = "".join(
        f"7f{n:010x}-7f{n + 1:010x} r--p 00000000 fe:00 {n} {' ' * 20}/usr/lib/lib{n}.so\n"
        for n in range(MAPPINGS)
    )
    for pid in range(1, PROCESSES + 1):
        (proc / str(pid)).mkdir(parents=True)
        (proc / str(pid) / "maps").write_text(maps)
        (proc / str(pid) / "environ").write_text("PATH=/usr/bin\0HOME=/root\0" * 10)
    begin = time.process_time()
    found = proposals.look(root, proc)
    took = time.process_time() - begin
    assert len(found.policies) == UNITS / 10
    assert (found.unclear, found.unread) == ([], [])
    assert f"memory now: {PROCESSES}" in found.searched[-1]
    assert took < SECONDS_MAX
