"""No file that any command reads runs code, or leads a reader out of its folder."""

import os
import re

import pytest
from payloads import CASES, HARMLESS, QUICK, SECRET, ran
from programs import LONGNET, programs
from tiers import tiered


def test_there_are_enough():
    assert len(CASES) >= 60
    assert set(CASES) >= HARMLESS | set(QUICK)


TRUSTED = ["file, code: generate", "DeepSpeed's model: export", "class: generate"]
# what the error says: a case must not be refused for another reason
REASONS = (
    *("could run any code", "must stay in the folder", "is something else", "must be a whole .npy file"),
    *("must hold images of", "must be YAML", "must be .* the name of a Hugging Face tokenizer"),
)


# fit, test and predict read a checkpoint as validate does
ALIKE = [name for name in CASES if re.search(": (fit|test|predict)", name)]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", tiered(CASES, quick=QUICK, full=[name for name in ALIKE if name not in QUICK]))
def test_nothing_runs_and_nothing_outside_is_read(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    words = CASES[name](tmp_path)
    assert not ran(tmp_path).exists(), "the payload ran while it was made"
    try:
        ((status, shown, errors),) = programs([[LONGNET, *words]], tmp_path)
    finally:
        assert not ran(tmp_path).exists(), "it ran"
    written = "".join(page.read_text() for page in tmp_path.rglob("report.html"))
    assert SECRET not in shown + errors + written
    assert "<script>alert" not in written
    if name in HARMLESS:
        assert status == 0, errors[-2000:]
    else:
        assert status != 0, shown[-2000:]
        assert "Traceback" not in errors, errors[-2000:]
        assert re.search(f"longnet: error: .*({'|'.join(REASONS)})", errors), errors[-2000:]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    "name",
    tiered([".metadata, system: generate", "class: generate", "file, code: generate"], quick=["class: generate"]),
)
def test_trust_lifts_it(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    words = CASES[name](tmp_path)
    ((_, _, errors),) = programs([[LONGNET, *words, "--trust"]], tmp_path)
    assert "Traceback" not in errors, errors[-2000:]
    assert ran(tmp_path).exists(), "these payloads run where they are trusted, so the other tests can fail"
