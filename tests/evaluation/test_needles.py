"""`needle_grid`: right answers by length and depth, and its heat map."""

import pytest
import torch
import torch.nn.functional as F
from copying_models import copier

from lightning_longnet import LongNet, LongNetConfig, Pattern
from lightning_longnet.data.order import seed_of
from lightning_longnet.data.tokenizers import ByteTokenizer
from lightning_longnet.evaluation import stream
from lightning_longnet.evaluation.needle_rows import NumberInText, TokenAfterMark
from lightning_longnet.evaluation.needles import needle_cell, needle_grid

VOCABULARY, ANSWERS = 40, 8


def generator_of(*row):
    """The generator of a row, of its seed, length, depth and number."""
    return torch.Generator().manual_seed(seed_of("needle", *row))


class Memory(torch.nn.Module):
    """A model that continues the last token as it was continued last within `reach` tokens, and guesses token 0."""

    def __init__(self, reach):
        super().__init__()
        self.reach, self.lengths = reach, []

    def forward(self, ids):
        assert not self.training
        self.lengths.append(ids.shape[1])
        (row,) = ids.tolist()
        guess = 0
        for i in range(max(0, len(row) - 1 - self.reach), len(row) - 1):
            if row[i] == row[-1]:
                guess = row[i + 1]
        return F.one_hot(torch.tensor([[guess] * len(row)]), VOCABULARY).double()


def test_an_answer_counts_where_the_model_reaches_it():
    model = Memory(reach=50).train()
    grid = needle_grid(model, TokenAfterMark(VOCABULARY), (20, 60, 200), depths=(0, 0.5, 1), samples=40)
    reached = torch.tensor([[True, True, True], [False, True, True], [False, False, True]])
    assert (grid.accuracy[reached] == 1).all()
    assert grid.accuracy[~reached] == pytest.approx(torch.full((3,), 1 / ANSWERS).numpy(), abs=0.16)
    assert (grid.chance, grid.samples) == (1 / ANSWERS, 40)
    assert (grid.lengths, grid.depths) == ((20, 60, 200), (0, 0.5, 1))
    assert set(model.lengths) == {20, 60, 200}
    assert model.training


def test_a_number_is_found_by_a_model_that_copies_and_not_beyond_its_window():
    needles, lengths = NumberInText(ByteTokenizer()), (150, 400)
    whole = needle_grid(copier(12), needles, lengths, depths=(0, 1), samples=2)
    assert whole.accuracy.tolist() == [[1, 1], [1, 1]]
    windowed = needle_grid(copier(12, window=140), needles, lengths, depths=(0, 1), samples=2)
    assert windowed.accuracy.tolist() == [[1, 1], [0, 1]]
    losses = [cell.loss for cell in windowed.cells]
    assert max(whole.cells[i].loss for i in range(4)) < 1 < 5 < losses[2], "the number is a surprise there"
    assert windowed.table() == "depth   150   400\n   0%  100%    0%\n 100%  100%  100%"


def test_an_answer_is_right_if_greedy_decoding_gives_it():
    """By a copier that compares too few tokens, and goes on wrongly after some numbers."""
    model, needles, results = copier(2), NumberInText(ByteTokenizer()), []
    for sample in range(6):
        cell = needle_cell(model, needles, 100, 0.5, samples=1, seed=sample)
        row = needles.row(100, 0.5, generator_of(sample, 100, 0.5, 0))
        count = len(row.answer)
        mask = torch.ones(1, len(row.prompt), dtype=torch.long)
        found = model.generate(
            row.prompt[None], attention_mask=mask, min_new_tokens=count, max_new_tokens=count, do_sample=False
        )
        assert (cell.accuracy == 1) == torch.equal(found[0, -count:], row.answer)
        results.append(cell.accuracy)
    assert {0, 1} == set(results)


@pytest.mark.parametrize("ordering", ["raster", "hilbert"])
@pytest.mark.filterwarnings("ignore:Nothing crosses", "ignore:In the branch")
def test_a_longnet_reads_rows_in_blocks(monkeypatch, ordering):
    """The results are those of one forward over the whole row; a curve needs the whole row."""
    torch.manual_seed(3)
    pattern = Pattern.dilated((8, 16), (1, 2), is_causal=True)
    model = LongNet(LongNetConfig(pattern, dim=16, layers=2, heads=4, ordering=ordering)).double().eval()
    needles = NumberInText(ByteTokenizer(), "words of a text, again and again. ")
    seen = []
    monkeypatch.setattr(stream, "_BLOCK", 32)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model computes no logits of whole rows"))
    encode = stream.TextStates.encode
    monkeypatch.setattr(stream.TextStates, "encode", lambda self, ids: seen.append(len(ids)) or encode(self, ids))
    cell = needle_cell(model, needles, 200, 0.5, samples=3)
    assert max(seen) == (32 if ordering == "raster" else 205)
    model._forward_pre_hooks.clear()
    losses = []
    for sample in range(3):
        row = needles.row(200, 0.5, generator_of(0, 200, 0.5, sample))
        with torch.no_grad():
            logits = model(torch.cat([row.prompt, row.answer[:-1]])[None])[0, len(row.prompt) - 1 :]
        losses.append(F.cross_entropy(logits, row.answer))
    assert cell.loss == pytest.approx(float(sum(losses) / 3), rel=1e-12)


