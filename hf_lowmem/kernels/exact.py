"""Building blocks of references: plain torch with the same bits on every device, and in Triton (_device.py).

IEEE arithmetic is the same everywhere as long as every operation is rounded correctly, and once. Torch does not promise
that. Measured on torch 2.13, or read in its source, and so avoided in a reference:

- `x.sqrt()` and `x.pow(0.5)` on a CPU are off by one unit in the last place for 17 % of all mantissas: `sqrt` here;
- `x / number` on a GPU multiplies by the inverse of the number, a second rounding: `divide` here, or a tensor;
- `a.add(b, alpha=c)`, `a.lerp(b, c)`, `addcmul` fuse the product into the sum where the device can (on an AVX-512 CPU
  a fifth of the results differ from those of a product and a sum): write `a + b * c` with a tensor between;
- `exp2`, `log2` and their like differ by a unit in the last place from device to device: a table, or a polynomial;
- `x.bfloat16().float()`, compiled, keeps the unrounded x: `round_bf16` works on the bits.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

BF16_MAX = torch.finfo(torch.bfloat16).max
FLOAT_MAX = torch.finfo(torch.float32).max
E4M3_MAX = 448.0
LOW32 = 0xFFFFFFFF
# Two rounds of xor-shift and multiplication; these constants (C. Wellons, hash-prospector, public domain) have the
# lowest known bias for a 32-bit hash of two rounds.
HASH_A, HASH_B = 0x7FEB352D, 0x846CA68B
GROUP = 32  # values that share a hash, in `grouped_bits`
# Of its words; of sixty at random those whose 32 halves are correlated least: below the noise of 2**18 draws.
FACTOR, FACTOR_STEP = 0x5BA34D43, 0xDDC6CEC6


def sqrt(x: Tensor) -> Tensor:
    """The correctly rounded square root of an fp32, as a fresh tensor.

    By way of fp64: the root of an fp32 lies far enough from the middle of two fp32 for fp64 to tell the side.
    """
    return sqrt_wide(x).float()


def sqrt_wide(x: Tensor) -> Tensor:
    """The square root of an fp32 in fp64, whose nearest fp32 is the correctly rounded one."""
    return x.double().sqrt_()


def divide(x: Tensor, number: float) -> Tensor:
    """The correctly rounded x / number in x's dtype."""
    return x.div(torch.full((), number, dtype=x.dtype, device=x.device))


def fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x * y + z in fp32, rounded once, a fresh tensor: what torch's `addcmul` is on a CPU.

    Elsewhere by way of fp64, in which the product is exact: that has other bits where the sum's rounding to fp64 makes
    a tie of it, once in 2**29.
    """
    if x.device.type == "cpu":
        return torch.addcmul(z, x, y)
    return (x.double() * y.double()).add_(z).float()


def round_bf16(x: Tensor) -> Tensor:
    """fp32, |x| <= bf16's largest -> the nearest bf16, ties to even, still as fp32."""
    bits = x.view(torch.int32)
    odd = bits.bitwise_right_shift(16).bitwise_and_(1)
    return odd.add_(bits).add_(0x7FFF).bitwise_and_(-0x10000).view(torch.float32)


def round_bf16_up(x: Tensor) -> Tensor:
    """fp32, |x| <= bf16's largest -> the next bf16 that is no smaller in magnitude, still as fp32."""
    return x.view(torch.int32).add(0xFFFF).bitwise_and_(-0x10000).view(torch.float32)


def e4m3_codes(y: Tensor, noise: Tensor | None = None) -> Tensor:
    """fp32 within [-448, 448] -> E4M3 bits as uint8, by integer operations on y's bits; exact on every device.

    Nearest, ties to even: torch's cast for every such y. With `noise` (int32 of random bits), up with the probability
    of the remainder, to 20 bits of it.

    A normal value (>= 2**-6) drops 20 of its 23 bits of mantissa, with a carry into the exponent, which is rebiased
    from 127 to 7. A smaller one is a multiple of 2**-9: adding 1.5 * 2**23 leaves the rounded multiple in the
    lowest bits.
    """
    bits = y.view(torch.int32)
    sign = (bits >> 24).bitwise_and_(0x80)
    bits = bits & 0x7FFFFFFF
    small = bits.view(torch.float32).clamp(max=2.0**-6)
    if noise is None:
        sub = small.mul(2.0**9).add_(1.5 * 2.0**23).view(torch.int32).bitwise_and_(0xFF)
        normal = ((bits >> 20) & 1).add_(bits).add_(0x7FFFF)
    else:
        noise = noise & 0xFFFFF
        sub = small.mul(2.0**29).to(torch.int32).add_(noise).bitwise_right_shift_(20)
        normal = bits + noise
    normal = normal.bitwise_right_shift_(20).sub_((127 - 7) << 3)
    return torch.where(bits < 0x3C800000, sub, normal).bitwise_or_(sign).to(torch.uint8)  # 0x3C800000: 2**-6


