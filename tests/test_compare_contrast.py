"""What a contrast says of made-up runs whose numbers are known."""

# Endpoints without a value are None, on which arithmetic fails a test as it should.
# mypy: disable-error-code="operator,union-attr"
from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare_runs import GIB, changed, edit, step_log, summary, write, write_scored
from scipy import stats

from qlora_harness.compare.comparison import Comparison, compare
from qlora_harness.compare.contrast import Contrast
from qlora_harness.compare.sample_size import report

Questions = list[tuple[str, int, list[float]]]
LETTERS = 4
# Seconds that are the same for both arms, step by step, and rise now and then.
STEPS = [1.0 + (i % 7) / 10 for i in range(83)]


def questions(seed: int, *, skill: float = 1.0, n: int = 400, subjects: int = 8) -> Questions:
    """Answers to the same questions: the right letter is likelier, by `skill` nats."""
    right = np.random.default_rng(0).integers(0, LETTERS, n)
    noise = np.random.default_rng(1).normal(size=(n, LETTERS))
    own = np.random.default_rng(100 + seed).normal(size=(n, LETTERS))
    answers = []
    for row in range(n):
        scores = noise[row] + 0.3 * own[row] - 5
        scores[right[row]] += skill
        subject = f"subject_{row * subjects // n}"
        answers.append((subject, int(right[row]), [min(-1e-3, float(s)) for s in scores]))
    return answers


def training(quant: str, seed: int = 0, **changes: Any) -> dict[str, Any]:
    record = summary(quant, **{"settings__seed": seed, **changes})
    record["results"]["steps"] = len(STEPS)
    # One after the other on a device.
    hour = 2 * seed + (quant == "bf16")
    record["started"], record["finished"] = (
        f"2026-11-24T{hour + at:02}:00:00+00:00" for at in (0, 1)
    )
    record["process"] = {"host": "h", "id": 1, "started": 1.0}
    return record


NLL = [3.0 * (1 + i % 5) for i in range(30)]
TOKENS = [2 + i % 4 for i in range(30)]


def run(
    folder: Path, quant: str, seed: int = 0, *, skill: float = 1.0, loss: float = 0.0,
    seconds: float = 1.0, before: float | None = None, **changes: Any,
) -> Path:  # fmt: skip
    """A run whose loss is higher by `loss` a token and whose steps take `seconds` times as long."""
    nll = [value + (loss + 0.001 * seed) * n for value, n in zip(NLL, TOKENS, strict=True)]
    evaluation: dict[str, Any] = {"nll": nll, "tokens": TOKENS}
    if before is not None:
        evaluation["nll_before"] = [v + before * n for v, n in zip(NLL, TOKENS, strict=True)]
    record = training(quant, seed, **changes)
    record["results"]["eval_loss"] = sum(nll) / sum(TOKENS)
    path = folder / f"{quant}_{seed}"
    write_scored(path, questions(seed + 50 * (quant == "nf4"), skill=skill), record, quant)
    log = step_log(
        [3 + loss - 0.01 * i for i in range(len(STEPS))],
        [seconds * s for s in STEPS],
        evaluation,
    )
    write(path / "training_logs.json", log)
    return path


