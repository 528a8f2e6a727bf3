"""What is decided is declared before the runs, refused if they can't answer it, and
judged network by network."""

import copy
import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats
from test_tables import DORA, LONG, ONE_RATE, SETTINGS, result

from lowrank_utils.comparison import command as comparison
from lowrank_utils.comparison.command import main
from lowrank_utils.comparison.declared import judge, read_declaration
from lowrank_utils.comparison.grid import SweepError
from lowrank_utils.comparison.intervals import holm, sign_flip_test
from lowrank_utils.comparison.settings import Settings
from lowrank_utils.comparison.store import Outcome, Store
from lowrank_utils.comparison.tables import results_table

NETWORKS = list(range(11, 19))
DECLARED = {
    "shifts": ["permutation", "inversion"],
    "steps": [64],
    "tests": [
        {"first": DORA, "second": "LoRA", "ranks": [1, 4]},
        {"first": DORA, "second": "gain", "ranks": [1]},
    ],
}
# By how much DoRA is ahead of LoRA above each network, in the mean over shifts and
# ranks.
AHEAD = [0.03, 0.05, 0.02, 0.04, 0.06, 0.03, 0.05, 0.04]


def declared(**changes):
    return copy.deepcopy(DECLARED) | changes


def one_test(first=DORA, second="LoRA", ranks=(1,)):
    return [{"first": first, "second": second, "ranks": list(ranks)}]


def scores(ahead=AHEAD, gain=0.001):
    """DoRA's lead over LoRA differs between the ranks and is ``ahead`` in their
    mean."""
    lora = [0.70 + 0.01 * place for place in range(len(ahead))]
    dora = {
        rank: [a + by + d for a, d in zip(lora, ahead, strict=True)]
        for rank, by in ((1, 0.2), (4, -0.2))
    }
    return {
        ("LoRA", 1): lora,
        ("LoRA", 4): lora,
        (DORA, 1): dora[1],
        (DORA, 4): dora[4],
        ("gain", 1): [
            value - gain * (-1) ** place / (1 + place)
            for place, value in enumerate(dora[1])
        ],
    }


def both_shifts(values=None, **more):
    values = values or scores()
    return [result(values, shift=shift, **more) for shift in DECLARED["shifts"]]


def judged(results, **changes):
    return judge(results_table(results), read_declaration(declared(**changes)))


def test_a_tests_answer_is_the_mean_over_shifts_and_ranks_of_each_network():
    answers = judged(both_shifts())
    row, other = (row for _, row in answers.iterrows())
    assert (row["steps"], row["count"], row["test"]) == (
        64,
        8,
        f"{DORA} − LoRA, rank 1 and 4",
    )
    assert row["mean"] == pytest.approx(np.mean(AHEAD))
    # Two tests, so that each interval has 97.5 %.
    ends = stats.ttest_1samp(AHEAD, 0).confidence_interval(0.975)
    assert (row["low"], row["high"]) == pytest.approx((ends.low, ends.high))
    assert row["p"] == pytest.approx(2 / 2**8)
    assert row["p_holm"] == pytest.approx(4 / 2**8)
    assert row["verdict"] == "better"
    assert (other["count"], other["verdict"]) == (8, "no difference worth having")
    opposite = judged(both_shifts(), tests=one_test("LoRA", DORA, [1, 4]))
    assert opposite["mean"].tolist() == pytest.approx([-np.mean(AHEAD)])
    assert opposite["verdict"].tolist() == ["worse"]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_intervals_level_goes_by_the_number_of_tests(count):
    tests = [
        *one_test(),
        *one_test(ranks=[4]),
        *one_test(ranks=[1, 4]),
        *one_test("LoRA", DORA),
        *one_test("gain", DORA),
    ]
    answers = judged(both_shifts(), tests=tests[:count])
    values = [0.2 + d for d in AHEAD]
    ends = stats.ttest_1samp(values, 0).confidence_interval(1 - 0.05 / count)
    assert answers["low"].iloc[0] == pytest.approx(ends.low)
    assert answers["high"].iloc[0] == pytest.approx(ends.high)
    assert answers["p_holm"].tolist() == pytest.approx(holm(answers["p"].tolist()))


