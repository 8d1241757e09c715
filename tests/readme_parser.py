"""Gives commands to the parsers that they are for, in a process of its own, and stops before anything is done.

    python tests/readme_parser.py COMMANDS.json ANSWERS.json

COMMANDS is a list of commands, each a list of words; ANSWERS says of each "parsed", or what was wrong with it. In one
process of its own, because scripts set variables of the environment as they are imported, and because the imports are
what costs.
"""

import argparse
import contextlib
import importlib
import json
import os
import pkgutil
import runpy
import sys
import tomllib
from pathlib import Path
from typing import Any
from unittest import mock

from hf_lowmem.cli.screens import SCREENS  # of hf-lowmem: what follows is another parser's

ROOT = Path(__file__).parent.parent


class Parsed(BaseException):
    """All flags are understood; nothing was done yet."""


def program() -> Any:
    """`hf-lowmem` as pyproject.toml has it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return pkgutil.resolve_name(project["scripts"]["hf-lowmem"])


def go(words: list[str]) -> None:
    """Run a command up to its parser."""
    environment = [word for word in words if "=" in word.split()[0] and not word.startswith("-")]
    name, *rest = words[len(environment) :] if words[: len(environment)] == environment else words
    if name == "hf-lowmem":
        program()(rest)
        return
    script = ROOT / rest[0]
    with mock.patch.object(sys, "argv", [str(script), *rest[1:]]), mock.patch.object(sys, "path", [*sys.path]):
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")


def answer(words: list[str]) -> str:
    try:
        go(words)
    except Parsed:
        return "parsed"
    except SystemExit as end:
        helped = {"--help", "--help-all"} & {*words} and end.code in (0, None)
        return "parsed" if helped else f"exit status {end.code}"
    except Exception as error:
        return repr(error)
    return "ended without a parser"


def main() -> None:
    trl: Any = importlib.import_module("trl")
    launch: Any = importlib.import_module("accelerate.commands.launch")
    plain, config = argparse.ArgumentParser.parse_args, trl.TrlParser.parse_args_and_config

    def parse_args(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        found = plain(self, args, namespace)
        if getattr(found, "command", None) in SCREENS or self.prog == "hf-lowmem launch":
            return found
        raise Parsed

    def parse_args_and_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config(self, *args, **kwargs)
        raise Parsed

    def launch_command(options: Any) -> None:
        raise Parsed

    argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign]
    trl.TrlParser.parse_args_and_config = parse_args_and_config
    launch.launch_command = launch_command  # after our section of the YAML was read and checked
    answers = []
    for words in json.loads(Path(sys.argv[1]).read_text()):
        before = dict(os.environ)
        with contextlib.redirect_stdout(sys.stderr):
            answers.append(answer(words))
        os.environ.clear()
        os.environ.update(before)
    Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
