"""Wrong modules as users write them, which the split check must find, and one that some ranks cannot copy."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from faults import PATTERN, WIDTH, Base, token_loss
from right_modules import ClassToken, Contrastive, KeepsContext, Llama, RelativeBias, Routed
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import Zoo, rotated

from lightning_longnet import DilatedSelfAttention, Pattern, sequence_context


class OwnLlama(Llama):
    """Attention among this rank's tokens; the positions are right."""

    def step(self, batch):
        x = self.norm(self.embedding(batch["input_ids"]))
        k, v = self.kv(x).unflatten(-1, (1, -1)).chunk(2, -1)
        q, k = rotated(self.q(x).unflatten(-1, (2, -1)), batch["position_ids"]), rotated(k, batch["position_ids"])
        q, k, v = q.transpose(1, 2), k.transpose(1, 2).expand(-1, 2, -1, -1), v.transpose(1, 2).expand(-1, 2, -1, -1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return token_loss(self, self.head(x), batch["labels"])


class TokenOnEachRank(ClassToken):
    """A class token that each rank adds to its part."""

    def build(self):
        super().build()
        self.attention = DilatedSelfAttention(WIDTH, 2, Pattern.dense())

    def mixing(self, x):
        return torch.cat([self.token.expand(len(x), -1, -1), x[:, :-1]], 1)

    def step(self, batch):
        return Base.step(self, batch)


class SmoothedMean(Zoo):
    """Label smoothing in a plain mean, popping the labels."""

    def step(self, batch):
        labels = batch.pop("labels")
        return F.cross_entropy(self.logits(batch).transpose(1, 2), labels, label_smoothing=0.1)


class MeanOfLabels(Zoo):
    """A plain mean, and one label fewer in the longer part, so that both ranks have as many."""

    LENGTH = 129

    @classmethod
    def more(cls, batch):
        labels = batch["labels"].clone()
        labels[:, 100] = -100
        return {**batch, "labels": labels}

    def step(self, batch):
        return F.cross_entropy(self.logits(batch).transpose(1, 2), batch["labels"])


class ContrastiveParts(Contrastive):
    def embedded(self, x):
        return F.normalize(x.mean(1), dim=-1)


class BalancedByParts(Routed):
    """Loads of experts on this rank alone."""

    def share(self, x):
        return x.mean((0, 1))


class CompiledAttention(Zoo):
    def build(self):
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.function = torch.compile(self.inner)

    def inner(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)

    def mixing(self, x):
        return self.function(x)


class CheckpointedConvolution(Zoo):
    def build(self):
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2)

    def mixing(self, x):
        return checkpoint(self.causal, x, use_reentrant=True)

    def causal(self, x):
        return self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class HookedSum(Zoo):
    """A hook that centres features over tokens."""

    def build(self):
        self.first.register_forward_hook(lambda module, args, x: x - x.mean(1, keepdim=True))


class NormalizedByQuantile(Zoo):
    def mixing(self, x):
        return x / (1 + x.flatten(1).quantile(0.5, 1)[:, None, None].abs())


class LocalBias(RelativeBias):
    """Distances that count from 0 on each rank."""

    def mixing(self, x):
        context = sequence_context(self)
        q, k, v = self.qkv(x).unflatten(-1, (2, -1)).chunk(3, -1)
        k, v = context.gather_sequence(k), context.gather_sequence(v)
        distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
        bias = self.bias(distance.clamp(-15, 15) + 15).permute(2, 0, 1)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype)).transpose(1, 2).flatten(2)


class Scanned(Zoo):
    """A state space scan, written as a loop."""

    def build(self):
        self.decay = nn.Parameter(torch.full((WIDTH,), 0.9))

    def mixing(self, x):
        state, out = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = self.decay * state + x[:, t]
            out.append(state)
        return torch.stack(out, 1)


class DropsPathsAndMixes(Zoo):
    """Draws that are the same for any number of tokens hide no fault."""

    def build(self):
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def mixing(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v) * (torch.rand(len(x), 1, 1) > 0.3)


