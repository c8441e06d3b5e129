"""The shares of a device's peak: assumed until `make gpu` has written those of a device."""

import json

import pytest

from lightning_longnet.planning import devices, shares
from lightning_longnet.planning.devices import named
from lightning_longnet.planning.job import Job
from lightning_longnet.planning.run import plan_run

ROW = {"gpu": "NVIDIA H100 80GB HBM3", "linear": 0.72, "attention": 0.41, "call_seconds": 4e-6, "torch": "2.13.0"}


@pytest.fixture
def file(monkeypatch, tmp_path):
    path = tmp_path / "shares.json"
    monkeypatch.setattr(devices, "measured_shares", lambda name: shares.measured_shares(name, path))
    return path


def test_the_committed_file_is_read():
    for name in json.loads(shares.FILE.read_text()):
        assert shares.measured_shares(name).source.startswith("measured on ")


def test_they_are_assumed_until_they_are_measured(file):
    assumed = named("h100")
    assert assumed.efficiency == (0.6, 0.45)
    assert assumed.source.startswith("assumed")
    file.write_text(json.dumps({"H100": ROW | {"date": "2026-12-01T10:00:00+00:00"}}))
    device = named("h100")
    assert (device.efficiency, device.call_seconds) == ((0.72, 0.41), 4e-6)
    assert device.source == "measured on NVIDIA H100 80GB HBM3 with torch 2.13.0, 2026-12-01"
    assert (device.memory, device.bandwidth, device.overlaps) == (assumed.memory, assumed.bandwidth, True)
    assert named("h200").source.startswith("assumed"), "another device"
    assert "two cores" in named("cpu").source


def test_a_plan_uses_and_shows_them(file):
    from lightning_longnet import LongNetConfig, Pattern

    job = Job(LongNetConfig(Pattern.dilated((16, 32), (1, 2), True), dim=16, layers=1, heads=2), tokens=64)
    before = plan_run(job, named("h100"))
    file.write_text(json.dumps({"H100": ROW | {"date": "2026-12-01T10:00:00+00:00"}}))
    after = plan_run(job, named("h100"))
    assert after.time.linear == pytest.approx(before.time.linear * 0.6 / 0.72)
    assert after.time.attention == pytest.approx(before.time.attention * 0.45 / 0.41)
    assert "shares of the peak: linear maps 60%, attention 45%; assumed" in str(before)
    assert "linear maps 72%, attention 41%; measured on NVIDIA H100 80GB HBM3 with torch 2.13.0" in str(after)
    values = after.to_dict()
    assert values["efficiency"] == {"linear": 0.72, "attention": 0.41}
    assert values["efficiency_source"].startswith("measured")


@pytest.mark.parametrize("wrong", [{"linear": 1.2}, {"attention": 0}, {"attention": "0.4"}, {"call_seconds": 0}])
def test_a_wrong_file_is_refused_with_its_name(file, wrong):
    file.write_text(json.dumps({"H100": ROW | {"date": "2026-12-01"} | wrong}))
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))} of H100 in .*shares.json must be more than 0"):
        named("h100")
