"""The public names of the package, for ``__init__.py``, type checkers and
completion.
"""

from .adapt import (
    ParameterCount as ParameterCount,
    count_parameters as count_parameters,
    dequantize_linear_layers as dequantize_linear_layers,
    freeze_linear_layers as freeze_linear_layers,
    mark_only_adapters_as_trainable as mark_only_adapters_as_trainable,
    merge_adapters as merge_adapters,
    named_modules_outside_adapters as named_modules_outside_adapters,
    parameter_groups as parameter_groups,
    parameters_of_adapters as parameters_of_adapters,
    quantize_linear_layers as quantize_linear_layers,
    refuse_foreign_adapters as refuse_foreign_adapters,
    replace_linear_layers as replace_linear_layers,
)
from .adapters import (
    AdapterBank as AdapterBank,
    load_adapter as load_adapter,
    save_adapter as save_adapter,
)
from .adapters.config import AdapterFileError as AdapterFileError
from .data import (
    DATA_SETS as DATA_SETS,
    SIDE as SIDE,
    DataError as DataError,
    Digits as Digits,
    Splits as Splits,
    blur as blur,
    invert as invert,
    load_mnist as load_mnist,
    permute_pixels as permute_pixels,
    rotate as rotate,
    stratified_sample as stratified_sample,
    stratified_split as stratified_split,
)
from .decompose import (
    LowRankFactors as LowRankFactors,
    MagnitudeAndDirection as MagnitudeAndDirection,
    direction_change as direction_change,
    low_rank_approximation as low_rank_approximation,
    magnitude_and_direction as magnitude_and_direction,
    magnitude_change as magnitude_change,
    row_norms as row_norms,
)
from .dora import (
    LinearWithDoRA as LinearWithDoRA,
    LinearWithDoRAMerged as LinearWithDoRAMerged,
    has_special_form as has_special_form,
    reset_magnitudes as reset_magnitudes,
    scale_and_bias as scale_and_bias,
    special_output as special_output,
)
from .lora import (
    HALF_PRECISION as HALF_PRECISION,
    INITIALISATIONS as INITIALISATIONS,
    AdaptedLinear as AdaptedLinear,
    AroundLinear as AroundLinear,
    Initialisation as Initialisation,
    Linear as Linear,
    LinearWithLoRA as LinearWithLoRA,
    LinearWithLoRAMerged as LinearWithLoRAMerged,
    LoRALayer as LoRALayer,
    adapter_dtype as adapter_dtype,
    article_init as article_init,
    check_linear as check_linear,
    check_lora_arguments as check_lora_arguments,
    is_adapter as is_adapter,
    is_linear as is_linear,
    peft_init as peft_init,
    without_autocast as without_autocast,
)
from .norms import (
    factored_norm_pays as factored_norm_pays,
    factored_row_norms as factored_row_norms,
    formed_row_norms as formed_row_norms,
    joined_products as joined_products,
    row_scale as row_scale,
    squared_row_norms as squared_row_norms,
    values_can_be_read as values_can_be_read,
)
from .plots import (
    LOOKS as LOOKS,
    PALETTE as PALETTE,
    Look as Look,
    legend_above as legend_above,
    plot_confusion as plot_confusion,
    plot_history as plot_history,
    show_images as show_images,
    use_style as use_style,
)
from .promises import (
    SCALES as SCALES,
    SQUARES as SQUARES,
    Promise as Promise,
    constant_weights as constant_weights,
    frozen_weights as frozen_weights,
)
from .quantized import (
    LEVELS as LEVELS,
    DequantizedProduct as DequantizedProduct,
    DequantizedWeight as DequantizedWeight,
    KeepsCodes as KeepsCodes,
    QuantizedLinear as QuantizedLinear,
    QuantizedWeight as QuantizedWeight,
    check_quantizable as check_quantizable,
    dequantize as dequantize,
    even_levels as even_levels,
    is_quantized as is_quantized,
    nf4_levels as nf4_levels,
    pack as pack,
    quantize as quantize,
    unpack as unpack,
)
from .text import (
    LABELS as LABELS,
    LastLayers as LastLayers,
    SentenceClassifier as SentenceClassifier,
    Sentences as Sentences,
    SentenceSplits as SentenceSplits,
    hidden_after as hidden_after,
    load_minilm as load_minilm,
    load_reviews as load_reviews,
    mean_of_tokens as mean_of_tokens,
)
from .training import (
    History as History,
    MultilayerPerceptron as MultilayerPerceptron,
    accuracy as accuracy,
    adam as adam,
    reproducible as reproducible,
    train as train,
    warm_up_and_decay as warm_up_and_decay,
)

__version__: str
