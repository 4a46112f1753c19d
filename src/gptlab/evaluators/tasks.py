"""Tasks of lm-evaluation-harness, whose import takes seconds."""

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

# of what simple_evaluate returns
RESULT_KEYS = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")


class HarnessTasks(TaskManager):
    """The harness' tasks and those of a folder; a task that cannot be loaded is a UserError."""

    def load(self, task_list: Any) -> Any:
        """Loads tasks with their data sets, which come from the hub or its cache."""
        try:
            return super().load(task_list)
        except Exception as error:  # whatever datasets, the network or a task's own code raises
            home = os.environ.get("HF_HOME", "~/.cache/huggingface")
            raise UserError(
                f"tasks={','.join(map(str, task_list))} cannot be loaded: {type(error).__name__}: {first_line(error)}\n"
                "Where it is the data set that cannot be had: load it once on a machine with internet (the same "
                f"command does), and copy the cache of the Hugging Face hub here ({home}; HF_HOME names another)."
            ) from error


def find_tasks(config: EvaluateConfig) -> HarnessTasks:
    """Finds the tasks by name; raises UserError for an unknown one.

    The harness' own tasks are thousands of files, which are not read if ``config.task_dir`` has all tasks.
    """
    folder = Path(config.task_dir).expanduser() if config.task_dir else None
    with _quiet_harness():
        if folder is not None:
            own = HarnessTasks(include_path=folder, include_defaults=False)
            if set(config.tasks) <= set(own.all_subtasks):
                return own
        every = HarnessTasks(include_path=folder)
    for task in config.tasks:
        if not every.match_tasks([task]):
            raise UserError(
                f"tasks={task}: lm-evaluation-harness has no such task.{did_you_mean(task, every.all_tasks)} All are "
                "listed by: lm-eval ls tasks"
            )
    return every


def evaluate_tasks(
    model: GPT, tokenizer: Tokenizer, tasks: HarnessTasks, config: EvaluateConfig, context: EvalContext
) -> EvalResult | None:
    """Runs tasks; returns the result on the first rank, None on the others."""
    rows = config.rows(model.config.block_size)
    adapter = HarnessModel(model, tokenizer, batch_size=rows, device=context.device, autocast=context.autocast)
    cache = (
        f"{Path(config.cache).expanduser()}-{model_fingerprint(model)}-{context.precision}" if config.cache else None
    )
    begun = time.perf_counter()
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
    values = {key: found[key] for key in RESULT_KEYS if key in found} | {"seconds": time.perf_counter() - begun}
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
    """Lets the harness log errors only."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
