"""A reading of pickles that executes nothing.

`read(data, known)` goes through a pickle opcode by opcode, as an unpickler does, with a stack and a memo of its own.
But where an unpickler imports a name, calls a function or sets a state, this one looks the name up in `known`, an exact
list for the kind of file, and puts a description there instead of an object. So what comes out describes what
unpickling would make, and nothing of the file has run:

    None, bool, int, float, str, bytes    as themselves
    Name                                  a global that the file names
    Made                                  a container, a tensor's storage, or an object with arguments and state

Whatever no pickler of torch or Python writes is refused as well, although it could be harmless: names that are
computed, extension codes, INST and OBJ, a memo that is filled out of order, a state that is set twice, containers that
change after they were handed to a function. Two readers of a file must not be able to disagree about what it says.
"""

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# Deeper than any state of a training. Whoever walks through what was read may recurse.
DEPTH = 100


class Refused(ValueError):
    """A pickle that must not be loaded; the message says what it holds."""


class Name(NamedTuple):
    """A global, as a pickle names it."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Made:
    """A value that is built up: `kind` is "tuple", "list", "dict", "set", "storage", or what an object is made by.

    items: elements; of a dict and a filled object, pairs
    args:  what the object is made from
    state: pairs or a value, None before it is set
    """

    kind: str | Name
    items: list[Any] = field(default_factory=list)
    args: list[Any] = field(default_factory=list)
    state: Any = None
    depth: int = 1
    frozen: bool = False


@dataclass(frozen=True)
class Known:
    """Contents that the pickles of one kind of file may have.

    Attributes:
        values: names that may stand as a value, such as dtypes; classes of `new` and `members` may as well.
        calls: names that may be called, each with a check of its arguments.
        new: classes of which instances are made without a call, each with a check of the arguments.
        states: classes whose instances get a state, each with a check of it.
        members: enums, with the members that Python 3.11.0 to 3.11.3 asks for by `getattr`.
        filled: classes whose instances are filled as a dict is.
        keys: classes whose instances may be a dict's keys.
        storages: types of a tensor's storage, with the bytes of an element; empty where there are no tensors.
    """

    values: Set[Name] = frozenset()
    calls: Mapping[Name, Callable[[list[Any]], bool]] = field(default_factory=dict)
    new: Mapping[Name, Callable[[list[Any]], bool]] = field(default_factory=dict)
    states: Mapping[Name, Callable[[Any], bool]] = field(default_factory=dict)
    members: Mapping[Name, Set[str]] = field(default_factory=dict)
    filled: Set[Name] = frozenset()
    keys: Set[Name] = frozenset()
    storages: Mapping[Name, int] = field(default_factory=dict)

    def names(self) -> Set[Name]:
        """All names that a file of this kind may hold."""
        asked = GETATTR if self.members else frozenset()
        return {*self.values, *self.calls, *self.new, *self.members, *self.storages, *asked}


GETATTR = frozenset({Name("builtins", "getattr"), Name("__builtin__", "getattr")})
_MARK = object()
_PLAIN = {
    "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_TUPLE": "tuple", "EMPTY_LIST": "list", "EMPTY_DICT": "dict", "EMPTY_SET": "set"}
_MARKED = {"TUPLE": "tuple", "LIST": "list", "FROZENSET": "set"}
_COUNTED = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ATOMS = (bool, int, float, str, bytes, type(None))


def read(data: bytes, known: Known, records: Mapping[str, int] | None = None) -> Any:
    """A description of what unpickling would make of `data`.

    Args:
        known: what may be in it.
        records: in an archive of torch's, the sizes of what storages may refer to, by name.

    Raises:
        Refused: where it holds anything else, is cut off, or is written as no pickler writes.
    """
    return _Reader(known, records or {}).read(data)


class _Reader:
    def __init__(self, known: Known, records: Mapping[str, int]) -> None:
        self.known, self.records = known, records
        self.names = known.names()
        self.standing = {*known.values, *known.members, *known.new}
        self.stack: list[Any] = []
        self.memo: list[Any] = []

    def read(self, data: bytes) -> Any:
        file = io.BytesIO(data)
        try:
            for opcode, argument, position in pickletools.genops(file):
                if opcode.name == "STOP":
                    break
                if opcode.name == "PROTO" and (position or argument not in range(pickle.HIGHEST_PROTOCOL + 1)):
                    raise Refused(f"it goes over to protocol {argument} at byte {position:,}")
                self.step(opcode.name, argument)
        except Refused:
            raise
        except Exception as error:  # what pickletools says of a damaged file
            raise Refused(f"it is cut off or no pickle ({type(error).__name__}: {error})") from error
        if len(self.stack) != 1 or self.stack[0] is _MARK or file.tell() != len(data):
            raise Refused("something is left over at its end")
        return self.value(self.stack[0])

    def step(self, code: str, argument: Any) -> None:
        if code in ("PROTO", "FRAME"):
            return
        if code in _PLAIN:
            self.push(_CONSTANTS.get(code, argument))
        elif code in _EMPTY:
            self.push(Made(_EMPTY[code]))
        elif code in _COUNTED:
            self.push(self.container("tuple", [self.pop() for _ in range(_COUNTED[code])][::-1]))
        elif code in _MARKED:
            self.push(self.container(_MARKED[code], self.pop_marked()))
        elif (handler := getattr(self, f"do_{code.lower()}", None)) is not None:
            handler(argument)
        else:
            raise Refused(f"it uses the opcode {code}, which a checkpoint has no need of")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise Refused("its stack is empty where a value is needed")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.push(value)
        return value

    def pop_marked(self) -> list[Any]:
        found: list[Any] = []
        while self.stack and self.stack[-1] is not _MARK:
            found.append(self.stack.pop())
        if not self.stack:
            raise Refused("its stack has no mark where one is needed")
        self.stack.pop()
        return found[::-1]

    def value(self, value: Any) -> Any:
        """The value, unless it is a name that must not stand alone: a function is there to be called."""
        if isinstance(value, Name) and value not in self.standing:
            raise Refused(f"it keeps {value} as a value")
        return value

    def container(self, kind: str, items: list[Any]) -> Made:
        made = Made(kind)
        self.fill(made, items)
        return made

    def fill(self, target: Made, items: list[Any]) -> None:
        """Put values into a container, whichever opcode brings them."""
        if target.kind == "set" and not all(isinstance(item, _ATOMS) for item in items):
            raise Refused("a set holds more than plain values")
        self.deepen(target, items)
        target.items += items

    def deepen(self, target: Made, items: list[Any]) -> None:
        if target.frozen:
            raise Refused(f"a {target.kind} is changed after it was used")
        depths = [item.depth + 1 for item in map(self.value, items) if isinstance(item, Made)]
        target.depth = max([target.depth, *depths])
        if target.depth > DEPTH:
            raise Refused(f"it is nested more than {DEPTH} deep")

    def set_items(self, target: Any, flat: list[Any]) -> None:
        if not isinstance(target, Made) or (target.kind != "dict" and target.kind not in self.known.filled):
            raise Refused(f"it sets items of {_said(target)}")
        if len(flat) % 2:
            raise Refused("a dict has a key without a value")
        for key in flat[::2]:
            parts = key.items if isinstance(key, Made) and key.kind == "tuple" else [key]
            if not all(isinstance(p, (*_ATOMS, Name)) or self.is_key(p) for p in parts):
                raise Refused(f"a dict has {_said(key)} as a key")
        self.deepen(target, flat)
        target.items += zip(flat[::2], flat[1::2], strict=True)

    def is_key(self, value: Any) -> bool:
        return isinstance(value, Made) and value.kind in self.known.keys

    def append_to(self, target: Any, kind: str, items: list[Any]) -> None:
        if not isinstance(target, Made) or target.kind != kind:
            raise Refused(f"it appends to {_said(target)}")
        self.fill(target, items)

    # The other opcodes, a method each; what has none is refused.

    def do_mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def do_pop(self, _: Any) -> None:
        if not self.stack:
            raise Refused("its stack is empty where a value is needed")
        self.stack.pop()

    def do_pop_mark(self, _: Any) -> None:
        self.pop_marked()

    def do_bytearray8(self, argument: Any) -> None:
        self.push(bytes(argument))

    def do_dict(self, _: Any) -> None:
        made, flat = Made("dict"), self.pop_marked()
        self.set_items(made, flat)
        self.push(made)

    def do_append(self, _: Any) -> None:
        item = self.pop()
        self.append_to(self.top(), "list", [item])

    def do_appends(self, _: Any) -> None:
        items = self.pop_marked()
        self.append_to(self.top(), "list", items)

    def do_additems(self, _: Any) -> None:
        items = self.pop_marked()
        self.append_to(self.top(), "set", items)

    def do_setitem(self, _: Any) -> None:
        item, key = self.pop(), self.pop()
        self.set_items(self.top(), [key, item])

    def do_setitems(self, _: Any) -> None:
        flat = self.pop_marked()
        self.set_items(self.top(), flat)

    def do_put(self, argument: int) -> None:
        if argument != len(self.memo):
            raise Refused(f"its memo is filled out of order, at {argument} after {len(self.memo)} entries")
        self.memo.append(self.top())

    do_binput = do_long_binput = do_put

    def do_memoize(self, _: Any) -> None:
        self.memo.append(self.top())

    def do_get(self, argument: int) -> None:
        if not 0 <= argument < len(self.memo):
            raise Refused(f"its memo has no entry {argument}")
        self.push(self.memo[argument])

    do_binget = do_long_binget = do_get

    def do_global(self, argument: str) -> None:
        parts = argument.split(" ")
        if len(parts) != 2:
            raise Refused(f"it names {argument!r}")
        self.push(self.named(Name(*parts)))

    def do_stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise Refused("it computes the name of a global")
        self.push(self.named(Name(module, name)))

    def named(self, name: Name) -> Name:
        if name not in self.names:
            raise Refused(f"it names {name}")
        return name

    def do_reduce(self, _: Any) -> None:
        args, called = self.pop(), self.pop()
        if not isinstance(called, Name) or not isinstance(args, Made) or args.kind != "tuple":
            raise Refused(f"it calls {_said(called)}")
        made: str | Name = called
        if called in GETATTR:
            made = self.enum_of(args.items)
        elif called not in self.known.calls or not self.known.calls[called](args.items):
            raise Refused(f"it calls {called} with what a checkpoint has no need of")
        self.push(self.object(made, args))

    def enum_of(self, args: list[Any]) -> Name:
        if len(args) == 2 and isinstance(args[0], Name) and isinstance(args[1], str):
            if args[1] in self.known.members.get(args[0], ()):
                return args[0]
            raise Refused(f"it asks for the attribute {args[1]!r} of {args[0]}")
        raise Refused("it asks for an attribute of something that it has computed")

    def do_newobj(self, _: Any) -> None:
        args, cls = self.pop(), self.pop()
        if not isinstance(cls, Name) or cls not in self.known.new:
            raise Refused(f"it makes an instance of {_said(cls)}")
        if not isinstance(args, Made) or args.kind != "tuple" or not self.known.new[cls](args.items):
            raise Refused(f"it makes an instance of {cls} from what a checkpoint has no need of")
        self.push(self.object(cls, args))

    def object(self, kind: str | Name, args: Made) -> Made:
        for item in args.items:
            if isinstance(item, Made):
                item.frozen = True
        return Made(kind, args=list(args.items), depth=args.depth)

    def do_build(self, _: Any) -> None:
        state, target = self.pop(), self.top()
        if not isinstance(target, Made) or not isinstance(target.kind, Name) or target.kind not in self.known.states:
            raise Refused(f"it sets the state of {_said(target)}")
        if target.state is not None:
            raise Refused(f"it sets the state of {target.kind} twice")
        if not self.known.states[target.kind](state):
            raise Refused(f"it gives {target.kind} a state that it never has")
        if isinstance(state, Made):
            state.frozen = True
        target.state = state
        target.depth = max(target.depth, getattr(state, "depth", 0) + 1)

    def do_binpersid(self, _: Any) -> None:
        """A tensor's storage; torch's persistent ids are nothing else."""
        pid = self.pop()
        parts = pid.items if isinstance(pid, Made) and pid.kind == "tuple" and len(pid.items) == 5 else [None] * 5
        word, kind, key, place, count = parts
        size = self.known.storages.get(kind) if isinstance(kind, Name) else None
        if word != "storage" or size is None or not isinstance(place, str) or type(count) is not int:
            raise Refused("it refers to something outside of it that is no storage of a tensor")
        held = self.records.get(f"data/{key}") if isinstance(key, str) else None
        if held is None or not 0 <= count * size <= held:
            raise Refused(f"it refers to {count:,} elements of the record data/{key}, which has {held or 0:,} bytes")
        self.push(Made("storage", args=parts))


def _said(value: Any) -> str:
    if isinstance(value, Made):
        return f"an object of {value.kind}" if isinstance(value.kind, Name) else f"a {value.kind}"
    return str(value) if isinstance(value, Name) else f"a plain value ({type(value).__name__})"
