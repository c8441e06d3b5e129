"""torch.load reads only known classes in a restricted block, and a checkpoint names only known classes."""

import os
import pickle
import re
import sys

import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp

from lightning_longnet import LongNetModule, load_model
from lightning_longnet.checkpointing.checkpoints import read_checkpoint
from lightning_longnet.checkpointing.exports import config_of
from lightning_longnet.checkpointing.reader import read_metadata
from lightning_longnet.checkpointing.restricted import restricted
from lightning_longnet.trust import check_class, confined, is_trusted

FORCED, UNFORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
PATTERN = {"branches": [{"segment_length": 8, "dilation_rate": 1, "is_causal": True}]}


class Held:
    pass


@pytest.fixture
def file(tmp_path):
    torch.save({"a": Held()}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


@pytest.mark.parametrize("before", [{}, {FORCED: "0"}, {UNFORCED: "1"}])
def test_no_caller_loads_objects_and_the_environment_stays(file, before, monkeypatch):
    for name in (FORCED, UNFORCED):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Exception, match="Unsupported global"), restricted(), restricted():
        torch.load(file, weights_only=False)
    assert {name: os.environ[name] for name in (FORCED, UNFORCED) if name in os.environ} == before
    with restricted(Held):
        assert isinstance(torch.load(file, weights_only=False)["a"], Held)
    with restricted(trust=True):
        assert isinstance(torch.load(file, weights_only=False)["a"], Held)


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_the_environment_may_trust(value, expected, monkeypatch):
    monkeypatch.setenv("LONGNET_TRUST", value)
    assert is_trusted() is expected
    assert is_trusted(True)


def test_classes_of_known_packages_and_of_imported_modules_may_be_named(monkeypatch):
    for path in ("lightning_longnet.DilatedSelfAttention", "torch.nn.Identity", "torch.nn.modules.linear.Linear"):
        check_class("attention", path)
    for path in ("nowhere.Attention", "torch.hub2.Attention", "lightning_longnet_evil.Attention"):
        with pytest.raises(ValueError, match=f"attention must be a class of .* got {path}: importing it could run any"):
            check_class("attention", path)
        check_class("attention", path, trust=True)
    monkeypatch.setitem(sys.modules, "nowhere", sys)
    check_class("attention", "nowhere.Attention")


def test_every_reader_of_a_configuration_checks_the_class():
    values = {"pattern": PATTERN, "attention": {"class_path": "nowhere.Attention"}}
    for read in (lambda: config_of({"config": values}), lambda: LongNetModule(values)):
        with pytest.raises(ValueError, match="importing it could run any code"):
            read()


def test_readers_may_trust(file, tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": {"a": Held()}}, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match=r"holds objects of .*Held: loading them could run any code; if you trust"):
        read_checkpoint(tmp_path / "b.ckpt")
    assert isinstance(read_checkpoint(tmp_path / "b.ckpt", trust=True).hyper_parameters["a"], Held)
    with pytest.raises(ValueError, match="must hold the config of a LongNet"):
        load_model(tmp_path / "b.ckpt", trust=True)


@pytest.fixture
def folders(tmp_path):
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "in/link").symlink_to(tmp_path / "out")
    (tmp_path / "same").symlink_to(tmp_path / "in")
    return tmp_path


@pytest.mark.parametrize(("path", "root"), [("in/a", "in"), ("same/a", "in"), ("in/a", "same")])
def test_a_link_to_the_folder_itself_is_followed(folders, path, root):
    assert confined("path", folders / path, folders / root) == folders / path


@pytest.mark.parametrize("path", ["in/link/a", "in/../out/a", "/etc/passwd"])
def test_what_leads_out_of_a_folder_is_refused(folders, path):
    with pytest.raises(ValueError, match="path must stay in the folder"):
        confined("path", folders / path, folders / "in")
    assert confined("path", folders / path, folders / "in", trust=True) == folders / path


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_metadata_is_read_by_other_versions_of_python(module, tmp_path):
    """Python 3.13 pickles paths by another module than earlier versions do."""
    storage = dcp.StorageMeta(checkpoint_id=tmp_path)
    content = pickle.dumps(dcp.Metadata({}, storage_meta=storage), protocol=2)
    content, count = re.subn(rb"cpathlib(\._local)?\nPosixPath", f"c{module}\nPosixPath".encode(), content)
    assert count == 1
    (tmp_path / ".metadata").write_bytes(content)
    assert read_metadata(tmp_path / ".metadata").storage_meta.checkpoint_id == tmp_path
