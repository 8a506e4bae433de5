"""Other people's test suites: CPython's of networks, and Go's of net and net/http."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from xml.etree import ElementTree

from machine import Machine

UNIT = "others.service"
RUN_S = 3600
XML = "/var/tmp/others.xml"

_CPYTHON = (
    "test_socket", "test_ssl", "test_httpservers", "test_httplib", "test_ftplib", "test_smtplib",
    "test_poplib", "test_imaplib", "test_socketserver", "test_urllib2_localnet", "test_xmlrpc",
    "test_select", "test_poll", "test_epoll", "test_selectors", "test_asyncio",
)  # fmt: skip
_GO = {"net": "net", "http": "net/http"}  # by the name of the compiled tests

# What a test came to, by its name: passed, failed or skipped.
Results = dict[str, str]


def cpython(machine: Machine, only: Iterable[str] = ()) -> Results:
    """CPython's tests; `only` are names as the results have them."""
    # Some tests of vsock want a hypervisor. The tests wait more than they work, but none for ever.
    choice = [word for name in only for word in ("-m", name)]
    parts = {part for name in only for part in name.split(".")}
    modules = [each for each in _CPYTHON if not parts or each in parts]
    python = ["python3", "-m", "test", "-u", "network", "-i", "*VSOCK*", "-j", "4"]
    given = ["--timeout", "600", "--junit-xml", XML, *choice]
    _run(machine, "/var/tmp", *python, *given, *modules)
    found: Results = {}
    for case in ElementTree.fromstring((machine.root / XML[1:]).read_bytes()).iter("testcase"):
        kinds = {child.tag for child in case}
        failed, skipped = kinds & {"failure", "error"}, "skipped" in kinds
        found[case.attrib["name"]] = "failed" if failed else "skipped" if skipped else "passed"
    return found


def go(machine: Machine, only: Iterable[str] = ()) -> Results:
    """Go's tests, those that need no other network; `only` are names as the results have them."""
    root = machine.run("go", "env", "GOROOT")
    found: Results = {}
    for program, package in _GO.items():
        names = {re.escape(name.split("/")[-1]) for name in only if name.startswith(f"{package}:")}
        tops = {one.partition(":")[2].partition("/")[0] for one in only}
        if only and not names:
            continue
        choice = [f"-test.run=^({'|'.join(sorted(tops))})$"] if only else []
        tests = [f"/opt/others/{program}.test", "-test.v", "-test.short", *choice]
        said = _run(machine, f"{root}/src/{package}", *tests)
        for result, name in re.findall(r"^ *--- (PASS|FAIL|SKIP): (\S+)", said, re.MULTILINE):
            found[f"{package}:{name}"] = {"PASS": "passed", "FAIL": "failed"}.get(result, "skipped")
    return found


SUITES = {"cpython": cpython, "go": go}


def _run(machine: Machine, directory: str, *command: str) -> str:
    service = ("systemd-run", "--quiet", "--pipe", "--wait", "--collect", f"--unit={UNIT}")
    process = machine.start(
        *(*service, f"--working-directory={directory}"),
        *("--setenv=HOME=/root", "--setenv=LANG=C.UTF-8", *command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    with process:
        try:
            return str(process.communicate(timeout=RUN_S)[0])
        finally:
            process.kill()
