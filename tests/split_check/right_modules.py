"""Right modules as users write them, which the split check must not accuse."""

import functools
import weakref
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from faults import PATTERN, VOCABULARY, WIDTH, token_loss
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from zoo import Zoo, rotated

from lightning_longnet import DilatedSelfAttention, Pattern, sequence_context


class Llama(Zoo):
    """Rotary positions out of the batch, grouped heads, SwiGLU."""

    def build(self):
        self.q, self.kv = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm, self.gate, self.up = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16)
        self.down = nn.Linear(16, WIDTH)

    @classmethod
    def more(cls, batch):
        ids = batch["input_ids"]
        return {**batch, "position_ids": torch.arange(ids.shape[1]).expand_as(ids).clone()}

    def step(self, batch):
        x = self.norm(self.embedding(batch["input_ids"]))
        k, v = self.kv(x).unflatten(-1, (1, -1)).chunk(2, -1)
        q, k = rotated(self.q(x).unflatten(-1, (2, -1)), batch["position_ids"]), rotated(k, batch["position_ids"])
        x = x + sequence_context(self).attend(q, k, v, Pattern.dense(is_causal=True)).flatten(-2)
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return token_loss(self, self.head(x), batch["labels"])


class Popping(Zoo):
    """Takes the labels out of its batch, as Hugging Face's trainers do, and changes the rest in place."""

    def step(self, batch):
        labels = batch.pop("labels")
        batch["input_ids"].add_(1).remainder_(VOCABULARY)
        return token_loss(self, self.logits(batch), labels)


class ClassToken(Zoo):
    """A token more, which the first rank holds."""

    def build(self):
        self.token, self.scorer = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Linear(WIDTH, 1)

    def step(self, batch):
        context = sequence_context(self)
        x = context.gather_sequence(self.embedding(batch["input_ids"]))
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        pooled = (self.scorer(x).softmax(1) * x).sum(1)
        return F.cross_entropy(self.head(pooled), batch["input_ids"].new_zeros(len(x)), label_smoothing=0.1)


class Smoothed(Zoo):
    def step(self, batch):
        logits, labels = self.logits(batch), batch["labels"]
        losses = F.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=-100, reduction="sum", label_smoothing=0.1
        )
        return sequence_context(self).token_mean(losses, (labels != -100).sum())


class Contrastive(Zoo):
    """Embeddings of sequences against each other."""

    def embedded(self, x):
        context = sequence_context(self)
        return F.normalize(context.sum_parts(x.sum(1)), dim=-1)

    def step(self, batch):
        x = self.first(self.embedding(batch["input_ids"])).tanh()
        z = self.embedded(x)
        return F.cross_entropy(z @ self.embedded(self.second(x)).T * 10, torch.arange(len(z)))


class Teacher(Zoo):
    """An average of the weights, which the step updates."""

    def build(self):
        self.teacher = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.history = deque(maxlen=3)

    def mixing(self, x):
        with torch.no_grad():
            for a, b in zip(self.teacher.parameters(), self.first.parameters(), strict=True):
                a.lerp_(b, 0.1)
        self.history.append(float(x.detach().norm()))
        return self.teacher(x)


class Compiled(Zoo):
    """A compiled child, and a compiled method."""

    def build(self):
        self.child = torch.compile(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()))
        self.function = torch.compile(self.inner)

    def inner(self, x):
        return self.second(x).tanh()

    def mixing(self, x):
        return self.function(self.child(x))


class Reentrant(Zoo):
    def build(self):
        self.attention = DilatedSelfAttention(WIDTH, 2, PATTERN)

    def mixing(self, x):
        return checkpoint(self.attention, x, use_reentrant=True)


class Normalized(Zoo):
    """Weight norm, spectral norm whose buffers change in the forward, and the former weight norm."""

    def build(self):
        self.a = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.b = parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.c = parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH))

    def mixing(self, x):
        return self.c(self.b(self.a(x)))


class FormerWeightNorm(Zoo):
    def build(self):
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.a = nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))

    def mixing(self, x):
        return self.a(x)


class KeepsItsOutput(Zoo):
    """A tensor of a graph that is kept from before."""

    def build(self):
        self.last = self.first(torch.ones(WIDTH))

    def mixing(self, x):
        self.last = self.first(x)
        return x


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -0.5 * grad


