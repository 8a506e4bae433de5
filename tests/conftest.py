"""Tiers: what needs the kernel is skipped where it can't run, and fails where it is required.

What a run has to say of itself as a whole is here too: its signals, set-ups that failed, what was
not run."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# An example takes as long as a busy machine needs.
hypothesis.settings.register_profile("kabpf", deadline=None, database=None)
hypothesis.settings.load_profile("kabpf")

# Files of more than a minute.
LONG = ("test_crashes", "test_names", "test_requests_in_kernel", "test_upgrade", "test_watch")

REQUIRED = os.environ.get("KABPF_REQUIRE", "").split(",")


def pytest_configure(config: pytest.Config) -> None:
    """Children of the tests have the default dispositions of signals, whatever runs the tests.

    nohup, a shell's `&` and some runners have signals ignored, which children inherit. A handler
    that does nothing ignores them for pytest alone, as exec undoes it; pytest-xdist's workers are
    children, too. No signal is blocked either."""
    if hasattr(config, "workerinput"):
        return
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in signal.valid_signals():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One that keeps the order of the tiers."""
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadGroupScheduling

    class InOrder(LoadGroupScheduling):
        """pytest-xdist 3.6 has the groups with most tests begin."""

        is_sorted = False

        def _assign_work_unit(self, node: Any) -> None:
            if not self.is_sorted:
                self.is_sorted = True
                place = {id: number for number, id in enumerate(self.collection)}
                groups = self.workqueue
                first = {group: min(map(place.__getitem__, groups[group])) for group in groups}
                for group in sorted(first, key=first.__getitem__):
                    groups.move_to_end(group)
            super()._assign_work_unit(node)

    return InOrder(config, log)


# First, because pytest-xdist reads the groups in the same hook.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: set[tuple[Path, str]] = set()
    for item in items:
        if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker("slow")
        if item.get_closest_marker("core"):
            # Of the tiers that load programs the quick run has one case of each test.
            name = (item.path, getattr(item, "originalname", item.name))
            if name in seen:
                item.add_marker("slow")
            seen.add(name)
        if (tier := _directory(item)) in TIERS:
            item.add_marker(tier)
            item.add_marker(pytest.mark.xdist_group(_group(item, tier)))
    items.sort(key=_turn)


def _group(item: pytest.Item, tier: str) -> str:
    """What is on one worker: what has a set-up in common, and what has to be alone."""
    if tier != "system" and _is_alone(item):
        return "alone"
    suite = item.callspec.params.get("suite") if hasattr(item, "callspec") else None
    return f"{suite or tier}-{item.path.stem}"


def _turn(item: pytest.Item) -> tuple[int, bool]:
    """Machines come first, as a worker that has entered the kernel tier's namespaces stays in them;
    those that have to be alone before all others, and so before there is anybody who waits. Then
    the kernel, the longest files first. What has to be alone there comes last: beside it go the
    unit tests, which wait for nobody."""
    directory = _directory(item)
    if directory == "system":
        return (0 if _is_alone(item) else 1, False)
    if directory in ("strangers", "kernel"):
        return (3 if _is_alone(item) else 2, item.path.stem not in LONG)
    return (4, False)


def _directory(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]


def _is_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None


