"""One bank and many requests at a time: in tasks, threads and generators, whose blocks
overlap, end in any order, and see adapters come and go."""

import asyncio
import contextvars
import copy
import itertools
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager

import pytest
import torch
from support import assert_close, linear_layer, move_all, normal
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowrank_utils.adapt import (
    freeze_linear_layers,
    merge_adapters,
    replace_linear_layers,
)
from lowrank_utils.adapters import AdapterBank, bank as bank_module
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.lora import LinearWithLoRA

pytestmark = pytest.mark.slow


class Passes(nn.Module):
    """Two layers, and what is called between them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = linear_layer(7, 6), linear_layer(6, 3, seed=3)
        self.between = lambda: None

    def forward(self, x):
        x = self.first(x)
        self.between()
        return self.second(x)


def base():
    return Passes().requires_grad_(False).eval()


def customer(number, kind=LinearWithDoRA):
    model = base()
    replace_linear_layers(model, kind, 1 + number, 0.3 + number)
    freeze_linear_layers(move_all(model))
    for parameter in model.parameters():
        parameter.requires_grad_(False).mul_(1 + 0.1 * number)
    for name in ("first", "second"):
        getattr(model, name).linear.load_state_dict(
            base().get_submodule(name).state_dict()
        )
    return model


X = normal(2, 7, seed=50)
MODELS = {"anna": customer(1), "ben": customer(2, LinearWithLoRA), "cleo": customer(3)}
ANSWERS = {name: model(X) for name, model in MODELS.items()} | {None: base()(X)}


@pytest.fixture
def bank():
    bank = AdapterBank(base())
    for name, model in MODELS.items():
        bank.add(name, model)
    return bank


def is_answer(y, name):
    return torch.allclose(y, ANSWERS[name], rtol=0, atol=1e-12)


def test_the_answers_differ():
    for one, other in itertools.combinations(ANSWERS.values(), 2):
        assert (one - other).abs().max() > 0.1


# --- Tasks and threads ------------------------------------------------------------------


@pytest.mark.parametrize("waits", list(itertools.permutations([0.01, 0.03, 0.05])))
def test_tasks_whose_blocks_overlap_each_have_their_own(bank, waits):
    async def request(name, wait):
        with bank.rows([name] * 2):
            await asyncio.sleep(wait)
            return bank.model(X)

    async def requests():
        names = ["anna", "ben", None]
        outputs = await asyncio.gather(*map(request, names, waits))
        return zip(outputs, names, strict=True)

    assert all(is_answer(*pair) for pair in asyncio.run(requests()))
    assert torch.equal(bank.model(X), ANSWERS[None])


def test_threads_get_no_wrong_answer_while_adapters_come_and_go(bank):
    torch.set_num_threads(1)
    wrong, counts, end = [], [], time.monotonic() + 3

    def serve(names):
        for count, (one, two) in enumerate(itertools.cycle(names)):
            if time.monotonic() > end:
                counts.append(count)
                return
            with bank.rows([one, two]):
                y = bank.model(X)
                with bank.rows([two, two]):
                    inner = bank.model(X)
            for row, name in enumerate((one, two)):
                if not torch.allclose(y[row], ANSWERS[name][row], rtol=0, atol=1e-12):
                    wrong.append((one, two))
            if not is_answer(inner, two):
                wrong.append(two)

    def come_and_go():
        while time.monotonic() < end:
            bank.add("guest", MODELS["cleo"])
            bank.activate("guest")
            y = bank.model(X)
            if not is_answer(y, "cleo"):
                wrong.append("guest")
            bank.disable()
            bank.remove("guest")

    pairs = [
        [("anna", "ben"), (None, "cleo")],
        [("cleo", None), ("ben", "ben")],
        [("ben", "anna"), ("cleo", "anna"), (None, None)],
    ]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(serve, names) for names in pairs]
        jobs.append(pool.submit(come_and_go))
        for job in jobs:
            job.result()
    assert not wrong
    assert min(counts) > 50
    assert bank.active == []
    assert torch.equal(bank.model(X), ANSWERS[None])


def test_blocks_of_one_task_end_in_any_order_and_leave_nothing(bank):
    for order in itertools.permutations(range(3)):
        names = ["anna", "ben", None]
        blocks = [bank.rows([name] * 2) for name in names]
        for block in blocks:
            block.__enter__()
        still = list(range(3))
        for number in order:
            assert is_answer(bank.model(X), names[still[-1]])
            blocks[number].__exit__(None, None, None)
            still.remove(number)
        assert torch.equal(bank.model(X), ANSWERS[None])
    assert bank.active == []


def test_an_error_inside_ends_the_block_of_its_own_task_alone(bank):
    async def fails():
        with bank.rows(["anna"] * 2):
            await asyncio.sleep(0.01)
            raise ZeroDivisionError

    async def goes_on():
        with bank.rows(["ben"] * 2):
            await asyncio.sleep(0.03)
            return bank.model(X)

    async def both():
        return await asyncio.gather(fails(), goes_on(), return_exceptions=True)

    error, y = asyncio.run(both())
    assert isinstance(error, ZeroDivisionError)
    assert is_answer(y, "ben")


def test_what_is_started_inside_a_block_has_it_until_it_ends(bank):
    async def request():
        with bank.rows(["anna"] * 2):
            inside = asyncio.create_task(asyncio.to_thread(bank.model, X))
            assert is_answer(await inside, "anna")
            left = asyncio.create_task(asyncio.sleep(0.01))
            late = asyncio.create_task(later(left))
        await late

    async def later(left):
        await left
        with pytest.raises(RuntimeError, match=r"^the rows block has ended in which"):
            bank.model(X)
        with bank.rows(["ben"] * 2):
            assert is_answer(bank.model(X), "ben")

    asyncio.run(request())


def test_a_thread_of_its_own_knows_nothing_of_the_block(bank):
    with bank.rows(["anna"] * 2), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(bank.model, X).result(), ANSWERS[None])


def test_data_parallel_is_refused_inside_a_block(bank):
    layer = bank.model.first
    assert layer._replicate_for_data_parallel() is not layer
    with (
        bank.rows(["anna"] * 2),
        pytest.raises(RuntimeError, match=r"^nn\.DataParallel gives parts of the"),
    ):
        layer._replicate_for_data_parallel()


# --- Generators and helpers -------------------------------------------------------------


def stream(bank, name, steps=3):
    with bank.rows([name] * 2):
        for _ in range(steps):
            yield bank.model(X)


def test_generators_in_turn_each_have_their_own_block(bank):
    streams = {name: stream(bank, name) for name in ("anna", "ben", None)}
    for _ in range(3):
        for name, steps in streams.items():
            assert is_answer(next(steps), name)
    for steps in streams.values():
        assert list(steps) == []
    assert torch.equal(bank.model(X), ANSWERS[None])


def test_a_generator_keeps_its_block_in_whatever_context_it_goes_on(bank):
    steps, other = stream(bank, "anna"), stream(bank, "ben")
    for _ in range(3):
        assert is_answer(contextvars.copy_context().run(next, steps), "anna")
        assert is_answer(contextvars.copy_context().run(next, other), "ben")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(list, steps).result() == []
    assert torch.equal(bank.model(X), ANSWERS[None])


def test_async_generators_in_one_task_each_have_their_own_block(bank):
    async def steps(name):
        with bank.rows([name] * 2):
            for _ in range(3):
                await asyncio.sleep(0)
                yield bank.model(X)

    async def request():
        pairs = zip(range(3), range(3), strict=True)
        one, two = steps("anna"), steps("ben")
        for _ in pairs:
            assert is_answer(await anext(one), "anna")
            assert is_answer(await anext(two), "ben")
        await one.aclose()
        await two.aclose()

    asyncio.run(request())


def test_a_pass_beside_a_generator_that_waits_needs_a_block_of_its_own(bank):
    steps = stream(bank, "anna")
    next(steps)
    with pytest.raises(RuntimeError, match="opened in the generator 'stream', and"):
        bank.model(X)
    for name in ("ben", None):
        with bank.rows([name] * 2):
            assert is_answer(bank.model(X), name)
            assert is_answer(next(steps), "anna")
            assert is_answer(bank.model(X), name)
    del steps
    assert torch.equal(bank.model(X), ANSWERS[None])


@contextmanager
def helper(bank, name):
    with bank.rows([name] * 2):
        yield


@asynccontextmanager
async def async_helper(bank, name):
    with bank.rows([name] * 2):
        yield


def test_a_block_that_a_helper_opens_is_its_callers(bank):
    def steps(name):
        with helper(bank, name):
            for _ in range(2):
                yield bank.model(X)

    with helper(bank, "anna"):
        assert is_answer(bank.model(X), "anna")
        inner = steps("ben")
        assert is_answer(next(inner), "ben")
        with ExitStack() as stack:
            stack.enter_context(helper(bank, None))
            assert is_answer(bank.model(X), None)
            assert is_answer(next(inner), "ben")
        inner.close()
        assert is_answer(bank.model(X), "anna")

    async def request():
        async with async_helper(bank, "cleo"):
            await asyncio.sleep(0)
            assert is_answer(bank.model(X), "cleo")

    asyncio.run(request())

    @bank.rows(["anna"] * 2)
    def decorated():
        return bank.model(X)

    assert is_answer(decorated(), "anna")
    assert torch.equal(bank.model(X), ANSWERS[None])


# --- Adding, removing, activating, merging meanwhile ------------------------------------


def test_an_adapter_that_an_open_block_names_is_not_removed(bank):
    pattern = "^remove: 'anna' is in use by a rows block that is open; remove it when"
    begun, over = threading.Event(), threading.Event()

    def elsewhere():
        with bank.rows(["anna", None]):
            begun.set()
            over.wait(10)
            return bank.model(X)

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(elsewhere)
        begun.wait(10)
        with pytest.raises(RuntimeError, match=pattern):
            bank.remove("anna")
        bank.remove("cleo")
        over.set()
        assert_close(job.result()[0], ANSWERS["anna"][0])
    with bank.rows(["anna"] * 2), pytest.raises(RuntimeError, match=pattern):
        bank.remove("anna")
    bank.remove("anna")
    assert bank.names == ["ben"]


def test_a_pass_that_has_begun_goes_by_what_held_then(bank):
    model, begun, go_on = bank.model, threading.Event(), threading.Event()

    def wait():
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            go_on.wait(10)

    def merge_another():
        bank.activate("cleo")
        bank.merge()

    def remove():
        with pytest.raises(RuntimeError, match=r"^remove: 'anna' is in use by a forwa"):
            bank.remove("anna")

    changes = [lambda: bank.activate("ben"), bank.disable, merge_another, remove]

    model.between = wait
    with ThreadPoolExecutor(1) as pool:
        for change in changes:
            bank.restore()
            bank.activate("anna")
            begun.clear()
            go_on.clear()
            job = pool.submit(model, X)
            assert begun.wait(10)
            change()
            go_on.set()
            assert is_answer(job.result(), "anna")
        # What holds now, holds for the next pass of the same thread.
        bank.restore()
        bank.activate("ben")
        assert is_answer(pool.submit(model, X).result(), "ben")


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_pass_that_breaks_off_leaves_nothing(bank, error):
    def fail():
        raise error

    bank.activate("anna")
    bank.model.between = fail
    with pytest.raises(error):
        bank.model(X)
    bank.model.between = lambda: None
    bank.activate("ben")
    x = normal(2, 7, seed=3)
    assert_close(bank.model.first(x), MODELS["ben"].first(x))
    assert is_answer(bank.model(X), "ben")
    bank.remove("anna")
    bank.disable()
    assert torch.equal(bank.model(X), ANSWERS[None])


def test_the_model_is_hooked_only_as_long_as_there_is_something_to_select(bank):
    model = bank.model
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1
    for name in list(MODELS):
        bank.remove(name)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_half_added_adapter_cannot_be_named(bank, monkeypatch):
    seen, put_in = [], bank_module.put_module
    for name in MODELS:
        bank.remove(name)

    def look(*args):
        seen.append(list(bank.names))
        return put_in(*args)

    monkeypatch.setattr(bank_module, "put_module", look)
    bank.add("anna", MODELS["anna"])
    assert seen == [[], []]
    assert bank.names == ["anna"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_pass_that_is_made_again_for_its_gradients_is_refused_after_a_block(
    bank, reentrant
):
    def loss():
        x = X.clone().requires_grad_()
        return x, checkpoint(bank.model, x, use_reentrant=reentrant).sum()

    bank.activate("anna")
    x, total = loss()
    total.backward()
    expected = X.clone().requires_grad_()
    MODELS["anna"](expected).sum().backward()
    assert_close(x.grad, expected.grad)
    bank.disable()
    with bank.rows(["anna", "ben"]):
        x, total = loss()
    with pytest.raises(
        RuntimeError, match=r"^torch\.utils\.checkpoint calls this layer"
    ):
        total.backward()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("change", ["activate", "disable", "remove"])
def test_a_pass_that_is_made_again_after_a_switch_is_refused(bank, reentrant, change):
    bank.activate("ben")
    bank.activate("anna")
    x = X.clone().requires_grad_()
    checkpoint(bank.model, x, use_reentrant=reentrant).sum().backward()
    total = checkpoint(bank.model, x, use_reentrant=reentrant).sum()
    if change == "remove":
        bank.remove("anna")
    else:
        getattr(bank, change)(*["ben"][: change == "activate"])
    with pytest.raises(
        RuntimeError, match=r"or which adapters were active, in the first call"
    ):
        total.backward()


# --- Compiled and copied models ---------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_never_serves_an_old_selection(bank, backend):
    torch.compiler.reset()
    compiled = torch.compile(bank.model, backend=backend, fullgraph=True)
    for _ in range(2):
        for names in (["anna", "ben"], ["ben", "anna"], [None, "ben"]):
            with bank.rows(names):
                y = compiled(X)
            for row, name in enumerate(names):
                assert_close(y[row], ANSWERS[name][row])
        for name in ("anna", "ben"):
            bank.activate(name)
            assert is_answer(compiled(X), name)
        bank.disable()
        assert is_answer(compiled(X), None)
    bank.activate("anna")
    bank.merge()
    assert is_answer(compiled(X), "anna")
    bank.restore()
    bank.disable()
    bank.remove("anna")
    bank.add("anna", MODELS["cleo"])
    torch.compiler.reset()
    with bank.rows(["anna"] * 2):
        assert is_answer(compiled(X), "cleo")


@pytest.mark.filterwarnings("ignore")
def test_compiled_code_does_not_depend_on_what_layers_keep(bank):
    """Another thread may put something there while it is being compiled."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(bank.model, backend=backend)
    with bank.rows(["anna", "ben"]):
        y, count = compiled(X), len(graphs)
        for layer in (bank.model.first, bank.model.second):
            assert layer.kept._mixture is None
        assert_close(bank.model(X), y)
        assert bank.model.first.kept._mixture is not None
        assert_close(compiled(X), y)
    assert len(graphs) == count


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_serves_threads_and_generators(bank):
    torch.compiler.reset()
    compiled = torch.compile(bank.model, backend="eager")

    def serve(name):
        with bank.rows([name] * 2):
            return all(is_answer(compiled(X), name) for _ in range(20))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(serve, ["anna", "ben", None]))

    def steps(name):
        with bank.rows([name] * 2):
            yield compiled(X)
            yield compiled(X)

    one, two = steps("anna"), steps("ben")
    for _ in range(2):
        assert is_answer(next(one), "anna")
        assert is_answer(next(two), "ben")


