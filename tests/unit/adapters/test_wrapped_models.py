"""Models inside wrappers: what is saved and loaded is the model inside."""

import json
from functools import partial

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from support import assert_close, move_all, normal
from torch import nn

from lowrank_utils.adapt import freeze_linear_layers, replace_linear_layers
from lowrank_utils.adapters.files import adapter_of, load_adapter, save_adapter
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.lora import LinearWithLoRA

pytestmark = pytest.mark.slow

NAMES = ["body.0", "head"]
X = normal(3, 4, seed=70).float()


class Base(nn.Module):
    """Two layers in different depths, and a norm that is trained along."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)
        self.requires_grad_(False)

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


def adapted(kind=LinearWithDoRA):
    model = Base()
    replace_linear_layers(model, kind, 2, 1.5)
    move_all(model)
    freeze_linear_layers(model)
    with torch.no_grad():
        model.norm.requires_grad_(True).weight.mul_(1.5)
    return model


def files_of(folder):
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return config, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def assert_same_files(found, expected):
    (config, tensors), (its_config, its_tensors) = files_of(found), files_of(expected)
    assert config == its_config
    assert tensors.keys() == its_tensors.keys()
    assert all(torch.equal(tensors[key], its_tensors[key]) for key in tensors)


@pytest.fixture(scope="module")
def processes():
    """A group of processes with this one alone in it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


def checkpointed(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        checkpoint_wrapper,
    )

    return checkpoint_wrapper(model)


def averaged(model):
    return torch.optim.swa_utils.AveragedModel(model)


def distributed(model):
    if not any(parameter.requires_grad for parameter in model.parameters()):
        model.norm.requires_grad_(True) if hasattr(model, "norm") else (
            model.requires_grad_(True)
        )
    return nn.parallel.DistributedDataParallel(model)


class MyDataParallel(nn.DataParallel):
    """A subclass, as libraries have."""


WRAPPERS = [compiled, checkpointed, averaged, distributed, nn.DataParallel]


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("wrapper", [*WRAPPERS, MyDataParallel])
@pytest.mark.parametrize("part", ["all", "body", "head", "all and body"])
@pytest.mark.filterwarnings("ignore:model is inside DistributedDataParallel")
@pytest.mark.filterwarnings("ignore:.*find_unused_parameters")
def test_a_wrapped_model_is_saved_and_loaded_as_the_model_inside(
    wrapper, part, tmp_path
):
    def wrapped(model):
        for name in ("body", "head"):
            if name in part:
                frozen = not any(p.requires_grad for p in model.parameters())
                model.set_submodule(name, wrapper(model.get_submodule(name)))
                if frozen:
                    model.requires_grad_(False)
        return wrapper(model) if "all" in part else model

    save_adapter(adapted(), tmp_path / "plain")
    save_adapter(wrapped(adapted()), tmp_path / "wrapped")
    assert_same_files(tmp_path / "wrapped", tmp_path / "plain")
    fresh = wrapped(Base()).eval()
    fresh(X)  # what was compiled before must not stay
    assert load_adapter(fresh, tmp_path / "plain") == NAMES
    assert_close(fresh(X), adapted()(X), rtol=1e-6)
    assert [*adapter_of(fresh)] == NAMES


@pytest.mark.usefixtures("processes")
def test_loading_into_distributed_data_parallel_warns_that_it_cannot_train(tmp_path):
    save_adapter(adapted(), tmp_path / "plain")
    model = distributed(Base())
    with pytest.warns(UserWarning, match="won't synchronize the adapter's gradients"):
        assert load_adapter(model, tmp_path / "plain") == NAMES


def test_a_submodule_that_is_called_like_a_wrappers_keeps_its_name(tmp_path):
    def base():
        torch.manual_seed(0)
        inside = nn.ModuleDict({"_orig_mod": nn.Linear(4, 4)})
        return nn.ModuleDict({"module": inside}).requires_grad_(False)

    model = base()
    replace_linear_layers(model, LinearWithLoRA, 2, 1.0)
    save_adapter(nn.DataParallel(model), tmp_path / "adapter")
    assert load_adapter(base(), tmp_path / "adapter") == ["module._orig_mod"]


def test_a_wrapper_inside_an_adapted_layer_is_refused(tmp_path):
    model = adapted()
    model.head.linear = checkpointed(model.head.linear)
    with pytest.raises(ValueError, match="head: its linear layer alone is inside a Ch"):
        save_adapter(model, tmp_path / "adapter")


