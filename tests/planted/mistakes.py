"""Mistakes that are easily made in layers, protocol, statistics and tables, and the
test that finds each.

``python tests/planted/mistakes.py`` plants one after the other into a copy of the
package, runs the test against it, and ends with a table. A test that passes although
its mistake is in the code is worth nothing, and the exit status says so.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]


class Mistake(NamedTuple):
    """A mistake, and what finds it.

    Attributes:
        what: in a few words.
        file: of the package.
        right: what stands there, once.
        wrong: what is put in its place.
        test: its file, as seen from ``tests/unit``, and its name.
    """

    what: str
    file: str
    right: str
    wrong: str
    test: str


FORMULA = "test_wrappers.py::test_the_output_is_that_of_the_formula"
GRADIENTS = "test_wrappers.py::test_the_gradients_are_those_derived_by_hand"

MISTAKES = [
    Mistake(
        "alpha dropped",
        "lora.py",
        "return self.alpha * (x @ self.A @ self.B)",
        "return x @ self.A @ self.B",
        "test_lora.py::test_the_output_is_alpha_times_x_a_b",
    ),
    Mistake(
        "alpha squared",
        "lora.py",
        "return self.alpha * (x @ self.A @ self.B)",
        "return self.alpha**2 * (x @ self.A @ self.B)",
        "test_lora.py::test_the_output_is_alpha_times_x_a_b",
    ),
    Mistake(
        "alpha divided by the rank",
        "lora.py",
        "self.alpha = float(alpha)",
        "self.alpha = float(alpha) / rank",
        "test_lora.py::test_alpha_is_the_scaling_itself_whatever_the_rank",
    ),
    Mistake(
        "A and B swapped: A starts at zero",
        "lora.py",
        "        self.A = nn.Parameter((init if callable(init) else INITIALISATIONS[init])(A))\n        self.B = nn.Parameter(B)",
        "        self.A = nn.Parameter(torch.zeros_like(A))\n        self.B = nn.Parameter(INITIALISATIONS['article'](B.T).T)",
        "test_lora.py::test_a_new_layer_maps_everything_to_zero_but_its_b_has_a_gradient",
    ),
    Mistake(
        "both factors start at zero, so nothing is ever learned",
        "lora.py",
        "self.A = nn.Parameter((init if callable(init) else INITIALISATIONS[init])(A))",
        "self.A = nn.Parameter(torch.zeros_like(A))",
        "test_lora.py::test_a_new_layer_maps_everything_to_zero_but_its_b_has_a_gradient",
    ),
    Mistake(
        "the transpose is missing in ΔW",
        "lora.py",
        "return self.alpha * (self.B.T @ self.A.T)",
        "return self.alpha * (self.A @ self.B)",
        "test_lora.py::test_the_delta_weight_has_the_shape_of_torchs_weight_and_gives_the_same_output",
    ),
    Mistake(
        "the rank is taken for the number of inputs in the initialisation",
        "lora.py",
        "bound = 1 / math.sqrt(A.shape[0])",
        "bound = 1 / math.sqrt(A.shape[1])",
        "test_lora.py::test_pefts_a_is_uniform_up_to_one_over_root_in_whatever_the_rank",
    ),
    Mistake(
        "the norm is taken along the other axis",
        "decompose.py",
        "matrix.to(_floating(matrix)), dim=1, dtype=wide",
        "matrix.to(_floating(matrix)), dim=0, dtype=wide",
        "test_decompose.py::test_a_matrix_is_split_by_rows_and_not_by_columns",
    ),
    Mistake(
        "the norm is taken of the activations, per sample",
        "dora.py",
        "c, b = scale_and_bias(self)",
        "c, b = row_scale(self.m, base.norm(dim=-1, keepdim=True)), self.bias",
        "test_wrappers.py::test_the_merged_and_the_unmerged_form_agree",
    ),
    Mistake(
        "the norm is that of W instead of W + ΔW",
        "dora.py",
        "c, b = scale_and_bias(self)",
        "c, b = row_scale(self.m, row_norms(self.linear.weight)), self.bias",
        "test_wrappers.py::test_the_merged_and_the_unmerged_form_agree",
    ),
    Mistake(
        "m starts at one",
        "dora.py",
        "self.m = nn.Parameter(magnitude_and_direction(V.detach()).magnitude)",
        "self.m = nn.Parameter(V.detach().new_ones(linear.out_features))",
        "test_dora.py::test_the_magnitude_starts_as_the_length_of_each_row_of_torchs_weight",
    ),
    Mistake(
        "the bias is scaled with the row",
        "dora.py",
        "y = c * (base + self.lora(x))\n        return (y if b is None else y + b)",
        "y = base + self.lora(x)\n        return c * (y if b is None else y + b)",
        "test_wrappers.py::test_the_bias_is_added_as_it_is_and_not_scaled",
    ),
    Mistake(
        "the bias is dropped",
        "dora.py",
        "y = c * (base + self.lora(x))\n        return (y if b is None else y + b)",
        "y = c * (base + self.lora(x))\n        return y",
        FORMULA,
    ),
    Mistake(
        "the norm keeps its gradient where it was to be detached",
        "dora.py",
        "row_norms(V.detach() if self.detach_norm else V)",
        "row_norms(V)",
        GRADIENTS,
    ),
    Mistake(
        "the norm is detached where its gradient was to be kept",
        "dora.py",
        "if torch.is_grad_enabled() and not layer.detach_norm:",
        "if False:",
        GRADIENTS,
    ),
    Mistake(
        "a zero row is divided by its norm",
        "norms.py",
        "return (m / norm.masked_fill(zero, 1)).masked_fill(zero, 1)",
        "return m / norm",
        "test_dora.py::test_zero_rows_give_no_nan_in_outputs_or_gradients",
    ),
    Mistake(
        "the gradient reaches the pretrained weight",
        "adapt.py",
        "module.requires_grad_(False)",
        "module.requires_grad_(True)",
        "test_training.py::test_only_the_adapters_reach_the_optimizer_and_only_they_move",
    ),
    Mistake(
        "the optimizer holds the frozen weights",
        "training.py",
        "parameters = [p for p in model.parameters() if p.requires_grad]",
        "parameters = list(model.parameters())",
        "test_training.py::test_only_the_adapters_reach_the_optimizer_and_only_they_move",
    ),
    Mistake(
        "gradients add up from step to step",
        "training.py",
        "                for parameter in parameters:\n                    parameter.grad = None\n",
        "",
        "test_training.py::test_gradients_do_not_add_up_from_step_to_step",
    ),
    Mistake(
        "merging changes the model that it is given, so a second merge adds ΔW twice",
        "adapt.py",
        "merged = copy.deepcopy(model)",
        "merged = model",
        "test_adapt.py::test_merging_leaves_the_original_bit_for_bit_as_it_was",
    ),
    Mistake(
        "what was merged is not restored",
        "adapters/bank.py",
        "banked.merged = None",
        "pass",
        "adapters/test_bank.py::test_merging_and_restoring_many_times_changes_no_bit",
    ),
    Mistake(
        "the dtype of the layer is lost",
        "lora.py",
        "            dtype=dtype or adapter_dtype(W.dtype),\n",
        "",
        "test_wrappers.py::test_the_adapter_takes_the_dtype_of_the_layer_and_not_torchs_default",
    ),
    Mistake(
        "the device of the layer is lost",
        "lora.py",
        "            device=W.device,\n",
        "",
        "test_wrappers.py::test_a_wrapper_can_be_built_and_run_on_the_meta_device",
    ),
    Mistake(
        "the seed of the shuffling is ignored",
        "training.py",
        "shuffle = torch.Generator().manual_seed(seed)",
        "shuffle = torch.Generator().manual_seed(0)",
        "test_training.py::test_the_same_seed_gives_the_same_weights_bit_for_bit_and_another_seed_others",
    ),
    Mistake(
        "the test split leaks into the choice of the learning rate",
        "comparison/experiment.py",
        "task = Task(network, pretrained, new.train, new.validation)",
        "task = Task(network, pretrained, new.train, new.test)",
        "comparison/test_experiment.py::test_what_a_task_holds_comes_from_disjoint_splits_and_never_from_the_test_split",
    ),
    Mistake(
        "the learning rate is chosen by the training, not by the validation digits",
        "comparison/experiment.py",
        "validation=accuracy(model, task.validation)",
        "validation=accuracy(model, task.train)",
        "comparison/test_experiment.py::test_a_run_says_what_it_was",
    ),
    Mistake(
        "the mean image comes from the test split",
        "comparison/shifts.py",
        "mean = new.train.images.mean(dim=0)",
        "mean = new.test.images.mean(dim=0)",
        "comparison/test_shifts.py::test_neither_the_pretraining_digits_nor_any_mean_come_from_validation_or_test_images",
    ),
    Mistake(
        "a trained last layer keeps the rate of A and B",
        "comparison/experiment.py",
        "task.last_layer_rate / point.rate",
        "1.0",
        "comparison/test_experiment.py::test_a_trained_last_layer_has_one_rate_in_all_methods_with_adapters",
    ),
    Mistake(
        "accuracy is averaged over batches",
        "training.py",
        "    return correct / len(digits.labels)\n",
        "    sizes = [len(part) for part in digits.labels.split(batch_size)]\n"
        "    return correct / (max(sizes) * len(sizes))\n",
        "test_training.py::test_accuracy_counts_examples_and_not_batches",
    ),
    Mistake(
        "the network is pretrained on the validation images too",
        "comparison/shifts.py",
        "familiar = _with_labels(splits.train, shift.pretrained_on)",
        "known = [torch.cat(parts) for parts in zip(splits.train, splits.validation, strict=True)]\n"
        "    familiar = _with_labels(Digits(*known), shift.pretrained_on)",
        "comparison/test_experiment.py::test_the_network_is_pretrained_on_the_training_split_alone",
    ),
    Mistake(
        "each split has its pixels permuted in another way",
        "comparison/shifts.py",
        "shift.change(digits, degrees, seed) for digits in chosen",
        "shift.change(digits, degrees, seed + i) for i, digits in enumerate(chosen)",
        "comparison/test_shifts.py::test_a_permutation_moves_each_pixel_and_another_seed_moves_it_elsewhere",
    ),
    Mistake(
        "rates are chosen with the seeds that are reported",
        "comparison/experiment.py",
        "        settings.tuning_seeds,\n        score,",
        "        settings.seeds,\n        score,",
        "comparison/test_experiment.py::test_a_choice_is_made_by_validation_and_with_the_tuning_seeds_alone",
    ),
    Mistake(
        "seeds and tuning seeds are refused only if all of them are the same",
        "comparison/settings.py",
        "if both := sorted(set(self.seeds) & set(self.tuning_seeds)):",
        "if (both := sorted(self.seeds)) == sorted(self.tuning_seeds):",
        "comparison/test_settings.py::test_a_wrong_setting_is_refused_by_name",
    ),
    Mistake(
        "halving keeps the worse half of the rates",
        "comparison/tuning.py",
        "left = sorted(left, key=lambda p: (-choice.score(p), p.rate))",
        "left = sorted(left, key=lambda p: (choice.score(p), p.rate))",
        "comparison/test_tuning.py::test_the_better_half_goes_on_to_the_second_seed_and_to_the_longer_run",
    ),
    Mistake(
        "all seeds above a network start from the same A",
        "comparison/experiment.py",
        "torch.manual_seed(seed)",
        "torch.manual_seed(task.network)",
        "comparison/test_experiment.py::test_methods_of_one_seed_start_from_the_same_a_and_another_seed_from_another",
    ),
    Mistake(
        "methods of one seed start from different A, since the random rows are drawn in between",
        "comparison/methods.py",
        "low_rank.put_in(model, LinearWithRandomRows, generator=rows)",
        "low_rank.put_in(model, LinearWithRandomRows)",
        "comparison/test_methods.py::test_methods_of_one_rank_start_from_the_same_a",
    ),
    Mistake(
        "the factor that is meant for B goes to A",
        "comparison/methods.py",
        'OF_B = Part("*.lora.B", high=30.0)',
        'OF_B = Part("*.lora.A", high=30.0)',
        "comparison/test_methods.py::test_a_part_is_what_its_name_says_and_nothing_else",
    ),
    Mistake(
        "the factor of B is lost where the last layer is trained",
        "comparison/experiment.py",
        'factors[f"{name}.*"] = task.last_layer_rate / point.rate',
        'factors = {f"{name}.*": task.last_layer_rate / point.rate}',
        "comparison/test_experiment.py::test_a_trained_last_layer_has_one_rate_in_all_methods_with_adapters",
    ),
    Mistake(
        "a part's factor multiplies the rates of all parts after it as well, and that of the rest",
        "adapt.py",
        "rate = float(learning_rate) * float(factor)",
        "rate = learning_rate = float(learning_rate) * float(factor)",
        "test_parameter_groups.py::test_each_pattern_has_its_group_with_its_rate_after_that_of_all_the_rest",
    ),
    Mistake(
        "the warm-up never ends",
        "training.py",
        "warm_up = max(1, steps // 10)",
        "warm_up = max(1, steps)",
        "test_training.py::"
        "test_the_rate_rises_for_a_tenth_of_the_steps_to_one_and_then_falls_to_all_but_zero",
    ),
    Mistake(
        "the gain starts at zero",
        "comparison/controls.py",
        "self.g = nn.Parameter(torch.ones_like(linear.weight[:, 0]))",
        "self.g = nn.Parameter(torch.zeros_like(linear.weight[:, 0]))",
        "comparison/test_controls.py::test_a_control_starts_at_exactly_the_pretrained_weight",
    ),
    Mistake(
        "the random rows have length one and not that of the weight's rows",
        "comparison/controls.py",
        "lengths = (row_norms(W) / row_norms(rows)).to(W.dtype)",
        "lengths = (1 / row_norms(rows)).to(W.dtype)",
        "comparison/test_controls.py::test_random_rows_are_as_long_as_those_of_the_weight_and_not_its_rows",
    ),
    Mistake(
        "a result is written in place, so a crash leaves half of it",
        "comparison/whole.py",
        'temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")',
        "temporary = path",
        "comparison/test_experiment.py::test_a_result_is_written_whole_and_reads_back_as_it_was",
    ),
    Mistake(
        "the batch size is left out of a run's identity, so an old result is taken for the new one",
        "comparison/grid.py",
        'text = json.dumps({"settings": settings.as_dict(), "code": version}, sort_keys=True)',
        'values = {name: value for name, value in settings.as_dict().items() if name != "batch_size"}\n'
        '    text = json.dumps({"settings": values, "code": version}, sort_keys=True)',
        "comparison/test_grid.py::test_runs_that_differ_in_any_one_setting_are_two",
    ),
    Mistake(
        "what is declared may be changed after the runs",
        "comparison/store.py",
        'if any((self.folder / "runs").iterdir()) and earlier != text:',
        'if any((self.folder / "runs").iterdir()) and not path.is_file() and earlier != text:',
        "comparison/test_declared.py::test_after_a_run_it_may_not",
    ),
    Mistake(
        "each seed counts as a network, so more seeds make an interval narrower",
        "comparison/tables.py",
        'keys = [*CELL, "trainable", "network"]',
        'keys = [*CELL, "trainable", "network", "seed"]',
        "comparison/test_tables.py::test_more_seeds_above_a_network_make_nothing_surer_and_move_no_weight",
    ),
    Mistake(
        "a dead run is left out of the mean",
        "comparison/tables.py",
        "numbers = table.assign(",
        'numbers = table[~table["dead"]].assign(',
        "comparison/test_tables.py::test_a_dead_run_counts_in_every_mean",
    ),
    Mistake(
        "a method is called under-tuned if one of the two, score or loss, is worse",
        "comparison/tables.py",
        "if lower_score and _clearly_above(loss, LOSS_MARGIN):",
        "if lower_score or _clearly_above(loss, LOSS_MARGIN):",
        "comparison/test_tables.py::test_what_is_not_clearly_worse_in_both_is_not_called_under_tuned",
    ),
    Mistake(
        "a method is held against itself at a larger rank, which it doesn't contain",
        "comparison/tables.py",
        "smaller = pd.isna(other) or (not pd.isna(rank) and other <= rank)",
        "smaller = pd.isna(other) or (not pd.isna(rank) and other >= rank)",
        "comparison/test_tables.py::test_a_method_is_held_against_itself_at_a_smaller_rank_alone",
    ),
    Mistake(
        "the standard error is taken with n where n − 1 is meant",
        "comparison/intervals.py",
        "float(stats.sem(array))",
        "float(stats.sem(array, ddof=0))",
        "comparison/test_intervals.py::test_the_interval_of_a_mean_is_students",
    ),
    Mistake(
        "p counts one side alone",
        "comparison/intervals.py",
        'permutation_type="samples",',
        'permutation_type="samples",\n        alternative="greater",',
        "comparison/test_intervals.py::test_p_is_the_share_of_all_choices_of_signs_on_both_sides",
    ),
    Mistake(
        "Holm's correction makes a test surer than one with a smaller p",
        "comparison/intervals.py",
        "largest = max(largest, min(1.0, scaled))",
        "largest = min(1.0, scaled)",
        "comparison/test_intervals.py::test_holms_correction_against_values_by_hand",
    ),
    Mistake(
        "an interval that holds zero is taken for no difference, however wide it is",
        "comparison/intervals.py",
        "if max(-self.low, self.high) < margin:",
        "if self.low <= 0 <= self.high:",
        "comparison/test_intervals.py::test_a_verdict_goes_by_the_ends_alone",
    ),
    Mistake(
        "a declared test is decided by its p before the correction",
        "comparison/declared.py",
        'if verdict in ("better", "worse") and p > 1 - CONFIDENCE:',
        'if verdict in ("better", "worse") and row["p"] > 1 - CONFIDENCE:',
        "comparison/test_declared.py::test_a_corrected_p_above_five_of_a_hundred_decides_nothing_whatever_the_interval",
    ),
    Mistake(
        "a kept norm is used after the weights have changed",
        "promises.py",
        "if entry is None or entry.marks != marks:",
        "if entry is None:",
        "test_norms.py::test_a_change_that_torch_notices_is_seen_at_once",
    ),
    Mistake(
        "a broken promise of constant weights goes unnoticed",
        "promises.py",
        "    if stale:\n",
        "    if False:\n",
        "test_norms.py::test_a_change_that_torch_does_not_notice_is_an_error_at_the_end",
    ),
    Mistake(
        "the squares of a pretrained weight that is trained as well are kept",
        "promises.py",
        "if trained or (layer.training and not self._in_training):",
        "if layer.training and not self._in_training:",
        "test_norms.py::test_a_pretrained_weight_that_is_trained_too_keeps_nothing",
    ),
    Mistake(
        "the factored norm loses its digits where the update takes a row away",
        "norms.py",
        "if not safe.all():",
        "if False:",
        "test_norms.py::test_rows_that_the_update_takes_away_keep_their_digits",
    ),
    Mistake(
        "an adapter file is loaded into the wrong layer",
        "adapters/files.py",
        "for name, layer in layers.items():\n        put_module(model, name, layer)",
        "for name, layer in zip(layers, reversed(layers.values())):\n        put_module(model, name, layer)",
        "adapters/test_files.py::test_what_is_saved_is_loaded_to_the_last_bit",
    ),
    Mistake(
        "A is written in our orientation and not in PEFT's",
        "adapters/saving.py",
        'stored = {"A": part.A.T, "B": part.B.T}',
        'stored = {"A": part.A, "B": part.B}',
        "adapters/test_files.py::test_the_files_hold_the_adapter_and_nothing_else",
    ),
    Mistake(
        "PEFT's scaling α/r is read as α",
        "adapters/config.py",
        "            math.sqrt(rank) if self.rslora else rank\n",
        "            1\n",
        "adapters/test_files.py::test_the_scaling_comes_back",
    ),
    Mistake(
        "what was altered on the disk is taken",
        "adapters/files.py",
        "if metadata.get(TENSORS_DIGEST, digest := digest_of(tensors)) != digest:",
        "if False:",
        "adapters/test_files.py::test_a_flipped_bit_of_the_numbers_is_refused",
    ),
    Mistake(
        "the folder of an adapter is filled in place, so a crash leaves half of it",
        "adapters/folders.py",
        "        _move_into_place(new, folder)\n",
        "        folder.mkdir(exist_ok=True)\n        for path in new.iterdir():\n            path.replace(folder / path.name)\n",
        "adapters/test_folders.py::test_killed_at_any_step_the_old_or_the_new_folder_is_there",
    ),
    Mistake(
        "the rows of a batch get each other's adapters",
        "adapters/banked_linear.py",
        "return self._by_rows(x, choice.rows, choice.batch_dim)",
        "return self._by_rows(x, choice.rows[::-1], choice.batch_dim)",
        "adapters/test_bank.py::test_every_row_gets_its_own_adapter",
    ),
    Mistake(
        "a quantised number is multiplied with the scale of another block",
        "quantized.py",
        "scales.repeat_interleave(block_size, dim=1)[:, :columns]",
        "scales.repeat(1, block_size)[:, :columns]",
        "test_quantized.py::test_codes_scales_and_weight_are_those_of_loops",
    ),
    Mistake(
        "in half precision levels are rounded first, and their products again",
        "quantized.py",
        "wide = torch.promote_types(scales.dtype, torch.float32)",
        "wide = scales.dtype",
        "test_quantized.py::test_codes_scales_and_weight_are_those_of_loops",
    ),
    Mistake(
        "the gradient comes from a weight that was rounded once more",
        "quantized.py",
        "to_x = to_y @ W.to(to_y.dtype)",
        "to_x = to_y @ W.bfloat16().to(to_y.dtype)",
        "test_quantized.py::test_it_has_the_bits_of_a_plain_layer_with_the_same_weight",
    ),
    Mistake(
        "autograd keeps the weight that was to be kept as codes",
        "quantized.py",
        "if function is F.linear and torch.is_grad_enabled() and len(args) > 1:",
        "if False:",
        "test_quantized.py::test_autograd_keeps_no_weight",
    ),
    Mistake(
        "a kept norm is used after the scales of the codes have changed",
        "quantized.py",
        'ClassVar[tuple[str, ...]] = ("codes", "scales")',
        'ClassVar[tuple[str, ...]] = ("codes",)',
        "test_quantized.py::test_a_promise_keeps_its_norms_and_sees_other_codes",
    ),
    Mistake(
        "codes are loaded without their scales",
        "quantized.py",
        "if found and len(found) < len(parts):",
        "if False:",
        "test_quantized.py::test_half_of_a_layer_or_another_kind_is_not_loaded",
    ),
    Mistake(
        "another dtype of a quantised weight is taken for another weight",
        "_weight_checks.py",
        "return m.detach().to(linear.weight.dtype, copy=True)",
        "return m.detach().clone()",
        "test_quantized.py::test_another_dtype_is_no_other_weight",
    ),
    Mistake(
        "x and A come in another order out of their joined product than into it",
        "norms.py",
        "F.linear(torch.cat([rows, A.T]), W)",
        "F.linear(torch.cat([A.T, rows]), W)",
        "test_quantized.py::"
        "test_a_large_one_reads_its_weight_once_for_the_product_and_the_norm",
    ),
    Mistake(
        "a quantised layer is counted with the bytes of the whole weight",
        "adapt.py",
        "nbytes += quantized.codes.nbytes + quantized.scales.nbytes",
        "nbytes += quantized.weight.nbytes",
        "test_quantized.py::test_numbers_and_bytes_are_counted",
    ),
    Mistake(
        "a layer loses its hooks when it is dequantised",
        "adapt.py",
        "    assert isinstance(layer, KeepsCodes)\n    check_weight_is_all(layer)\n",
        "    assert isinstance(layer, KeepsCodes)\n",
        "test_quantized.py::"
        "test_a_layer_that_computes_more_than_its_weight_says_stays_quantised",
    ),
]


def planted(mistake: Mistake | None, folder: Path) -> Path:
    """Copy the package and its tests into ``folder``, with the mistake in it, and
    return ``folder``."""
    for part in ("lowrank_utils", "tests", "tools"):
        shutil.copytree(
            ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__")
        )
    # The tests of sweeps take their settings' defaults from the notebook.
    (folder / "notebooks").mkdir()
    for part in (
        "conftest.py",
        "constraints.txt",
        "pyproject.toml",
        "notebooks/comparison.ipynb",
    ):
        shutil.copy(ROOT / part, folder / part)
    if mistake is not None:
        file = folder / "lowrank_utils" / mistake.file
        text = file.read_text(encoding="utf-8").replace(mistake.right, mistake.wrong)
        file.write_text(text, encoding="utf-8")
    return folder


def failing(tests: list[str], folder: Path) -> bool:
    """Run the tests in a copy, and return whether one of them found something."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:nbval",
    ]
    run = subprocess.run(
        [*command, "-o", "addopts=", *[f"tests/unit/{test}" for test in tests]],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode not in (0, 1):
        raise RuntimeError(
            f"pytest could not run {', '.join(tests)}:\n{run.stdout}{run.stderr}"
        )
    return run.returncode == 1


def main() -> int:
    """Plant all mistakes, and return how many of them weren't found."""
    with tempfile.TemporaryDirectory() as folder:
        if failing(
            sorted({mistake.test for mistake in MISTAKES}), planted(None, Path(folder))
        ):
            print("Without a mistake a test fails already: mend that first.")
            return 1
    missed = []
    for mistake in tqdm(MISTAKES, unit="mistake"):
        with tempfile.TemporaryDirectory() as folder:
            if not failing([mistake.test], planted(mistake, Path(folder))):
                missed.append(mistake)
    print(
        f"{len(MISTAKES) - len(missed)} of {len(MISTAKES)} planted mistakes were found."
    )
    for mistake in missed:
        print(f"NOT FOUND by {mistake.test}: {mistake.what} ({mistake.file})")
    return len(missed)


if __name__ == "__main__":
    sys.exit(main())
