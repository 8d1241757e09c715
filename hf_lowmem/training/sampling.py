"""Samples of linears' inputs, as a trainer has them: `lowmem_sample`, its field and its place in a training."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from hf_lowmem.activations.linears import linears_of_layers
from hf_lowmem.matmul.sampled import OwnedSamples, SampleReport, samples_of
from hf_lowmem.specs import check_number

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["SampleArguments", "SamplesRows"]

logger = logging.getLogger(__name__)


@dataclass
class SampleArguments:
    """See `LowMemArguments`, of which this is a part."""

    lowmem_sample: float | None = field(
        default=None,
        metadata={
            "help": "Share of its input's rows that a decoder layer's linear keeps for its weight's gradient, drawn by "
            "WTA-CRS, such as 0.3: unbiased, and noisy. Not with a tier or checkpointing, that keep less. Default: all."
        },
    )

    def lowmem_sample_share(self) -> float | None:
        """The share of rows that these arguments ask for, checked; None for all."""
        if self.lowmem_sample is not None:
            check_number("lowmem_sample", self.lowmem_sample, low=0.0, low_open=True, high=1.0)
        return self.lowmem_sample


class SamplesRows:
    """The part of LowMemTrainerMixin that concerns `lowmem_sample`."""

    args: object
    model: nn.Module | None
    samples: SampleReport | None = None  # which linears keep a sample while the model is trained
    _samples: OwnedSamples | None = None
    _sampled: nn.Module | None = None  # the model that has them

    def _sample_share(self) -> float | None:
        return self.args.lowmem_sample_share() if isinstance(self.args, SampleArguments) else None

    def _rehearse_samples(self) -> None:
        """Say now which linears will keep a sample, or why none can. The model stays as it is."""
        share = self._sample_share()
        if share is not None and self.model is not None:
            self.samples = samples_of(linears_of_layers(self.model), share)
            logger.info("lowmem_sample=%r:\n%s", share, self.samples)

    def _put_samples(self) -> None:
        """Put samples on the model. Again is nothing, on the same model."""
        share = self._sample_share()
        if share is None or self.model is None or self._sampled is self.model:
            return
        self._take_samples()
        seed: int = cast("Trainer", self).args.seed
        self._samples = OwnedSamples(linears_of_layers(self.model), share, seed)
        self.samples, self._sampled = self._samples.report, self.model

    def _take_samples(self) -> None:
        if self._samples is not None:
            self._samples.take_off()
            self._samples = self._sampled = None

    def training_step(self, *args: object, **kwargs: object) -> torch.Tensor:
        """One training step of the parent, whose draws are those of its number."""
        if self._samples is not None:
            self._samples.at_step(cast("Trainer", self).state.global_step)
        step = cast("Callable[..., torch.Tensor]", cast("Trainer", super()).training_step)
        return step(*args, **kwargs)
