"""Record what torchscale's own code computes on random weights: `tests/data/torchscale.pt`.

    python tests/data/record_torchscale.py PATH_OF_A_TORCHSCALE_CHECKOUT

PyPI's release of torchscale has no LongNet; its repository has.  It asks for flash-attn, fairscale and timm: the one
call of attention is served by torch's operator for CPUs, and what is asked of the others does nothing in evaluation.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn


def stand_in(name: str, **contents: Any) -> None:
    module = sys.modules.setdefault(name, ModuleType(name))
    for key, value in contents.items():
        setattr(module, key, value)


def prepare(path: str) -> None:
    sys.path[:0] = [path, f"{path}/examples/longvit"]
    stand_in("fairscale")
    stand_in("fairscale.nn", checkpoint_wrapper=lambda layer: layer, wrap=lambda layer: layer)
    stand_in("timm")
    stand_in("timm.models")
    stand_in("timm.models.layers", trunc_normal_=nn.init.trunc_normal_, drop_path=lambda x, *_: x)
    stand_in("timm.models.registry", register_model=lambda function: function)

    def bounded(tensor: torch.Tensor, mean: float = 0.0, std: float = 1.0) -> None:
        nn.init.trunc_normal_(tensor, mean=mean, std=std, a=-std, b=std)

    stand_in("utils", trunc_normal_=bounded)
    import torchscale.component.multihead_attention as multihead

    def attention(q: Any, k: Any, v: Any, dropout: float, bias: None, scale: None, is_causal: bool) -> Any:
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        out, lse = operator(*(x.transpose(1, 2) for x in (q, k, v)), dropout, is_causal, scale=scale)
        return out.transpose(1, 2), lse

    multihead.flash_attn_func = attention


def scrambled(model: nn.Module) -> nn.Module:
    """Move all parameters from 0 and 1, where an error could go unseen, and round them, so that the file packs."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter)).mul_(256).round_().div_(256)
    return model.eval()


def recorded(model: nn.Module, arguments: dict[str, Any], inputs: list[torch.Tensor], call: Any, learned: str) -> Any:
    """Return the weights and outputs of a model, and the gradient of the weight `learned`.

    torchscale lets no gradient through the mixture of branches.
    """
    outputs = []
    for x in inputs:
        model.zero_grad()
        out = call(model, x)
        (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
        grad = dict(model.named_parameters())[learned].grad
        outputs.append({"input": x, "output": out.detach(), "grad": grad.clone()})
    state = model.state_dict()  # one tensor of all: a file has some hundred bytes for each
    packed = {"shapes": {name: list(x.shape) for name, x in state.items()}}
    packed["values"] = torch.cat([x.flatten() for x in state.values()])
    return {"arguments": arguments, "state": packed, "learned": learned, "cases": outputs}


def tokens(vocabulary: int, *lengths: int) -> list[torch.Tensor]:
    return [torch.randint(vocabulary, (2, length)) for length in lengths]


def decoder(lengths: list[int], positions: int = 0, **arguments: Any) -> Any:
    from torchscale.architecture.config import DecoderConfig
    from torchscale.component.embedding import PositionalEmbedding, TextEmbedding
    from torchscale.model.LongNet import LongNetDecoder

    config = DecoderConfig(flash_attention=True, **arguments)
    embedding = TextEmbedding(config.vocab_size, config.decoder_embed_dim, 1)
    table = PositionalEmbedding(positions + 2, config.decoder_embed_dim) if positions else None
    model = scrambled(LongNetDecoder(config, embedding, table))
    call = lambda model, x: model(x)[0]  # noqa: E731
    learned = "layers.0.self_attn.q_proj.weight"
    return recorded(model, arguments, tokens(config.vocab_size, *lengths), call, learned)


def encoder(lengths: list[int], **arguments: Any) -> Any:
    from torchscale.architecture.config import EncoderConfig
    from torchscale.component.embedding import TextEmbedding
    from torchscale.model.LongNet import LongNetEncoder

    config = EncoderConfig(flash_attention=True, **arguments)
    model = scrambled(LongNetEncoder(config, TextEmbedding(config.vocab_size, config.encoder_embed_dim, 1)))
    call = lambda model, x: model(x)["encoder_out"]  # noqa: E731
    learned = "layers.0.self_attn.k_proj.weight"
    return recorded(model, arguments, tokens(config.vocab_size, *lengths), call, learned)


def images(model: nn.Module, arguments: dict[str, Any], sizes: list[tuple[int, int]], learned: str) -> Any:
    inputs = [torch.randn(2, 3, *size).mul(64).round().div(64) for size in sizes]
    return recorded(scrambled(model), arguments, inputs, lambda model, x: model(x), learned)


def longvit() -> Any:
    import longvit
    import modeling_finetune

    segments = {"dilated_ratio": "[1,2,4]", "segment_length": "[4,8,16]"}

    class Small(longvit.LongViT):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options, **segments)

    modeling_finetune.LongViT = Small
    shape = {"encoder_embed_dim": 16, "encoder_attention_heads": 4, "encoder_layers": 2, "drop_path_rate": 0.1}
    options = Namespace(img_size=16, patch_size=4, checkpoint_activations=False, **shape)
    model = modeling_finetune.LongViTForTCGAClassification(options, num_classes=3)
    return images(model, {**shape, **segments}, [(16, 16), (32, 8), (16, 32)], "model.pos_embed")


def longvit_pretraining() -> Any:
    from pretraining.vision_transformer import VisionTransformer

    segments = {"dilated_ratio": "[1,2]", "segment_length": "[4,8]"}
    shape = {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 1, "num_heads": 3}
    model = VisionTransformer(**shape, norm_layer=lambda width: nn.LayerNorm(width, 1e-6), **segments)
    arguments = {"num_heads": 3, "final_norm_eps": 1e-6, **segments}
    return images(model, arguments, [(8, 8)], "encoder.layers.0.self_attn.v_proj.weight")


def main(path: str) -> None:
    prepare(path)
    torch.manual_seed(0)
    decoding = {"decoder_embed_dim": 16, "decoder_attention_heads": 4, "decoder_ffn_embed_dim": 24, "decoder_layers": 2}
    encoding = {"encoder_embed_dim": 18, "encoder_attention_heads": 3, "encoder_ffn_embed_dim": 20, "encoder_layers": 2}
    segments = {"segment_length": "[8,16,32]", "dilated_ratio": "[1,2,4]"}
    content = {
        "decoder": decoder([32, 27, 50], **decoding, **segments, vocab_size=23, xpos_rel_pos=True, xpos_scale_base=64),
        "decoder with positions": decoder(
            [32, 19],
            positions=40,
            **decoding,
            **segments,
            vocab_size=23,
            subln=False,
            activation_fn="relu",
            no_scale_embedding=False,
            share_decoder_input_output_embed=True,
            layernorm_eps=1e-3,
        ),
        "encoder": encoder([32, 64], **encoding, **segments, vocab_size=11, activation_fn="swish", layernorm_eps=0.1),
        "encoder without a last norm": encoder(
            [32], **encoding, **segments, vocab_size=11, normalize_output=False, xpos_rel_pos=True
        ),
        "ragged encoder": encoder([27], **encoding, **segments, vocab_size=11),
        "longvit": longvit(),
        "longvit in pretraining": longvit_pretraining(),
    }
    torch.save(content, Path(__file__).parent / "torchscale.pt")


if __name__ == "__main__":
    main(sys.argv[1])
