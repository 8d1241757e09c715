"""Values of `lowmem_matmul`, checked."""

from dataclasses import dataclass

from hf_lowmem.specs import check_choice, check_integer

__all__ = ["CAPABILITY", "LEAST", "MATMULS", "MatmulSpec"]

# Compute capability of NVIDIA's GPUs from which there are such products.
CAPABILITY = {"fp8_row": (8, 9), "fp8_tensor": (8, 9), "int8_row": (7, 5)}
MATMULS = tuple(CAPABILITY)
# Tokens and width below which codes cost more than 8-bit products save. Modelled: see hf_lowmem/matmul/README.md.
LEAST = 2048


@dataclass(frozen=True, kw_only=True)
class MatmulSpec:
    """Products of decoder layers' linears in 8 bits.

    Args:
        recipe: one of MATMULS.
        least: tokens of a call and width of a weight, the root of its size, below which a product stays as it is;
            None for LEAST.

    Raises:
        TypeError, ValueError: naming the field, its value, the reason and the remedy.
    """

    recipe: str
    least: int | None = None

    def __post_init__(self) -> None:
        check_choice("lowmem_matmul", self.recipe, MATMULS)
        if self.least is not None:
            check_integer("lowmem_matmul_least", self.least, low=0)
