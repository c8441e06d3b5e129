"""`longnet score`, `embed` and `generate` over ranks of a launcher give what one process gives, and say it once."""

import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from safetensors.torch import load_file
from workers import free_port

from lightning_longnet import LongNet, LongNetConfig, Pattern
from lightning_longnet.checkpointing.checkpoints import write_checkpoint
from lightning_longnet.cli import main
from lightning_longnet.evaluation import embedding, half, score_files, stream
from lightning_longnet.evaluation.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*Nothing crosses.*")
KINDS = {
    "decoder": {"pattern": Pattern.dilated((8, 64), (1, 2), is_causal=True)},
    "encoder": {"pattern": Pattern.dilated((8, 64), (1, 2))},
    "curve": {"pattern": Pattern.dilated((8, 64), (1, 2), is_causal=True), "ordering": "hilbert"},
}
# short ones, of which each rank takes some, and long ones, which the ranks share
SIZES = {"0.txt": 3, "1.txt": 40, "2.txt": 5, "3.txt": 7, "4.txt": 1, "5.txt": 30, "6.txt": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    result = tmp_path_factory.mktemp("commands")
    (result / "texts").mkdir()
    (result / "bad").mkdir()
    for name, lines in SIZES.items():
        (result / "texts" / name).write_text("".join(f"{name} \N{EURO SIGN} line {i}\0" for i in range(lines)))
    (result / "texts" / "7.txt").write_text("x" * (3 * 128 + 1))  # of its last block the first rank has no token
    (result / "bad" / "0.txt").write_text("some text\n" * 500)
    (result / "bad" / "1.txt").write_bytes(b"some text\n" * 500 + b"\xff")
    (result / "prompt.txt").write_text("def f(\N{EURO SIGN}):")
    for name, options in KINDS.items():
        torch.manual_seed(2)
        net = LongNet(LongNetConfig(**options, dim=16, layers=2, heads=4))
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        write_checkpoint(net, result / f"{name}.ckpt")
    return result


def run(words, patch):
    """Run a command in small blocks; return its status, stdout and the lines of stderr that no bar wrote."""
    patch.setattr(stream, "_BLOCK", 128)
    patch.setattr(embedding, "SHORT", 200)
    patch.setattr(score_files, "SHORT", 200)
    patch.setattr(half, "_SECONDS", 0.0)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main(words)
        except SystemExit as end:
            status = end.code
        except KeyboardInterrupt:
            status = "interrupted"
    lines = [line for line in err.getvalue().replace("\r", "\n").splitlines() if "longnet: error" in line]
    return status, out.getvalue(), lines


def stopped(patch):
    """Interrupt a run at the second block of the sixth text, which ranks share."""
    encode, blocks = stream.TextStates.encode, []

    def stops(self, ids):
        blocks.append(len(ids))
        if len(blocks) > 1 and blocks[-2:] == [128, 128] and sum(blocks) > 1000:
            raise KeyboardInterrupt
        return encode(self, ids)

    patch.setattr(stream.TextStates, "encode", stops)


def commands(rank, world, folder, ports, every):
    """Run commands as torchrun starts them."""
    os.chdir(folder)
    launched = {"TORCHELASTIC_RUN_ID": "x", "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    result = []
    for port, (words, is_stopped) in zip(ports, every, strict=True):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**launched, "LOCAL_WORLD_SIZE": str(world), "MASTER_PORT": str(port)}.items():
                patch.setenv(name, value)
            if is_stopped:
                stopped(patch)
            result.append(run(words, patch))
    return result


def by_ranks(trainers, folder, every, world=2):
    """Return, for each command, the outcomes of all ranks."""
    ports = [free_port() for _ in every]
    return [*zip(*trainers.run(world, commands, str(folder), ports, every), strict=True)]


def alone(words):
    with pytest.MonkeyPatch.context() as patch:
        return run(words, patch)


@pytest.mark.long
def test_files_are_scored_and_embedded_as_by_one_process(trainers, folder, monkeypatch):
    monkeypatch.chdir(folder)
    embeds = [(k, p) for k in ("decoder", "encoder") for p in ("mean", "last", "tokens")]
    scores = [("decoder", []), ("decoder", ["--documents"]), ("curve", [])]
    shared = ["--dtype", "float64", "--device", "cpu"]

    def words(place):
        by_embed = [
            ["embed", "texts", "--checkpoint", f"{k}.ckpt", "--pooling", p, "--out", f"{place}-{k}-{p}", *shared]
            for k, p in embeds
        ]
        by_score = [
            ["score", "texts", "--checkpoint", f"{k}.ckpt", "--out", f"{place}-{i}", "--plot", f"{place}-{i}.html"]
            for i, (k, _) in enumerate(scores)
        ]
        return by_embed, [[*w, *shared, *options] for w, (_, options) in zip(by_score, scores, strict=True)]

    by_embed, by_score = words("two")
    # a run that is interrupted within a text goes on, on any number of ranks
    by_embed.insert(0, by_embed[0])
    by_score.insert(0, by_score[0])
    stops = [w in (by_embed[0], by_score[0]) and i == 0 for part in (by_embed, by_score) for i, w in enumerate(part)]
    outcomes = by_ranks(trainers, folder, [*zip([*by_embed, *by_score], stops, strict=True)])
    for (first, second), is_stopped in zip(outcomes, stops, strict=True):
        assert (first[0], second[0]) == (("interrupted",) * 2 if is_stopped else (0, 0)), first
        assert second[1:] == ("", [])
        assert first[1] or is_stopped
    for each in [w for part in words("one") for w in part]:
        assert alone(each)[0] == 0
    for kind, pooling in embeds:
        result, expected = load_file(f"two-{kind}-{pooling}"), load_file(f"one-{kind}-{pooling}")
        assert [*result] == [*expected]
        for name, x in expected.items():
            torch.testing.assert_close(result[name], x, rtol=0, atol=1e-9)
    for i in range(len(scores)):
        lines, right = (
            [json.loads(line) for line in (folder / f"{p}-{i}").read_text().splitlines()] for p in ("two", "one")
        )
        assert len(lines) == len(SIZES) + 1
        for line, expected in zip(lines, right, strict=True):
            assert line.pop("file") == expected.pop("file")
            assert line == pytest.approx(expected, rel=1e-9)
        assert (folder / f"two-{i}.html").exists()
    assert outcomes[-1][0][1] == (folder / "two-2").read_text(), "the first rank shows each line once"
    assert not [*folder.glob("*.part"), *folder.glob("*.unfinished"), *folder.glob("*.half*")]


GENERATED = [
    ["--tokens", "150", "--temperature", "0"],
    ["--prompt-file", "prompt.txt", "--tokens", "30", "--top-p", "0.9", "--repetition-penalty", "1.3"],
    ["--tokens", "30", "--cache", "int8", "--stop", "q"],
]
MISTAKES = [
    (["generate", "no.ckpt"], "path must be a checkpoint, got no.ckpt, which does not exist"),
    (["generate", "decoder.ckpt", "--chat"], "--chat needs one process with a terminal, got 2 ranks"),
    (["generate", "decoder.ckpt", "--top-p", "2"], "top_p must be more than 0 and at most 1, got 2.0"),
    (["generate", "encoder.ckpt"], "model must be causal in every layer to go on with a sequence"),
    (
        ["generate", "decoder.ckpt", "--tokns", "3"],
        "no option --tokns, did you mean --tokens?; longnet generate --help",
    ),
    (["score", "bad", "--checkpoint", "decoder.ckpt"], "files must hold text in UTF-8, bad/1.txt does not"),
    (
        ["embed", "texts", "--checkpoint", "decoder.ckpt", "--out", "texts"],
        "--out must be a new file, got texts, which",
    ),
    (["embed", "x", "--checkpoint", "decoder.ckpt", "--out", "y"], "FILE must be"),
    (
        ["embed", "x", "--checkpoint", "decoder.ckpt", "--out", "y", "--device", "cuda:3"],
        "--device must be cpu or cuda",
    ),
]


@pytest.mark.full
def test_texts_are_generated_as_by_one_process_and_mistakes_are_said_once(trainers, folder, monkeypatch):
    monkeypatch.chdir(folder)
    kinds = ["decoder", "decoder", "decoder", "curve"]
    every = [["generate", f"{k}.ckpt", *w] for k, w in zip(kinds, [*GENERATED, GENERATED[0]], strict=True)]
    patched = [(words, False) for words in [*every, *(words for words, _ in MISTAKES)]]
    outcomes = by_ranks(trainers, folder, patched)
    for words, (first, second) in zip(every, outcomes, strict=False):
        assert first == alone(words)
        assert second == (0, "", [])
    for (_, message), (first, second) in zip(MISTAKES, outcomes[len(every) :], strict=True):
        assert (first[0], second) == (2, (2, "", []))
        (line,) = first[2]
        assert message in line


def agreed(group, case):
    ranks = Ranks()
    ranks.group, ranks.size, ranks.rank = group, group.size(), group.rank()

    def fails(on=(1,), message="it is wrong"):
        if ranks.rank in on:
            raise ValueError(message)
        return ranks.rank

    if case == "one":
        ranks.together(fails)
    if case == "all":
        ranks.each(lambda: fails(on=(0, 1, 2)))
    if case == "first":
        ranks.first(lambda: fails(on=(0,)))
    if case == "others":  # which do not call it
        assert ranks.first(lambda: fails(on=(1, 2))) == 0
    if case == "items":
        return [*ranks.shared(fails(on=()) + i for i in range(3))]
    parts = [ranks.joined(torch.arange(n, dtype=torch.bfloat16)[ranks.share(n), None], n).flatten() for n in (1, 3, 8)]
    assert [part.tolist() for part in parts] == [[*range(n)] for n in (1, 3, 8)]
    assert [[*some] for some in ranks.rounds([1, 1, 1, 1, 9, 1, 9], lambda n: n == 1)] == [
        [1, 1, 1],
        [1],
        [9],
        [1],
        [9],
    ]
    assert ranks.summed(torch.tensor([ranks.rank])).tolist() == [3]
    return ranks.each(fails.__defaults__[0].__len__)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("one", "rank 1 of 3: it is wrong"),
        ("all", "it is wrong"),
        ("first", "it is wrong"),
        ("others", [1, 1, 1]),
        ("items", [0, 1, 2]),
    ],
)
def test_ranks_fail_together(pool, case, expected):
    for is_result, value in pool.outcomes(3, agreed, case):
        assert is_result == (not isinstance(expected, str)), value
        assert value == expected if is_result else value[:2] == (ValueError, expected)
