"""Evaluates a trained model: python -m gptlab.evaluate run=<model> [group=option ...] [key=value ...]."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from gptlab.config.base import known_keys, validate
from gptlab.config.command import command
from gptlab.config.resolve import resolve_to_dict
from gptlab.evaluation.hellaswag import Example, read_examples
from gptlab.evaluators.corpora import ScoredCorpus, open_scored_corpus
from gptlab.evaluators.results import EvalResult, print_result, results_folder, write_result
from gptlab.evaluators.settings import EvaluateConfig, check_request
from gptlab.exit_codes import DONE
from gptlab.pretrained.source import ModelSource, open_model_source
from gptlab.terminal import print_message
from gptlab.tracking.run_directory import weights_checkpoint


@command("evaluate", keys=set(known_keys(EvaluateConfig)), subject="run")
def main(values: DictConfig) -> int:
    """Loads the model, evaluates it, and prints and writes the results."""
    config = validate(EvaluateConfig, resolve_to_dict(values))
    source = open_model_source(config.run, "run")  # this and the next three report errors before torch is imported
    check_request(config, source)
    corpus = open_scored_corpus(config, source, tokenizer_is_named=_names_tokenizer()) if config.on_corpus else None
    examples = _examples(config, source) if config.hellaswag is not None else None
    _score(config, source, corpus, examples)
    return DONE


def _names_tokenizer() -> bool:
    """Whether the command line sets a tokenizer."""
    return any(override.startswith("tokenizer") for override in HydraConfig.get().overrides.task)


def _examples(config: EvaluateConfig, source: ModelSource) -> list[Example]:
    assert config.hellaswag is not None  # noqa: S101
    return read_examples(Path(config.hellaswag).expanduser(), source.tokenizer(), config.limit)


def _score(
    config: EvaluateConfig, source: ModelSource, corpus: ScoredCorpus | None, examples: list[Example] | None
) -> None:
    """Runs all configured evaluations. The first rank prints and writes the results and sends them to W&B."""
    from gptlab.evaluators.evaluator import create_eval_context, evaluate_corpus, evaluate_hellaswag
    from gptlab.pretrained.weights import load_model
    from gptlab.tracking.wandb.evaluations import send_evaluation

    if config.tasks:
        from gptlab.evaluators.tasks import evaluate_tasks, find_tasks

        tasks = find_tasks(config)
    context = create_eval_context(config.precision)
    model = load_model(source).to(context.device)
    outcomes: list[EvalResult | None] = []
    if corpus is not None:
        outcomes.append(evaluate_corpus(model, corpus, config, context))
    if examples is not None:
        outcomes.append(evaluate_hellaswag(model, examples, config, context))
    if config.tasks:
        outcomes.append(evaluate_tasks(model, source.tokenizer(), tasks, config, context))
    if context.rank > 0:
        return
    conditions = {
        "run": config.run,
        "path": str(source.path.absolute()),
        "checkpoint": weights_checkpoint(source.checkpoint or source.path).name if source.is_run else None,
        "precision": context.precision,
        "device": str(context.device),
        "processes": context.world_size,
        "batch_size": config.rows(source.model.block_size),
        "limit": config.limit,
        "num_fewshot": config.num_fewshot,
    }
    for outcome in outcomes:
        if outcome is not None:
            print_result(outcome)
            print_message(write_result(outcome, conditions, results_folder(config.out, source)))
            if source.is_run and source.checkpoint is None:  # W&B has one value per run
                send_evaluation(source.path, outcome.what, outcome.metrics)


if __name__ == "__main__":
    main()
