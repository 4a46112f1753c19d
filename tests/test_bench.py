"""Benchmarks: measurement and reports, and end-to-end tests of each suite with small sizes."""

import json
import sys

import pytest
from hydra import compose, initialize_config_dir

from commands import assert_config_error, assert_success
from conftest import tiny_config
from gptlab import bench
from gptlab.benchmarks import speedrun
from gptlab.benchmarks.config import SpeedrunBench
from gptlab.benchmarks.corpus import text_corpus
from gptlab.benchmarks.measuring import (
    Result,
    ResultTable,
    TimedRun,
    Variant,
    measure_in_turns,
    run_timed,
    write_report,
)
from gptlab.config.command import configuration_folder
from gptlab.errors import UserError
from gptlab.exit_codes import DONE
from gptlab.model.config import flops_per_token

SMALL = (
    "rounds=1",
    "preparation.corpus_mb=1",
    "preparation.val_fraction=0.1",
    "loader.batches=3",
    "loader.block_size=64",
    "loader.micro_batch_sizes=[2]",
    "loader.many_tokens=2000000",
)


def test_variants_alternate_and_are_compared_by_their_medians():
    calls = []

    def variant(group, name, values):
        def measure(number):
            calls.append((number, group, name))
            return {"MB/s": values[number]}

        return Variant(group, name, measure)

    variants = [
        variant("a", "plain", [4.0, 1.0, 2.0]),
        variant("a", "ours", [6.0, 5.0, 90.0]),
        variant("b", "plain", [7.0, 7.0, 7.0]),
    ]
    rows = measure_in_turns(variants, 3)
    assert calls == [(n, *variant) for n in range(3) for variant in (("a", "plain"), ("a", "ours"), ("b", "plain"))]
    part = ResultTable("title", "caption", "MB/s", (), rows)
    assert [row.median("MB/s") for row in rows] == [2.0, 6.0, 7.0]
    assert [part.ratio(row) for row in rows] == [1.0, 3.0, 1.0]
    assert [row.shown("MB/s") for row in rows] == ["2.00", "6.00", "7.00"]
    assert rows[1].shown("MB/s", spread=True) == "6.00 (5.00–90.00)"


def test_report_contains_samples_medians_and_ratios(tmp_path):
    rows = [
        Result("", "plain", [{"x": 2.0, "y": 1.0}, {"x": 4.0, "y": 3.0}]),
        Result("", "ours", [{"x": 9.0}, {"x": 6.0}]),
    ]
    path = write_report(tmp_path, "data", 2, [ResultTable("title", "caption", "x", ("y",), rows)])
    report = json.loads(path.read_text())
    assert (path.name, report["suite"], report["rounds"]) == ("data.json", "data", 2)
    first, second = report["parts"][0]["rows"]
    assert (first["medians"], first["ratio"]) == ({"x": 3.0, "y": 2.0}, 1.0)
    assert (second["samples"], second["medians"], second["ratio"]) == ([{"x": 9.0}, {"x": 6.0}], {"x": 7.5}, 2.5)
    assert rows[1].shown("y") == "–"


def test_failed_process_raises_with_its_exit_code_and_output():
    assert run_timed("-c", "print(7)").printed == "7\n"
    with pytest.raises(UserError, match=r"exit code 3:\nno"):
        run_timed("-c", "import sys; print('no', file=sys.stderr); sys.exit(3)")


def test_corpus_repeats_only_when_there_is_no_more_text(tmp_path, monkeypatch):
    root = tmp_path / "root"
    root.mkdir()
    for name, text in {"a.py": "a" * 300_000, "b.txt": "é" * 150_000, "same.md": "a" * 300_000, "c.bin": "c"}.items():
        (root / name).write_text(text)
    monkeypatch.setattr("gptlab.benchmarks.corpus._roots", lambda: [root])
    corpus = text_corpus(tmp_path, 1)
    texts = [json.loads(line)["text"] for line in corpus.path.read_text().splitlines()]
    assert len(texts) == corpus.documents == 4
    assert sorted(texts[:2]) == sorted(texts[2:]) == ["a" * 300_000, "é" * 150_000]
    assert (corpus.bytes, corpus.distinct) == (1_200_000, 600_000)
    written = corpus.path.stat().st_mtime_ns
    assert text_corpus(tmp_path, 1) == corpus
    assert corpus.path.stat().st_mtime_ns == written


