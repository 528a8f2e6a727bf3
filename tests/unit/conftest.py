"""Each unit test starts from the same global state and leaves none behind."""

import os
import random

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import settings
from mirror import publish

from lowrank_utils import _mnist

mpl.use("Agg")

# The same examples in every run, and no limit on an example's time: a slow machine
# isn't a mistake. At night others are tried, and more of them:
# HYPOTHESIS_PROFILE=nightly.
settings.register_profile(
    "unit", derandomize=True, database=None, deadline=None, max_examples=100
)
settings.register_profile(
    "nightly",
    settings.get_profile("unit"),
    derandomize=False,
    print_blob=True,
    max_examples=10_000,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "unit"))


@pytest.fixture(autouse=True)
def same_state():
    """Restore what a test can change for the tests after it, and start each from the
    same random numbers."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    environment = dict(os.environ)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    with mpl.rc_context():
        yield
    plt.close("all")
    os.environ.clear()
    os.environ.update(environment)
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])  # noqa: NPY002
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_is_published(monkeypatch):
    """Let the tiny files be the ones that the package and torchvision hold for
    published."""
    return publish(monkeypatch)


@pytest.fixture
def cache(tmp_path, monkeypatch, tiny_is_published):  # noqa: ARG001 (its effect is what counts)
    """An empty cache, in use because LOWRANK_DATA_DIR isn't set."""
    monkeypatch.delenv("LOWRANK_DATA_DIR", raising=False)
    place = tmp_path / "cache" / "lowrank"
    monkeypatch.setattr(_mnist, "user_cache_path", lambda *_: place)
    return place
