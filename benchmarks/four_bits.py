"""What rounding does to a pretrained transformer: the table that notebook 10 reads.

A linear head learns on MiniLM's features which of 1,000 sentences of film reviews
praise. Then the encoder's linear layers are quantised, nothing is trained again, and
2,000 other sentences are read. float32, one split, so a point means nothing.
"""

import copy
import csv
import io
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank_utils.adapt import quantize_linear_layers
from lowrank_utils.comparison.whole import write_whole
from lowrank_utils.quantized import LEVELS, even_levels
from lowrank_utils.text import SentenceClassifier, load_minilm, load_reviews
from lowrank_utils.training import reproducible

FILE = Path(__file__).resolve().parent.parent / "notebooks/results/four_bits.csv"
# A row has 384 or 1,536 weights.
SETTINGS = [
    *(("8 bits", 64), ("NF4", 64), ("4 bits", 64), ("NF4", 1536), ("4 bits", 1536)),
    *(("3 bits", 64), ("2 bits", 64)),
]


@torch.no_grad()
def features(model: SentenceClassifier, tokens: Tensor) -> Tensor:
    """Return one vector for each sentence, (n, width), in float64."""
    return torch.cat([model.features(part) for part in tokens.split(100)]).double()


def fitted(x: Tensor, labels: Tensor) -> nn.Linear:
    """Return a head of logistic regression with a little weight decay."""
    head = nn.Linear(x.shape[1], 2, dtype=torch.float64)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(
        head.parameters(), max_iter=200, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(head(x), labels)
        value = value + 1e-3 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return head.requires_grad_(False)


def main() -> Path:
    """Measure all settings and write the table."""
    reproducible(0)
    torch.set_default_dtype(torch.float32)
    tokenizer, encoder = load_minilm(dtype=torch.float32)
    splits = load_reviews(tokenizer)
    model = SentenceClassifier(encoder)
    head = fitted(features(model, splits.train.tokens), splits.train.labels)
    whole = features(model, splits.test.tokens)

    def row(name: str, block: int | str, x: Tensor) -> list[str]:
        right = (head(x).argmax(dim=1) == splits.test.labels).double().mean()
        off = (x - whole).norm() / (whole - whole.mean(dim=0)).norm()
        return [name, str(block), f"{off.item():.4f}", f"{right.item():.4f}"]

    rows = [row("32 bits", "", whole)]
    for name, block in SETTINGS:
        LEVELS["own"] = LEVELS["nf4"] if name == "NF4" else even_levels(int(name[0]))
        quantized = copy.deepcopy(model)
        quantize_linear_layers(quantized.encoder, "own", block)
        rows.append(row(name, block, features(quantized, splits.test.tokens)))
        print(*rows[-1], flush=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([["levels", "block_size", "features_error", "accuracy"], *rows])
    write_whole(FILE, text.getvalue())
    return FILE


if __name__ == "__main__":
    print(main())
