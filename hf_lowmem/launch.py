"""`hf-lowmem launch`: accelerate's own launcher, with a section of ours in its YAML.

accelerate stops at a key that it does not know. So the section is checked here, before any process is started, taken
out of the file, and handed to the workers in one environment variable; the rest goes to `accelerate launch`, whose
every option is accepted. No launcher is rewritten.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_lowmem import section, zero
from hf_lowmem.plugin import LowMemPlugin


def prepare(config_file: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(our section, accelerate's part), both checked against each other.

    Raises:
        FileNotFoundError, TypeError, ValueError: naming the file, the key, its value, the reason and the remedy.
    """
    values, rest = section.from_yaml(config_file)
    label = f"{section.KEY} in {config_file}"
    plugin = LowMemPlugin.from_section(label, values)
    check_engine(label, plugin, rest)
    return values, rest


def check_engine(label: str, plugin: LowMemPlugin, rest: dict[str, Any]) -> None:
    """Raise where accelerate's part of the file asks for an engine that our fields do not go with."""
    from hf_lowmem.optim import OPTIMIZERS

    engine = str(rest.get("distributed_type") or "NO").upper()
    ours = plugin.optim in OPTIMIZERS
    if engine == "DEEPSPEED":
        plugin.check_zero(f"{label}: distributed_type: DEEPSPEED", zero.from_yaml(label, rest))
    fsdp = rest.get("fsdp_config") or {}
    if not isinstance(fsdp, dict):
        raise TypeError(f"{label}: fsdp_config={fsdp!r}: expected keys with values.")
    if engine == "FSDP":
        if ours and str(fsdp.get("fsdp_version", 1)) != "2":
            raise ValueError(
                f"{label}: optim={plugin.optim!r} with fsdp_version: {fsdp.get('fsdp_version', 1)} is not supported: "
                "FSDP1 flattens parameters. Set fsdp_version: 2."
            )
        if plugin.lowmem_activations is not None and fsdp.get("fsdp_activation_checkpointing"):
            raise ValueError(
                f"{label}: fsdp_activation_checkpointing: true cannot be combined with lowmem_activations="
                f"{plugin.lowmem_activations!r}: inside it nothing is left for a tier to compress. Set one of the two."
            )
    processes = rest.get("num_processes", 1)
    if not isinstance(processes, int) or isinstance(processes, bool) or processes < 1:
        raise ValueError(f"{label}: num_processes={processes!r}: expected a number of at least 1.")
    if plugin.lowmem_step_in_backward and processes > 1 and engine != "FSDP":
        raise ValueError(
            f"{label}: num_processes={processes} cannot be combined with lowmem_step_in_backward=True: gradients are "
            "averaged after each one's update. Set distributed_type: FSDP with fsdp_version: 2, train in one process, "
            "or leave it unset."
        )
    if plugin.lowmem_step_in_backward and rest.get("mixed_precision") == "fp16":
        raise ValueError(
            f"{label}: mixed_precision: fp16 cannot be combined with lowmem_step_in_backward=True: loss scaling checks "
            "every gradient before the first update. Use bf16."
        )


def launch(arguments: Sequence[str]) -> int:
    """`accelerate launch ARGUMENTS`, where `--config_file` may hold our section.

    Raises:
        SystemExit: from accelerate's parser, or with the status of a run that failed.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser

    parser = launch_command_parser()
    parser.prog = "hf-lowmem launch"
    options: argparse.Namespace = parser.parse_args(list(arguments))
    if not options.config_file:
        launch_command(options)
        return 0
    try:
        values, rest = prepare(options.config_file)
    except (TypeError, ValueError, OSError) as error:  # a setting to put right: no traceback
        parser.error(str(error))
    import yaml

    with tempfile.TemporaryDirectory(prefix="hf_lowmem_") as folder:
        plain = Path(folder) / "accelerate.yaml"
        plain.write_text(yaml.safe_dump(rest), encoding="utf-8")
        options.config_file = str(plain)
        if values:
            os.environ.update(section.to_env(values))
        launch_command(options)
    return 0
