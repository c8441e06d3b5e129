"""The files around the package: workflows and templates, versions, addresses and dependencies that must agree."""

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pages
import pytest
import yaml
from interpreters import SUPPORTED

import lightning_longnet

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")


def content(path):
    return yaml.load(path.read_text(), yaml.BaseLoader)  # in which the key `on` is no boolean


def commands(workflow):
    return [step["run"] for job in content(workflow)["jobs"].values() for step in job["steps"] if "run" in step]


def pinned(name):
    (result,) = re.findall(rf"^{name}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return result


def test_there_are_workflows_for_each_purpose():
    assert {path.stem for path in WORKFLOWS} == {"docs", "lint", "release", "tests"}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_what_exists(workflow):
    parsed = content(workflow)
    assert {"name", "on", "permissions", "jobs"} <= set(parsed)
    assert parsed["permissions"] == {"contents": "read"}  # more is given to the jobs that need it
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = [name for command in commands(workflow) for name in re.findall(r"\bmake ([\w-]+)", command)]
    assert called
    assert set(called) <= targets
    assert all("timeout-minutes" in job and "runs-on" in job for job in parsed["jobs"].values())
    for job in parsed["jobs"].values():
        assert set(job.get("needs", "").split()) <= set(parsed["jobs"])
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])


# the first major versions whose runtime GitHub's runners still have, Node 24, and the branch that the index recommends
OLDEST_ACTIONS = {
    "actions/checkout": 5,
    "actions/setup-python": 6,
    "actions/upload-artifact": 6,
    "actions/download-artifact": 7,
    "pypa/gh-action-pypi-publish": "release/v1",
}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_uses_actions_that_runners_support(workflow):
    steps = [step for job in content(workflow)["jobs"].values() for step in job["steps"] if "uses" in step]
    for action, version in (step["uses"].split("@") for step in steps):
        oldest = OLDEST_ACTIONS[action]
        is_supported = version == oldest if isinstance(oldest, str) else int(version.removeprefix("v")) >= oldest
        assert is_supported, f"{action}@{version}"


def test_quick_tests_run_on_each_python_with_the_oldest_and_the_newest_torch():
    (workflow,) = (path for path in WORKFLOWS if path.stem == "tests")
    matrix = content(workflow)["jobs"]["quick"]["strategy"]["matrix"]
    stated = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", each)]
    assert matrix["python"] == list(SUPPORTED) == stated
    (torch,) = (each for each in PROJECT["dependencies"] if each.startswith("torch>"))
    oldest, above = re.fullmatch(r"torch>=([\d.]+),<([\d.]+)", torch).groups()
    newest = pinned("torch")
    assert matrix["torch"] == [f"{oldest}.0", newest]
    assert int(above.split(".")[1]) == int(newest.split(".")[1]) + 1


def test_a_release_is_published_without_a_password():
    (workflow,) = (path for path in WORKFLOWS if path.stem == "release")
    parsed = content(workflow)
    assert parsed["on"] == {"push": {"tags": ["v*"]}}
    assert parsed["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets." not in workflow.read_text()


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_forms_have_what_github_requires(form):
    parsed = content(form)
    assert {"name", "description", "body"} <= set(parsed)
    fields = [each for each in parsed["body"] if each["type"] != "markdown"]
    names = [each["id"] for each in fields]
    assert fields
    assert len(set(names)) == len(names)
    for each in parsed["body"]:
        assert each["type"] in {"markdown", "textarea", "input", "dropdown", "checkboxes"}
        assert ("value" if each["type"] == "markdown" else "label") in each["attributes"]
        assert each["type"] != "dropdown" or each["attributes"]["options"]


def test_the_version_is_the_same_everywhere():
    version = lightning_longnet.__version__
    newest = re.search(
        r"^## (\S+) - (unreleased|\d{4}-\d{2}-\d{2})$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert newest is not None
    assert newest[1] == version
    assert content(ROOT / "CITATION.cff")["version"] == version
    assert "version" in PROJECT["dynamic"]


def test_the_address_of_the_repository_is_the_same_everywhere():
    urls = PROJECT["urls"]
    home = urls["Homepage"]
    assert {"Repository", "Documentation", "Issues", "Changelog"} <= set(urls)
    assert all(url.startswith(home) for name, url in urls.items() if name != "Documentation")
    assert urls["Documentation"] == pages.SITE
    assert content(ROOT / "CITATION.cff")["repository-code"] == home


def test_each_dependency_and_extra_is_justified():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    section = page.partition("## Dependencies")[2].partition("\n## ")[0]
    extras = PROJECT["optional-dependencies"]
    needed = [*PROJECT["dependencies"], *(each for group in extras.values() for each in group)]
    names = {re.match(r"[\w-]+", each)[0] for each in needed} - {"lightning-longnet"}
    rows = dict(re.findall(r"^\| `([\w-]+)` \|.*\| (.+) \|$", section, re.MULTILINE))
    assert names <= set(rows)
    assert set(extras) <= set(re.findall(r"^- `([\w-]+)`: \S", section, re.MULTILINE))


def imported():
    """The packages that the library imports, with the files that do."""
    for path in (*(ROOT / "lightning_longnet").rglob("*.py"), *(ROOT / "strategies").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            names += [each.name for each in node.names] if isinstance(node, ast.Import) else []
            yield from ((name.partition(".")[0], path.name) for name in names)


def test_what_the_library_imports_is_declared():
    extras = PROJECT["optional-dependencies"].values()
    needed = [*PROJECT["dependencies"], *(each for group in extras for each in group)]
    declared = {re.match(r"[\w-]+", each)[0] for each in needed}
    names = {"yaml": "pyyaml", "PIL": "pillow"}
    # rich draws a progress bar where a user has installed it, as in Lightning
    free = {*sys.stdlib_module_names, "lightning_longnet", "rich"}
    used = {(names.get(name, name.replace("_", "-")), file) for name, file in imported() if name not in free}
    assert not {(name, file) for name, file in used if name not in declared}


# what torch's builds for CUDA require, which pip installs by default on Linux; builds for the CPU require none, so that
# another version in the constraints shows no conflict where such a build is installed
TRITON = {"2.13.0": "3.7.1"}


def test_the_triton_of_the_constraints_is_the_one_that_torch_requires():
    assert pinned("triton") == TRITON[pinned("torch")]


def test_the_image_has_the_torch_of_the_constraints():
    text = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^ARG BASE=pytorch/pytorch:([\d.]+)-cuda", text, re.MULTILINE)[1] == pinned("torch")
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)$", text, re.MULTILINE)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    copied = [name for names in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for name in names.split()]
    assert all((ROOT / name).exists() for name in copied)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not {"lightning_longnet", "strategies", "tests", "README.md", "LICENSE"} & set(ignored)


@pytest.mark.long
def test_the_sdist_holds_all_that_git_keeps(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, capture_output=True, timeout=120, cwd=ROOT, check=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    kept = {name for name in tracked if not name.startswith((".ci/", ".github/"))}
    links = {name for name in kept if (ROOT / name).is_symlink()}
    assert kept - links <= names
    assert "lightning_longnet/strategies/base.py" in names  # a folder of its own in the sdist, where git has a link
    assert "configs/quickstart.yaml" in names
