"""The documents of batches that nobody splits, for models of transformers, which take none as an argument."""

from __future__ import annotations

import ast
import inspect
import sys
from contextlib import contextmanager
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import torch

from lightning_longnet.registration import ATTENTION
from lightning_longnet.sequence.attach import attach_context, attached_context, sequence_context
from lightning_longnet.sequence.context import SequenceContext

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn


def attends_by_ring(module: nn.Module) -> bool:
    """Return whether a module holds a model of transformers with `attn_implementation="ring"`."""
    known = getattr(sys.modules.get("transformers.configuration_utils"), "PretrainedConfig", None)
    if known is None:  # then no module is of transformers
        return False
    configs = (vars(each).get("config") for each in module.modules())  # those of others may be anything
    return any(isinstance(config, known) and config._attn_implementation == ATTENTION for config in configs)


class WholeContext(SequenceContext):
    """The context that `whole_documents` attaches, by which it differs from those that users attach."""

    def __reduce__(self) -> tuple[Any, ...]:
        return WholeContext, ()


def has_context_of_user(module: nn.Module) -> bool:
    """Return whether a module or one inside it has a context that `whole_documents` did not attach."""
    contexts = (attached_context(each) for each in module.modules())
    return any(context is not None and not isinstance(context, WholeContext) for context in contexts)


@contextmanager
def whole_documents(module: nn.Module, documents: Tensor | None) -> Iterator[None]:
    """Give "ring" attention in a module these documents inside the block, where its sequences are whole.

    Where they are split, their batch has documents, and nothing changes.
    """
    context = sequence_context(module)
    if not any(sequence_context(each) is context for each in module.children()):
        context = WholeContext()
        attach_context(module, context)
    with context.with_documents(documents):
        yield


def fault_of_documents(model: Any, documents: Tensor | None, positions: Tensor) -> str:
    """Return why transformers' own attention would not separate documents, or an empty text.

    It has no documents: it reads from position_ids that restart where one begins, if the model passes these on.

    Args:
        model: a model with another implementation than "ring".
        documents: (N,) or (B, N), or None.
        positions: (N,) or (B, N), which the model is given.
    """
    if documents is None or not bool((borders := documents.diff(dim=-1) != 0).any()):
        return ""
    implementation = model.config._attn_implementation
    if not _reads_packing(model.base_model):
        return (
            f"documents are not separated by attn_implementation={implementation!r} of a {type(model).__name__}, whose "
            f'tokens would see those of other documents: take attention="{ATTENTION}", or rows of one document'
        )
    rows = torch.broadcast_shapes(documents.shape, positions.shape)[:-1]
    if "flash" in str(implementation) and rows.numel() > 1:
        return (
            f"documents are separated by attn_implementation={implementation!r} at batch size 1, got "
            f'{rows.numel()} rows: take batch size 1, or attention="{ATTENTION}"'
        )
    restarts = positions.clamp(min=0).diff(dim=-1) != 1
    if not torch.equal(*torch.broadcast_tensors(borders, restarts)):
        return (
            f"positions must restart where a document begins, and only there, for attn_implementation="
            f"{implementation!r}, which knows documents by them alone: leave positions out of the batch, or take "
            f'attention="{ATTENTION}"'
        )
    return ""


def _reads_packing(body: nn.Module) -> bool:
    """Return whether a model gives position_ids to each causal mask, by which transformers separates packed documents.

    The masks are made in the model's forward, whose source says so.
    """
    nodes = list(ast.walk(ast.parse(dedent(inspect.getsource(type(body).forward)))))
    arguments: dict[str, set[Any]] = {}  # by the names of dictionaries
    for node in nodes:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        if isinstance(node.value, ast.Dict):
            arguments[node.targets[0].id] = {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
        elif isinstance(node.value, ast.Call) and ast.unparse(node.value.func).endswith(".copy"):
            arguments[node.targets[0].id] = arguments.get(ast.unparse(node.value.func).removesuffix(".copy"), set())
    made = []
    for node in nodes:
        name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        if "mask" not in name or "bidirectional" in name or not name.startswith(("create_", "mask_function")):
            continue
        assert isinstance(node, ast.Call)
        names = {keyword.arg for keyword in node.keywords}
        for keyword in node.keywords:
            if keyword.arg is None and isinstance(keyword.value, ast.Name):
                names |= arguments.get(keyword.value.id, set())
        made.append("position_ids" in names)
    return bool(made) and all(made)