@pytest.mark.slow
def test_data_suite_compares_the_same_tokens(user):
    done = user.python("gptlab.bench", *SMALL, "out=measured")
    assert_success(done)
    assert done.stdout.endswith("Results: measured/data.json\n")
    assert (user.folder / "measured" / "environment.json").exists()
    report = json.loads((user.folder / "measured" / "data.json").read_text())
    preparation, loader = report["parts"]
    names = [row["name"] for row in preparation["rows"]]
    assert names == ["nanoGPT", "gptlab, tiktoken", "gptlab, gigatoken"]
    assert len({row["medians"]["tokens"] for row in preparation["rows"]}) == 1
    assert [row["name"] for row in loader["rows"]] == ["nanoGPT", "gptlab"] * 2
    assert len({row["group"] for row in loader["rows"]}) == 2
    for part in report["parts"]:
        for number, row in enumerate(part["rows"]):
            baseline = part["rows"][number - number % 2 if part is loader else 0]
            metric = part["metric"]
            assert row["medians"][metric] > 0
            assert row["ratio"] == pytest.approx(row["medians"][metric] / baseline["medians"][metric])
    # only the corpus is kept
    kept = {path.name for path in (user.folder / "cache" / "bench").iterdir()}
    assert kept == {"text-1MB.jsonl", "text-1MB.json"}


@pytest.mark.slow
def test_guards_suite_measures_steps_with_and_without_guards(user):
    tiny = ("guards.steps=20", "guards.model.n_layer=1", "guards.model.n_embd=16", "guards.model.block_size=8")
    done = user.python("gptlab.bench", "suite=guards", "rounds=2", *tiny, "out=measured")
    assert_success(done)
    (part,) = json.loads((user.folder / "measured" / "guards.json").read_text())["parts"]
    without, guarded = part["rows"]
    for row in (without, guarded):
        assert row["medians"]["steps/s"] > 0
        assert row["medians"]["CPU ms"] > 0
    assert guarded["ratio"] == pytest.approx(guarded["medians"]["steps/s"] / without["medians"]["steps/s"])
    for plain, sample in zip(without["samples"], guarded["samples"], strict=True):
        assert sample["% more ms"] == pytest.approx(100 * (sample["ms"] / plain["ms"] - 1))
        assert sample["% more CPU ms"] == pytest.approx(100 * (sample["CPU ms"] / plain["CPU ms"] - 1))


@pytest.mark.slow
def test_overhead_suite_measures_a_run_and_a_bare_loop_with_equal_losses(user):
    run = "data=text data.source=text.txt model=tiny model.n_layer=1 model.block_size=16 train.global_batch_size=4"
    runs = {
        "characters": run,
        "characters_large": f"{run} train.micro_batch_size=2 train.compile=true trainer.precision=bf16-mixed",
    }
    arguments = [f"""overhead.{name}.arguments=['{"','".join(run.split())}']""" for name, run in runs.items()]
    few = [f"overhead.{name}.turns=2" for name in runs]
    assert_success(
        user.python("gptlab.bench", "suite=overhead", "rounds=2", *arguments, *few, "out=measured", timeout=600)
    )
    parts = json.loads((user.folder / "measured" / "overhead.json").read_text())["parts"]
    assert len(parts) == 2
    for part in parts:
        bare, whole = part["rows"]
        assert whole["ratio"] == pytest.approx(whole["medians"]["steps/s"] / bare["medians"]["steps/s"])
        for plain, sample in zip(bare["samples"], whole["samples"], strict=True):
            assert sample["loss"] == plain["loss"]  # bit-identical: the same steps
            assert sample["% more ms"] == pytest.approx(100 * (sample["ms"] / plain["ms"] - 1))
    losses = [part["rows"][0]["medians"]["loss"] for part in parts]
    # the same run with a different micro-batch size and precision
    assert losses == pytest.approx([losses[0]] * 2, rel=2e-2)
    assert losses[0] < 5  # it has learned: log(257) is 5.5


def test_suite_all_writes_one_report_per_suite(user, monkeypatch):
    parts = {
        suite: [ResultTable(suite, "caption", "x", (), [Result("", "plain", [{"x": 1.0}])])] for suite in bench.ALL
    }
    monkeypatch.setattr(bench, "_measure", lambda suite, config: iter(parts[suite]))
    with initialize_config_dir(str(configuration_folder()), version_base="1.3"):
        values = compose("bench", ["suite=all", f"out='{user.folder}/out'"])
    task = bench.main.__wrapped__  # without the command line
    assert task(values) == DONE
    reports = {path.stem: json.loads(path.read_text()) for path in user.folder.glob("out/*.json")}
    assert set(reports) == {*bench.ALL, "environment"}
    assert [reports[suite]["parts"][0]["title"] for suite in bench.ALL] == list(bench.ALL)


