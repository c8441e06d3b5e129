"""Caches in files: a text goes on in another process, and nothing else is taken for its cache."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_longnet import LongNet, LongNetConfig, Pattern, load_cache, save_cache

PATTERN = Pattern.dilated((4, 160), (1, 2), is_causal=True) + Pattern.window(5, is_causal=True)


def made(pattern=PATTERN, seed=1, **options):
    torch.manual_seed(seed)
    return LongNet(LongNetConfig(pattern, **{"vocab_size": 19, "dim": 16, "layers": 2, "heads": 4} | options)).eval()


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.bfloat16])
def test_a_text_goes_on_from_a_file(tmp_path, dtype):
    model, tokens = made(), torch.randint(19, (2, 50))
    documents = torch.arange(50).expand(2, -1) // 23
    cache = model.new_cache(2, dtype=dtype)
    model(tokens[:, :30], documents=documents[:, :30], cache=cache)
    save_cache(cache, tmp_path / "text.safetensors", model)
    loaded = load_cache(tmp_path / "text.safetensors", made())
    assert loaded.positions == cache.positions == (7, 7)
    assert (loaded.nbytes, loaded.dtype) == (cache.nbytes, dtype)
    for i in range(30, 50):
        options = {"documents": documents[:, i : i + 1]}
        expected = model(tokens[:, i : i + 1], cache=cache, **options)
        assert torch.equal(model(tokens[:, i : i + 1], cache=loaded, **options), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["text.safetensors"]


def test_rows_are_selected_with_all_that_is_theirs():
    model, tokens = made(), torch.randint(19, (3, 40))
    cache = model.new_cache(3, dtype=torch.int8)
    mask = torch.arange(20) < torch.tensor([20, 3, 11])[:, None]
    model(tokens[:, :20], attention_mask=mask, cache=cache)
    expected = model.generate(tokens[:, 20:21], 5, cache=copy.deepcopy(cache), temperature=0)
    cache.select(torch.tensor([2, 0, 2, 1]))
    assert cache.positions == (11, 20, 11, 3)
    result = model.generate(tokens[[2, 0, 2, 1], 20:21], 5, cache=cache, temperature=0)
    assert result.tolist() == expected[[2, 0, 2, 1]].tolist()


def test_a_state_may_be_restored_twice():
    """Each cache has memory of its own, so that two texts go on from one prompt."""
    model, tokens = made(), torch.randint(19, (1, 30))
    cache = model.new_cache()
    model(tokens, cache=cache)
    state = cache.state()
    expected = model(tokens[:, :1], cache=copy.deepcopy(cache))
    for token in (7, 0):
        fork = model.new_cache()
        fork.restore(*state)
        for _ in range(20):
            model(torch.full((1, 1), token), cache=fork)
    last = model.new_cache()
    last.restore(*state)
    assert torch.equal(model(tokens[:, :1], cache=last), expected)


def test_other_files_are_refused_in_a_line(tmp_path):
    model = made()
    cache = model.new_cache()
    model(torch.randint(19, (1, 30)), cache=cache)
    good = tmp_path / "good"
    save_cache(cache, good, model)
    (tmp_path / "half").write_bytes(good.read_bytes()[:-100])
    (tmp_path / "text").write_text("no tensors")
    save_file({"x": torch.zeros(3)}, tmp_path / "foreign")
    for name, net, message in (
        ("half", model, "half, which cannot be read"),
        ("text", model, "text, which cannot be read"),
        ("foreign", model, "foreign, which holds other tensors"),
        ("good", made(Pattern.dense(True)), "good, which is of one with other patterns"),
        ("good", made(seed=2), "good, which is of one with other weights"),
        ("good", made(kv_heads=2), "good, which is of one with other weights"),
        ("good", made(rope_base=5e5), "good, which is of one with other weights or configuration"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            load_cache(tmp_path / name, net)
        assert "\n" not in str(raised.value)
    with pytest.raises(FileNotFoundError):
        load_cache(tmp_path / "nowhere", model)
    with pytest.raises(ValueError, match="cache must be of this model and batch"):
        save_cache(cache, tmp_path / "x", made(Pattern.dense(True)))


@pytest.mark.parametrize("change", ["rows", "shape", "number of positions", "positions", "dtype", "text", "kept_from"])
def test_files_that_lack_something_are_refused(tmp_path, change):
    model = made()
    cache = model.new_cache()
    model(torch.randint(19, (1, 1)), cache=cache)
    path = tmp_path / "text"
    save_cache(cache, path, model)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    about = json.loads(metadata["about"])
    if change == "rows":
        del tensors["1.0.rows"]
    elif change == "shape":
        tensors["1.0.rows"] = tensors["1.0.rows"][..., 1:].contiguous()
    elif change == "dtype":
        about["dtype"] = "float11"
    elif change == "kept_from":
        about["kept_from"][0][-1] = 2  # beyond the text
    else:
        about["positions"] = [3, 4] if "number" in change else [159]
    text = "{" if change == "text" else json.dumps(about)
    save_file(tensors, path, metadata={**metadata, "about": text})
    with pytest.raises(ValueError, match="which lacks some of it"):
        load_cache(path, model)
