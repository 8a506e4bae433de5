"""kabpfctl doctor: looks at everything that kabpf relies on, and changes nothing."""

from __future__ import annotations

import argparse

from kabpf import live, output
from kabpf.doctor.checks import CHECKS, Here, carried_out
from kabpf.doctor.findings import Finding, Grade

INDENT = 9  # of texts, beside the grades
GRAVEST = (Grade.ERROR, Grade.WARNING, Grade.NOTE, Grade.OK)


def doctor(arguments: argparse.Namespace) -> int:
    """Look at everything; exit status 1 where something is an error."""
    here = Here()
    with live.working("looking at everything"):
        findings = [
            (name, finding)
            for name, check in CHECKS.items()
            for finding in carried_out(check, here)
        ]
    if arguments.json:
        result = [
            {"check": name, "status": each.grade, "found": each.text, "fix": each.advice}
            for name, each in findings
        ]
        output.print_json({"findings": result})
    else:
        print_list(findings)
    return 1 if any(finding.grade == Grade.ERROR for _, finding in findings) else 0


def print_list(findings: list[tuple[str, Finding]]) -> None:
    """The gravest first, each with what mends it on a line of its own, and a count at the end."""
    for name, each in sorted(findings, key=lambda item: GRAVEST.index(item[1].grade)):
        output.print_folded(f"{each.grade:{INDENT - 2}}  ", f"{name}: {each.text}")
        if each.advice:
            output.print_folded(f"{'fix: ':>{INDENT + 5}}", each.advice)
    grades = [each.grade for _, each in findings]
    warnings, errors = grades.count(Grade.WARNING), grades.count(Grade.ERROR)
    print(f"{output.count(warnings, 'warning')}, {output.count(errors, 'error')}")
