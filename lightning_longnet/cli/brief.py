"""The short help of fit, validate, test and predict, which is printed without importing torch or Lightning."""

from __future__ import annotations

from typing import NamedTuple


class Option(NamedTuple):
    """An option as the help shows it.

    Attributes:
        name: its name on the command line.
        value: what stands for its value.
        purpose: what it does.
    """

    name: str
    value: str
    purpose: str


_EXAMPLES = {
    "fit": (
        "longnet init first && cd first                            # writes quickstart.yaml, a run of two minutes",
        "longnet fit --config quickstart.yaml",
        "longnet fit --config quickstart.yaml --trainer.max_steps 1000 --model.config.layers 6",
        "longnet fit --config quickstart.yaml --data.paths '[books]' --data.pattern '*.txt'",
        "longnet fit --config quickstart.yaml --ckpt_path runs/quickstart/version_0/checkpoints/step=200.ckpt",
        "longnet fit --config quickstart.yaml --config configs/strategies/hsdp.yaml   # later files override earlier",
    ),
    "validate": (
        "longnet validate --config quickstart.yaml --ckpt_path runs/quickstart/version_0/checkpoints/step=200.ckpt",
        "longnet validate --config quickstart.yaml --ckpt_path last.ckpt --trainer.limit_val_batches 100",
    ),
    "test": ("longnet test --config quickstart.yaml --ckpt_path runs/quickstart/version_0/checkpoints/step=200.ckpt",),
    "predict": (
        "longnet predict --config quickstart.yaml --ckpt_path runs/quickstart/version_0/checkpoints/step=200.ckpt",
        "longnet predict --config quickstart.yaml --ckpt_path last.ckpt --model.generated_tokens 200",
    ),
}
_RUN = (
    Option("--config", "FILE", "options as YAML; several are read in order, then those of the command line"),
    Option("--ckpt_path", "FILE", "a checkpoint, to continue from or to use; last, best"),
    Option("--print_config", "", "print the configuration that the files and options give, and stop"),
    Option("--seed_everything", "N", "seed of weights and data; 0 by default"),
)
_DEVICES = (
    Option("--trainer.accelerator", "NAME", "cpu, gpu or auto"),
    Option("--trainer.devices", "N", "ranks of each machine; by default all that there are"),
    Option("--trainer.num_nodes", "N", "number of machines"),
    Option("--trainer.strategy", "NAME", "ring_sequence_parallel, or this with _ddp, _hsdp, _deepspeed_stage_3, ..."),
    Option("--trainer.precision", "NAME", "32-true, bf16-mixed, bf16-true, 16-mixed, ..."),
)
_TRAINING = (
    Option("--trainer.max_steps", "N", "steps after which the run ends; also --trainer.max_epochs, --trainer.max_time"),
    Option("--trainer.accumulate_grad_batches", "N", "batches of a step"),
    Option("--trainer.gradient_clip_val", "X", "largest norm of the gradient"),
    Option("--trainer.val_check_interval", "N", "batches between validations"),
    Option("--trainer.callbacks+", "CLASS", "add a callback, such as lightning_longnet.callbacks.RunReport"),
    Option("--trainer.logger", "CLASS", "a logger, such as CSVLogger or TensorBoardLogger"),
)
_LIMITS = {
    "validate": Option("--trainer.limit_val_batches", "N", "number of batches, or a share of them"),
    "test": Option("--trainer.limit_test_batches", "N", "number of batches, or a share of them"),
    "predict": Option("--trainer.limit_predict_batches", "N", "number of batches, or a share of them"),
}
_MODEL = (
    Option("--model", "CLASS", "LongNetModule by default; LongViTModule, or a LightningModule of yours"),
    Option("--model.config.dim", "N", "width of the model; also .layers, .heads, .kv_heads, .vocab_size, .dropout"),
    Option("--model.config.pattern", "YAML", "the keys that each token attends to; see the configuration's comments"),
    Option("--model.config.recompute", "NAME", "nothing, all but attention, or everything: saves memory"),
    Option("--model.weights", "PATH", "weights to begin with, of a checkpoint or an exported folder"),
)
_LEARNING = (
    Option("--model.learning_rate", "X", "the highest rate; also --model.warmup_steps, --model.weight_decay"),
    Option("--optimizer", "CLASS", "another optimizer than AdamW; also --lr_scheduler"),
)
_GENERATION = (Option("--model.generated_tokens", "N", "tokens to add; also --model.temperature, --model.top_k"),)
_DATA = (
    Option("--data", "CLASS", "lightning_longnet.ByteData, TokenFileData, HubData, LongRangeData, ..."),
    Option("--data.tokens", "N", "tokens of a sequence, such as 65536, 64k or 1M (1,048,576)"),
    Option("--data.batch_size", "N", "sequences of a batch, for each group of ranks that share them"),
    Option("--data.paths", "[PATH,...]", "of ByteData: files and folders; also --data.pattern, --data.megabytes"),
)
_TITLES = {
    "fit": "Train a model.",
    "validate": "Compute the validation loss of a checkpoint.",
    "test": "Compute the test loss of a checkpoint.",
    "predict": "Continue the sequences of a data module with the model of a checkpoint.",
}


def groups(command: str) -> dict[str, tuple[Option, ...]]:
    """Return the options that the short help of a command shows, by the title of their group."""
    found = {"The run": _RUN, "Devices": _DEVICES}
    if command == "fit":
        found["Training"] = (*_TRAINING, *_LEARNING)
    else:
        found["Data to read"] = (_LIMITS[command],)
    if command == "predict":
        found["Generation"] = _GENERATION
    return found | {"The model": _MODEL, "The data": _DATA}


def brief_help(command: str) -> str:
    """Return the short help of one of fit, validate, test and predict."""
    lines = [f"usage: longnet {command} --config FILE [--config FILE] [--OPTION VALUE ...]", "", _TITLES[command], ""]
    lines += ["examples", *(f"  {example}" for example in _EXAMPLES[command])]
    shown = groups(command)
    width = max(len(f"{each.name} {each.value}") for options in shown.values() for each in options) + 4
    for title, options in shown.items():
        lines += ["", title.lower()]
        lines += [f"  {f'{each.name} {each.value}'.rstrip():<{width - 2}}{each.purpose}" for each in options]
    return "\n".join(
        [
            *lines,
            "",
            f"longnet {command} --help-all            all options, those of the Trainer among them (takes seconds)",
            f"longnet {command} --model.help CLASS    the options of a model; --data.help CLASS of a data module",
        ]
    )


def missing_arguments(command: str) -> str:
    """Return what to type where a command of the Trainer is given alone."""
    checkpoint = "" if command == "fit" else " --ckpt_path FILE"
    return (
        f"{command} needs a configuration: longnet {command} --config FILE{checkpoint}; longnet init FOLDER writes one "
        f"to begin with, and longnet {command} --help shows examples"
    )
