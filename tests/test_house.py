"""The house's own laws: who may import whom, that configs load, that pages say what is so."""

import ast
import contextlib
import csv
import doctest
import importlib
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pages
import pytest
import torch
from outputs import assert_shown
from programs import LONGNET, programs
from tiers import tiered

from lightning_longnet.aliases import MOVED
from lightning_longnet.cli.init import content

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_longnet"
# before a Trainer in this process leaves the numbers and the address of its ranks there
ENVIRONMENT = dict(os.environ)

# The folders of the package, and which others the files of each may import.  `torch` marks those that import nothing
# from outside but torch and the standard library; imports for annotations alone are free within the package.
CORE = ["attention.pattern", "attention.plan", "attention.kernels", "attention.parallel", "attention"]
TOP = ["registration", "trust", "__init__"]
FOLDERS = {
    **{folder: CORE[: i + 1] for i, folder in enumerate(CORE)},
    "sequence": [*CORE],
    "split_check": [*CORE, "sequence"],
    "layers": [*CORE],
    "inference": [*CORE, "layers"],
    "models": [*CORE, "sequence", "layers", "inference"],
    "checkpointing": [*CORE, "sequence", "inference", "models", "trust"],
    "huggingface": [*CORE, "sequence", "layers", "inference", "models", "trust", "registration"],
    "training": [*CORE, "sequence", "layers", "inference", "models", "checkpointing", "huggingface", "registration"],
    "compat": [*CORE, "layers", "ancestor"],
    "data": ["sequence", "layers", "trust"],
    "report": [*CORE, "trust"],
    "planning": [*CORE, "sequence", "layers", "models"],
    "diagnosis": [*CORE, "__init__"],
    "callbacks": [*CORE, "sequence", "layers", "report", "planning", "__init__"],
    "evaluation": [
        *(*CORE, "sequence", "layers", "models", "inference", "checkpointing", "data", "report", "trust"),
        *("huggingface", "registration"),
    ],
    "supervision": [],
    "cli": [
        *(*CORE, "inference", "models", "checkpointing", "training", "data", "report", "planning", "callbacks"),
        *("diagnosis", "supervision", "evaluation", "huggingface", *TOP),
    ],
}
TORCH_ONLY = [*CORE, "sequence", "split_check", "layers", "inference", "models"]
# the files that import Triton, which `kernels/triton/__init__.py` imports when the kernel runs
PROGRAMS = [PACKAGE / "attention/kernels/triton" / name for name in ("forward.py", "backward.py")]


def folder_of(module):
    """The folder of the package that holds a module, given without the package's name."""
    parts = module.split(".")
    nested = len(parts) > 1 and (PACKAGE / parts[0] / parts[1]).is_dir() and parts[0] == "attention"
    return ".".join(parts[:2]) if nested else parts[0]


def imports(path):
    """(module, is it at the top of the file, for types only) of every import."""
    tree = ast.parse(path.read_text())
    top = set(tree.body)
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node in top, node in typing_only
        elif isinstance(node, ast.ImportFrom):
            if node.level and path.parent.name == "huggingface":
                continue  # these files are copied into exported folders, where they import each other
            assert node.level == 0, f"{path} imports relatively"
            submodule = (ROOT / node.module.replace(".", "/") / f"{node.names[0].name}.py").is_file()
            yield f"{node.module}.{node.names[0].name}" if submodule else node.module, node in top, node in typing_only


def python_files(folder):
    return sorted(p for p in folder.rglob("*.py") if "strategies" not in p.relative_to(PACKAGE).parts)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_what_the_table_allows(folder):
    for path in python_files(PACKAGE):
        relative = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if "." not in relative or folder_of(relative) != folder:
            continue
        for module, at_top, typing_only in imports(path):
            package, _, name = module.partition(".")
            if package == "lightning_longnet":
                target = folder_of(name or "__init__")
                assert typing_only or target == folder or target in FOLDERS[folder], f"{relative} imports {module}"
                assert folder not in CORE or target in CORE, f"{relative} imports {module} from outside of the core"
            elif folder in TORCH_ONLY:
                drawing = package == "matplotlib" and (typing_only or (path.stem == "picture" and not at_top))
                program = package == "triton" and path in PROGRAMS
                assert drawing or program or package == "torch" or package in sys.stdlib_module_names, (
                    f"{relative} imports {module}"
                )


