"""`longnet plan`, as a user calls it."""

import json
import re
from pathlib import Path

import pytest
from tiers import tiered

from lightning_longnet import Sparsity
from lightning_longnet.cli import main
from lightning_longnet.cli.configured import read_job
from lightning_longnet.registration import NAMES

# of what Lightning uses of jsonargparse
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
ROOT = Path(__file__).parents[2]
SIZES, STRATEGIES = (
    sorted(path.stem for path in (ROOT / "configs" / folder).glob("*.yaml")) for folder in ("longnet", "strategies")
)
PLAIN = [name for name in STRATEGIES if name not in ("fsdp2_offload", "deepspeed_stage_3", "hsdp")]
QUICKSTART = f"--config={ROOT}/configs/quickstart.yaml"
SMALL = [QUICKSTART, "--device", "h200", "--model.config.layers", "1", "--model.config.dim", "16"]
SHAPE = {"vocab_size": 8, "layers": 1, "pattern": {"branches": [{"segment_length": 16}]}}


def printed(capsys, *words):
    assert main(["plan", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", tiered(SIZES, quick=["125m"], full=["350m", "760m", "2_7b"]))
def test_every_size_is_read(name):
    job = read_job(["--config", f"{ROOT}/configs/longnet/{name}.yaml"], nodes=2, per_node=8)
    assert job.ranks == job.shared_by == 16
    assert job.config.vocab_size == 100352
    assert job.sharding == "fsdp2"
    assert job.precision == "bf16-mixed"
    assert job.tokens == (2**30 if name == "1b_tokens" else 32768)


@pytest.mark.parametrize(
    "path",
    tiered(["LongNetModule", "module.LongNetModule", "training.module.LongNetModule"], quick=["module.LongNetModule"]),
)
def test_the_module_is_known_by_all_its_paths(tmp_path, path):
    model = {"class_path": f"lightning_longnet.{path}", "init_args": {"config": {"dim": 32, "heads": 2, **SHAPE}}}
    data = {"class_path": "lightning_longnet.ByteData", "init_args": {"tokens": 64, "batch_size": 1}}
    config = {"model": model, "data": data, "trainer": {"strategy": "ring_sequence_parallel", "devices": 2}}
    (tmp_path / "model.yaml").write_text(json.dumps(config))
    assert read_job(["--config", str(tmp_path / "model.yaml")]).config.dim == 32


def test_kept_blocks_are_read(tmp_path):
    branch = {"segment_length": 256, "sparsity": {"kind": "strided", "block_size": 4, "sparsity_ratio": 0.5}}
    (tmp_path / "sparse.yaml").write_text(json.dumps({"model": {"config": {"pattern": {"branches": [branch]}}}}))
    (result,) = read_job([QUICKSTART, "--config", str(tmp_path / "sparse.yaml")]).config.pattern.branches
    assert result.sparsity == Sparsity("strided", 4, 0.5)


@pytest.mark.parametrize("name", tiered(STRATEGIES, quick=["fsdp2_offload", "deepspeed_stage_3"], full=PLAIN))
def test_every_strategy_is_laid_over(name):
    job = read_job([QUICKSTART, "--config", f"{ROOT}/configs/strategies/{name}.yaml"])
    assert job.sharding == name
    assert job.sharding in NAMES.values()


@pytest.mark.long
def test_values_are_those_of_the_tables(capsys):
    words = [*SMALL, "--nodes", "2", "--gpus-per-node", "2", "--tokens", "4096"]
    result, shown = json.loads(printed(capsys, *words, "--json")), printed(capsys, *words)
    assert result["ranks"] == 4
    assert result["tokens_of_ranks"] == [1024, 1024]
    assert f"{result['parameters']:,} parameters; 4,096 tokens, 1,024 on each of 4 ranks" in shown
    assert f"{result['tokens_per_second']:,.0f} tokens a second" in shown
    kinds = [value for name, value in result["memory_bytes"].items() if name not in ("phase", "peak")]
    assert sum(kinds) == pytest.approx(result["memory_bytes"]["peak"])
    most = max(each["sent_bytes"] for each in result["layers"][0]["ranks"].values())
    assert re.search(rf"  all +{most / 2**20:.2f} ", shown)
    for name in ("parameters", "gradients", "optimiser", "activations", "loss", "waits for keys"):
        assert f"  {name}" in shown


@pytest.mark.long
def test_what_a_device_is_can_be_given(capsys):
    plain, slow = (
        json.loads(printed(capsys, *SMALL, "--json", *more))
        for more in ([], ["--link-gbps", "0.01", "--memory-gib", "1"])
    )
    assert slow["seconds"]["exchange"] > plain["seconds"]["exchange"]
    assert slow["usable_bytes"] == 0.9 * 2**30
    assert slow["longest_tokens"] < plain["longest_tokens"]
    half = json.loads(printed(capsys, *SMALL, "--json", "--peak-tflops", "500", "--efficiency", "0.5", "0.25"))
    assert half["seconds"]["linear"] == pytest.approx(plain["seconds"]["linear"] * 67 * 0.6 / 250)


@pytest.mark.long
def test_a_peak_is_shown_in_a_unit_that_fits(capsys):
    """That of a CPU is less than a TFLOP/s, which the tables would round to 0.0."""
    words = [*SMALL, "--device", "cpu", "--peak-tflops"]
    assert re.search(r"MFU \d+\.\d% of 23\.4 GFLOP/s;", printed(capsys, *words, "0.02341"))
    assert re.search(r"MFU \d+\.\d% of 1\.0 TFLOP/s;", printed(capsys, *words, "1"))


@pytest.mark.long
def test_pictures_are_drawn(capsys, tmp_path):
    printed(capsys, *SMALL, "--picture", str(tmp_path / "plan.png"))
    printed(capsys, "--scale", "--picture", str(tmp_path / "scale.png"))
    for name in ("plan", "scale"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_a_page_shows_the_scale_as_it_is(capsys):
    assert printed(capsys, "--scale").strip() in (ROOT / "docs/measurements.md").read_text()


def test_a_page_shows_what_the_command_prints(capsys):
    page = (ROOT / "docs/planning.md").read_text()
    command, shown = re.search(r"```\n\$ longnet (plan [^\n]*)\n(.*?)```", page, flags=re.DOTALL).groups()
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in command.split()[1:]]
    assert printed(capsys, *words) == shown


MISTAKES = {
    "nothing": ([], "--config must name a file"),
    "device": ([QUICKSTART, "--device=h900"], "device must be one of cpu, b200"),
    "memory": ([QUICKSTART, "--memory-gib=0"], "memory-gib must be more than 0, got 0"),
    "efficiency": ([QUICKSTART, "--efficiency", "2", "1"], "efficiency must be two shares"),
    "model": (
        ["--config=model.yaml", "--gpus-per-node=1"],
        "model must be a LongNetModule or a CausalLMModule, whose shape is known, got",
    ),
    "strategy": ([QUICKSTART, "--trainer.strategy=fsdp"], "strategy must be one of ring_sequence_parallel"),
    "sizes": ([QUICKSTART, "--nodes=3", "--gpus-per-node=1", "--config", "two.yaml"], "sequence_parallel_size"),
    "swap": ([*SMALL, "--gpus-per-node=8", "--model.config.exchange=swap"], "swap needs key heads that 8 ranks divide"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_reported_in_one_line(capsys, tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    strategy = "lightning_longnet.strategies.RingSequenceParallelStrategy"
    (tmp_path / "two.yaml").write_text(
        f"trainer: {{strategy: {{class_path: {strategy}, init_args: {{sequence_parallel_size: 2}}}}}}\n"
    )
    boring = "lightning.pytorch.demos.boring_classes.Boring"
    (tmp_path / "model.yaml").write_text(
        f"model: {{class_path: {boring}Model}}\ndata: {{class_path: {boring}DataModule}}\n"
    )
    words, message = MISTAKES[mistake]
    assert main(["plan", *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("longnet: error: ")
    assert message in lines[-1]
