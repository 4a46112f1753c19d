"""The evaluate command and HellaSwag during training: results, files and errors."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml

from commands import assert_config_error, assert_success, metrics, weights
from configs import resolved
from conftest import tiny_config
from gptlab.data.tokenizers.tokenizer import BPETokenizer, BytesTokenizer, CharactersTokenizer, Tokenizer
from gptlab.errors import UserError
from gptlab.evaluation.hellaswag import Example, read_examples
from gptlab.evaluators.corpora import open_scored_corpus
from gptlab.evaluators.evaluator import EvalContext, evaluate_corpus, evaluate_hellaswag
from gptlab.evaluators.settings import EvaluateConfig, check_request
from gptlab.launch.launcher import preflight
from gptlab.launch.train_run import build_metrics_callback, build_trainer
from gptlab.model.config import GPTConfig
from gptlab.model.gpt import GPT
from gptlab.pretrained.source import ModelSource, open_model_source
from gptlab.pretrained.weights import load_model
from gptlab.training.callbacks.hellaswag import HellaSwag
from gptlab.training.config import HellaSwagConfig
from gptlab.training.devices import choose_devices
from preparing import data_config, prepare_text, text_values

UNSET = ("windows", "stride", "task_dir", "num_fewshot", "cache", "hellaswag", "limit", "batch_size", "out")
ONE_PROCESS = EvalContext(torch.device("cpu"), "float32", rank=0, world_size=1)
ENDINGS = ("has 12 of 3", "a", "the cow is here and here", "z z z")


def config_of(**values) -> EvaluateConfig:
    plain = dict.fromkeys(UNSET) | {"run": "x", "split": "val", "tasks": [], "precision": "auto"}
    return EvaluateConfig.model_validate(plain | values)


def examples_file(folder: Path, number: int) -> Path:
    path = folder / "hellaswag.jsonl"
    lines = [{"ctx": f"line {n}: the cat", "endings": ENDINGS, "label": n * n % 4} for n in range(number)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def read_results(directory: Path, kind: str) -> dict:
    """Returns the results of the only evaluation of this kind."""
    (path,) = directory.glob(f"evaluations/{kind}_*.json")
    return json.loads(path.read_text())


def trained(directory: Path) -> GPT:
    """Returns the model of a run, loaded independently of gptlab.pretrained."""
    model = GPT(GPTConfig(**yaml.safe_load((directory / "config.yaml").read_text())["model"]))
    model.load_state_dict(weights(directory))
    return model.eval()


def choices(model: GPT, examples: list[Example], block: int = 32) -> list[tuple[int, int]]:
    """Returns the endings with the lowest sum and mean of losses for each example, one text at a time."""
    chosen = []
    for example in examples:
        losses = []
        for ending in example.endings:
            ids = torch.tensor([(example.context + ending)[-(block + 1) :]])
            with torch.no_grad():
                log_probabilities = model(ids[:, :-1])[0].double().log_softmax(dim=-1)
            each = -log_probabilities[range(ids.size(1) - 1), ids[0, 1:]]
            losses.append(each[-len(ending) :])
        sums, means = [each.sum() for each in losses], [each.mean() for each in losses]
        chosen.append((sums.index(min(sums)), means.index(min(means))))
    return chosen


def test_a_run_is_scored_on_its_val_split_as_in_training_and_on_hellaswag(user, runs):
    directory = runs.give(user, "first", "callbacks=checkpoint")
    done = user.python("gptlab.evaluate", f"run={directory}", "windows=10")
    assert_success(done)
    results = read_results(directory, "loss")
    in_training = metrics(directory, "val/loss")
    assert results["loss"] == pytest.approx(min(in_training.values()), rel=1e-6)  # over the same ten windows
    assert results["perplexity"] == pytest.approx(math.exp(results["loss"]), rel=1e-12)
    assert results["bits_per_byte"] == pytest.approx(min(metrics(directory, "val/bits_per_byte").values()), rel=1e-6)
    assert (results["tokens"], results["split"], results["block_size"], results["stride"]) == (320, "val", 32, 32)
    assert (results["documents"], results["processes"], results["precision"]) == ("packed", 1, "float32")
    assert results["checkpoint"] == f"step_{min(in_training, key=in_training.__getitem__):06d}"
    assert re.search(rf"loss +{results['loss']:.4f} nats per token", done.stdout)

    examples = read_examples(examples_file(user.folder, 12), BytesTokenizer(), 9)
    chosen = choices(trained(directory), examples)
    right = [[choice == example.label for choice in pair] for pair, example in zip(chosen, examples, strict=True)]
    outcome = evaluate_hellaswag(
        load_model(open_model_source(str(directory))), examples, config_of(hellaswag="x"), ONE_PROCESS
    )
    assert outcome.metrics == {"acc": sum(s for s, _ in right) / 9, "acc_norm": sum(m for _, m in right) / 9}
    assert outcome.values["examples"] == 9


def check_record_at_wandb(user, server, directory: Path, run) -> None:
    """Checks that an evaluation is added to the W&B summary, changes nothing else, and works without the server."""
    kept, history = sorted(directory.glob("wandb/**/*")), run.history
    assert_success(user.python("gptlab.evaluate", f"run={directory}"))
    summary = json.loads(run.lines["wandb-summary.json"][0])
    assert summary["evaluations/loss/loss"] == read_results(directory, "loss")["loss"]
    assert summary["val/loss"]["min"] == min(row["val/loss"] for row in history if "val/loss" in row)
    assert (sorted(directory.glob("wandb/**/*")), run.history) == (kept, history)
    server.die()
    done = user.python("gptlab.evaluate", f"run={directory}", "out=elsewhere")
    assert_success(done)
    assert "The evaluation is not sent to W&B" in done.stdout
    assert len(list((user.folder / "elsewhere").iterdir())) == 1


@pytest.mark.slow
def test_two_processes_have_the_results_of_one(user, runs):
    directory = runs.give(user, "first", "callbacks=checkpoint")
    path = examples_file(user.folder, 13)
    (user.folder / "text.json").write_text("\n".join(json.dumps({"text": f"line {n}: the cow"}) for n in range(5)))
    (user.folder / "rolling.yaml").write_text(
        f"task: rolling\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {user.folder}/text.json}}}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n"
    )
    requests = (
        ("stride=9", "batch_size=5", "split=all"),
        (f"hellaswag={path}", "batch_size=2", "tasks=[rolling]", f"task_dir={user.folder}"),
    )
    torchrun = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29511", "-m", "gptlab.evaluate")
    for arguments in requests:
        assert_success(user.python("gptlab.evaluate", f"run={directory}", *arguments, "out=one/evaluations"))
        assert_success(user.python(*torchrun, f"run={directory}", *arguments, "out=two/evaluations"))
    for kind in ("loss", "hellaswag", "tasks"):
        one, two = (read_results(user.folder / number, kind) for number in ("one", "two"))
        assert (one["processes"], two["processes"]) == (1, 2)
        for key in {"loss", "bits_per_byte", "tokens", "bytes", "acc", "acc_norm", "examples"} & set(one):
            assert two[key] == pytest.approx(one[key], rel=1e-12)
    results = [result["results"]["rolling"]["bits_per_byte,none"] for result in (one, two)]
    assert results[1] == pytest.approx(results[0], rel=1e-6)  # the batches differ
    assert read_results(user.folder / "two", "loss")["tokens"] > 50_000


def with_hellaswag(user, name: str, *arguments: str) -> Path:
    path = examples_file(user.folder, 11)
    settings = (f"callbacks.hellaswag.path={path.name}", "callbacks.hellaswag.batch_size=2")
    assert_success(user.train(f"name={name}", "callbacks=[checkpoint,hellaswag]", *settings, *arguments))
    return user.only_run(name)


@pytest.mark.slow
def test_hellaswag_during_training_has_the_accuracy_of_the_checkpoint(user, runs):
    without = runs.give(user, "first", "callbacks=checkpoint")
    directory = with_hellaswag(user, "with")
    mine, others = weights(directory), weights(without)
    assert all(torch.equal(mine[name], others[name]) for name in others)  # training is unaffected
    examples = read_examples(user.folder / "hellaswag.jsonl", BytesTokenizer(), None)
    chosen = choices(trained(directory), examples)
    by_sum, by_mean = (sum(c[i] == e.label for c, e in zip(chosen, examples, strict=True)) for i in (0, 1))
    acc, acc_norm = (metrics(directory, f"hellaswag/{name}") for name in ("acc", "acc_norm"))
    assert list(acc) == list(acc_norm) == [3, 6]
    assert (acc[6], acc_norm[6]) == (by_sum / 11, by_mean / 11)
    done = user.train("callbacks=[checkpoint,hellaswag]", "callbacks.hellaswag.path=none.jsonl", "name=never")
    assert_config_error(done, "none.jsonl: no such file or directory")
    assert not (user.folder / "outputs" / "never").exists()


def test_the_training_process_reads_hellaswag_once(user):
    path = examples_file(user.folder, 3)
    text = ("data=text", f"data.source={user.folder}/text.txt", f"data.cache_dir={user.folder}/cache", "trainer=cpu")
    requested = resolved("callbacks=hellaswag", f"callbacks.hellaswag.path={path}", *text)
    config, prepared, plan = preflight(requested)
    examples = read_examples(path, prepared.tokenizer, None)
    path.unlink()
    devices = choose_devices(config.trainer, config.train, config.model)
    recorder = build_metrics_callback(config, devices)
    trainer = build_trainer(config, prepared, devices, plan, user.folder, recorder, None)
    assert [c.examples for c in trainer.callbacks if isinstance(c, HellaSwag)] == [examples]
    with pytest.raises(UserError, match="no such file"):
        preflight(requested)  # nothing is cached for another run


@pytest.mark.slow
def test_hellaswag_during_training_is_the_same_on_two_processes(user):
    settings = ("callbacks.hellaswag.every=4", "train.ema_decay=0.9")  # the averaged weights are scored
    alone = with_hellaswag(user, "alone", *settings)
    for strategy in ("ddp", "fsdp"):
        two = with_hellaswag(user, strategy, *settings, f"trainer={strategy}", "trainer.devices=2")
        for name in ("hellaswag/acc", "hellaswag/acc_norm"):
            assert list(metrics(alone, name)) == [6]  # the first evaluation from step 4 on; step 3 is too early
            assert metrics(two, name) == metrics(alone, name)
        assert "of 11 examples" in (two / "train.log").read_text()  # each is scored once


def test_hellaswag_runs_at_the_first_evaluation_after_every_interval(tmp_path):
    config = HellaSwagConfig(path="x", every=100, limit=None, batch_size=1)
    callback = HellaSwag(config, [], eval_every=30, max_steps=310, tokens=lambda step: step)
    assert [step for step in [*range(30, 310, 30), 310] if callback.is_due(step)] == [120, 210, 300, 310]
    always = HellaSwag(config.model_copy(update={"every": None}), [], 30, 310, lambda step: step)
    assert all(always.is_due(step) for step in range(30, 310, 30))


def source_of(tokenizer: Tokenizer) -> ModelSource:
    """Returns the source of a model that is not a gptlab run."""
    shape = tiny_config(vocab_size=tokenizer.vocab_size)
    return ModelSource("theirs", Path("theirs"), shape, json.loads(json.dumps(tokenizer.record())), None)


def test_a_corpus_is_prepared_with_the_tokenizer_of_the_model(tmp_path):
    (tmp_path / "text.txt").write_text("a bad cab, a cad\n" * 50)
    config = config_of(data=data_config(**text_values(tmp_path / "text.txt")))
    bpe = BPETokenizer.train(["ab ab abc bad " * 30], 270)
    for tokenizer in (BytesTokenizer(), bpe, CharactersTokenizer("\n ,abcdefg")):
        for _ in range(2):  # prepared, then found in the cache
            corpus = open_scored_corpus(config, source_of(tokenizer), tokenizer_is_named=False)
            assert corpus.prepared.manifest.tokenizer == tokenizer.record()
            stream = corpus.prepared.stream("val")
            text = tokenizer.decode(stream.read([0], len(stream))[0].tolist())
            assert text.removesuffix("<|endoftext|>") == ("a bad cab, a cad\n" * 50)[765:]
            assert corpus.eot_id is None
    with pytest.raises(UserError, match="The character ' ' is not in the vocabulary"):
        open_scored_corpus(config, source_of(CharactersTokenizer("abc")), tokenizer_is_named=False)
    masked = config_of(data=data_config(**text_values(tmp_path / "text.txt", documents="masked")))
    assert open_scored_corpus(masked, source_of(BytesTokenizer()), tokenizer_is_named=False).eot_id == 256
    with pytest.raises(UserError, match="requires an end-of-text token"):
        open_scored_corpus(masked, source_of(CharactersTokenizer("\n ,abcdefg")), tokenizer_is_named=False)


TEXTS_OF = {
    "one text": {"a.txt": ["a bad cab, a cad\n" * 30]},
    "two letters": {"a.txt": ["ab"]},
    "records": {"a.jsonl": [f"document {n} ends" for n in range(40)]},
    "one record": {"a.jsonl": ["a bad cab"]},
    "folder": {"a.txt": ["first\n"], "b.txt": ["second\n"], "c.txt": ["a bad cab\n" * 9]},
}


@pytest.mark.parametrize("stride", [None, 5])
@pytest.mark.parametrize("kind", TEXTS_OF)
def test_split_all_scores_the_whole_text(tmp_path, kind, stride):
    (folder := tmp_path / "corpus").mkdir()
    for name, texts in TEXTS_OF[kind].items():
        whole = "".join(texts) if name.endswith("txt") else "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / name).write_text(whole)
    source = folder if len(TEXTS_OF[kind]) > 1 else folder / name
    column = "text" if name == "a.jsonl" else None
    config = config_of(data=data_config(**text_values(source, column=column)), split="all", stride=stride)
    theirs = source_of(BytesTokenizer())
    torch.manual_seed(1)
    model = GPT(theirs.model).eval()
    corpus = open_scored_corpus(config, theirs, tokenizer_is_named=False)
    found = evaluate_corpus(model, corpus, config, ONE_PROCESS).values

    documents = [text.encode() for texts in TEXTS_OF[kind].values() for text in texts]
    tokens = [token for document in documents for token in (256, *document)]  # each after an end of text
    block = theirs.model.block_size
    step, losses, scored = stride or block, [], 1
    for begin in range(0, len(tokens), step):
        window = torch.tensor([tokens[begin : begin + block + 1]])
        if scored >= len(tokens):
            break
        with torch.no_grad():
            log_probabilities = model(window[:, :-1])[0].double().log_softmax(dim=-1)
        each = -log_probabilities[range(window.size(1) - 1), window[0, 1:]]
        losses.append(each[scored - begin - 1 :])
        scored = begin + window.size(1)
    total = torch.cat(losses)
    assert (found["tokens"], found["bytes"]) == (len(tokens) - 1, sum(map(len, documents)))
    assert len(total) == len(tokens) - 1
    assert found["loss"] == pytest.approx(total.mean().item(), rel=1e-6)
    text = torch.tensor(tokens[1:]) != 256
    bits = total[text].sum().item() / math.log(2) / sum(map(len, documents))
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_a_model_with_nan_weights_is_not_evaluated(tmp_path):
    (tmp_path / "text.txt").write_text("a bad cab, a cad\n" * 50)
    theirs = source_of(BytesTokenizer())
    model = GPT(theirs.model)
    model.ln_f.weight.data[0] = math.nan
    config = config_of(data=data_config(**text_values(tmp_path / "text.txt")))
    corpus = open_scored_corpus(config, theirs, tokenizer_is_named=False)
    with pytest.raises(UserError, match=r"The loss on \S*text.txt is not finite .* training may have diverged"):
        evaluate_corpus(model, corpus, config, ONE_PROCESS)
    tokens, config = [97, 98, 99], config_of(hellaswag="hellaswag.jsonl")
    with pytest.raises(UserError, match=r"The loss on hellaswag.jsonl is not finite"):
        evaluate_hellaswag(model, [Example(tokens, [tokens] * 4, 0)], config, ONE_PROCESS)


def test_split_all_of_shards_scores_both_splits(tmp_path):
    (tmp_path / "text.txt").write_text("a bad cab, a cad\n" * 50)
    folder = prepare_text(tmp_path / "text.txt", val_split="tail").folder
    shards = data_config(corpus="shards", path=str(folder), cache_dir=str(tmp_path / "cache"))
    theirs = source_of(BytesTokenizer())
    torch.manual_seed(1)
    model = GPT(theirs.model).eval()
    results = {}
    for split in ("train", "val", "all"):
        config = config_of(data=shards, split=split)
        corpus = open_scored_corpus(config, theirs, tokenizer_is_named=False)
        results[split] = evaluate_corpus(model, corpus, config, ONE_PROCESS).values
    train, val, both = results.values()
    assert both["tokens"] == train["tokens"] + val["tokens"]
    total = train["loss"] * train["tokens"] + val["loss"] * val["tokens"]
    assert both["loss"] == pytest.approx(total / both["tokens"], rel=1e-6)


def test_data_of_another_tokenizer_is_an_error(tmp_path):
    (tmp_path / "text.txt").write_text("a bad cab, a cad\n" * 50)
    theirs = prepare_text(tmp_path / "text.txt", "bpe", vocab_size=265, train_mb=1).folder
    ours = source_of(BPETokenizer.train(["abc abd " * 9], 265))
    shards = data_config(corpus="shards", path=str(theirs), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"prepared with tokenizer=bpe, but x uses a different one, tokenizer=bpe \("):
        open_scored_corpus(config_of(data=shards), ours, tokenizer_is_named=False)
    with pytest.raises(UserError, match="was prepared with tokenizer=bpe, not with tokenizer=bytes"):
        open_scored_corpus(config_of(data=shards), source_of(BytesTokenizer()), tokenizer_is_named=False)
    kept = json.loads((theirs / "manifest.json").read_text())["tokenizer"]["trained"]
    theirs_again = BPETokenizer(json.dumps(json.loads(kept), indent=1))  # the same tokenizer, formatted differently
    assert open_scored_corpus(config_of(data=shards), source_of(theirs_again), tokenizer_is_named=False).eot_id is None
    named = config_of(data=shards, tokenizer={"name": "gpt2", "vocab_dir": None, "vocab_size": None, "train_mb": None})
    with pytest.raises(UserError, match="tokenizer=gpt2 differs from the tokenizer of x, which is bpe"):
        open_scored_corpus(named, ours, tokenizer_is_named=True)
    with pytest.raises(UserError, match="run=x is not a gptlab run directory, so its training data is unknown"):
        open_scored_corpus(config_of(), ours, tokenizer_is_named=False)


def test_invalid_combinations_of_options_are_errors(monkeypatch):
    for values, message in (
        ({"tasks": ["a"], "stride": 3, "windows": 4}, "windows and stride cannot be combined with tasks or hellaswag"),
        ({"hellaswag": "x", "num_fewshot": 3}, "num_fewshot has no effect without tasks"),
        ({"limit": 3}, "limit applies only to tasks and hellaswag"),
    ):
        with pytest.raises(ValueError, match=message):
            config_of(**values)
    source = source_of(BytesTokenizer())
    with pytest.raises(UserError, match=r"stride=17 would skip tokens.* block_size=16"):
        check_request(config_of(stride=17), source)
    with pytest.raises(UserError, match=r"task_dir=nowhere is not a directory"):
        check_request(config_of(tasks=["a"], task_dir="nowhere"), source)
    monkeypatch.setattr("gptlab.evaluators.settings.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tasks requires the lm_eval package.*pip install '\.\[harness\]'"):
        check_request(config_of(tasks=["a"]), source)


def test_errors_are_found_before_torch_is_imported(user, runs):
    directory = runs.give(user, "first", "callbacks=checkpoint")
    package = user.folder / "elsewhere" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('torch was imported')")
    user.environment["PYTHONPATH"] = f"{package.parent}:{user.environment.get('PYTHONPATH', '')}"
    for arguments, message in (
        ([f"run={directory}", "split=test"], "split='test' is not valid: it should be 'val', 'train' or 'all'"),
        ([f"run={directory}", "hellaswag=none.jsonl"], "cannot be read from none.jsonl"),
        (["run=none", "taskz=[a]"], "Unknown config key `taskz`. Did you mean tasks?"),
    ):
        assert_config_error(user.python("gptlab.evaluate", *arguments), message)
    assert not (directory / "evaluations").exists()
