"""kabpfctl doctor: looks at everything that kabpf relies on, and changes nothing."""

from __future__ import annotations

import argparse
import json

from kabpf import output
from kabpf.doctor.checks import CHECKS, Here, carried_out
from kabpf.doctor.findings import Grade


def doctor(arguments: argparse.Namespace) -> int:
    """Look at everything; exit status 1 where something is an error."""
    here = Here()
    findings = [
        (name, finding) for name, check in CHECKS.items() for finding in carried_out(check, here)
    ]
    if arguments.json:
        result = [
            {"check": name, "grade": each.grade, "found": each.text, "advice": each.advice}
            for name, each in findings
        ]
        print(json.dumps(result, indent=2))
    else:
        rows: list[tuple[str, ...]] = []
        for name, finding in findings:
            rows.append((finding.grade, name, output.shown(finding.text)))
            if finding.advice:
                rows.append(("", "", f"  {output.shown(finding.advice)}"))
        output.print_table(("GRADE", "CHECK", "FOUND, AND WHAT TO DO"), rows)
    return 1 if any(finding.grade == Grade.ERROR for _, finding in findings) else 0