@pytest.fixture(scope="module")
def pair_of_arms(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("arms")
    runs = [run(folder, "bf16", seed, before=0.0) for seed in (0, 1, 2)]
    runs += [
        run(folder, "nf4", seed, skill=0.6, loss=0.05, seconds=1.1, before=0.2)
        for seed in (0, 1, 2)
    ]
    return compare(runs)


def leading(comparison: Comparison) -> Contrast:
    return comparison.primary[0]


def test_endpoints_of_two_arms_of_three_seeds(pair_of_arms: Comparison) -> None:
    item = leading(pair_of_arms)
    assert (item.arm, item.baseline, item.seeds, item.paired) == ("NF4", "bf16", (3, 3), True)
    assert (len(pair_of_arms.contrasts), pair_of_arms.arms) == (1, ["bf16", "NF4"])
    memory = item["memory"]  # a ratio
    assert (memory.arm, memory.baseline, memory.word) == (6.5 * GIB, 14.5 * GIB, "better")
    assert memory.difference == pytest.approx(6.5 / 14.5 - 1)
    assert memory.low == memory.high == memory.difference
    time = item["time"]  # paired by step: 80 steps after 3, in tens
    assert (time.n, time.word) == (8, "worse")
    assert time.difference == pytest.approx(0.1)
    loss = item["eval_loss"]  # paired by conversation and seed
    assert (loss.n, loss.word) == (30, "worse")
    assert loss.difference == pytest.approx(0.05)
    assert loss.stderr == pytest.approx(0, abs=1e-12)
    assert loss.baseline == pytest.approx(sum(NLL) / sum(TOKENS) + 0.001)
    assert item["loss_before"].difference == pytest.approx(0.2)
    # The 2×2 on loss: training gains more where quantising had cost something.
    assert item["loss_change"].difference == pytest.approx(0.05 - 0.2)
    assert item["loss_change"].word == "better"
    assert "75%" in pair_of_arms.verdict


def test_intervals_of_answers_are_welchs(pair_of_arms: Comparison) -> None:
    frames = pair_of_arms.answers()
    assert list(frames.columns[-4:]) == ["run", "arm", "seed", "task"]
    wide = frames.pivot(index="index", columns="run", values="credit")
    arms = [wide[[f"{quant}_{seed}" for seed in range(3)]] for quant in ("nf4", "bf16")]
    change = arms[0].mean(axis=1) - arms[1].mean(axis=1)
    n = len(change)
    parts = [change.var() / n + 1 / n**2, *(arm.mean().var() / 3 for arm in arms)]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (n - 1) + sum(p**2 for p in parts[1:]) / 2)
    accuracy = leading(pair_of_arms)["accuracy"]
    half = stats.t.ppf(0.975, freedom) * math.sqrt(sum(parts))
    assert accuracy.difference == pytest.approx(change.mean())
    assert (accuracy.low, accuracy.high) == pytest.approx(
        (change.mean() - half, change.mean() + half)
    )
    assert accuracy.word == "worse"


def test_one_seed_each_is_about_two_runs(tmp_path: Path) -> None:
    comparison = compare([run(tmp_path, "nf4"), run(tmp_path, "bf16")])
    assert comparison.verdict.startswith("In these two runs, ")
    assert leading(comparison)["accuracy"].freedom is None  # Tango's


def test_swapping_the_baseline_mirrors_every_number(tmp_path: Path) -> None:
    runs = [run(tmp_path, "nf4", s, skill=0.7, loss=0.02, seconds=1.2) for s in (0, 1)]
    runs += [run(tmp_path, "bf16", s) for s in (0, 1)]
    one, other = (leading(compare(runs, baseline=name)) for name in ("bf16", "NF4"))
    for key, endpoint in one.endpoints.items():
        mirror = other[key]
        if endpoint.relative:
            assert 1 + mirror.difference == pytest.approx(1 / (1 + endpoint.difference))
            assert 1 + mirror.low == pytest.approx(1 / (1 + endpoint.high))
        else:
            assert (mirror.difference, mirror.low, mirror.high) == pytest.approx(
                (-endpoint.difference, -endpoint.high, -endpoint.low)
            )
        assert mirror.p == pytest.approx(endpoint.p)
        assert {endpoint.word, mirror.word} in ({"better", "worse"}, {endpoint.word})


OVERLAPPING = {"started": "2026-11-24T08:00:00+00:00", "finished": "2026-11-24T09:00:00+00:00"}


