"""Whether a machine is fit for kabpf: one check for each thing that kabpf relies on."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable

from kabpf.doctor.findings import Findings, error, note, ok, warning
from kabpf.doctor.machine import BPFFS, FIRST_NAMESPACES, SYSCTLS, Machine
from kabpf.errors import UnsupportedError
from kabpf.kernel import capabilities, cgroups, loading

CGROUPS = "/sys/fs/cgroup"

PURPOSES = {"pyroute2": "kabpfctl sockets without root"}
RTO_MIN_S, RTO_MAX_S = 0.2, 120.0  # TCP_RTO_MIN and TCP_RTO_MAX in the kernel's net/tcp.h


def kernel(machine: Machine) -> Findings:
    """Linux, and what the programs need of it."""
    if machine.features_missing:
        missing = ", ".join(machine.features_missing)
        yield error(
            f"Linux {machine.release} has no {missing}{_config_text(machine)}",
            "boot Linux 5.15 or later",
        )
    else:
        yield ok(f"Linux {machine.release}")


def btf(machine: Machine) -> Findings:
    """The kernel's description of its own structures."""
    if machine.has_btf:
        yield ok(str(loading.BTF))
        return
    missing, boot = f"{loading.BTF} is missing", "boot a kernel with CONFIG_DEBUG_INFO_BTF"
    if machine.compiler_missing:
        reason, packages = machine.compiler_missing
        yield error(
            f"{missing}{_config_text(machine)}; for the bcc loader, which does without, {reason}",
            f"{boot}, or: apt install {' '.join(packages)}",
        )
    else:
        yield warning(
            f"{missing}{_config_text(machine)}: the bcc loader serves new sockets of cgroups that"
            " are named by their paths, in modes fill and override, without ranges",
            boot,
        )


def _config_text(machine: Machine) -> str:
    names = ", ".join(f"CONFIG_{name}" for name in machine.config_missing)
    return f"; the configuration lacks {names}" if names else ""


def lockdown(machine: Machine) -> Findings:
    """The kernel_lockdown(7) mode: from confidentiality on, no program may read kernel memory."""
    match = re.search(r"\[(\w+)\]", machine.lockdown)
    mode = match[1] if match else "none"
    if mode == "confidentiality":
        yield error(
            "the kernel is locked down to confidentiality, and refuses the programs",
            "boot with lockdown=integrity",
        )
    else:
        yield ok(mode)


def sysctls(machine: Machine) -> Findings:
    """What is set about BPF for the machine, and what options fall back to that nobody sets."""
    jit = machine.sysctls["net.core.bpf_jit_enable"]
    if jit == "0":
        yield warning(
            "net.core.bpf_jit_enable is 0: programs are interpreted, and each connection takes"
            " longer",
            "sysctl net.core.bpf_jit_enable=1",
        )
    unprivileged = machine.sysctls["kernel.unprivileged_bpf_disabled"] or "not there"
    yield ok(f"BPF: JIT {jit or 'not shown here'}, unprivileged_bpf_disabled {unprivileged}")
    times = [machine.sysctls[name] or "?" for name in SYSCTLS[:3]]
    yield ok(
        f"TCP: idle {times[0]} s, interval {times[1]} s, {times[2]} probes where no policy says"
        " otherwise (in this network namespace)"
    )


def retries_s(machine: Machine) -> int | None:
    """How long data stays unacknowledged until a connection without user timeout ends: about,
    because the first retry depends on the path (tcp(7), tcp_retries2)."""
    text = machine.sysctls["net.ipv4.tcp_retries2"]
    if not text.isdecimal():
        return None
    return round(sum(min(RTO_MIN_S * (1 << retry), RTO_MAX_S) for retry in range(int(text) + 1)))