def pytest_runtest_setup(item: pytest.Item) -> None:
    for tier in reversed(_tiers(item)):
        if lacking := TIERS[tier]():
            if tier in REQUIRED:
                pytest.fail(f"KABPF_REQUIRE={tier}, but {lacking}", pytrace=False)
            pytest.skip(lacking)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, None]:
    """A set-up that several tests share and that failed is one failure: the others' reports have
    its reason in one line. They are skipped, and failures where their tier is required.

    For the summary a report knows its tier."""
    report = (yield).get_result()
    report.tier = [*_tiers(item), "unit"][0]
    if call.when != "setup" or not report.failed or not call.excinfo:
        return
    # pytest raises the same exception again for every test that needs the fixture.
    first = vars(call.excinfo.value).setdefault("failed_in", item.nodeid)
    if first == item.nodeid:
        return
    reason = f"a set-up failed, see {first}: {_first_line(call.excinfo.value)}"
    report.longrepr = reason
    if not set(REQUIRED) & {*_tiers(item)}:
        report.outcome = "skipped"
        report.longrepr = (__file__, 0, f"Skipped: {reason}")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A line a tier: how many of its tests were not run, why, and what would run them."""
    reasons: dict[str, Counter[str]] = {}
    for report in terminalreporter.stats.get("skipped", []):
        tier = getattr(report, "tier", "unit")
        said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = re.sub(r"(\S+) is not installed$", r"\g<0>; try: scripts/apt install \1", said)
        reasons.setdefault(tier, Counter())[reason.removeprefix("Skipped: ")] += 1
    if not reasons:
        return
    terminalreporter.section("not run", blue=True)
    for tier, counts in reasons.items():
        said = " / ".join(
            f"{reason} ({count})" if len(counts) > 1 else reason
            for reason, count in counts.most_common()
        )
        number = counts.total()
        terminalreporter.write_line(f"{tier}: {number} test{'s' * (number != 1)}: {said}")
    if required := ",".join(tier for tier in reasons if tier in TIERS):
        terminalreporter.write_line(f"KABPF_REQUIRE={required} makes these failures")


def _tiers(item: pytest.Item) -> list[str]:
    """The narrowest first."""
    return [tier for tier in reversed(TIERS) if item.get_closest_marker(tier)]


def _first_line(error: BaseException) -> str:
    return f"{error}".strip().partition("\n")[0] or type(error).__name__


@functools.cache
def _lacking_for_kernel() -> str:
    if os.geteuid() != 0:
        return "it needs root; try: sudo tests/run"
    if not Path("/sys/kernel/btf/vmlinux").exists():
        return "the kernel has no BTF (CONFIG_DEBUG_INFO_BTF); try: tests/matrix/run --smoke"
    if not shutil.which("bpftool"):
        return "there is no bpftool; try: tests/run, which installs it"
    if subprocess.run(["bpftool", "prog", "list"], capture_output=True).returncode:
        return f"the kernel refuses bpf(2), as in a container that filters system calls{PRIVILEGED}"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        return f"the kernel refuses a mount namespace, as without CAP_SYS_ADMIN{PRIVILEGED}"
    return ""


@functools.cache
def _lacking_for_system() -> str:
    if lacking := _lacking_for_kernel():
        return lacking
    for program in ("mmdebstrap", "systemd-nspawn"):
        if not shutil.which(program):
            return f"there is no {program}; try: tests/run, which installs it"
    return _lacking_to_look_into_processes()


@functools.cache
def _lacking_for_preload() -> str:
    for library in ("libkeepalive", "libdontdie"):
        environment = {**os.environ, "LD_PRELOAD": f"{library}.so"}
        # The loader says what it does not find, and goes on without.
        if subprocess.run(["true"], env=environment, capture_output=True).stderr:
            return f"there is no {library}.so; try: tests/preload/run, which installs it"
    return _lacking_to_look_into_processes()


def _lacking_to_look_into_processes() -> str:
    own = os.pidfd_open(os.getpid())
    copy = ctypes.CDLL(None).syscall(438, own, own, 0)  # pidfd_getfd
    os.close(own)
    if copy < 0:
        return f"the kernel refuses pidfd_getfd(2), as in a container that filters it{PRIVILEGED}"
    os.close(copy)
    return ""


def _lacking_for_matrix() -> str:
    if os.uname().release.startswith("5.10."):
        return ""
    return "it needs Linux 5.10; try: tests/matrix/run 5.10"


def _lacking_for_others() -> str:
    return "" if "others" in REQUIRED else "it takes hours; try: tests/others/run"


PRIVILEGED = (
    "; try: a virtual machine, docker run --privileged, or"
    " systemd-nspawn --capability=all --system-call-filter=@known"
)

TIERS = {
    "kernel": _lacking_for_kernel,
    "strangers": _lacking_for_kernel,
    "system": _lacking_for_system,
    "preload": _lacking_for_preload,
    "matrix": _lacking_for_matrix,
    "others": _lacking_for_others,
}
