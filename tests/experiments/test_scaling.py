"""The plan to scale: its simulation is the runner's schedule, its bounds hold it, the page shows what it computes."""

import random
from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.schedule import Load, Task, bounds, longest, simulate
from experiments.running.costs import Cost
from experiments.running.rates import gpu_rates

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"


def load_of(loading=0.0, **experiments):
    """Experiments by name: what they need, and the seconds of their units."""
    return Load(
        tasks={name: [Task(experiment=name, seconds=s) for s in seconds] for name, (_, seconds) in experiments.items()},
        needs={name: needs for name, (needs, _) in experiments.items()},
        loading=loading,
    )


def test_one_worker_does_one_after_the_other():
    load = load_of(5.0, a=((), [1, 2, 3]), b=(("a",), [4, 6]))
    assert simulate(load, 1, {}, 0, handling=0.5) == pytest.approx(5 + 16 + 5 * 0.5)


def test_what_needs_an_experiment_waits_for_its_last_unit_and_nothing_else_does():
    load = load_of(0.0, a=((), [10, 1]), b=(("a",), [3]), c=((), [4]))
    assert simulate(load, 2, {}, 0, handling=0.0) == 13  # b behind the longest of a; c beside it
    assert longest(load) == 13
    assert simulate(load_of(0.0, a=((), [10, 1]), c=((), [4, 8])), 2, {}, 0, handling=0.0) == 13  # 10 | 1 4 8


def test_every_worker_loads_the_model_that_it_lacks():
    load = load_of(7.0, a=((), [2, 2]))
    assert simulate(load, 2, {}, 0, handling=0.0) == 9
    load.tasks["a"].append(Task(experiment="a", seconds=1, model="base"))
    assert simulate(load, 1, {}, 0, handling=0.0) == 7 + 4 + 7 + 1
    load.tasks["a"][1] = Task(experiment="a", seconds=1, copying=3.0)
    assert simulate(load, 1, {}, 0, handling=0.0) == 7 + 2 + (3 + 1) + (7 + 1)


def test_what_the_driver_does_itself_takes_no_worker():
    load = load_of(0.0, a=((), [5, 5]), judged=((), [3, 4]))
    load.by_driver.add("judged")
    assert simulate(load, 1, {}, 0, handling=0.0) == 10


@pytest.mark.parametrize("seed", range(20))
def test_no_run_is_shorter_or_longer_than_its_bounds(seed):
    rng = random.Random(seed)
    names = "abcdef"[: rng.randint(1, 6)]
    load = load_of(
        rng.uniform(0, 5),
        **{
            name: (
                tuple(other for other in names[:i] if rng.random() < 0.4),
                [rng.uniform(0.1, 9) for _ in range(rng.randint(1, 12))],
            )
            for i, name in enumerate(names)
        },
    )
    for n_workers in (1, 2, 5, 30):
        parts, most = bounds(load, n_workers, handling=0.1)
        took = simulate(load, n_workers, {}, 0, handling=0.1)
        assert max(parts.values()) <= took + 1e-9
        assert took <= most + 1e-9


def test_units_stray_as_those_that_were_measured():
    ratios = scaling.strayed()
    assert {"vectors", "finetuning", "open_ended"} <= set(ratios)
    assert all(ratio > 0 for many in ratios.values() for ratio in many)
    load = load_of(0.0, vectors=((), [1.0] * 4))
    found = {simulate(load, 1, {"vectors": [2.0, 3.0]}, seed, handling=0.0) for seed in range(30)}
    assert found <= {8.0, 9.0, 10.0, 11.0, 12.0}
    assert len(found) > 2


def test_a_hundred_behaviors_are_the_seven_over_and_over(no_data):
    (seven, config), (hundred, _) = scaling.load_of("7b", 7), scaling.load_of("7b", 100)
    assert len(seven.tasks["vectors"]) == 7
    assert len(hundred.tasks["vectors"]) == 100
    assert len(hundred.tasks["truthful_qa"]) == 14  # of sycophancy alone
    assert len(hundred.tasks["data_tables"]) == 2  # of no behavior
    cost = Cost(tokens=1000)
    assert seven.loading == 2 * 6_738_415_616 / scaling.DISK
    assert seven.tasks["vectors"][0].seconds > gpu_rates("h100", "bfloat16").seconds(cost, 6_738_415_616, "bfloat16")
    assert config.model.endswith("7b-chat-hf")


def test_the_page_shows_what_is_computed(no_data):
    page, ratios = PAGE.read_text(encoding="utf-8"), scaling.strayed()
    for size, n in (("7b", 7), ("70b", 7)):
        load, config = scaling.load_of(size, n)
        rows = [scaling.amounts(size, n, load, config), scaling.limits(size, n, load, config)]
        rows.append(scaling.times(size, n, load, ratios, n_seeds=5)[0])
        for row in rows:
            assert f"| {' | '.join(row)} |" in page
