"""What kabpfctl doctor says of machines: facts in, findings out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kabpf.doctor import machine, machine_checks
from kabpf.doctor.findings import Finding, error, note, ok, warning
from kabpf.doctor.machine import Machine
from kabpf.kernel import mountinfo
from kabpf.kernel.bcc_compile import Lack


def mounts(*lines: str) -> tuple[mountinfo.Mount, ...]:
    """Mounts as /proc/self/mountinfo has them, given by root, point and type."""
    return tuple(
        mountinfo.mounts(
            "".join(
                f"{id} 1 0:{id} {root} {point} rw - {type} none rw\n"
                for id, line in enumerate(lines, 30)
                for root, point, type in [line.split()]
            ).encode()
        )
    )


BPFFS = "/ /sys/fs/bpf bpf"
UNIFIED = "/ /sys/fs/cgroup cgroup2"
V1 = "/ /sys/fs/cgroup/memory cgroup"

GOOD = Machine(
    is_root=True,
    release="6.1.0",
    has_btf=True,
    features_missing=(),
    compiler_missing=None,
    config_missing=(),
    lockdown="[none] integrity confidentiality",
    mounts=mounts(UNIFIED, BPFFS),
    cgroup_namespace="cgroup:[4026531835]",
    user_namespace="user:[4026531837]",
    bpffs_mode=0o700,
    bpffs_writable=True,
    capabilities_missing=(),
    namespaces_missing=(),
    call_problem="",
    libbpf="1.1",
    libbpf_problem="",
    yaml="6.0",
    yaml_in_c=True,
    packages_missing=(),
    sysctls={
        "net.ipv4.tcp_keepalive_time": "7200",
        "net.ipv4.tcp_keepalive_intvl": "75",
        "net.ipv4.tcp_keepalive_probes": "9",
        "net.ipv4.tcp_retries2": "15",
        "net.core.bpf_jit_enable": "1",
        "kernel.unprivileged_bpf_disabled": "2",
    },
)
CONTAINER = "a cgroup namespace, as in a container: only its own cgroups can have a policy"
NO_TREE = (
    "no cgroup2 tree is mounted whose root is this cgroup namespace's;"
    " mount one at /sys/fs/cgroup, as systemd does"
)
INTERPRETED = (
    "net.core.bpf_jit_enable is 0: programs are interpreted, and each connection takes longer"
)


def findings(facts: Machine, check: str) -> list[Finding]:
    return list(machine_checks.CHECKS[check](facts))


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        ("kernel", ["Linux 6.1.0"]),
        ("BTF", ["/sys/kernel/btf/vmlinux"]),
        ("lockdown", ["none"]),
        ("capabilities", ["CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF, CAP_SYS_ADMIN, CAP_SYS_PTRACE"]),
        ("bpf(2)", ["not filtered"]),
        ("libraries", ["libbpf 1.1", "PyYAML 6.0"]),
        ("bpffs", ["/sys/fs/bpf"]),
        ("cgroup2", ["unified, at /sys/fs/cgroup"]),
        (
            "sysctls",
            [
                "BPF: JIT 1, unprivileged_bpf_disabled 2",
                "TCP: idle 7200 s, interval 75 s, 9 probes where no policy says otherwise (in this"
                " network namespace)",
            ],
        ),
    ],
)
def test_good_machine_is_said_to_be_good(check: str, expected: list[str]) -> None:
    """Where nothing is missing, each check says briefly what is there."""
    assert findings(GOOD, check) == [ok(text) for text in expected]


@pytest.mark.parametrize(
    ("check", "facts", "expected"),
    [
        (
            "kernel",
            {"features_missing": ("bpf_iter_tcp_get_func_proto", "bpf_ringbuf")},
            error(
                "Linux 6.1.0 has no bpf_iter_tcp_get_func_proto, bpf_ringbuf",
                "boot Linux 5.15 or later",
            ),
        ),
        (
            "kernel",
            {"features_missing": ("bpf_ringbuf",), "config_missing": ("BPF_SYSCALL",)},
            error(
                "Linux 6.1.0 has no bpf_ringbuf; the configuration lacks CONFIG_BPF_SYSCALL",
                "boot Linux 5.15 or later",
            ),
        ),
        (
            "BTF",
            {
                "has_btf": False,
                "compiler_missing": Lack("bcc and more are missing", ("python3-bpfcc", "more")),
                "config_missing": ("DEBUG_INFO_BTF",),
            },
            error(
                "/sys/kernel/btf/vmlinux is missing; the configuration lacks CONFIG_DEBUG_INFO_BTF;"
                " for the bcc loader, which does without, bcc and more are missing",
                "boot a kernel with CONFIG_DEBUG_INFO_BTF, or: apt install python3-bpfcc more",
            ),
        ),
        (
            "BTF",
            {"has_btf": False},
            warning(
                "/sys/kernel/btf/vmlinux is missing: the bcc loader serves new sockets of cgroups"
                " that are named by their paths, in modes fill and override, without ranges",
                "boot a kernel with CONFIG_DEBUG_INFO_BTF",
            ),
        ),
        (
            "lockdown",
            {"lockdown": "none integrity [confidentiality]"},
            error(
                "the kernel is locked down to confidentiality, and refuses the programs",
                "boot with lockdown=integrity",
            ),
        ),
        ("lockdown", {"lockdown": "none [integrity] confidentiality"}, ok("integrity")),
        ("lockdown", {"lockdown": ""}, ok("none")),
        (
            "capabilities",
            {"capabilities_missing": ("CAP_PERFMON", "CAP_BPF")},
            error(
                "CAP_PERFMON, CAP_BPF missing",
                "run it as root with these capabilities; a container needs --cap-add",
            ),
        ),
        (
            "capabilities",
            {"namespaces_missing": ("CAP_SYS_ADMIN",)},
            note(
                "CAP_SYS_ADMIN missing: open sockets are updated by kabpf-retrofit alone",
                "systemctl start kabpf-retrofit.socket",
            ),
        ),
        (
            "capabilities",
            {"user_namespace": "user:[4026532200]"},
            error(
                "root in a user namespace lacks the required capabilities",
                "run kabpf outside of it, on the host",
            ),
        ),
        (
            "capabilities",
            {"is_root": False},
            note("skipped (needs root)", "sudo kabpfctl doctor"),
        ),
        (
            "bpf(2)",
            {"call_problem": None},
            note("skipped (needs root with every capability, and libbpf)"),
        ),
        (
            "bpf(2)",
            {"call_problem": "the kernel refuses"},
            error("the kernel refuses", "let the container's seccomp filter pass bpf(2)"),
        ),
        (
            "bpffs",
            {"bpffs_mode": None, "mounts": mounts(UNIFIED)},
            error("/sys/fs/bpf is missing", "mount -t sysfs sysfs /sys"),
        ),
        (
            "bpffs",
            {"mounts": mounts(UNIFIED)},
            note("none at /sys/fs/bpf; kabpf mounts one", "kabpfctl apply"),
        ),
        (
            "bpffs",
            {"bpffs_writable": False},
            error("/sys/fs/bpf can't be written to", "mount -o remount,rw /sys/fs/bpf"),
        ),
        ("bpffs", {"bpffs_writable": False, "is_root": False}, ok("/sys/fs/bpf")),
        (
            "bpffs",
            {"bpffs_mode": 0o1777},
            warning(
                "/sys/fs/bpf has mode 1777: others may take kabpf's place in it",
                "chmod go-w /sys/fs/bpf",
            ),
        ),
        (
            "cgroup2",
            {"mounts": mounts(V1, "/ /sys/fs/cgroup/unified cgroup2")},
            ok("hybrid, at /sys/fs/cgroup/unified"),
        ),
        (
            "cgroup2",
            {"mounts": mounts(V1)},
            error("only cgroup v1 is mounted", "boot with systemd.unified_cgroup_hierarchy=1"),
        ),
        (
            "cgroup2",
            {"mounts": mounts("/../outside /sys/fs/cgroup cgroup2")},
            error(NO_TREE, "mount -t cgroup2 cgroup2 /sys/fs/cgroup"),
        ),
        (
            "cgroup2",
            {"mounts": (), "cgroup_namespace": ""},
            error("/proc is not mounted", "mount -t proc proc /proc"),
        ),
    ],
)
def test_what_is_missing_is_said_with_what_to_do(
    check: str, facts: dict[str, Any], expected: Finding
) -> None:
    """Each lack is one finding, with a command that helps."""
    assert findings(replace(GOOD, **facts), check) == [expected]


@pytest.mark.parametrize(
    ("check", "facts", "expected"),
    [
        (
            "cgroup2",
            {"cgroup_namespace": "cgroup:[4026532300]"},
            note(CONTAINER, "run kabpf on the host for others"),
        ),
        (
            "sysctls",
            {"sysctls": {**GOOD.sysctls, "net.core.bpf_jit_enable": "0"}},
            warning(INTERPRETED, "sysctl net.core.bpf_jit_enable=1"),
        ),
        (
            "libraries",
            {"libbpf": "", "libbpf_problem": "libbpf.so.1 is missing"},
            error("libbpf.so.1 is missing", "apt install libbpf1"),
        ),
        ("libraries", {"yaml": ""}, error("PyYAML is missing", "apt install python3-yaml")),
        (
            "libraries",
            {"yaml_in_c": False},
            note(
                "PyYAML 6.0 lacks its parser in C: policy files are read slowly",
                "apt install python3-yaml",
            ),
        ),
        (
            "libraries",
            {"packages_missing": ("pyroute2",)},
            note(
                "pyroute2 is not installed: kabpfctl sockets without root",
                "apt install python3-pyroute2",
            ),
        ),
        (
            "sysctls",
            {"sysctls": dict.fromkeys(GOOD.sysctls, "")},
            ok("BPF: JIT not shown here, unprivileged_bpf_disabled not there"),
        ),
    ],
)
def test_what_is_odd_is_said_beside_what_is_right(
    check: str, facts: dict[str, Any], expected: Finding
) -> None:
    """Of several findings each says one thing."""
    assert expected in findings(replace(GOOD, **facts), check)


@pytest.mark.parametrize(("retries", "seconds"), [("15", 925), ("8", 102), ("", None)])
def test_retries_as_time(retries: str, seconds: int | None) -> None:
    """tcp_retries2 in seconds, as the kernel's documentation has them for 15 (924.6 s)."""
    sysctls = {**GOOD.sysctls, "net.ipv4.tcp_retries2": retries}
    assert machine_checks.retries_s(replace(GOOD, sysctls=sysctls)) == seconds


def test_this_machine_is_looked_at_without_failing() -> None:
    """Whatever is missing here, every check has its findings."""
    here = machine.facts()
    assert all(list(check(here)) for check in machine_checks.CHECKS.values())
