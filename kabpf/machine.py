"""What the machine has of what kabpf relies on: kernel, file systems, rights, libraries, sysctls.

`look` gathers the facts; each check judges some of them and touches nothing.
"""

from __future__ import annotations

import importlib.util
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kabpf import capabilities, cgroups, libbpf, loading
from kabpf.cgroups import Mount
from kabpf.dataplane import PINS
from kabpf.errors import KabpfError, RefusedError, UnsupportedError
from kabpf.findings import Findings, error, note, ok, warning

BPFFS = PINS.parent
CGROUPS = "/sys/fs/cgroup"

# PROC_CGROUP_INIT_INO and PROC_USER_INIT_INO in the kernel's linux/proc_ns.h; "" is without /proc.
FIRST_NAMESPACES = ("cgroup:[4026531835]", "user:[4026531837]", "")

CONFIG = ("BPF_SYSCALL", "CGROUP_BPF", "DEBUG_INFO_BTF", "INET")
SYSCTLS = (
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_retries2",
    "net.core.bpf_jit_enable",
    "kernel.unprivileged_bpf_disabled",
)
PACKAGES = {"rich": "tables that fit the terminal", "pyroute2": "kabpfctl sockets without root"}
RTO_MIN_S, RTO_MAX_S = 0.2, 120.0  # TCP_RTO_MIN and TCP_RTO_MAX in the kernel's net/tcp.h


@dataclass(frozen=True)
class Machine:
    """Facts. What can't be read is empty, or not there."""

    is_root: bool
    release: str
    has_btf: bool
    features_missing: tuple[str, ...]
    config_missing: tuple[str, ...]  # of CONFIG, where the kernel's configuration can be read
    lockdown: str
    mounts: tuple[Mount, ...]
    cgroup_namespace: str
    user_namespace: str
    bpffs_mode: int | None
    bpffs_writable: bool
    capabilities_missing: tuple[str, ...]  # of those that the data plane takes
    namespaces_missing: tuple[str, ...]  # of those that others' network namespaces take
    call_problem: str | None  # of bpf(2); None where it was not tried
    libbpf: str  # its version
    libbpf_problem: str
    yaml: str  # PyYAML's version
    yaml_in_c: bool
    packages_missing: tuple[str, ...]
    sysctls: Mapping[str, str] = field(hash=False)


def look() -> Machine:
    """The facts of this machine, as this process sees it."""
    release = os.uname().release
    has_btf = loading.BTF.exists()
    version, problem = _libbpf()
    features = _features() if has_btf and version else ()
    status = _status(BPFFS)
    rights = _capabilities_missing(capabilities.DATAPLANE)
    namespaces = _capabilities_missing(capabilities.NAMESPACES)
    is_root = os.geteuid() == 0
    user_namespace = _link("/proc/self/ns/user")
    is_able = is_root and not (rights or namespaces) and user_namespace in FIRST_NAMESPACES
    yaml_version, yaml_in_c = _yaml()
    return Machine(
        is_root,
        release,
        has_btf,
        features,
        _config_missing(release) if features or not has_btf else (),
        _text("/sys/kernel/security/lockdown"),
        _mounts(),
        _link("/proc/self/ns/cgroup"),
        user_namespace,
        status and stat.S_IMODE(status.st_mode),
        os.access(BPFFS, os.W_OK),
        rights,
        namespaces,
        _call_problem() if is_able and version else None,
        version,
        problem,
        yaml_version,
        yaml_in_c,
        tuple(name for name in PACKAGES if importlib.util.find_spec(name) is None),
        {name: _text(f"/proc/sys/{name.replace('.', '/')}") for name in SYSCTLS},
    )


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
    else:
        yield error(
            f"{loading.BTF} is missing{_config_text(machine)}",
            "boot a kernel with CONFIG_DEBUG_INFO_BTF",
        )


def _config_text(machine: Machine) -> str:
    names = ", ".join(f"CONFIG_{name}" for name in machine.config_missing)
    return f"; the configuration lacks {names}" if names else ""


def lockdown(machine: Machine) -> Findings:
    """The kernel_lockdown(7) mode: from confidentiality on, no program may read kernel memory."""
    found = re.search(r"\[(\w+)\]", machine.lockdown)
    mode = found[1] if found else "none"
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
            f"chmod 755 {BPFFS}",
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
        yield note("not root: not looked at", "sudo kabpfctl doctor")
    elif machine.user_namespace not in FIRST_NAMESPACES:
        yield error(
            "root of a user namespace alone, to whom the kernel gives nothing that kabpf needs",
            "run kabpf outside of it, on the host",
        )
    elif machine.capabilities_missing:
        yield error(
            f"{', '.join(machine.capabilities_missing)} missing",
            "run it as root with these capabilities; a container needs --cap-add",
        )
    elif machine.namespaces_missing:
        yield note(
            f"{', '.join(machine.namespaces_missing)} missing: open sockets are visited by"
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
        yield note("not looked at: it takes root with every capability, and libbpf")
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
        yield note(f"{name} is not installed: {PACKAGES[name]}", f"apt install python3-{name}")


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


def _mounts() -> tuple[Mount, ...]:
    try:
        return tuple(cgroups.visible_mounts())
    except OSError:  # no /proc
        return ()


def _capabilities_missing(names: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return tuple(capabilities.missing(names))
    except OSError:
        return ()


def _libbpf() -> tuple[str, str]:
    try:
        return libbpf.version(), ""
    except UnsupportedError as problem:
        return "", str(problem)


def _features() -> tuple[str, ...]:
    try:
        return tuple(loading.missing_features())
    except RefusedError as problem:
        return (f"BTF that can be read ({problem})",)


def _call_problem() -> str:
    try:
        try:
            libbpf.probe()
        except RefusedError as refused:
            loading.require_system_call(refused)
            raise
    except KabpfError as problem:
        return str(problem)
    return ""


def _config_missing(release: str) -> tuple[str, ...]:
    text = _text(f"/boot/config-{release}")
    if not text:
        import gzip  # here, because it is seldom needed

        try:
            text = gzip.decompress(Path("/proc/config.gz").read_bytes()).decode()
        except OSError:
            return ()
    return tuple(name for name in CONFIG if f"\nCONFIG_{name}=y" not in text)


def _yaml() -> tuple[str, bool]:
    try:
        import yaml  # here, because it takes 10 ms and may be missing
    except ImportError:
        return "", False
    return yaml.__version__, bool(yaml.__with_libyaml__)


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except (OSError, ValueError):
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None
