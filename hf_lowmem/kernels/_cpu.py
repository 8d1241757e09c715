"""Common parts of the CPU kernels: how they are compiled, fp32 and 32-bit operations, random bits, bf16, threads.

The compiler is numba (LLVM), an extra that nobody has to have: it needs no compiler on the user's machine, as
inductor's C++ would, and what it made is kept in a folder for the next process. Rules that make a kernel give the bits
of its reference, and fast:

- **Numba promotes.** int32 + int32 is an int64 and float32 * 2.0 a float64. So integers are added, multiplied and
  shifted by the functions here, which take 32 bits and give 32, and every number in a formula is a `float32`.
- **One operation, one rounding.** No fastmath, and LLVM contracts nothing by itself; `fma` is one where the reference's
  torch operator is one. Division and square root are IEEE's.
- **Loops are short,** over tiles of `TILE` values in the first-level cache, each with one job, so that LLVM makes
  vectors of them. It does so only if it knows that what a loop writes is not what it reads: functions of `inlined`
  promise that all of their arrays are different memory.
- **Tables are read by `look_up`,** with a 32-bit index, which becomes one gather of 16 values.

Threads are our own, as many as torch has. Numba's pools end the process when two threads call them at once, or after a
fork; these are made again after a fork, and a call from any thread waits for its own parts alone.

Beside the `cpu.py` of a kernel, this is the one module that imports numba.
"""

# Where numba is not installed, all of it is unknown.
# pyright: reportAttributeAccessIssue=false, reportMissingImports=false

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core.compiler import Compiler
from numba.extending import intrinsic as numba_intrinsic

from hf_lowmem.kernels.exact import FACTOR, FACTOR_STEP, GROUP, HASH_A, HASH_B
from hf_lowmem.kernels.proof import cache_folder, source_hash

TILE = 1024

float32, int32, uint32, uint8, uint16, int8 = np.float32, np.int32, np.uint32, np.uint8, np.uint16, np.int8


