"""The tokens of the first steps as the loaders of all ranks give them, without training."""

from itertools import islice

from gptlab.config.schema import RunConfig
from gptlab.data.shards.token_dataset import TokenDataset
from gptlab.training.batch_plan import BatchPlan
from gptlab.training.callbacks.determinism_trace import format_sums, hash_windows, zero_sums
from gptlab.training.datamodule import TokenDataModule


def loaded_tokens(config: RunConfig, prepared: TokenDataset, plan: BatchPlan, *, workers: int, steps: int) -> list[str]:
    """Hash what the ranks of a plan load for each step, as the trace of a run has it."""
    data = TokenDataModule(
        prepared,
        config.data.model_copy(update={"num_workers": workers}),
        plan=plan,
        block_size=config.model.block_size,
        seed=config.seed,
        eval_windows=None,
    )
    sums = [zero_sums() for _ in range(steps)]
    for rank in range(plan.world_size):
        loader = data.micro_batches(rank, first_step=0)
        for number, batch in enumerate(islice(loader, steps * plan.accumulation)):
            sums[number // plan.accumulation] += hash_windows(batch)
    return [format_sums(total) for total in sums]
