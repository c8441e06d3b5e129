"""Conversion of the ancestor's arguments to arguments of the layers of this package, with warnings and errors."""

from __future__ import annotations

import warnings
from dataclasses import is_dataclass
from typing import Any

from lightning_longnet.attention.guard import Guard
from lightning_longnet.attention.pattern.pattern import Pattern
from lightning_longnet.compat.configuration import RingAttentionConfig, SparsePatternConfig, check_names
from lightning_longnet.layers.presets import preset_of

_TILES = "kernels choose their own tiles"
_NO_GATE = "there is no gate"

# arguments of the ancestor without effect here, and the reason that the warning gives
WITHOUT_MEANING = {
    **dict.fromkeys(
        (
            *("use_memory_pool", "enable_memory_pool", "memory_pool_size", "memory_pool_threshold_mb"),
            *("lightweight_pool", "enable_buffer_manager"),
        ),
        "there is no memory pool, torch's allocator reuses buffers",
    ),
    **dict.fromkeys(
        ("use_pattern_cache", "pattern_cache_size", "cache_hilbert_mappings", "precompute_patterns"),
        "plans and orders are kept for as long as they are used",
    ),
    **dict.fromkeys(
        ("use_bucketed", "bucket_size", "grad_checkpoint_buckets", "hilbert_chunk_size", "flash_chunk_size"), _TILES
    ),
    **dict.fromkeys(
        ("use_flash", "use_flash_attention", "enable_batched_ops", "use_tf32"),
        "the kernel is chosen by what serves the call, and `explain` tells which",
    ),
    **dict.fromkeys(
        ("use_gradient_checkpointing", "use_checkpointing"),
        "no scores are kept for the backward; `recompute` of LongNetConfig is for the rest of a model",
    ),
    "mixed_precision": "autocast or the Trainer's precision says it",
    "overlap_communication": "messages travel while local branches are computed",
    **dict.fromkeys(
        ("enable_profiling", "log_memory_usage"),
        "the callbacks TokenThroughput, MemoryMonitor and CommunicationMonitor measure",
    ),
}
WITHOUT_WEIGHTS = dict.fromkeys(("device", "dtype", "bias"), "it has no weights")
WITHOUT_GATE = dict.fromkeys(("gate_bias", "gate_temperature"), "it has no gate")

_SPARSE = ("sparse_pattern_config", "sparse_config", "sparsity_config")
_ALIASES = {"head_dim": "dim", "num_heads": "heads"}
# names that classes of the ancestor have for an argument, which are read as that argument
_FORMER = {"attention_dropout": "dropout", "softmax_scale": "attention_scale"}
_ACTING = ("segment_lengths", "dilation_rates", "dropout", "ring_size", "dim", "heads", "embed_dim", *_ALIASES)
_SWITCHES = ("enable_error_recovery", "use_hilbert", "apply_hilbert_to_kv")
_ACTING += ("attention_scale", *_SWITCHES, *_SPARSE)
_ACTING += ("sparsity_ratio", "block_size")


