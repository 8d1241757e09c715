"""Flags and YAML files into dataclasses, by TRL's parser; what is wrong in them is one answer, not a traceback.

Beyond TRL's parser:

    --FIELD null, --FIELD ""   as if neither flag nor file had set it; `none` too, where the default is None
    FIELD: null                in a file, the same
    FIELD: value               in a file, is read and checked as a flag's word would be: a number of a wrong kind and a
                               name that is not among the choices are refused, and YAML's `no`, which is false, is "no"
    --loss_type L              with a file of another loss: the file's loss options were its loss's, and are left out
    a wrong flag or key        is named with the nearest that there is, in place of the usage of 400 flags
"""

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, fields
from types import UnionType
from typing import Any, Literal, NoReturn, Union, cast, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from hf_lowmem.cli.wrong import WrongCommand

__all__ = ["Parser"]

UNSET = ("null", "")
MEANT = ("lowmem_reference", "report_to")  # of which "none" is a value
SWITCHES = ("fsdp", "resume_from_checkpoint")  # which HuggingFace takes as true or false beside words
FLAG = re.compile(r"--[A-Za-z]\w*(?:-\w+)*")
# What TRL and transformers say of words that no field has taken.
UNKNOWN = re.compile(r"(?:not used by the HfArgumentParser|Unknown arguments from config file): (\[.*?\])(?:$|\. )")
WORD = re.compile(r"'([^']*)'")
# What belongs to a loss: an option of one means something else, or nothing, to another.
OF_A_LOSS = ("beta", "asft_lambda", "orpo_lambda", "simpo_gamma", "cpo_alpha", "loss_weights")


