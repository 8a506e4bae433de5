"""The state of kabpf's own systemd units."""

from __future__ import annotations

from pathlib import Path

from kabpf.doctor.findings import Findings, error, note, ok, warning
from kabpf.runtime.locks import RUN
from kabpf.systemd import scopes

SERVICE, RELOAD, RETROFIT = "kabpf.service", "kabpf-reload.path", "kabpf-retrofit.socket"
REQUEST = "kabpf-request.socket"  # which may be switched off
OWN = (SERVICE, RELOAD, RETROFIT, REQUEST, "kabpf-*.service")  # the last as far as they were used
KEYS = ("Id", "LoadState", "ActiveState", "UnitFileState", "Result", "NeedDaemonReload")
ANSWER_S = 5


def findings() -> Findings:
    """What systemd says of our units."""
    if not scopes.is_booted():
        yield note(
            "systemd does not run here: nothing starts kabpfd, and no unit has a cgroup",
            "select cgroups by their paths, such as /",
        )
        return
    import subprocess  # here, because it takes 10 ms

    command = ["systemctl", "show", f"--property={','.join(KEYS)}", *OWN]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S)
    except subprocess.TimeoutExpired:
        yield warning(f"systemctl does not answer within {ANSWER_S} s", "systemctl status")
        return
    if done.returncode:
        yield warning(f"systemctl: {done.stderr.strip()}", "systemctl status")
        return
    yield from judge(done.stdout)
    yield from _removed_sockets(done.stdout)


def judge(shown: str) -> Findings:
    """What is wrong with our units, from the output of `systemctl show` on KEYS."""
    units = {unit["Id"]: unit for unit in properties(shown)}
    if units and units[SERVICE]["LoadState"] == "not-found":
        yield note(
            f"{SERVICE} is not installed: nothing starts kabpf at boot", "kabpfd --install-units"
        )
        return
    for name, unit in units.items():
        yield from _unit_findings(name, unit)
    runs = bool(units) and units[SERVICE]["ActiveState"] == "active"
    if runs and units[RELOAD]["ActiveState"] != "active":
        yield note(
            f"{RELOAD} is not active: policy files that change wait for systemctl reload kabpf",
            f"systemctl start {RELOAD}",
        )
    if runs and units[RETROFIT]["ActiveState"] != "active":
        yield warning(
            f"{RETROFIT} is not active: open connections can't be given a policy",
            f"systemctl start {RETROFIT}",
        )


def _removed_sockets(shown: str, run: Path = RUN) -> Findings:
    """Sockets that systemd listens at, and that somebody has removed."""
    active = {unit["Id"] for unit in properties(shown) if unit["ActiveState"] == "active"}
    for name, file in ((RETROFIT, "retrofit.socket"), (REQUEST, "request.socket")):
        if name in active and not (run / file).exists():
            yield warning(
                f"{run / file} is gone, where {name} listens", f"systemctl restart {name}"
            )


def properties(shown: str) -> list[dict[str, str]]:
    """Those of each unit, from the output of `systemctl show`."""
    return [
        {key: value for key, _, value in (line.partition("=") for line in block.split("\n"))}
        for block in shown.strip("\n").split("\n\n")
        if block
    ]


def _unit_findings(name: str, unit: dict[str, str]) -> Findings:
    if unit["LoadState"] == "masked":
        yield warning(f"{name} is masked", f"systemctl unmask {name}")
    elif unit["ActiveState"] == "failed":
        yield error(f"{name} failed: {unit['Result']}", f"journalctl -u {name}")
    elif unit["NeedDaemonReload"] == "yes":
        yield warning(f"{name} was changed on disk", "systemctl daemon-reload")
    elif name == SERVICE and unit["UnitFileState"] == "disabled":
        yield warning(
            f"{name} is not enabled: no policy after the next boot", f"systemctl enable {name}"
        )
    elif name == SERVICE:
        yield ok(f"{name} is {unit['UnitFileState']} and {unit['ActiveState']}")