def test_a_corrected_p_above_five_of_a_hundred_decides_nothing_whatever_the_interval():
    # Six equal signs: p = 2/64 = 0.031 stands for one test, and not for two. The t
    # interval excludes zero in both.
    steady = scores([0.030, 0.031, 0.029, 0.030, 0.032, 0.028])
    alone = judged(both_shifts(steady), tests=one_test(ranks=[1, 4]))
    assert (alone["p_holm"].iloc[0], alone["verdict"].iloc[0]) == (
        pytest.approx(0.03125),
        "better",
    )
    two = judged(both_shifts(steady)).iloc[0]
    assert two["low"] > 0.01
    assert (two["p"], two["p_holm"], two["verdict"]) == (
        pytest.approx(0.03125),
        pytest.approx(0.0625),
        "undecided",
    )
    worse = judged(
        both_shifts(steady),
        tests=[*one_test("LoRA", DORA, [1, 4]), *one_test("gain", DORA)],
    ).iloc[0]
    assert worse["high"] < -0.01
    assert worse["verdict"] == "undecided"
    # That a difference is within a point is no claim that needs a p.
    small = judged(
        both_shifts(scores([0.001, -0.001] * 4)), tests=one_test(ranks=[1, 4])
    ).iloc[0]
    assert small["p"] > 0.05
    assert small["verdict"] == "no difference worth having"


def test_each_length_is_a_family_of_its_own():
    long = {
        key: [value + 0.001 * len(key[0]) for value in values]
        for key, values in scores().items()
    }
    results = [*both_shifts(), *both_shifts(long, steps=(LONG,))]
    answers = judged(results, steps=[64, LONG])
    assert answers["steps"].tolist() == [64, 64, LONG, LONG]
    for steps in (64, LONG):
        alone = judged(results, steps=[steps])
        family = answers[answers["steps"] == steps].reset_index(drop=True)
        pd.testing.assert_frame_equal(family, alone)
        assert family["p_holm"].tolist() == pytest.approx(holm(family["p"].tolist()))


def test_more_seeds_make_nothing_surer_and_move_no_weight_between_networks():
    answers = judged(both_shifts())
    seeds = [1, 20, 3, 1, 1, 7, 1, 2]
    more = {
        key: [[v] * n for v, n in zip(values, seeds, strict=True)]
        for key, values in scores().items()
    }
    pd.testing.assert_frame_equal(judged(both_shifts(more)), answers)
    # Nor do more seeds on one of the shifts, or at one of the ranks.
    uneven = {
        key: [[v] * 9 for v in values] if key[1] == 4 else values
        for key, values in scores().items()
    }
    first, second = DECLARED["shifts"]
    mixed = [result(uneven, shift=first), result(scores(), shift=second)]
    pd.testing.assert_frame_equal(judged(mixed), answers)


def test_it_is_the_same_whatever_the_order_of_the_rows():
    table = results_table(both_shifts())
    answers = judge(table, read_declaration(declared()))
    for seed in range(3):
        mixed = table.sample(frac=1, random_state=seed)
        pd.testing.assert_frame_equal(
            judge(mixed, read_declaration(declared())), answers
        )


@pytest.mark.parametrize(
    "lacks",
    [
        {"shift": "inversion", "method": DORA, "rank": 4},
        {"shift": "permutation", "method": "LoRA", "rank": 1},
        {"shift": "inversion"},
        {"rank": 1},
        {"method": "LoRA"},
    ],
)
def test_a_network_that_lacks_one_run_does_not_count(lacks):
    table = results_table(both_shifts())
    gone = table["network"] == NETWORKS[2]
    for name, value in lacks.items():
        gone &= (table[name] == value).fillna(value=False)
    row = judge(
        table[~gone], read_declaration(declared(tests=one_test(ranks=[1, 4])))
    ).iloc[0]
    rest = [value for place, value in enumerate(AHEAD) if place != 2]
    assert (row["count"], row["mean"]) == (7, pytest.approx(np.mean(rest)))
    assert row["p"] == pytest.approx(sign_flip_test(rest))


def test_what_only_describes_does_not_get_into_the_declared_tests():
    """Further shifts, lengths, ranks and methods, and the same runs in another result,
    change nothing."""
    answers = judged(both_shifts())
    far = {key: [value / 3 for value in values] for key, values in scores().items()}
    describing = [
        result(far, shift="blur"),
        *both_shifts(far, steps=(LONG,)),
        *both_shifts({("LoRA", 2): [0.1] * 8, (DORA, 2): [0.9] * 8}),
        *both_shifts({("m alone", None): [0.2] * 8, (ONE_RATE, 1): [0.3] * 8}),
        *both_shifts(),
    ]
    for results in ([*both_shifts(), *describing], [*describing, *both_shifts()]):
        pd.testing.assert_frame_equal(judged(results), answers)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_whole_networks_are_no_answer(count):
    table = results_table(both_shifts())
    left = table[(table["network"] < 11 + count) | (table["method"] != "LoRA")]
    with pytest.raises(
        ValueError,
        match=r"needs two networks or more with all its runs of 64 steps; there",
    ):
        judge(left, read_declaration(declared()))


