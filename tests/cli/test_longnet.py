"""The command line, as a newcomer meets it: what it tells, how soon, and what it says of mistakes."""

import json
import pickle
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from time import perf_counter

import pytest
import torch
from programs import LONGNET, programs
from tiers import tiered

import lightning_longnet
from lightning_longnet import LongNet, LongNetConfig, Pattern
from lightning_longnet.checkpointing.checkpoints import write_checkpoint
from lightning_longnet.cli import COMMANDS, TRAINER_COMMANDS, main
from lightning_longnet.cli.trainer import is_saved

ROOT = Path(__file__).parents[2]
QUICKSTART = f"--config={ROOT}/configs/quickstart.yaml"
SMALL = [
    *("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=2"),
    *("--trainer.devices=1", "--trainer.strategy=auto", "--trainer.logger=false", "--trainer.callbacks=null"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false"),
    *("--model.config.dim=16", "--model.config.layers=1", "--data.tokens=301", "--data.megabytes=0.05"),
]


def run(*words, code=None):
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "lightning_longnet", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_help_comes_at_once_and_names_every_command():
    begin = perf_counter()
    result = run("--help")
    assert perf_counter() - begin < 2
    assert result.returncode == 0
    for name in (*TRAINER_COMMANDS, *COMMANDS):
        assert f"  {name} " in result.stdout
    assert run().stdout == result.stdout, "no word at all is a question, too"


def test_helps_of_commands_load_no_torch():
    code = (
        "import sys\n"
        "from lightning_longnet.cli import COMMANDS, main\n"
        "for name in COMMANDS:\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit as ended: assert ended.code == 0\n"
        "print('loaded', {'torch', 'lightning', 'transformers'} & set(sys.modules))"
    )
    result = run(code=code)
    assert result.stdout.strip().endswith("loaded set()"), result.stdout + result.stderr
    for name in COMMANDS:
        assert f"usage: longnet {name}" in result.stdout


MISTAKES = {
    "nothing to train": (["fit"], "fit needs a configuration: longnet fit --config FILE; longnet init FOLDER wr"),
    "nothing to score": (["test"], "test needs a configuration: longnet test --config FILE --ckpt_path FILE; longnet "),
    "nothing to plan": (["plan"], "--config must name a file, as of longnet fit: longnet plan --config quickstart"),
    "no whole number": (["plan", QUICKSTART, "--tokens=1.5"], "--tokens: must be a whole number, got '1.5'"),
    "too many tokens": (["plan", QUICKSTART, "--tokens=1e12"],
                        "tokens must be at most 1,073,741,824 on a rank in a plan, got 500,000,000,000 on each of 2"),
    "kind of picture": (["plan", QUICKSTART, "--picture=a.xyz"], r"must be a file that ends with one of \.png, .*a\.x"),
    "folder of a picture": (["plan", QUICKSTART, "--picture=b/a.png"], "--picture must be in a folder that exists"),
    "file for a folder": (["tokenize", "key.yaml", "--out=key.yaml"], "--out must be a folder, or a new name, got key"),
    "command": (["fitt"], r"no command 'fitt', did you mean fit\?; there are fit, validate"),
    "word of a command": (["generate"], r"longnet generate needs checkpoint: longnet generate last\.ckpt --prompt"),
    "number": (["generate", "a.ckpt", "--tokens=many"], "argument --tokens: must be a whole number, got 'many'"),
    "swapped letters": (["fti"], r"no command 'fti', did you mean fit\?; there are fit, validate"),
    "no such command": (["xyz"], "no command 'xyz'; there are fit, validate"),
    "option of a command": (["generate", "a.ckpt", "--promt=x"], r"no option --promt, did you mean --prompt\?"),
    "one word too many": (["report", "empty", "--no-images", "-x"], "no option -x"),
    "option of plan": (["plan", QUICKSTART, "--nods=3"], r"no option --nods, did you mean --nodes\?"),
    "file of plan": (["plan", "some.yaml"], r"must name a file, .*; did you mean --config some\.yaml\?"),
    "backend": (["doctor", "--ranks=999", "--backend=nccl"], "--backend nccl needs a torch with NCCL and a GPU"),
    "folder of a run": (["generate", "run"], r"did you mean run/version_0/checkpoints/last\.ckpt\?"),
    "folder of runs": (["report", "."], r"run_dirs must hold .* got \.; did you mean run\?"),
    "missing file": (["fit", "--config=nowhere.yaml"], "File does not exist: .*nowhere.yaml"),
    "option": (["fit", QUICKSTART, "--trainer.max_stepz=2"],
               r"no option --trainer\.max_stepz; did you mean --trainer\.max_steps\?"),
    "key": (["fit", QUICKSTART, "--config=key.yaml"],
            r"no option trainer\.max_stepz in key\.yaml; did you mean trainer\.max_steps\?"),
    "key of the model": (["fit", QUICKSTART, "--model.config.layrs=2"],
                         r"no option --model\.config\.layrs; did you mean --model\.config\.layers\?"),
    "key of a branch": (["fit", QUICKSTART, "--config=branch.yaml"],
                        r"model\.config\.pattern\.branches\.segment_lenght in branch\.yaml.*\.segment_length\?"),
    "value": (["fit", QUICKSTART, "--model.config.dim=many"], r"--model\.config\.dim: expected an int, got many"),
    "no YAML": (["fit", QUICKSTART, "--config=broken.yaml"], r"broken\.yaml must be YAML: .* line 2, column 1"),
    "no options": (["fit", QUICKSTART, "--config=list.yaml"], r"list\.yaml must hold options such as .* got a list"),
    "no text": (["fit", QUICKSTART, "--config=bytes.yaml"], r"bytes\.yaml must be YAML: 'utf-8' codec"),
    "one value": (["fit", QUICKSTART, "--config=three.yaml"], r"trainer in three\.yaml must hold options, got 3"),
    "key of another": (["fit", QUICKSTART, "--model.config.dim=8", "--config=flat.yaml"], r"no option dim in flat\.ya"),
    "value in a file": (["fit", QUICKSTART, "--trainer.max_steps=3", "--config=half.yaml"],
                        r"trainer\.max_steps in half\.yaml: expected an int, got 2\.5"),
    "file": (["fit", "some.yaml"], r"unrecognized arguments: some\.yaml; did you mean --config some\.yaml\?"),
    "one dash": (["fit", "-model.config.dim=3"], r"-model\.config\.dim=3; did you mean --model\.config\.dim=3\?"),
    "word for a pattern": (["fit", QUICKSTART, "--model.config.pattern=window"],
                           r"pattern: .* got window; a pattern looks like {branches: "),
    "list for a pattern": (["fit", QUICKSTART, "--model.config.pattern=[1, 2]"],
                           r"pattern: expected the arguments of a Pattern, got \[1, 2\]; a pattern looks like"),
    "argument": (["fit", QUICKSTART, "--data=lightning_longnet.TokenFileData"], "--data.path must be given"),
    "class of ours": (["fit", QUICKSTART, "--data=HubDatta"], r"got HubDatta; did you mean lightning_longnet\.HubData"),
    "arguments of a name": (["fit", QUICKSTART, "--trainer.strategy.sharding=ddp"],
                            r"arguments of a strategy need its class, such as .*, got the name ring_sequence_p"),
    "devices": (["fit", QUICKSTART, *SMALL, "--trainer.devices=many"], "should be an int > 0"),
    "class": (["fit", QUICKSTART, "--data.class_path=ByteDatta"], r"--data: .*ByteDatta; did you mean ByteData\?"),
    "class of a module": (["fit", QUICKSTART, "--trainer.callbacks+=lightning_longnet.callbacks.FitSumary"],
                          r"--trainer\.callbacks: module .* no attribute 'FitSumary'.* did you mean .*FitSummary\?"),
    "class of the model": (["fit", QUICKSTART, "--model=lightning_longnet.LongNetModul"],
                           r"model must be .*'LongNetModul'; did you mean lightning_longnet\.LongNetModule\?"),
    "name of a model": (["fit", QUICKSTART, "--model=LongNetModul"], "got 'LongNetModul'; did you mean LongNetModule?"),
    "no model": (["fit", QUICKSTART, "--model=torch.nn.Linear"], "the path of a LightningModule, got 'torch.nn"),
    "pattern": (["fit", "--data=lightning_longnet.ByteData"],
                "--model.config.pattern must be given: which keys .*--model.config.pattern='{branches: "),
    "data": (["fit", QUICKSTART, *SMALL, "--data.paths=nowhere"], "paths must be files or folders that are there, now"),
    "empty": (["fit", QUICKSTART, *SMALL, "--data.paths=empty"], r"\*.py.*/empty$"),
    "length": (["fit", QUICKSTART, *SMALL, "--data.tokens=10000000"], "tokens must be .* got 10,000,000"),
    "length with a suffix": (["fit", QUICKSTART, *SMALL, "--data.tokens", "16M"], "tokens must be .* got 16,777,216"),
    "vocabulary": (["fit", QUICKSTART, *SMALL, "--model.config.vocab_size=200"], "at least that of the data, 256, got"),
    "heads": (["fit", QUICKSTART, *SMALL, "--model.config.heads=3"], "heads must divide dim, got heads 3 and dim 16"),
    "endless": (["fit", QUICKSTART, *SMALL, "--trainer.max_steps=-1", "--trainer.max_epochs=-1"], "max_steps or max"),
    "resumed": (["fit", QUICKSTART, *SMALL, "--ckpt_path=no.ckpt"], "ckpt_path must be a checkpoint, got no.ckpt"),
    "a text": (["fit", QUICKSTART, *SMALL, "--ckpt_path=key.yaml"], "got key.yaml, which is something else"),
    "another engine's": (["fit", QUICKSTART, *SMALL, "--ckpt_path=empty"], "reads, a file, got the folder .*empty"),
    "weights alone": (["fit", QUICKSTART, *SMALL, "--ckpt_path=w.ckpt"], "checkpoint contains only the model"),
    "braces": (["fit", QUICKSTART, *SMALL, "--trainer.callbacks=lightning_longnet.callbacks.FitSummary",
                "--trainer.callbacks.next=try {this}"], "next must hold no braces but {checkpoint} and {run}"),
    "strategy": (["fit", QUICKSTART, *SMALL, "--trainer.strategy=ring_sequence_paralel"],
                 r"'ring_sequence_paralel'; did you mean ring_sequence_parallel\? There are ring_sequence_parallel, "
                 "alone or with one of _ddp, _fsdp2, .*_deepspeed_stage_3_offload after it"),
    "objects": (["fit", QUICKSTART, *SMALL, "--ckpt_path=objects.ckpt"],
                r"ckpt_path must be .* got objects\.ckpt, which holds objects of argparse\.Namespace"),
    "a pickle": (["fit", QUICKSTART, *SMALL, "--ckpt_path=pickle.ckpt"], "got pickle.ckpt, which is something else"),
    "a list": (["fit", QUICKSTART, *SMALL, "--ckpt_path=list.ckpt"], "which holds a state_dict, got list.ckpt"),
    "objects in a checkpoint": (["generate", "objects.ckpt"], r"got objects\.ckpt, which holds objects of argparse"),
    "device": (["fit", QUICKSTART, *SMALL, "--trainer.accelerator=gpu"], "No supported gpu backend found"),
    "checkpoint": (["generate", "nowhere.ckpt"], "nowhere.ckpt, which does not exist"),
    "prompt": (["generate", "a.ckpt", "--prompt="], "--prompt must hold at least one token"),
    "other model": (["fit", QUICKSTART, *SMALL, "--model.config.vocab_size=300", "--ckpt_path=a.ckpt"],
                    "the checkpoint's model has vocab_size 256, and config.vocab_size is 300"),
}  # fmt: skip
# other mistakes have the same reason or form of message
ALIKE = {
    *("key of the model", "key of a branch", "no options", "no text", "one value", "value in a file", "class of ours"),
    *("list for a pattern", "class of a module", "name of a model", "length with a suffix", "empty", "a text"),
    *("braces", "a pickle", "a list", "objects in a checkpoint", "vocabulary", "devices", "file of plan"),
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, request):
    """(status, stdout, stderr) of each command, in a folder of their own."""
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "empty").mkdir()
    (folder / "key.yaml").write_text("trainer: {max_stepz: 3}\n")
    (folder / "branch.yaml").write_text("model: {config: {pattern: {branches: [{segment_lenght: 3}]}}}\n")
    (folder / "run/version_0/checkpoints").mkdir(parents=True)
    (folder / "run/version_0/checkpoints/last.ckpt").touch()
    (folder / "list.yaml").write_text("[1, 2]\n")
    (folder / "bytes.yaml").write_bytes(b"\xf7\x00")
    (folder / "three.yaml").write_text("trainer: 3\n")
    (folder / "flat.yaml").write_text("dim: 3\n")
    (folder / "half.yaml").write_text("trainer: {max_steps: 2.5}\n")
    (folder / "broken.yaml").write_text("trainer: [\n")
    torch.save({"state_dict": {}, "options": Namespace()}, folder / "objects.ckpt")
    torch.save([], folder / "list.ckpt")
    (folder / "pickle.ckpt").write_bytes(pickle.dumps({"state_dict": {}}))
    config = LongNetConfig(Pattern.window(8, is_causal=True), dim=16, layers=1, heads=4)
    write_checkpoint(LongNet(config), folder / "w.ckpt")
    saving = ["--trainer.enable_checkpointing=true", "--trainer.callbacks+=ModelCheckpoint"]
    saving += ["--trainer.callbacks.dirpath=.", "--trainer.callbacks.filename=a"]
    generate = ["generate", "a.ckpt", "--prompt=def ", "--tokens=12"]
    # first of all, as what a process asks of its machine once is then asked among fake tensors
    commands = {"plan": ["plan", QUICKSTART, "--device", "cpu"]}
    commands |= {"fit": ["fit", QUICKSTART, *SMALL, *saving], "text": generate, "again": generate}
    predict = ["predict", QUICKSTART, *SMALL, "--ckpt_path=a.ckpt", "--model.generated_tokens=5"]
    predict += ["--trainer.limit_predict_batches=2", "--trainer.default_root_dir=predicted"]
    evaluated = [QUICKSTART, *SMALL]
    commands |= {"untrained": ["validate", *evaluated], "trained": ["validate", *evaluated, "--ckpt_path=a.ckpt"]}
    commands |= {"initialised": ["test", *evaluated, "--model.weights=a.ckpt"]}
    commands |= {"named": ["fit", QUICKSTART, "--model=LongNetModule", "--print_config"]}
    commands |= {"other": [*generate, "--seed=1"], "version": ["--version"], "predict": predict}
    reported = [item for item in request.session.items if item.name.startswith("test_a_mistake_is_reported")]
    commands |= {name: MISTAKES[name][0] for name in (item.callspec.params["name"] for item in reported)}
    result = programs([[LONGNET, *words] for words in commands.values()], folder)
    written = (folder / "predicted/predictions-0.jsonl").read_text().splitlines()
    return dict(zip(commands, result, strict=True)) | {"written": [json.loads(line) for line in written]}


