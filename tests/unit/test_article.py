"""The article's code runs unchanged, and prints what the article prints
(sebastianraschka.com, 2024, lora-dora)."""

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

PRINTED_LORA_MODEL = """\
MultilayerPerceptron(
  (layers): Sequential(
    (0): LinearWithLoRA(
      (linear): Linear(in_features=784, out_features=128, bias=True)
      (lora): LoRALayer()
    )
    (1): ReLU()
    (2): LinearWithLoRA(
      (linear): Linear(in_features=128, out_features=256, bias=True)
      (lora): LoRALayer()
    )
    (3): ReLU()
    (4): LinearWithLoRA(
      (linear): Linear(in_features=256, out_features=10, bias=True)
      (lora): LoRALayer()
    )
  )
)"""

PRINTED_FLAGS = """\
layers.0.linear.weight: False
layers.0.linear.bias: False
layers.0.lora.A: True
layers.0.lora.B: True
layers.2.linear.weight: False
layers.2.linear.bias: False
layers.2.lora.A: True
layers.2.lora.B: True
layers.4.linear.weight: False
layers.4.linear.bias: False
layers.4.lora.A: True
layers.4.lora.B: True
"""


def article_model():
    return MultilayerPerceptron(
        num_features=784, num_hidden_1=128, num_hidden_2=256, num_classes=10
    )


@every_wrapper
def test_the_single_layer_example_prints_the_articles_numbers_before_and_after_wrapping(
    wrapper, capsys
):
    torch.manual_seed(123)
    layer = nn.Linear(10, 2)
    x = torch.randn((1, 10))
    print("Original output:", layer(x))
    adapted = wrapper(layer, rank=2, alpha=4)
    print("Adapted output:", adapted(x))
    original, output = capsys.readouterr().out.splitlines()
    assert original.startswith("Original output: tensor([[0.6639, 0.4487]], grad_fn=")
    assert output.startswith("Adapted output: tensor([[0.6639, 0.4487]], grad_fn=")


def test_the_printed_models_and_the_printed_flags_are_the_articles(capsys):
    model = article_model()
    print(model)
    assert capsys.readouterr().out == PRINTED_MODEL + "\n"

    model.layers[0] = LinearWithLoRA(model.layers[0], rank=4, alpha=8)
    model.layers[2] = LinearWithLoRA(model.layers[2], rank=4, alpha=8)
    model.layers[4] = LinearWithLoRA(model.layers[4], rank=4, alpha=8)
    print(model)
    assert capsys.readouterr().out == PRINTED_LORA_MODEL + "\n"

    freeze_linear_layers(model)
    for name, param in model.named_parameters():
        print(f"{name}: {param.requires_grad}")
    assert capsys.readouterr().out == PRINTED_FLAGS


def test_one_call_gives_the_model_that_the_article_builds_by_hand():
    model = article_model()
    assert replace_linear_layers(model, LinearWithLoRA, 4, 8) == [
        "layers.0",
        "layers.2",
        "layers.4",
    ]
    assert str(model) == PRINTED_LORA_MODEL


@every_wrapper
def test_arguments_are_taken_in_the_articles_order_and_kept_under_its_names(wrapper):
    layer = LoRALayer(7, 5, 3, 1.5)
    assert layer.A.shape == (7, 3)
    assert layer.B.shape == (3, 5)
    assert layer.alpha == 1.5

    linear = linear_layer(7, 5)
    adapted = wrapper(linear, 3, 1.5)
    assert adapted.linear is linear
    assert isinstance(adapted.lora, LoRALayer)
    assert adapted.lora.A.shape == (7, 3)
    assert adapted.lora.B.shape == (3, 5)
    assert adapted.lora.alpha == 1.5
    names = ["linear.weight", "linear.bias", "lora.A", "lora.B"]
    assert sorted(dict(adapted.named_parameters())) == sorted(
        names + (["m"] if issubclass(wrapper, LinearWithDoRAMerged) else [])
    )
    assert [type(layer) for layer in MultilayerPerceptron(6, 5, 4, 3).layers] == [
        nn.Linear,
        nn.ReLU,
        nn.Linear,
        nn.ReLU,
        nn.Linear,
    ]


def test_the_multilayer_perceptron_takes_its_sizes_in_the_articles_order():
    layers = MultilayerPerceptron(6, 5, 4, 3).layers
    assert [tuple(layers[i].weight.shape) for i in (0, 2, 4)] == [
        (5, 6),
        (4, 5),
        (3, 4),
    ]
    x = normal(2, 6, dtype=torch.float32)
    hidden = F.relu(layers[2](F.relu(layers[0](x))))
    model = MultilayerPerceptron(6, 5, 4, 3)
    model.layers = layers
    assert torch.equal(model(x), layers[4](hidden))


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


class ArticleUnmerged(nn.Module):
    """The article's LinearWithLoRA."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear = linear
        self.lora = LoRALayer(linear.in_features, linear.out_features, rank, alpha)

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
    assert replace_linear_layers(model, theirs, 2, 4) == [
        "layers.0",
        "layers.2",
        "layers.4",
    ]
    freeze_linear_layers(model)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == [
        f"layers.{i}.lora.{factor}" for i in (0, 2, 4) for factor in "AB"
    ]
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