@pytest.mark.slow
def test_train_suite_optimizations_do_not_change_the_loss(user):
    parts = ("characters", "characters_large", "gpt2", "memory")
    shape = ["n_layer=1", "n_embd=32", "n_head=2", "block_size=16", "vocab_size=300", "pad_vocab_to_multiple_of=1"]
    tiny = [f"train.{part}.model.{value}" for part in parts for value in shape]
    few = [f"train.{part}.{value}" for part in parts for value in ("steps=1", "batch_size=2")]
    done = user.python("gptlab.bench", "suite=train", "rounds=1", *tiny, *few, "out=measured", timeout=600)
    assert_success(done)
    *models, memory = json.loads((user.folder / "measured" / "train.json").read_text())["parts"]
    for part in (*models, memory):
        losses = [row["medians"]["loss"] for row in part["rows"]]
        shape = {"n_layer": 1, "n_embd": 32, "n_head": 2, "block_size": 16, "vocab_size": 300}
        config = tiny_config(**shape, bias="character" not in part["title"].lower())
        tolerance = 1e-5 if part["title"].startswith("Small") else 1e-3  # the others use bfloat16
        assert losses == pytest.approx([losses[0]] * len(losses), rel=tolerance)
        for row in part["rows"]:
            found = row["medians"]
            flops = found["% of ceiling"] / 100 * found["ceiling GFLOP/s"] * 1e9 / found["tokens/s"]
            assert flops == pytest.approx(flops_per_token(config), rel=1e-6)
    assert [row["name"] for row in memory["rows"]] == [
        "full logits",
        "chunked logits",
        "compiled, full logits",
        "compiled, chunked logits",
    ]


@pytest.mark.slow
def test_generate_suite_measures_every_variant(user):
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 64, "vocab_size": 500}
    tiny = [f"generate.model.{name}={value}" for name, value in sizes.items()]
    assert_success(
        user.python("gptlab.bench", "suite=generate", "rounds=1", "generate.tokens=20", *tiny, "out=measured")
    )
    (part,) = json.loads((user.folder / "measured" / "generate.json").read_text())["parts"]
    assert len(part["rows"]) == 10
    for row in part["rows"]:
        medians = row["medians"]
        assert medians["tokens/s"] > 0
        if not row["name"].startswith("recomputed"):
            assert medians["%"] == pytest.approx(100 * medians["GB/s"] / medians["memory GB/s"])


METRICS = """step,tokens,train/loss,tokens_per_second,val/loss
1,100,4.0,50.0,
10,1000,3.0,100.0,
20,2000,2.5,200.0,
20,2000,,,2.4
30,3000,2.1,400.0,
30,3000,,,{loss}
"""


@pytest.fixture
def fake_runs(monkeypatch):
    """Replaces runs by fake ones that write METRICS, with a loss that depends on the seed; returns their arguments."""
    requested = []

    def timed(*arguments, environment=None, folder=None):
        requested.append(arguments)
        if folder is not None:
            seed = int(next(a for a in arguments if a.startswith("seed=")).removeprefix("seed="))
            (folder / "outputs/name/time").mkdir(parents=True)
            (folder / "outputs/name/time/metrics.csv").write_text(METRICS.format(loss=2.0 + seed / 100))
        return TimedRun(30.0, "")

    monkeypatch.setattr(speedrun, "run_timed", timed)
    return requested


def test_speedrun_reports_the_fraction_of_runs_that_reach_the_target(fake_runs):
    config = SpeedrunBench(source="x.txt", nanogpt=None, target=2.02, parts=[])
    (part,) = speedrun.time_to_loss(config, "cache", 3)
    assert fake_runs[0][:2] == ("-m", "gptlab.prepare")
    assert [[a for a in requested if a.startswith("seed=")] for requested in fake_runs[1:]] == [
        [f"seed={seed}"] for seed in (1, 1, 2, 2, 3, 3)
    ]
    for row in part.rows:
        assert [sample["val loss"] for sample in row.samples] == [2.01, 2.02, 2.03]
        assert (row.median("reached"), row.median("seconds"), row.median("runs/min")) == (pytest.approx(2 / 3), 30, 2)


