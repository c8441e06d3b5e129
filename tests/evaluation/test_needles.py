"""`needle_grid`: right answers by length and depth, and its heat map."""

import pytest
import torch
import torch.nn.functional as F

from lightning_longnet.evaluation.needles import needle_grid

VOCABULARY, ANSWERS = 40, 8


class Memory(torch.nn.Module):
    """A model that continues the last token as it was continued last within `reach` tokens, and guesses token 32."""

    def __init__(self, reach):
        super().__init__()
        self.reach, self.lengths = reach, []

    def forward(self, ids):
        assert not self.training
        self.lengths.append(ids.shape[1])
        (row,) = ids.tolist()
        guess = VOCABULARY - ANSWERS
        for i in range(max(0, len(row) - 1 - self.reach), len(row) - 1):
            if row[i] == row[-1]:
                guess = row[i + 1]
        return F.one_hot(torch.tensor([[guess] * len(row)]), VOCABULARY).double()


def test_an_answer_counts_where_the_model_reaches_it():
    model = Memory(reach=50).train()
    grid = needle_grid(model, (20, 60, 200), VOCABULARY, depths=(0, 0.5, 1), samples=40)
    reached = torch.tensor([[True, True, True], [False, True, True], [False, False, True]])
    assert (grid.accuracy[reached] == 1).all()
    assert grid.accuracy[~reached] == pytest.approx(torch.full((3,), 1 / ANSWERS).numpy(), abs=0.16)
    assert (grid.chance, grid.samples) == (1 / ANSWERS, 40)
    assert set(model.lengths) == {20, 60, 200}
    assert model.training


def test_a_model_of_transformers_is_asked_for_the_last_logits_alone():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).eval()
    shapes = []
    model.lm_head.register_forward_hook(lambda *given: shapes.append(tuple(given[2].shape)))
    with_transformers = needle_grid(model, (12, 30), VOCABULARY, samples=6)
    assert set(shapes) == {(1, 1, VOCABULARY)}

    def plain(ids):
        return model(ids).logits

    assert torch.equal(needle_grid(plain, (12, 30), VOCABULARY, samples=6).accuracy, with_transformers.accuracy)
    other = needle_grid(model, (12, 30), VOCABULARY, samples=6, seed=1)
    assert not torch.equal(other.accuracy, with_transformers.accuracy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answers": 39}, "answers must be from 2 to vocab_size - 2 = 38, got 39"),
        ({"lengths": (8, 3)}, "lengths must be at least 4, got 3"),
        ({"depths": (0.5, 1.5)}, r"depths must be from 0 to 1, got 1\.5"),
        ({"samples": 0}, "samples must be"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        needle_grid(Memory(9), **{"lengths": (8,), "vocab_size": VOCABULARY, **options})


def test_the_heat_map_shows_each_share(tmp_path):
    grid = needle_grid(Memory(50), (20, 60, 200), VOCABULARY, depths=(0, 0.5, 1), samples=4)
    grid.plot(tmp_path / "grid.svg")
    grid.plot(tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "grid.svg").read_text()
