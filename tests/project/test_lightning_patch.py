"""The patch for Lightning in contrib/lightning, applied to a copy of the installed Lightning."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import lightning
import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "contrib/lightning"
PATCH = FOLDER / "strategy-entry-points.patch"
MADE = """
from lightning.pytorch import Trainer
quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
trainer = Trainer(strategy="ring_sequence_parallel_ddp", accelerator="cpu", devices=1, **quiet)
print(type(trainer.strategy).__name__)
"""


def apply(folder, *options):
    command = ["git", "apply", *options, str(PATCH)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**os.environ, "GIT_DIR": "none"})


def test_the_patch_applies_to_the_installed_lightning(tmp_path):
    changed = re.findall(r"^--- a/src/lightning/(.*)$", PATCH.read_text(), re.MULTILINE)
    assert changed == ["fabric/utilities/registry.py", "pytorch/strategies/__init__.py"]
    for name in changed:
        (tmp_path / "src/lightning" / name).parent.mkdir(parents=True)
        shutil.copy(Path(lightning.__file__).parent / name, tmp_path / "src/lightning" / name)
    result = apply(tmp_path)
    assert result.returncode == 0, result.stderr
    assert "_register_external(StrategyRegistry" in (tmp_path / "src/lightning" / changed[1]).read_text()
    assert f"made against Lightning {lightning.__version__}" in " ".join((FOLDER / "README.md").read_text().split())


@pytest.mark.full
def test_a_name_needs_no_import_with_the_patch(tmp_path):
    source = Path(lightning.__file__).parent
    shutil.copytree(source, tmp_path / "src/lightning", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path / "src", tmp_path, ROOT)))}

    def run(*words):
        command = [sys.executable, *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)

    metadata = tmp_path / "some_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 1.0\n")
    (entry_points,) = re.findall(r"```toml\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    group, name, value = re.fullmatch(r'\[project\.entry-points\."(.+)"\]\n(\w+) = "(.+)"\n', entry_points).groups()
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")

    refused = run("-c", MADE)
    assert refused.returncode != 0
    assert "ring_sequence_parallel_ddp" in refused.stderr
    assert apply(tmp_path).returncode == 0
    result = run("-c", MADE)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "DDPSequenceParallelStrategy"
    theirs = tmp_path / "tests/tests_pytorch/strategies/test_external_strategies.py"
    tested = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, theirs)
    assert "3 passed" in tested.stdout, tested.stdout + tested.stderr