def test_the_table_names_every_folder():
    names = [folder_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts)) for path in python_files(PACKAGE)]
    top = {path.stem for path in PACKAGE.glob("*.py")}
    assert set(names) - top == set(FOLDERS)


@pytest.mark.parametrize("former", sorted(MOVED))
def test_former_module_paths_still_import(former):
    present = importlib.import_module(f"lightning_longnet.{MOVED[former]}")
    result = importlib.import_module(f"lightning_longnet.{former}")
    assert result is present
    assert result.__spec__.name == f"lightning_longnet.{MOVED[former]}"


def test_the_supervisor_imports_nothing_but_the_standard_library():
    result = run("import sys, lightning_longnet.supervise; print({'torch', 'lightning', 'numpy'} & set(sys.modules))")
    assert result.stdout.strip() == "set()", result.stderr
    modules = [name for path in python_files(PACKAGE / "supervision") for name, _, _ in imports(path)]
    assert {name.partition(".")[0] for name in modules} - {"lightning_longnet"} <= sys.stdlib_module_names


def test_the_package_itself_is_imported_without_torch():
    result = run("import sys, lightning_longnet; print({'torch', 'lightning', 'numpy'} & set(sys.modules))")
    assert result.stdout.strip() == "set()", result.stderr


def test_a_trainer_is_made_without_what_checkpoints_need():
    """torch.distributed.checkpoint takes longer to import than this package: the first save or load imports it."""
    result = run(
        "import sys\n"
        "from lightning import Trainer\n"
        "from lightning_longnet import LongNet, LongNetModule, Pattern, sequence_context\n"
        "for strategy in ('ring_sequence_parallel', 'ring_sequence_parallel_ddp'):\n"
        "    Trainer(strategy=strategy, accelerator='cpu', devices=2, logger=False)\n"
        "print({'torch.distributed.checkpoint', 'lightning_longnet.checkpointing.reader'} & set(sys.modules))\n"
        "print('lightning_longnet.strategies.fsdp2' in sys.modules)"
    )
    assert result.stdout.split() == ["set()", "True"], result.stderr


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_the_core_is_usable_where_lightning_is_not_installed():
    result = run(
        "import sys\n"
        "for name in ('lightning', 'pytorch_lightning', 'deepspeed', 'flash_attn', 'triton', 'matplotlib',\n"
        "             'jsonargparse'):\n"
        "    sys.modules[name] = None\n"  # an import of it raises
        "import torch\n"
        "from lightning_longnet.attention import Pattern, attend\n"
        "q = torch.randn(1, 9, 2, 4, requires_grad=True)\n"
        "attend(q, q, q, Pattern.dilated((4, 8), (1, 2))).sum().backward()\n"
        "print(q.grad.shape)"
    )
    assert result.stdout.strip() == "torch.Size([1, 9, 2, 4])", result.stderr


def test_strategies_have_one_import_name():
    assert importlib.import_module("lightning_longnet.strategies").__file__ == str(PACKAGE / "strategies/__init__.py")
    assert (PACKAGE / "strategies").resolve() == ROOT / "strategies"
    result = run("import strategies")
    assert result.returncode != 0
    assert "import lightning_longnet.strategies instead" in result.stderr


CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def test_every_config_is_accepted_by_the_program_it_names():
    commands = []
    for path in CONFIGS:
        command = re.search(r"#   longnet (.*)", path.read_text())
        assert command, f"{path} does not say in a comment what runs it"
        words = command[1].split()
        assert words[-2:] == ["--config", str(path.relative_to(ROOT))]
        commands.append([LONGNET, *words, "--print_config"])
    for path, (status, shown, _) in zip(CONFIGS, programs(commands), strict=True):
        assert status == 0, path
        is_ours = path.stem != "1b_tokens" and path.parent.name != "huggingface"
        assert "segment_length: 2048" in shown or not is_ours, path


PAGES = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))


def code(page):
    """The blocks of a page that are Python, or files of Python."""
    return [piece for piece in pages.pieces((ROOT / page).read_text()) if piece.kind in ("python", "file")]


