"""Prompts of unequal length in one batch are continued as each is alone, whatever side their padding is on."""

import lightning as L
import pytest
import torch
from test_decoder_module import module
from tiers import tiered
from torch.utils.data import DataLoader

from lightning_longnet import LongNetConfig, LongNetModule, Pattern, dilate

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:.*(num_workers|Nothing crosses|srun|LeafSpec).*"
)
LENGTHS, COLUMNS, TOKENS = (9, 4, 1), 11, 5
SIDES = ("left", "right", "both")
KINDS = ["llama", "qwen3", "gemma2", "phi3", "mixtral", "glm", "dilated llama"]


def padded(side, token=0):
    """Three prompts in 11 columns, and their mask; no row is full."""
    ids = torch.randint(3, 61, (3, COLUMNS), generator=torch.Generator().manual_seed(7))
    begins = [{"left": COLUMNS - n, "right": 0, "both": (COLUMNS - n) // 2}[side] for n in LENGTHS]
    places = torch.arange(COLUMNS)
    mask = torch.stack([(places >= a) & (places < a + n) for a, n in zip(begins, LENGTHS, strict=True)]).long()
    return ids.masked_fill(mask == 0, token), mask


def made(kind, **options):
    net = module(kind.removeprefix("dilated "), generated_tokens=TOKENS, temperature=0, **options)
    if kind.startswith("dilated"):
        dilate(net.model, Pattern.dilated((4, 8), (1, 2), is_causal=True))
    with torch.no_grad():
        for name, parameter in net.model.named_parameters():
            if "proj" in name:
                parameter.mul_(10)  # attention that decides what the next token is
    return net


def with_logits(net, ids, mask=None):
    """The tokens that follow, and the logits (B, tokens, vocabulary) that they were taken from."""
    result = []
    hook = net.model.get_output_embeddings().register_forward_hook(lambda *args: result.append(args[2][:, -1]))
    tokens = net.generate(ids, TOKENS, 0.0) if mask is None else net.generate(ids, TOKENS, 0.0, attention_mask=mask)
    hook.remove()
    return tokens[:, ids.shape[1] :], torch.stack(result, 1)


@pytest.mark.parametrize("kind", tiered(KINDS, quick=["llama", "dilated llama"]))
def test_padded_prompts_are_continued_as_each_alone(kind):
    net = made(kind)
    for side in SIDES:
        ids, mask = padded(side)
        tokens, logits = with_logits(net, ids, mask)
        for row, (prompt, is_token) in enumerate(zip(ids, mask, strict=True)):
            alone, expected = with_logits(net, prompt[is_token == 1][None])
            assert tokens[row].tolist() == alone[0].tolist(), (side, row)
            torch.testing.assert_close(logits[row], expected[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", SIDES)
def test_predict_reads_the_mask_of_a_batch(side):
    net = made("llama")
    ids, mask = padded(side)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    loader = DataLoader([{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)], 3)
    (result,) = trainer.predict(net, loader)
    assert result[:, :COLUMNS].tolist() == ids.tolist()
    for row, (prompt, is_token) in enumerate(zip(ids, mask, strict=True)):
        assert result[row, COLUMNS:].tolist() == net.generate(prompt[is_token == 1][None], TOKENS, 0)[0, -5:].tolist()


def test_a_penalty_of_repetition_does_not_count_padding():
    net = made("llama")
    net.model.generation_config.repetition_penalty = 50.0
    alone = [net.generate(row[m == 1][None], TOKENS, 0)[0, -TOKENS:] for row, m in zip(*padded("right"), strict=True)]
    ids, mask = padded("right", int(alone[2][0]))  # the padding is the token that one row wants
    assert net.generate(ids, TOKENS, 0, attention_mask=mask)[:, COLUMNS:].tolist() == torch.stack(alone).tolist()


def test_prompts_that_padding_would_change_are_refused():
    ids, mask = padded("left")
    with pytest.raises(ValueError, match="eager attention returns NaN for padding in float64"):
        made("llama", attention="eager").generate(ids, 2, attention_mask=mask)
    net = made("llama")
    net.model.generation_config.no_repeat_ngram_size = 2
    with pytest.raises(ValueError, match="no_repeat_ngram_size of the generation config would count padding"):
        net.generate(ids, 2, attention_mask=mask)
    net = made("llama")
    net.model.model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(ValueError, match="chooses its frequencies by the longest row"):
        net.generate(ids, 2, attention_mask=mask)
    for wrong, message in (
        (mask[:, 1:], r"attention_mask must be \(3, 11\) as input_ids, got shape \(3, 10\)"),
        (mask * 2, "attention_mask must be 1 where a token is and 0 where padding is"),
        (mask * (torch.arange(3) != 1)[:, None], "at least one token in each row, got none in row 1"),
    ):
        with pytest.raises(ValueError, match=message):
            net.generate(ids, 2, attention_mask=wrong)


CONFIG = LongNetConfig(Pattern.dilated((4, 16), (1, 2), is_causal=True), vocab_size=61, dim=16, layers=2, heads=4)


@pytest.mark.parametrize("side", SIDES)
def test_a_longnet_module_reads_the_mask_of_a_batch(side):
    torch.manual_seed(2)
    net = LongNetModule(CONFIG, generated_tokens=TOKENS, temperature=0).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ids, mask = padded(side)
    result = net.predict_step({"input_ids": ids, "attention_mask": mask}, 0)
    for row, (prompt, is_token) in enumerate(zip(ids, mask, strict=True)):
        assert result[row, COLUMNS:].tolist() == net.generate(prompt[is_token == 1][None], TOKENS, 0)[0, -5:].tolist()


ROWS = {"input_ids": torch.arange(12).view(2, 6) + 3}
TWO = torch.tensor([[0] * 6, [4, 4, 4, 5, 5, 5]])
ONE_PADDED = {"documents": torch.tensor([[0] * 6, [4, 4, 5, 5, 6, 6]]), "attention_mask": (TWO == 0) | (TWO == 5)}
RESTARTED = torch.tensor([0, 1, 2, 0, 1, 2])
MASKED = {"documents": TWO, "attention_mask": TWO != 4, "positions": RESTARTED}
REFUSED = [
    ({"documents": TWO}, "documents must be the same in all tokens of a row .*, got 4 and 5 in row 1: give rows"),
    (MASKED, "positions must count .*, got 0 at token 3 of row 0"),
    ({"positions": torch.arange(6) + 1}, "positions must count the tokens of .* from 0, .* got 1 at token 0 of row 0"),
    ({"position_ids": RESTARTED[None]}, "position_ids must count .*, got 0 at token 3 of row 0: give rows that hold"),
    ({"documents": TWO[:, 1:]}, r"documents must be \(B, N\), \(2, 6\) as input_ids, got shape \(2, 5\)"),
    (ONE_PADDED, "documents must be the same in all tokens of a row .*, got 5 and 6 in row 1"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_rows_that_hold_several_texts_are_refused(options, message):
    """They would be continued as one text, of which no token was trained to see the other documents."""
    for net in (LongNetModule(CONFIG, generated_tokens=2), made("llama")):
        with pytest.raises(ValueError, match=message):
            net.predict_step({**ROWS, **options}, 0)


def test_documents_and_positions_of_one_text_change_nothing():
    net = LongNetModule(CONFIG, generated_tokens=4, temperature=0)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    given = {**ROWS, "attention_mask": mask}
    expected = net.predict_step(given, 0)
    options = {"documents": torch.tensor([[0] * 6, [7, 7, 8, 8, 8, 8]]), "positions": (mask.cumsum(1) - 1).clamp(min=0)}
    assert net.predict_step(given | options, 0).tolist() == expected.tolist()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    loader = DataLoader([{"input_ids": i, "documents": d} for i, d in zip(ROWS["input_ids"], TWO, strict=True)], 2)
    with pytest.raises(ValueError, match="documents must be the same in all tokens of a row"):
        trainer.predict(net, loader)


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "seq_idx"])
def test_names_of_packed_documents_that_are_not_read_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is not read: give documents"):
        made("llama").predict_step({**ROWS, name: torch.tensor([0, 3, 6])}, 0)