# --- What may be declared ----------------------------------------------------------------------------------

RUNS = {
    "networks": NETWORKS,
    "methods": ["LoRA", DORA, "gain"],
    "ranks": [1, 4],
    "steps": [64],
    "adaptation_examples": 512,
}


def grid(**changes):
    """All shifts that are declared, each with all methods, ranks and networks."""
    lists = {
        name: [value] if isinstance(value, list) else value
        for name, value in (RUNS | changes).items()
    }
    return {"shift": DECLARED["shifts"], **lists}


def settings(**changes):
    return [
        Settings.of(SETTINGS | RUNS | {"shift": shift} | changes)
        for shift in DECLARED["shifts"]
    ]


TEST = f"“{DORA} − LoRA, rank 1 and 4” is declared, but "
GAIN = f"“{DORA} − gain, rank 1” is declared, but "
FEW = (
    " networks in common; 2 tests need 7 or more: with n networks p can't be below 2/2ⁿ"
)
SIX = [{**test, "ranks": [rank]} for rank in (1, 4, 8) for test in DECLARED["tests"]]

WRONG = {
    "six tests": (declared(tests=SIX), [grid()], "tests must be 5 or fewer; got 6"),
    "an unknown method": (
        declared(tests=one_test("QLoRA")),
        [grid()],
        "first must be one of 'DoRA norm kept with m's rate'",
    ),
    "a method without a rank": (
        declared(tests=one_test(DORA, "m alone")),
        [grid()],
        "second must be one of",
    ),
    "one method twice": (
        declared(tests=one_test("LoRA", "LoRA")),
        [grid()],
        "a test must compare two methods; got 'LoRA' twice",
    ),
    "an unknown shift": (
        declared(shifts=["mirror"]),
        [grid()],
        "a shift must be one of",
    ),
    "no tests": (
        {"shifts": ["inversion"], "steps": [64]},
        [grid()],
        "declared must have shifts, steps and tests; got",
    ),
    "another key": (
        declared(level=0.1),
        [grid()],
        "declared must have shifts, steps and tests; got",
    ),
    "a list": ([1], [grid()], "declared must have shifts, steps and tests; got [1]"),
    "no second": (
        declared(tests=[{"first": DORA, "ranks": [1]}]),
        [grid()],
        "a test must have first, second and ranks; got {'first'",
    ),
    "no ranks": (
        declared(tests=one_test(ranks=[])),
        [grid()],
        "ranks must be a list with one entry or more",
    ),
    "empty tests": (
        declared(tests=[]),
        [grid()],
        "tests must be a list with one entry or more; got []",
    ),
    "one rank twice": (
        declared(tests=one_test(ranks=[1, 1])),
        [grid()],
        "ranks must have each entry once",
    ),
    "rank 0": (
        declared(tests=one_test(ranks=[0])),
        [grid()],
        "a rank must be a whole number, 1 or more; got 0",
    ),
    "half a step": (declared(steps=[1.5]), [grid()], "steps must be a whole number"),
    "a method that isn't run": (
        DECLARED,
        [grid(methods=["LoRA", DORA])],
        GAIN + "gain isn't run with rank 1 and 64 steps on permutation",
    ),
    "a rank that isn't run": (
        DECLARED,
        [grid(ranks=[1])],
        TEST + f"{DORA} isn't run with rank 4 and 64 steps on permutation",
    ),
    "a shift that isn't run": (
        DECLARED,
        [grid() | {"shift": "inversion"}],
        TEST + f"{DORA} isn't run with rank 1 and 64 steps on permutation",
    ),
    "a length that isn't run": (
        declared(steps=[64, 128]),
        [grid()],
        TEST + f"{DORA} isn't run with rank 1 and 128 steps on permutation",
    ),
    "a pair that isn't run together": (
        DECLARED,
        [
            grid(methods=["LoRA", DORA], ranks=[1]),
            grid(methods=["LoRA"], ranks=[4]),
            grid(methods=["gain"]),
        ],
        TEST + f"{DORA} isn't run with rank 4 and 64 steps",
    ),
    "six networks": (DECLARED, [grid(networks=NETWORKS[:6])], (TEST, "6" + FEW)),
    "networks of their own": (
        DECLARED,
        [
            grid(methods=["LoRA"]),
            grid(methods=[DORA, "gain"], networks=[n + 5 for n in NETWORKS]),
        ],
        (TEST, "3" + FEW),
    ),
    "few networks with the last method": (
        DECLARED,
        [grid(methods=["LoRA", DORA]), grid(methods=["gain"], networks=NETWORKS[:3])],
        (GAIN, "3" + FEW),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_the_runs_cannot_answer_is_refused_before_anything_is_trained(
    case, tmp_path, monkeypatch, capsys
):
    content, grids, said = WRONG[case]
    path = tmp_path / "grid.yaml"
    path.write_text(
        yaml.safe_dump({"declared": content, "grids": grids}, sort_keys=False),
        encoding="utf-8",
    )
    monkeypatch.setattr(
        comparison, "run_all", lambda *_: pytest.fail("something is trained")
    )
    assert main([str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lowrank-compare: ")
    for part in (said,) if isinstance(said, str) else said:
        assert part in error.replace('"', "'")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# Networks that have one of a test's ranks, or one of its shifts, and not the other,
# don't count when it is judged.
@pytest.mark.parametrize(
    "apart", [{"ranks": ([1], [4])}, {"shift": (["permutation"], ["inversion"])}]
)
def test_enough_networks_must_have_all_of_a_tests_runs(apart):
    ((name, values),) = apart.items()
    declaration = read_declaration(declared(tests=one_test(ranks=[1, 4])))
    halves = [
        run
        for value, networks in zip(
            values, (NETWORKS, [n + 100 for n in NETWORKS]), strict=True
        )
        for run in settings(
            networks=networks, **({"ranks": value} if name == "ranks" else {})
        )
        if name == "ranks" or [run.shift] == value
    ]
    with pytest.raises(ValueError, match=re.escape(TEST)):
        declaration.check(halves)


# A test's mean over “rotation” would be one over two angles, and a network with one of
# them would still count.
def test_a_declared_shift_is_one_task():
    runs = settings()
    read_declaration(declared()).check(runs)
    for change in (
        {"alpha": 4.0},
        {"adaptation_examples": 500},
        {"batch_size": 32, "steps": [64]},
    ):
        with pytest.raises(ValueError, match=next(iter(change))):
            read_declaration(declared()).check([*runs, replace(runs[0], **change)])


def test_what_the_runs_can_answer_is_taken_from_several_grids():
    runs = [
        *settings(methods=["LoRA", DORA]),
        *settings(methods=["gain"], networks=NETWORKS[:7]),
    ]
    read_declaration(DECLARED).check(runs)
    read_declaration(DECLARED).check([*runs, *settings(networks=[1], methods=["full"])])


def test_a_declaration_as_json_holds_it_is_what_the_file_has():
    assert json.loads(json.dumps(read_declaration(DECLARED).as_dict())) == DECLARED


# --- A declaration stays ------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "out")
    with store.locked():
        yield store


def finish_a_run(store):
    store.keep("a", settings()[0], Outcome("{}", "{}", ""))


def on_disk(store):
    return json.loads((store.folder / "declared.json").read_text(encoding="utf-8"))


def test_before_any_run_a_declaration_may_change(store):
    for content in (DECLARED, declared(steps=[128]), None, DECLARED):
        store.declare(content)
        assert on_disk(store) == content
    # A run that failed has shown nothing yet.
    store.keep("b", settings()[0], Outcome("{}", None, "no"))
    store.declare(declared(steps=[128]))
    assert on_disk(store) == declared(steps=[128])


@pytest.mark.parametrize("earlier", [DECLARED, None])
def test_after_a_run_it_may_not(store, earlier):
    store.declare(earlier)
    finish_a_run(store)
    store.declare(earlier)
    for later in (
        declared(steps=[128]),
        declared(tests=DECLARED["tests"][:1]),
        None if earlier else DECLARED,
    ):
        with pytest.raises(
            SweepError, match=r"was declared before them, .*choose another --out"
        ):
            store.declare(later)
        assert on_disk(store) == earlier


def test_a_store_whose_runs_had_no_declaration_takes_none_later(store):
    finish_a_run(store)
    with pytest.raises(SweepError, match="was declared before them"):
        store.declare(DECLARED)
    assert not (store.folder / "declared.json").exists()
    store.declare(None)