@pytest.mark.parametrize("name", tiered(MISTAKES, quick=[name for name in MISTAKES if name not in ALIKE], long=[]))
def test_a_mistake_is_reported_in_a_line(outputs, name):
    status, _, shown = outputs[name]
    assert status == 2, shown
    (line,) = [line for line in shown.splitlines() if line.startswith("longnet: error:")]
    assert re.search(MISTAKES[name][1], line), shown
    assert shown.splitlines()[-1] == line, "it is the last thing that is seen"
    assert len(line) < 400
    assert "torch.load" not in shown, "advice of torch that would run what a file holds"


def test_a_plan_may_be_the_first_command_of_a_process(outputs):
    status, shown, error = outputs["plan"]
    assert status == 0, error
    assert "tokens a second" in shown


def test_files_of_torchs_old_format_are_checkpoints(tmp_path):
    torch.save({}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    torch.save({}, tmp_path / "new.ckpt")
    (tmp_path / "text").write_text("PK")
    assert [is_saved(tmp_path / name) for name in ("old.ckpt", "new.ckpt", "text")] == [True, True, False]


def test_the_weights_that_are_scored_are_named(outputs):
    lines = {name: outputs[name][2].splitlines() for name in ("untrained", "trained", "initialised")}
    warnings = {name: [x for x in given if x.startswith("longnet: warning:")] for name, given in lines.items()}
    assert [outputs[name][0] for name in lines] == [0, 0, 0]
    assert (warnings["trained"], warnings["initialised"]) == ([], [])
    assert (
        "no --ckpt_path, so longnet validate uses the weights that the model is made with" in warnings["untrained"][0]
    )
    assert lines["untrained"][-1] == warnings["untrained"][-1], "it is the last thing that is seen"


def test_the_default_model_may_be_named(outputs):
    status, shown, error = outputs["named"]
    assert status == 0, error
    assert "class_path: lightning_longnet.LongNetModule" in shown
    assert "dim: 128" in shown


def test_from_training_to_text(outputs):
    for name in ("fit", "text", "again", "other"):
        assert outputs[name][0] == 0, outputs[name][2]
    assert outputs["text"][1].startswith("def ")
    assert outputs["again"][1] == outputs["text"][1], "the same seed draws the same text"
    assert outputs["other"][1] != outputs["text"][1]
    assert outputs["predict"][0] == 0, outputs["predict"][2]
    assert [row["sample"] for row in outputs["written"]] == [0, 1]
    assert all(len(row["text"].encode()) >= 301 for row in outputs["written"])
    assert outputs["version"][1].strip() == lightning_longnet.__version__


def test_an_error_of_a_rank_is_reported_once(monkeypatch, capsys):
    error = ValueError("tokens must be\n more")
    error.add_note("rank 1 of 2, in load of step 0: ValueError: tokens must be more")
    error.add_note("rank 1 of 2, in load of step 0: ValueError: tokens must be more; before it, rank 0 of 2")

    def broken(*_):
        raise error

    monkeypatch.setattr("lightning_longnet.cli.run_command", broken)
    monkeypatch.setattr("lightning_longnet.cli._user_error", lambda result: result)
    assert main(["generate"]) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert (first, second) == ("longnet: error: tokens must be", " more (rank 1 of 2, in load of step 0)")
    assert third.endswith("; before it, rank 0 of 2")


def test_a_fault_that_is_not_the_users_keeps_its_trace(monkeypatch):
    def broken(*_):
        [].index(3)  # a ValueError from elsewhere

    monkeypatch.setattr("lightning_longnet.cli.run_command", broken)
    with pytest.raises(ValueError, match="3 is not in list"):
        main(["generate"])
