import os
import signal
import sys
from contextlib import closing

import pytest
import torch
from hypothesis import is_hypothesis_test, settings

# a shell starts its background jobs with SIGINT ignored, and tests of interrupts would wait for ever
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# what deterministic products want on CUDA, read when the device is first used
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# CI draws the same cases every time, so that it fails for what a change did; elsewhere each run draws new ones
settings.register_profile("ci", derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

# how many cases a property test draws, beside its `max_examples`: in `make test`, in `make test-long` (which runs all
# property tests again), without an option, and in `make test-full`
DRAWS = {"few": 0.2, "half": 0.5, "all": 1, "many": 10}
LEAST = 3
# the files that take longest begin first, so that no process waits for the other one at the end
SLOWEST = (
    "tests/strategies/test_slurm.py",
    "tests/cli/test_longnet.py",
    "tests/soak/test_soak.py",
    "tests/supervision/test_fault_matrix.py",
    "tests/strategies/test_ends.py",
    "tests/test_house.py",
    "tests/test_examples.py",
    "tests/supervision/test_fit_restarts.py",
    "tests/report/test_looks.py",
    "tests/strategies/test_checkpoints.py",
    "tests/strategies/test_decoder_runs.py",
    "tests/strategies/test_features.py",
    "tests/huggingface/test_dilate.py",
    "tests/attention/kernels/test_triton.py",
    "tests/attention/kernels/test_triton_programs.py",
)
REPORTED = pytest.StashKey[int]()  # how many crashes of worker processes the reports of this process have named


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory():
    """Fill every torch.empty with NaN, so that reading what was never written is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()


@pytest.fixture(scope="session", autouse=True)
def one_thread_in_fixtures():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread():
    """The cases are small: threads would only wait for one another, and for whatever else the machine does.

    Lightning's launchers set another number in this process, on which the memory of products depends.
    """
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool():
    from pool import WORLDS, Pool

    result = Pool(max(WORLDS))
    yield result
    result.close()


@pytest.fixture(scope="session")
def forking_process():
    from forking import ForkingProcess

    with closing(ForkingProcess()) as result:
        yield result


@pytest.fixture(scope="session")
def checks_splits(request):
    """Whether the runs of tests check how they are split: in `make test` those alone that test it."""
    return request.config.getoption("--draws") != "few"


@pytest.fixture(scope="session")
def trainers(checks_splits):
    from trainers import Trainers

    with closing(Trainers(4, checks_splits=checks_splits)) as result:
        yield result


def pytest_addoption(parser):
    parser.addoption("--no-skips", action="store_true", help="fail where a test is skipped that needs no GPU")
    parser.addoption("--draws", choices=DRAWS, default="all", help="how many cases property tests draw")
    parser.addoption("--kernel", help="run the tests of this kernel alone; `none` runs those that name no kernel")


def pytest_collection_modifyitems(config, items):
    share = DRAWS[config.getoption("--draws")]
    for test in {item.obj for item in items if is_hypothesis_test(getattr(item, "obj", None))}:
        decorated = test._hypothesis_internal_use_settings  # `settings` decorates a test once
        test._hypothesis_internal_use_settings = settings(
            decorated, max_examples=max(LEAST, int(share * decorated.max_examples))
        )
    if (kernel := config.getoption("--kernel")) is not None:
        others = [item for item in items if kernel_of(item) != kernel]
        items[:] = [item for item in items if kernel_of(item) == kernel]
        config.hook.pytest_deselected(items=others)
    if hasattr(config, "workerinput"):  # one of the processes of pytest-xdist
        items.sort(key=place_of)
    gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(gpu)


def place_of(item):
    file = item.nodeid.partition("::")[0]
    return SLOWEST.index(file) if file in SLOWEST else len(SLOWEST)


def kernel_of(item):
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return params.get("kernel", "none")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and item.config.getoption("--no-skips") and not item.get_closest_marker("gpu"):
        report.outcome = "failed"
        report.longrepr = f"skipped, though it needs no GPU: {report.longrepr}"
    if call.when == "teardown" and "workers" in sys.modules:
        crashes = sys.modules["workers"].CRASHES
        report.user_properties += [("crash", message) for message in crashes[item.config.stash.get(REPORTED, 0) :]]
        item.config.stash[REPORTED] = len(crashes)
    return report


def pytest_terminal_summary(terminalreporter):
    """Show which worker processes crashed, and what tests recorded by `record_property("note", ...)`.

    Both travel in reports, which reach the process that prints from every process that runs tests.
    """
    properties = [
        (report, name, value)
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
    ]
    for report, name, value in properties:
        if name == "crash":
            terminalreporter.write_line(f"{report.nodeid}: a worker process crashed: {value}", red=True)
        elif name == "note" and report.passed and report.when == "call":
            terminalreporter.write_line(f"{report.nodeid}: {value}")
