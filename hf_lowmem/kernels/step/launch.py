"""Launches of the steps' kernels: which parameters share one, and what each is handed."""

# Of a jit function: its idea of parameters lacks those of the launch, and takes numbers for constexprs.
# pyright: reportCallIssue=false, reportArgumentType=false

import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_lowmem.kernels.codecs.tiles import NUM_WARPS, NUMBERS, TILE
from hf_lowmem.kernels.codecs.triton import all_state_keys, state_keys, tables_of
from hf_lowmem.kernels.exact import GROUP, all_seed_keys, seed_keys
from hf_lowmem.kernels.step import triton as jit
from hf_lowmem.kernels.step.flags import fresh_flag
from hf_lowmem.kernels.step.reference import States
from hf_lowmem.specs import WEIGHT_STORES

__all__ = ["SMALL", "fp32_bits", "parts_of", "run_moments", "run_steps", "table_on", "tables_for", "three_of"]

SMALL = 1 << 16  # values: 64 tiles, less than one for every multiprocessor of a large GPU


def fp32_bits(x: float) -> int:
    """A number as an fp32, in a table's integer."""
    return struct.unpack("<I", struct.pack("<f", x))[0]


def three_of(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and power of an encoded state. What a codec has not got is another of its tensors, never read."""
    return parts[0], parts[min(1, len(parts) - 1)], parts[-1]


def tables_for(codec: str, signed: bool, like: Tensor) -> tuple[Tensor, ...]:
    """Arguments of a kernel that are a codec's tables; `like` stands for those that there are not."""
    return (like,) * 5 if codec == "fp32" else tables_of(codec, signed, True, like.device)


def table_on(rows: list[list[int]], addresses: int, device: torch.device) -> tuple[Tensor, bool]:
    """The table on the device, and whether the addresses, the first so many of each row, are multiples of 16.

    Copied from pinned memory: no wait.
    """
    numbers = np.array(rows, np.int64)  # in half of the time that torch takes for nested lists
    table, aligned = torch.from_numpy(numbers), not (numbers[:, :addresses] & 15).any()
    return (table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table), aligned


def parts_of(values: int, each: int) -> int:
    """Number of parts that cover so many values. (Triton's own `cdiv` takes as long as a launch's arguments.)"""
    return -(-values // each)


def _check_programs(largest: int) -> int:
    return min(parts_of(largest, jit.CHECK_BLOCK.value), jit.CHECK_PROGRAMS)


def run_steps(
    rule: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    skipped: Tensor,
    corrections: Sequence[Tensor],
    states: Sequence[States],
    store: str,
    seeds: Sequence[int],
    numbers: Sequence[Sequence[float]],
    *,
    heavy: bool = False,
    norm: Tensor | None = None,
    first_value: int,
) -> None:
    """One step for all of `params`: one launch to check the gradients, one for the small ones, one for each large one.

    One parameter alone has two launches whatever its size, with its addresses as arguments: no table is copied.

    Args: as those of `adamw_step`; `states`: one or two; `numbers`: the eight of a rule's formula, for each parameter;
        `norm`: of the gradient of one parameter alone, fp32, where it is known; `first_value`: of one alone that is a
        part, its place in the whole.
    """
    count = len(params)
    if not count:
        return
    first, second = states[0], states[-1]
    fixed = {
        "RULE": jit.RULES[rule],
        "FIRST": NUMBERS[first.codec],
        "SECOND": NUMBERS[second.codec],
        "STORE": WEIGHT_STORES.index(store),
        "HEAVY": heavy,
        "num_warps": jit.warps(first.codec, second.codec),
        "enable_fp_fusion": False,
    }
    shared = (*tables_for(first.codec, True, params[0]), *tables_for(second.codec, second.signed, params[0]))
    if count == 1:
        of_weights = [seed_keys(seed) for seed in seeds]
        of_states = [state_keys(seed) for seed in first.seeds]
    else:
        of_weights, of_states = all_seed_keys(seeds), all_state_keys(first.seeds)
    pairs = zip(of_weights or [(0, 0)] * count, of_states or [(0, 0, 0)] * count, strict=True)
    keys = [(*weight, *state) for weight, state in pairs]
    fine = corrections if store == "bf16_ecc" else params
    tensors = [
        (*here, *three_of(first.of(i)), *three_of(second.of(i)))
        for i, here in enumerate(zip(params, grads, fine, strict=True))
    ]
    sizes = [p.numel() for p in params]

    def step(flag: Tensor, i: int) -> None:
        grid = (parts_of(sizes[i], TILE),)
        even = {"EVEN": sizes[i] % TILE == 0, "ALIGNED": first_value % GROUP == 0}
        numbered = (*numbers[i], *keys[i], first_value)
        jit.step_kernel[grid](flag, *tensors[i], *shared, sizes[i], *numbered, **even, **fixed)

    if count == 1:
        step(_checked(grads[0], skipped, norm), 0)
        return
    # The small ones first, so that their rows and flags are the head of one table.
    order = sorted(range(count), key=lambda i: sizes[i] > SMALL)
    small = sum(size <= SMALL for size in sizes)
    bits = {id(x): [*map(fp32_bits, x)] for x in {id(numbers[i]): numbers[i] for i in order[:small]}.values()}
    rows = [[*(t.data_ptr() for t in tensors[i]), sizes[i], *keys[i], *bits[id(numbers[i])]] for i in order[:small]]
    for i in order[small:]:  # the check reads two columns, and nothing else does
        rows.append(row := [0] * jit.COLUMNS.value)
        row[jit.GRAD], row[jit.NUMEL] = grads[i].data_ptr(), sizes[i]
    table, aligned = table_on(rows, jit.SECOND + 3, params[0].device)
    finite = torch.ones(count, dtype=torch.int32, device=params[0].device)
    kinds = {"GRADIENT": jit.dtype_of(grads[0].dtype), "ALIGNED": aligned, "enable_fp_fusion": False}
    jit.check_kernel[(count, _check_programs(max(sizes)))](table, finite, **kinds, num_warps=NUM_WARPS)
    skipped.add_((finite == 0).sum())
    if small:
        whole = all(sizes[i] % 16 == 0 for i in order[:small])
        kinds |= {"WEIGHT": jit.dtype_of(params[0].dtype), "WHOLE": whole}
        grid = small, parts_of(sizes[max(order[:small], key=sizes.__getitem__)], TILE)
        jit.steps_kernel[grid](table, finite, *shared, **kinds | fixed)
    for flag, i in zip(finite.split(1)[small:], order[small:], strict=True):
        step(flag, i)


def _checked(grad: Tensor, skipped: Tensor, norm: Tensor | None) -> Tensor:
    """The flag of a gradient; a bad one is counted."""
    flag = fresh_flag(grad.device)
    jit.check_one_kernel[(_check_programs(grad.numel()),)](
        grad,
        flag,
        skipped,
        flag if norm is None else norm,
        grad.numel(),
        NORM=norm is not None,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return flag


def run_moments(
    projected: Tensor,
    finite: Tensor,
    direction: Tensor | None,
    states: tuple[States, States],
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One launch for k projected gradients: their directions; or, where there is no room for those, their moments.

    Args: as those of `adam_direction` and `adam_moments` in moments/reference.py.
    """
    first, second = states
    count, n = len(projected), projected[0].numel()
    keys = all_state_keys(first.seeds) or [(0, 0, 0)] * count
    tensors = [(*three_of(first.of(i)), *three_of(second.of(i))) for i in range(count)]
    rows = [[*(t.data_ptr() for t in of_each), *keys[i]] for i, of_each in enumerate(tensors)]
    table, aligned = table_on(rows, jit.MOMENTS_KEYS, projected.device)
    shared = (*tables_for(first.codec, True, projected), *tables_for(second.codec, False, projected))
    numbers = 1 - betas[0], betas[0], betas[1], 1 - betas[1], eps
    fixed = {
        "FIRST": NUMBERS[first.codec],
        "SECOND": NUMBERS[second.codec],
        "WRITE": direction is None,
        "ALIGNED": aligned,
        "EVEN": n % TILE == 0,
        "num_warps": jit.warps(first.codec, second.codec),
        "enable_fp_fusion": False,
    }
    out = projected if direction is None else direction
    jit.moments_kernel[parts_of(n, TILE), count](table, finite, projected, out, *shared, n, *numbers, **fixed)
