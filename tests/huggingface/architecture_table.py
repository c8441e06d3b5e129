"""The page of the architectures that `attn_implementation="ring"` serves, out of the tests' own models.

Run it to write the page again: `python tests/huggingface/architecture_table.py`.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architectures.md"
HEAD = """# Architectures of transformers

With `attn_implementation="ring"`, `attend` computes the attention of these models, on one process and over the ranks
that share a sequence. For each model, tests compare the loss, the logits and all gradients with those of one process
with transformers' own attention; [a table](#what-the-tests-cover) counts these. If transformers' SDPA lacks the
softcap or the sinks of a model, the test compares with the equation instead.
`tests/huggingface/architecture_table.py` writes this page.

The column "keys of the layers" lists the keys that a query sees in the layers of the model: all earlier ones, those in
a sliding window, or those in its own chunk of the sequence. The column "packed rows" lists how a batch marks the
documents of a row.

| architecture | configuration | keys of the layers | other features | packed rows |
| --- | --- | --- | --- | --- |
"""
BETWEEN = """
A layer to which `dilate` gave a pattern uses that pattern instead.

## Not supported on split sequences

`split_refusals(model)` returns these reasons.

| architecture | reason |
| --- | --- |
"""
CELLS = """
## What the tests cover

The table counts test cases. A case is one step of a model with 2 layers in float64, on plain, packed or padded rows,
with the exchange gather, ring or swap, and with contiguous or zigzag placement. On 1, 2 and 4 ranks, rows have 48
tokens; the column "uneven" is for rows of 53 tokens on 2, 3 and 4 ranks. In rows with "dilated", the second layer has a
pattern of three dilation rates, and the model is compared with the equation. Differences are relative to the norm of
each tensor. They are at most 1e-12, or 1e-6 if the model itself computes in float32, as routers and norms do ("after
float32"). `tests/huggingface/matrix.py` runs the cases, and `make test-full` runs them again.

"""
REFUSED = {
    "Llama 4, as published": ("Llama4TextConfig", {"num_local_experts": 2, "no_rope_layers": [1, 0]}),
    "Llama, rope_type dynamic": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "Mamba": ("MambaConfig", {}),
    "LFM2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
    "Falcon": ("FalconConfig", {}),
    "BLOOM": ("BloomConfig", {}),
}


def shown_keys(pattern):
    branch = pattern.branches[0]
    if branch.window is not None:
        return "window"
    return "all earlier" if branch.segment_length is None else "chunk"


def page():
    """Return the text of the page."""
    import transformers
    from architectures import ARCHITECTURES, LEAKS, SMALL, WITHOUT_POSITIONS, model
    from matrix import RESULT, table

    from lightning_longnet.huggingface.placements import layer_patterns
    from lightning_longnet.huggingface.support import split_refusals

    lines = []
    for name, (config_name, _, _) in ARCHITECTURES.items():
        net = model(name, "ring")
        assert not split_refusals(net), name
        keys = ", ".join(dict.fromkeys(map(shown_keys, layer_patterns(net.config))))
        names = [each for each, _ in net.named_parameters()]
        extras = [
            text
            for text, is_so in (
                ("sinks", any("sinks" in each for each in names)),
                ("softcap (kernel `eager`)", getattr(net.config, "attn_logit_softcapping", None) is not None),
                ("values of another width (kernel `eager`)", hasattr(net.config, "kv_lora_rank")),
                ("attn_temperature_tuning=False", hasattr(net.config, "attn_temperature_tuning")),
            )
            if is_so
        ]
        packed = "positions that restart, or documents"
        if name in WITHOUT_POSITIONS:
            packed = "documents in the batch, always needed over ranks"
        if name in LEAKS:
            packed += "; transformers' own mask does not separate documents"
        lines.append(f"| {name} | `{config_name}` | {keys} | {', '.join(extras)} | {packed} |")
    refused = []
    for name, (config_name, options) in REFUSED.items():
        config = getattr(transformers, config_name)(**{**SMALL, **options})
        net = transformers.AutoModelForCausalLM.from_config(config)
        reasons = [reason for reason in split_refusals(net) if not reason.startswith("attn_implementation")]
        refused.append(f"| {name} | {'; '.join(reasons)} |")
    cells = table(json.loads(RESULT.read_text()))
    return HEAD + "\n".join(lines) + "\n" + BETWEEN + "\n".join(refused) + "\n" + CELLS + cells


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).parent)]
    PAGE.write_text(page())