_INNER = {"nogil": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


class _NoAlias(Compiler):
    """Numba's own compiler, told that the arrays of a call are different memory."""

    def __init__(self, typing, target, library, args, returns, flags, local):
        flags = flags.copy()
        flags.noalias = True
        super().__init__(typing, target, library, args, returns, flags, local)


def inlined(function: Callable[..., Any]):
    """A function that kernels call; its arrays must be different memory, unless it writes none of them.

    Truly inlined: left to itself LLVM calls the larger ones, with flags that it could have known.
    """
    return numba.njit(pipeline_class=_NoAlias, forceinline=True, **_INNER)(function)


def called(function: Callable[..., Any]):
    """The same for what is large and called in several places: compiled once, in half the time."""
    return numba.njit(pipeline_class=_NoAlias, **_INNER)(function)


def kernel(function: Callable[..., Any]):
    """A function that Python calls, without holding the interpreter's lock. Compiled at its first call, and kept.

    Numba keeps machine code beside the hash of the one file that it was written in, and these use others: so the folder
    is named by the hash of all. Where none can be written, each process compiles.
    """
    before = numba.config.CACHE_DIR
    folder = _folder()
    try:
        numba.config.CACHE_DIR = folder
        return numba.njit(nogil=True, error_model="numpy", cache=bool(folder))(function)
    finally:
        numba.config.CACHE_DIR = before


def _folder() -> str:
    """Folder in which compiled kernels are kept, or "" where that cannot be."""
    try:
        folder = cache_folder() / "cpu" / source_hash()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return ""
    return str(folder) if os.access(folder, os.W_OK) else ""


def intrinsic(function: Callable[..., Any]) -> Any:
    """A function of types, whose result says what LLVM's instructions are."""
    return numba_intrinsic(function)


def _of_two(name: str, kind):
    """LLVM's instruction of that name for two numbers of one kind."""

    @intrinsic
    def operation(context, x, y):
        if not x == y == kind:
            raise TypeError(f"{name} takes {kind}, not {x} and {y}")
        return kind(kind, kind), lambda _, builder, __, args: getattr(builder, name)(*args)

    return operation


def _bitcast(source, target, llvm):
    @intrinsic
    def operation(context, x):
        if x != source:
            raise TypeError(f"this takes {source}, not {x}")
        return target(source), lambda _, builder, __, args: builder.bitcast(args[0], llvm)

    return operation


# Signed ones first, of an unsigned index or of bits the others.
add, subtract, shift_right = (_of_two(name, types.int32) for name in ("add", "sub", "ashr"))
plus, minus, times = (_of_two(name, types.uint32) for name in ("add", "sub", "mul"))
both, either, differ = (_of_two(name, types.uint32) for name in ("and_", "or_", "xor"))
left, right = (_of_two(name, types.uint32) for name in ("shl", "lshr"))
bits_of = _bitcast(types.float32, types.uint32, ir.IntType(32))
from_bits = _bitcast(types.uint32, types.float32, ir.FloatType())


@intrinsic
def fma(context, x, y, z):
    """x * y + z in fp32, rounded once."""
    if not x == y == z == types.float32:
        raise TypeError(f"fma takes float32, not {x}, {y}, {z}")
    return x(x, y, z), lambda _, builder, __, args: builder.fma(*args)


@intrinsic
def look_up(context, table, index):
    """table[index], of an int32 that is known to be inside: Python's rule for negative ones would forbid vectors."""
    if index != types.int32:
        raise TypeError(f"an index is an int32, not {index}")

    def generate(context, builder, signature, args):
        array = context.make_array(signature.args[0])(context, builder, args[0])
        place = builder.gep(array.data, [builder.sext(args[1], ir.IntType(64))])
        return context.unpack_value(builder, signature.args[0].dtype, place)

    return table.dtype(table, index), generate


@intrinsic
def _pointer_into(context, array, start):
    def generate(context, builder, signature, args):
        return builder.gep(context.make_array(array)(context, builder, args[0]).data, [args[1]])

    return types.CPointer(array.dtype)(array, types.int64), generate


@inlined
def part(array, start, count):
    """array[start : start + count], which is known to be inside: none of the tests that a slice makes."""
    return numba.carray(_pointer_into(array, start), count)


@intrinsic
def _pointer(context, address):
    return types.voidptr(types.int64), lambda _, builder, __, args: builder.inttoptr(
        args[0], ir.IntType(8).as_pointer()
    )


@inlined
def floats_at(address, count):
    """`count` fp32 in memory, as an array."""
    return numba.carray(_pointer(address), count, float32)


@inlined
def bytes_at(address, count):
    """`count` bytes in memory, as an array of uint8."""
    return numba.carray(_pointer(address), count, uint8)


@inlined
def halves_at(address, count):
    """`count` bf16 in memory, as an array of uint16."""
    return numba.carray(_pointer(address), count, uint16)


@inlined
def size_of(x):
    """fp32 -> the bits of |x|, uint32. Finite values are below 0x7F800000, an inf is that, a nan is above."""
    return both(bits_of(x), uint32(0x7FFFFFFF))


@inlined
def widened(half):
    """The bits of a bf16, uint16 -> its value, fp32."""
    return from_bits(left(uint32(half), uint32(16)))


@inlined
def to_bf16(x):
    """fp32 -> the bits of the nearest bf16, ties to even; overflows to inf, a nan stays one."""
    bits = bits_of(x)
    odd = both(right(bits, uint32(16)), uint32(1))
    nearest = right(plus(plus(bits, uint32(0x7FFF)), odd), uint32(16))
    return uint16(uint32(0x7FC0) if both(bits, uint32(0x7FFFFFFF)) > uint32(0x7F800000) else nearest)


_HASH_A, _HASH_B = uint32(HASH_A), uint32(HASH_B)
_FACTOR, _FACTOR_STEP = uint32(FACTOR), uint32(FACTOR_STEP)


@inlined
def rotate_half(word):
    """A word with its halves exchanged."""
    return either(left(word, uint32(16)), right(word, uint32(16)))


@inlined
def _hash(index, k0, k1):
    """The reference is `random_bits`."""
    h = differ(index, k0)
    h = plus(times(differ(h, right(h, uint32(16))), _HASH_A), k1)
    h = times(differ(h, right(h, uint32(15))), _HASH_B)
    return differ(h, right(h, uint32(16)))


@inlined
def random_words(first, k0, k1, flip, words):
    """32 random bits for each of TILE indices from `first` on. Reference: `grouped_bits`; `flip`: of `Dither.words`."""
    group, inside = uint32(first // GROUP), first % GROUP
    if inside:
        for i in range(TILE):
            place = inside + i
            pair = uint32(place // 2 % (GROUP // 2))
            h = _hash(plus(group, uint32(place // GROUP)), k0, k1)
            word = differ(times(h, plus(_FACTOR, times(_FACTOR_STEP, pair))), flip)
            words[i] = rotate_half(word) if place % 2 else word
    else:
        for i in range(TILE // GROUP):
            h = _hash(plus(group, uint32(i)), k0, k1)
            of_group = part(words, i * GROUP, GROUP)
            for j in range(GROUP // 2):
                word = differ(times(h, plus(_FACTOR, times(_FACTOR_STEP, uint32(j)))), flip)
                of_group[2 * j] = word
                of_group[2 * j + 1] = rotate_half(word)


@inlined
def plain_words(first, k0, k1, words):
    """32 random bits for each of TILE indices from `first` on. Reference: `random_bits`."""
    for i in range(TILE):
        words[i] = _hash(plus(uint32(first), uint32(i)), k0, k1)


@inlined
def zero_from(x, start):
    """Clear a tile's values beyond the end of the tensor."""
    for i in range(start, TILE):
        x[i] = float32(0.0)


@inlined
def tile_at(address, start, count, room):
    """The tile of fp32 that begins at value `start`: itself, not a copy; only a ragged one, filled up with zeros.

    A loop that only copies becomes the C library's memcpy, which for a few KiB is several times slower than reading.
    """
    if count == TILE:
        return floats_at(address + 4 * start, TILE)
    here = floats_at(address + 4 * start, count)
    for j in range(count):
        room[j] = here[j]
    zero_from(room, count)
    return room


@inlined
def load_floats(bf16, address, start, count, room):
    """A tile of bf16 or fp32 as fp32; zeros beyond `count`. A whole one of fp32 is itself."""
    if bf16:
        halves = halves_at(address + 2 * start, count)
        for j in range(count):
            room[j] = widened(halves[j])
    else:
        return tile_at(address, start, count, room)
    if count < TILE:
        zero_from(room, count)
    return room


@inlined
def round_to_nearest(x, out, count):
    """fp32 -> the bits of the nearest bf16."""
    for j in range(count):
        out[j] = to_bf16(x[j])


@inlined
def put_back(x, address, start, count):
    """Write a tile of fp32, unless it is in its place: the one that `tile_at` has given."""
    here = floats_at(address + 4 * start, count)
    if x.ctypes.data != here.ctypes.data:
        for j in range(count):
            here[j] = x[j]


@inlined
def store_floats(bf16, x, address, start, count):
    """Write a tile or a row of fp32 as bf16, rounded to the nearest, or as it is."""
    if bf16:
        round_to_nearest(x, halves_at(address + 2 * start, count), count)
    else:
        put_back(x, address, start, count)


_pool: tuple[int, int, ThreadPoolExecutor] | None = None  # process, threads
LEAST = 1 << 15  # values worth another thread: waking one costs as much as they do


def in_parts(run: Callable[[int, int], object], tiles: int, *, values: int = TILE) -> None:
    """`run(first, last)` over `tiles` of so many values, by as many threads as torch has.

    Parts are more than threads where there are many, so that one that is held up does not hold up all.
    """
    threads = min(torch.get_num_threads(), tiles * values // LEAST)
    if threads <= 1:
        run(0, tiles)
        return
    parts = min(4 * threads, tiles * values // LEAST)
    edges = [tiles * i // parts for i in range(parts + 1)]
    pending = iter([_threads(threads - 1).submit(run, *edge) for edge in itertools.pairwise(edges)])
    # This thread does what no other has begun.
    waiting = []
    for part, future in enumerate(pending):
        if future.cancel():
            run(edges[part], edges[part + 1])
        else:
            waiting.append(future)
    for future in waiting:
        future.result()


def _threads(count: int) -> ThreadPoolExecutor:
    """That many other threads, made anew after a fork, and where torch's number has changed."""
    global _pool
    if _pool is None or _pool[:2] != (os.getpid(), count):
        _pool = os.getpid(), count, ThreadPoolExecutor(count, thread_name_prefix="hf_lowmem")
    return _pool[2]
