"""Results of sweeps, from sweep directories with hand-written values."""

import csv
import json
import math
import re

import pytest
import rich

from gptlab.errors import UserError
from gptlab.sweeps.analysis.phrases import plus_minus
from gptlab.sweeps.analysis.report import print_answers, report_sweep
from gptlab.sweeps.analysis.table import SweepAnswers, analyze_sweep
from sweep_directories import trial, write_model, write_sweep

LR = "optimizer.lr"
# seeds 1, 2, 3; differences to the baseline 1e-3: -0.3, -0.3, -0.36; 0.1, -0.1, 0.3; 1.0, 1.1, 0.9
ROUNDING = 0.02**2 / 6  # variance of the rounding error of a difference: all values are multiples of 0.02
VALUES = {"1e-3": (2.0, 2.1, 2.2), "2e-3": (1.7, 1.8, 1.84), "4e-3": (2.1, 2.0, 2.5), "8e-3": (3.0, 3.2, 3.1)}
BASELINE = {LR: 0.001}


def trials_of(values):
    return [
        trial({LR: lr, "seed": seed}, value)
        for lr, of_seeds in values.items()
        for seed, value in enumerate(of_seeds, 1)
    ]


@pytest.fixture
def console():
    """A terminal that is wide enough for the whole table."""
    width = rich.get_console().width
    rich.reconfigure(width=300)
    yield
    rich.reconfigure(width=width)


def test_answer_table_matches_hand_computed_statistics(tmp_path):
    found = analyze_sweep(write_sweep(tmp_path, trials_of(VALUES), BASELINE))
    assert [row.settings[LR] for row in found.rows] == ["2e-3", "1e-3", "4e-3", "8e-3"]  # the lowest mean first
    best, baseline, other, worst = found.rows
    assert (best.n, best.values) == (3, {"1": 1.7, "2": 1.8, "3": 1.84})
    assert best.mean == pytest.approx(5.34 / 3)
    se = math.sqrt(((4 + 4 + 16) * 1e-4 / 2 + ROUNDING) / 3), math.sqrt((0.1**2 + ROUNDING) / 3)
    assert (best.difference, best.difference_se) == pytest.approx((-0.32, se[0]))
    assert (best.comparison, best.compared, best.is_baseline) == ("paired", 3, False)
    assert (baseline.verdict, baseline.is_baseline, baseline.difference) == ("baseline", True, None)
    assert (worst.difference, worst.difference_se) == pytest.approx((1.0, se[1]))
    assert best.verdict == "better by 0.320 ± 0.021 nats (3 seeds)"
    assert other.verdict == "not significant (p = 0.48)"
    assert worst.verdict == "worse by 1.000 ± 0.058 nats (3 seeds)"
    # with two degrees of freedom, p = 1 - t / sqrt(t² + 2)
    p = [1 - t / (t * t + 2) ** 0.5 for t in (1 / se[1], 0.32 / se[0])]
    assert (worst.p, best.p) == pytest.approx(p)
    assert (worst.p_holm, best.p_holm) == pytest.approx((3 * p[0], max(2 * p[1], 3 * p[0])))
    assert found.answer == (
        "best: optimizer.lr=2e-3, 1.780 ± 0.042 nats; "
        "better than the baseline (optimizer.lr=1e-3) by 0.320 ± 0.021 nats"
    )
    assert (found.comparisons, found.keys, found.notes) == (3, [LR], [])


def test_best_point_is_compared_with_the_second_best(tmp_path):
    values = {"1": (2.0, 2.1, 2.2), "2": (1.7, 1.8, 1.84), "3": (1.71, 1.79, 1.86)}
    found = analyze_sweep(write_sweep(tmp_path / "near", trials_of(values), {LR: 1}))
    assert "nats; no significant difference from the second best (optimizer.lr=3): p = 0." in found.answer
    assert found.comparisons == 3  # two with the baseline, one between the best two
    values = {"1": (2.0, 2.1, 2.2), "2": (1.0, 1.1, 1.21), "3": (1.5, 1.601, 1.699)}
    found = analyze_sweep(write_sweep(tmp_path / "far", trials_of(values), {LR: 1}))
    assert found.answer.endswith("; better than the second best (optimizer.lr=3) by 0.4967 ± 0.0039 nats")


