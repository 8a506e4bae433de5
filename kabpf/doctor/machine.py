"""What this machine has of what kabpf relies on: kernel, mounts, rights, libraries, sysctls."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from kabpf import proc
from kabpf.errors import KabpfError, RefusedError, UnsupportedError
from kabpf.kernel import bcc_compile, capabilities, loading, mountinfo
from kabpf.kernel.bcc_compile import Lack
from kabpf.kernel.dataplane import PINS
from kabpf.kernel.libbpf import library
from kabpf.kernel.mountinfo import Mount

BPFFS = PINS.parent

# PROC_CGROUP_INIT_INO and PROC_USER_INIT_INO in the kernel's linux/proc_ns.h; "" is without /proc.
FIRST_NAMESPACES = ("cgroup:[4026531835]", "user:[4026531837]", "")

CONFIG_MAX = 1 << 20
CONFIG = ("BPF_SYSCALL", "CGROUP_BPF", "DEBUG_INFO_BTF", "INET")
SYSCTLS = (
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_retries2",
    "net.core.bpf_jit_enable",
    "kernel.unprivileged_bpf_disabled",
)
PACKAGES = ("pyroute2",)


@dataclass(frozen=True)
class Machine:
    """Facts. What can't be read is empty, or not there."""

    is_root: bool
    release: str
    has_btf: bool
    features_missing: tuple[str, ...]
    compiler_missing: Lack | None  # what keeps bcc from compiling, where there is no BTF
    config_missing: tuple[str, ...]  # of CONFIG, where the kernel's configuration can be read
    lockdown: str
    mounts: tuple[Mount, ...]
    cgroup_namespace: str
    user_namespace: str
    bpffs_mode: int | None
    bpffs_writable: bool
    capabilities_missing: tuple[str, ...]  # of those that the data plane needs
    namespaces_missing: tuple[str, ...]  # of those that others' network namespaces take
    call_problem: str | None  # of bpf(2); None where it was not tried
    libbpf: str  # its version
    libbpf_problem: str
    yaml: str  # PyYAML's version
    yaml_in_c: bool
    packages_missing: tuple[str, ...]
    sysctls: Mapping[str, str]


def facts() -> Machine:
    """The facts of this machine, as this process sees it; changes nothing."""
    release = os.uname().release
    has_btf = loading.BTF.exists()
    version, libbpf_problem = _libbpf()
    features_missing = _features_missing() if has_btf and version else ()
    bpffs = _status(BPFFS)
    rights = _capabilities_missing(capabilities.DATAPLANE)
    namespaces = _capabilities_missing(capabilities.NAMESPACES)
    is_root = os.geteuid() == 0
    user_namespace = _link("/proc/self/ns/user")
    is_able = is_root and not (rights or namespaces) and user_namespace in FIRST_NAMESPACES
    yaml_version, yaml_in_c = _yaml()
    return Machine(
        is_root=is_root,
        release=release,
        has_btf=has_btf,
        features_missing=features_missing,
        compiler_missing=None if has_btf else bcc_compile.missing(),
        config_missing=_config_missing(release) if features_missing or not has_btf else (),
        lockdown=_line("/sys/kernel/security/lockdown"),
        mounts=_mounts(),
        cgroup_namespace=_link("/proc/self/ns/cgroup"),
        user_namespace=user_namespace,
        bpffs_mode=stat.S_IMODE(bpffs.st_mode) if bpffs else None,
        bpffs_writable=os.access(BPFFS, os.W_OK),
        capabilities_missing=rights,
        namespaces_missing=namespaces,
        call_problem=_call_problem() if is_able and version else None,
        libbpf=version,
        libbpf_problem=libbpf_problem,
        yaml=yaml_version,
        yaml_in_c=yaml_in_c,
        packages_missing=tuple(each for each in PACKAGES if find_spec(each) is None),
        sysctls={name: _line(f"/proc/sys/{name.replace('.', '/')}") for name in SYSCTLS},
    )


def _mounts() -> tuple[Mount, ...]:
    try:
        return tuple(mountinfo.visible_mounts())
    except OSError:  # no /proc
        return ()


def _capabilities_missing(names: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return tuple(capabilities.missing(names))
    except OSError:
        return ()


def _libbpf() -> tuple[str, str]:
    try:
        return library.version(), ""
    except UnsupportedError as problem:
        return "", str(problem)


def _features_missing() -> tuple[str, ...]:
    try:
        return tuple(loading.missing_features())
    except RefusedError as problem:
        return (f"BTF that can be read ({problem})",)


def _call_problem() -> str:
    try:
        try:
            library.probe()
        except RefusedError as refused:
            loading.require_system_call(refused)
            raise
    except KabpfError as problem:
        return str(problem)
    return ""


def _config_missing(release: str) -> tuple[str, ...]:
    try:
        lines = proc.read(f"/boot/config-{release}", CONFIG_MAX).split(b"\n")
    except OSError:
        import gzip  # here, because it is seldom needed

        try:
            lines = gzip.decompress(proc.read("/proc/config.gz", CONFIG_MAX)).split(b"\n")
        except OSError:
            return ()
    return tuple(name for name in CONFIG if f"CONFIG_{name}=y".encode() not in lines)


def _yaml() -> tuple[str, bool]:
    try:
        import yaml  # here, because it takes 10 ms and may be missing
    except ImportError:
        return "", False
    return yaml.__version__, bool(yaml.__with_libyaml__)


def _line(path: str) -> str:
    """What a file of the kernel's says in its first line, or "" where it can't be read."""
    try:
        return os.fsdecode(proc.read(path).partition(b"\n")[0].strip())
    except OSError:
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
