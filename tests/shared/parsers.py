"""What the programs' own parsers know."""

from __future__ import annotations

import argparse

from kabpf import cli


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parsers of kabpfctl's commands, by name."""
    (found,) = (
        action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    return dict(found.choices)


def flags(parser: argparse.ArgumentParser) -> set[str]:
    """The long options of a parser."""
    names = (name for action in parser._actions for name in action.option_strings)
    return {name for name in names if name.startswith("--")}
