"""fit, validate, test and predict: LightningCLI, with our module where files and overrides name no other."""

from __future__ import annotations

import logging
import os
import pickle
import sys
import traceback
import warnings
import zipfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import lightning as L
import yaml
from jsonargparse import get_loader, set_loader
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import StrategyRegistry

import lightning_longnet.data
import lightning_longnet.training.module
import lightning_longnet.training.vision_module  # noqa: F401  short names in YAML are those of classes that are loaded
from lightning_longnet.callbacks import PredictedTexts
from lightning_longnet.checkpointing.comparison import message_of
from lightning_longnet.checkpointing.index import missing
from lightning_longnet.checkpointing.restricted import check_folder, refusal
from lightning_longnet.cli.classes import class_of
from lightning_longnet.cli.counts import plain_counts, plain_values
from lightning_longnet.cli.given import config_files, content
from lightning_longnet.cli.mistakes import explained
from lightning_longnet.cli.nearest import nearest
from lightning_longnet.registration import DEFAULT, NAMES
from lightning_longnet.supervision.record import RESUME
from lightning_longnet.trust import HELP as TRUST_HELP
from lightning_longnet.trust import is_trusted, trust_files

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
# where Lightning checks the arguments of a Trainer
_READS_ARGUMENTS = ("lightning/pytorch/trainer/connectors/", "lightning/fabric/accelerators/")
_MIGRATES = "lightning/pytorch/utilities/migration/"  # where it looks at a checkpoint first
_MISFIT = "Error(s) in loading state_dict for"  # begins what torch says of weights that do not fit a module
_load = get_loader("yaml")  # of jsonargparse
_LONGEST = 400  # characters of it that are shown


class SavedConfig(SaveConfigCallback):
    """Saves the configuration beside the metrics of its run, where the run has a logger."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class Parser(LightningArgumentParser):
    """A parser whose errors are one line, without a hundred lines of usage before it."""

    words: Sequence[str] = ()  # the command line, which a subclass for it holds

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        self.exit(2, f"longnet: error: {explained(message, self, self.words)}\n")


class TrainerCLI(LightningCLI):
    """The parser of fit, validate, test and predict, with our module where the words name no other.

    Args:
        words: the command line without the program's name.
        args: what Lightning is to parse: the words, or None where they are those of this process.
        options: further arguments of `LightningCLI`.
    """

    def __init__(self, words: Sequence[str], args: list[str] | None, **options: Any) -> None:
        self.words = words
        set_loader("yaml", _load_yaml, (yaml.YAMLError,))
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=type("Parser", (Parser,), {"words": words}),
            seed_everything_default=0,
            args=args,
            parser_kwargs={"prog": "longnet"},
            **options,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning calls it on the object
        """Return the command that the words begin with: making the parsers of all four takes four times as long."""
        every = super().subcommands()
        return {name: every[name] for name in every if self.words[:1] == [name]} or every

    def _parse_ckpt_path(self) -> None:
        """Check that ckpt_path is a checkpoint, and leave the configuration as files and overrides say.

        Lightning would replace what was asked for by the options that the checkpoint was made with.
        """
        if self.config[self.config.subcommand].get("trust"):
            trust_files()
        if self.config.subcommand != "fit":  # whose strategy may load another one
            self._check_path()

    def before_fit(self) -> None:  # Lightning calls it by its name
        """Check ckpt_path, unless the strategy does so, and goes on from another where that is damaged or gone."""
        path = self.config.fit.get("ckpt_path")
        if not _is_ours(self.trainer.strategy):
            self._check_path()
        elif _is_path(path) and RESUME not in os.environ and not _was_saved(Path(path)):
            raise ValueError(f"ckpt_path must be a checkpoint, got {path}, which does not exist")

    def _check_path(self) -> None:
        path = self.config[self.config.subcommand].get("ckpt_path")
        if not _is_path(path):
            return
        if not Path(path).exists():
            raise ValueError(f"ckpt_path must be a checkpoint, got {path}, which does not exist")
        if Path(path).is_file() and not is_saved(Path(path)):
            raise ValueError(f"ckpt_path must be a checkpoint, got {path}, which is something else, or a part of one")
        check_folder(Path(path), trust=self.config[self.config.subcommand].get("weights_only") is False)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        if kwargs.get("weights_only") is None:  # strategies of others take no other word for it
            kwargs["weights_only"] = not is_trusted()
        return kwargs

    def _run_subcommand(self, subcommand: str) -> None:
        strategy = self.trainer.strategy
        if not _is_ours(strategy):
            setattr(strategy, "load_checkpoint", partial(_load_checked, strategy.load_checkpoint))  # noqa: B010
        try:
            super()._run_subcommand(subcommand)
        except RuntimeError as error:
            if not str(error).startswith(_MISFIT):
                raise
            differences = [" ".join(line.split()).rstrip(".") for line in str(error).splitlines()[1:]]
            path = self.config[subcommand].get("ckpt_path")
            raise ValueError(message_of(path, "; ".join(filter(None, differences))[:_LONGEST])) from error
        except (pickle.UnpicklingError, TypeError) as error:
            path, last = self.config[subcommand].get("ckpt_path"), traceback.extract_tb(error.__traceback__)[-1]
            if isinstance(error, pickle.UnpicklingError):  # torch advises to load the file as code
                raise ValueError(f"ckpt_path must be {refusal(path, error)}") from error
            if _MIGRATES not in Path(last.filename).as_posix():
                raise
            raise ValueError(f"ckpt_path must be a checkpoint, which holds a state_dict, got {path}") from error

    def before_validate(self) -> None:  # Lightning calls these by their names
        self._warn_of_weights()

    before_test = before_predict = before_validate

    def after_validate(self) -> None:
        self._warn_of_weights()  # again, beside the figures

    after_test = after_predict = after_validate

    def _warn_of_weights(self) -> None:
        """Print a line where a command is about weights that nothing has trained."""
        command = self.config.subcommand
        given = self.config[command]
        options = given.model.get("init_args") or {}
        weights = options.get("weights") or options.get("name")  # of a LongNetModule, of a CausalLMModule
        if given.get("ckpt_path") is None and weights is None:
            _warn(
                f"no --ckpt_path, so longnet {command} uses the weights that the model is made with, which are random "
                f"for a LongNetModule without weights; give --ckpt_path FILE, a checkpoint of longnet fit"
            )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--trust", action="store_true", help=TRUST_HELP)
        # a default of another class would leave its arguments to any that shares their names
        parser.set_defaults({"model": {"class_path": model_path(self.words)}})


def _load_yaml(text: str) -> Any:
    """Return what YAML holds, with plain numbers in the place of those such as 64k."""
    return plain_values(_load(text))


def model_path(words: Sequence[str]) -> str:
    """Return the path of the model's class that overrides or files choose, or that of ours where they choose none.

    Without it the parser would check the model's arguments against LightningModule, which has none of them.  A path
    that leads to no class raises a ValueError with the nearest.
    """
    values: list[Any] = []
    for i, word in enumerate(words):
        name, equals, text = word.partition("=")
        if name in ("--model", "--model.class_path") and (equals or i + 1 < len(words)):
            values.insert(0, text if equals else words[i + 1])
    contents = [content(path) for path in config_files(words)]
    values += [each["model"] for each in contents if "model" in each]
    for value in values:
        if isinstance(value, str):
            value = content(Path(value)) if Path(value).is_file() else yaml.safe_load(value)
        path = value.get("class_path") if isinstance(value, dict) else value
        if isinstance(path, str):
            module_class = class_of(path, L.LightningModule)
            return path if "." in path else f"{module_class.__module__}.{module_class.__name__}"
    return "lightning_longnet.LongNetModule"


def _unknown_strategy(message: str) -> str:
    """Return the error of a name that no strategy has, with ours and the nearest."""
    name = message.partition("strategy='")[2].partition("'")[0]
    others = sorted({*StrategyRegistry.available_strategies(), "auto"} - {*NAMES})
    question = nearest(name, [*NAMES, *others])
    endings = ", ".join(each.removeprefix(DEFAULT) for each in NAMES if each != DEFAULT)
    return (
        f"no trainer.strategy {name!r}{question or '.'} There are {DEFAULT}, alone or with one of "
        f"{endings} after it, and Lightning's, such as auto, ddp and fsdp"
    )


@rank_zero_only
def _warn(message: str) -> None:
    print(f"longnet: warning: {message}", file=sys.stderr, flush=True)  # noqa: T201


def _was_saved(path: Path) -> bool:
    """Whether a checkpoint is there, or the index of its folder names it."""
    return path.exists() or path in missing(path.parent)


def _is_path(path: str | None) -> bool:
    """Whether a ckpt_path names a file or a folder here, and is no word, s3:// or registry:."""
    return path not in (None, "best", "last", "hpc", "registry") and ":" not in str(path)


