"""What is decided is declared before the runs, refused if they can't answer it, and
judged network by network."""

import copy
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import yaml
from pandas.testing import assert_frame_equal
from scipy import stats
from test_tables import DORA, LONG, ONE_RATE, SETTINGS, only, result

from lowrank_utils.comparison import command as comparison
from lowrank_utils.comparison.command import main
from lowrank_utils.comparison.declared import judge, read_declaration
from lowrank_utils.comparison.grid import SweepError, expand
from lowrank_utils.comparison.intervals import holm, sign_flip_test
from lowrank_utils.comparison.store import Outcome
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


BOTH_RANKS = one_test(ranks=[1, 4])


def scores(ahead=AHEAD):
    """DoRA's lead over LoRA differs between the ranks and is ``ahead`` in their
    mean."""
    lora = [0.70 + 0.01 * place for place in range(len(ahead))]
    high = [a + 0.2 + d for a, d in zip(lora, ahead, strict=True)]
    low = [value - 0.4 for value in high]
    gain = [v - 0.001 * (-1) ** place / (1 + place) for place, v in enumerate(high)]
    of_lora = {("LoRA", 1): lora, ("LoRA", 4): lora}
    return of_lora | {(DORA, 1): high, (DORA, 4): low, ("gain", 1): gain}


def both_shifts(values=None, **more):
    values = values or scores()
    return [result(values, shift=shift, **more) for shift in DECLARED["shifts"]]


def judged(results, **changes):
    return judge(results_table(results), read_declaration(declared(**changes)))


def test_a_tests_answer_is_the_mean_over_shifts_and_ranks_of_each_network():
    first, second = judged(both_shifts()).to_dict("records")
    expected = {"steps": 64, "test": f"{DORA} − LoRA, rank 1 and 4", "count": 8}
    # Two tests, so that each interval has 97.5 %.
    ends = stats.ttest_1samp(AHEAD, 0).confidence_interval(0.975)
    expected |= {"mean": np.mean(AHEAD), "low": ends.low, "high": ends.high}
    expected |= {"p": 2 / 2**8, "p_holm": 4 / 2**8, "verdict": "better"}
    assert first == pytest.approx(expected)
    assert (second["count"], second["verdict"]) == (8, "no difference worth having")
    opposite = only(judged(both_shifts(), tests=one_test("LoRA", DORA, [1, 4])))
    assert opposite["mean"] == pytest.approx(-np.mean(AHEAD))
    assert opposite["verdict"] == "worse"


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_intervals_level_goes_by_the_number_of_tests(count):
    tests = one_test() + one_test(ranks=[4]) + BOTH_RANKS
    tests += one_test("LoRA", DORA) + one_test("gain", DORA)
    answers = judged(both_shifts(), tests=tests[:count])
    values = [0.2 + d for d in AHEAD]
    ends = stats.ttest_1samp(values, 0).confidence_interval(1 - 0.05 / count)
    assert answers["low"].iloc[0] == pytest.approx(ends.low)
    assert answers["high"].iloc[0] == pytest.approx(ends.high)
    assert answers["p_holm"].tolist() == pytest.approx(holm(answers["p"].tolist()))


def test_a_corrected_p_above_five_of_a_hundred_decides_nothing_whatever_the_interval():
    # Six equal signs: p = 2/64 = 0.031 stands for one test, and not for two. The t
    # interval excludes zero in both.
    steady = both_shifts(scores([0.030, 0.031, 0.029, 0.030, 0.032, 0.028]))
    alone = only(judged(steady, tests=BOTH_RANKS))
    assert (alone["p_holm"], alone["verdict"]) == (pytest.approx(2 / 64), "better")
    two = judged(steady).iloc[0]
    assert two["low"] > 0.01
    assert two[["p", "p_holm"]].tolist() == pytest.approx([2 / 64, 4 / 64])
    assert two["verdict"] == "undecided"
    tests = one_test("LoRA", DORA, [1, 4]) + one_test("gain", DORA)
    worse = judged(steady, tests=tests).iloc[0]
    assert worse["high"] < -0.01
    assert worse["verdict"] == "undecided"
    # That a difference is within a point is no claim that needs a p.
    small = only(judged(both_shifts(scores([0.001, -0.001] * 4)), tests=BOTH_RANKS))
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
        family = answers[answers["steps"] == steps].reset_index(drop=True)
        assert_frame_equal(family, judged(results, steps=[steps]))


