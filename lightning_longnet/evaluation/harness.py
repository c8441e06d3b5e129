"""`LongNetLM`: a LongNet as a model of lm-evaluation-harness, registered there as "longnet"."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from lightning_longnet.evaluation.loading import loaded
from lightning_longnet.evaluation.scoring import check_scorable
from lightning_longnet.evaluation.stream import TextStates, block_tokens, row_states
from lightning_longnet.models.embedding import wide

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lm_eval.api.instance import Instance

    from lightning_longnet.models.longnet import LongNet

_log = logging.getLogger(__name__)
_GENERATED = 256  # tokens that are generated where a task names no number
_KNOWN = {"do_sample", "temperature", "top_k", "until", "max_gen_toks"}


@register_model("longnet")
class LongNetLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A LongNet decoder for the tasks of lm-evaluation-harness.

    Args:
        checkpoint: a checkpoint of any engine, or a folder that `longnet export` wrote.
        tokenizer: the name or folder of a tokenizer, or "bytes"; by default that of the training.
        dtype: the dtype of the weights.
        device: a device of torch, `--device` of the harness, whose default is "cuda:0"; the CPU where there is no CUDA.
        batch_size: number of requests that are computed together.
        max_length: number of tokens before each one that it is predicted from; by default the number of learned
            positions, and all tokens where there are none.
        trust: runs the code that the checkpoint holds.
        max_batch_size: not used.
    """

    def __init__(
        self,
        checkpoint: str,
        tokenizer: str | None = None,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        trust: bool = False,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            _log.warning("no CUDA device is available: the model runs on the CPU")
            device = "cpu"
        self.source = loaded(checkpoint, tokenizer, dtype, device, trust=trust)
        self.model = self.source.model
        check_scorable(self.model)
        self._device = self.model.head.weight.device
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
        self.batch_size = int(batch_size)
        limits = [each for each in (max_length, self.model.config.learned_positions) if each is not None]
        self.max_length = min(map(int, limits)) if limits else None
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be a positive integer, got {max_length!r}")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document, which stands before a text where there is no context."""
        return self.source.tokenizer.end

    @property
    def tokenizer_name(self) -> str:
        return self.source.tokenizer.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text; a LongNet is trained without tokens that begin a text."""
        ids = self.source.tokenizer.encode(string)
        if ids and max(ids) >= self.model.config.vocab_size:
            raise ValueError(
                f"tokenizer must be the model's: it gives token {max(ids)}, and the model has "
                f"{self.model.config.vocab_size}"
            )
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of the tokens that follow a context, and whether each of them is the likeliest."""
        # the longest first, so that what does not fit fails early
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as shown:
            for begin in range(0, len(order), self.batch_size):
                batch = order[begin : begin + self.batch_size]
                rows = [(requests[i][1] + requests[i][2], len(requests[i][2])) for i in batch]
                for i, result in zip(batch, self._followed(rows), strict=True):
                    results[i] = result
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
                shown.update(len(batch))
        return results

    def _followed(self, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Return the results of (tokens, number of tokens at their end that are predicted)."""
        inputs = []
        for ids, predicted in rows:
            if self.max_length is not None and predicted > self.max_length:
                raise ValueError(
                    f"max_length must be at least the {predicted} tokens of a continuation, got {self.max_length}"
                )
            length = len(ids) - 1 if self.max_length is None else self.max_length
            inputs.append(torch.tensor(ids[-length - 1 : -1]))
        sums, is_greedy = [0.0] * len(rows), [True] * len(rows)
        # what follows a row is seen by no token of it
        for begin, states in row_states(self.model, torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)):
            for row, (ids, predicted) in enumerate(rows):
                length = len(inputs[row])
                first, end = max(length - predicted, begin), min(length, begin + states.shape[1])
                if first >= end:
                    continue
                targets = torch.tensor(ids[len(ids) - length + first : len(ids) - length + end])
                log_probs, likeliest = self._log_probs(states[row, first - begin : end - begin], targets)
                sums[row] += float(log_probs.sum(dtype=torch.float64))
                is_greedy[row] &= bool((likeliest == targets).all())
        return [*zip(sums, is_greedy, strict=True)]

    @torch.no_grad()
    def _log_probs(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities of targets (n,) after states (n, dim), and the likeliest tokens (n,)."""
        label_log_probs, likeliest = [], []
        size = self.model.config.loss_chunk
        for rows, labels in zip(states.split(size), targets.split(size), strict=True):
            log_probs = self.model.head(rows).to(wide(rows.dtype)).log_softmax(-1).cpu()
            label_log_probs.append(log_probs.gather(1, labels[:, None])[:, 0])
            likeliest.append(log_probs.argmax(1))
        return torch.cat(label_log_probs), torch.cat(likeliest)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, each after the token that ends a document."""
        results = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm):
            (text,) = request.args
            ids = self.tok_encode(text)
            windows = [([self.eot_token_id], ids)]
            if self.max_length is not None:
                pairs = get_rolling_token_windows(ids, self.eot_token_id, self.max_length, 1)
                windows = [*map(make_disjoint_window, pairs)]
            rows = [(None, before, after) for before, after in windows if after]
            result = sum(label_log_probs for label_log_probs, _ in self._loglikelihood_tokens(rows, disable_tqdm=True))
            results.append(float(result))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that the model goes on with after each context, until one of the stops of its task."""
        results = []
        for request in tqdm(requests, desc="generate_until", disable=disable_tqdm):
            context, options = request.args
            results.append(self._generated(context, normalize_gen_kwargs(options, _GENERATED)))
            self.cache_hook.add_partial("generate_until", request.args, results[-1])
        return results

    def _generated(self, context: str, options: Any) -> str:
        """Return the text that follows a context."""
        if options["do_sample"] and (unknown := set(options) - _KNOWN):
            raise ValueError(f"generation_kwargs of sampling must be {', '.join(sorted(_KNOWN))}, got {min(unknown)}")
        ids, room = self.tok_encode(context) or [self.eot_token_id], options["max_gen_toks"]
        if self.max_length is not None:
            if self.max_length <= room:
                raise ValueError(f"max_length must be more than max_gen_toks, {room}, got {self.max_length}")
            ids = ids[room - self.max_length :]
        tokens: list[int] = []
        generator = torch.Generator().manual_seed(torch.initial_seed())
        for logits in _following_logits(self.model, ids, tokens):
            tokens.append(_sampled(logits, options, generator))
            text = self.source.tokenizer.decode(tokens)
            ends = [text.find(stop) for stop in options["until"] if stop and stop in text]
            if ends:
                return text[: min(ends)]
            if tokens[-1] == self.eot_token_id:
                return self.source.tokenizer.decode(tokens[:-1])
            if len(tokens) == room:
                break
        return self.source.tokenizer.decode(tokens)


@torch.no_grad()
def _following_logits(model: LongNet, ids: list[int], tokens: list[int]) -> Iterator[Tensor]:
    """Yield the logits (vocabulary,) of the token after `ids`, and then of that after each token added to `tokens`."""
    stream = TextStates(model)
    for block in torch.tensor(ids).split(block_tokens(model.config)):
        states = stream.encode(block)
    while True:
        yield model.head(states[-1]).to(wide(states.dtype)).cpu()
        # without a cache the whole text is computed again
        states = stream.encode(torch.tensor(tokens[-1:] if stream.cache is not None else ids + tokens))


def _sampled(logits: Tensor, options: Any, generator: torch.Generator) -> int:
    """Return a token: the likeliest, or where the options say so a sample."""
    if not options["do_sample"] or not options["temperature"]:
        return int(logits.argmax())
    if (top_k := options.get("top_k")) and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    return int(torch.multinomial((logits / options["temperature"]).softmax(0), 1, generator=generator))