def test_a_model_of_transformers_is_asked_for_the_last_logits_alone():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).eval()
    shapes = []
    model.lm_head.register_forward_hook(lambda *given: shapes.append(tuple(given[2].shape)))
    needles = TokenAfterMark(VOCABULARY)
    with_transformers = needle_grid(model, needles, (12, 30), samples=6)
    assert set(shapes) == {(1, 1, VOCABULARY)}

    def plain(ids):
        return model(ids).logits

    assert torch.equal(needle_grid(plain, needles, (12, 30), samples=6).accuracy, with_transformers.accuracy)
    other = needle_grid(model, needles, (12, 30), samples=6, seed=1)
    assert not torch.equal(other.accuracy, with_transformers.accuracy)


@pytest.mark.parametrize("haystack", [None, "A line of a book.\n", "x" * 9000])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_text_has_its_sentence_at_the_depth(haystack, depth):
    needles = NumberInText(ByteTokenizer(), haystack, begin=[1, 2])
    row = needles.row(700, depth, torch.Generator().manual_seed(5))
    prompt, answer = bytes(row.prompt.tolist()), bytes(row.answer.tolist()).decode()
    assert len(prompt) == 700
    assert prompt[:2] == b"\1\2"
    text = prompt[2:].decode()
    begin, end = text.find("\nThe secret number of"), text.rfind("\nThe secret number of")
    assert text[begin:].startswith(f"{text[end:]}{answer}.\n")
    assert begin / (len(text) - len(f"{text[end:]}{answer}.\n") - len(text[end:])) == pytest.approx(depth, abs=0.002)
    again = needles.row(700, depth, torch.Generator().manual_seed(6))
    assert not torch.equal(again.prompt, row.prompt)
    assert len(answer) == 6
    assert answer[1:].isdecimal()


class Joining(ByteTokenizer):
    """A tokenizer of pairs of bytes, which joins the end of a question with the beginning of a number."""

    vocab_size = 2**16

    def encode(self, text):
        whole = text.encode()
        return [int.from_bytes(whole[i : i + 2]) for i in range(0, len(whole), 2)]

    def decode(self, ids):
        return b"".join(i.to_bytes(2 if i > 255 else 1) for i in ids).decode()


def test_a_tokenizer_may_join_the_question_with_the_answer():
    needles = NumberInText(Joining())
    for seed in range(8):
        row = needles.row(300, 0.5, torch.Generator().manual_seed(seed))
        whole = Joining().decode([*row.prompt.tolist(), *row.answer.tolist()])
        number = whole[whole.rfind(" ") + 1 :]
        assert len(number) == 5
        assert whole.count(f" is {number}.\n") == 1
        assert Joining().decode(row.answer.tolist()).strip(" s").endswith(number)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": (8, 3)}, "lengths must be at least 4, got 3"),
        ({"lengths": (8, 9, 8)}, "lengths must be different numbers, got 8, 9, 8"),
        ({"depths": ()}, "depths must be different numbers, got none"),
        ({"depths": (0.5, 1.5)}, r"depths must be from 0 to 1, got 1\.5"),
        ({"samples": 0}, "samples must be"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        needle_grid(Memory(9), **{"needles": TokenAfterMark(VOCABULARY), "lengths": (8,), **options})


def test_rows_and_models_that_do_not_fit_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(ValueError, match="answers must be from 2 to vocab_size - 2 = 38, got 39"):
        TokenAfterMark(VOCABULARY, 39)
    with pytest.raises(ValueError, match=r"lengths must be at least 6\d, the tokens of the sentence"):
        NumberInText(ByteTokenizer()).row(40, 0.5, torch.Generator())
    with pytest.raises(ValueError, match="haystack must hold text, got none"):
        NumberInText(ByteTokenizer(), " \n")
    encoder = LongNet(LongNetConfig(Pattern.dilated((8,), (1,)), dim=16, layers=1, heads=2))
    with pytest.raises(ValueError, match="got an encoder"):
        needle_grid(encoder, TokenAfterMark(256), (20,))
    learned = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=8, n_layer=1, n_head=2))
    needle_grid(learned, TokenAfterMark(VOCABULARY), (32,), samples=1, depths=(0,))
    with pytest.raises(ValueError, match="lengths must be at most 32, the learned positions of this GPT2LMHeadModel"):
        needle_grid(learned, TokenAfterMark(VOCABULARY), (33,))


def test_the_heat_map_shows_each_share(tmp_path):
    grid = needle_grid(Memory(50), TokenAfterMark(VOCABULARY), (20, 60, 200), depths=(0, 0.5, 1), samples=4)
    grid.plot(tmp_path / "grid.svg")
    grid.plot(tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "grid.svg").read_text()
