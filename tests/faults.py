"""Modules that compute something across tokens by themselves, and modules that do it rightly; all are steps on batches.

Each of FAULTS is (class, name of the guilty module, cause).
"""

import torch
import torch.nn.functional as F
from torch import nn

from lightning_longnet import DilatedSelfAttention, LongNet, LongNetConfig, Pattern, sequence_context
from lightning_longnet.attention import attend

VOCABULARY, WIDTH = 19, 8
PATTERN = Pattern.dilated((16, 64), (1, 2), is_causal=True)


def token_loss(module, logits, labels):
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return sequence_context(module).token_mean(losses, (labels != -100).sum())


class Base(nn.Module):
    """An embedding, `mixing` between two layers, a head, and the right loss."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.build()

    def build(self):
        pass

    def mixing(self, x):
        return x

    def logits(self, batch):
        x = self.first(self.embedding(batch["input_ids"])).tanh()
        x = x + self.second(self.mixing(x))
        return self.head(x)

    def step(self, batch):
        return token_loss(self, self.logits(batch), batch["labels"])


class PlainMean(Base):
    def step(self, batch):
        return F.cross_entropy(self.logits(batch).flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)


class PlainMeanAtPlaces(PlainMean):
    """A plain mean in a step that takes the right positions itself."""

    def logits(self, batch):
        x = self.first(self.embedding(batch["input_ids"]))
        places = sequence_context(self).positions_of(x)
        return self.head(x + torch.sin(places.to(x))[..., None])


class OwnAttention(Base):
    def build(self):
        self.attention = Mixer()

    def mixing(self, x):
        return self.attention(x)


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (2, -1)).movedim(-2, -3).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).movedim(-3, -2).flatten(-2)


class WrittenOut(Mixer):
    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.transpose(1, 2) / WIDTH**0.5).softmax(-1) @ v


class WrittenOutAttention(OwnAttention):
    def build(self):
        self.attention = WrittenOut()


class StockMultihead(Base):
    def build(self):
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.1, batch_first=True)

    def mixing(self, x):
        return self.attention(x, x, x)[0]


class LocalPositions(Base):
    def build(self):
        self.positions = Positions()

    def mixing(self, x):
        return self.positions(x)


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4096, WIDTH)

    def forward(self, x):
        return x * self.table(torch.arange(x.shape[1], device=x.device))


class ShiftedInside(Base):
    def step(self, batch):
        return token_loss(self, self.logits(batch)[:, :-1], batch["input_ids"][:, 1:])


class Convolution(Base):
    def build(self):
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def mixing(self, x):
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Recurrence(Base):
    def build(self):
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def mixing(self, x):
        return self.lstm(x)[0]


class Cumulative(Base):
    def build(self):
        self.history = Functional(lambda x: x.cumsum(1) / 100)

    def mixing(self, x):
        return self.history(x)


class Functional(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Flipped(Cumulative):
    def build(self):
        self.history = Functional(lambda x: x.flip(1))


class NormOverTokens(Cumulative):
    def build(self):
        self.history = Functional(lambda x: x / x.norm(dim=1, keepdim=True))


class Centred(Cumulative):
    def build(self):
        self.history = Functional(lambda x: x - x.mean(1, keepdim=True))


class BatchNormed(Base):
    def build(self):
        self.norm = nn.BatchNorm1d(WIDTH)

    def mixing(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class Pooled(Base):
    """A class for each sequence, out of the mean of its tokens."""

    def build(self):
        self.pool = Functional(lambda x: x.mean(1))

    def step(self, batch):
        x = self.first(self.embedding(batch["input_ids"])).tanh()
        labels = batch["input_ids"].new_zeros(len(x))
        return F.cross_entropy(self.head(self.pool(x)), labels)


class CrossAttention(Base):
    """Torch's own attention to a memory that is split, too."""

    def build(self):
        self.cross = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def mixing(self, x):
        queries = self.embedding.weight[:5].expand(len(x), -1, -1)
        memory = self.cross(queries, x, x)[0]
        return x * memory.mean(1, keepdim=True)


class HiddenByAGate(OwnAttention):
    """A gate that begins at zero hides the fault from a check at the initial values."""

    def build(self):
        super().build()
        self.gate = nn.Parameter(torch.zeros(WIDTH))

    def mixing(self, x):
        return self.gate * self.attention(x)


class DetachedSum(Base):
    """The right value without its gradient."""

    def step(self, batch):
        loss = super().step(batch)
        pooled = self.embedding(batch["input_ids"]).sum(1)
        return loss + (sequence_context(self).sum_parts(pooled.detach()) + pooled - pooled.detach()).square().mean()


class SummedLoss(Base):
    """A sum where engines average."""

    def step(self, batch):
        losses = F.cross_entropy(self.logits(batch).flatten(0, 1), batch["labels"].flatten(), reduction="sum")
        return losses / 100


