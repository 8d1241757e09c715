"""`hf-lowmem launch`: accelerate's own launcher, with a section of ours in its YAML.

accelerate stops at a key that it does not know. So the section is checked here, before any process is started, taken
out of the file, and handed to the workers in one environment variable; the rest goes to `accelerate launch`, whose
every option is accepted. No launcher is rewritten: each process runs `hf_lowmem.cli.worker`, which runs the script.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hf_lowmem import rules
from hf_lowmem.rules import deepspeed
from hf_lowmem.training import section
from hf_lowmem.training.plugin import LowMemPlugin

WORKER = "hf_lowmem.cli.worker"


class Section(LowMemPlugin):
    """A section whose reader is not known yet: a trainer, or a loop with a LowMemPlugin."""

    def _facts(self, run: rules.Run) -> rules.Run:
        return run


def prepare(
    config_file: str, given: Mapping[str, Any] | None = None, *, asked: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(our section, accelerate's part), both checked against each other.

    Args:
        config_file: an accelerate YAML.
        given: accelerate's options from the command line, which count more than the file.
        asked: the section, where the file has none.

    Raises:
        FileNotFoundError, TypeError, ValueError: naming the file, the key, its value, the reason and the remedy.
    """
    values, rest = section.from_yaml(config_file)
    check(f"{section.KEY} in {config_file}", values or asked or {}, flat(config_file, rest) | dict(given or {}))
    return values, rest


def flat(label: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """accelerate's part of a YAML as options by name, the way its launcher reads it."""
    found = dict(content)
    prefixes = {"fsdp_config": "fsdp_", "dynamo_config": "dynamo_", "parallelism_config": "parallelism_config_"}
    for name, prefix in prefixes.items():
        values = content.get(name) or {}
        if not isinstance(values, Mapping):
            raise TypeError(f"{label}: {name}={values!r}: expected keys with values.")
        found |= {f"{prefix}{str(key).removeprefix(prefix)}": value for key, value in values.items()}
    deepspeed_config = content.get("deepspeed_config")
    if isinstance(deepspeed_config, Mapping) and "gradient_accumulation_steps" in deepspeed_config:
        found["gradient_accumulation_steps"] = deepspeed_config["gradient_accumulation_steps"]
    return found


def check(label: str, values: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise where a section is wrong in itself, or accelerate is told to do what our fields do not go with."""
    asked = Section.from_section(label, values)
    processes = settings.get("num_processes", 1)
    if not isinstance(processes, int) or isinstance(processes, bool) or processes < 1:
        raise ValueError(f"{label}: num_processes={processes!r}: expected a number of at least 1.")
    kind = str(settings.get("distributed_type")).upper()
    zero = deepspeed.from_yaml(label, settings) if kind == "DEEPSPEED" else None
    rules.check(rules.Run.from_arguments(asked).with_yaml(settings, zero), label)


def given_options(options: argparse.Namespace) -> dict[str, Any]:
    """Settings that the command line gives to accelerate, under the names of its YAML."""
    found = {name: getattr(options, name) for name in getattr(options, "nondefault", ())}
    engines = {"use_fsdp": "FSDP", "use_deepspeed": "DEEPSPEED", "multi_gpu": "MULTI_GPU", "cpu": "NO"}
    kind = next((engine for option, engine in engines.items() if getattr(options, option, False)), None)
    if kind == "DEEPSPEED":
        names = ("deepspeed_config_file", "zero_stage", "offload_optimizer_device")
        found["deepspeed_config"] = {n: getattr(options, n) for n in names if getattr(options, n) is not None}
    return found if kind is None else found | {"distributed_type": kind}


def through_worker(options: argparse.Namespace, kind: str) -> None:
    """Let accelerate start our worker, which runs the script.

    Raises:
        ValueError: where accelerate starts what our worker cannot stand before.
    """
    for setting, asked in (("--no_python", options.no_python), (f"distributed_type: {kind}", kind in ("XLA", "TPU"))):
        if asked:
            raise ValueError(
                f"{setting} with {section.KEY}: the processes are not started by Python with a script of yours, so "
                "nothing of hf_lowmem would run in them, and nothing of the section be applied. Start a script or a "
                "module (-m), or take the section out and use LowMemPlugin in your code."
            )
    words = ["-m"] if options.module else []
    options.training_script_args = [*words, options.training_script, *options.training_script_args]
    options.training_script, options.module = WORKER, True


def launch(arguments: Sequence[str]) -> int:
    """`accelerate launch ARGUMENTS`, where `--config_file` may hold our section; the exit status.

    Raises:
        SystemExit: from accelerate's parser.
    """
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command, launch_command_parser

    parser = launch_command_parser()
    parser.prog = "hf-lowmem launch"
    parser.error = _stop  # in place of a usage of a hundred lines
    options: argparse.Namespace = parser.parse_args(list(arguments))
    file = options.config_file
    if file is None and not options.cpu and Path(default_config_file).is_file():
        file = default_config_file  # as accelerate does
    try:
        given, asked, rest = given_options(options), section.from_env(), {}
        if file is None:
            check(section.VARIABLE, asked, given)
        else:
            values, rest = prepare(file, given, asked=asked)
            asked = values or asked
        if asked:
            through_worker(options, str((rest | given).get("distributed_type")).upper())
    except (TypeError, ValueError, OSError) as error:  # a setting to put right: no traceback
        parser.error(str(error))
    import yaml

    with tempfile.TemporaryDirectory(prefix="hf_lowmem_") as folder:
        if file is not None:
            plain = Path(folder) / "accelerate.yaml"
            plain.write_text(yaml.safe_dump(rest), encoding="utf-8")
            options.config_file = str(plain)
        if asked:
            os.environ.update(section.to_env(asked))
        try:
            launch_command(options)
        except subprocess.CalledProcessError as error:  # the script has said itself what was wrong
            return error.returncode
    return 0


def _stop(message: str) -> NoReturn:
    print(f"hf-lowmem launch: error: {message.rstrip('.')}. `hf-lowmem launch --help` says more.", file=sys.stderr)
    sys.exit(2)
