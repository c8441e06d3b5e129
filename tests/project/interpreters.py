"""The Python interpreters of this machine that the package supports."""

import os
import shutil
from pathlib import Path

SUPPORTED = ("3.11", "3.12", "3.13")


def interpreters():
    """The path of an interpreter for each supported version that is here.

    LONGNET_PYTHONS lists versions that must be here, as "3.11 3.13": their path is None where they are not.
    """
    result = {version: _found(version) for version in SUPPORTED}
    required = os.environ.get("LONGNET_PYTHONS", "").split()
    assert set(required) <= set(SUPPORTED), f"LONGNET_PYTHONS must be among {SUPPORTED}, got {required}"
    return {version: path for version, path in result.items() if path or version in required}


def _found(version):
    # pyenv's own commands start only the version that is switched on
    folders = [each for each in os.get_exec_path() if Path(each).name != "shims"]
    path = shutil.which(f"python{version}", path=os.pathsep.join(folders))
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    kept = sorted(root.glob(f"versions/{version}.*/bin/python{version}"))
    # a distribution's python may have no venv, which is a package of its own there
    return str(kept[-1]) if kept else path
