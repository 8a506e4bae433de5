"""kabpfctl presets: middleboxes, and options that fit them."""

from __future__ import annotations

import argparse

from kabpf import output
from kabpf.policy.presets import presets as preset_table


def presets(arguments: argparse.Namespace) -> int:
    """List the presets, with the options that they give."""
    known = preset_table().values()
    result = [
        {
            "preset": each.name,
            "timeout_s": each.timeout_s,
            "idle_s": each.idle_s,
            "interval_s": each.interval_s,
            "probes": each.probes,
            "after": each.after,
            "source": each.source,
        }
        for each in known
    ]
    rows = [
        (
            each.name,
            f"{each.timeout_s}s",
            f"{each.idle_s}s",
            f"{each.interval_s}s",
            str(each.probes),
            each.after,
            each.source,
        )
        for each in known
    ]
    heads = ("PRESET", "TIME-OUT", "IDLE", "INTERVAL", "PROBES", "AFTER-IT", "SOURCE")
    if arguments.json:
        return output.answer(arguments, {"presets": result}, "")
    output.print_table(heads, rows)
    return 0
