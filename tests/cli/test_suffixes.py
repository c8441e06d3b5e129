"""Numbers of tokens as users write them."""

import argparse
import copy

import pytest

from lightning_longnet.cli.configured import read_job
from lightning_longnet.cli.counts import counted, plain_counts, plain_values, token_count

COUNTS = {"300": 300, "1_000": 1000, "1e6": 10**6, "64k": 65_536, "64K": 65_536, "1M": 2**20, "1.5M": 1_572_864,
          "1B": 2**30, "2g": 2**31, "-3": -3}  # fmt: skip


@pytest.mark.parametrize("text", COUNTS)
def test_a_suffix_is_a_power_of_1024(text):
    assert token_count(text) == COUNTS[text]


@pytest.mark.parametrize("text", ["1.5", "0.3k", "many", "k", "", "1 M", "1.2.3", "64kb"])
def test_what_is_no_whole_number_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"must be a whole number, got .* 64k stands for 65,536"):
        token_count(text)


def test_options_of_the_trainers_commands_may_have_suffixes():
    words = ["--data.tokens", "64k", "--data.init_args.tokens=1M", "--model.generated_tokens=2k", "--data.tokens=many"]
    plain = ["--data.tokens", "65536", "--data.init_args.tokens=1048576", "--model.generated_tokens=2048"]
    assert plain_counts([*words, "--trainer.max_time=2k"]) == [*plain, "--data.tokens=many", "--trainer.max_time=2k"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's use of jsonargparse
def test_configuration_files_may_have_suffixes(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "data: {class_path: lightning_longnet.ByteData, init_args: {tokens: 64k, batch_size: 1}}\n"
        "model: {config: {pattern: {branches: [{segment_length: 16, dilation_rate: 1, is_causal: true}]}}}\n"
    )
    assert read_job(["--config", str(tmp_path / "a.yaml")], per_node=2).tokens == 65_536


def test_sections_of_commands_and_all_options_may_have_suffixes():
    values = {"model": {"generated_tokens": "1k", "init_args": {"generated_tokens": "2k"}}, "data": {"tokens": "1M"}}
    plain = {"model": {"generated_tokens": 1024, "init_args": {"generated_tokens": 2048}}, "data": {"tokens": 2**20}}
    assert plain_values({"predict": copy.deepcopy(values), **values}) == {"predict": plain, **plain}


def test_other_values_of_files_stay_as_they_are():
    values = {"data": {"tokens": "many", "name": "64k"}, "model": "64k", "trainer": None}
    assert plain_values(dict(values)) == values


def test_a_value_alone_is_not_searched(monkeypatch):
    """The parser reads hundreds of them."""
    monkeypatch.setattr("lightning_longnet.cli.counts._OPTIONS", None)
    assert plain_values("64k") == "64k"


def test_a_single_thing_is_no_plural():
    assert [counted(number, "file") for number in (1, 2, 2000)] == ["1 file", "2 files", "2,000 files"]
