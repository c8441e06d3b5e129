"""Names, YAML and help: what a user of the command line meets."""

import re
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import yaml
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, StrategyRegistry
from programs import LONGNET, programs
from tiers import tiered
from trained import quiet, trainer_of

from lightning_longnet.registration import NAMES
from lightning_longnet.strategies import RingSequenceParallelStrategy

ROOT = Path(__file__).resolve().parents[2]
ORDERS = [("lightning_longnet", "lightning"), ("lightning", "lightning_longnet")]
CONFIGS = sorted((ROOT / "configs/strategies").glob("*.yaml"))
SMALL = [
    *("--trainer.max_steps=2", "--trainer.limit_val_batches=2", "--trainer.val_check_interval=2"),
    *("--trainer.logger=false", "--trainer.callbacks=null", "--trainer.enable_progress_bar=false"),
    *("--trainer.enable_checkpointing=false", "--model.config.dim=16", "--model.config.layers=1", "--model.eps=1e-4"),
    *("--data.tokens=301", "--data.megabytes=0.05"),
]
ENGINES = {"ddp": DDPStrategy, "fsdp2": ModelParallelStrategy, "hsdp": ModelParallelStrategy}


@pytest.mark.parametrize("name", NAMES)
def test_names_give_the_engine(name):
    assert name in StrategyRegistry.available_strategies()
    with quiet():
        strategy = trainer_of(name, 2).strategy
    assert isinstance(strategy, RingSequenceParallelStrategy)
    assert strategy.sharding == NAMES[name]
    engine = DeepSpeedStrategy if "deepspeed" in name else ENGINES[NAMES[name].removesuffix("_offload")]
    assert isinstance(strategy, engine)


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)


@pytest.mark.parametrize(("first", "second"), tiered(ORDERS, quick=[], long=[]))
def test_importing_the_package_registers_whatever_comes_first(first, second):
    result = run(
        f"import {first}, sys\n"
        "early = 'lightning.pytorch' in sys.modules\n"
        f"import {second}, lightning as L\n"
        "trainer = L.Trainer(strategy='ring_sequence_parallel', devices=2, accelerator='cpu', logger=False)\n"
        "print(early, type(trainer.strategy).__name__, len(sys.meta_path))"
    )
    early, name, _ = result.stdout.split()
    assert (early, name) == (str(first == "lightning"), "FSDP2SequenceParallelStrategy"), result.stderr


def test_the_package_is_imported_where_lightning_is_missing():
    result = run("import sys; sys.modules['lightning'] = None; import lightning_longnet; print(len(sys.meta_path) > 0)")
    assert result.stdout.strip() == "True", result.stderr


def command(rank, world, arguments):
    """What is logged by the program that the configurations name."""
    from lightning_longnet.cli.trainer import run_trainer

    with quiet():
        cli = run_trainer(arguments)
    return {name: value.item() for name, value in cli.trainer.callback_metrics.items()}, cli.trainer.global_step


@pytest.fixture(scope="module")
def alone(trainers):
    """The same two steps in one process, under Lightning's own strategy."""
    options = [
        "fit",
        f"--config={ROOT}/configs/quickstart.yaml",
        "--trainer.devices=1",
        "--trainer.strategy=ddp",
    ]  # which orders samples as any of ours does
    return trainers.run(1, command, [*options, *SMALL])[0]


@pytest.mark.parametrize(
    "name",
    tiered(
        [path.stem for path in CONFIGS],
        quick=["fsdp2"],
        full=[path.stem for path in CONFIGS if path.stem not in ("fsdp2", "deepspeed_stage_2")],
    ),
)
def test_every_configuration_trains_two_steps(trainers, deepspeed_trainers, alone, name):
    is_deepspeed = "deepspeed" in name
    workers = deepspeed_trainers(2) if is_deepspeed else trainers
    options = [
        "fit",
        f"--config={ROOT}/configs/quickstart.yaml",
        f"--config={ROOT}/configs/strategies/{name}.yaml",
        *SMALL,
    ]
    if is_deepspeed:
        options += ["--trainer.strategy.init_args.engine={reduce_bucket_size: 16384, allgather_bucket_size: 16384}"]
    for metrics, steps in workers.run(2, command, options):
        assert steps == alone[1] == 2
        assert metrics == pytest.approx(alone[0], rel=1e-4)


@pytest.fixture(scope="module")
def options():
    """What three commands say, by name."""
    commands = {
        "printed": ["--config=configs/quickstart.yaml", "--config=configs/strategies/hsdp.yaml",
                    "--trainer.strategy.init_args.preemption=false", "--print_config"],
        "help": ["--trainer.strategy.help=lightning_longnet.strategies.RingSequenceParallelStrategy"],
        "wrong": ["--config=configs/quickstart.yaml", "--config=configs/strategies/ddp.yaml",
                  "--trainer.strategy.init_args.sharding=zero"],
    }  # fmt: skip
    return dict(zip(commands, programs([LONGNET, "fit", *words] for words in commands.values()), strict=True))


@pytest.mark.long
def test_a_printed_configuration_can_be_read_again(tmp_path, options):
    _, first, _ = options["printed"]
    strategy = yaml.safe_load(first)["trainer"]["strategy"]
    assert strategy["class_path"] == "lightning_longnet.strategies.RingSequenceParallelStrategy"
    assert strategy["init_args"]["sharding"] == "hsdp"
    assert strategy["init_args"]["preemption"] is False
    (tmp_path / "printed.yaml").write_text(first)
    ((_, again, error),) = programs([[LONGNET, "fit", f"--config={tmp_path}/printed.yaml", "--print_config"]])
    assert yaml.safe_load(again) == yaml.safe_load(first), error


def test_help_says_what_the_strategy_takes(options):
    text = re.sub(r"\s+", " ", options["help"][1])
    names = ("sequence_parallel_size", "sharding", "exchange", "placement", "accumulate", "timeout", "engine")
    for name in (*names, "preemption"):
        assert f"--trainer.strategy.{name}" in text
    assert "how many ranks share a sequence" in text
    assert "{auto,local,gather,ring,swap}" in text


def test_a_wrong_value_is_reported_with_the_valid_ones(options):
    status, _, error = options["wrong"]
    assert status == 2
    assert "zero" in error
    assert "deepspeed_stage_3" in error


def test_the_stock_registry_says_what_is_wrong_with_a_name():
    with quiet(), pytest.raises(ValueError, match="invalid strategy name"):
        L.Trainer(strategy="ring_sequence_paralel", logger=False)