def _is_ours(strategy: Any) -> bool:
    """Whether a strategy checks the checkpoints that it loads."""
    return getattr(strategy, "saves_whole", False)


def _load_checked(load: Callable[..., Any], checkpoint_path: Any, weights_only: bool | None = None) -> Any:
    """Load a checkpoint, which a word may have named, by a strategy of others, which would unpickle a folder."""
    check_folder(Path(checkpoint_path), trust=weights_only is False)
    return load(checkpoint_path, weights_only=weights_only)


def is_saved(path: Path) -> bool:
    """Whether `torch.save` wrote a file: an archive, or with old versions a pickle."""
    with path.open("rb") as file:
        return file.read(1) == b"\x80" or zipfile.is_zipfile(file)


def run_trainer(arguments: Sequence[str]) -> TrainerCLI:
    """Run one of fit, validate, test and predict; errors of Lightning that are for its users become a ValueError."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()  # advertisements
    )
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning's use of what torch 2.13 calls by another name
    # Lightning warns of arguments that are those of the process, and reads these itself where args is None
    is_own = list(arguments) == sys.argv[1:]
    arguments = plain_counts(list(arguments))
    if is_own:
        sys.argv[1:] = arguments
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
    except (ValueError, KeyError, TypeError) as error:  # KeyError: a checkpoint without what resuming needs
        if "You selected an invalid strategy name" in str(error):
            raise ValueError(_unknown_strategy(str(error))) from error
        where = Path(traceback.extract_tb(error.__traceback__)[-1].filename).as_posix()
        if any(each in where for each in _READS_ARGUMENTS):
            raise ValueError(" ".join(str(error.args[0]).split())) from error
        raise