def test_ladder_reports_steps_and_seconds_to_the_target(fake_runs):
    config = SpeedrunBench(source=None, nanogpt=None, target=2.4, parts=["rotary"])
    (part,) = speedrun.ladder(config, "cache", 2)
    assert [row.name for row in part.rows] == ["full recipe", "without rotary"]
    assert {a for requested in fake_runs[1:] for a in requested if a.startswith("without=")} == {
        "without=nothing",
        "without=rotary",
    }
    for row in part.rows:
        assert row.median("steps to it") == 20
        assert row.median("s to it") == pytest.approx(100 / 50 + 900 / 100 + 1000 / 200)
    late = SpeedrunBench(source=None, nanogpt=None, target=2.015, parts=[])
    (part,) = speedrun.ladder(late, "cache", 2)  # the second seed does not reach it
    assert part.rows[0].shown("steps to it") == "–"
    assert "steps to it" not in part.record()["rows"][0]["medians"]


def test_ladder_omits_every_part_of_the_recipe(fake_runs):
    config = SpeedrunBench(source=None, nanogpt=None, target=2.4, parts=None)
    (part,) = speedrun.ladder(config, "cache", 1)
    options = {path.stem for path in (configuration_folder() / "without").glob("*.yaml")}
    requested = [a.removeprefix("without=") for arguments in fake_runs for a in arguments if a.startswith("without=")]
    assert requested[0] == "nothing"
    assert sorted(requested) == sorted(options)
    assert [row.name for row in part.rows] == [
        "full recipe",
        *(f"without {a.replace('_', ' ')}" for a in requested[1:]),
    ]


@pytest.mark.slow
def test_plan_suite_forecasts_memory_and_checkpoints_within_its_limits(user):
    few = ("rounds=1", "plan.steps=3", "plan.only=['all of these',LoRA]")
    # in new processes: forks would start with the memory and the malloc settings of their parent
    assert_success(user.run(sys.executable, "-m", "gptlab.bench", "suite=plan", *few, "out=measured", timeout=900))
    (part,) = json.loads((user.folder / "measured" / "plan.json").read_text())["parts"]
    assert [row["name"] for row in part["rows"]] == ["baseline", "all of these", "LoRA"]
    for row in part["rows"]:
        (sample,) = row["samples"]
        assert 0.95 < sample["memory ratio"] < 1.03, row
        assert 0.99 < sample["checkpoint ratio"] < 1.01, row
        assert sample["time ratio"] > 0
    plain, _, lora = (row["samples"][0] for row in part["rows"])
    assert lora["checkpoint MB"] < 0.5 * plain["checkpoint MB"]


CONFIG_ERRORS = {
    "an unknown suite": (
        ["suite=dat"],
        "suite='dat' is not valid: it should be 'train', 'generate', 'data', 'overhead', 'guards', 'speedrun'",
    ),
    "an unknown key": (
        ["preparation.corpus=1"],
        "Unknown config key `preparation.corpus`. Did you mean preparation.corpus_mb?",
    ),
    "no text": (["suite=ladder", "speedrun.source=nothing.txt"], "nothing.txt"),
    "an unknown variant": (["suite=plan", "plan.only=[Mun]"], "plan.only=Mun is not a variant. Did you mean Muon?"),
    "no nanoGPT": (
        ["suite=speedrun", "speedrun.source=text.txt", "speedrun.nanogpt=."],
        "is not a checkout of nanoGPT with data/shakespeare_char/train.bin",
    ),
    "no room": (["preparation.corpus_mb=1000000000"], "preparation.corpus_mb=1000000000 needs"),
    "no folder": (["cache_dir=text.txt"], "cache_dir=text.txt cannot be used"),
}


def test_invalid_config_imports_no_torch(user):
    code = """
import sys
sys.argv[1:] = ["suite=dat"]
from gptlab.bench import main
try:
    main()
except SystemExit as end:
    print(end.code, "torch" in sys.modules, "lightning" in sys.modules)
"""
    assert user.run(sys.executable, "-c", code).stdout == "2 False False\n"


@pytest.mark.parametrize(("arguments", "message"), CONFIG_ERRORS.values(), ids=CONFIG_ERRORS)
def test_config_errors_name_the_key(user, arguments, message):
    assert_config_error(user.python("gptlab.bench", *arguments), message)
    assert not (user.folder / "outputs").exists()


def test_a_failed_process_is_reported_by_its_last_line_without_a_traceback():
    with pytest.raises(UserError) as error:
        run_timed("-c", "raise OSError('no network')")
    assert str(error.value).splitlines()[1:] == ["OSError: no network"]
