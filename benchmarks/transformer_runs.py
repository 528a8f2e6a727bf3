"""What adapters do in a pretrained transformer: the runs that notebook 9 reads.

MiniLM learns from 1,000 sentences of film reviews whether they praise. Every setting is
tried on split 0, and each method's best by its validation sentences then runs on the
splits 1 to 3, where the test sentences are read once. float32, one thread a run. A run
that is in notebooks/results/transformer.csv isn't made again; `--list` says what is
still to be done.
"""

import csv
import io
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lowrank_utils.adapt import (
    parameter_groups,
    quantize_linear_layers,
    replace_linear_layers,
)
from lowrank_utils.comparison.controls import LinearWithGain, LinearWithRandomRows
from lowrank_utils.comparison.whole import write_whole
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.lora import LinearWithLoRA
from lowrank_utils.quantized import LEVELS, even_levels
from lowrank_utils.text import (
    SentenceClassifier,
    Sentences,
    SentenceSplits,
    load_minilm,
    load_reviews,
)
from lowrank_utils.training import adam, warm_up_and_decay

FILE = Path(__file__).resolve().parent.parent / "notebooks/results/transformer.csv"

QUERY, KEY, VALUE = (f"attention.self.{name}" for name in ("query", "key", "value"))
OUTPUT = "attention.output.dense"
FEED_FORWARD = ["intermediate.dense", "output.dense"]
# What is adapted, and with which rank. The last five train 165,888 numbers each.
PLACES: dict[str, tuple[str, list[str], int]] = {
    "query and value": ("*", [QUERY, VALUE], 4),
    "query and value, rank 18": ("*", [QUERY, VALUE], 18),
    "all of attention": ("*", [QUERY, KEY, VALUE, OUTPUT], 9),
    "all linear layers": ("*", [QUERY, KEY, VALUE, OUTPUT, *FEED_FORWARD], 4),
    "query and value, layers 1 to 3": ("[012]", [QUERY, VALUE], 36),
    "query and value, layers 4 to 6": ("[345]", [QUERY, VALUE], 36),
}
FIRST = next(iter(PLACES))
# PEFT's α, which is divided by the rank.
ALPHA = 8.0
EPOCHS, BATCH = 4, 32
SPLITS = range(1, 4)
TUNING_SPLIT = 0
# On which four times the steps are tried.
LONG_SPLITS = range(1, 2)

