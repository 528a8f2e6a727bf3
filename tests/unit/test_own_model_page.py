"""The page docs/own_model.md: its code runs in its order, and what it says of the
outcome holds.
"""

import copy
import os
import re
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lowrank_utils
from lowrank_utils import (
    AdapterFileError,
    LinearWithDoRA,
    LinearWithLoRA,
    load_adapter,
    replace_linear_layers,
)

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PAGE = Path(lowrank_utils.__file__).parents[1] / "docs" / "own_model.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Return the page's text and the names that its code has defined, run in a folder
    of its own."""
    text = PAGE.read_text(encoding="utf-8")
    names = {}
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("page"))
    try:
        # Each block on its own, so that an error says in which line of the page it is.
        for block in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.M):
            above = text[: block.start(1)].count("\n")
            exec(compile("\n" * above + block[1], str(PAGE), "exec"), names)
        names["folder"] = Path.cwd()
    finally:
        os.chdir(before)
    return SimpleNamespace(text=text, **names)


def rows(text, first):
    """Return the cells of the table whose first heading is this."""
    table = re.search(rf"^\| {first} \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.M)[1]
    return [
        [cell.strip() for cell in row[1:-2].split("|")]
        for row in table.split("\n")[:-1]
    ]


# Rows of two parts, and what the page's training gets from the reader.
HALVES = slice(0, 3), slice(3, 5)
REPLACED = "parts_of", "counted"


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 11).reshape(2, 5)).logits


def test_each_pattern_finds_linear_layers_of_attention_or_feed_forward(page):
    models = {**page.models, "GPT-2": copy.deepcopy(page.models["GPT-2"])}
    page.turn(models["GPT-2"], page.turned, nn.Linear)
    found = {}
    for model, *cells, _ in rows(page.text, "model"):
        kind = re.match(r"[\w-]+", model)[0]
        names = page.linear_layers(models[kind])
        columns = [re.findall(r"`(.*?)`", cell) for cell in cells]
        matched = [
            [{n for n in names if fnmatchcase(n, pattern)} for pattern in column]
            for column in columns
        ]
        if not all(layers for column in matched for layers in column):
            continue
        query, attention, feed_forward = (set().union(*column) for column in matched)
        assert query <= attention
        assert not attention & feed_forward
        # What no pattern of the three finds is a head.
        rest = set(names) - attention - feed_forward
        assert rest <= {"lm_head", "score", "classifier"}
        found[kind] = found.get(kind, 0) + 1
        if kind == "Llama":
            everywhere = re.findall(r'TARGETS = \["(.*?)", "(.*?)"\]`', page.text)[0]
            named = {n for n in names for p in everywhere if fnmatchcase(n, p)}
            assert named == attention | feed_forward
    # Of the two rows for ViT one belongs to this release.
    assert found == dict.fromkeys(models, 1)


def test_a_turned_gpt2_gives_the_same_and_turns_back(page):
    first = page.models["GPT-2"].eval()
    model = copy.deepcopy(first)
    page.turn(model, page.turned, nn.Linear)
    assert not set(page.turned) - set(page.linear_layers(model))
    torch.testing.assert_close(logits(model), logits(first), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for name, parameter in page.gpt2.named_parameters():
            if name.endswith((".B", ".m")):
                parameter.add_(0.1 * torch.rand_like(parameter))
    back = lowrank_utils.merge_adapters(page.gpt2.eval())
    page.turn(back, page.turned, page.Conv1D)
    shapes = {name: value.shape for name, value in first.state_dict().items()}
    for plain in (back, page.plain_gpt2):
        assert {name: v.shape for name, v in plain.state_dict().items()} == shapes
    expected = logits(page.gpt2)
    assert not torch.allclose(expected, logits(first), atol=1e-3)
    torch.testing.assert_close(logits(back), expected, rtol=1e-4, atol=1e-5)


def test_adapters_alone_are_trained_in_a_turned_gpt2(page):
    trained = [n for n, p in page.gpt2.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 3
    assert all(re.search(r"\.(lora\.A|lora\.B|m)$", name) for name in trained)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(page):
    torch.manual_seed(1)
    model = page.adapted(page.base)
    optimizer, schedule = page.optimizer_of(model)
    page.train(model, optimizer, schedule, range(page.STEPS))
    whole, stopped = model.state_dict(), page.model.state_dict()
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(value, stopped[name]) for name, value in whole.items())
    # Dropout, momentum and all trained parts were at work.
    start = page.resume(page.base, page.folder / "runs" / "3")[0].state_dict()
    moved = {name for name in whole if not torch.equal(whole[name], start[name])}
    assert {name.rpartition(".")[2] for name in moved} == {"A", "B", "m", "weight"}
    assert "score.weight" in moved
    assert len(moved) == 2 * 2 * 3 + 1


def test_a_step_in_parts_has_the_gradient_of_the_whole(page):
    model = page.adapted(page.base)
    for layer in model.modules():
        if isinstance(layer, LinearWithDoRA):
            layer.lora.dropout = 0.0
    parts, gradients = page.parts_of(0), []
    assert len({len(part["labels"]) for part in parts}) > 1
    whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    for cut in (parts, [whole]):
        torch.manual_seed(2)
        trained = copy.deepcopy(model)
        optimizer = torch.optim.SGD(trained.parameters(), 0.1)
        schedule = SimpleNamespace(step=lambda: None)
        page.train.__globals__["parts_of"] = lambda _, cut=cut: cut
        page.train(trained, optimizer, schedule, range(1))
        gradients.append([p.grad for p in trained.parameters() if p.grad is not None])
    page.train.__globals__["parts_of"] = page.parts_of
    assert len(gradients[0]) == 2 * 2 * 3 + 1
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["Llama", "GPT-2", "T5"])
def test_a_language_model_counts_the_labels_that_the_page_names(page, kind):
    shifted, all_labels = re.findall(r"`(\(labels.*?\.sum\(\))`", page.text)
    counted = all_labels if kind == "T5" else shifted
    model = copy.deepcopy(page.models[kind]).eval()
    if kind == "Llama":
        model = transformers.LlamaForCausalLM(page.llama).eval()
    model.config.decoder_start_token_id = 0
    ids = torch.randint(1, 50, (5, 7), generator=torch.Generator().manual_seed(4))
    labels = ids.clone()
    # Padded to different lengths, and a prompt that isn't asked for.
    for row, length in enumerate((7, 3, 5, 2, 4)):
        labels[row, length:] = -100
    labels[2, :2] = -100
    mask = (labels != -100).long()
    whole = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    cut = [{name: value[rows] for name, value in whole.items()} for rows in HALVES]
    model.train = lambda: model  # dropout stays off
    gradients, before = [], {n: page.train.__globals__[n] for n in REPLACED}
    for parts in (cut, [whole]):
        page.train.__globals__["parts_of"] = lambda _, parts=parts: parts
        page.train.__globals__["counted"] = eval(f"lambda labels: {counted}")
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        page.train(model, optimizer, SimpleNamespace(step=lambda: None), range(1))
        gradients.append([p.grad for p in model.parameters()])
    page.train.__globals__.update(before)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_checkpointing_leaves_the_gradients_as_they_are(page):
    model, found = page.adapted(page.base).train(), []
    for change in (lambda _: None, page.checkpoint_activations):
        change(model)
        model.zero_grad()
        torch.manual_seed(3)
        model(**page.parts_of(0)[0]).loss.backward()
        found.append(
            {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        )
    assert model.is_gradient_checkpointing
    # It would go into the merged model's file.
    assert model.config.use_cache
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_what_is_trained_beside_bfloat16_is_in_float32(page):
    for name, parameter in page.half.named_parameters():
        wanted = torch.float32 if parameter.requires_grad else torch.bfloat16
        assert parameter.dtype == wanted, name
        assert (parameter.grad is not None) == parameter.requires_grad
    page.save(page.half, *page.optimizer_of(page.half), 2, page.folder / "half")
    kept = copy.deepcopy(page.base)
    kept.score.bfloat16()
    with pytest.raises(AdapterFileError, match=r"score\.weight .* be rounded"):
        load_adapter(kept, page.folder / "half" / "adapter")
    # What the page warns of.
    buffers = dict(copy.deepcopy(page.base).bfloat16().named_buffers())
    assert buffers["model.rotary_emb.inv_freq"].dtype == torch.bfloat16
    buffers = dict(page.half.named_buffers())
    assert buffers["model.rotary_emb.inv_freq"].dtype == torch.float32


def test_the_merged_model_is_an_ordinary_one_with_its_head(page):
    again = type(page.base).from_pretrained(page.folder / "merged").eval()
    assert not [module for module in again.modules() if hasattr(module, "lora")]
    found = again(**page.part).logits
    torch.testing.assert_close(found, page.expected, rtol=1e-4, atol=1e-5)
    plain = page.base.eval()(**page.part).logits
    assert not torch.allclose(found, plain, atol=1e-3)


def test_what_the_table_quotes_is_what_is_said(page):
    symptoms = "\n".join(row[0] for row in rows(page.text, "symptom"))
    gpt2 = copy.deepcopy(page.models["GPT-2"])
    late = page.adapted(page.base)
    with torch.no_grad():
        for layer in late.modules():
            if isinstance(layer, LinearWithDoRA):
                layer.linear.weight.add_(1)

    def adapt(model, pattern):
        return lambda: replace_linear_layers(model, LinearWithLoRA, 2, 1.0, pattern)

    for act, quoted in (
        (adapt(page.models["Llama"], "*.query"), "no linear layer matches '*.query'"),
        (adapt(gpt2, "*.attn.c_attn"), "(it matches transformer.h.0.attn.c_attn"),
        (adapt(gpt2, "lm_head"), "lm_head shares its weight with transformer.wte"),
        (
            lambda: late(**page.part),
            "the weight of this LinearWithDoRA changed after its m was computed from it",
        ),
    ):
        assert quoted in symptoms
        with pytest.raises((ValueError, RuntimeError)) as raised:
            act()
        assert quoted in str(raised.value)
