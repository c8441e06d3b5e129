"""fit, validate, test and predict: LightningCLI, with our module where files and overrides name no other."""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import lightning as L
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

import lightning_longnet.data
import lightning_longnet.training.module
import lightning_longnet.training.vision_module  # noqa: F401  short names in YAML are those of classes that are loaded
from lightning_longnet.callbacks import PredictedTexts

if TYPE_CHECKING:
    from collections.abc import Sequence
_READS_ARGUMENTS = "lightning/pytorch/trainer/connectors/"  # where Lightning checks the arguments of a Trainer


class SavedConfig(SaveConfigCallback):
    """Saves the configuration beside the metrics of its run, where the run has a logger."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class Parser(LightningArgumentParser):
    """A parser whose errors are one line, without a hundred lines of usage before it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        lines = [line.strip() for line in message.splitlines()]
        if "Errors:" in lines:  # one for each type of the value, and then pages of the value itself
            reasons = [line.removeprefix("- ") for line in lines if line.startswith("- ") and "NoneType" not in line]
            lines = [lines[0], "; ".join(reasons)]
        self.exit(2, f"longnet: error: {' '.join(lines)}\n")


class TrainerCLI(LightningCLI):
    """The parser of fit, validate, test and predict, with our module where the words name no other.

    Args:
        words: the command line without the program's name.
        args: what Lightning is to parse: the words, or None where they are those of this process.
        options: further arguments of `LightningCLI`.
    """

    def __init__(self, words: Sequence[str], args: list[str] | None, **options: Any) -> None:
        self.words = words
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=Parser,
            seed_everything_default=0,
            args=args,
            **options,
        )

    def _parse_ckpt_path(self) -> None:
        """Check that ckpt_path is a checkpoint, and leave the configuration as files and overrides say.

        Lightning would replace what was asked for by the options that the checkpoint was made with.
        """
        path = self.config[self.config.subcommand].get("ckpt_path")
        is_word = path in (None, "best", "last", "hpc", "registry")
        if not is_word and ":" not in path and not Path(path).exists():  # s3://, registry:
            raise ValueError(f"ckpt_path must be a checkpoint, got {path}, which does not exist")
        if not is_word and Path(path).is_file() and not is_saved(Path(path)):
            raise ValueError(f"ckpt_path must be a checkpoint, got {path}, which is something else, or a part of one")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        if not names_a_model(self.words):
            parser.set_defaults({"model": {"class_path": "lightning_longnet.LongNetModule"}})


def names_a_model(words: Sequence[str]) -> bool:
    """Whether files or overrides choose a class: the default one would leave its arguments to any that shares names."""
    is_named = False
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        is_named |= name in ("--model", "--model.class_path")
        if name in ("-c", "--config") and (equals or i + 1 < len(words)):
            path = Path(value if equals else words[i + 1])
            content = _content(path) if path.is_file() else None
            model = content.get("model") if isinstance(content, dict) else None
            is_named |= isinstance(model, str) or (isinstance(model, dict) and "class_path" in model)
    return is_named


def is_saved(path: Path) -> bool:
    """Whether `torch.save` wrote a file: an archive, or with old versions a pickle."""
    with path.open("rb") as file:
        return zipfile.is_zipfile(file) or file.read(1) == b"\x80"


def _content(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError:
        return None  # the parser says what is wrong with it


def run_trainer(arguments: Sequence[str]) -> TrainerCLI:
    """Run one of fit, validate, test and predict; errors of Lightning that are for its users become a ValueError."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()  # advertisements
    )
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning's use of what torch 2.13 calls by another name
    # Lightning warns of arguments that are those of the process, and reads these itself where args is None
    is_own = list(arguments) == sys.argv[1:]
    try:
        return TrainerCLI(
            arguments,
            args=None if is_own else list(arguments),
            save_config_callback=SavedConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": PredictedTexts()},
        )
    except MisconfigurationException as error:  # Lightning's errors for its users
        raise ValueError(" ".join(str(error).split())) from error
    except IsADirectoryError as error:
        if "checkpoint_connector" not in str(traceback.extract_tb(error.__traceback__)):
            raise
        raise ValueError(
            f"ckpt_path must be what this strategy reads, a file, got the folder {error.filename}: go on with the "
            f"strategy that it was saved with"
        ) from error
    except (ValueError, KeyError) as error:  # KeyError: a checkpoint without what resuming needs
        if _READS_ARGUMENTS in Path(traceback.extract_tb(error.__traceback__)[-1].filename).as_posix():
            raise ValueError(" ".join(str(error.args[0]).split())) from error
        raise