class Reversed(Zoo):
    def mixing(self, x):
        return Reversal.apply(x)


class Routed(Zoo):
    """Two experts of four for each token, and a loss that balances their loads over all tokens."""

    def build(self):
        self.router = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])

    def share(self, x):
        context = sequence_context(self)
        count = torch.tensor(float(x.shape[0] * x.shape[1]), dtype=x.dtype)
        return context.sum_parts(x.sum((0, 1))) / context.sum_parts(count)

    def mixing(self, x):
        scores = self.router(x).softmax(-1)
        weights, chosen = scores.topk(2, -1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = chosen == i
            if rows.any():
                where = rows.any(-1)
                out[where] += expert(x[where]) * (weights * rows).sum(-1)[where][:, None]
        used = F.one_hot(chosen, 4).sum(2).to(x.dtype)
        self.balance = 4 * (self.share(used) * self.share(scores)).sum()
        return out

    def step(self, batch):
        return super().step(batch) + 0.01 * self.balance


class LoRA(Zoo):
    def build(self):
        self.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(WIDTH, 2)), nn.Parameter(torch.zeros(2, WIDTH))

    def mixing(self, x):
        return x @ self.a @ self.b


class Clipped(Zoo):
    """A quantile over features, and a median of whole sequences."""

    def mixing(self, x):
        whole = sequence_context(self).gather_sequence(x)
        return x.minimum(x.quantile(0.9, -1, keepdim=True)) - whole.median(1, keepdim=True).values


class RelativeBias(Zoo):
    """Custom attention to gathered keys, with a bias of distances and ALiBi."""

    def build(self):
        self.qkv, self.bias = nn.Linear(WIDTH, 3 * WIDTH), nn.Embedding(32, 2)

    def mixing(self, x):
        context = sequence_context(self)
        q, k, v = self.qkv(x).unflatten(-1, (2, -1)).chunk(3, -1)
        k, v = context.gather_sequence(k), context.gather_sequence(v)
        distance = context.positions_of(x)[:, None] - torch.arange(k.shape[1])
        bias = self.bias(distance.clamp(-15, 15) + 15).permute(2, 0, 1) - distance.abs() / 8
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype)).transpose(1, 2).flatten(2)


class PlainTensors(Zoo):
    """Tensors that are plain attributes, one of them cached by a property."""

    def build(self):
        self.scale = torch.linspace(0.5, 1.5, WIDTH)

    @functools.cached_property
    def table(self):
        return torch.randn(512, WIDTH, generator=torch.Generator().manual_seed(0))

    def mixing(self, x):
        return x * self.scale + self.table[sequence_context(self).positions_of(x)]


class Half(Zoo):
    def build(self):
        self.bfloat16()


class InBfloat16(Zoo):
    """Casts that only bfloat16 fits, whose rounding would hide a fault."""

    KIND = "inconclusive"

    def build(self):
        self.bfloat16()

    def mixing(self, x):
        return x.bfloat16() @ self.second.weight.bfloat16()

    def logits(self, batch):
        x = self.first(self.embedding(batch["input_ids"])).tanh()
        return self.head(self.second(self.mixing(x).to(torch.bfloat16)))


class Double(Zoo):
    def build(self):
        self.double()


class KeepsContext(Zoo):
    """The context as an attribute, taken once."""

    def build(self):
        self.context = None
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def begin(self):
        self.context = sequence_context(self)

    def mixing(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (2, -1)).chunk(3, -1)
        return self.context.attend(q, k, v, PATTERN).flatten(-2) * (1 + self.context.positions_of(x))[:, None] / 100


class OfFixedLength(Zoo):
    LENGTH = 64

    def build(self):
        self.places = nn.Parameter(torch.randn(64, WIDTH))

    def mixing(self, x):
        context = sequence_context(self)
        if context.length != 64:
            raise ValueError(f"64 tokens, got {context.length}")
        return x + (self.places[context.positions] if context.is_split else self.places)


class InBlocks(Zoo):
    """Padding to blocks of 20, which no rank needs at the real length."""

    LENGTH = 240
    KIND = "inconclusive"

    def mixing(self, x):
        blocks = F.pad(x, (0, 0, 0, -x.shape[1] % 20)).unflatten(1, (-1, 20))
        return (blocks - blocks.mean(2, keepdim=True)).flatten(1, 2)[:, : x.shape[1]]