def e4m3_halves(codes: Tensor, nans: bool = True) -> Tensor:
    """E4M3 bits, uint8 -> fp32 of 2**-8 their value, exact for all 256; for the 254 that are no nan if not `nans`.

    An E4M3 shifted by 7 is an fp16 of 2**-8 its value, subnormals included, and torch widens fp16 exactly. Shifting the
    sign along leaves a copy of it in the exponent's highest bit, which the mask clears. A nan (0x7F, 0xFF) would be
    480 * 2**-8; adding its lowest bit of mantissa carries into the exponent's highest, which makes it one in fp16.
    """
    halves = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4001)
    if nans:
        halves.bitwise_or_(halves.bitwise_and(0x3FFF).add_(0x80).bitwise_and_(0x4000))
    return halves.view(torch.float16).to(torch.float32)


def _signed(word: int) -> int:
    """The 32-bit word as the int32 of the same bits."""
    return (word ^ 0x80000000) - 0x80000000


def _mix(word: int) -> int:
    word = ((word ^ (word >> 16)) * HASH_A) & LOW32
    word = ((word ^ (word >> 15)) * HASH_B) & LOW32
    return word ^ (word >> 16)


def seed_keys(seed: int) -> tuple[int, int]:
    """The two keys of `random_bits`, as int32: what a kernel takes in place of the seed."""
    k0 = _mix((seed & LOW32) ^ _mix(((seed >> 32) & LOW32) ^ 0x9E3779B9))
    return _signed(k0), _signed(_mix(k0 ^ 0x85EBCA6B))


def _mix_all(words: np.ndarray) -> np.ndarray:
    """`_mix` of uint32 words, which wrap."""
    words = (words ^ (words >> 16)) * np.uint32(HASH_A)
    words = (words ^ (words >> 15)) * np.uint32(HASH_B)
    return words ^ (words >> 16)


def all_seed_keys(seeds: Sequence[int]) -> list[list[int]]:
    """`seed_keys` of each seed. For tens of seeds it takes as long as for one."""
    whole = np.array(seeds, np.uint64)
    k0 = _mix_all((whole & LOW32).astype(np.uint32) ^ _mix_all((whole >> 32).astype(np.uint32) ^ np.uint32(0x9E3779B9)))
    k1 = _mix_all(k0 ^ np.uint32(0x85EBCA6B))
    return np.stack((k0, k1), 1).view(np.int32).tolist()


def rotate_half(words: Tensor) -> Tensor:
    """int32 words with their halves exchanged."""
    return words.bitwise_left_shift(16).bitwise_or_(words.bitwise_right_shift(16).bitwise_and_(0xFFFF))


def paired_bits(seed: int, start: int, stop: int, device: torch.device) -> Tensor:
    """32 bits for each index in [start, stop), as int32, from one word for two neighbours: half the hashes.

    ```python
    word = random_bits(seed)[index >> 1]
    bits = word if index % 2 == 0 else rotate_half(word)
    ```
    The upper 16 of the bits are an index's own, and so are the lower 16; those halves are its neighbour's exchanged.
    """
    words = random_bits(seed, start >> 1, (stop + 1) >> 1, device)
    first = start & 1
    return torch.stack((words, rotate_half(words)), 1).view(-1)[first : first + stop - start]


def grouped_bits(seed: int, start: int, stop: int, device: torch.device) -> Tensor:
    """32 bits for each index in [start, stop), as int32, from one hash for 32 neighbours: for rounding, and no more.

    ```python
    word = random_bits(seed)[index >> 5] * (FACTOR + FACTOR_STEP * ((index >> 1) & 15))     # uint32, wraps
    bits = word if index % 2 == 0 else rotate_half(word)
    ```
    The factors are odd, so a word is every number as often as the hash is: what one value is rounded by is uniform, all
    65,536 upper halves alike. Neighbours' are not independent, but as little correlated as independent numbers would
    seem in 2**18 draws; the sum of their errors has the variance of independent ones, within a hundredth.
    """
    groups = random_bits(seed, start // GROUP, -(-stop // GROUP), device)
    factors = torch.arange(GROUP // 2, dtype=torch.int32, device=device).mul_(_signed(FACTOR_STEP))
    words = groups[:, None] * factors.add_(_signed(FACTOR))
    first = start % GROUP
    return torch.stack((words, rotate_half(words)), -1).view(-1)[first : first + stop - start]


def random_bits(seed: int, start: int, stop: int, device: torch.device) -> Tensor:
    """32 random bits for each index in [start, stop), as int32: a pure function of (seed, index).

    ```python
    k0 = mix(seed_low ^ mix(seed_high ^ 0x9E3779B9)); k1 = mix(k0 ^ 0x85EBCA6B)     # uint32
    h = index ^ k0                                                                  # uint32, wraps
    h = (h ^ (h >> 16)) * 0x7FEB352D + k1
    h = (h ^ (h >> 15)) * 0x846CA68B
    h = h ^ (h >> 16)
    ```
    The second key, added between the rounds, keeps the streams of two seeds from being one stream in another order.
    Indices count modulo 2**32. Good for rounding; not for cryptography.
    """
    k0, k1 = seed_keys(seed)
    # int32 wraps as uint32 does; its right shift copies the sign, which the mask takes away again.
    h = torch.arange(stop - start, dtype=torch.int32, device=device).add_(_signed(start & LOW32))
    h.bitwise_xor_(k0)
    h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF)).mul_(HASH_A).add_(k1)
    h.bitwise_xor_((h >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(HASH_B))
    return h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF))
