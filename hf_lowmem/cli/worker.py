"""`python -m hf_lowmem.cli.worker [-m] SCRIPT ...`: what `hf-lowmem launch` starts: a script that need not know of us.

Every config that the script makes is one with our fields, which take the section; every Trainer is ours of its class
(see hf_lowmem/training/wrap.py). Nothing is imported before the script imports it, since a script may set environment
variables that libraries read when they are imported. A script that computes a gradient while neither a trainer nor a
LowMemPlugin has taken the section is stopped there: nothing of what was asked for would be applied.
"""

import importlib.util
import inspect
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

from hf_lowmem.training import section


class AfterImport(MetaPathFinder):
    """Calls a function once, when the module of a name has been imported."""

    def __init__(self, actions: dict[str, Callable[[ModuleType], None]]) -> None:
        self.actions = dict(actions)

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        """The spec that the other finders find, with a loader that calls the action."""
        action = self.actions.pop(fullname, None)
        spec = None if action is None else importlib.util.find_spec(fullname)
        if action is None or spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_act(module: ModuleType) -> None:
            load(module)
            action(module)

        spec.loader.exec_module = load_and_act
        return spec


def lend_fields(module: ModuleType) -> None:
    """Every TrainingArguments that is made, of whatever class, has our fields."""

    def make(cls: type, *args: Any, **kwargs: Any) -> Any:
        from hf_lowmem.training.arguments import LowMemArguments
        from hf_lowmem.training.wrap import with_lowmem

        made: Any = object.__new__(with_lowmem(cls))
        made._lowmem_lent = not issubclass(cls, LowMemArguments)
        return made

    make.__signature__ = inspect.signature(module.TrainingArguments.__init__)
    module.TrainingArguments.__new__ = make


def stop_untaken(module: ModuleType) -> None:
    """The first gradient is refused where nobody has taken the section."""
    backward = module.autograd.backward

    def guarded(*args: Any, **kwargs: Any) -> Any:
        if not section.state.taken:
            raise ValueError(
                f"{section.KEY}={section.from_env()!r} is applied by nobody: this script trains without a Trainer of "
                "transformers or TRL, and without a LowMemPlugin. In a loop of your own, write "
                "LowMemPlugin.from_env().prepare(accelerator, model, ...) for accelerator.prepare(model, ...); or take "
                "the section out."
            )
        module.autograd.backward = backward
        return backward(*args, **kwargs)

    module.autograd.backward = guarded


def adopt_trainers(module: ModuleType) -> None:
    """Every Trainer that is made is ours of its class; see hf_lowmem/training/arguments.py."""
    import hf_lowmem.training.arguments  # noqa: F401


def main(arguments: Sequence[str]) -> None:
    """Run a script as `python SCRIPT ...` or, with -m, a module as `python -m MODULE ...`.

    Raises:
        SystemExit: where the launcher did not pass the section on.
    """
    if not section.from_env():
        sys.exit(
            f"{section.VARIABLE} did not reach this process, so nothing of the section can be applied. Let the "
            "launcher of your cluster pass that variable on to every machine."
        )
    section.state.launched = True
    actions = {"transformers.training_args": lend_fields, "transformers.trainer": adopt_trainers, "torch": stop_untaken}
    for name in actions.keys() & sys.modules.keys():  # imported before anything of this process ran
        actions.pop(name)(sys.modules[name])
    sys.meta_path.insert(0, AfterImport(actions))
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = list(arguments)
    sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