@pytest.mark.parametrize(
    ("first", "both", "reason"),
    [
        ({}, OVERLAPPING, "nf4_0, bf16_0 overlapped"),
        ({"memory__other_processes": 2}, {}, "the GPU of nf4_0 was shared"),
        ({"runtime__resumed": True}, {}, "nf4_0 was resumed from a checkpoint"),
        ({"environment__cpu_threads": 3}, {}, None),
    ],
)
def test_time_needs_the_device_alone(
    tmp_path: Path, first: dict[str, Any], both: dict[str, str], reason: str | None
) -> None:
    runs = [run(tmp_path, "nf4", **first), run(tmp_path, "bf16")]
    for path in runs:
        changed(path / "training_summary.json", lambda record: record.update(both))
    time = leading(compare(runs))["time"]
    assert time.reason == reason
    assert (time.word == "no measurement") == (reason is not None)


def test_intervals_of_many_arms_hold_together(tmp_path: Path) -> None:
    runs = [run(tmp_path, "bf16")]
    for r in (4, 8, 16):
        path = run(tmp_path / str(r), "nf4", skill=0.8)
        changed(path / "training_summary.json", edit("settings/lora_r", r))
        runs.append(path)
    comparison = compare(runs)
    assert [c.arm for c in comparison.primary] == [f"NF4 r {r}" for r in (4, 8, 16)]
    alone = leading(compare(runs[:2]))["nll"]
    together = leading(comparison)["nll"]
    assert together.difference == alone.difference
    assert together.p == pytest.approx(min(1.0, 3 * alone.p))
    freedom = alone.freedom
    ratio = stats.t.ppf(1 - 0.025 / 3, freedom) / stats.t.ppf(0.975, freedom)
    assert together.high - together.difference == pytest.approx(
        ratio * (alone.high - alone.difference)
    )
    assert comparison.besides == ["lora_r"]


def test_chance_comes_first(tmp_path: Path) -> None:
    runs = [run(tmp_path, "nf4", skill=0.0), run(tmp_path, "bf16", skill=1.0)]
    comparison = compare(runs)
    assert {one.arm: one.at_chance for one in comparison.chance} == {"NF4": True, "bf16": False}
    assert comparison.verdict.startswith("NF4 is not shown to beat chance")


def test_tied_letters_share_the_credit(tmp_path: Path) -> None:
    tied = [("law", 1, [-1.0, -1.0, -2.0, -3.0])] * 12 + [("law", 0, [-1.0, -2.0, -2.0, -2.0])] * 8
    clear = [("law", 1, [-1.0, -0.5, -2.0, -3.0])] * 12 + tied[12:]
    runs = [
        write_scored(tmp_path / q, t, training(q), q) for q, t in (("nf4", tied), ("bf16", clear))
    ]
    item = leading(compare(runs))
    assert item["accuracy"].arm == pytest.approx((12 / 2 + 8) / 20)
    assert item.detail.ties == (0.6, 0.0)
    # The first of the tied letters, A, is wrong each time.
    assert item.detail.tie_effect == pytest.approx(-12 / 20 + 12 / 2 / 20)


def test_seeds_alone_are_compared_as_runs(tmp_path: Path) -> None:
    comparison = compare([run(tmp_path, "bf16", seed) for seed in (0, 1)])
    item = leading(comparison)
    assert (item.arm, item.baseline) == ("bf16_1", "bf16_0")


def test_subjects_have_tangos_interval_and_holms_p(pair_of_arms: Comparison) -> None:
    groups = [g for g in leading(pair_of_arms).groups if g.kind == "subject"]
    assert [g.name for g in groups] == [f"subject_{i}" for i in range(8)]
    assert sum(g.n for g in groups) == 400
    assert all(g.low <= g.arm - g.baseline <= g.high for g in groups)


def test_pilot_runs_plan_a_study(tmp_path: Path) -> None:
    runs = [run(tmp_path, quant, seed, skill=1) for quant in ("nf4", "bf16") for seed in (0, 1)]
    text = report(runs, 2.0, None, None)
    item = leading(compare(runs))
    share = (item.detail.won + item.detail.lost) / 400
    assert f"{100 * share:.1f}% of answers differ" in text
