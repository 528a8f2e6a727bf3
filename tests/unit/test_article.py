"""The article's code runs unchanged, and prints what the article prints
(sebastianraschka.com, 2024, lora-dora)."""

import re

import pytest
import torch
import torch.nn.functional as F
from support import ALL, assert_close, every_wrapper, linear_layer, move, moved, normal
from torch import nn

from lowrank_utils.adapt import (
    freeze_linear_layers,
    merge_adapters,
    replace_linear_layers,
)
from lowrank_utils.dora import LinearWithDoRAMerged
from lowrank_utils.lora import LinearWithLoRA, LinearWithLoRAMerged, LoRALayer
from lowrank_utils.training import MultilayerPerceptron

PRINTED_MODEL = """\
MultilayerPerceptron(
  (layers): Sequential(
    (0): Linear(in_features=784, out_features=128, bias=True)
    (1): ReLU()
    (2): Linear(in_features=128, out_features=256, bias=True)
    (3): ReLU()
    (4): Linear(in_features=256, out_features=10, bias=True)
  )
)"""

PRINTED_LORA_LAYER = """\
): LinearWithLoRA(
      (linear): {}
      (lora): LoRALayer()
    )
"""

# The linear layers of the article's model.
LAYERS = ["layers.0", "layers.2", "layers.4"]


def article_model():
    return MultilayerPerceptron(
        num_features=784, num_hidden_1=128, num_hidden_2=256, num_classes=10
    )


@every_wrapper
def test_the_single_layer_example_prints_the_articles_numbers_before_and_after_wrapping(
    wrapper,
):
    torch.manual_seed(123)
    layer = nn.Linear(10, 2)
    x = torch.randn((1, 10))
    numbers = "tensor([[0.6639, 0.4487]], grad_fn="
    assert str(layer(x)).startswith(numbers)
    assert str(wrapper(layer, rank=2, alpha=4)(x)).startswith(numbers)


def test_the_printed_models_and_the_printed_flags_are_the_articles():
    model = article_model()
    assert str(model) == PRINTED_MODEL
    by_one_call = article_model()
    assert replace_linear_layers(by_one_call, LinearWithLoRA, 4, 8) == LAYERS

    model.layers[0] = LinearWithLoRA(model.layers[0], rank=4, alpha=8)
    model.layers[2] = LinearWithLoRA(model.layers[2], rank=4, alpha=8)
    model.layers[4] = LinearWithLoRA(model.layers[4], rank=4, alpha=8)
    printed = re.sub(
        r"\): (Linear\(.*\))\n",
        lambda line: PRINTED_LORA_LAYER.format(line[1]),
        PRINTED_MODEL,
    )
    assert str(model) == str(by_one_call) == printed

    freeze_linear_layers(model)
    flags = [(name, param.requires_grad) for name, param in model.named_parameters()]
    parts = ["linear.weight", "linear.bias", "lora.A", "lora.B"]
    assert flags == [
        (f"{layer}.{part}", part.startswith("lora"))
        for layer in LAYERS
        for part in parts
    ]


@every_wrapper
def test_arguments_are_taken_in_the_articles_order_and_kept_under_its_names(wrapper):
    linear = linear_layer(7, 5)
    adapted = wrapper(linear, 3, 1.5)
    assert adapted.linear is linear
    assert isinstance(adapted.lora, LoRALayer)
    for layer in (adapted.lora, LoRALayer(7, 5, 3, 1.5)):
        assert (layer.A.shape, layer.B.shape, layer.alpha) == ((7, 3), (3, 5), 1.5)
    names = ["linear.bias", "linear.weight", "lora.A", "lora.B"]
    names += ["m"] if issubclass(wrapper, LinearWithDoRAMerged) else []
    assert sorted(dict(adapted.named_parameters())) == names


def test_the_multilayer_perceptron_takes_its_sizes_in_the_articles_order():
    model = MultilayerPerceptron(6, 5, 4, 3)
    first, _, second, _, third = layers = model.layers
    assert [type(layer) for layer in layers] == [*[nn.Linear, nn.ReLU] * 2, nn.Linear]
    shapes = [tuple(layer.weight.shape) for layer in (first, second, third)]
    assert shapes == [(5, 6), (4, 5), (3, 4)]
    x = normal(2, 6, dtype=torch.float32)
    assert torch.equal(model(x), third(F.relu(second(F.relu(first(x))))))


def test_the_layer_draws_the_same_numbers_as_the_articles_class_from_the_same_seed():
    torch.manual_seed(123)
    std_dev = 1 / torch.sqrt(torch.tensor(4).float())
    expected = torch.randn(784, 4) * std_dev
    torch.manual_seed(123)
    assert_close(LoRALayer(784, 128, 4, 8).A, expected, rtol=1e-6)


class ArticleMerged(nn.Module):
    """The article's LinearWithLoRAMerged, letter for letter but for its name."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear = linear
        self.lora = LoRALayer(linear.in_features, linear.out_features, rank, alpha)

    def forward(self, x):
        lora = self.lora.A @ self.lora.B  # Combine LoRA matrices
        # Then combine LoRA with orig. weights
        combined_weight = self.linear.weight + self.lora.alpha * lora.T
        return F.linear(x, combined_weight, self.linear.bias)


class ArticleUnmerged(ArticleMerged):
    """The article's LinearWithLoRA, which is made in the same way."""

    def forward(self, x):
        return self.linear(x) + self.lora(x)


@pytest.mark.parametrize("theirs", [ArticleMerged, ArticleUnmerged])
@pytest.mark.parametrize("ours", [LinearWithLoRA, LinearWithLoRAMerged])
def test_a_class_written_like_the_articles_gives_our_numbers(theirs, ours):
    linear = linear_layer(dtype=torch.float32)
    article = move(theirs(linear, rank=3, alpha=4))
    package = ours(linear, rank=3, alpha=4)
    package.load_state_dict(article.state_dict())
    x = normal(6, 7, dtype=torch.float32)
    assert not torch.allclose(article(x), linear(x))
    assert_close(package(x), article(x), rtol=1e-6)


@pytest.mark.parametrize("theirs", [ArticleMerged, ArticleUnmerged])
def test_a_class_written_like_the_articles_is_put_into_a_model_frozen_and_refused_to_merge_without_weight(
    theirs,
):
    model = MultilayerPerceptron(6, 5, 4, 3)
    assert replace_linear_layers(model, theirs, 2, 4) == LAYERS
    freeze_linear_layers(model)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == [f"{layer}.lora.{part}" for layer in LAYERS for part in "AB"]
    with pytest.raises(TypeError, match=f"{theirs.__name__} has no weight to merge"):
        merge_adapters(model)


def test_article_style_code_that_reads_the_attributes_gives_the_outputs_of_all_wrappers():
    x = normal(6, 7)
    for wrapper in ALL:
        layer = moved(wrapper)
        V = layer.linear.weight + layer.lora.alpha * (layer.lora.A @ layer.lora.B).T
        if hasattr(layer, "m"):
            # "Each column … the weights connecting all inputs to a particular output
            # neuron": torch's rows.
            V = layer.m.reshape(-1, 1) * V / V.norm(p=2, dim=1, keepdim=True)
        assert_close(layer(x), F.linear(x, V, layer.linear.bias))
