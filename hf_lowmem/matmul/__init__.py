"""Matrix products of layers' linears from 8-bit codes: `lowmem_matmul`.

products   the three products, and what is kept for backward
linear     the forward of a linear that makes them, and which linears can
frozen     weights of a frozen model, of which codes alone are kept
owned      on a model for as long as a training lasts
"""

from hf_lowmem.matmul.owned import OwnedProducts, ProductReport, code_frozen, products_of

__all__ = ["OwnedProducts", "ProductReport", "code_frozen", "products_of"]
