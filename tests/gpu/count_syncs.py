"""Counts host-device synchronizations within training steps: python count_syncs.py <arguments of gptlab.train>.

Counts the warnings of torch.cuda.set_sync_debug_mode after the first steps, by the line of gptlab, Lightning or torch
that caused them. A copy to the host with an event (``DelayedAllReduce``) causes no warning and is not counted.
"""

import logging
import runpy
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import gptlab
from gptlab.training.module import GPTModule

FIRST_STEP = 4
PACKAGE = Path(gptlab.__file__).parent
syncs: Counter[str] = Counter()
steps: Counter[str] = Counter()
on_train_batch_start = GPTModule.on_train_batch_start


def start_counting(module: GPTModule, batch: Any, batch_idx: int) -> None:
    """Enables the warnings from ``FIRST_STEP`` on, then calls the module's own hook."""
    counts = module.trainer.global_step >= FIRST_STEP
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("warn" if counts else "default")
    steps["counted"] += counts
    on_train_batch_start(module, batch, batch_idx)


def count_warning(message: Any, *_: Any, **__: Any) -> None:
    """Replaces warnings.showwarning; counts a synchronization by the line that caused it."""
    if "synchroniz" not in str(message):
        return
    frames = [frame for frame in traceback.extract_stack()[:-1] if "warnings.py" not in frame.filename]
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
    line = f"{Path(own[-1].filename).relative_to(PACKAGE)}:{own[-1].lineno}" if own else "?"
    inner = frames[-1]
    syncs[f"{line} (in {inner.filename.split('site-packages/')[-1]}:{inner.lineno})"] += 1


def main() -> None:
    warnings.showwarning = count_warning
    warnings.simplefilter("always")
    logging.captureWarnings = lambda capture: None  # Lightning's call would replace showwarning again
    GPTModule.on_train_batch_start = start_counting
    sys.argv = ["gptlab.train", *sys.argv[1:]]
    try:
        runpy.run_module("gptlab.train", run_name="__main__", alter_sys=True)
    except SystemExit as error:
        print("exit code", error.code)
    finally:
        lines = "; ".join(f"{count} x {line}" for line, count in syncs.most_common(8))
        print(f"SYNCS in {steps['counted']} steps: {syncs.total()}; {lines}")


if __name__ == "__main__":
    main()
