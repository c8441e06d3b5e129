"""The output head of a model of transformers: the map from hidden states to logits, for a loss without all logits."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_longnet.huggingface.models import body_of
from lightning_longnet.layers.loss import CHUNK_TOKENS, TokenLoss, chunked_cross_entropy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

_STAND_IN = 8  # rows of a head that stands in for one without values
_TOLERANCE = 1e-4  # of logits, relative to the largest


class OutputHead(NamedTuple):
    """A linear map to logits, which are scaled and bounded.

    Attributes:
        logit_scale: factor of the logits.
        softcap: bound of the logits; None where there is none.
    """

    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> OutputHead:
        """Return the head of a model; raise a ValueError where the model computes its logits in another way.

        On a few hidden states, this head must give the logits that the model's own `forward` gives.
        """
        linear = model.get_output_embeddings()
        name = type(model).__name__
        if type(linear) is not nn.Linear:
            raise ValueError(
                f"the output head of {name} must be an nn.Linear, whose loss is computed in chunks, got "
                f"{type(linear).__name__}"
            )
        config = model.config
        scale = getattr(config, "logit_scale", None)
        divisor = getattr(config, "logits_scaling", None)
        head = cls(
            float(scale) if scale is not None else 1.0 if divisor is None else 1 / float(divisor),
            getattr(config, "final_logit_softcapping", None),
        )
        with _materialized(model, linear) as checked:
            _check(model, checked, head)
        return head

    def loss(self, linear: nn.Linear, hidden: Tensor, labels: Tensor, chunk_tokens: int = CHUNK_TOKENS) -> TokenLoss:
        """Return the sum of the losses of hidden states (B, N, width), and their number."""
        return chunked_cross_entropy(
            hidden,
            linear.weight,
            labels,
            linear.bias,
            chunk_tokens=chunk_tokens,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
        )

    def logits(self, linear: nn.Linear, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states."""
        logits: Tensor = linear(hidden) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class _Hidden:
    """The output of a model without its head, all other attributes of which are None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, key: Any) -> Any:
        return self.last_hidden_state if key == 0 else None


@torch.no_grad()
def _check(model: PreTrainedModel, linear: nn.Linear, head: OutputHead) -> None:
    """Raise a ValueError where a head does not give the logits that the model's `forward` makes of hidden states."""
    weight = linear.weight
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 3, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    tokens = torch.zeros(1, 3, dtype=torch.long, device=weight.device)
    with _replaced_body(model, hidden):
        own = model(input_ids=tokens, use_cache=False).logits.double()
    ours = head.logits(linear, hidden).double()
    tolerance = max(_TOLERANCE, 4 * torch.finfo(weight.dtype).eps)
    if own.shape != ours.shape or (own - ours).abs().max() > tolerance * own.abs().max():
        raise ValueError(
            f"the output head of {type(model).__name__} must be a linear map of the last hidden states, which "
            f"logit_scale, logits_scaling and final_logit_softcapping of its configuration scale and bound: its own "
            f"forward gives other logits"
        )


@contextmanager
def _materialized(model: PreTrainedModel, linear: nn.Linear) -> Iterator[nn.Linear]:
    """Yield the linear map of a head; on the meta device a small one with values stands in for it inside the block."""
    if not linear.weight.is_meta:
        yield linear
        return
    small = nn.Linear(linear.in_features, _STAND_IN, linear.bias is not None, dtype=linear.weight.dtype)
    model.set_output_embeddings(small)
    try:
        yield small
    finally:
        model.set_output_embeddings(linear)


@contextmanager
def _replaced_body(model: PreTrainedModel, hidden: Tensor) -> Iterator[None]:
    """Let the model without its head return these hidden states inside the block."""
    body = body_of(model)
    body.__dict__["forward"] = lambda *_, **__: _Hidden(hidden)
    try:
        yield
    finally:
        del body.__dict__["forward"]
