"""The job of a plan, out of the files and overrides that `longnet fit` takes, read by the same parser."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from jsonargparse import Namespace

from lightning_longnet.attention.pattern.pattern import Branch, Pattern
from lightning_longnet.cli.nearest import nearest
from lightning_longnet.cli.trainer import TrainerCLI
from lightning_longnet.models.longnet import LongNetConfig
from lightning_longnet.planning.job import Job
from lightning_longnet.registration import NAMES

if TYPE_CHECKING:
    from collections.abc import Sequence

_OURS = tuple(f"lightning_longnet.{module}LongNetModule" for module in ("", "module.", "training.module."))
_DECODER = "CausalLMModule"
_STOCK = ("auto", "ddp")  # where sequences are whole, and each rank holds the model


class _Reading(TrainerCLI):
    """Parses and checks the words, without making the objects that they configure."""

    def _set_seed(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def read_job(
    words: Sequence[str],
    nodes: int | None = None,
    per_node: int | None = None,
    tokens: int | None = None,
) -> Job:
    """Return the job of `longnet fit WORDS`; the other arguments, where given, replace what the configuration says."""
    command = ["fit", *words]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        config = _Reading(command, args=command, save_config_callback=None).config["fit"]
    trainer, model = config.trainer, config.model
    is_decoder = model.class_path.rpartition(".")[2] == _DECODER
    if model.class_path not in _OURS and not is_decoder:
        raise ValueError(f"model must be a LongNetModule or a {_DECODER}, whose shape is known, got {model.class_path}")
    strategy = _strategy(trainer.strategy)
    data = config.data.init_args if config.get("data") is not None else Namespace()  # type: ignore[no-untyped-call]
    length = data.get("tokens") if tokens is None else tokens
    if length is None:
        raise ValueError("tokens must be given, as the data module has no argument of that name: --tokens N")
    return Job(
        _decoder(model.init_args) if is_decoder else LongNetConfig(**_model(model.init_args.config)),
        tokens=length,
        batch=data.get("batch_size") or 1,
        nodes=trainer.num_nodes if nodes is None else nodes,
        per_node=_devices(trainer.devices) if per_node is None else per_node,
        precision=str(trainer.precision or "32-true"),
        accumulate=trainer.accumulate_grad_batches,
        optimizer_copies=_copies(model.init_args.get("optimizer")),
        is_packed=bool(data.get("packed")),
        is_decoder=is_decoder,
        **strategy,
    )


def _decoder(options: Namespace) -> LongNetConfig:
    """Return the LongNet by which a model of transformers is planned."""
    from lightning_longnet.huggingface.models import config_of, read_config
    from lightning_longnet.huggingface.planned import planned_config

    if options.get("lora") is not None:
        raise ValueError("lora must be null in a plan, which knows no adapters")
    name, values = options.get("name"), options.get("config")
    if (name is None) == (values is None):
        raise ValueError("one of model.name and model.config must be given for a plan")
    config = config_of(dict(values)) if name is None else read_config(name, options.get("overrides"))
    return planned_config(config, vars(options))


def _model(config: Namespace) -> dict[str, Any]:
    options = dict(config.__dict__)
    pattern = options["pattern"]
    options["pattern"] = [*map(_pattern, pattern)] if isinstance(pattern, (list, tuple)) else _pattern(pattern)
    return options


def _pattern(given: Namespace) -> Pattern:
    return Pattern(tuple(map(_branch, given.branches)), given.multiplicity)


def _branch(given: Namespace) -> Branch:
    options = dict((given.get("init_args") or given).__dict__)
    sparsity = options.get("sparsity")
    if isinstance(sparsity, Namespace):
        options["sparsity"] = dict((sparsity.get("init_args") or sparsity).__dict__)
    return Branch(**options)


def _strategy(given: Any) -> dict[str, Any]:
    if isinstance(given, str):
        if given in NAMES:
            return {"sharding": NAMES[given]}
        if given in _STOCK:
            return {"sharding": "ddp", "sequence_parallel_size": 1}
        known = [*NAMES, *_STOCK]
        question = nearest(given, known)
        raise ValueError(f"strategy must be one of {', '.join(known)}, got {given!r}: others are not known{question}")
    if not given.class_path.endswith("RingSequenceParallelStrategy"):
        raise ValueError(f"strategy must be a RingSequenceParallelStrategy or a name of one, got {given.class_path}")
    names = ("sharding", "sequence_parallel_size", "exchange", "placement")
    options = {name: given.init_args[name] for name in names}
    bucket = (given.init_args.engine or {}).get("reduce_bucket_size")
    return options if bucket is None else options | {"bucket": int(bucket)}


def _devices(given: Any) -> int:
    if isinstance(given, int) and given > 0:
        return given
    if isinstance(given, (list, tuple)):
        return len(given)
    if isinstance(given, str) and given.isdecimal():
        return int(given)
    raise ValueError(f"--gpus-per-node must be given where trainer.devices is {given!r}")


def _copies(optimizer: Any) -> float:
    """Return the size of an optimizer's states, as a multiple of a matrix of weights: 2 for the default, AdamW."""
    if optimizer is None:
        return 2.0
    module, _, name = optimizer.class_path.rpartition(".")
    weight = torch.nn.Parameter(torch.ones(64, 64))
    weight.grad = torch.ones_like(weight)
    options = optimizer.get("init_args")
    made = getattr(import_module(module), name)([weight], **({} if options is None else vars(options)))
    made.step()
    held = sum(x.numel() for state in made.state.values() for x in state.values() if isinstance(x, torch.Tensor))
    return round(held / weight.numel(), 2)