class Strided(Zoo):
    """Patches of five tokens, which no rank cuts at the real length; the rest of a division is dropped."""

    LENGTH = 240
    KIND = "inconclusive"

    def build(self):
        self.patch = nn.Conv1d(WIDTH, WIDTH, 5, stride=5)

    def step(self, batch):
        x = self.patch(self.first(self.embedding(batch["input_ids"])).transpose(1, 2)).transpose(1, 2)
        losses = self.head(x.tanh()).logsumexp(-1)
        return sequence_context(self).token_mean(losses.sum(), losses.numel())


class EqualPartsOnly(Zoo):
    """Refuses parts that other ranks have not alike: an error on one rank alone."""

    LENGTH = 240

    def mixing(self, x):
        if x.shape[1] % 2 == 1 and sequence_context(self).is_split:
            raise ValueError("an even number of tokens on each rank")
        return x


class Regression(Zoo):
    """A plain mean over tokens of which each rank has equally many."""

    LENGTH = 240
    KIND = "inconclusive"

    @classmethod
    def more(cls, batch):
        ids = batch["input_ids"]
        generator = torch.Generator().manual_seed(int(ids.sum()))
        return {"input_ids": ids, "targets": torch.randn(*ids.shape, VOCABULARY, generator=generator)}

    def step(self, batch):
        return F.mse_loss(self.logits(batch), batch["targets"])


class Hooked(Zoo):
    """Features that a hook collects, whose function holds the module."""

    def build(self):
        self.features = []
        self.first.register_forward_hook(lambda *call: self.features.append(call[-1]))
        self.transform = lambda x: self.second(x).tanh()

    def mixing(self, x):
        return self.transform(self.features.pop())


class DropsPaths(Zoo):
    """Draws that are the same for any number of tokens, and draws of separate generators."""

    def build(self):
        self.generator, self.numpy = torch.Generator().manual_seed(5), np.random.default_rng(5)

    def mixing(self, x):
        kept = torch.rand(len(x), 1, 1, generator=self.generator) + torch.rand(len(x), 1, 1) > 0.5
        return x * kept * float(self.numpy.random())


class Noisy(Zoo):
    """Noise on each token, out of a separate generator: no verdict."""

    KIND = "inconclusive"

    def build(self):
        self.generator = torch.Generator().manual_seed(5)

    def mixing(self, x):
        return x + torch.randn(x.shape, generator=self.generator)


class NoisyByNumpy(Noisy):
    def build(self):
        self.numpy = np.random.default_rng(5)

    def mixing(self, x):
        return x + torch.from_numpy(self.numpy.normal(size=tuple(x.shape))).to(x.dtype)


class SampledTokens(Zoo):
    """A loss more at a few tokens that each rank draws."""

    KIND = "inconclusive"

    def step(self, batch):
        logits = self.logits(batch)
        chosen = torch.randint(0, logits.shape[1], (8,))
        more = logits[:, chosen].logsumexp(-1)
        return token_loss(self, logits, batch["labels"]) + sequence_context(self).token_mean(more.sum(), more.numel())


class Root(Zoo):
    """The root of a buffer and of a parameter, which 10 % more makes no number."""

    def build(self):
        self.register_buffer("kept", torch.ones(WIDTH))
        self.width = nn.Parameter(torch.zeros(WIDTH))

    def mixing(self, x):
        return x * (1 + (1 - self.kept).sqrt()) * (1 + (self.width + 1e-9).sqrt())


class RootOfWeight(Zoo):
    def build(self):
        self.share = nn.Parameter(torch.full((WIDTH,), 0.99))

    def mixing(self, x):
        return x * (1 - self.share).sqrt()


class Transposed(Zoo):
    """A parameter whose numbers are not in a row."""

    def build(self):
        self.matrix = nn.Parameter(torch.randn(16, WIDTH).t())
        self.register_buffer("wide", torch.arange(4.0).expand(WIDTH, 4).t())

    def mixing(self, x):
        return x @ self.matrix @ self.matrix.t() + self.wide.sum(0)