@pytest.mark.parametrize("page", [page for page in PAGES if code(page)])
@pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",  # its advice
    "ignore:.*LeafSpec.*:FutureWarning",  # what it uses of torch
)
def test_code_blocks_run_in_order(page, tmp_path, monkeypatch):
    """And print what the page says.  Files are saved, and run but for what they do as programs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names = {}
    try:
        for piece in code(page):
            shown = io.StringIO()
            if piece.kind == "file":
                (tmp_path / piece.name).write_text(piece.text)
            with contextlib.redirect_stdout(shown):
                exec(compile(piece.text, page, "exec"), names)
            _leave_group()
            if piece.output is not None:
                assert_shown(piece.output, shown.getvalue())
    finally:
        _leave_group()
        for path in tmp_path.glob("*.py"):
            sys.modules.pop(path.stem, None)


def _leave_group():
    """Which a Trainer leaves behind."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def anchors(page):
    """What GitHub and the docs site make of a page's headings."""
    text = re.sub(
        r"^```{include} (\S+)$",
        lambda result: (page.parent / result[1]).read_text(),
        page.read_text(),
        flags=re.MULTILINE,
    )
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page):
    """The targets of a page's links, and of the definitions that links refer to."""
    return re.findall(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", (ROOT / page).read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Those to the docs site, too, whose pages are the files of docs."""
    for target in map("".join, links(page)):
        path, _, anchor = target.partition("#")
        if path.startswith(pages.SITE):
            name = path.removeprefix(pages.SITE)
            result = ROOT / "docs" / (name.removesuffix(".html") + ".md" if name.endswith(".html") else name)
            if name.startswith("_images/"):
                result = ROOT / "docs" / Path(name).name
            assert name, f"{page} links to the site without a page: {target}"
        elif path.startswith("http"):
            continue
        else:
            result = (ROOT / page).parent / path if path else ROOT / page
        assert result.exists(), f"{page} links to {target}"
        assert not anchor or anchor in anchors(result), f"{page} links to {target}"


def test_links_of_the_readme_work_on_a_package_index():
    targets = [*map("".join, links("README.md"))]
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []
    assert len([target for target in targets if target.startswith(pages.SITE)]) >= 10
    text = (ROOT / "README.md").read_text()
    named = {key or words for words, key in re.findall(r"\[([^\]]+)\]\[([^\]]*)\]", text)}
    assert named <= set(re.findall(r"^\[([^\]]+)\]: ", text, flags=re.MULTILINE))


def test_the_tree_names_every_file():
    tree = (ROOT / "CONTRIBUTING.md").read_text()
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    files = [Path(name) for name in tracked if name.endswith((".py", ".yaml")) and not name.startswith((".", "tests/"))]
    missing = [str(f) for f in files if f.name not in tree and f.name != "__init__.py"]
    assert not missing, f"the tree of CONTRIBUTING.md does not name {missing}"


def test_nothing_names_a_sibling_folder_or_a_registry_host():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    words = ["py" + "pi.org", "pytho" + "nhosted", "../" + "shared"]
    for name in tracked:
        path = ROOT / name
        if path.is_symlink() or path.suffix in (".png", ".pt"):
            continue
        text = path.read_text()
        assert not [word for word in words if word in text], name


@pytest.mark.parametrize(
    "module",
    [
        "attention.pattern.pattern",
        "attention.pattern.ordering",
        "attention.attend",
        "attention.parallel.sequence_plan",
        "planning.flops",
        "layers.self_attention",
        "layers.multihead",
        "layers.initialization",
        "layers.checkpointing",
        "layers.dilated",
        "layers.presets",
        "inference.cache",
    ],
)
def test_examples_in_docstrings_are_true(module):
    result = doctest.testmod(importlib.import_module(f"lightning_longnet.{module}"), extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.long
def test_the_wheel_holds_the_strategies_as_files(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, capture_output=True, timeout=120, cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    expected = [
        "py.typed",
        "cli/quickstart.yaml",
        "planning/shares.json",
        "strategies/__init__.py",
        "attention/attend.py",
        "attention/kernels/sdpa/cpu.py",
        "attention/kernels/triton/tiles.json",
    ]
    assert {f"lightning_longnet/{name}" for name in expected} <= set(names)
    assert not [name for name in names if name.startswith(("strategies", "tests"))]
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    for words in (["init", "first"], ["doctor", "--ranks", "2"]):
        command = [sys.executable, "-m", "lightning_longnet", *words]
        result = subprocess.run(command, capture_output=True, text=True, timeout=170, cwd=tmp_path, env=environment)
        assert result.returncode == 0, result.stdout + result.stderr
    assert "all exchanges are exact" in result.stdout
    assert (tmp_path / "first/quickstart.yaml").read_text() == content()


def benchmark(*arguments, name="attention"):
    command = [sys.executable, str(ROOT / f"benchmarks/{name}.py"), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def _is_program_with_a_table(text):
    return "--table" in text and '__name__ == "__main__"' in text


def test_pages_show_the_committed_measurements():
    folder = ROOT / "benchmarks"
    pages = [
        (ROOT / page).read_text()
        for page in ("README.md", "docs/measurements.md", "docs/restarting.md", "docs/generating.md")
    ]
    commands = [[path, "--table"] for path in sorted(folder.glob("*.py")) if _is_program_with_a_table(path.read_text())]
    assert len(commands) >= 7
    commands.append([folder / "attention.py", "--table", "--out", folder / "results/conditions-cpu.json"])
    commands.append([folder / "exchange.py", "--table", "--long"])
    for words, (status, shown, _) in zip(commands, programs(commands), strict=True):
        assert status == 0
        assert "not measured" not in shown, words
        assert any(shown in page for page in pages), words


@pytest.mark.long
def test_context_parallel_of_torch_does_not_run_on_a_cpu():
    """If it fails here one day, let `benchmarks/dense_ring.py` measure it, and change docs/measurements.md."""
    program = "import peers; print(peers.context_parallel_refusal())"
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks")))
    environment = os.environ | ranks | {"PYTHONPATH": paths}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    refusal = result.stdout.strip()
    assert refusal.startswith("Operator aten._scaled_dot_product_flash_attention_for_cpu.default does not have")
    assert refusal.rstrip(".") in " ".join((ROOT / "docs/measurements.md").read_text().split())


@pytest.mark.full
@pytest.mark.parametrize("pattern", ["five branches", "two branches"])
def test_the_benchmark_runs_without_its_peers(tmp_path, pattern):
    words = ["--patterns", pattern, "--lengths", 1024, "--dtypes", "bfloat16", "--rounds", 1]
    shown = benchmark(*words, "--out", tmp_path / "found.json")
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    named = {"lightning-longnet", "dense"}
    if pattern == "five branches":
        named |= {"lightning-longnet, padded", "lightning-longnet, dropout 0.1"}
    assert {row["participant"] for row in rows} >= named
    assert len(rows) == len(shown.splitlines())
    assert (tmp_path / "found.png").stat().st_size > 10_000


SHORT = ["--trainer.max_steps=40", "--trainer.val_check_interval=40", "--model.warmup_steps=10"]
SHORT += ["--trainer.limit_val_batches=4"]


@pytest.mark.parametrize(
    ("words", "least"), tiered({(): 0.75, tuple(SHORT): 0.95}.items(), quick=[], full=[((), 0.75)])
)
def test_make_train_learns(tmp_path, words, least):
    """The loss is well below what byte frequencies alone give, by what the ranks send each other."""
    command = [sys.executable, "-m", "lightning_longnet", "fit", "--config", str(ROOT / "configs/quickstart.yaml")]
    result = subprocess.run(
        [*command, *words], capture_output=True, text=True, timeout=600, cwd=tmp_path, env=ENVIRONMENT
    )
    assert result.returncode == 0, result.stderr
    (figures,) = re.findall(r"Validation: (\S+) bits per byte \((\d+)% below the (\S+) of frequencies", result.stdout)
    bits, share, frequencies = map(float, figures)
    assert bits < least * frequencies
    assert share == pytest.approx(100 * (1 - bits / frequencies), abs=1)
    run = tmp_path / "runs/quickstart/version_0"
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["exchange/sent_bytes"]) > 0 for row in rows if row.get("exchange/sent_bytes"))
    assert any(row.get("exchange/sent_bytes") for row in rows)
    assert "def " in (run / "samples.txt").read_text()
    assert "<svg" in (run / "report.html").read_text()
    (checkpoint,) = re.findall(r"Next:\n  longnet generate (\S+) --prompt", result.stdout)
    assert (tmp_path / checkpoint).exists()