def given_to(owner: str, order: tuple[str, ...], arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by name, those that are None left out.

    An argument that is given twice is refused.  A `SparsePatternConfig` in the place of dropout is `sparse_config`.

    Args:
        owner: the class that messages name.
        order: the names of positional arguments.
        arguments: positional arguments; the first may be a `RingAttentionConfig`.
        named: keyword arguments; `config` and `ring_attention_config` may be a `RingAttentionConfig`.
    """
    rest = dict(named)
    configs = [rest.pop(name) for name in ("config", "ring_attention_config") if rest.get(name) is not None]
    if arguments and (isinstance(arguments[0], dict) or is_dataclass(arguments[0])):
        configs, arguments = [arguments[0], *configs], arguments[1:]
    if len(arguments) > len(order):
        raise ValueError(f"{owner} takes {', '.join(order)} by place, and the rest by name, got {len(arguments)}")
    options = {name: value for name, value in zip(order, arguments, strict=False) if value is not None}
    for config in configs:
        if not isinstance(config, RingAttentionConfig):
            raise ValueError(f"config must be a RingAttentionConfig, got {config!r}")
        values = config.given()
        if not values["dropout"]:  # the default of the field, which does not count as given
            del values["dropout"]
        _add(owner, options, values)
    for former in _FORMER:
        if former in rest:
            _add(owner, options, {_FORMER[former]: rest.pop(former)})
    _add(owner, options, rest)
    if isinstance(
        options.get("dropout"), SparsePatternConfig
    ):  # the third argument of the ancestor's BlockSparse classes
        _add(owner, options, {"sparse_config": options.pop("dropout")})
    for name, other in (("heads", "num_heads"), ("dim", "head_dim")):
        if options.get(name, options.get(other)) != options.get(other, options.get(name)):
            raise ValueError(f"{name} and {other} must be equal, got {options[name]} and {options[other]}")
    return options


def _add(owner: str, options: dict[str, Any], values: dict[str, Any]) -> None:
    """Add keyword arguments to `options` in place; refuse a name that is already there."""
    values = {name: value for name, value in values.items() if value is not None}
    if repeated := [name for name in values if options.get(name) is not None]:
        raise ValueError(f"{owner} was given {repeated[0]} twice")
    options |= values


def settings_of(
    owner: str, preset: str, given: dict[str, Any], meaningless: dict[str, str], acting: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return keyword arguments of `DilatedAttention` or `MultiheadDilatedAttention`.

    Warn once of all arguments without effect, and refuse unknown ones.

    Args:
        owner: the class that messages name.
        preset: the name of its preset.
        given: the arguments by name, from `given_to`.
        meaningless: arguments that have no effect in this class, each with the reason, besides `WITHOUT_MEANING`.
        acting: arguments that the class reads itself.
    """
    row = preset_of(preset)
    meaningless = WITHOUT_MEANING | meaningless | ({} if row.is_sparse else {"block_size": _TILES})
    meaningless = {name: reason for name, reason in meaningless.items() if name not in acting}
    check_names(owner, given, [*_ACTING, *acting, *meaningless])
    if unused := [name for name in given if name in meaningless]:
        reasons = "; ".join(dict.fromkeys(meaningless[name] for name in unused))
        warnings.warn(f"{owner} has no use for {', '.join(unused)}: {reasons}", stacklevel=3)
    for name in ("segment_lengths", "dilation_rates"):
        if name not in given:
            raise ValueError(f"{owner} needs {name}, a sequence of integers")
    for name in _SWITCHES:
        if not isinstance(given.get(name, True), bool):
            raise ValueError(f"{name} must be True or False, got {given[name]!r}")
    if not given.get("apply_hilbert_to_kv", True):
        raise ValueError("apply_hilbert_to_kv must be True, got False: queries and keys stand on one line")
    options = row.settings()
    if "use_hilbert" in given:
        options["ordering"] = "hilbert" if given["use_hilbert"] else "raster"
    if "enable_error_recovery" in given:
        options["guard"] = Guard() if given["enable_error_recovery"] else None
    pattern = Pattern.dilated(given["segment_lengths"], given["dilation_rates"])
    blocks = _blocks_of(given)
    if blocks and not row.is_sparse:
        if not set(blocks) <= {"block_size"}:
            raise ValueError(
                f"{owner} attends to all of its pattern, and keeps no blocks: take BlockSparse... for that"
            )
        blocks = {}
    options["pattern"] = row.pattern_of(pattern, **blocks)
    options["dropout"] = given.get("dropout", 0.0)
    return options


def _blocks_of(given: dict[str, Any]) -> dict[str, Any]:
    """Return keyword arguments of `Pattern.block_sparse`, from a configuration or from single arguments."""
    options: dict[str, Any] = {name: given[name] for name in ("sparsity_ratio", "block_size") if name in given}
    configs = [name for name in _SPARSE if name in given]
    if not configs:
        return options
    if len(configs) > 1 or options:
        raise ValueError(f"one of {', '.join([*configs, *options])} must say which blocks are kept, got all of them")
    value = given[configs[0]]
    config = SparsePatternConfig(**value) if isinstance(value, dict) else value
    if not isinstance(config, SparsePatternConfig):
        raise ValueError(f"{configs[0]} must be a SparsePatternConfig or its dictionary, got {value!r}")
    return config.blocks()


def expected_shape(given: dict[str, Any]) -> tuple[int | None, int | None]:
    """Return the number of heads and the head_dim that tensors must have; None for those that were not given."""
    heads, dim = (given.get(name, given.get(other)) for name, other in (("heads", "num_heads"), ("dim", "head_dim")))
    embed_dim = given.get("embed_dim")
    if embed_dim is not None and heads is not None:
        if embed_dim % heads or dim not in (None, embed_dim // heads):
            raise ValueError(f"embed_dim must be heads times dim, got {embed_dim}, {heads} and {dim}")
        dim = embed_dim // heads
    return heads, dim
