"""Small models of transformers with random weights, batches for them, and a step of training on parts or wholes."""

from importlib.metadata import version

import torch
import torch.distributed as dist
import torch.nn.functional as F
from contexts import made

VOCABULARY, LENGTH = 61, 53
SMALL = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
MIXED = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
# the class of the configuration, what it needs besides SMALL, and the implementation to compare with
ARCHITECTURES = {
    "Llama": ("LlamaConfig", {}, "sdpa"),
    "Mistral": ("MistralConfig", {"sliding_window": 12}, "sdpa"),
    "Mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 12}, "sdpa"),
    "Qwen2": ("Qwen2Config", {}, "sdpa"),
    "Qwen3": ("Qwen3Config", {"head_dim": 8, "use_sliding_window": True, **MIXED}, "sdpa"),
    "Qwen3-MoE": ("Qwen3MoeConfig", {"head_dim": 8, "num_experts": 4, **EXPERTS}, "sdpa"),
    "Gemma 2": ("Gemma2Config", {"head_dim": 8, "query_pre_attn_scalar": 16, **MIXED}, "plain"),
    "Gemma 3": ("Gemma3TextConfig", {"head_dim": 8, "query_pre_attn_scalar": 16, **MIXED}, "sdpa"),
    "Phi-3": ("Phi3Config", {"sliding_window": 12}, "sdpa"),
    "OLMo 2": ("Olmo2Config", {}, "sdpa"),
    "GPT-NeoX": ("GPTNeoXConfig", {}, "sdpa"),
    "gpt-oss": ("GptOssConfig", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **MIXED}, "plain"),
    "DeepSeek-V3": (
        "DeepseekV3Config",
        {**LATENT, **EXPERTS, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
        "sdpa",
    ),
    "GLM": ("GlmConfig", {"head_dim": 8}, "sdpa"),
    "Cohere": ("CohereConfig", {}, "sdpa"),
    "Llama 4": (
        "Llama4TextConfig",
        {
            **{"head_dim": 8, "attention_chunk_size": 12, "no_rope_layers": [1, 0], "attn_temperature_tuning": False},
            **{"num_local_experts": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 48},
        },
        "sdpa",
    ),
    "Granite": ("GraniteConfig", {"attention_multiplier": 0.2}, "sdpa"),
    "StarCoder2": ("Starcoder2Config", {"sliding_window": 12}, "sdpa"),
    "SmolLM3": ("SmolLM3Config", {}, "sdpa"),
    "GPT-2": ("GPT2Config", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, "sdpa"),
}
WITHOUT_POSITIONS = {"Llama 4"}  # whose layers are not given position_ids: the batch says what is a document
# what models compute in float32, in parameters whose names hold this: sums over ranks are rounded in another order.
# The router of DeepSeek-V3 does so before all that follows; with a router in float64, all differences are below 1e-14
ROUNDED = {"Gemma 2": "norm", "Gemma 3": "norm", "Cohere": "norm", "DeepSeek-V3": "", "Llama 4": ""}
LEAKS = {"gpt-oss"}  # whose own mask shows other documents of a packed row
# before 5.23, the mask of transformers counts chunks from the start of the row, not of the document
MISCOUNTED = {"Llama 4"} if tuple(map(int, version("transformers").split(".")[:2])) < (5, 23) else set()


def model(name, implementation, **changes):
    """Return a model in float64, equal for equal names."""
    import transformers

    kind, options, _ = ARCHITECTURES[name]
    torch.manual_seed(1)
    config = getattr(transformers, kind)(**{**SMALL, **options, **changes})
    config.use_cache = False
    made_model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation, experts_implementation="eager"
    ).double()
    for parameter in made_model.parameters():  # biases, sinks and norms have other values than 0 and 1
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.2)
    return made_model


