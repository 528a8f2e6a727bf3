"""The words that stand for each drawing: a title, and a text for whoever can't see it.

The notebooks use the same text for the image, ``![text](../figures/name.svg)``.
"""

from typing import NamedTuple


class AltText(NamedTuple):
    """What an SVG says of itself, in its elements ``title`` and ``desc``."""

    title: str
    text: str


# By the name of the script and of the SVG, in the order of the series.
ALT_TEXTS = {
    "full_finetuning_and_lora": AltText(
        "Full fine-tuning and LoRA",
        "Two panels. Left, full fine-tuning: the input x passes through the pretrained W and through an equally large "
        "trained ΔW, and the outputs are added. Right, LoRA: W is frozen, and beside it x passes through the "
        "trained A, which narrows to rank r, and B, which widens again.",
    ),
    "low_rank_factors": AltText(
        "The low-rank factors A and B",
        "A tall thin strip A (in, r) and a wide flat strip B (r, out) span a full square A·B: each entry is a row of A "
        "times a column of B. For 1,000 inputs and outputs and rank 2, a long bar stands for the 1,000,000 "
        "numbers of ΔW and a hairline for the 4,000 of A and B, 250 times fewer.",
    ),
    "lora_on_a_linear_layer": AltText(
        "LoRA on a linear layer",
        "Inside a LinearWithLoRA, the input x takes two paths: above through the frozen Linear with W and b, below "
        "through the trained LoRALayer with A, B and the scaling s. The two outputs are added to "
        "y = xWᵀ + b + s·xAB.",
    ),
    "multilayer_perceptron": AltText(
        "The multilayer perceptron",
        "A network from left to right: 784 inputs, 128 hidden neurons, 256 hidden neurons, 10 outputs. Three linear "
        "layers connect them, with a ReLU after the first and after the second; together they have 136,074 parameters.",
    ),
    "vector_magnitude_direction": AltText(
        "Magnitude and direction of a vector",
        "The vector from the origin to (1, 2) in the plane, with its magnitude 2.24 measured along it. Its direction, "
        "the unit vector (0.447, 0.894), points the same way and ends on the unit circle: (1, 2) = 2.24 × (0.447, 0.894).",
    ),
    "matrix_decomposition": AltText(
        "A weight matrix as magnitude times direction",
        "A weight W with 3 rows (outputs) and 4 columns (inputs) equals a column m of the rows' lengths, 3, 5 and 2, times "
        "a matrix of rows of length 1. Row 2 is marked: it holds all weights into output neuron 2. Below, the same "
        "weights in the article's W (in, out), where they are column 2.",
    ),
    "lora_and_dora": AltText(
        "LoRA and DoRA",
        "Two panels with the same frozen W and b and the same trained A and B. In LoRA the two outputs are added, then b. "
        "In DoRA their sum is first multiplied, per output neuron, by c = m / ‖V‖. c is computed from a trained magnitude m "
        "and from the norms of V, the weight that W, A and B make together.",
    ),
    "dora_steps": AltText(
        "DoRA in two steps",
        "Step 1: the pretrained W is decomposed into a magnitude m, the length of each row, and a directional matrix V, "
        "which starts as W. Step 2: LoRA changes V to W + ΔW with W frozen, m is trained, and W′ is again m times "
        "the direction of V.",
    ),
    "detached_norm": AltText(
        "What the detached norm cuts",
        "Left, how W′ is made: c is m divided by the norm of V, and W′ is c times V. Two bars cut the arrow from V to its "
        "norm, where the gradient is stopped. Right, a row of V and W′ on a circle of radius m. A step across the row turns "
        "both. A step along it, which only the cut leaves in, makes V longer or shorter, and W′ stays.",
    ),
    "transformer_block": AltText(
        "One block of a transformer, and the places for adapters",
        "A sentence comes in as one vector of 384 numbers for each token. Query, key and value, three frozen weights of 384 "
        "by 384, feed the attention, which has no weights. Then come a frozen output weight, a sum with what went past, and "
        "a normalisation. The feed-forward part has two frozen weights, up to 1,536 numbers and back, with a GELU between, "
        "and again a sum and a normalisation. Beside each of the six frozen weights stands a small A·B.",
    ),
}
