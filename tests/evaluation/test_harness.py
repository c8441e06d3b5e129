"""The model of lm-evaluation-harness: log-likelihoods and texts by the harness, against plain forwards."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml

from lightning_longnet import LongNet, LongNetConfig, Pattern, load_model
from lightning_longnet.checkpointing.checkpoints import write_checkpoint
from lightning_longnet.cli import main
from lightning_longnet.evaluation import stream

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Nothing crosses", "ignore:In the branch"),
]
DOCUMENTS = [
    {"question": "One and one are", "answers": [" two", " three and more"], "right": 0},
    {"question": "A \N{EURO SIGN} is", "answers": [" money", " a fish", " x"], "right": 1},
    {"question": "Rain falls from", "answers": [" clouds", " stones"], "right": 0},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with checkpoints, and tasks with their data."""
    result = tmp_path_factory.mktemp("harness")
    for name, pattern in (("decoder", Pattern.dilated((8, 512), (1, 2), is_causal=True)), ("encoder", Pattern.dense())):
        torch.manual_seed(4)
        model = LongNet(LongNetConfig(pattern, dim=16, layers=2, heads=4, tied_embeddings=False))
        torch.nn.init.normal_(model.head.weight, std=0.5)
        write_checkpoint(model, result / f"{name}.ckpt")
    (result / "tasks").mkdir()
    (result / "tasks/documents.jsonl").write_text("".join(json.dumps(each) + "\n" for each in DOCUMENTS))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(result / "tasks/documents.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    metrics = {"metric_list": [{"metric": "acc"}]}
    tasks = {
        "tiny_choice": metrics
        | {"output_type": "multiple_choice", "doc_to_choice": "{{answers}}", "doc_to_target": "{{right}}"},
        "tiny_rolling": {"output_type": "loglikelihood_rolling", "doc_to_target": "{{question}}", "doc_to_text": ""}
        | {"metric_list": [{"metric": "bits_per_byte"}]},
        "tiny_generation": {"output_type": "generate_until", "doc_to_target": "{{answers[0]}}"}
        | {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 9, "do_sample": False}}
        | {"metric_list": [{"metric": "exact_match"}]},
    }
    for name, task in tasks.items():
        (result / f"tasks/{name}.yaml").write_text(yaml.safe_dump(shared | {"task": name} | task))
    return result


@pytest.fixture(scope="module")
def plain(folder):
    return load_model(folder / "decoder.ckpt").double()


def model_of(folder, **options):
    from lightning_longnet.evaluation.harness import LongNetLM

    return LongNetLM(str(folder / "decoder.ckpt"), dtype="float64", device="cpu", **options)