def test_more_seeds_make_nothing_surer_and_move_no_weight_between_networks():
    answers = judged(both_shifts())
    seeds = [1, 20, 3, 1, 1, 7, 1, 2]
    more, uneven = scores(), scores()
    for key, values in scores().items():
        more[key] = [[v] * n for v, n in zip(values, seeds, strict=True)]
        if key[1] == 4:
            uneven[key] = [[v] * 9 for v in values]
    assert_frame_equal(judged(both_shifts(more)), answers)
    # Nor do more seeds on one of the shifts, or at one of the ranks.
    mixed = [both_shifts(uneven)[0], both_shifts()[1]]
    assert_frame_equal(judged(mixed), answers)


def test_it_is_the_same_whatever_the_order_of_the_rows():
    table, declaration = results_table(both_shifts()), read_declaration(DECLARED)
    for seed in range(3):
        mixed = table.sample(frac=1, random_state=seed)
        assert_frame_equal(judge(mixed, declaration), judge(table, declaration))


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
    row = only(judge(table[~gone], read_declaration(declared(tests=BOTH_RANKS))))
    rest = [value for place, value in enumerate(AHEAD) if place != 2]
    expected = [7, np.mean(rest), sign_flip_test(rest)]
    assert [row["count"], row["mean"], row["p"]] == pytest.approx(expected)


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
        assert_frame_equal(judged(results), answers)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_whole_networks_are_no_answer(count):
    table = results_table(both_shifts())
    left = table[(table["network"] < 11 + count) | (table["method"] != "LoRA")]
    with pytest.raises(ValueError, match=r"needs two networks or more .* 64 steps"):
        judge(left, read_declaration(DECLARED))


# --- What may be declared ----------------------------------------------------------------------------------

RUNS = {"networks": NETWORKS, "methods": ["LoRA", DORA, "gain"], "ranks": [1, 4]}
RUNS |= {"steps": [64], "adaptation_examples": 512}


def grid(**changes):
    """All shifts that are declared, each with all methods, ranks and networks."""
    runs = RUNS | changes
    lists = {name: [v] if isinstance(v, list) else v for name, v in runs.items()}
    return {"shift": DECLARED["shifts"]} | lists


def settings(**changes):
    return expand([grid(**changes)], SETTINGS)


SIX = [{**test, "ranks": [rank]} for rank in (1, 4, 8) for test in DECLARED["tests"]]
KEYS = "declared must have shifts, steps and tests; got"
EMPTY = "must be a list with one entry or more"
# What is declared → what is said to it.
WRONG = [
    (declared(tests=SIX), "tests must be 5 or fewer; got 6"),
    (declared(tests=one_test("QLoRA")), "first must be one of "),
    # A method without a rank.
    (declared(tests=one_test(DORA, "m alone")), "second must be one of"),
    (declared(tests=one_test("LoRA", "LoRA")), "two methods; got 'LoRA' twice"),
    (declared(shifts=["no shift"]), "a shift must be one of"),
    ({"shifts": ["inversion"], "steps": [64]}, KEYS),
    (declared(level=0.1), KEYS),
    ([1], f"{KEYS} [1]"),
    (declared(tests=[{"first": DORA, "ranks": [1]}]), "a test must have first, second"),
    (declared(tests=one_test(ranks=[])), f"ranks {EMPTY}"),
    (declared(tests=[]), f"tests {EMPTY}; got []"),
    (declared(tests=one_test(ranks=[1, 1])), "ranks must have each entry once"),
    (declared(tests=one_test(ranks=[0])), "a rank must be a whole number, 1 or more"),
    (declared(steps=[1.5]), "steps must be a whole number"),
    (declared(steps=[64, 128]), f"{DORA} isn't run with rank 1 and 128 steps on perm"),
]
TEST = f"“{DORA} − LoRA, rank 1 and 4” is declared, but "
GAIN = f"“{DORA} − gain, rank 1” is declared, but "
LACKS = "isn't run with rank {} and 64 steps on permutation"
FEW = "its runs have {} networks in common; 2 tests need 7 or more: with n networks p "
TWO = ["LoRA", DORA]
# Each method and rank, but not together; and two methods above few networks.
APART = [grid(methods=["gain"]), grid(methods=TWO, ranks=[1])]
APART += [grid(methods=["LoRA"], ranks=[4])]
DORA_LATER = grid(methods=[DORA, "gain"], networks=[n + 5 for n in NETWORKS])
GAIN_AT_THREE = grid(methods=["gain"], networks=NETWORKS[:3])
# Grids that don't run what is declared → what is said to them.
TOO_LITTLE = [
    ([grid(methods=TWO)], GAIN + "gain " + LACKS.format(1)),
    ([grid(ranks=[1])], f"{TEST}{DORA} {LACKS.format(4)}"),
    ([grid(shift="inversion")], f"{TEST}{DORA} {LACKS.format(1)}"),
    (APART, f"{TEST}{DORA} {LACKS.format(4)}"),
    ([grid(networks=NETWORKS[:6])], TEST + FEW.format(6)),
    ([grid(methods=["LoRA"]), DORA_LATER], TEST + FEW.format(3)),
    ([grid(methods=TWO), GAIN_AT_THREE], GAIN + FEW.format(3)),
]


