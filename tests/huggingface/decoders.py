"""Small LongNets in transformers, and rows with padding for them."""

import torch

from lightning_longnet import LongNetConfig, Pattern

DILATED = Pattern.dilated((8, 16, 64), (1, 2, 2), is_causal=True)
SMALL = {"vocab_size": 23, "dim": 16, "layers": 2, "heads": 4, "kv_heads": 2}
KINDS = {
    "rope": {},
    "learned": {"rotary": None, "learned_positions": 30, "embedding_scale": 3.0},
    "xpos": {"rotary": "xpos", "learned_positions": 30, "tied_embeddings": False},
    "curve": {"ordering": "hilbert"},
    "sparse": {"pattern": Pattern.block_sparse("dilated_sparse", 4, 0.4, within=DILATED)},
}
LENGTHS = (30, 21, 6)
MASKS = {
    "left": [[0] * (30 - n) + [1] * n for n in LENGTHS],
    "right": [[1] * n + [0] * (30 - n) for n in LENGTHS],
    "both": [[0] * ((30 - n) // 2) + [1] * n + [0] * (30 - n - (30 - n) // 2) for n in LENGTHS],
    "within": [[1] * 30, [1, 1, 0] * 9 + [1] * 3, [1, 0, 0, 0, 0] * 6],
}


def decoder(kind="rope", **changes):
    from lightning_longnet.huggingface.configuration_longnet import LongNetPretrainedConfig
    from lightning_longnet.huggingface.modeling_longnet import LongNetForCausalLM

    torch.manual_seed(0)
    config = LongNetConfig(**{"pattern": DILATED, **SMALL, **KINDS[kind], **changes})
    return LongNetForCausalLM(LongNetPretrainedConfig(config.to_dict())).double().eval()


def tokens(*shape):
    return torch.randint(1, 23, shape, generator=torch.Generator().manual_seed(1))


def scattered(rows, mask):
    """Return rows of any lengths as one tensor, where the mask has ones."""
    ids = torch.zeros_like(mask)
    ids[mask == 1] = torch.cat(rows)
    return ids
