"""The process of one run: it prepares a model, trains and measures it, or tries it out."""

import time
import warnings
from dataclasses import asdict
from typing import Any

import datasets
import torch
import transformers
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_lowmem import LowMemCallback, LowMemDPOConfig, LowMemDPOTrainer, LowMemSFTConfig, LowMemSFTTrainer
from hf_lowmem.demo.model import generate, load, prepare_model
from hf_lowmem.demo.runs import Result, Run
from hf_lowmem.demo.score import Referee

__all__ = ["generate", "prepare_model", "train"]  # what `alone` calls

TRAINERS = {
    "trl.SFTTrainer": (SFTTrainer, SFTConfig),
    "LowMemSFTTrainer": (LowMemSFTTrainer, LowMemSFTConfig),
    "LowMemDPOTrainer": (LowMemDPOTrainer, LowMemDPOConfig),
}


class _Progress(ProgressCallback):
    """HuggingFace's bar with the loss beside it, instead of a line of metrics for every step."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


class _Watch(TrainerCallback):
    """Times the steps and calls the referee at the steps asked for."""

    def __init__(self, run: Run, referee: Referee, tokenizer: Any, result: Result) -> None:
        self.run, self.referee, self.tokenizer, self.result = run, referee, tokenizer, result
        self.began = 0.0

    def _score(self, model: Any, step: int) -> None:
        if step in self.run.evaluate_at:
            self.result.heldout.append((step, self.referee.loss(model, self.tokenizer)))
        if step in self.run.score_pairs:
            self.result.pairs[step] = asdict(self.referee.pair_score(model, self.tokenizer))

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        self._score(model, 0)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.began = time.perf_counter()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.result.step_seconds.append(time.perf_counter() - self.began)
        self._score(model, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.result.losses.append((state.global_step, float(logs["loss"])))
            seen = int(logs["num_tokens"])  # TRL counts up over the run
            self.result.tokens.append(seen - sum(self.result.tokens))


def train(run: Run, referee: Referee) -> Result:
    """Train one run and measure it."""
    began = time.perf_counter()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()  # the bars of loading; the trainer's own stays
    transformers.utils.logging.set_verbosity_error()
    # The name that trl itself still uses, and that every supported transformers knows.
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
    result = Result(run.name, run.trainer, run.settings)
    trainer_class, config_class = TRAINERS[run.trainer]
    args = config_class(output_dir=run.output, disable_tqdm=False, **run.settings)
    model, tokenizer = load(run.model, run.dtype)
    memory = LowMemCallback(verbose=False)  # the demo's own table shows all runs side by side
    trainer = trainer_class(model, args=args, train_dataset=run.dataset, processing_class=tokenizer)
    trainer.remove_callback(ProgressCallback)
    for callback in (memory, _Watch(run, referee, tokenizer, result), _Progress(run.name)):
        trainer.add_callback(callback)
    trainer.train()
    result.memory = {name: value for name, value in memory.report.items() if name != "saved_by_module"}
    if run.save:
        trainer.save_model(run.output)
    result.seconds = time.perf_counter() - began
    return result
