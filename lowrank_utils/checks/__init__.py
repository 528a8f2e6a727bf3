"""What the exercises call: each check takes the learner's function and says what is
right, or gives a hint.

A check knows the mistakes that are often made and names the one it recognises. It never
shows the answer. There is a file for each notebook.
"""

from lowrank_utils.checks._shared import ExerciseError
from lowrank_utils.checks.comparison import (
    check_enough_networks,
    check_held_back,
    check_sign_flip,
)
from lowrank_utils.checks.dora import (
    check_dora_output,
    check_dora_scale,
    check_finds_bug,
    check_magnitude_gradient,
)
from lowrank_utils.checks.finetuning import (
    check_fine_tune,
    check_paired_difference,
    check_standard_error,
)
from lowrank_utils.checks.four_bits import (
    check_bits_per_weight,
    check_gradient_of_x,
    check_round_to_levels,
)
from lowrank_utils.checks.lora_layer import (
    check_freeze_all_but_adapters,
    check_lora_output,
    check_scaling,
    checked_lora_layer,
)
from lowrank_utils.checks.low_rank_updates import (
    check_adapter_parameters,
    check_apply_update,
    check_smallest_rank,
)
from lowrank_utils.checks.magnitude_and_direction import (
    check_split_rows,
    check_unit_vector,
    check_weight_norm_gradients,
)
from lowrank_utils.checks.merged_and_unmerged import (
    check_merge,
    check_merged_weight,
    check_multiplications,
)
from lowrank_utils.checks.production import (
    check_factored_squares,
    check_mixed_batch,
    check_to_peft,
)
from lowrank_utils.checks.transformer import (
    check_accumulated_step,
    check_mean_of_tokens,
    check_training_bytes,
)