class OwnCollectives(Zoo):
    """Ranks ask torch.distributed themselves."""

    def step(self, batch):
        x = self.first(self.embedding(batch["input_ids"])).tanh()
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        tokens = torch.tensor(x.shape[1])
        lengths = [torch.zeros_like(tokens) for _ in range(ranks)]
        dist.all_gather(lengths, tokens)
        places = sum(lengths[:rank], torch.tensor(0)) + torch.arange(x.shape[1])
        return token_loss(self, self.head(x * (1 + places[:, None] / 100)), batch["labels"])


class Weak(Zoo):
    """A child that knows its parent."""

    def build(self):
        self.child = nn.Identity()
        self.child.parent = weakref.ref(self)

    def mixing(self, x):
        return x + self.child.parent().WIDEN if hasattr(self.child.parent(), "WIDEN") else x


class Marked(Zoo):
    """Attributes of parameters."""

    def build(self):
        for parameter in self.parameters():
            parameter.scale = 0.5

    def mixing(self, x):
        return x * self.second.weight.scale


class Documents(Zoo):
    """Packed documents and padding at the left."""

    def build(self):
        self.attention = DilatedSelfAttention(WIDTH, 2, PATTERN)

    @classmethod
    def more(cls, batch):
        ids = batch["input_ids"]
        return {**batch, "documents": (torch.arange(ids.shape[1]) // 50).expand_as(ids).clone()}

    def step(self, batch):
        x = self.attention(self.first(self.embedding(batch["input_ids"])), documents=batch["documents"])
        return token_loss(self, self.head(x), batch["labels"])


class LeftPadded(Documents):
    @classmethod
    def more(cls, batch):
        mask = torch.ones_like(batch["input_ids"])
        for i in range(len(mask)):
            mask[i, : 30 * i] = 0
        return {"input_ids": batch["input_ids"], "attention_mask": mask}

    def step(self, batch):
        x = self.attention(
            self.first(self.embedding(batch["input_ids"])), key_padding_mask=batch["attention_mask"] == 0
        )
        losses = self.head(x).logsumexp(-1) * batch["attention_mask"]
        return sequence_context(self).token_mean(losses.sum(), batch["attention_mask"].sum())


@dataclass
class Sample:
    signal: torch.Tensor
    label: torch.Tensor


class SignalFirst(Zoo):
    """A dataclass with sequences in dimension 0, and a label for each of them; validated numbers."""

    @classmethod
    def more(cls, batch):
        return Sample(batch["input_ids"].t()[..., None].float() / VOCABULARY, torch.tensor([0, 1, 1.0]))

    def build(self):
        self.into = nn.Linear(1, WIDTH)

    def step(self, batch):
        context = sequence_context(self)
        x = self.into(batch.signal).tanh()
        pooled = context.sum_parts(self.first(x).sum(0)) / (context.length or len(x))
        logits = self.head(pooled)[:, 0]
        return -torch.distributions.Bernoulli(logits=logits, validate_args=True).log_prob(batch.label).mean()


class Tupled(Zoo):
    """A batch that is a tuple."""

    @classmethod
    def more(cls, batch):
        return batch["input_ids"], batch["labels"]

    def step(self, batch):
        ids, labels = batch
        return token_loss(self, self.logits({"input_ids": ids}), labels)


class Short(Zoo):
    """As many tokens as ranks."""

    LENGTH = 2

    @classmethod
    def more(cls, batch):
        return {**batch, "labels": batch["input_ids"]}


class Hopeless(Zoo):
    """A gradient that is no number, for sequences that are whole as well."""

    KIND = "not checked"

    def mixing(self, x):
        return x * (self.first.weight * 0).square().sum().sqrt()


RIGHT = [
    *(Llama, Popping, ClassToken, Smoothed, Contrastive, Teacher, Compiled, Reentrant, Normalized, FormerWeightNorm),
    *(KeepsItsOutput, Reversed, Routed, LoRA, Clipped, RelativeBias, PlainTensors, Half, InBfloat16, Double),
    *(KeepsContext, OfFixedLength, InBlocks, Strided, EqualPartsOnly, Regression, Hooked, DropsPaths, Noisy),
    *(NoisyByNumpy, SampledTokens, Root, RootOfWeight, Transposed, OwnCollectives, Weak, Marked, Documents),
    *(LeftPadded, SignalFirst, Tupled, Short, Hopeless),
]
