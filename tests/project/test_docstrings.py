"""Docstrings name what there is: names in backticks, and files, exist in the package or in a library."""

import ast
import builtins
import keyword
import re
import time
from collections import defaultdict
from functools import cache
from operator import attrgetter
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from torch.distributed import checkpoint, fsdp
from torch.utils import data

ROOT = Path(__file__).parents[2]
FOLDERS = ("lightning_longnet/attention", "lightning_longnet/sequence", "lightning_longnet/strategies")
PACKAGE = ("lightning_longnet", "lightning_longnet/strategies")  # a link, which is not followed within the package
SEARCHED = (*PACKAGE, "benchmarks", "tests")
FILES = re.compile(r"(?<![\w.])[\w/-]+\.py\b")
NAMES = re.compile(r"`([A-Za-z_](?:[\w.]*\w)?)(?:\([^`]*\)|=[^`]*)?`")  # of a call, the function
TORCH = (torch, torch.Tensor, torch.nn, torch.nn.Module, torch.autograd, torch.distributed, checkpoint, fsdp, data)
LIGHTNING = (pl, pl.Trainer, pl.LightningModule, pl.callbacks, pl.strategies, _CheckpointConnector)
LIBRARIES = (builtins, time, *TORCH, data.DistributedSampler, *LIGHTNING)
# letters of formulas, columns and variables of kernels, what a library has only in instances, an operator, an extra
OTHERS = {*"ghw", "multiple", "top", "BatchEncoding", "DeepSpeedEngine", "latest", "non_blocking", "val_check_interval"}
OTHERS |= {"attend_backward", "plots"}


def bound(scope, is_local=False):
    """Yield the names of functions and classes, variables outside of functions, and attributes that are set."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and not is_local:
            yield node.id
        yield from bound(node, is_local or isinstance(node, ast.FunctionDef))


@cache
def defined():
    """Return what each module and class binds, the bases of classes, all parameters, and all names."""
    members, bases, parameters = defaultdict(set), defaultdict(set), set()
    for path in [path for folder in PACKAGE for path in (ROOT / folder).rglob("*.py")]:
        tree, folder = ast.parse(path.read_text()), path.parent.name
        module, package = (folder, path.parents[1].name) if path.stem == "__init__" else (path.stem, folder)
        members[package].add(module)
        members[module].update(bound(tree))
        parameters.update(node.arg for node in ast.walk(tree) if isinstance(node, ast.arg))
        for node in [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]:
            members[node.name].update(bound(node))
            bases[node.name].update(re.sub(r".*\.|\[.*", "", ast.unparse(base)) for base in node.bases)
    return members, bases, parameters, parameters.union(members, *members.values())


def has(owner, name):
    members, bases, *_ = defined()
    return name in members.get(owner, ()) or any(has(base, name) for base in bases.get(owner, ()))


def is_of_library(name):
    for library in LIBRARIES:
        try:
            attrgetter(name.removeprefix("torch."))(library)
        except AttributeError:
            continue
        return True
    return False


def exists(name):
    """Return whether something has this name: `name`, `Class.name`, `module.name`, or `argument.name`."""
    if name in OTHERS or keyword.iskeyword(name) or is_of_library(name):
        return True
    members, _, parameters, names = defined()
    *_, owner, last = ("", *name.split("."))
    if not owner or owner in parameters or (owner in names and owner not in members):
        return last in names or is_of_library(last)  # the type of an argument or attribute is not looked up
    return has(owner, last)


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_docstrings_name_exists(folder):
    missing = []
    files = [f"/{path.relative_to(ROOT)}" for each in SEARCHED for path in (ROOT / each).rglob("*.py")]
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                continue
            text = ast.get_docstring(node) or ""
            where = f"{path.relative_to(ROOT)}, {getattr(node, 'name', 'module')}"
            for file in FILES.findall(text):
                if not any(each.endswith(f"/{file}") for each in files):
                    missing.append(f"{where}: there is no file {file}")
            for name in NAMES.findall(text):
                if not FILES.fullmatch(name) and not exists(name):
                    missing.append(f"{where}: nothing is named {name}")
    assert not missing


def test_names_that_nothing_has_are_found():
    assert exists("Accumulator.take")
    assert exists("RingSequenceParallelStrategy.batch_to_device")
    assert not exists("Accumulator.taken_back")
    assert not exists("accumulated_back")
    text = "`attend(q, ...)`, `a + b`, `Branch.keeps`, `mix='exact'`"
    assert NAMES.findall(text) == ["attend", "Branch.keeps", "mix"]