RATES = (0.0003, 0.001, 0.003, 0.01)
RATES_OF_ALL = (0.00003, 0.0001, 0.0003, 0.001)
FACTORS = (1, 4, 16, 64)
# How the encoder's linear layers are kept: levels and block size.
LEVELS["two bits"] = even_levels(2)
BASES = {"32 bits": None, "NF4": ("nf4", 64), "2 bits": ("two bits", 64)}
# What may be tried beyond them, where the best lies at their edge.
LADDERS: dict[str, tuple[float, ...]] = {
    "rate": (0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
    "factor": (1, 4, 16, 64, 256, 1024),
}
# Methods with a part that gets a rate of its own: layer, and pattern of the part.
OWN_RATE = {
    "DoRA": (LinearWithDoRA, "*.m"),
    "gain": (LinearWithGain, "*.g"),
    "random rows": (LinearWithRandomRows, "*.v"),
}


class Run(NamedTuple):
    """One training run.

    Attributes:
        method: ``"head"``, ``"full"``, ``"LoRA"``, a name in ``OWN_RATE``, or
            ``"gain alone"``, without A and B.
        places: a name in ``PLACES``.
        rate: learning rate.
        factor: that it is multiplied by for the part with its own rate.
        dropout: of the adapters.
        epochs: passes over the 1,000 sentences.
        split: which draw of sentences.
        base: a name in ``BASES``.
    """

    method: str
    places: str = FIRST
    rate: float = 0.001
    factor: int = 1
    dropout: float = 0.0
    epochs: int = EPOCHS
    split: int = TUNING_SPLIT
    base: str = "32 bits"


@cache
def data(split: int) -> SentenceSplits:
    """Return the sentences of a split."""
    return load_reviews(load_minilm()[0], seed=split)


def batches(sentences: Sentences, size: int, generator: torch.Generator | None) -> Any:
    """Return places of sentences of about the same length, in a random order if there
    is a generator: so a batch holds little padding.
    """
    lengths = (sentences.tokens != 0).sum(dim=1).double()
    if generator is not None:
        # Lengths that differ by four or less mix from epoch to epoch.
        lengths += 4 * torch.rand(len(lengths), generator=generator)
    parts = lengths.argsort().split(size)
    if generator is None:
        return parts
    return [parts[i] for i in torch.randperm(len(parts), generator=generator)]


@torch.no_grad()
def scores(model: SentenceClassifier, sentences: Sentences) -> tuple[float, float]:
    """Return accuracy in percent and mean cross-entropy."""
    correct = loss = 0.0
    for part in batches(sentences, 64, None):
        logits, labels = model(sentences.tokens[part]), sentences.labels[part]
        correct += (logits.argmax(dim=1) == labels).sum().item()
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
    return 100 * correct / len(sentences.labels), loss / len(sentences.labels)


def pretrained(base: str) -> SentenceClassifier:
    """Return MiniLM as a base keeps it, with a head that knows nothing."""
    model = SentenceClassifier(load_minilm()[1])
    if how := BASES[base]:
        quantize_linear_layers(model, *how, ["encoder.encoder.layer.*"])
    return model


@cache
def fitted_head(split: int, base: str) -> dict[str, Tensor]:
    """Return a head trained on the frozen model's vectors, which are computed once."""
    model = pretrained(base)
    sentences = data(split).train
    with torch.no_grad():
        parts = batches(sentences, 64, None)
        vectors = torch.cat([model.features(sentences.tokens[part]) for part in parts])
        labels = sentences.labels[torch.cat(tuple(parts))]
    head = model.head
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    # A little decay, since 1,000 sentences determine 770 numbers badly.
    update = torch.optim.LBFGS(head.parameters(), max_iter=200)

    def loss() -> Tensor:
        update.zero_grad()
        value = (
            F.cross_entropy(head(vectors), labels) + 0.01 * head.weight.square().sum()
        )
        value.backward()
        return value

    update.step(loss)
    return head.state_dict()


def adapted(run: Run) -> SentenceClassifier:
    """Return MiniLM with a fitted head and what the run trains."""
    torch.manual_seed(run.split)
    model = pretrained(run.base)
    model.head.load_state_dict(fitted_head(run.split, run.base))
    if run.method == "full":
        return model.requires_grad_(True)
    if run.method == "head":
        model.head.requires_grad_(True)
        return model
    blocks, names, rank = PLACES[run.places]
    method = run.method.removesuffix(" alone")
    layer: type[nn.Module] = OWN_RATE.get(method, (LinearWithLoRA, ""))[0]
    options: dict[str, Any] = {"init": "peft"}
    if run.dropout:
        options["dropout"] = run.dropout
    if run.method == "random rows":
        options["generator"] = torch.Generator().manual_seed(run.split + 1_000_000)
    replace_linear_layers(
        model,
        layer,
        rank,
        ALPHA / rank,
        [f"encoder.encoder.layer.{blocks}.{name}" for name in names],
        **options,
    )
    if method != run.method:
        for name, parameter in model.named_parameters():
            if name.endswith((".A", ".B")):
                parameter.requires_grad_(False)
    return model


def work(run: Run) -> dict[str, Any]:
    """Do one run, and return its row."""
    torch.set_num_threads(1)
    sentences = data(run.split)
    model = adapted(run)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    loss = math.nan
    if run.method != "head":
        pattern = OWN_RATE.get(run.method, (None, ""))[1]
        groups = parameter_groups(
            model, run.rate, {pattern: run.factor} if pattern else None
        )
        loss = train(model, sentences.train, groups, run)
    # The encoder's own dropout stays off in all methods.
    model.eval()
    validation = scores(model, sentences.validation)
    row: dict[str, Any] = run._asdict() | {
        "trained": trained,
        "train_loss": round(loss, 4),
        "validation": round(validation[0], 2),
        "validation_loss": round(validation[1], 4),
        "test": "",
        "test_loss": "",
        "negative_m": "",
    }
    if run.split != TUNING_SPLIT:
        test = scores(model, sentences.test)
        row |= {"test": round(test[0], 2), "test_loss": round(test[1], 4)}
    if run.method == "DoRA":
        m = torch.cat(
            [p for name, p in model.named_parameters() if name.endswith(".m")]
        )
        row["negative_m"] = round(100 * (m < 0).double().mean().item(), 2)
    return row


def train(
    model: SentenceClassifier, sentences: Sentences, groups: list[Any], run: Run
) -> float:
    """Train, and return the mean loss of the last epoch."""
    update = adam(groups, run.rate)
    rates = [group["lr"] for group in update.param_groups]
    generator = torch.Generator().manual_seed(run.split)
    steps = run.epochs * -(-len(sentences.labels) // BATCH)
    for module in model.modules():
        # Adapters' dropout alone is on.
        module.training = hasattr(module, "dropped")
    step, loss = 0, math.nan
    for _ in range(run.epochs):
        losses = []
        for part in batches(sentences, BATCH, generator):
            value = F.cross_entropy(
                model(sentences.tokens[part]), sentences.labels[part]
            )
            update.zero_grad()
            value.backward()
            for group, rate in zip(update.param_groups, rates, strict=True):
                group["lr"] = rate * warm_up_and_decay(step, steps)
            update.step()
            step += 1
            losses.append(value.item() * len(part))
        loss = sum(losses) / len(sentences.labels)
        if not math.isfinite(loss):
            break
    return loss


def key(row: Any) -> tuple[str, ...]:
    """Return what tells a run from the others, as it stands in the file."""
    values = row._asdict() if isinstance(row, Run) else row
    return tuple(str(values[field]) for field in Run._fields)


def stored(file: Path) -> list[dict[str, str]]:
    """Return the rows that are there."""
    if not file.exists():
        return []
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


def make(runs: list[Run], file: Path = FILE) -> list[dict[str, str]]:
    """Do the runs that aren't in the file yet, two at a time, and return the rows of
    all.
    """
    rows = stored(file)
    known = {key(row) for row in rows}
    missing = [run for run in runs if key(run) not in known]
    if "--list" in sys.argv:
        for run in missing:
            print(run)
        missing = []
    workers = min(2, os.cpu_count() or 1)
    if missing:
        with ProcessPoolExecutor(workers) as pool:
            found = [pool.submit(work, run) for run in missing]
            for each in tqdm(as_completed(found), total=len(found), unit="run"):
                rows.append({k: str(v) for k, v in each.result().items()})
                table = io.StringIO()
                writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(sorted(rows, key=key))
                write_whole(file, table.getvalue())
    wanted = {key(run) for run in runs}
    return [row for row in rows if key(row) in wanted]


def best(rows: list[dict[str, str]], **wanted: Any) -> Run:
    """Return the setting with the best validation accuracy, ties by the lower loss."""
    some = [row for row in rows if all(row[k] == str(v) for k, v in wanted.items())]
    row = max(
        some, key=lambda row: (float(row["validation"]), -float(row["validation_loss"]))
    )
    return Run(
        row["method"],
        row["places"],
        float(row["rate"]),
        int(row["factor"]),
        float(row["dropout"]),
        int(row["epochs"]),
        int(row["split"]),
        row["base"],
    )


def widened(
    rows: list[dict[str, str]], file: Path = FILE, **wanted: Any
) -> list[dict[str, str]]:
    """Try further rates and factors for as long as the best setting of some lies at the
    edge of those that were tried, and return the rows of all.
    """
    while True:
        some = [row for row in rows if all(row[k] == v for k, v in wanted.items())]
        run = best(some)
        further = []
        for field, ladder in LADDERS.items():
            tried = {float(row[field]) for row in some}
            place = ladder.index(getattr(run, field))
            if len(tried) > 1 or field == "rate":
                further += [
                    run._replace(**{field: ladder[other]})
                    for other in (place - 1, place + 1)
                    if 0 <= other < len(ladder) and ladder[other] not in tried
                ]
        known = {key(row) for row in rows}
        new = [each for each in further if key(each) not in known]
        if not new:
            return rows
        rows = rows + make(new, file)


def main() -> Path:
    """Tune, report, and return the file with the rows."""
    tuning = [Run("LoRA", rate=rate) for rate in RATES]
    tuning += [
        Run(method, rate=rate, factor=factor)
        for method in OWN_RATE
        for factor in FACTORS
        for rate in RATES
    ]
    tuning += [Run("full", rate=rate) for rate in RATES_OF_ALL]
    others = [name for name in PLACES if name != FIRST]
    tuning += [Run("LoRA", name, rate) for name in others for rate in RATES]
    rows = make(tuning)
    for method in ("LoRA", *OWN_RATE, "full"):
        rows = widened(rows, method=method, places=FIRST)
    for name in others:
        rows = widened(rows, places=name)
    chosen = [best(rows, method=method, places=FIRST) for method in ("LoRA", *OWN_RATE)]
    one_rate = best(rows, method="DoRA", factor=1)
    every = [*chosen, one_rate, best(rows, method="full"), Run("head")]
    every += [best(rows, places=name) for name in others]
    every += [chosen[0]._replace(dropout=0.1)]
    every = list(dict.fromkeys(every))
    make([run._replace(split=split) for split in SPLITS for run in every])
    make(
        [
            run._replace(split=split, epochs=4 * EPOCHS)
            for split in LONG_SPLITS
            for run in chosen
        ]
    )
    return FILE


if __name__ == "__main__":
    print(main())
