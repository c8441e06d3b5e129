"""What a plan says of memory and of what is computed, beside counts of the same by other means."""

from dataclasses import replace

import pytest
import torch
from tiers import tiered
from torch.profiler import ProfilerActivity, profile

from lightning_longnet import LongNet, LongNetConfig, Pattern
from lightning_longnet.planning.devices import named
from lightning_longnet.planning.engines import Weights
from lightning_longnet.planning.exchange import layer_kinds
from lightning_longnet.planning.flops import ModelFlops
from lightning_longnet.planning.job import Job
from lightning_longnet.planning.run import plan_run
from lightning_longnet.planning.traced import trace

pytestmark = pytest.mark.filterwarnings("ignore:.*(Nothing crosses|no head attends).*:UserWarning")
PATTERN = Pattern.dilated((64, 256), (1, 4), is_causal=True)
CONFIGS = [
    {},
    {"recompute": "all but attention", "activation": "swiglu", "kv_heads": 2},
    {"recompute": "everything", "feed_forward_chunk": 100, "rotary": None},
]
SHAPE = {"dim": 64, "layers": 3, "heads": 4, "vocab_size": 300, "loss_chunk": 128}


def job_of(tokens=512, config=None, **options):
    return Job(
        LongNetConfig(**{"pattern": PATTERN, **SHAPE, **(config or {})}), tokens, **{"sharding": "ddp", **options}
    )


def allocated(config, tokens, batch):
    """The most that torch's allocator held at once in a step beyond the parameters, by its own events."""
    model = LongNet(config)
    ids = torch.zeros(batch, tokens, dtype=torch.long)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as result:
        loss_sum, count = model(ids, ids)
        (loss_sum / count).backward()
    held = most = 0
    events = [e for e in result.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize(
    "config",
    tiered(CONFIGS, quick=CONFIGS[1:2]),
)
def test_a_trace_holds_what_the_allocator_holds(config):
    job = job_of(config=config, batch=2)
    (kind,) = layer_kinds(job)
    traced = trace(job, 0, {kind.pattern.dumps(): kind.shares[0].footprint})
    planned = max(sum(moment[1:]) for moment in traced.moments)
    assert planned == pytest.approx(allocated(job.config, 512, 2), rel=0.15)


@pytest.mark.long
def test_what_waits_on_the_host_is_not_held_by_the_device():
    config = {"recompute": "all but attention", "feed_forward_chunk": 32}
    plain, offloaded = (
        plan_run(job_of(config={**config, "offload_activations": each}, batch=2), named("h200"))
        for each in (False, True)
    )
    hidden, lse = 4 * 2 * 512 * SHAPE["dim"], 4 * 2 * 512 * SHAPE["heads"]
    moved = plain.memory.activations - offloaded.memory.activations
    # at the fullest moment, in the last layer, its own input and results of attention are back
    assert moved == pytest.approx((SHAPE["layers"] - 1) * (2 * hidden + lse), rel=0.05)
    assert "what is kept in the host's memory is not counted" in str(offloaded)


def test_what_is_kept_of_other_ranks_is_counted_in_every_layer():
    job = job_of(per_node=4)
    (kind,) = layer_kinds(job)
    assert kind.schedule.exchanges == ("gather", "gather")
    kept = [share.volume.kept_bytes for share in kind.shares.values()]
    assert max(kept) > min(kept)
    for rank in (kept.index(max(kept)), kept.index(min(kept))):
        traced = trace(job, rank, {kind.pattern.dumps(): kind.shares[rank].footprint})
        assert max(moment.exchange for moment in traced.moments) == 3 * kept[rank]


def test_parameters_and_pairs_are_those_of_the_model():
    job = job_of(tokens=500, per_node=4, config={"kv_heads": 2})
    weights, model = Weights.of(job), LongNet(job.config)
    assert weights.parameters == sum(p.numel() for p in model.parameters())
    assert weights.all == 4 * weights.parameters == weights.root + 3 * weights.block
    assert weights.token == ModelFlops.of(model).token
    (kind,) = layer_kinds(job)
    shown = int(PATTERN.mask(500, 4, 2).sum())
    assert sum(share.pairs for share in kind.shares.values()) == shown


@pytest.mark.long
def test_engines_split_what_they_split():
    peaks = {
        sharding: plan_run(job_of(tokens=64, per_node=4, sharding=sharding, bucket=1000), named("h200")).memory
        for sharding in ("ddp", "fsdp2", "hsdp", "deepspeed_stage_1", "deepspeed_stage_3")
    }
    whole = Weights.of(job_of()).all
    assert peaks["ddp"].optimizer == 2 * whole
    assert {peaks[name].optimizer for name in peaks if name != "ddp"} == {whole / 2}
    assert all(peaks[name].peak < peaks["ddp"].peak for name in peaks if name != "ddp")


@pytest.mark.long
def test_the_longest_sequence_fits_and_a_longer_one_does_not():
    device = replace(named("h200"), memory=60e6)
    job = job_of(tokens=1024)
    longest = plan_run(job, device).longest
    assert longest > 1024
    fits = [plan_run(replace(job, tokens=tokens), device).fits for tokens in (int(0.98 * longest), int(1.02 * longest))]
    assert fits == [True, False]


@pytest.mark.long
def test_what_does_not_fit_is_refused_with_what_would():
    device = replace(named("h200"), memory=20e6)
    plan = plan_run(job_of(tokens=2048), device)
    assert not plan.fits
    assert plan.advice
    assert "--model.config.recompute everything" in str(plan)
    for each in plan.advice:
        assert each.peak <= plan.usable < plan.memory.peak


@pytest.mark.long
def test_more_work_takes_longer_and_a_slow_link_is_waited_for():
    job, device = job_of(tokens=512, per_node=4), named("h200")
    plan, longer = (plan_run(replace(job, tokens=n), device) for n in (512, 700))
    for name in ("linear", "attention", "other"):
        assert getattr(plan.time, name) < getattr(longer.time, name)
    assert plan.time.hidden_share is not None
    slow = plan_run(job, replace(device, node_link=1e6))
    assert slow.time.exchange > plan.time.exchange
    assert slow.time.hidden_share < plan.time.hidden_share
    assert plan_run(replace(job, sequence_parallel_size=1), device).time.hidden_share is None
    assert 0 < plan.mfu < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens must be a positive integer, got 0"),
        ({"tokens": 3, "per_node": 4}, "at least one token for each of the 4 ranks"),
        ({"per_node": 4, "sequence_parallel_size": 3}, "sequence_parallel_size"),
        ({"config": {"attention": {"class_path": "torch.nn.Linear"}}}, "attention must be None"),
        ({"config": {"ordering": "hilbert", "pattern": Pattern.dense(True)}}, "ordering must be 'raster' in a plan"),
    ],
)
def test_what_cannot_be_planned_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        job_of(**options)