class KeepsWrongContext(KeepsContext):
    def mixing(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (2, -1)).chunk(3, -1)
        places = torch.arange(x.shape[1]) + 0 * self.context.positions_of(x)
        return self.context.attend(q, k, v, PATTERN).flatten(-2) * (1 + places)[:, None] / 100


class Squeezed(Zoo):
    """Squeeze and excitation over channels of a sequence."""

    def build(self):
        self.gate = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(WIDTH, WIDTH), nn.Sigmoid())

    def mixing(self, x):
        return x * self.gate(x.transpose(1, 2))[:, None]


class GroupNormed(Zoo):
    def build(self):
        self.norm = nn.GroupNorm(2, WIDTH)

    def mixing(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class Fourier(Zoo):
    def mixing(self, x):
        return torch.fft.fft(torch.fft.fft(x, dim=-1), dim=1).real


class MixedTokens(Zoo):
    """An MLP-Mixer's matrix over tokens of a fixed length."""

    LENGTH = 64

    def build(self):
        self.tokens = nn.Parameter(torch.randn(64, 64) / 8)

    def mixing(self, x):
        n = x.shape[1]
        if not sequence_context(self).is_split and n != 64:
            raise ValueError("64 tokens")
        return self.tokens[:n, :n] @ x


class Rolled(Zoo):
    def mixing(self, x):
        return x + torch.roll(x, 1, 1)


class Sorted(Zoo):
    def mixing(self, x):
        return x.sort(1).values


class LastToken(Zoo):
    """A class out of the last token."""

    def step(self, batch):
        x = self.logits(batch)[:, -1]
        return F.cross_entropy(x, batch["input_ids"].new_zeros(len(x)))


class Accuracy(Zoo):
    """A weight out of a count on this rank."""

    def step(self, batch):
        logits = self.logits(batch)
        weight = (logits.argmax(-1) == batch["input_ids"]).to(logits.dtype).mean()
        return token_loss(self, logits, batch["labels"]) * (1 + weight.detach())


class HalfAttention(Zoo):
    """Custom attention with bfloat16 weights."""

    def build(self):
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.bfloat16()

    def mixing(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


class SummedGradient(Zoo):
    """The right loss, whose gradient is one rank's part of it: sum_parts of a detached tensor."""

    def step(self, batch):
        x = self.logits(batch)
        losses = F.cross_entropy(x.flatten(0, 1), batch["labels"].flatten(), reduction="sum", ignore_index=-100)
        whole = sequence_context(self).sum_parts(losses.detach())
        count = sequence_context(self).sum_parts((batch["labels"] != -100).sum().to(losses.dtype))
        return (whole + losses - losses.detach()) / count


class CosineSchedule(Zoo):
    """A regularizer that counts this rank's tokens."""

    def step(self, batch):
        return super().step(batch) + 1e-3 * batch["input_ids"].shape[1] * self.first.weight.norm()


class NoneWithoutLabels(Zoo):
    """A rank without labels leaves its step while others wait for it."""

    def step(self, batch):
        context = sequence_context(self)
        if context.is_split and context.sequence_parallel_rank == 1:
            return None
        return super().step(batch)


WRONG = [
    *(OwnLlama, TokenOnEachRank, SmoothedMean, MeanOfLabels, ContrastiveParts, BalancedByParts, CompiledAttention),
    *(CheckpointedConvolution, HookedSum, NormalizedByQuantile, LocalBias, Scanned, DropsPathsAndMixes),
    *(KeepsWrongContext, Squeezed, GroupNormed, Fourier, MixedTokens, Rolled, Sorted, LastToken, Accuracy),
    *(HalfAttention, SummedGradient, CosineSchedule),
]


class Uncopied:
    def __deepcopy__(self, memo):
        raise NameError("no copies of this")


class LockOfFirst(Zoo):
    """An object that rank 0 alone holds, such as a writer, and whose own copy method fails."""

    def build(self):
        if dist.is_initialized() and dist.get_rank() == 0:
            self.writer = Uncopied()
