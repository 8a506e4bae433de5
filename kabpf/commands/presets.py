"""kabpfctl presets: middleboxes, and options that fit them."""

from __future__ import annotations

import argparse

from kabpf import output, tables
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
            "on_expiry": each.after,
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
            *((each.source,) if arguments.wide else ()),
        )
        for each in known
    ]
    columns = tables.columns(
        *("PRESET", "+IDLE TIMEOUT", "+IDLE", "+INTERVAL", "+PROBES"),
        *(("ON EXPIRY", "SOURCE") if arguments.wide else ("ON EXPIRY|",)),
    )
    if arguments.json:
        return output.answer(arguments, {"presets": result}, "")
    output.print_table(columns, rows, is_wide=arguments.wide)
    return 0