def test_answer_says_that_the_baseline_is_best(tmp_path):
    values = {"1": (1.0, 1.1, 1.2), "2": (1.5, 1.6, 1.71), "3": (2.0, 2.2, 2.1)}
    found = analyze_sweep(write_sweep(tmp_path / "far", trials_of(values)))  # the baseline is the first point
    assert found.answer == (
        "best: optimizer.lr=1, the baseline, 1.100 ± 0.058 nats; "
        "better than the second best (optimizer.lr=2) by 0.5033 ± 0.0041 nats"
    )
    assert found.comparisons == 2
    near = analyze_sweep(write_sweep(tmp_path / "near", trials_of(values | {"2": (0.9, 1.2, 1.3)})))
    assert "nats; no significant difference from the second best (optimizer.lr=2): p = 0." in near.answer


def test_identical_runs_have_no_significant_difference(tmp_path):
    same = {"1": (2.0, 2.1), "2": (2.0, 2.1)}
    found = analyze_sweep(write_sweep(tmp_path, trials_of(same)))
    assert [row.verdict for row in found.rows] == ["baseline", "not significant (p = 1)"]
    assert (found.rows[1].difference, found.rows[1].p) == (0, 1)
    assert found.answer == "no best: optimizer.lr=1 and optimizer.lr=2 have the same mean"


def test_one_seed_has_no_standard_error_and_no_significance(tmp_path):
    found = analyze_sweep(write_sweep(tmp_path, trials_of({"1": (2.0,), "2": (1.5,)})))
    assert [row.verdict for row in found.rows] == ["one seed, significance unknown", "baseline"]
    assert (found.rows[0].difference, found.rows[0].difference_se, found.comparisons) == (-0.5, None, 0)
    assert found.answer == "best: optimizer.lr=2, 1.5000 nats; one seed, significance unknown: more seeds are needed"


def test_sweep_over_seeds_reports_their_standard_deviation(tmp_path):
    found = analyze_sweep(write_sweep(tmp_path, [trial({"seed": s}, value) for s, value in enumerate((1.0, 2.0, 6.0))]))
    assert found.answer == "3.0 ± 1.5 nats over 3 seeds, standard deviation 2.6 nats"
    assert (found.keys, found.rows[0].settings, found.rows[0].verdict) == ([], {}, "")


def test_failed_trials_are_excluded_and_counted(tmp_path):
    trials = trials_of(VALUES)
    trials[4] |= {"state": "failed", "value": None, "message": "out of memory"}
    trials[7] |= {"value": None}  # finished without a value
    trials[8] |= {"state": "diverged", "value": 0.1}  # its earlier value does not count
    for number, state in {9: "mistaken", 10: "config_error", 11: "config_error"}.items():  # 9: its former name
        trials[number] |= {"state": state, "value": None}
    found = analyze_sweep(write_sweep(tmp_path, trials, BASELINE))
    rows = {row.settings[LR]: row for row in found.rows}
    assert (rows["2e-3"].n, rows["2e-3"].failed, rows["2e-3"].compared) == (2, 1, 2)
    assert rows["2e-3"].difference == pytest.approx(-0.33)  # over the common seeds
    assert (rows["4e-3"].n, rows["4e-3"].failed, rows["4e-3"].verdict) == (1, 2, "one seed, significance unknown")
    assert (rows["8e-3"].n, rows["8e-3"].mean, rows["8e-3"].verdict) == (0, None, "3 failed")
    assert found.rows[-1] is rows["8e-3"]
    assert found.notes[0].startswith("The best optimizer.lr is the smallest value")
    assert found.notes[1] == "Trial 4 (optimizer.lr=2e-3 seed=2) is excluded, state failed: out of memory"
    assert found.notes[2] == "Trial 7 (optimizer.lr=4e-3 seed=2) is excluded, state done: val/loss has no finite value"
    assert len(found.notes) == 7


