"""Cells of a soak that are tests of their own: run by name, and counted."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from time import monotonic

TESTS = Path(__file__).parents[1]
PATIENCE = 3600.0  # seconds for the tests of a kind in one file
CORRUPTIONS = {
    "strategies/test_saves.py": (
        "test_each_damaged_file_is_named_and_passed_over",
        "test_a_run_goes_on_from_the_newest_good_one",
        "test_last_is_found_when_its_name_is_gone",
    )
}
OPERATIONS = {"strategies/test_killed_saves.py": ("test_the_old_or_the_new_one_is_left",)}
HOSTILE = {"security/test_hostile_files.py": ("test_nothing_runs_and_nothing_outside_is_read",)}
BAD_DATA = {
    "strategies/test_loaders.py": (
        "test_a_later_batch_that_differs_is_an_error_in_its_step",
        "test_a_loader_that_ends_on_one_rank_is_an_error",
        "test_validation_within_training_is_compared_too",
        "test_groups_that_gather_parameters_need_equally_many_batches",
        "test_batches_that_a_step_takes_itself_are_compared",
    ),
    "strategies/test_finite.py": (
        "test_every_rank_says_once_that_its_loss_is_not_finite",
        "test_detected_anomalies_end_all_ranks",
        "test_an_empty_batch_of_one_group_counts_no_token",
        "test_a_mean_over_no_rows_is_announced_where_it_is_taken",
    ),
    "strategies/test_refusals.py": (
        "test_batches_that_cannot_be_split_are_refused_on_all_ranks",
        "test_ranks_are_compared_in_each_epoch_and_in_validation",
        "test_a_fault_of_one_group_is_an_error_on_all_ranks",
        "test_groups_that_are_given_the_same_are_reported",
        "test_prediction_of_unequal_numbers_is_refused_where_it_would_hang",
    ),
    "strategies/test_data_modules.py": (
        "test_ranks_that_are_given_other_samples",
        "test_rows_of_fewer_tokens_than_ranks",
    ),
    "sequence/test_agreement.py": ("test_a_fault_of_a_batch_is_an_error_on_all_ranks",),
    "data/test_token_files.py": (
        "test_a_token_outside_of_the_vocabulary_is_named",
        "test_a_token_that_is_not_sampled_is_named_when_it_is_read",
        "test_a_description_of_other_values_is_refused",
        "test_documents_that_begin_nowhere_are_refused",
    ),
    "data/test_streams.py": (
        "test_other_arrays_are_refused",
        "test_a_part_of_an_array_is_refused",
        "test_a_file_that_shrinks_is_noticed",
    ),
    "data/test_images.py": ("test_what_does_not_fit_is_reported_in_a_line",),
    "data/test_hub.py": ("test_what_does_not_fit_is_reported_in_a_line",),
    "data/test_byte_data.py": ("test_what_does_not_fit_is_reported_in_a_line", "test_too_few_rows_for_a_batch"),
    "data/test_streaming.py": ("test_a_stream_that_is_too_short",),
}


_OUTCOME = re.compile(r"\S+?::(?P<name>.+) (?P<outcome>PASSED|FAILED|ERROR|SKIPPED)\s+\[ *\d+%\]$")


def outcomes(file, names):
    """(name of a case, "" or what failed, seconds) of the tests of a file, as soon as each ends.

    Where one has failed, or the file cannot be run, the last is what was printed, without a name.
    """
    environment = {name: text for name, text in os.environ.items() if name != "CI"}
    command = [sys.executable, "-m", "pytest", *(f"{TESTS / file}::{name}" for name in names), "-v", "--no-skips"]
    command += ["-p", "no:cacheprovider", "--draws", "few", "--tb=short"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=TESTS.parent, env=environment
    )
    watch = threading.Timer(PATIENCE, process.kill)
    watch.start()
    try:
        begin, rest = monotonic(), []
        for line in process.stdout:
            if match := _OUTCOME.match(line.rstrip()):
                is_good = match["outcome"] == "PASSED"
                yield match["name"], "" if is_good else match["outcome"].lower(), round(monotonic() - begin, 1)
                begin = monotonic()
            else:
                rest.append(line)
        if process.wait():
            yield "", "".join(rest), 0.0
    finally:
        process.kill()
        watch.cancel()
