"""Chats of Hugging Face `datasets`, by a chat template that is made here."""

import pytest
import torch

from lightning_longnet import HubData
from lightning_longnet.data.tokenizers import tokenizer_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(transformers|datasets|dill|multiprocess).*")
CHATS = [
    [
        {"role": "user", "content": f"what is {i} plus {i}"},
        {"role": "assistant", "content": f"it is {2 * i}"},
        {"role": "user", "content": "thanks"},
        {"role": "assistant", "content": "welcome"},
    ]
    for i in range(40)
]
MARKED = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ '<end>' }}{% endgeneration %}{% else %}{{ m.content + '<end>' }}{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<end>' }}{% endfor %}"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def tokenizer(folder, template):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {name: i for i, name in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(names, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(each, special=True) for each in ("<end>", "<user>", "<assistant>")])
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", chat_template=template).save_pretrained(folder)
    return str(folder)


def saved(tmp_path, **columns):
    import datasets

    datasets.Dataset.from_dict(columns or {"messages": CHATS}).save_to_disk(tmp_path / "chats")
    return str(tmp_path / "chats")


def data_of(tmp_path, template=MARKED, **options):
    name = tokenizer(tmp_path / "tokenizer", template)
    path = options.pop("path", None) or saved(tmp_path)
    options = {"column": "messages", "tokenizer": name, "tokens": 160, "validation_share": 0.2, **options}
    data = HubData(path, **{"packed": True, **options})
    data.prepare_data()
    data.setup("fit")
    return data


def test_only_what_the_assistant_says_is_trained(tmp_path):
    data = data_of(tmp_path)
    tool = tokenizer_of(data.tokenizer_name)
    seen = []
    for row in (data.train_rows.read(i, 0, 160) for i in range(len(data.train_rows))):
        for document in row["documents"].unique():
            inside = row["documents"] == document
            ids, labels = row["input_ids"][inside], row["labels"][inside]
            kept = labels != -100
            if not kept.any():
                continue  # the rest of a row
            assert torch.equal(labels[:-1][kept[:-1]], ids[1:][kept[:-1]])
            seen.append((tool.decode(ids.tolist()), tool.decode(labels[kept].tolist())))
    rest = "<end><user>thanks<end><assistant>welcome<end>"
    expected = {
        f"<user>what is {i} plus {i}<end><assistant>it is {2 * i}{rest}": f"it is {2 * i}<end>welcome<end>"
        for i in range(40)
    }
    whole = {text: said for text, said in seen if text in expected}
    assert len(whole) >= 30
    assert all(expected[text] == said for text, said in whole.items())


@pytest.mark.parametrize(("begin", "end"), [(0, 80), (80, 160), (33, 101)])
def test_a_part_of_a_row_is_that_of_the_row(tmp_path, begin, end):
    data = data_of(tmp_path)
    whole, part = data.train_rows.read(0, 0, 160), data.train_rows.read(0, begin, end)
    for name, x in part.items():
        assert torch.equal(x, whole[name][begin:end]), name


def test_all_is_trained_where_the_template_marks_nothing(tmp_path):
    data = data_of(tmp_path, PLAIN)
    row = data.train_rows.read(0, 0, 160)
    inside = row["documents"] == 0
    assert (row["labels"][inside] != -100).sum() == inside.sum() - 1


def test_windows_of_a_stream_have_the_same_targets(tmp_path):
    data = data_of(tmp_path, packed=False)
    row = data.train_rows.read(1, 0, 160)
    kept = row["labels"] != -100
    assert 0 < kept.sum() < 160
    assert torch.equal(row["labels"][:-1][kept[:-1]], row["input_ids"][1:][kept[:-1]])


def test_what_cannot_be_read_as_a_chat_is_named(tmp_path):
    with pytest.raises(ValueError, match="must have a chat template for a column of chats"):
        data_of(tmp_path, None)
    with pytest.raises(ValueError, match="with a chat template for a column of chats, got 'bytes'"):
        data_of(tmp_path, tokenizer="bytes", path=str(tmp_path / "chats"))
    odd = saved(tmp_path / "odd", messages=[[{"text": "a"}]] * 40)
    with pytest.raises(ValueError, match=r"'messages' holds \[\{'text': 'a'\}\]"):
        data_of(tmp_path, path=odd)
    with pytest.raises(ValueError, match="streaming must be False for a column of chats"):
        data_of(tmp_path, path=str(tmp_path / "chats"), streaming=True, packed=False)
