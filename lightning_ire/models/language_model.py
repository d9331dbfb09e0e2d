"""A language model for any network that returns logits."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn import functional as F
from torchmetrics import MeanMetric

from lightning_ire._checks import ConfigurationError, check_number, check_whole
from lightning_ire._lightning import data_parallel
from lightning_ire.models._task import Task
from lightning_ire.models.llama import Llama
from lightning_ire.models.transformer import Transformer

__all__ = ["LanguageModel"]

_IGNORED = -100  # what `cross_entropy` leaves out by default


class LanguageModel(Task):
    """Trains a network to predict the next token, and continues prompts.

    A batch is a pair of token ids [B, L] and the ids that follow them, [B, L], both int64. The loss is the cross
    entropy, mean over the positions of the batch; those with target -100 count nowhere.

    Logged in training:

    - `train/loss`: nats per token, every step. `train/bits_per_byte`: loss / ln 2 / (bytes per token), every step.
    - `train/tokens_per_second`: of all devices together, every `trainer.log_every_n_steps` optimizer steps, over the
      time since the last such row. A token counts once however many passes a step makes; the time of validation is
      left out, that of callbacks counts. For each row (not each step) a GPU finishes its work once.
    - `data/passes`, with the same rows: how often the training part has been gone through, by the optimizer steps of
      the whole run.

    Logged in evaluation, exact also over devices with unequally many targets: `val/loss` and `test/loss` (nats per
    token, mean over all targets that count), `val/perplexity` and `test/perplexity` (exp of that), `val/bits_per_byte`
    and `test/bits_per_byte`.

    What it asks the data module for, all of it optional: `vocab_size`, `bytes_per_token(part)` for "train", "val" or
    "test" (``None``, as with a tokenizer that loses text: no bits per byte), `train_tokens` and `tokens_per_step` (of
    all devices) for `data/passes`, and `decode(ids)`, to print what was predicted.

    Prediction takes prompts [B, T] and returns them with `max_new_tokens` tokens more, each drawn from
    `softmax(logits / temperature)` of the network at the last `context_length` tokens (the network's attribute, if it
    has one), without tokens that the data do not have. It costs one forward pass per token. The draws depend on
    `seed_everything` and the batch's index alone.

    With a seed (`seed_everything`) dropout is drawn from it, the epoch, the batch and the device (of several that share
    a batch: their group) alone. So a run that is resumed in the middle of an epoch goes on bit for bit, if the loader
    does (that of `Text` does).

    **Large networks.** Under Lightning's `ModelParallelStrategy` each device keeps a part of every parameter, of its
    gradient and of the optimizer's state: `data_parallel_size` devices by FSDP2, layer by layer (what the longest
    `nn.ModuleList` holds) and the rest together; `tensor_parallel_size` devices, which get the same batch, by splitting
    heads and feed-forward parts (`Llama` only). Both have to be given: by default Lightning takes all devices of a
    machine for tensor parallel. Results are those of one device, up to rounding, if the network's random numbers
    (dropout) are left out. Every process makes the whole network in its memory first (of 1.34 B parameters in single
    precision: 5.3 GB per process, 43 GB for 8 on one machine), and gives it up layer by layer.

    No hyper-parameters are saved in checkpoints, so that a resumed run takes every value from its config and flags.
    Outside the command line: `LanguageModel.load_from_checkpoint(path, model=Llama(...))`.
    """

    def __init__(
        self,
        model: Transformer | Llama | nn.Module,  # `Transformer |`: the short name in a config means ours, not torch's
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "step",
        decay_norm_and_bias: bool = True,
        compile: bool = False,
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = None,
        gather_bf16: bool = False,
    ) -> None:
        """Keep the parts.

        Args:
            model: Network that maps token ids [B, L] to logits [B, L, vocabulary].
            optimizer: Makes the optimizer from the parameters.
            lr_scheduler: Makes the learning-rate schedule from the optimizer; none keeps the rate. A
                `WarmupCosineLR` without `total` gets the length of the run.
            lr_interval: When the schedule moves on: `epoch` or `step`.
            decay_norm_and_bias: Whether weight decay acts on biases and normalisation weights (all parameters with
                fewer than two dimensions), too.
            compile: Whether the network is compiled (`torch.compile`), at its first batch: the same results up to
                rounding. Checkpoints fit both. Prompts are continued without it, as their length changes. Where the
                network is spread over devices, each layer is compiled by itself.
            max_new_tokens: Tokens that are added to a prompt.
            temperature: Divides the logits before a draw; 0: always the likeliest token.
            top_k: Draw from this many of the likeliest tokens only; none: from all.
            gather_bf16: Whether, with `trainer.precision` bf16-mixed, a network that is spread over devices gathers its
                weights in bfloat16 (FSDP2's `MixedPrecisionPolicy`; gradients are summed, and weights kept, in single
                precision): half the traffic, and no device keeps a bfloat16 copy of the whole network until the end
                of the backward pass, as autocast alone does. What goes from layer to layer is bfloat16 then, too, as
                with `bf16-true`; without it only products are.

        Raises:
            ConfigurationError: If a value is out of range.
        """
        super().__init__(model, optimizer, lr_scheduler, lr_interval, decay_norm_and_bias, compile)
        self.max_new_tokens = check_whole("max_new_tokens", max_new_tokens, low=1)
        self.temperature = check_number("temperature", temperature)
        self.top_k = None if top_k is None else check_whole("top_k", top_k, low=1)
        self.gather_bf16 = gather_bf16
        self._last_row = 0  # optimizer steps at the last row of rates
        self._samples = 0  # prompts continued so far
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()

    def setup(self, stage: str) -> None:
        """Compare the number of tokens with the data module's.

        Args:
            stage: Lightning's stage; not used.

        Raises:
            ConfigurationError: If the data have more than the network.
        """
        data = self._data
        wanted, has = getattr(data, "vocab_size", None), getattr(self.model, "vocab_size", None)
        if isinstance(wanted, int) and isinstance(has, int) and has < wanted:
            raise ConfigurationError(
                f"Expected `vocab_size` to be at least {wanted}, as the tokens of {type(data).__name__} have, got "
                f"{has}."
            )

    def sharding_policy(self) -> MixedPrecisionPolicy:
        """What a sharded network's weights are gathered in, and its gradients summed.

        Raises:
            ConfigurationError: If `gather_bf16` does not fit the precision.
        """
        if not self.gather_bf16:
            return MixedPrecisionPolicy()
        if (precision := self.trainer.precision) != "bf16-mixed":
            raise ConfigurationError(
                "Expected `gather_bf16` to be false with a trainer.precision other than 'bf16-mixed', got "
                f"{precision!r}."
            )
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits [B, L, vocabulary] of token ids [B, L].

        Raises:
            ConfigurationError: If the network returns anything else.
        """
        logits = self.model(tokens)
        if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != tokens.shape:
            got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ConfigurationError(
                "Expected the network (`model`) to return logits of shape [batch, length, vocabulary], got "
                f"{got} for tokens of shape {tuple(tokens.shape)}."
            )
        return logits

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy, as `cross_entropy` gave it: curvature estimates look for that tensor."""
        inputs, targets = batch
        loss = F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())
        self.log("train/loss", loss.detach(), prog_bar=True)
        bits = self._bits_per_byte("train", loss.detach())
        if bits is not None:
            self.log("train/bits_per_byte", bits, prog_bar=True)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Add up the loss over the validation part."""
        self._evaluate(batch, self.val_loss)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Add up the loss over the test part."""
        self._evaluate(batch, self.test_loss)

    @torch.no_grad()
    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return prompts [B, T] with their continuations, [B, T + max_new_tokens]."""
        tokens, generator = batch, torch.Generator().manual_seed(_seed("predict", batch_idx))
        context_length = getattr(self.model, "context_length", None) or 0
        vocab_size = getattr(self._data, "vocab_size", None)
        with torch.compiler.set_stance("force_eager") if self.compile_network else nullcontext():
            for _ in range(self.max_new_tokens):
                logits = self(tokens[:, -context_length:])[:, -1, :vocab_size]
                tokens = torch.cat([tokens, self._draw(logits, generator)], dim=1)
        return tokens

    def on_train_start(self) -> None:
        """Start the clock."""
        self._last_row = self.trainer.global_step
        self.throughput.start(self.device)

    def on_train_batch_start(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Seed what is random in the network by (`seed_everything`, epoch, batch, device), if there is such a seed.

        Devices that share a batch (tensor parallel) draw the same. Lightning's checkpoints do not hold the state of
        random streams: so a resumed run has the same dropout.
        """
        if "PL_GLOBAL_SEED" in os.environ:
            torch.manual_seed(_seed("train", self.current_epoch, batch_idx, data_parallel(self.trainer)[1]))

    def on_train_batch_end(self, outputs: Any, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Count the tokens, once for all passes of a step; where Lightning writes a row, log the rates."""
        self.throughput.samples += batch[0].numel()
        step, every = self.trainer.global_step, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and step % every == 0 and step != self._last_row:  # equal: between the batches of one step
            self._last_row = step
            self._log_rates(step)

    def on_validation_epoch_start(self) -> None:
        """Forget what an interrupted validation has left."""
        self.val_loss.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the loss over the validation part and what follows from it."""
        self._log_evaluation("val", self.val_loss, prog_bar=True)

    def on_test_epoch_start(self) -> None:
        """Forget what an interrupted test has left."""
        self.test_loss.reset()

    def on_test_epoch_end(self) -> None:
        """Log the loss over the test part and what follows from it."""
        self._log_evaluation("test", self.test_loss, prog_bar=False)

    def on_predict_start(self) -> None:
        """Number the samples from 1."""
        self._samples = 0

    def on_predict_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Print the texts, if the data module can decode them; of several devices the first one's."""
        decode = getattr(self._data, "decode", None)
        if decode is None:
            return
        for prompt, tokens in zip(batch.tolist(), outputs.tolist(), strict=True):
            self._samples += 1
            header = f"--- Sample {self._samples} (the first {len(decode(prompt))} characters are the prompt) ---"
            self.print(f"{header}\n{decode(tokens)}\n")

    @property
    def _data(self) -> Any:
        """The data module, if there is one."""
        try:
            return getattr(self.trainer, "datamodule", None)
        except RuntimeError:  # Lightning's word for a module that is used by itself
            return None

    def _evaluate(self, batch: Sequence[Tensor], mean: MeanMetric) -> None:
        inputs, targets = batch
        total = F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
        count = targets.ne(_IGNORED).sum()
        mean.update(total / count.clamp(min=1), weight=count)

    def _log_evaluation(self, part: str, mean: MeanMetric, prog_bar: bool) -> None:
        # Not logged step by step: Lightning averages wrongly where devices have unequally many targets.
        loss = mean.compute()
        self.log(f"{part}/loss", loss, prog_bar=prog_bar, sync_dist=True)  # the same on all devices by now
        self.log(f"{part}/perplexity", loss.exp(), sync_dist=True)
        bits = self._bits_per_byte(part, loss)
        if bits is not None:
            self.log(f"{part}/bits_per_byte", bits, prog_bar=prog_bar, sync_dist=True)

    def _bits_per_byte(self, part: str, loss: Tensor) -> Tensor | None:
        bytes_per_token = getattr(self._data, "bytes_per_token", None)
        length = None if bytes_per_token is None else bytes_per_token(part)
        return None if length is None else loss / (math.log(2) * length)

    def _log_rates(self, step: int) -> None:
        self.throughput.stop(self.device)
        rate = self.throughput.rate()
        if rate is not None:
            self.log("train/tokens_per_second", rate * data_parallel(self.trainer)[0])
        self.throughput.start(self.device)
        total, per_step = getattr(self._data, "train_tokens", None), getattr(self._data, "tokens_per_step", None)
        if total and per_step:
            self.log("data/passes", step * per_step / total)

    def _draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """One token [B, 1] from the logits [B, vocabulary] of each row, drawn on the CPU: the same on all devices."""
        if self.temperature == 0:
            return logits.argmax(dim=-1, keepdim=True)
        scores = logits.cpu().double() / self.temperature  # in double precision no temperature is too low
        kept, ids = scores.topk(min(self.top_k or scores.shape[-1], scores.shape[-1]))
        drawn = torch.multinomial(kept.softmax(dim=-1), 1, generator=generator)
        return ids.gather(1, drawn).to(logits.device)


def _seed(*parts: Any) -> int:
    """A seed from `seed_everything` and more; mixed, as torch's generators look at 32 bits only."""
    text = " ".join(map(str, (os.environ.get("PL_GLOBAL_SEED", 0), *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
