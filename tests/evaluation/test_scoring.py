"""Scores of texts by blocks, against one forward over the whole text in float64."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from memory import peak_bytes

from lightning_longnet import LongNet, LongNetConfig, Pattern
from lightning_longnet.data import texts
from lightning_longnet.data.texts import Text
from lightning_longnet.data.tokenizers import ByteTokenizer
from lightning_longnet.evaluation import scoring, stream
from lightning_longnet.evaluation.curve import LossCurve
from lightning_longnet.evaluation.loading import Loaded
from lightning_longnet.evaluation.scoring import score_text

DILATED = Pattern.dilated((8, 32, 64), (1, 2, 4), is_causal=True)
PATTERNS = {
    "dilated": DILATED,
    "segments that blocks do not end with": Pattern.dilated((6, 50), (1, 2), is_causal=True),
    "window": Pattern.window(9, is_causal=True) + Pattern.dilated((300,), (3,), is_causal=True),
    "dense": Pattern.dense(is_causal=True),
}
END = ByteTokenizer.end
pytestmark = pytest.mark.filterwarnings("ignore:Nothing crosses", "ignore:In the branch")


def source_of(**changes):
    torch.manual_seed(3)
    options = {"pattern": DILATED, "dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "loss_chunk": 7}
    model = LongNet(LongNetConfig(**{**options, **changes})).double().eval()
    return Loaded(model, ByteTokenizer(), None, [])


def text_of(folder, content):
    path = Path(folder) / "text.txt"
    path.write_bytes(content)
    return Text(path, len(content), 0)


def content(size, documents=0):
    """Return bytes of text; with `documents` some of them are end tokens."""
    generator = torch.Generator().manual_seed(size)
    ids = torch.randint(32, 127, (size,), generator=generator)
    ids[torch.randperm(size, generator=generator)[:documents]] = END
    return bytes(ids.tolist())


def whole(source, text, has_documents=False):
    """Return the losses of all tokens but the first, their places in their documents, and which are predicted."""
    ids = torch.tensor([[*text.path.read_bytes()]])
    ends = (ids == END).long()
    documents = (ends.cumsum(1) - ends) * has_documents
    with torch.no_grad():
        logits = source.model(ids, documents=documents if has_documents else None)
    losses = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    begins = torch.tensor([(documents[0] == document).nonzero().min() for document in documents[0].tolist()])
    places = (torch.arange(ids.shape[1]) - begins)[1:]
    return losses, places, documents[0, 1:] == documents[0, :-1]


def curve_of(places, losses):
    return [(float(place), float(losses[places == place].mean())) for place in sorted(set(places.tolist()))]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(stream, "_BLOCK", 70)


@pytest.mark.parametrize("documents", [0, 9])
@pytest.mark.parametrize("name", PATTERNS)
def test_the_sum_is_that_of_one_forward(tmp_path, name, documents):
    source, text = source_of(pattern=PATTERNS[name]), text_of(tmp_path, content(251, documents))
    done = []
    score = score_text(source, text, done.append, has_documents=documents > 0)
    losses, places, is_predicted = whole(source, text, documents > 0)
    assert (score.tokens, score.predicted) == (251, int(is_predicted.sum()))
    assert score.loss_sum == pytest.approx(float(losses[is_predicted].sum()), rel=1e-11)
    assert score.curve.points() == [
        (place, pytest.approx(loss, rel=1e-9)) for place, loss in curve_of(places[is_predicted], losses[is_predicted])
    ]
    assert len(done) > 3
    assert sum(done) == pytest.approx(text.size)


@pytest.mark.parametrize("size", [2, 70, 71, 140])
def test_texts_of_any_length(tmp_path, size):
    source, text = source_of(), text_of(tmp_path, content(size))
    score = score_text(source, text, lambda _: None)
    assert score.loss_sum == pytest.approx(float(whole(source, text)[0].sum()), rel=1e-11)
    assert score.predicted == size - 1


@pytest.mark.parametrize("change", [{"ordering": "hilbert"}, {"learned_positions": 300, "rotary": None}])
def test_other_models(tmp_path, change):
    """A curve over a sequence allows no cache, so the text is one block."""
    source, text = source_of(**change), text_of(tmp_path, content(150))
    score = score_text(source, text, lambda _: None)
    assert score.loss_sum == pytest.approx(float(whole(source, text)[0].sum()), rel=1e-11)


@pytest.mark.long
def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "PIECE_BYTES", 128)
    monkeypatch.setattr(texts, "_LINE_BYTES", 128)
    source = source_of()
    peaks = []
    for size in (1000, 8000):
        text = text_of(tmp_path, content(size))
        peaks.append(peak_bytes(partial(score_text, source, text, lambda _: None)))
    assert peaks[1] <= 1.05 * peaks[0]


def test_the_line_of_a_text(tmp_path):
    score = scoring.Score(tokens=4, predicted=3, loss_sum=3 * 2.0)
    text = Text(tmp_path / "a.txt", 10, 0)
    assert score.figures(text) == {
        "file": f"{tmp_path}/a.txt",
        "bytes": 10,
        "tokens": 4,
        "predicted_tokens": 3,
        "loss": 2.0,
        "perplexity": pytest.approx(7.389056),
        "bits_per_byte": pytest.approx(2.0 * 1.442695 * 0.4),
    }


def test_a_curve_has_few_bins():
    torch.manual_seed(0)
    losses = torch.rand(1000, dtype=torch.float64)
    curve = LossCurve()
    for begin in range(0, 1000, 90):
        places = torch.arange(begin, min(begin + 90, 1000))
        curve.add(places, losses[places])
    curve = LossCurve(curve.state())
    assert curve.width == 4
    expected = losses.view(-1, 4).mean(1).tolist()
    assert curve.points() == [(4 * i + 1.5, pytest.approx(mean)) for i, mean in enumerate(expected)]


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"each file must hold at least 2 tokens, .*text.txt holds 1"):
        score_text(source_of(), text_of(tmp_path, b"x"), print)
    with pytest.raises(ValueError, match=r"each file must hold a document of at least 2 tokens, .* holds none"):
        score_text(source_of(), text_of(tmp_path, bytes([END, END, 7])), print, has_documents=True)
    with pytest.raises(ValueError, match=r"checkpoint must be of a decoder, .* got an encoder"):
        score_text(source_of(pattern=Pattern.dense()), text_of(tmp_path, b"text"), print)
    source = source_of()
    torch.nn.init.constant_(source.model.norm.weight, float("nan"))
    with pytest.raises(ValueError, match=r"the losses of .* must be finite, their sum is nan"):
        score_text(source, text_of(tmp_path, b"text"), print)