def test_points_that_lost_many_trials_are_not_best(tmp_path):
    values = {"1": range(20, 30), "2": range(10, 20), "4": [v + (v % 3) / 10 for v in range(8, 18)]}
    trials = trials_of(values)
    for number in (17, 18, 19):  # three of ten trials of optimizer.lr=2, of which one would be allowed
        trials[number] |= {"state": "pruned" if number == 17 else "diverged", "value": None}
    trials[20] |= {"state": "failed", "value": None}
    found = analyze_sweep(write_sweep(tmp_path, trials))
    best, _, left_out = found.rows
    assert [row.settings[LR] for row in found.rows] == ["4", "1", "2"]
    assert best.verdict == "better by 11.900 ± 0.032 nats (9 common seeds)"  # differences of -12, -11.9 and -11.8
    assert left_out.verdict == "not comparable: 2 of 10 trials failed, 1 of 10 trials pruned"
    assert found.answer.startswith("best: optimizer.lr=4, 13.10 ± 0.92 nats (1 of 10 trials failed); better than the")
    assert found.answer.endswith("; not ranked: optimizer.lr=2 (2 of 10 trials failed, 1 of 10 trials pruned)")
    for trial_of_point in (trials[:2], trials[20:22]):
        for lost in trial_of_point:
            lost |= {"state": "failed", "value": None}
    found = analyze_sweep(write_sweep(tmp_path / "all", trials))
    assert found.answer.startswith("no best: more than 10% of the trials of every point are lost: optimizer.lr=")


def test_points_are_ranked_by_means_that_are_adjusted_for_the_seeds(tmp_path):
    """The trial that lacks a value has the seed with the lowest loss; its point has the lower losses in all others."""
    seeds = [2.0 + seed for seed in range(10)]
    trials = trials_of({"1": [s + 0.01 * (s % 3) for s in seeds], "2": [s - 0.1 for s in seeds]})
    trials[10] |= {"state": "failed", "value": None}
    found = analyze_sweep(write_sweep(tmp_path, trials))
    assert found.rows[0].settings[LR] == "2"
    assert found.rows[0].mean > found.rows[1].mean
    assert found.answer.startswith("best: optimizer.lr=2")


def test_no_point_is_best_if_common_seeds_contradict_the_means(tmp_path):
    """Of points 1 and 2, the second has the lower adjusted mean, but the first is better on their eight seeds."""
    values = {
        "1": [2.1, 1.2, 1.0, 2.1, 1.1, 3.1, 4.0, 3.1, 3.2, 1.0],
        "2": [2.2, 1.1, 1.2, 2.1, 1.1, 3.0, 4.1, 3.0, 3.2, 1.0],
        "3": [2.1, 1.2, 1.2, 2.1, 1.0, 3.1, 4.2, 3.0, 3.0, 1.2],
    }
    trials = trials_of(values)
    for number in (9, 18):  # the last seed of 1, and the last but one of 2
        trials[number] |= {"state": "failed", "value": None}
    found = analyze_sweep(write_sweep(tmp_path, trials))
    assert [row.settings[LR] for row in found.rows] == ["2", "1", "3"]
    assert found.rows[0].difference == pytest.approx(0.0125)  # 0.1 / 8
    assert found.answer == (
        "no best: optimizer.lr=2 has the best mean, but the baseline (optimizer.lr=1) is better on the seeds that "
        "both have"
    )


def test_points_without_common_seeds_have_no_best(tmp_path):
    trials = [trial({LR: lr, "seed": 10 * lr + seed}, lr + seed / 10 + lr / 77) for lr in (1, 2) for seed in (1, 2, 3)]
    found = analyze_sweep(write_sweep(tmp_path, trials))
    assert found.answer == "no best: the points have too few seeds in common"
    assert "unpaired" in found.rows[1].verdict


def test_failed_seeds_of_a_single_point_are_named(tmp_path):
    trials = [trial({"seed": seed}, value) for seed, value in enumerate((1.0, 2.0, 6.0, None))]
    trials[3] |= {"state": "diverged"}
    found = analyze_sweep(write_sweep(tmp_path, trials))
    assert found.answer == "3.0 ± 1.5 nats over 3 seeds, standard deviation 2.6 nats (1 of 4 trials failed)"


def test_a_sweep_of_an_earlier_version_has_the_direction_of_its_metric(tmp_path):
    write_sweep(tmp_path, [trial({LR: lr}, value) for lr, value in (("1", 0.25), ("2", 0.5))])
    definition = json.loads((tmp_path / "sweep.json").read_text())
    (tmp_path / "sweep.json").write_text(json.dumps(definition | {"metric": "hellaswag/acc"}))
    assert analyze_sweep(tmp_path).answer.startswith("best: optimizer.lr=2, 0.5000")