def plain_attention(module, query, key, value, mask, scaling=None, softcap=None, s_aux=None, **_):
    """Return the equation in its dense form, under a mask that transformers made, where SDPA cannot serve."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # a query without keys has NaN here, as no other query reads it
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if s_aux is not None:
        scores = torch.cat((scores, s_aux[None, :, None, None].expand(*scores.shape[:3], 1)), -1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2), None


def register_plain():
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def mask(*arguments, allow_is_causal_skip=None, allow_is_bidirectional_skip=None, **options):
        return sdpa_mask(*arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=False, **options)

    AttentionInterface.register("plain", plain_attention)
    AttentionMaskInterface.register("plain", mask)


def document_lengths(length):
    return 19, 1, length - 20


def batch(kind, length=LENGTH):
    """Return the tensors of a batch of rows of `length` tokens, and which tokens predict the next one."""
    generator = torch.Generator().manual_seed(2)
    rows = {"plain": 2, "packed": 1, "padded": 2}[kind]
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    labels, real = ids.roll(-1, 1), torch.ones(rows, length, dtype=torch.bool)
    real[:, -1] = False
    positions = torch.arange(length).expand(rows, -1)
    tensors = {"input_ids": ids, "labels": labels}
    if kind == "packed":
        positions = torch.cat([torch.arange(n) for n in document_lengths(length)])[None]
        real[0, torch.tensor(document_lengths(length)).cumsum(0) - 1] = False
    if kind == "padded":
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[0, :9], mask[1, 44:] = 0, 0  # on the left of one row, on the right of the other
        positions = (mask.cumsum(1) - 1).clamp(0)
        real &= (mask & mask.roll(-1, 1)).bool()
        tensors["attention_mask"] = mask
    return {**tensors, "position_ids": positions, "real": real}


def step(net, tensors, count):
    """Return the logits and the sum of losses over `count`, after a backward."""
    inputs = {name: tensors[name] for name in ("input_ids", "attention_mask", "position_ids") if name in tensors}
    logits = net(**inputs).logits
    losses = F.cross_entropy(logits.flatten(0, 1), tensors["labels"].flatten(), reduction="none")
    loss = (losses * tensors["real"].flatten()).sum() / count
    loss.backward()
    return logits.detach(), loss.detach()


def whole_step(name, kind, implementation=None, change=None, length=LENGTH, **changes):
    """Return the logits, the loss and the gradients by their names, of one process."""
    register_plain()
    net = model(name, implementation or ARCHITECTURES[name][2], **changes)
    if change is not None:
        change(net)
    tensors = batch(kind, length)
    rows = [tensors]
    if kind == "packed" and name in LEAKS | MISCOUNTED:
        cut = {each: x.split(document_lengths(length), 1) for each, x in tensors.items()}
        rows = [dict(zip(cut, parts, strict=True)) for parts in zip(*cut.values(), strict=True)]
    results = [step(net, row, tensors["real"].sum()) for row in rows]
    logits, loss = torch.cat([x for x, _ in results], 1), sum(x for _, x in results)
    return logits, loss, {n: zeros_or_grad(p) for n, p in net.named_parameters()}


def split_step(group, name, kind, placement, exchange, extra=None, change=None, changes=None):
    """Return the same of this rank's part of the batch, with tensors `extra`; gradients are sums over the ranks."""
    import lightning_longnet

    net = model(name, "ring", **(changes or {}))
    if change is not None:
        change(net)
    tensors = {**batch(kind), **(extra or {})}
    count = tensors["real"].sum()
    if name in WITHOUT_POSITIONS:
        index = torch.arange(tensors["input_ids"].shape[1])
        tensors["documents"] = (tensors["input_ids"] * 0 + index - tensors["position_ids"]).clamp(0)
    context = made(group, placement)
    context.exchange = exchange
    lightning_longnet.attach_context(net, context)
    part = context.split(tensors, {"position_ids": 1, "real": 1})
    logits, loss = step(net, part, count)
    gradients = {n: zeros_or_grad(p) for n, p in net.named_parameters()}
    for x in (*gradients.values(), loss):
        dist.all_reduce(x, group=group)
    return context.positions, logits, loss, gradients


def zeros_or_grad(parameter):
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def largest_differences(whole, parts, kind):
    """Return the largest differences of logits of tokens, of the loss and of gradients, relative to their norms."""
    logits, loss, gradients = whole
    read = batch(kind, logits.shape[1]).get("attention_mask", torch.ones(logits.shape[:2])).bool()
    joined = torch.full_like(logits, torch.nan)
    for positions, part, _, _ in parts:
        joined[:, positions] = part
    differences = {"logits": relative(joined[read], logits[read]), "loss": relative(parts[0][2], loss)}
    for name, gradient in gradients.items():
        differences[name] = relative(parts[0][3][name], gradient)
    return differences


def relative(x, expected):
    return ((x - expected).norm() / expected.norm().clamp_min(1e-30)).item()