# --- Weights in pieces ----------------------------------------------------------------------


def fully_sharded(model, kind=LinearWithDoRA):
    """Each adapted layer for itself, and the rest, as for a large model."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=lambda module, recurse, **_: (
            recurse or isinstance(module, kind)
        ),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )


def in_dtensors(model, kind=LinearWithDoRA):
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if isinstance(module, kind):
            fully_shard(module)
    return fully_shard(model)


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("shard", [fully_sharded, in_dtensors])
@pytest.mark.parametrize("kind", [LinearWithLoRA, LinearWithDoRA])
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
def test_a_sharded_model_is_saved_as_the_model_inside(shard, kind, tmp_path):
    save_adapter(adapted(kind), tmp_path / "plain")
    model = shard(adapted(kind), kind)
    save_adapter(model, tmp_path / "sharded")
    assert_same_files(tmp_path / "sharded", tmp_path / "plain")
    # Its first call comes after saving, which must not have taken its place.
    assert_close(model(X), adapted(kind)(X), rtol=1e-6)
    save_adapter(model, tmp_path / "again")
    assert_same_files(tmp_path / "again", tmp_path / "plain")


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(
    ("shard", "name"),
    [(fully_sharded, "FullyShardedDataParallel"), (in_dtensors, "fully_shard")],
)
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
def test_loading_into_a_sharded_model_is_refused_by_name(shard, name, tmp_path):
    save_adapter(adapted(), tmp_path / "plain")
    model = shard(Base(), nn.Linear)
    with pytest.raises(ValueError, match=f"cut into pieces by {name}.*shard it then"):
        load_adapter(model, tmp_path / "plain")
    assert not any(isinstance(module, LinearWithDoRA) for module in model.modules())


class Doubling(LinearWithLoRA):
    """A class that computes something else."""

    def forward(self, x):
        return super().forward(x) + self.lora(x)


@pytest.mark.usefixtures("processes")
def test_a_class_of_ones_own_in_pieces_is_refused(tmp_path):
    model = in_dtensors(adapted(Doubling), Doubling)
    with pytest.raises(ValueError, match=r"body.0 \(Doubling\) has its weights in pi"):
        save_adapter(model, tmp_path / "adapter")


# --- What is switched on around save_adapter --------------------------------------------------


def test_saving_is_the_same_under_autocast_and_with_another_default_device(tmp_path):
    save_adapter(adapted(), tmp_path / "plain")
    with torch.autocast("cpu", torch.bfloat16):
        save_adapter(adapted(), tmp_path / "autocast")
    model = adapted()
    with torch.device("meta"):
        save_adapter(model, tmp_path / "device")
    for name in ("autocast", "device"):
        assert_same_files(tmp_path / name, tmp_path / "plain")


def test_dropout_is_saved_with_the_check_of_the_outputs_in_eval_mode(tmp_path):
    model = adapted(partial(LinearWithLoRA, dropout=0.25)).train()
    save_adapter(model, tmp_path / "adapter")
    assert files_of(tmp_path / "adapter")[0]["lora_dropout"] == 0.25
    assert all(module.training for module in model.modules())
    model.head.lora.dropout = 0.5
    with pytest.raises(
        ValueError, match=r"head has a dropout of 0\.5, and other layers have 0\.25"
    ):
        save_adapter(model, tmp_path / "adapter")


class WithStatistics(Base):
    """A model that remembers its inputs."""

    def __init__(self):
        super().__init__()
        self.body.append(nn.BatchNorm1d(5).requires_grad_(False))


def test_running_statistics_that_are_not_saved_are_named(tmp_path):
    model = WithStatistics()
    replace_linear_layers(model, LinearWithLoRA, 2, 1.5)
    model(X)
    freeze_linear_layers(model)
    with pytest.warns(UserWarning, match=r"^body\.2: the running statistics are no pa"):
        save_adapter(model, tmp_path / "adapter")
    # Trained along, they are saved, and nothing is to be warned of.
    model.body[2].requires_grad_(True)
    save_adapter(model, tmp_path / "adapter")
    fresh = WithStatistics()
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh.eval()(X), model.eval()(X))
    assert (
        torch.nn.functional.mse_loss(
            fresh.body[2].running_mean, WithStatistics().body[2].running_mean
        )
        > 0
    )
