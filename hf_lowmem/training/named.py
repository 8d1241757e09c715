"""A misspelt field of a config is answered with the nearest that there is.

Python's own answer to it, "got an unexpected keyword argument", names no other, and a config has hundreds of fields.
"""

import difflib
from dataclasses import Field
from typing import ClassVar, Self

__all__ = ["NamedFields"]


class NamedFields:
    """Base of a dataclass whose unknown keywords are a TypeError with a suggestion."""

    __dataclass_fields__: ClassVar[dict[str, Field[object]]]

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """Make an instance; `args` and `kwargs` are the fields'."""
        for name in kwargs:
            if name not in cls.__dataclass_fields__:
                near = difflib.get_close_matches(name, cls.__dataclass_fields__, n=1)
                advice = f" Did you mean {near[0]}?" if near else " Leave it out."
                raise TypeError(f"{cls.__name__}: {name}={kwargs[name]!r}: there is no such field.{advice}")
        return super().__new__(cls)
