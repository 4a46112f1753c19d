"""Tasks of lm-evaluation-harness. Import this module lazily, because importing the harness takes seconds."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from gptlab.data.tokenizers.tokenizer import Tokenizer
from gptlab.errors import UserError, did_you_mean, first_line
from gptlab.evaluation.harness import HarnessModel, model_fingerprint
from gptlab.evaluators.evaluator import EvalContext
from gptlab.evaluators.results import EvalResult
from gptlab.evaluators.settings import EvaluateConfig
from gptlab.model.gpt import GPT

# Keys of the result of simple_evaluate to store
RESULT_KEYS = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")


class HarnessTasks(TaskManager):
    """TaskManager of the harness that raises UserError for a task that cannot be loaded."""

    def load(self, task_list: Any) -> Any:
        """Loads tasks with their datasets, which are downloaded from the Hugging Face Hub if they are not cached."""
        try:
            return super().load(task_list)
        except Exception as error:  # datasets, the network and the code of a task raise many types
            home = os.environ.get("HF_HOME", "~/.cache/huggingface")
            raise UserError(
                f"tasks={','.join(map(str, task_list))} cannot be loaded: {type(error).__name__}: {first_line(error)}\n"
                "If a dataset cannot be downloaded, run the same command on a machine with internet access and copy "
                f"the cache of the Hugging Face Hub to {home} on this machine (HF_HOME sets another directory)."
            ) from error


def find_tasks(config: EvaluateConfig) -> HarnessTasks:
    """Finds the tasks of ``config.tasks`` by name. Raises UserError if a task is unknown.

    Does not index the thousands of task files of the harness if all tasks are in ``config.task_dir``.
    """
    folder = Path(config.task_dir).expanduser() if config.task_dir else None
    with _quiet_harness():
        if folder is not None:
            local_tasks = HarnessTasks(include_path=folder, include_defaults=False)
            if set(config.tasks) <= set(local_tasks.all_subtasks):
                return local_tasks
        manager = HarnessTasks(include_path=folder)
    for task in config.tasks:
        if not manager.match_tasks([task]):
            raise UserError(
                f"Unknown task in tasks={task}.{did_you_mean(task, manager.all_tasks)} List all tasks of "
                "lm-evaluation-harness with: lm-eval ls tasks"
            )
    return manager


def evaluate_tasks(
    model: GPT, tokenizer: Tokenizer, tasks: HarnessTasks, config: EvaluateConfig, context: EvalContext
) -> EvalResult | None:
    """Runs the tasks. Returns the result on the first rank and None on the other ranks.

    Args:
        model: Model, on the device of ``context``.
        tokenizer: Tokenizer of the model.
        tasks: Result of ``find_tasks``.
        config: Config of the evaluation.
        context: Device, precision and rank.
    """
    rows = config.rows(model.config.block_size)
    adapter = HarnessModel(model, tokenizer, batch_size=rows, device=context.device, autocast=context.autocast)
    cache = (
        f"{Path(config.cache).expanduser()}-{model_fingerprint(model)}-{context.precision}" if config.cache else None
    )
    start = time.perf_counter()
    with _quiet_harness():
        found = simple_evaluate(
            adapter,
            tasks=config.tasks,
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            use_cache=cache,
            log_samples=False,
            task_manager=tasks,
        )
    if found is None:  # not the first rank
        return None
    values = {key: found[key] for key in RESULT_KEYS if key in found} | {"seconds": time.perf_counter() - start}
    metrics: dict[str, float] = {}
    table: list[tuple[str, ...]] = [("task", "shots", "metric", "value", "± standard error")]
    for task, results in found["results"].items():
        shots = str(found.get("n-shot", {}).get(task, ""))
        for name, value in results.items():
            metric, _, kind = name.partition(",")
            if not isinstance(value, int | float) or not kind or metric.endswith("_stderr"):
                continue
            error = results.get(f"{metric}_stderr,{kind}")
            shown = metric if kind == "none" else f"{metric}, {kind}"
            table.append((task, shots, shown, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else ""))
            metrics[f"{task}/{metric}" if kind == "none" else f"{task}/{metric}/{kind}"] = value
    return EvalResult("tasks", values, metrics, table)


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """Limits the logging of the harness to errors."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
