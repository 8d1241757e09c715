"""The fields of `LowMemArguments` that concern products in 8 bits."""

from dataclasses import dataclass, field

from hf_lowmem.matmul.spec import LEAST, MatmulSpec

__all__ = ["MatmulArguments"]


@dataclass
class MatmulArguments:
    """See `LowMemArguments`, of which this is a part."""

    lowmem_matmul: str | None = field(
        default=None,
        metadata={
            "help": "Products of decoder layers' linears in 8 bits: fp8_row (E4M3, a scale for each token and "
            "channel), fp8_tensor (one scale; faster, coarser), int8_row (for GPUs without fp8). Default: in their "
            "own precision. With any optim."
        },
    )
    lowmem_matmul_least: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a call, and width of a weight (the root of its size), below which lowmem_matmul "
            f"leaves a product as it is. Default: {LEAST}, from a model of the cost. 0: none is left."
        },
    )

    def lowmem_matmul_spec(self) -> MatmulSpec | None:
        """The products in 8 bits that these arguments ask for; None for none."""
        if self.lowmem_matmul is None:
            return None
        return MatmulSpec(recipe=self.lowmem_matmul, least=self.lowmem_matmul_least)
