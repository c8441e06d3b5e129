"""Hooks on the dropout modules of torch: each rank that shares a sequence drops other elements of its part of it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from lightning_longnet.attention.kernels.compiling import not_compiled

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from lightning_longnet.sequence.context import SequenceContext

ATTACHED = "_attached_sequence_context"  # the attribute of modules that have no `sequence_context`
_HANDLES, _PART, _IS_PART = "_dropout_hooks", "_random_part", "_is_part"
# modules that drop whole features, and the number of dimensions of their inputs with a batch
_FEATURE_DROPOUTS = {nn.Dropout1d: 3, nn.Dropout2d: 4, nn.Dropout3d: 5, nn.FeatureAlphaDropout: 2}


def set_hooks(module: nn.Module, context: SequenceContext | None) -> None:
    """Register the hooks on a dropout module of torch if ranks share sequences in `context`, else remove them.

    `attach_context` calls it for each module.  Other modules stay as they are, and so do those that have the hooks.
    """
    needs_hooks = context is not None and context.sequence_parallel_size > 1
    if not isinstance(module, _DropoutNd) or needs_hooks == (_HANDLES in module.__dict__):
        return
    if needs_hooks:
        before = module.register_forward_pre_hook(_before_forward, with_kwargs=True)
        module.__dict__[_HANDLES] = before, module.register_forward_hook(_after_forward, always_call=True)
        return
    for handle in module.__dict__.pop(_HANDLES):
        handle.remove()


@contextmanager
def inputs_as_parts(module: nn.Module, is_part: bool) -> Iterator[None]:
    """Say inside the block whether the inputs of the dropout modules in a module are this rank's tokens.

    By themselves the hooks decide it by the shape of the input.  That fails where a feed-forward layer of transformers
    is computed in chunks of tokens, which `lightning_longnet.huggingface.recomputation` does.  `_in_chunks` of that
    module enters it.
    """
    modules = [each for each in module.modules() if _HANDLES in each.__dict__]
    for each in modules:
        each.__dict__[_IS_PART] = is_part
    try:
        yield
    finally:
        for each in modules:
            each.__dict__.pop(_IS_PART, None)


# The hooks are functions of this file, so that modules with them can be pickled and copied.  torch.compile traces
# their condition, and breaks the graph in split batches alone


def _drops_in_split_batch(module: nn.Module) -> bool:
    """Return whether the batch is split and a dropout module is in training mode with p > 0."""
    context: SequenceContext | None = module.__dict__.get(ATTACHED)
    assert isinstance(module, _DropoutNd)
    return context is not None and context.is_split and module.training and module.p > 0


def _before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Seed the generator for this rank's part; torch calls this hook before the forward of a dropout module."""
    if _drops_in_split_batch(module):
        _seed_part(module, args[0] if args else kwargs["input"])


def _after_forward(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Restore the generator; torch calls this hook after the forward of a dropout module, also after an error."""
    if _drops_in_split_batch(module):
        _restore_generator(module)


@not_compiled
def _seed_part(module: nn.Module, x: Tensor) -> None:
    """Seed the generator for this rank's part until `_restore_generator`."""
    context: SequenceContext = module.__dict__[ATTACHED]
    is_part = module.__dict__.get(_IS_PART)
    if is_part is None:
        is_part = context.holds_part_of(_independent_sizes(module, x))
    part = context.random_part(x.device, is_part)
    part.__enter__()
    module.__dict__[_PART] = part


@not_compiled
def _restore_generator(module: nn.Module) -> None:
    """Give the generator the state that it would have without `_seed_part`."""
    if _PART in module.__dict__:  # it is not there if `_seed_part` has raised an error
        module.__dict__.pop(_PART).__exit__(None, None, None)


def _independent_sizes(module: nn.Module, x: Tensor) -> Sequence[int]:
    """Return the sizes of the dimensions of x that can be the batch or the tokens for a dropout module.

    These are all but the last.  A module that drops whole features, such as `nn.Dropout1d` of (N, C, L), decides once
    for each index of the first two dimensions, or of the first one without a batch: tokens can only be there.
    `_seed_part` passes the sizes to `holds_part_of`.
    """
    for kind, dims in _FEATURE_DROPOUTS.items():
        if isinstance(module, kind):
            return x.shape[: 2 if x.dim() >= dims else 1]
    return x.shape[:-1]