class Parser(TrlParser):
    """TRL's parser, whose errors are WrongCommand."""

    def __init__(self, classes: Iterable[Any], **options: str | None) -> None:
        self.actions: dict[str, argparse.Action] = {}
        super().__init__(classes, **options)
        self.defaults = {f.name: _default_of(f) for made in self.dataclass_types for f in fields(made) if f.init}
        dashed = {f"--{name.replace('_', '-')}": name for name in self.defaults}
        self.flags = dashed | {f"--{name}": name for name in self.defaults}
        self.hints = {
            name: _kinds(hint) for made in self.dataclass_types for name, hint in get_type_hints(made).items()
        }
        self.unset: set[str] = set()
        self.losses: list[str] | None = None

    def add_argument(self, *names: str, **options: object) -> argparse.Action:
        """Add a flag, as argparse does; the first of a field is kept in `actions`.

        Args:
            names: its flags.
            options: as for argparse.
        """
        made = super().add_argument(*names, **cast("dict[str, Any]", options))
        self.actions.setdefault(made.dest, made)
        return made

    def error(self, message: str) -> NoReturn:
        """Raise, where argparse prints the usage and exits."""
        raise WrongCommand(f"{message.rstrip('.')}. {self._more}")

    @property
    def _more(self) -> str:
        return f"`{self.prog} --help` says what there is."

    def read(self, arguments: Sequence[str] | None = None) -> tuple[Any, ...]:
        """The dataclasses that the arguments (default: the process's) and their `--config` describe.

        Raises:
            WrongCommand: for an unknown flag or key, a value that cannot be, a file that cannot be read, and for
                settings that the classes refuse.
        """
        given = list(sys.argv[1:] if arguments is None else arguments)
        given = [part for word in given for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
        if given[-1:] == ["--config"] or given.count("--config") > 1:
            raise WrongCommand(f"--config: expected one file. {self._more}")
        given = self._without_unset(given)
        self.losses = _values_of(given, "--loss_type")
        try:
            return self.parse_args_and_config(given)
        except WrongCommand:
            raise
        except OSError as error:
            raise WrongCommand(f"--config {error.filename}: {error.strerror}.") from error
        except yaml.YAMLError as error:
            raise WrongCommand(f"--config: no YAML ({' '.join(str(error).split())}).") from error
        except (TypeError, ValueError) as error:
            unknown = UNKNOWN.search(str(error))
            raise WrongCommand(self._unknown(WORD.findall(unknown[1])) if unknown else str(error)) from error

    def set_defaults_with_config(self, **values: object) -> list[str]:
        """Take a file's values, without those that are unset."""
        values = {name: v for name, v in values.items() if v is not None and name not in self.unset}
        theirs = values.get("loss_type", self.defaults.get("loss_type"))
        theirs = list(theirs) if isinstance(theirs, list | tuple) else [str(theirs)]
        if self.losses is not None and "loss_type" in self.defaults and set(self.losses) != set(theirs):
            left = [name for name in OF_A_LOSS if name in values]
            values = {name: v for name, v in values.items() if name not in left}
            if left:
                print(
                    f"--loss_type {' '.join(self.losses)}: of the file, which is for {' '.join(theirs)}, "
                    f"{', '.join(left)} is left out; each loss has its own default. A flag sets it.",
                    file=sys.stderr,
                )
        return super().set_defaults_with_config(**{name: self._as_a_flag(name, v) for name, v in values.items()})

    def _as_a_flag(self, name: str, value: object) -> object:
        """A file's value as the same flag would have given it; mappings, and lists where one word is expected, as they
        are.

        Raises:
            WrongCommand: where the flag would refuse it.
        """
        action = self.actions.get(name)
        if action is None or name in SWITCHES or name not in self.hints:
            return value
        if isinstance(value, dict | list) and not (isinstance(value, list) and action.nargs == "+"):
            if type(value) not in {get_origin(hint) or hint for hint in self.hints[name]}:
                raise WrongCommand(f"--config: {name}={value!r}: expected one value, not a {type(value).__name__}.")
            return value
        if isinstance(value, list):
            return [self._as_a_word(action, name, each) for each in value]
        word = self._as_a_word(action, name, value)
        return [word] if action.nargs == "+" else word

    def _as_a_word(self, action: argparse.Action, name: str, value: object) -> object:
        hints = self.hints[name]
        if isinstance(value, bool) and bool not in hints:
            if value or "no" not in (action.choices or ()):
                raise WrongCommand(
                    f"--config: {name} is {value}, which YAML makes of a bare yes, no, on or off; it is no switch. "
                    f"If the word is meant, put it in quotes; null leaves the field unset. {self._more}"
                )
            value = "no"
        elif not isinstance(value, str) and str in hints and bool not in hints and not {int, float} & hints:
            value = str(value)
        elif isinstance(value, float) and value.is_integer() and float not in hints:
            value = int(value)
        if action.type is str and not isinstance(value, str):
            return value
        try:
            made = action.type(str(value)) if callable(action.type) else value
        except (argparse.ArgumentTypeError, TypeError, ValueError) as error:
            kind = getattr(action.type, "__name__", "")
            said = str(error) if isinstance(error, argparse.ArgumentTypeError) else f"this is no {kind}"
            raise WrongCommand(f"--config: {name}={value!r}: {said.rstrip('.')}. {self._more}") from error
        if action.choices is not None and made not in action.choices:
            raise WrongCommand(
                f"--config: {name}={value!r}: choose from {', '.join(map(str, action.choices))}. {self._more}"
            )
        return made

    def _without_unset(self, given: list[str]) -> list[str]:
        """The arguments without flags that unset a field, and without those before that set it; their names in
        `unset`."""
        kept: list[tuple[str | None, list[str]]] = []  # a field, or None, and its words
        while given:
            word, *given = given
            flag, equals, value = word.partition("=")
            name = self.flags.get(flag)
            if name is None:
                kept.append((None, [word]))
                continue
            words = [word]
            while not equals and given and not given[0].startswith("--"):
                words.append(given.pop(0))
            value = value if equals else words[1] if len(words) == 2 else None
            none = value is not None and value.lower() == "none" and self.defaults[name] is None
            if value is not None and (value.lower() in UNSET or (none and name not in MEANT)):
                self.unset.add(name)
                kept = [(other, words) for other, words in kept if other != name]
            else:
                kept.append((name, words))
        return [word for _, words in kept for word in words]

    def _unknown(self, rest: list[str]) -> str:
        flags = [word for word in rest if FLAG.match(word)] or rest[:1]
        said = []
        for flag in flags:
            near = difflib.get_close_matches(flag.split("=")[0].lstrip("-").replace("-", "_"), self.defaults, n=1)
            said.append(f"{flag}: there is no such field" + (f"; did you mean --{near[0]}?" if near else "."))
        return f"{' '.join(said)} {self._more}"


def _default_of(field: Field[object]) -> object:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default


def _kinds(hint: object) -> set[object]:
    """The plain types of a hint."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return {str if get_origin(part) is Literal else part for part in parts}


def _values_of(given: list[str], flag: str) -> list[str] | None:
    """The words after a flag; None where it is not there."""
    for i, word in enumerate(given):
        if word == flag or word.startswith(f"{flag}="):
            rest = [word.partition("=")[2]] if "=" in word else []
            for value in given[i + 1 :]:
                if (rest and "=" in word) or value.startswith("--"):
                    break
                rest.append(value)
            return rest
    return None