FAULTS = [
    (PlainMean, "the step itself", "mean"),
    (OwnAttention, "attention", "attention"),
    (WrittenOutAttention, "attention", "attention"),
    (StockMultihead, "attention", "attention"),
    (LocalPositions, "positions", "positions"),
    (ShiftedInside, "the step itself", "shift"),
    (Convolution, "conv", "neighbours"),
    (Recurrence, "lstm", "state"),
    (Cumulative, "history", "order"),
    (Flipped, "history", "order"),
    (NormOverTokens, "history", "reduction"),
    (Centred, "history", "reduction"),
    (BatchNormed, "norm", "statistics"),
    (Pooled, "pool", "reduction"),
    (CrossAttention, "cross", "attention"),
    (HiddenByAGate, "attention", "attention"),
    (DetachedSum, "the step itself", "reduction"),
    (SummedLoss, None, None),
    (PlainMeanAtPlaces, "the step itself", "mean"),
]


# Right modules


class OurAttention(Base):
    def build(self):
        self.attention = DilatedSelfAttention(WIDTH, 2, PATTERN, dropout=0.1)

    def mixing(self, x):
        return self.attention(x)


class OurFunction(Base):
    def build(self):
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def mixing(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (2, -1)).chunk(3, -1)
        return sequence_context(self).attend(q, k, v, Pattern.dense()).flatten(-2)


class RightPositions(LocalPositions):
    def mixing(self, x):
        return x * self.positions.table(sequence_context(self).positions_of(x))


class Dropped(Base):
    def build(self):
        self.dropout = nn.Dropout(0.5)

    def mixing(self, x):
        return F.dropout(self.dropout(x), 0.3, training=self.training)


class Gathered(Base):
    def build(self):
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def mixing(self, x):
        context = sequence_context(self)
        whole = self.lstm(context.gather_sequence(x))[0]
        return whole[:, context.positions] if context.is_split else whole


class PooledRightly(Pooled):
    def build(self):
        self.pool = Functional(lambda x: x.sum(1))

    def step(self, batch):
        context = sequence_context(self)
        x = self.first(self.embedding(batch["input_ids"])).tanh()
        mean = context.sum_parts(self.pool(x)) / context.length
        return F.cross_entropy(self.head(mean), batch["input_ids"].new_zeros(len(x)))


class Normed(Base):
    def build(self):
        self.norms = nn.Sequential(nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH))

    def mixing(self, x):
        return self.norms(x)


class InFloat32(Base):
    """Some of it in another dtype than the check's."""

    def mixing(self, x):
        return x.float().exp().sqrt().to(x.dtype)


class Checkpointed(OurAttention):
    def mixing(self, x):
        return torch.utils.checkpoint.checkpoint(self.attention, x, use_reentrant=False)


class Counting(Base):
    """Attributes that a step changes."""

    def build(self):
        self.calls, self.seen = 0, []
        self.register_buffer("average", torch.zeros(()))

    def step(self, batch):
        self.calls += 1
        loss = super().step(batch)
        self.seen.append(loss.detach())
        self.average.mul_(0.9).add_(0.1 * loss.detach())
        return loss


class Tied(Base):
    def build(self):
        self.head.weight = self.embedding.weight


class Frozen(Base):
    def build(self):
        self.first.requires_grad_(False)


class Dictionary(Base):
    def step(self, batch):
        return {"loss": super().step(batch), "note": "text"}


class Convolved(Base):
    """A convolution along features crosses no tokens."""

    def build(self):
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def mixing(self, x):
        return self.conv(x.flatten(0, 1)[:, None])[:, 0].view_as(x)


class Experts(Base):
    """A token goes to one expert or the other."""

    def build(self):
        self.router = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])

    def mixing(self, x):
        chosen = self.router(x).softmax(-1)
        return sum(expert(x) * chosen[..., i : i + 1] for i, expert in enumerate(self.experts))


class EvenOnly(Base):
    """Lengths that are even on each rank alone."""

    def mixing(self, x):
        pairs = x.reshape(len(x), x.shape[1] // 2, 2 * WIDTH)
        return pairs.tanh().view_as(x)


class Shared(OurAttention):
    """One layer that is called twice."""

    def mixing(self, x):
        return self.attention(self.attention(x))


class HandWritten(Base):
    """The mean over tokens written with torch.distributed."""

    def step(self, batch):
        labels = batch["labels"].flatten()
        losses = F.cross_entropy(self.logits(batch).flatten(0, 1), labels, ignore_index=-100, reduction="sum")
        count = (labels != -100).sum().to(losses.dtype)
        torch.distributed.all_reduce(count)
        return losses / count * torch.distributed.get_world_size()


class Whole(nn.Module):
    """A LongNet of this package."""

    def __init__(self):
        super().__init__()
        config = LongNetConfig(
            pattern=PATTERN, vocab_size=VOCABULARY, dim=16, layers=2, heads=2, dropout=0.1, sub_norm=True
        )
        self.model = LongNet(config)

    def step(self, batch):
        return sequence_context(self).token_mean(*self.model(batch["input_ids"], batch["labels"]))


class Direct(Base):
    """The function `attend` with the context's shard."""

    def build(self):
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def mixing(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (2, -1)).chunk(3, -1)
        return attend(q, k, v, PATTERN, shard=sequence_context(self).shard).flatten(-2)


RIGHT = [
    *(OurAttention, OurFunction, RightPositions, Dropped, Gathered, PooledRightly, Normed, InFloat32, Checkpointed),
    *(Counting, Tied, Frozen, Dictionary, Convolved, Experts, EvenOnly, Shared, HandWritten, Whole, Direct),
]
