"""docs/mistakes.md: what each mistake leads to, and the test that shows it."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs/mistakes.md"
OUTCOMES = {"refused", "warned", "right"}
LEAST = 30  # rows
CHECK, FIRST, REFUSALS = (
    "split_check/test_split_check.py",
    "strategies/test_first_batch.py",
    "strategies/test_refusals.py",
)
FOUND = f"{CHECK}::test_each_fault_is_found_and_named"
LOADERS, REPEATS = "strategies/test_loaders.py", "strategies/test_repeats.py"
DROPOUT, SHARDS = "sequence/test_context_dropout.py", "sequence/test_shards.py"
EFFECTS = "split_check/test_results_and_logs.py"
HOSTILE = "security/test_hostile_files.py::test_nothing_runs_and_nothing_outside_is_read"
USERS = "strategies/test_user_code.py"
DECODERS = "strategies/test_decoder_mistakes.py"
DOCUMENTS = "training/test_batch_documents.py"
COMMANDS = "cli/test_longnet.py::test_a_mistake_is_reported_in_a_line"

# the first words of a row, and the test of what it says
PROOFS = {
    "The loss is a plain mean": FOUND,
    "The module attends by itself": FOUND,
    "Positions are counted by": FOUND,
    "Labels are shifted in the step": FOUND,
    "A convolution, a recurrence": FOUND,
    "Tokens are pooled": FOUND,
    "BatchNorm": FOUND,
    "The loss is a sum": FOUND,
    "A collective has no gradient": FOUND,
    "Only the test step": f"{USERS}::test_the_first_test_batch_is_checked",
    "Only the predict step": "strategies/test_predict_check.py::test_the_first_predict_batch_of_a_run_is_checked",
    "A training step logs": f"{EFFECTS}::test_logged_numbers_and_buffers_of_a_rank_are_warned_of",
    "A training step updates": f"{EFFECTS}::test_logged_numbers_and_buffers_of_a_rank_are_warned_of",
    "Gradients of `self.parameters()`": f"{USERS}::test_gradients_may_be_changed_before_an_update_by_hand",
    "Ranks have different learning": f"{USERS}::test_learning_rates_of_one_rank_are_refused",
    "`on_train_batch_start` changes": f"{USERS}::test_a_batch_that_changes_after_the_split_is_reported_once",
    "Only the validation step": f"{FIRST}::test_validation_is_checked_on_its_own",
    "A module that `configure_model` shards": "strategies/test_check_in_engines.py::test_a_wrong_module_is_found_in_its_engine",
    "A rank leaves its step": "split_check/test_zoo.py::test_a_rank_that_leaves_its_step_is_a_verdict_on_all",
    "`F.dropout` is called": f"{CHECK}::test_no_right_module_is_accused",
    "`nn.Dropout` in a module": f"{DROPOUT}::test_ranks_drop_other_elements_and_their_generators_stay_in_step",
    "`context.attend(dropout=p)` without": f"{DROPOUT}::test_attention_that_drops_has_a_number_in_the_model",
    "`context.attend(dropout=p, layer=i)`": f"{DROPOUT}::test_calls_outside_of_steps_drop_other_pairs_and_torchs_seed_repeats_them",
    "`attend(shard=context.shard)` in one": f"{SHARDS}::test_a_batchs_shard_has_its_documents_and_padding_on_any_number_of_ranks",
    "`attend(shard=context.shard)` under": f"{SHARDS}::test_a_context_that_knows_no_batch_refuses_a_shard",
    "A mask is changed": f"{SHARDS}::test_a_mask_changed_in_place_is_met_by_all_ranks",
    "A tensor of the batch": f"{REFUSALS}::test_batches_that_cannot_be_split_are_refused_on_all_ranks",
    "`labels` are of samples": "sequence/test_labels.py::test_labels_that_may_be_of_samples_are_refused",
    "Ranks that share sequences": f"{LOADERS}::test_a_later_batch_that_differs_is_an_error_in_its_step",
    "The loader of one rank": f"{LOADERS}::test_a_loader_that_ends_on_one_rank_is_an_error",
    "All data-parallel groups": f"{REFUSALS}::test_groups_that_are_given_the_same_are_reported",
    "Samples do not divide": f"{REPEATS}::test_metrics_are_exact_where_samples_do_not_divide",
    "A train loader has": f"{REPEATS}::test_training_data_keeps_its_order_unless_it_is_shuffled",
    "Sequences are shorter": f"{REFUSALS}::test_batches_that_cannot_be_split_are_refused_on_all_ranks",
    "`sequence_parallel_size` does not": f"{REFUSALS}::test_wrong_arguments_are_refused_before_anything_runs",
    "`devices=1000`": f"{REFUSALS}::test_wrong_arguments_are_refused_before_anything_runs",
    "`accumulate=": f"{REFUSALS}::test_tokens_are_accumulated_of_one_mean_alone",
    "`configure_model` shards": f"{REFUSALS}::test_parameters_sharded_over_some_ranks_are_refused",
    "`EMAWeightAveraging`": "strategies/test_averages.py::test_validation_takes_the_average_and_training_goes_on",
    "A `ModuleDict`": "strategies/test_modules.py::test_containers_without_a_forward_are_opened",
    "Tokens are in the first": "strategies/test_throughput.py::test_tokens_in_the_first_dimension_are_counted_once",
    "A torchscale encoder": "attention/test_ragged.py::test_outputs_and_gradients_are_torchscales",
    "transformers pads": "huggingface/test_padded_rows.py::test_a_row_with_padding_equals_the_row_without",
    "transformers' `Trainer`": "huggingface/test_trainer.py::test_accumulated_gradients_are_those_of_the_whole_batch",
    "transformers passes": "huggingface/test_forward.py::test_what_is_not_done_is_refused",
    "An option, a class": COMMANDS,
    "A training token": "data/test_token_files.py::test_a_token_outside_of_the_vocabulary_is_named",
    "The labels of a": "strategies/test_module.py::test_labels_that_the_model_sees_are_an_error_on_all_ranks",
    "The pattern of a": "strategies/test_module.py::test_labels_that_the_model_sees_are_an_error_on_all_ranks",
    "The loss is NaN on one": "strategies/test_finite.py::test_every_rank_says_once_that_its_loss_is_not_finite",
    "A batch of one data-parallel": "strategies/test_finite.py::test_an_empty_batch_of_one_group_counts_no_token",
    "A run needs more memory": "strategies/test_memory_check.py::test_too_little_memory_on_one_rank_ends_all_before_the_first_step",
    "A checkpoint of FSDP2 or": HOSTILE,
    "A checkpoint names a class": HOSTILE,
    "`tokens.json`, a link": HOSTILE,
    "`--ckpt_path` names": COMMANDS,
    "A model of transformers is given": f"{DECODERS}::test_a_batch_that_trains_something_else_is_refused",
    "A batch for a model": f"{DECODERS}::test_a_batch_that_trains_something_else_is_refused",
    "No `position_ids`": f"{DECODERS}::test_positions_that_are_left_out_are_those_of_each_document",
    "`use_cache=True`": f"{DECODERS}::test_a_cache_is_off_in_training_and_on_in_the_export",
    "An encoder, or": f"{DECODERS}::test_another_model_is_refused",
    "The tokenizer of the data": f"{DECODERS}::test_another_vocabulary_is_refused",
    "`attention`, or the `rope_type`": f"{DECODERS}::test_another_model_is_refused",
    "transformers or peft": f"{DECODERS}::test_a_package_that_is_missing_is_named",
    "`documents` are in the batch of a model": f"{DOCUMENTS}::test_a_module_of_a_user_separates_the_documents_of_its_batch",
    "`documents` are in the batch of a `Causal": f"{DOCUMENTS}::test_other_implementations_separate_documents_or_refuse_them",
    "A model with dilated layers": "huggingface/test_dilate.py::test_other_implementations_do_not_make_a_dilated_model_dense",
    "A model of transformers with": "split_check/test_split_refusals.py::test_attention_of_transformers_must_be_ring",
    "A model of transformers has": f"{DECODERS}::test_what_cannot_be_split_is_named_before_the_first_step",
    "`longnet validate`": "cli/test_longnet.py::test_the_weights_that_are_scored_are_named",
}


def rows():
    """(the mistake, its outcome, what happens) of each row of the table."""
    table = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]
    return [row for row in cells if row[1] in OUTCOMES or row[0].startswith(tuple(PROOFS))]


def test_each_row_has_an_outcome_and_none_is_silent():
    assert len(rows()) >= LEAST
    assert {outcome for _, outcome, _ in rows()} == OUTCOMES
    assert all(what for *_, what in rows())


@pytest.mark.parametrize("start", PROOFS)
def test_each_proof_is_a_test(start):
    assert len([row for row in rows() if row[0].startswith(start)]) == 1, "a row of the page"
    path, _, name = PROOFS[start].partition("::")
    assert f"\ndef {name}(" in (TESTS / path).read_text()


def test_each_row_has_a_proof():
    assert not [mistake for mistake, *_ in rows() if not mistake.startswith(tuple(PROOFS))]
