"""The wheel on each Python of this machine, outside of the checkout: installation, and training on two ranks."""

import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from interpreters import SUPPORTED, interpreters

ROOT = Path(__file__).resolve().parents[2]
HERE = interpreters()
PATIENCE = 2400  # seconds for pip, which may have gigabytes to load

pytestmark = pytest.mark.full


def run(*command, folder, timeout=300):
    """The output of a command that does not see the checkout."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith(("PYTHON", "COV_"))}
    kept.pop("CI", None)
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=timeout, cwd=folder, env=kept
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that the sources in the sdist build, as installers build it where they take the sdist."""
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, folder=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    run("tar", "xf", sdist, folder=folder)
    (sources,) = (each for each in folder.iterdir() if each.is_dir())
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, folder=sources)
    (result,) = folder.glob("*.whl")
    return result


def test_the_wheel_of_the_sdist_is_that_of_the_checkout(wheel, tmp_path):
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, folder=ROOT)
    (ours,) = tmp_path.glob("*.whl")
    names = [sorted(zipfile.ZipFile(each).namelist()) for each in (wheel, ours)]
    assert names[0] == names[1]


@pytest.fixture
def place(tmp_path):
    """An empty folder, whose gigabytes do not stay as those of pytest's folders do."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("version", HERE)
def test_the_wheel_trains_two_steps_on_two_ranks(version, wheel, place, record_property):
    assert HERE[version] is not None, f"there is no python{version} here, which LONGNET_PYTHONS requires"
    run(HERE[version], "-m", "venv", "env", folder=place)
    programs = place / "env/bin"
    options = [*shlex.split(os.environ.get("PIP_ARGS", "")), "--constraint", ROOT / "constraints.txt"]
    run(programs / "python", "-m", "pip", "install", "-q", *options, wheel, folder=place, timeout=PATIENCE)

    code = (
        "import platform, torch, lightning, lightning_longnet\n"
        "print(lightning_longnet.__file__)\n"
        "print(f'Python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}')"
    )
    package, versions = run(programs / "python", "-c", code, folder=place).splitlines()
    assert Path(package).is_relative_to(place / "env")
    assert versions.startswith(f"Python {version}.")

    assert "all exchanges are exact" in run(programs / "longnet", "doctor", "--ranks", 2, folder=place)
    run(programs / "longnet", "init", "first", folder=place)
    shown = run(
        programs / "longnet",
        *("fit", "--config", "first/quickstart.yaml"),
        *("--trainer.max_steps", 2, "--trainer.val_check_interval", 2, "--trainer.limit_val_batches", 1),
        *("--trainer.log_every_n_steps", 1, "--data.init_args.tokens", 512, "--data.init_args.megabytes", 0.5),
        folder=place,
        timeout=600,
    )
    assert "Validation: " in shown
    (checkpoint,) = (place / "runs/quickstart/version_0").rglob("step=2.ckpt")
    rows = (place / "runs/quickstart/version_0/metrics.csv").read_text().splitlines()
    assert any("exchange/sent_bytes" in row for row in rows)
    assert run(programs / "longnet", "generate", checkpoint, "--prompt", "def ", "--tokens", 8, folder=place)
    record_property("note", f"ran on {versions}")


def test_versions_that_are_not_here_are_named(record_property):
    missing = [version for version in SUPPORTED if version not in HERE]
    for version in missing:
        record_property("note", f"not run on Python {version}, which is not on this machine")
    assert len(missing) < len(SUPPORTED)
