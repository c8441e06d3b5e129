"""Loading a checkpoint, in one file or in a folder of FSDP2, into a module that FSDP2 has sharded."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import chain
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from lightning.fabric.strategies.model_parallel import _load_raw_module_state
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load

from lightning_longnet.checkpointing.checkpoints import OTHERS
from lightning_longnet.checkpointing.comparison import check_same_model
from lightning_longnet.checkpointing.reader import Reader
from lightning_longnet.checkpointing.restricted import read_file, refusal, restricted
from lightning_longnet.trust import confined

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from torch import nn
    from torch.optim import Optimizer

_STATE = "state_dict."  # prefix of the names of the weights in folders


def load_full_checkpoint(
    path: Path, module: nn.Module, optimizers: Iterable[Optimizer], strict: bool, trust: bool = False
) -> dict[str, Any]:
    """Load the weights and the optimizers' states of a checkpoint in one file, and return the rest of it.

    FSDP2's `_load_from` calls it on all ranks together.  Each rank reads the file, and keeps its shards.

    Args:
        path: the file, as DDP, FSDP2 or Lightning's own strategies save it.
        module, optimizers: what gets the weights and the states; the module is sharded already.
        strict: whether the module and the checkpoint must have the same names.
        trust: runs the code that the file may hold; otherwise such a file raises a ValueError.
    """
    checkpoint: dict[str, Any] = read_file(path, trust=trust)
    saved = {name: tuple(x.shape) for name, x in checkpoint["state_dict"].items() if isinstance(x, Tensor)}
    _check_model(path, saved, module, checkpoint, strict)
    _load_raw_module_state(checkpoint.pop("state_dict"), module, strict=strict)
    options = StateDictOptions(broadcast_from_rank0=True, full_state_dict=True, strict=strict)
    for optimizer, state in zip(optimizers, checkpoint.get("optimizer_states", ()), strict=False):
        set_optimizer_state_dict(module, optimizer, _by_names(state, optimizer, module), options=options)
    return checkpoint


def load_folder(
    path: Path, module: nn.Module, optimizers: Iterable[Optimizer], strict: bool, trust: bool = False
) -> dict[str, Any]:
    """Load the weights and the optimizers' states of a folder that FSDP2 wrote, and return the rest of the checkpoint.

    FSDP2's `_load_from` calls it on all ranks together, with the arguments of `load_full_checkpoint`; each rank reads
    its shards alone.  Lightning's own loading is not used, as it has torch unpickle whatever the folder's `.metadata`
    holds.
    """
    rest: dict[str, Any] = read_file(confined("a checkpoint's meta.pt", path / OTHERS, path, trust), trust=trust)
    reader = Reader(path, trust)
    shards = reader.read_metadata().state_dict_metadata  # raises the same error on all ranks, before they load together
    saved = {
        name.removeprefix(_STATE): tuple(shard.size)
        for name, shard in shards.items()
        if name.startswith(_STATE) and isinstance(shard, TensorStorageMetadata)
    }
    _check_model(path, saved, module, rest, strict)
    with _refusals_as_value_errors(path), restricted(trust=trust):
        weights = {"state_dict": get_model_state_dict(module)}
        load(weights, storage_reader=reader)
        module.load_state_dict(weights["state_dict"], strict=strict)
        for number, optimizer in enumerate(optimizers):
            name = f"optimizer_{number}"
            states = {name: get_optimizer_state_dict(module, optimizer)}
            load(states, storage_reader=reader)
            options = StateDictOptions(cpu_offload=True)
            set_optimizer_state_dict(module, optimizer, states[name], options=options)
    return rest


def _check_model(
    path: Path, saved: dict[str, tuple[int, ...]], module: nn.Module, rest: dict[str, Any], strict: bool
) -> None:
    """Raise a ValueError, the same on all ranks, if a checkpoint is of another model than the module.

    Args:
        path: the checkpoint.
        saved: the shapes of its weights by name.
        module: the sharded module that is to load them.
        rest: the rest of the checkpoint, with the "hyper_parameters" of the module that was saved.
        strict: whether the names must be the same.
    """
    own = {name: tuple(x.shape) for name, x in get_model_state_dict(module).items() if isinstance(x, Tensor)}
    # modules that torch.compile wraps have a prefix in the checkpoints of some strategies
    saved = {name.replace("_orig_mod.", ""): shape for name, shape in saved.items()}
    values = rest.get("hyper_parameters"), getattr(module, "hparams", None)
    check_same_model(path, saved, own, values, strict)


@contextmanager
def _refusals_as_value_errors(path: Path) -> Iterator[None]:
    """Turn torch's error about an object that could run code when it is unpickled into a ValueError.

    torch raises its `CheckpointException` on all ranks if one of them fails.
    """
    try:
        yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        if refused := [cause for cause in causes if isinstance(cause, UnpicklingError)]:
            raise ValueError(f"ckpt_path must be {refusal(path, refused[0])}") from None
        raise


def _by_names(state: dict[str, Any], optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """Return an optimizer's state with parameter names as keys, in place of the numbers that DDP saves.

    The numbers are in the order of the optimizer's groups.  Lightning takes them for the module's order: if the groups
    reorder parameters, as those for weight decay do, parameters would get the moments of others.  A state that has
    names already, as FSDP2 saves it, is returned as it is.
    """
    saved = list(chain.from_iterable(group["params"] for group in state["param_groups"]))
    if not all(isinstance(key, int) for key in saved):
        return state
    names = {id(parameter): name.replace("_orig_mod.", "") for name, parameter in module.named_parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if strange := [tuple(parameter.shape) for parameter in held if id(parameter) not in names]:
        raise ValueError(
            "a checkpoint in one file is read by the names of the module's parameters, and the optimizer holds some "
            f"that it has not, the first of shape {strange[0]}"
        )
    ours = [names[id(parameter)] for parameter in held]
    if len(saved) != len(ours):
        raise ValueError(
            f"the checkpoint's optimizer must have as many parameters as this one, {len(ours)}, got {len(saved)}"
        )
    name_of = dict(zip(saved, ours, strict=True))
    return {
        "state": {name_of[number]: values for number, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [name_of[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }
