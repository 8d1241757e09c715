"""The command line: ``hf-lowmem demo``, ``sft``, ``dpo``, ``plan``, ``launch``, ``doctor``, ``card``, ``compare``.

A subcommand imports what it needs only when it runs, so that ``hf-lowmem --help`` answers at once.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hf_lowmem import __version__
from hf_lowmem.cli.screens import AGAINST, EXAMPLES, SCREENS
from hf_lowmem.cli.wrong import WrongCommand


def main(argv: Sequence[str] | None = None) -> int:
    """Parse ``argv`` (default: the process's) and run the subcommand; its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Waiting OpenMP threads sleep instead of spinning: on a machine with other work, two spinning threads on two
    # cores make a step five to ten times slower. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    own = bool(arguments) and arguments[0] in SCREENS  # whose own parser takes what follows
    # Of what follows a script of `launch` nothing is ours.
    asked = arguments[1:2] if arguments[:1] == ["launch"] else arguments[1:]
    if own and {"-h", "--help"} & set(asked):
        print(SCREENS[arguments[0]])
        return 0
    if own and "--help-all" in asked:
        arguments = [arguments[0], "--help"]
    flags = {word.split("=")[0] for word in asked}
    against = arguments[:1] == ["compare"] and "--against" in flags and not {"-h", "--help"} & flags
    # What follows is the flags of a training.
    words = [*arguments[:1], "."] if against else arguments[:1] if own else arguments
    options = _parser().parse_args(words)
    try:
        if against:
            from hf_lowmem.cli.against import run

            return run(arguments[1:])
        return options.run_command(options, arguments)
    except (ModuleNotFoundError, OSError, WrongCommand) as error:  # what a user can put right: no traceback
        print(f"hf-lowmem {options.command}: {_with_remedy(error)}", file=sys.stderr)
        return 2 if isinstance(error, WrongCommand) else 1


def _with_remedy(error: Exception) -> str:
    """Words of an error; of a package that is missing also how to get it."""
    name = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if not name or "install" in str(error):
        return str(error)
    return (
        f"{error}. `pip install {name}` brings it; `hf-lowmem doctor` says what else is missing, and what that costs."
    )


class _Parser(argparse.ArgumentParser):
    """argparse's, whose error names the command's help as well."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and what is wrong, and exit."""
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: {message}. `{self.prog} --help` says what there is.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hf-lowmem",
        description="Train HuggingFace models in less memory.",
        epilog="example:\n  hf-lowmem demo --quick\n\n`hf-lowmem COMMAND --help` says more, with an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hf-lowmem {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="fine-tune a small model on Shakespeare twice, and show what low memory saves and costs",
        description="Fine-tune a small model on Shakespeare: SFT as plain HuggingFace does it and with "
        "low-memory fields, then ASFT on preference pairs beside a control. Offline; about five minutes on two "
        "CPU cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument(
        "--model",
        help="a causal language model: a local folder or a name on the hub (default: SmolLM2-135M-Instruct, "
        "from a PyPI package, offline)",
        default=argparse.SUPPRESS,
    )
    demo.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="where everything is written")
    demo.add_argument(
        "--quick", action="store_true", help="a few steps only: a minute and a half, and losses of no meaning"
    )
    demo.add_argument("--smallest", action="store_true", help="SFT alone in the least memory, beside HuggingFace")
    demo.add_argument("--seed", type=int, default=42, help="of the data, their order and the projections")
    demo.set_defaults(run_command=_demo)
    sft = commands.add_parser("sft", add_help=False, help="supervised fine-tuning; flags, or a YAML file")
    sft.set_defaults(run_command=_sft)
    dpo = commands.add_parser("dpo", add_help=False, help="preference training; flags, or a YAML file")
    dpo.set_defaults(run_command=_dpo)
    launch = commands.add_parser(
        "launch", add_help=False, help="accelerate launch, with a section hf_lowmem_config in the --config_file"
    )
    launch.set_defaults(run_command=_launch)
    plan = commands.add_parser("plan", add_help=False, help="predict what a training step takes, without a GPU")
    plan.set_defaults(run_command=_plan)
    doctor = commands.add_parser(
        "doctor",
        help="say what this machine has and lacks, and compare every kernel with its reference on it",
        description="Print versions, devices, free memory, and packages with what each that is missing costs. Then run "
        "every kernel's cases on the GPU against the reference; the exit status is 1 where one differs. On a CPU no "
        "kernel runs: with TRITON_INTERPRET=1 they are compared in Triton's interpreter, which takes minutes.",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    doctor.set_defaults(run_command=_doctor)
    card = commands.add_parser(
        "card",
        help="write a run's model card again",
        description="Write README.md of a run from its lowmem_report.json, or where there is none from a "
        "trainer_state.json: settings, versions, predicted and measured memory, loss, speed.",
    )
    card.add_argument("run", metavar="RUN", type=Path, help="the run's folder, the output_dir of a training")
    card.add_argument(
        "--plan",
        nargs="?",
        const="",
        metavar="FILE",
        help="add what memory was predicted: from a file of `hf-lowmem plan ... --json`; without FILE, plan the run's "
        "own settings now",
    )
    card.add_argument("--plot", type=Path, metavar="FILE", help="draw memory over the step that was measured, a PNG")
    card.add_argument("--output", type=Path, metavar="FILE", help="write the card there, and leave the run as it is")
    card.set_defaults(run_command=_card)
    compare = commands.add_parser(
        "compare",
        help="show several runs beside each other",
        description="Print a table of runs: the settings in which they differ, memory, loss, speed.",
    )
    _add_options(compare)
    for name, command in {"demo": demo, "doctor": doctor, "card": card, "compare": compare}.items():
        command.epilog = f"example: {EXAMPLES[name]}"
    compare.epilog = f"{compare.epilog}; or: {AGAINST}"
    return parser


def _add_options(compare: argparse.ArgumentParser) -> None:
    """Options of `hf-lowmem compare`."""
    compare.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run's folder")
    compare.add_argument(
        "--against",
        choices=["baseline"],
        help="in place of RUN: run a few steps (--steps, 10) of `hf-lowmem sft` (--method dpo: `hf-lowmem dpo`) with "
        "the flags that follow, and the same without the fields of hf_lowmem; --output_dir keeps both reports",
    )
    compare.add_argument("--json", action="store_true", help="print one JSON object instead of a Markdown table")
    compare.add_argument("--plot", type=Path, metavar="FILE", help="draw memory and loss into this file, a PNG")
    compare.set_defaults(run_command=_compare)


def _sft(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from hf_lowmem.cli.sft import run

    return run(arguments[1:], "hf-lowmem sft")


def _dpo(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from hf_lowmem.cli.dpo import run

    return run(arguments[1:], "hf-lowmem dpo")


def _plan(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from hf_lowmem.cli.plan import run

    return run(arguments[1:])


def _doctor(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from hf_lowmem.cli.doctor.command import run

    return run(as_json=options.json)


def _card(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from hf_lowmem.cli.cards import card

    return card(options)


def _compare(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from hf_lowmem.cli.cards import compare_runs

    return compare_runs(options)


def _launch(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from hf_lowmem.cli.launch import launch

    return launch(arguments[1:])


def _demo(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    model = getattr(options, "model", None)
    if model is None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported, which is below
    if options.smallest:
        from hf_lowmem.demo.smallest import run_smallest as run_demo
    else:
        from hf_lowmem.demo.run import run_demo

    return run_demo(
        model=model,
        output_dir=options.output_dir,
        quick=options.quick,
        seed=options.seed,
        command=["hf-lowmem", *arguments],
    )


if __name__ == "__main__":
    sys.exit(main())
