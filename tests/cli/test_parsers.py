"""The parsers of the Trainer's commands."""

import pytest

from lightning_longnet.cli.configured import _Reading
from lightning_longnet.cli.options import _Parsers


@pytest.mark.filterwarnings("ignore")
def test_a_command_makes_its_parser_alone():
    """To make one takes a tenth of a second, and every rank does."""
    words = ["fit", "--config", "configs/quickstart.yaml"]
    assert set(_Reading(words, args=words, save_config_callback=None)._subcommand_parsers) == {"fit"}
    assert set(_Parsers(["fit"], args=["fit"], save_config_callback=None)._subcommand_parsers) == {
        *("fit", "validate", "test", "predict")
    }
