"""Models of transformers with weights by which they continue a text as it went on after the same tokens before.

The first layer copies the codes of the last tokens to each token, by a head for each distance; the second layer looks
for the place whose tokens before it are the last ones of the text, and returns the token there.
"""

import torch

BITS, WIDTH, SCALE = 8, 128, 300.0  # of the code of a byte; of a head and of the hidden states; of scores
# rotations: the first frequency turns once in 6 tokens, the next once in 23; from the tenth on they nearly stand still
THETA, TURNING, STILL = 1e36, 6, 10


def copier(context, window=None):
    """Return a model of bytes, in float64, which compares the last `context` tokens, at most 12.

    With `window` its layers see so many tokens.
    """
    import transformers

    sizes = {"vocab_size": 256, "hidden_size": WIDTH, "intermediate_size": 4, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": context, "num_key_value_heads": 1, "head_dim": WIDTH}
    sizes |= {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}, "tie_word_embeddings": False}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 4096}
    config = transformers.MistralConfig(**sizes, sliding_window=window)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="ring").double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        codes = ((torch.arange(256)[:, None] >> torch.arange(BITS)) & 1).double() * 2 - 1
        own, always, out = slice(0, BITS), BITS, slice(WIDTH - BITS, WIDTH)
        model.model.embed_tokens.weight[:, own] = codes
        model.model.embed_tokens.weight[:, always] = 1
        model.lm_head.weight[:, out] = codes
        first, second = (layer.self_attn for layer in model.model.layers)
        angles = THETA ** (-2 * torch.arange(TURNING).double() / WIDTH)
        half = WIDTH // 2
        norm = (BITS + 1) ** 0.5 / WIDTH**0.5  # which the norm before the layer divides by
        first.k_proj.weight[:TURNING, always] = norm
        for head in range(context):
            begin = head * WIDTH
            turned = angles * (head + 1)
            first.q_proj.weight[begin : begin + TURNING, always] = SCALE * norm * WIDTH**0.5 * turned.cos()
            first.q_proj.weight[begin + half : begin + half + TURNING, always] = (
                -SCALE * norm * WIDTH**0.5 * turned.sin()
            )
            for bit in range(BITS):
                first.o_proj.weight[before(head) + bit, begin + bit] = 1
        first.v_proj.weight[:BITS, own] = torch.eye(BITS).double() * norm
        norm = (BITS * (context + 1) + 1) ** 0.5 / WIDTH**0.5
        still = [i for i in range(WIDTH) if i % half >= STILL]
        for place in range(context):
            for bit in range(BITS):
                at = still[place * BITS + bit]
                second.k_proj.weight[at, before(place) + bit] = norm
                second.q_proj.weight[at, (before(place - 1) if place else 0) + bit] = SCALE * norm * WIDTH**0.5
        second.v_proj.weight[:BITS, own] = torch.eye(BITS).double() * norm
        second.o_proj.weight[out, :BITS] = torch.eye(BITS).double()
    return model


def before(head):
    """The first of the hidden values that hold the code of the token `head + 1` before."""
    return BITS + 1 + head * BITS