def requests(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


def likelihood(plain, before, after):
    """Return the log-likelihood of `after`, and whether each token of it is the likeliest."""
    ids = torch.tensor([before + after])
    with torch.no_grad():
        logits = plain(ids)[0, len(before) - 1 : -1]
    expected = -F.cross_entropy(logits, torch.tensor(after), reduction="sum")
    return float(expected), bool((logits.argmax(1) == torch.tensor(after)).all())


PAIRS = [("A text", " goes on"), ("", "alone"), ("A much longer text \N{EURO SIGN} that", " goes on too"), ("x", "y")]


@pytest.mark.parametrize("block", [16384, 8])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_log_likelihoods(folder, plain, monkeypatch, block, batch_size):
    monkeypatch.setattr(stream, "_BLOCK", block)
    result = model_of(folder, batch_size=batch_size).loglikelihood(requests(*PAIRS), disable_tqdm=True)
    for (before, after), (value, is_greedy) in zip(PAIRS, result, strict=True):
        right, is_likeliest = likelihood(plain, [*before.encode()] or [0], [*after.encode()])
        assert value == pytest.approx(right, rel=1e-10)
        assert is_greedy == is_likeliest


def likeliest(plain, ids, count):
    """Return the likeliest `count` tokens after others."""
    ids = [*ids]
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(plain(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-count:]


def test_the_likeliest_continuation_is_greedy(folder, plain):
    context = [*b"A text"]
    tokens = likeliest(plain, context, 4)
    other = [*tokens[:3], (tokens[3] + 1) % 256]
    rows = [(None, context, tokens), (None, context, other)]
    result = model_of(folder, batch_size=2)._loglikelihood_tokens(rows, disable_tqdm=True)
    assert [is_greedy for _, is_greedy in result] == [True, False]


@pytest.mark.parametrize("max_length", [None, 7])
def test_rolling_log_likelihoods(folder, plain, max_length):
    text = "A text of more than a few tokens"
    model = model_of(folder, max_length=max_length)
    result = model.loglikelihood_rolling(requests((text,), ("",)), disable_tqdm=True)
    ids = [*text.encode()]
    size = max_length or len(ids)
    expected = 0.0
    for begin in range(0, len(ids), size):  # the last window has the context that there is room for
        after = ids[begin : begin + size]
        before = [0, *ids][max(0, begin + len(after) - size) : begin + 1]
        expected += likelihood(plain, before, after)[0]
    assert result == [pytest.approx(expected, rel=1e-10), 0.0]


def test_a_context_is_cut_on_its_left(folder, plain):
    result = model_of(folder, max_length=10).loglikelihood(requests(("A context", " goes on")), disable_tqdm=True)
    whole = [*b"A context goes on"]
    right, _ = likelihood(plain, whole[-11:-8], whole[-8:])
    assert result[0][0] == pytest.approx(right, rel=1e-10)


@pytest.mark.parametrize("block", [16384, 8])
def test_texts_are_the_likeliest_until_a_stop(folder, plain, monkeypatch, block):
    monkeypatch.setattr(stream, "_BLOCK", block)
    context = "A text of more than a block"
    new = likeliest(plain, context.encode(), 20)
    expected = bytes(new[: new.index(0)] if 0 in new else new).decode(errors="replace")
    model = model_of(folder)
    stop = expected[5:7]
    asked = [{"until": [], "max_gen_toks": 20}, {"until": [stop, "never"], "max_gen_toks": 20}]
    result = model.generate_until(requests(*((context, each) for each in asked)), disable_tqdm=True)
    assert result == [expected, expected[: expected.index(stop)]]


def test_samples_follow_the_seed(folder):
    asked = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "top_k": 30}
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts += model_of(folder).generate_until(requests(("A text", dict(asked))), disable_tqdm=True)
    assert texts[0] == texts[1] != texts[2]


def test_refusals(folder):
    with pytest.raises(ValueError, match="batch_size must be a positive integer, got 'auto'"):
        model_of(folder, batch_size="auto")
    with pytest.raises(ValueError, match="max_length must be at least the 8 tokens of a continuation, got 7"):
        model_of(folder, max_length=7).loglikelihood(requests(("A context", " goes on")), disable_tqdm=True)
    with pytest.raises(ValueError, match="max_length must be more than max_gen_toks, 256, got 7"):
        model_of(folder, max_length=7).generate_until(requests(("A context", {"until": []})), disable_tqdm=True)
    asked = {"do_sample": True, "temperature": 1.0, "top_p": 0.5}
    with pytest.raises(ValueError, match=r"generation_kwargs of sampling must be .*, got top_p"):
        model_of(folder).generate_until(requests(("A context", asked)), disable_tqdm=True)


def test_the_command_runs_tasks(folder, plain, tmp_path):
    words = ["--model", "longnet", "--model_args", f"checkpoint={folder}/decoder.ckpt,dtype=float64"]
    words += ["--tasks", "tiny_choice,tiny_rolling,tiny_generation", "--include_path", f"{folder}/tasks"]
    words += ["--output_path", f"{tmp_path}/results.json", "--log_samples", "--batch_size", "2"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-m", "lightning_longnet", "lm_eval", *words]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170)
    assert ended.returncode == 0, ended.stderr[-3000:]
    (path,) = tmp_path.glob("results*.json")
    results = json.loads(path.read_text())["results"]
    chosen = []
    for each in DOCUMENTS:
        result = [likelihood(plain, [*each["question"].encode()], [*answer.encode()])[0] for answer in each["answers"]]
        chosen.append(result.index(max(result)) == each["right"])
    assert results["tiny_choice"]["acc,none"] == pytest.approx(sum(chosen) / len(chosen))
    texts = [each["question"].encode() for each in DOCUMENTS]
    nats = sum(likelihood(plain, [0], [*text])[0] for text in texts)
    expected = -nats / sum(map(len, texts)) / torch.log(torch.tensor(2.0, dtype=torch.float64)).item()
    assert results["tiny_rolling"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-9)
    (samples,) = tmp_path.glob("samples_tiny_generation*.jsonl")
    answers = [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]
    model = model_of(folder)
    asked = {"until": ["\n"], "max_gen_toks": 9, "do_sample": False}
    contexts = [(each["question"], dict(asked)) for each in DOCUMENTS]
    assert answers == model.generate_until(requests(*contexts), disable_tqdm=True)


@pytest.mark.full
def test_mistakes_are_one_line(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["longnet"])
    words = ["--model", "longnet", "--model_args", f"checkpoint={folder}/encoder.ckpt", "--tasks", "tiny_choice"]
    assert main(["lm_eval", *words, "--include_path", f"{folder}/tasks"]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("longnet: error: checkpoint must be of a decoder, whose pattern is causal in every layer")
    )
