"""Products in 8 bits, as a trainer has them: said early, put on for the training, taken off at its end."""

import logging
from typing import TYPE_CHECKING, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from hf_lowmem.activations.linears import linears_of_layers
from hf_lowmem.matmul import OwnedProducts, ProductReport, code_frozen, products_of
from hf_lowmem.matmul.spec import MatmulSpec
from hf_lowmem.training.four_bits import keep_backward
from hf_lowmem.training.matmul_fields import MatmulArguments
from hf_lowmem.training.sampling import SamplesRows

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["MultipliesIn8Bits", "put_products", "whole_under"]

logger = logging.getLogger(__name__)


def put_products(args: MatmulArguments, model: nn.Module, accelerator: Accelerator) -> OwnedProducts | None:
    """Put on a model the products that its fields ask for; None where they ask for none."""
    spec = args.lowmem_matmul_spec()
    if spec is None:
        return None
    return OwnedProducts(linears_of_layers(model), spec, model, whole=whole_under(accelerator))


def whole_under(accelerator: Accelerator) -> str | None:
    """Why frozen weights are kept under an engine."""
    engines = {DistributedType.FSDP: "FSDP2", DistributedType.DEEPSPEED: "DeepSpeed"}
    engine = engines.get(accelerator.distributed_type)
    return None if engine is None else f"frozen, and {engine} reads it"


class MultipliesIn8Bits(SamplesRows):
    """The part of LowMemTrainerMixin that concerns `lowmem_matmul`, and `lowmem_sample`.

    Products stand below the forwards of tiers, whichever of the two is put on first.
    """

    args: object
    model: nn.Module | None
    products: ProductReport | None = None  # what is multiplied in 8 bits while the model is trained
    _products: OwnedProducts | None = None
    _multiplied: nn.Module | None = None  # the model that has them

    def _matmul_spec(self) -> MatmulSpec | None:
        return self.args.lowmem_matmul_spec() if isinstance(self.args, MatmulArguments) else None

    def _rehearse_products(self) -> None:
        """Say now which products will be made in 8 bits, or why none can. The model stays as it is."""
        keep_backward(self.model)
        self._rehearse_samples()
        spec = self._matmul_spec()
        if spec is not None and self.model is not None:
            linears = linears_of_layers(self.model)
            self.products = products_of(linears, spec, self.model, whole=whole_under(cast("Trainer", self).accelerator))
            logger.info("lowmem_matmul=%r:\n%s", spec.recipe, self.products)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Make codes of frozen weights first, where they are elsewhere: the device needs no room for the weights."""
        spec = self._matmul_spec()
        if spec is not None and any(p.device.type != torch.device(device).type for p in model.parameters()):
            code_frozen(linears_of_layers(model), spec, model, whole=whole_under(cast("Trainer", self).accelerator))
        cast("Trainer", super())._move_model_to_device(model, device)

    def _put_products(self) -> None:
        """Put products on the model. Again is nothing, on the same model."""
        self._put_samples()
        if self.model is None or self._multiplied is self.model or not isinstance(self.args, MatmulArguments):
            return
        self._drop_products()
        self._products = put_products(self.args, self.model, cast("Trainer", self).accelerator)
        if self._products is not None:
            self.products, self._multiplied = self._products.report, self.model

    def _take_products(self) -> None:
        self._take_samples()
        self._drop_products()

    def _drop_products(self) -> None:
        if self._products is not None:
            self._products.take_off()
            self._products = self._multiplied = None