def bpffs(machine: Machine) -> Findings:
    """The BPF file system, where kabpf's pins are."""
    mounted = [mount for mount in machine.mounts if mount.point == str(BPFFS)]
    if machine.bpffs_mode is None:
        yield error(f"{BPFFS} is missing", "mount -t sysfs sysfs /sys")
    elif not any(mount.type == "bpf" for mount in mounted):
        yield note(f"none at {BPFFS}; kabpf mounts one", "kabpfctl apply")
    elif machine.is_root and not machine.bpffs_writable:
        yield error(f"{BPFFS} can't be written to", f"mount -o remount,rw {BPFFS}")
    elif machine.bpffs_mode & (stat.S_IWGRP | stat.S_IWOTH):
        yield warning(
            f"{BPFFS} has mode {machine.bpffs_mode:04o}: others may take kabpf's place in it",
            f"chmod go-w {BPFFS}",
        )
    else:
        yield ok(str(BPFFS))


def cgroup2(machine: Machine) -> Findings:
    """The cgroup2 tree: alone, beside cgroup v1, or missing."""
    has_v1 = any(mount.type == "cgroup" for mount in machine.mounts)
    if not machine.cgroup_namespace:
        yield error("/proc is not mounted", "mount -t proc proc /proc")
        return
    try:
        tree = cgroups.find_tree(list(machine.mounts))
    except UnsupportedError as problem:
        if has_v1 and not any(mount.type == "cgroup2" for mount in machine.mounts):
            yield error("only cgroup v1 is mounted", "boot with systemd.unified_cgroup_hierarchy=1")
        else:
            yield error(str(problem), f"mount -t cgroup2 cgroup2 {CGROUPS}")
        return
    yield ok(f"{'hybrid' if has_v1 else 'unified'}, at {tree.mount}")
    if machine.cgroup_namespace not in FIRST_NAMESPACES:
        yield note(
            "a cgroup namespace, as in a container: only its own cgroups can have a policy",
            "run kabpf on the host for others",
        )


def rights(machine: Machine) -> Findings:
    """What the caller may do (capabilities(7))."""
    if not machine.is_root:
        yield note("skipped (needs root)", "sudo kabpfctl doctor")
    elif machine.user_namespace not in FIRST_NAMESPACES:
        yield error(
            "root in a user namespace lacks the required capabilities",
            "run kabpf outside of it, on the host",
        )
    elif machine.capabilities_missing:
        yield error(
            f"{', '.join(machine.capabilities_missing)} missing",
            "run it as root with these capabilities; a container needs --cap-add",
        )
    elif machine.namespaces_missing:
        yield note(
            f"{', '.join(machine.namespaces_missing)} missing: open sockets are updated by"
            " kabpf-retrofit alone",
            "systemctl start kabpf-retrofit.socket",
        )
    else:
        yield ok(", ".join((*capabilities.DATAPLANE, *capabilities.NAMESPACES)))


def call(machine: Machine) -> Findings:
    """The system call bpf(2), which a seccomp filter may refuse even to root."""
    if machine.call_problem:
        yield error(machine.call_problem, "let the container's seccomp filter pass bpf(2)")
    elif machine.call_problem is None:
        yield note("skipped (needs root with every capability, and libbpf)")
    else:
        yield ok("not filtered")


def libraries(machine: Machine) -> Findings:
    """libbpf, PyYAML, and what makes kabpfctl nicer."""
    if machine.libbpf:
        yield ok(f"libbpf {machine.libbpf}")
    else:
        yield error(machine.libbpf_problem, "apt install libbpf1")
    if not machine.yaml:
        yield error("PyYAML is missing", "apt install python3-yaml")
    elif machine.yaml_in_c:
        yield ok(f"PyYAML {machine.yaml}")
    else:
        yield note(
            f"PyYAML {machine.yaml} lacks its parser in C: policy files are read slowly",
            "apt install python3-yaml",
        )
    for name in machine.packages_missing:
        yield note(f"{name} is not installed: {PURPOSES[name]}", f"apt install python3-{name}")


Check = Callable[[Machine], Findings]

CHECKS: dict[str, Check] = {
    "kernel": kernel,
    "BTF": btf,
    "lockdown": lockdown,
    "capabilities": rights,
    "bpf(2)": call,
    "libraries": libraries,
    "bpffs": bpffs,
    "cgroup2": cgroup2,
    "sysctls": sysctls,
}