@pytest.mark.parametrize("preset", tiered(["production", "block_sparse", "ring"], quick=["block_sparse"]))
def test_presets_are_planned_without_their_guard(preset):
    result = plan_run(job_of(config={"preset": preset}, per_node=2), named("h200"))
    assert result.memory.peak > 0


def test_an_exchange_that_cannot_be_had_is_refused_as_in_a_run():
    with pytest.raises(ValueError, match="swap needs key heads"):
        plan_run(job_of(per_node=8, exchange="swap"), named("h200"))


def test_devices_are_known_by_name():
    for name in ("RTX_4090", "rtx4090", "RTX-4090", "NVIDIA GeForce RTX 4090"):
        assert named(name) == named("rtx 4090")
    with pytest.raises(ValueError, match=r"device must be one of cpu, b200, .*, got 'h900'; the nearest are .*h100"):
        named("h900")
    with pytest.raises(ValueError, match=r"got 'rtx5090'; the nearest are rtx 4090, rtx 3090; .* --peak-tflops"):
        named("rtx5090")


@pytest.mark.parametrize(
    "tokens", tiered([300, 4 * 128, 5 * 128, 6 * 128 + 30, 2000], quick=[5 * 128, 6 * 128 + 30], full=[4 * 128])
)
def test_chunks_of_the_loss_that_are_alike_are_counted_without_a_trace(tokens, monkeypatch):
    job = job_of(tokens)
    (kind,) = layer_kinds(job)
    footprints = {kind.pattern.dumps(): kind.shares[0].footprint}
    few = trace(job, 0, footprints)
    monkeypatch.setattr("lightning_longnet.planning.traced._CHUNKS", 10**9)
    every = trace(job, 0, footprints)
    assert few == every


@pytest.mark.full
def test_a_plan_of_many_tokens_runs_few_chunks():
    plan = plan_run(job_of(2**24, per_node=2), named("h200"))
    assert plan.job.tokens == 2**24
    changes = [each.change for each in plan.advice]
    assert all(peak <= plan.usable for _, peak in plan.advice), changes


@pytest.mark.parametrize("memory", [1e11, pytest.param(4e6, marks=pytest.mark.full)])
def test_a_plan_reports_how_far_it_is(memory):
    """With the search for changes after which a run fits, where it does not."""
    seen = []
    device = replace(named("h200"), memory=memory)
    plan_run(job_of(2048), device, report=lambda done, total: seen.append((done, total)))
    done = [each for each, _ in seen]
    assert done == sorted(done)
    assert all(each <= total for each, total in seen)
    assert len(seen) > (3 if memory < 1e9 else 2)


def test_a_length_that_no_rank_holds_is_refused_at_once():
    with pytest.raises(ValueError, match=r"at most 1,073,741,824 on a rank in a plan, got 500,000,000,000 on"):
        plan_run(job_of(10**12, per_node=2), named("h200"))
