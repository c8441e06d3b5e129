"""The commands of `longnet` with their options, as shells complete them."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningCLI

import lightning_longnet
from lightning_longnet.attention.parallel.schedule import Exchange
from lightning_longnet.cli import COMMANDS, HELP_ALL, TRAINER_COMMANDS, parser_of
from lightning_longnet.cli.brief import groups
from lightning_longnet.cli.trainer import TrainerCLI
from lightning_longnet.models.longnet import LongNetConfig
from lightning_longnet.registration import NAMES
from lightning_longnet.training.module import LongNetModule

if TYPE_CHECKING:
    from argparse import Action
    from collections.abc import Callable, Iterator

_DATA = ("ByteData", "TokenFileData", "HubData", "LongRangeData", "ImageFolderData")
_VALUES = {
    "--trainer.strategy": (*NAMES, "auto", "ddp", "fsdp"),
    "--trainer.accelerator": ("cpu", "gpu", "auto"),
    "--trainer.precision": ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true"),
    "--model": ("lightning_longnet.LongNetModule", "lightning_longnet.LongViTModule"),
    "--model.config.exchange": get_args(Exchange),
    "--data": tuple(f"lightning_longnet.{name}" for name in _DATA),
}


class Option(NamedTuple):
    """An option of a command.

    Attributes:
        name: its name, with the dashes.
        purpose: a few words, or an empty text.
        values: the values that it may have, as far as they are known; where there are none, it may be a path.
        is_switch: whether it has no value.
    """

    name: str
    purpose: str = ""
    values: tuple[str, ...] = ()
    is_switch: bool = False


class Command(NamedTuple):
    """A command, with the values of its first word where they are known."""

    name: str
    purpose: str
    options: tuple[Option, ...]
    words: tuple[str, ...] = ()


class _Parsers(TrainerCLI):
    """Makes the parsers of the Trainer's commands, and parses nothing."""

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        return LightningCLI.subcommands()

    def parse_arguments(self, parser: Any, args: Any) -> None:
        self.config = Namespace(subcommand=None)  # type: ignore[no-untyped-call]

    def _add_instantiators(self) -> None:
        pass

    def _parse_ckpt_path(self) -> None:
        pass

    def _set_seed(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass


def commands() -> list[Command]:
    """Return all commands."""
    parsers = _Parsers(["fit"], args=["fit"], save_config_callback=None)._subcommand_parsers
    found = [
        Command(name, purpose, tuple(_trainer_options(name, parsers[name]._actions)))
        for name, purpose in TRAINER_COMMANDS.items()
    ]
    overrides = tuple(each for each in found[0].options if each.name.startswith(("--model", "--data", "--trainer")))
    for name, purpose in COMMANDS.items():
        actions = parser_of(name)._actions
        words = next((tuple(each.choices) for each in actions if not each.option_strings and each.choices), ())
        options = tuple(
            Option(each.option_strings[-1], _line(each.help), tuple(each.choices or ()), each.nargs == 0)
            for each in actions
            if each.option_strings
        )
        takes_overrides = getattr(import_module(f"lightning_longnet.cli.{name}"), "TAKES_OVERRIDES", False)
        found.append(Command(name, purpose, options + overrides * takes_overrides, words))
    return found


def _trainer_options(command: str, actions: list[Action]) -> Iterator[Option]:
    """Yield the options of one of fit, validate, test and predict, with those of our model and our data modules."""
    known = {each.name: each.purpose for options in groups(command).values() for each in options}
    shown: dict[str, Option] = {"--help": Option("--help", is_switch=True), HELP_ALL: Option(HELP_ALL, is_switch=True)}
    names = [name for action in actions for name in action.option_strings if name.startswith("--")]
    for name in names:
        if not name.endswith((".help", "help", "+")):
            is_switch = name == "--print_config"
            shown[name] = Option(name, known.get(name, ""), _VALUES.get(name, ()), is_switch)
    fields: list[tuple[str, Callable[..., Any]]] = [
        ("--model.", LongNetModule.__init__),
        ("--model.config.", LongNetConfig.__init__),
    ]
    fields += [("--data.", getattr(lightning_longnet, name).__init__) for name in _DATA]
    for prefix, maker in fields:
        for field in list(inspect.signature(maker).parameters.values())[1:]:
            name = f"{prefix}{field.name}"
            values = ("true", "false") if field.annotation == "bool" else _VALUES.get(name, ())
            shown.setdefault(name, Option(name, known.get(name, ""), values))
    yield from shown.values()


def _line(text: str | None) -> str:
    return " ".join((text or "").replace("%%", "%").split())
