"""Matrix products of layers' linears from 8-bit codes, `lowmem_matmul`; or from a sample of the rows, `lowmem_sample`.

products   the three products, and what is kept for backward
linear     the forward of a linear that makes them, and which linears can
frozen     weights of a frozen model, of which codes alone are kept
owned      on a model for as long as a training lasts
sampled    a weight's gradient from a share of the rows, on linears and on a model
"""

from hf_lowmem.matmul.owned import OwnedProducts, ProductReport, code_frozen, products_of

__all__ = ["OwnedProducts", "ProductReport", "code_frozen", "products_of"]