def test_pruned_trials_never_win(tmp_path):
    trials = trials_of({"1": (2.0, 2.1), "2": (0.5, 0.4)})
    for number in (2, 3):
        trials[number] |= {"state": "pruned"}
    found = analyze_sweep(write_sweep(tmp_path, trials))
    assert [(row.settings[LR], row.pruned, row.verdict) for row in found.rows] == [
        ("1", 0, "baseline"),
        ("2", 2, "2 pruned"),
    ]
    assert found.rows[1].mean is None
    assert found.answer.startswith("best: optimizer.lr=1, the baseline")


def test_unfinished_sweep_reports_the_best_so_far(tmp_path):
    trials = trials_of({"1": (2.0, 2.1), "2": (1.5, 1.4)})
    trials[3] |= {"state": "running", "value": 1.2}
    found = analyze_sweep(write_sweep(tmp_path / "some", trials))
    assert found.answer.startswith("best so far: optimizer.lr=2, 1.5000 nats")
    assert (found.rows[0].unfinished, found.rows[0].n) == (1, 1)
    begun = analyze_sweep(write_sweep(tmp_path / "begun", trials_of({"1": (2.0, 2.1), "2": (1.5, 1.4)}), missing=2))
    assert begun.answer.startswith("best so far: optimizer.lr=2, 1.450 ± 0.050 nats")
    waiting = [t | {"state": "waiting", "value": None} for t in trials]
    assert analyze_sweep(write_sweep(tmp_path / "none", waiting)).answer == "no trial has a value: 4 unfinished"
    assert analyze_sweep(write_sweep(tmp_path / "empty", [])).answer == "no trial has a value: none was started"


def test_missing_baseline_or_baseline_value_is_reported(tmp_path):
    trials = trials_of({"1": (2.0, 2.1), "2": (1.5, 1.4), "3": (1.6, 1.4)})
    other = analyze_sweep(write_sweep(tmp_path / "other", trials, {LR: 9}))
    assert other.notes == ["The baseline optimizer.lr=9 is not a point of this sweep. No point is compared with it."]
    assert {row.verdict for row in other.rows} == {""}
    assert "nats; no significant difference from the second best (optimizer.lr=3): p = 0." in other.answer
    failed = [t | {"state": "failed"} if t["overrides"][LR] == "1" else t for t in trials]
    found = analyze_sweep(write_sweep(tmp_path / "failed", failed, {LR: 1}))
    assert found.notes[0] == "The baseline optimizer.lr=1 has no value. No point is compared with it."


@pytest.mark.parametrize(("named", "there"), [(0.001, "1.0e-3"), ("True", "true"), ("None", "null"), ("muon", "muon")])
def test_baseline_is_found_in_any_notation_of_its_value(tmp_path, named, there):
    trials = [trial({"x": "other"}, 1.0), trial({"x": there}, 2.0)]
    assert [row.is_baseline for row in analyze_sweep(write_sweep(tmp_path, trials, {"x": named})).rows] == [False, True]


def test_directory_without_a_sweep_raises(tmp_path):
    with pytest.raises(UserError, match=r"is not the directory of a sweep.* sweep\.json"):
        analyze_sweep(tmp_path)


