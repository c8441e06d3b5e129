"""An exported model in pipelines of transformers, which pass its tokenizer on to `generate`."""

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

from lightning_longnet import LongNet, LongNetConfig, Pattern, export_model
from lightning_longnet.data.tokenizers import tokenizer_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    result = tmp_path_factory.mktemp("served") / "model"
    torch.manual_seed(3)
    model = LongNet(LongNetConfig(Pattern.dilated((8, 64), (1, 2), is_causal=True), dim=16, layers=2, heads=4))
    with torch.no_grad():  # so that letters are the likeliest
        model.embedding.weight.zero_()[65:91].normal_()
    export_model(model, result, "huggingface", tokenizer=tokenizer_of("bytes"), trained_length=64)
    return result


def test_a_pipeline_continues_a_text_until_a_stop(folder):
    writer = pipeline("text-generation", str(folder), trust_remote_code=True)
    options = {"do_sample": False, "return_full_text": False}
    (whole,) = writer("Once upon", max_new_tokens=16, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = torch.tensor([[*b"Once upon"]])
    expected = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    text = writer.tokenizer.decode(expected, skip_special_tokens=True)
    assert whole["generated_text"] == text
    stop = text[3]
    options |= {"stop_strings": [stop], "tokenizer": writer.tokenizer}
    (stopped,) = writer("Once upon", max_new_tokens=16, **options)
    assert stopped["generated_text"] == text[: text.index(stop) + 1]
