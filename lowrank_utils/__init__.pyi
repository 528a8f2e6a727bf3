"""The public names of the package, for ``__init__.py``, type checkers and
completion.
"""

from .adapt import (
    ParameterCount as ParameterCount,
)
from .adapt import (
    count_parameters as count_parameters,
)
from .adapt import (
    freeze_linear_layers as freeze_linear_layers,
)
from .adapt import (
    merge_adapters as merge_adapters,
)
from .adapt import (
    named_modules_outside_adapters as named_modules_outside_adapters,
)
from .adapt import (
    parameter_groups as parameter_groups,
)
from .adapt import (
    replace_linear_layers as replace_linear_layers,
)
from .adapters import (
    AdapterBank as AdapterBank,
)
from .adapters import (
    load_adapter as load_adapter,
)
from .adapters import (
    save_adapter as save_adapter,
)
from .adapters.config import AdapterFileError as AdapterFileError
from .data import (
    DATA_SETS as DATA_SETS,
)
from .data import (
    SIDE as SIDE,
)
from .data import (
    DataError as DataError,
)
from .data import (
    Digits as Digits,
)
from .data import (
    Splits as Splits,
)
from .data import (
    blur as blur,
)
from .data import (
    invert as invert,
)
from .data import (
    load_mnist as load_mnist,
)
from .data import (
    permute_pixels as permute_pixels,
)
from .data import (
    rotate as rotate,
)
from .data import (
    stratified_sample as stratified_sample,
)
from .data import (
    stratified_split as stratified_split,
)
from .decompose import (
    LowRankFactors as LowRankFactors,
)
from .decompose import (
    MagnitudeAndDirection as MagnitudeAndDirection,
)
from .decompose import (
    direction_change as direction_change,
)
from .decompose import (
    low_rank_approximation as low_rank_approximation,
)
from .decompose import (
    magnitude_and_direction as magnitude_and_direction,
)
from .decompose import (
    magnitude_change as magnitude_change,
)
from .decompose import (
    row_norms as row_norms,
)
from .dora import (
    LinearWithDoRA as LinearWithDoRA,
)
from .dora import (
    LinearWithDoRAMerged as LinearWithDoRAMerged,
)
from .dora import (
    scale_and_bias as scale_and_bias,
)
from .interactive import (
    WITHOUT_A_KERNEL as WITHOUT_A_KERNEL,
)
from .interactive import (
    PictureWithSliders as PictureWithSliders,
)
from .lora import (
    INITIALISATIONS as INITIALISATIONS,
)
from .lora import (
    AdaptedLinear as AdaptedLinear,
)
from .lora import (
    AroundLinear as AroundLinear,
)
from .lora import (
    LinearWithLoRA as LinearWithLoRA,
)
from .lora import (
    LinearWithLoRAMerged as LinearWithLoRAMerged,
)
from .lora import (
    LoRALayer as LoRALayer,
)
from .lora import (
    article_init as article_init,
)
from .lora import (
    check_linear as check_linear,
)
from .lora import (
    check_lora_arguments as check_lora_arguments,
)
from .lora import (
    is_adapter as is_adapter,
)
from .lora import (
    peft_init as peft_init,
)
from .lora import (
    without_autocast as without_autocast,
)
from .norms import (
    factored_norm_pays as factored_norm_pays,
)
from .norms import (
    factored_row_norms as factored_row_norms,
)
from .norms import (
    formed_row_norms as formed_row_norms,
)
from .norms import (
    row_scale as row_scale,
)
from .norms import (
    squared_row_norms as squared_row_norms,
)
from .norms import (
    values_can_be_read as values_can_be_read,
)
from .plots import (
    LOOKS as LOOKS,
)
from .plots import (
    PALETTE as PALETTE,
)
from .plots import (
    Look as Look,
)
from .plots import (
    legend_above as legend_above,
)
from .plots import (
    plot_confusion as plot_confusion,
)
from .plots import (
    plot_history as plot_history,
)
from .plots import (
    show_images as show_images,
)
from .plots import (
    use_style as use_style,
)
from .promises import (
    SCALES as SCALES,
)
from .promises import (
    SQUARES as SQUARES,
)
from .promises import (
    Promise as Promise,
)
from .promises import (
    constant_weights as constant_weights,
)
from .promises import (
    frozen_weights as frozen_weights,
)
from .training import (
    History as History,
)
from .training import (
    MultilayerPerceptron as MultilayerPerceptron,
)
from .training import (
    accuracy as accuracy,
)
from .training import (
    adam as adam,
)
from .training import (
    reproducible as reproducible,
)
from .training import (
    train as train,
)
from .training import (
    warm_up_and_decay as warm_up_and_decay,
)

__version__: str