def test_csv_and_json_contain_the_printed_table(tmp_path, capsys, console):
    trials = trials_of(VALUES)
    trials[4] |= {"state": "failed", "message": "out of memory"}
    write_sweep(tmp_path, trials, BASELINE)
    for number, (predicted, mine) in enumerate([(10, 12), (20, 20)]):
        time = {"forecast": predicted, "measured": mine, "ratio": mine / predicted}
        score = {"score": {"seconds": time, "parameters": {"ratio": None}, "device": "cpu"}}
        (tmp_path / str(number) / "forecast.json").write_text(json.dumps(score))
    found = report_sweep(tmp_path)
    assert SweepAnswers.model_validate_json((tmp_path / "answers.json").read_text()) == found
    with (tmp_path / "answers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row[LR] for row in rows] == ["1e-3", "4e-3", "8e-3", "2e-3"]  # 2e-3 is not ranked
    assert float(rows[3]["difference"]) == pytest.approx(-0.33)
    assert [row["verdict"] for row in rows] == [row.verdict for row in found.rows]
    assert (rows[3]["failed"], rows[0]["difference"]) == ("1", "")
    assert (rows[0]["forecast.seconds.forecast"], rows[0]["forecast.seconds.measured"]) == ("15.0", "16.0")
    assert (rows[3]["forecast.seconds.forecast"], "forecast.device" in rows[3]) == ("", False)
    printed = capsys.readouterr().out
    for text in (
        "Which is best?",
        found.answer,
        found.notes[0],
        *(row.verdict.partition(" by ")[0] for row in found.rows),
    ):
        assert text in printed
    assert re.search(r"2e-3 +│? *2 +│? *1\.770 ± 0\.070", printed)
    assert "corrected for 3 comparisons" in printed
    assert "time / forecast" in printed
    assert re.search(r"1e-3 .* 1\.10 +baseline", printed)  # the mean of 1.2 and 1


def test_table_shows_parameters_of_models_of_different_sizes(tmp_path, capsys, console):
    write_sweep(tmp_path, [trial({"model.n_layer": n}, 1.0) for n in (2, 4)])
    for number, layers in enumerate((2, 4)):
        write_model(tmp_path / str(number), n_layer=layers)
    found = analyze_sweep(tmp_path)
    # 61 + 16 embeddings of 32, a norm of 64; a block: two norms, 12 · 32² weights, 9 · 32 biases
    assert [row.parameters for row in found.rows] == [77 * 32 + 64 + n * (128 + 12 * 1024 + 288) for n in (2, 4)]
    print_answers(found)
    assert "27,936" in capsys.readouterr().out


def test_narrow_terminal_shows_every_result_in_full(tmp_path, capsys, console):
    found = analyze_sweep(write_sweep(tmp_path, trials_of(VALUES), BASELINE))
    rich.reconfigure(width=80)
    print_answers(found)
    lines = capsys.readouterr().out.splitlines()
    for row in found.rows:
        difference = plus_minus(row.difference, row.difference_se) if row.difference is not None else "baseline"
        assert any(
            {row.settings[LR], row.verdict.split()[0]} <= {*line.split()} and difference in line for line in lines
        )
    assert max(map(len, lines)) <= 80


def test_standard_error_determines_the_number_of_digits():
    assert plus_minus(1.643211, 0.00214) == "1.6432 ± 0.0021"
    assert plus_minus(1.643211, 0.012) == "1.643 ± 0.012"
    assert plus_minus(123.4, 12) == "123 ± 12"
    assert plus_minus(1.0, 0.0) == "1.0000 ± 0.0000"
    assert plus_minus(1.0, 1e-12) == "1.000000 ± 0.000000"
    assert plus_minus(1.0, None) == "1.0000"


def test_best_value_at_the_edge_of_the_grid_is_noted(tmp_path):
    def notes(name: str, key: str, **values: float) -> list[str]:
        runs = [trial({key: setting.replace("_", "."), "seed": 1}, value) for setting, value in values.items()]
        return analyze_sweep(write_sweep(tmp_path / name, runs)).notes[:1]

    largest = notes("largest", LR, **{"1e-3": 3.0, "2e-3": 2.0, "1e-2": 1.5})
    assert largest == [
        "The best optimizer.lr is the largest value that was tried (1e-2). A larger value may be better."
    ]
    smallest = notes("smallest", LR, **{"1e-3": 1.0, "2e-3": 2.0, "1e-2": 3.5})
    assert smallest == [
        "The best optimizer.lr is the smallest value that was tried (1e-3). A smaller value may be better."
    ]
    within = notes("within", LR, **{"1e-3": 3.0, "2e-3": 2.0, "1e-2": 3.5})
    two = notes("two", LR, **{"1e-3": 3.0, "2e-3": 2.0})
    words = notes("words", "schedule", cosine=3.0, linear=2.0, wsd=1.0)
    sizes = notes("sizes", "model.n_layer", **{"1": 3.0, "2": 2.0, "3": 1.0})
    assert not any("was tried" in note for note in (*within, *two, *words, *sizes))
    failed = [
        trial({LR: lr}, value, "done" if value else "failed") for lr, value in ((1, 3.0), (2, 2.0), (3, 1.0), (4, None))
    ]
    assert not any("was tried" in note for note in analyze_sweep(write_sweep(tmp_path / "failed", failed)).notes)