WITHOUT_COMPILER = """
import copy
import sys
import torch
from torch import nn
from lowrank_utils import AdapterBank, LinearWithDoRA, replace_linear_layers

source = nn.Sequential(nn.Linear(2, 2))
bank = AdapterBank(copy.deepcopy(source))
replace_linear_layers(source, LinearWithDoRA, 1, 1.0)
bank.add("anna", source)

def steps():
    with bank.rows(["anna"]):
        yield bank.model(torch.ones(1, 2)), bank.model[0].weight.dtype

assert [dtype for _, dtype in steps()] == [torch.float32]
assert "torch._dynamo" not in sys.modules
"""


def test_a_bank_does_not_load_torchs_compiler():
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_copies_have_a_selection_of_their_own(bank):
    bank.activate("anna")
    other = copy.deepcopy(bank)
    bank.activate("ben")
    assert is_answer(other.model(X), "anna")
    other.remove("ben")
    with other.rows(["cleo"] * 2):
        assert is_answer(other.model(X), "cleo")
        assert is_answer(bank.model(X), "ben")
    bank.model.between = other.model.between = None
    again = pickle.loads(pickle.dumps(other))
    again.model.between = bank.model.between = lambda: None
    assert again.names == ["anna", "cleo"]
    assert is_answer(again.model(X), "anna")
    again.model.second = linear_layer(6, 3)
    with pytest.raises(RuntimeError, match=r"^second was exchanged after 'anna' had"):
        again.model(X)
    with bank.rows(["cleo"] * 2):
        for function in (copy.deepcopy, merge_adapters):
            with pytest.raises(RuntimeError, match=r"^a copy of the model has no bank"):
                function(bank.model)
