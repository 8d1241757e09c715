"""Adam's direction for projected gradients on a CPU, and its moments: one pass over the tiles of each parameter."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_lowmem.kernels._cpu import (
    TILE,
    float32,
    floats_at,
    fma,
    in_parts,
    inlined,
    kernel,
    random_words,
    size_of,
    tile_at,
    uint8,
    uint32,
)
from hf_lowmem.kernels.codecs.cpu import addresses, state_keys, tables_of, words_of
from hf_lowmem.kernels.codecs.cpu_decode import FP32, NUMBERS, decode_tile
from hf_lowmem.kernels.codecs.cpu_encode import encode_tile, make_room
from hf_lowmem.kernels.step.cpu import inverse_root
from hf_lowmem.kernels.step.reference import States

_INFINITY = uint32(0x7F800000)


@inlined
def _move(m, v, g, x):
    """x: 1 - beta1, beta1, beta2, 1 - beta2, eps. Whether all moments are finite."""
    worst = uint32(0)
    for j in range(TILE):
        mean = fma(g[j], x[0], m[j] * x[1])
        square = fma(g[j] * x[3], g[j], v[j] * x[2])
        m[j], v[j] = mean, square
        of_mean, of_square = size_of(mean), size_of(square)
        worst = of_mean if of_mean > worst else worst
        worst = of_square if of_square > worst else worst
    return worst < _INFINITY


@inlined
def _direct(m, v, eps, coded, out, count):
    for j in range(count):
        out[j] = inverse_root(v[j], eps) * m[j] if coded else m[j] / (np.sqrt(v[j]) + eps)


@kernel
def _moments(tile, last, n, here, address, how, x, keys, tables, finite):
    """Tiles of one parameter. here: its gradient, and where its direction is to go; 0: the moments are written."""
    grad, direction = here
    of_g, of_m, of_v = np.empty(TILE, float32), np.empty(TILE, float32), np.empty(TILE, float32)
    bytes_room, room, words = np.zeros(TILE, uint8), make_room(), np.empty(TILE, uint32)
    while tile < last:
        start = tile * TILE
        count = min(n - start, TILE)
        tile += 1
        g = tile_at(grad, start, count, of_g)
        m = decode_tile(how[0], address[0], start, count, tables[0][0], bytes_room, of_m)
        v = decode_tile(how[1], address[1], start, count, tables[1][0], bytes_room, of_v)
        if direction:  # a state that is fp32 is handed out itself, and not to be changed
            for j in range(TILE):
                of_m[j], of_v[j] = m[j], v[j]
            if not _move(of_m, of_v, g, x):
                finite[0] = 0
            coded = how[0][0] != FP32 or how[1][0] != FP32
            _direct(of_m, of_v, x[4], coded, floats_at(direction + 4 * start, count), count)
        else:
            _move(m, v, g, x)
            random_words(start, keys[0], keys[1], keys[2], words)
            encode_tile(m, words, how[0], address[0], start, count, tables[0], room)
            encode_tile(v, words, how[1], address[1], start, count, tables[1], room)


def _run(
    projected: Tensor,
    flags: np.ndarray,
    direction: Tensor | None,
    states: tuple[States, States],
    betas: tuple[float, float],
    eps: float,
) -> None:
    """The direction of every gradient; or, where there is no room for it, the moments of those whose flag is set."""
    n, write, seeds = projected[0].numel(), direction is None, states[0].seeds
    x = np.array([1 - betas[0], betas[0], betas[1], 1 - betas[1], eps], np.float32)
    how = tuple((NUMBERS[state.codec], state.signed, write) for state in states)
    tables = tuple(tables_of(state.codec, state.signed, write) for state in states)
    for i in range(len(projected)):
        if write and not flags[i]:
            continue
        here = projected[i].data_ptr(), 0 if direction is None else direction[i].data_ptr()
        address = tuple(addresses(list(state.of(i))) for state in states)
        keys = words_of(*(state_keys(seeds[i]) if seeds else (0, 0, 0)))
        flag = flags[i : i + 1]

        def part(first: int, last: int, of: tuple[object, ...] = (n, here, address, how, x, keys, tables, flag)):
            _moments(first, last, *of)

        in_parts(part, -(-n // TILE))


def adam_direction(
    projected: Tensor,
    finite: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    first_codec: str,
    second_codec: str,
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    states = States(first_codec, first, True, ()), States(second_codec, second, False, ())
    direction = torch.empty_like(projected)
    _run(projected, finite.numpy(), direction, states, (beta1, beta2), eps)
    return direction


def adam_moments(
    projected: Tensor,
    finite: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    first_codec: str,
    second_codec: str,
    state_seeds: Sequence[int],
    beta1: float,
    beta2: float,
) -> None:
    states = States(first_codec, first, True, state_seeds), States(second_codec, second, False, state_seeds)
    _run(projected, finite.numpy(), None, states, (beta1, beta2), 1.0)
