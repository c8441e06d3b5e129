"""`TokenThroughput`: a callback that logs tokens a second of all ranks, the time of steps, and FLOPs utilization."""

from __future__ import annotations

from collections import Counter, deque
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]

from lightning_longnet.attention.plan.documents import document_cuts
from lightning_longnet.callbacks.clock import StepClock
from lightning_longnet.callbacks.monitor import Monitor
from lightning_longnet.planning.devices import compute_dtype, peak_flops
from lightning_longnet.planning.flops import Flops, ModelFlops
from lightning_longnet.sequence import sequence_context
from lightning_longnet.sequence.batches import checked_dims, known_dim, named_tensors

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor


class TokenThroughput(Monitor):
    """Logs `throughput/...`; see `lightning_longnet.callbacks.monitor` for the keys.

    Lightning's ThroughputMonitor counts the batches of rank 0, and takes them for those of all ranks.  Here each rank
    counts the tokens that it holds, which is right for every mesh, for parts of unequal lengths, and for accumulated
    micro-batches.  It waits for a GPU at logging steps only.

    Operations are counted by `ModelFlops`: those of linear maps, and of the pairs that attention's patterns show.
    Where rows hold documents, the pairs of the logged step's batch stand for those since the last logging step.

    Args:
        peak_flops: the peak of a device in operations a second; by default from a table of GPUs, and for a CPU the best
            of a few products of matrices when training starts.
        tokens_per_sample: the tokens of a sample in batches without a sequence, whose model calls no `begin_sequences`.
        window: the number of last steps that percentiles are computed of.
    """

    names = (
        "tokens",
        "samples",
        "seconds",
        "steps",
        "required_flops",
        "done_flops",
        "required_pairs",
        "computed_pairs",
        "peak_flops",
        "step_p50",
        "step_p90",
        "step_max",
        "waiting",
        "padding",
        "logged_tokens",
    )

    def __init__(
        self, peak_flops: float | None = None, tokens_per_sample: int | None = None, window: int = 100
    ) -> None:
        super().__init__()
        if peak_flops is not None and not peak_flops > 0:
            raise ValueError(f"peak_flops must be operations a second, more than 0, got {peak_flops!r}")
        for name, value in (("tokens_per_sample", tokens_per_sample or 1), ("window", window)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a number, at least 1, got {value!r}")
        self.peak_flops, self.tokens_per_sample, self.window = peak_flops, tokens_per_sample, window
        self.tokens = 0
        self._peak = 0.0
        self._model: ModelFlops | None = None
        self._clock = StepClock(torch.device("cpu"))
        self._steps: deque[float] = deque(maxlen=window)
        self._forget()

    def _forget(self) -> None:
        """Begin to count anew after a logging step."""
        self._samples = self._tokens = 0
        self._whole_rows: Counter[int] = Counter()  # rows by the tokens of the whole sequence
        self._waiting = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count anew, with the peak of this rank's device and the operations of the module."""
        super().on_train_start(trainer, pl_module)
        device, dtype = trainer.strategy.root_device, compute_dtype(str(trainer.precision))
        peak = self.peak_flops or peak_flops(device, dtype)
        if peak is None:
            rank_zero_info("TokenThroughput: no peak is known of this device; give peak_flops for MFU and HFU")
        self._peak = peak or 0.0
        self._model = ModelFlops.of(pl_module, device.type, dtype)
        self._clock = StepClock(device)
        self._clock.start()
        self._steps.clear()
        self._forget()
        self._ended = perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the time since the last batch as waiting for data."""
        self._waiting += perf_counter() - self._ended

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of steps for a validation of `fit`."""
        super().on_validation_start(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._clock.pause()
            self._waiting += perf_counter() - self._ended

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of steps again after a validation of `fit`."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._clock.resume()
            self._ended = perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the tokens and samples of a micro-batch, and mark the end of an optimizer step."""
        context = sequence_context(pl_module)
        samples, here, whole = size_of(batch, pl_module, self.tokens_per_sample)
        self._tokens += samples * here
        if context.sequence_parallel_rank == 0:
            self._samples += samples
            self._whole_rows[whole] += samples
        if not trainer.fit_loop._should_accumulate():
            self._clock.step()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._ended = perf_counter()

    def own_numbers(self, trainer: Trainer, module: LightningModule, batch: Any) -> list[float]:
        """Return what this rank counted since the last logging step, in the order of `names`."""
        seconds = self._clock.seconds()
        self._steps.extend(seconds)
        assert self._model is not None
        flops, pairs = self._attention(module, batch)
        flops += self._model.token.times(self._tokens)
        percentiles = torch.tensor(self._steps or [0.0], dtype=torch.float64).quantile(
            torch.tensor([0.5, 0.9, 1.0], dtype=torch.float64)
        )
        padding, logged = _padding_of(batch)
        own = [
            float(self._tokens),
            float(self._samples),
            sum(seconds),
            float(len(seconds)),
            *flops,
            *pairs,
            self._peak,
            *percentiles.tolist(),
            self._waiting / max(len(seconds), 1),
            padding,
            logged,
        ]
        self._forget()
        return own

    def _attention(self, module: LightningModule, batch: Any) -> tuple[Flops, list[float]]:
        """Return the operations of attention, and its [required, computed] pairs, since the last logging step.

        The first rank of each sequence group counts those of whole sequences; the others have none.
        """
        assert self._model is not None
        flops, pairs = Flops(0, 0), [0.0, 0.0]
        for cuts, factor in self._rows(module, batch):
            work = self._model.rows(cuts)
            flops += work.flops.times(factor)
            pairs = [total + factor * each for total, each in zip(pairs, work.pairs, strict=True)]
        return flops, pairs

    def _rows(self, module: LightningModule, batch: Any) -> list[tuple[list[tuple[int, ...]], float]]:
        """Return (cuts between documents, how often they count) for the rows since the last logging step.

        Without documents the cuts of a row are [(0, N)].  With documents the rows of the logged step stand for all.
        """
        context, documents = sequence_context(module), _named(batch, "documents")
        if documents is None:
            return [([(0, length)], float(rows)) for length, rows in self._whole_rows.items() if length]
        samples, here, _ = size_of(batch, module, self.tokens_per_sample)
        if context.is_split:
            shard = context.shard  # all ranks of the group make it together, and all of them log here
            assert shard is not None
            cuts: list[tuple[int, ...]]
            cuts, length = list(shard.cuts) * (samples if len(shard.cuts) == 1 else 1), shard.length
        else:
            cuts, length = document_cuts(documents.expand(samples, here), samples, here), here
        tokens = sum(each * rows for each, rows in self._whole_rows.items())
        return [(cuts, tokens / max(samples * length, 1))]

    def figures_of(self, gathered: dict[str, Tensor]) -> dict[str, float]:
        """Return `throughput/...` of all ranks."""
        total = {name: float(numbers.sum()) for name, numbers in gathered.items()}
        seconds, steps = float(gathered["seconds"].max()), float(gathered["steps"].max())
        self.tokens += int(total["tokens"])
        figures = {"tokens": float(self.tokens)}
        if seconds > 0:
            figures |= {
                "samples_per_second": total["samples"] / seconds,
                "tokens_per_second": total["tokens"] / seconds,
                "step_seconds_mean": seconds / steps,
                "waiting_seconds": float(gathered["waiting"].max()),
            }
            figures |= {f"step_seconds_{name}": float(gathered[f"step_{name}"].max()) for name in ("p50", "p90", "max")}
            if bool((gathered["peak_flops"] > 0).all()):
                figures["mfu"] = total["required_flops"] / seconds / total["peak_flops"]
                figures["hfu"] = total["done_flops"] / seconds / total["peak_flops"]
        if total["required_pairs"] > 0:
            figures["computed_pairs_ratio"] = total["computed_pairs"] / total["required_pairs"]
        if total["logged_tokens"] > 0:
            figures["padding_share"] = total["padding"] / total["logged_tokens"]
        return {f"throughput/{name}": value for name, value in figures.items()}


def size_of(batch: Any, module: LightningModule, tokens_per_sample: int | None = None) -> tuple[int, int, int]:
    """Return (samples B, tokens L of each on this rank, tokens N of each whole sequence) of the current batch.

    They are those of the first tensor whose samples are its first dimension, or else of the first whose tokens are; or
    of the sequences that the model made.  A tensor without a sequence has its samples first.  `TokenThroughput` asks
    for each training batch, and `RunReport` for the first one.

    Args:
        batch: this rank's part of the batch.
        module: the module, for its context and its `sequence_dims`.
        tokens_per_sample: the tokens of a sample in batches without a sequence, if the caller knows them.
    """
    context, dims = sequence_context(module), checked_dims(getattr(module, "sequence_dims", {}))
    whole, first = context.length, None
    of_tokens: list[Tensor] = []  # tensors whose first dimension is the sequence
    for path, x in named_tensors(batch):
        first = x if first is None and x.dim() and known_dim(path, x, dims) != 0 else first
        dim = known_dim(path, x, dims)
        if dim:
            here = x.shape[dim]
            return x.shape[0], here, whole if context.is_split and whole is not None else here
        if dim == 0:
            of_tokens.append(x)
    if of_tokens:
        here = of_tokens[0].shape[0]
        samples = _samples_beside(of_tokens) if first is None else first.shape[0]
        return samples, here, whole if context.is_split and whole is not None else here
    samples = 0 if first is None else first.shape[0]
    if whole is None or tokens_per_sample is not None:
        return samples, tokens_per_sample or 0, tokens_per_sample or 0
    return samples, context.placement_of(whole).lengths[context.sequence_parallel_rank], whole


def _samples_beside(of_tokens: list[Tensor]) -> int:
    """Return the samples of tensors whose first dimension is the sequence: their second, or 1 where none has one.

    A tensor of numbers with two dimensions may hold the features of one sequence, so others decide before it.
    """
    deep = [x for x in of_tokens if x.dim() > 2 or (x.dim() == 2 and not x.is_floating_point())]
    return deep[0].shape[1] if deep else 1


def _named(batch: Any, name: str) -> Tensor | None:
    """Return the first tensor of a batch with a name, or None."""
    return next((x for path, x in named_tensors(batch) if path[-1] == name), None)


def _padding_of(batch: Any) -> tuple[float, float]:
    """Return (tokens that are padding, all tokens) of a batch on this rank; zeros without an attention_mask."""
    mask = _named(batch, "attention_mask")
    return (0.0, 0.0) if mask is None else (float((mask == 0).sum()), float(mask.numel()))
