"""`longnet lm_eval`: lm-evaluation-harness with its model `longnet`."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

DESCRIPTION = """\
Run lm-evaluation-harness with the model `longnet`, and with all options of the harness.

  longnet lm_eval --model longnet --model_args checkpoint=last.ckpt --tasks lambada_openai
  longnet lm_eval run --help

The second command lists the options of the harness.  The harness itself loads models from its own list alone; this
command adds ours to it.
"""

EXAMPLE = "longnet lm_eval --model longnet --model_args checkpoint=last.ckpt --tasks lambada_openai"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the options are those of the harness."""


def run_words(words: Sequence[str]) -> None:
    """Run the command line of the harness with these words."""
    from lightning_longnet.cli.ranks import check_alone

    check_alone("lm_eval")
    if find_spec("lm_eval") is None:
        raise ValueError("lm_eval is not installed: pip install 'lightning-longnet[eval]'")
    from lm_eval.__main__ import cli_evaluate

    import_module("lightning_longnet.evaluation.harness")  # which registers the model
    sys.argv = ["lm_eval", *words]  # which the harness reads
    cli_evaluate()