@pytest.mark.parametrize(
    ("content", "grids", "said"),
    [(content, [grid()], said) for content, said in WRONG]
    + [(DECLARED, *case) for case in TOO_LITTLE],
)
def test_what_the_runs_cannot_answer_is_refused_before_anything_is_trained(
    content, grids, said, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({"declared": content, "grids": grids}), "utf-8")
    # Nothing is trained.
    monkeypatch.setattr(comparison, "run_all", None)
    assert main([str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lowrank-compare: ")
    assert said in error.replace('"', "'")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# Networks that have one of a test's ranks, or one of its shifts, and not the other,
# don't count when it is judged.
@pytest.mark.parametrize(
    ("name", "one", "other"),
    [("ranks", [1], [4]), ("shift", "permutation", "inversion")],
)
def test_enough_networks_must_have_all_of_a_tests_runs(name, one, other):
    apart = {name: other, "networks": [n + 100 for n in NETWORKS]}
    halves = settings(**{name: one}) + settings(**apart)
    with pytest.raises(ValueError, match=re.escape(TEST)):
        read_declaration(declared(tests=BOTH_RANKS)).check(halves)


# A test's mean over “rotation” would be one over two angles, and a network with one of
# them would still count.
def test_a_declared_shift_is_one_task():
    runs, declaration = settings(), read_declaration(DECLARED)
    declaration.check(runs)
    for name, value in (
        ("alpha", 4.0),
        ("adaptation_examples", 500),
        ("batch_size", 32),
    ):
        with pytest.raises(ValueError, match=name):
            declaration.check([*runs, replace(runs[0], **{name: value})])


def test_what_the_runs_can_answer_is_taken_from_several_grids():
    runs = settings(methods=TWO) + settings(methods=["gain"], networks=NETWORKS[:7])
    read_declaration(DECLARED).check(runs)
    read_declaration(DECLARED).check(runs + settings(networks=[1], methods=["full"]))


def test_a_declaration_as_json_holds_it_is_what_the_file_has():
    assert json.loads(json.dumps(read_declaration(DECLARED).as_dict())) == DECLARED


# --- A declaration stays ------------------------------------------------------------------------------------


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
    others = [declared(steps=[128]), declared(tests=DECLARED["tests"][:1])]
    for later in (*others, None if earlier else DECLARED):
        with pytest.raises(SweepError, match=r"declared before them, .* another"):
            store.declare(later)
        assert on_disk(store) == earlier


def test_a_store_whose_runs_had_no_declaration_takes_none_later(store):
    finish_a_run(store)
    with pytest.raises(SweepError, match="was declared before them"):
        store.declare(DECLARED)
    assert not (store.folder / "declared.json").exists()
    store.declare(None)
