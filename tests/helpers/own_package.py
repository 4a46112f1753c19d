"""Writes ``mylab``, a user's package with a component of every kind, and a configuration directory that selects them.

``NODES`` gives all components on the command line, ``OPTIONS`` the same components by group files.
"""

import atexit
import functools
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from textwrap import dedent
from typing import Any

MODULES = {
    "__init__.py": "",
    "callbacks.py": """
        from pathlib import Path

        from lightning.pytorch.callbacks import Callback, ModelCheckpoint


        class StepLog(Callback):
            '''Appends the number of every n-th step to a file.'''

            def __init__(self, file: str, every: int = 1) -> None:
                self.file, self.every = Path(file), every

            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
                if trainer.is_global_zero and trainer.global_step % self.every == 0:
                    with self.file.open("a") as file:
                        file.write(f"{trainer.global_step}\\n")


        class BestCheckpoint(ModelCheckpoint):
            pass
        """,
    "loggers.py": """
        import json
        from pathlib import Path

        from lightning.pytorch.loggers import Logger
        from lightning.pytorch.utilities import rank_zero_only


        class LineLogger(Logger):
            '''Appends metrics and hyperparameters to lines.jsonl, in save_dir.'''

            def __init__(self, save_dir: str, name: str, prefix: str = "") -> None:
                super().__init__()
                self.path, self.run, self.prefix = Path(save_dir) / "lines.jsonl", name, prefix

            name = version = "lines"

            @rank_zero_only
            def log_hyperparams(self, params) -> None:
                self.write({"run": self.run, "lr": params["optimizer"]["lr"]})

            @rank_zero_only
            def log_metrics(self, metrics, step=None) -> None:
                self.write({"step": step} | {self.prefix + name: value for name, value in metrics.items()})

            def write(self, line) -> None:
                with self.path.open("a") as file:
                    file.write(json.dumps(line) + "\\n")
        """,
    "optimizers.py": """
        import torch
        from torch.optim import Optimizer


        class SignSGD(Optimizer):
            '''Sign of a running average of the gradient, with decoupled weight decay.'''

            def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
                super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

            @torch.no_grad()
            def step(self, closure=None):
                if closure is not None:
                    with torch.enable_grad():
                        closure()
                for group in self.param_groups:
                    for parameter in group["params"]:
                        if parameter.grad is None:
                            continue
                        state = self.state[parameter]
                        if not state:
                            state["average"] = torch.zeros_like(parameter)
                        state["average"].lerp_(parameter.grad, 1 - group["momentum"])
                        parameter.mul_(1 - group["lr"] * group["weight_decay"])
                        parameter.sub_(state["average"].sign(), alpha=group["lr"])


        def one_group(model, weight_decay: float = 0.0):
            return [{"params": list(model.parameters()), "weight_decay": weight_decay}]
        """,
    "schedules.py": """
        def inverse_root(step: int, *, lr: float, max_steps: int, power: float = 0.5) -> float:
            return lr * (1 + step) ** -power


        def untyped(step, *, lr, max_steps, power=1.0):
            return lr * (1 + step) ** -power
        """,
    "losses.py": """
        import torch.nn.functional as F
        from torch import Tensor


        def focal(logits: Tensor, targets: Tensor, *, gamma: float) -> Tensor:
            losses = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
            return ((1 - (-losses).exp()) ** gamma * losses)[targets != -100].mean()


        def per_token(logits: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")


        def of_states(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(states, weight).float(), targets, ignore_index=-100)
        """,
    "model.py": """
        import torch
        import torch.nn.functional as F
        from torch import Tensor, nn

        from gptlab.model.causal_lm import CausalLM
        from gptlab.model.gpt import GPT, Block
        from gptlab.model.loss import IGNORED
        from gptlab.model.modern import ModernGPT


        class ScaledGPT(ModernGPT):
            '''Scales the embedding; equal to GPT with scale=1.'''

            def __init__(self, config, scale: float = 1.0) -> None:
                super().__init__(config)
                self.scale = scale

            def hidden_states(self, idx, ctx):
                return super().hidden_states(idx, ctx) * self.scale


        class ScaledBlock(Block):
            '''Scales the residual branches; equal to the block of GPT-2 with alpha=1.'''

            def __init__(self, config, layer: int, alpha: float = 1.0) -> None:
                super().__init__(config, layer)
                self.alpha = alpha

            def forward(self, x, ctx):
                x = x + self.alpha * self.attn(self.ln_1(x), ctx)
                return x + self.alpha * self.mlp(self.ln_2(x))


        class DecayAttention(nn.Module):
            '''Causal average of the values with exponentially decaying weights. It has no KV cache.'''

            def __init__(self, config, layer: int, decay: float = 0.5) -> None:
                super().__init__()
                self.c_attn = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
                self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
                self.decay = decay

            def forward(self, x, ctx):
                t = torch.arange(x.size(1), device=x.device)
                distance = (t[:, None] - t).clamp(min=0)
                weights = torch.where(t[:, None] >= t, self.decay**distance, 0.0).to(x.dtype)
                return self.c_proj(weights @ self.c_attn(x))


        class Swish(nn.Module):
            def __init__(self, beta: float = 1.0) -> None:
                super().__init__()
                self.beta = beta

            def forward(self, x):
                return x * (self.beta * x).sigmoid()


        class ScaleNorm(nn.Module):
            def __init__(self, config, eps: float = 1e-5) -> None:
                super().__init__()
                self.weight, self.eps = nn.Parameter(torch.ones(config.n_embd)), eps

            def forward(self, x):
                return F.normalize(x, dim=-1, eps=self.eps) * self.weight * x.size(-1) ** 0.5


        def gated(config, layer: int) -> nn.Module:
            return Swish(beta=float(layer + 1))


        def no_module(config, layer: int) -> nn.Module:
            return "a module"


        class Bigram(CausalLM):
            '''Table of logits, without blocks.'''

            def __init__(self, config, std: float = 0.02) -> None:
                super().__init__(config)
                self.table = nn.Embedding(config.known_vocab_size, config.known_vocab_size)
                nn.init.normal_(self.table.weight, std=std)

            def forward(self, idx: Tensor, documents: Tensor | None = None) -> Tensor:
                return self.table(idx)
        """,
    "typed.py": """
        from dataclasses import dataclass
        from typing import Literal

        from lightning.pytorch.callbacks import Callback
        from pydantic import BaseModel


        @dataclass
        class Window:
            first: int
            last: int = 9


        class Range(BaseModel):
            low: float
            high: float


        class Typed(Callback):
            '''A callback whose arguments have all kinds of annotations.'''

            def __init__(
                self,
                count: int,
                mode: Literal["min", "max"] = "min",
                window: Window | None = None,
                span: Window = Window(0),
                limits: Range | None = None,
                bounds: Range = Range(low=0, high=1),
                other: object = None,
                text: str = "",
                *args: int,
            ) -> None:
                self.count, self.mode, self.window, self.span, self.bounds = count, mode, window, span, bounds
                self.other, self.text = other, text
        """,
    # names that a stranger's configuration might misuse if the package is trusted
    "tools.py": """
        import os
        import subprocess
        from pathlib import Path

        from lightning.pytorch.callbacks import Callback
        from torch import nn


        def touch(path: str) -> str:
            Path(path).touch()
            return path


        class Touch(Callback):
            def __init__(self, path: str, other: object = None) -> None:
                touch(path)


        class TouchActivation(nn.GELU):
            def __init__(self, path: str) -> None:
                super().__init__(approximate="tanh")
                touch(path)
        """,
}

_MODEL = {
    "_target_": "mylab.model.ScaledGPT",
    "scale": 1.5,
    "attention": {"_target_": "mylab.model.DecayAttention", "decay": 0.7},
    "activation": {"_target_": "mylab.model.Swish", "beta": 1.5},
    "norm": {"_target_": "mylab.model.ScaleNorm", "eps": 1e-6},
}
_OPTIMIZER = {"_target_": "mylab.optimizers.SignSGD", "lr": 0.001, "momentum": 0.8, "weight_decay": 0.1}
_SCHEDULE = {"_target_": "mylab.schedules.inverse_root", "power": 0.25}
_LOSS = {"_target_": "mylab.losses.focal", "gamma": 0.5}
_CALLBACK = {"_target_": "mylab.callbacks.StepLog", "file": "steps.txt", "every": 2}
_LOGGER = {"_target_": "mylab.loggers.LineLogger", "prefix": "own/"}

GROUP_FILES: dict[str, Any] = {
    "model/own.yaml": {
        "defaults": ["gpt", "_self_"],
        "block_size": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 64,
        **_MODEL,
    },
    "optimizer/sign.yaml": _OPTIMIZER,
    "schedule/inverse_root.yaml": _SCHEDULE,
    "loss/focal.yaml": _LOSS,
    "callbacks/step_log.yaml": {"step_log": _CALLBACK},
    "logger/lines.yaml": {"lines": _LOGGER},
    "trainer/anomalies.yaml": {"defaults": ["auto", "_self_"], "flags": {"detect_anomaly": True}},
}
# all components, by group files; needs --config-dir=<directory of write_groups>
OPTIONS = (
    *("model=own", "optimizer=sign", "schedule=inverse_root", "loss=focal", "trainer=anomalies"),
    *("callbacks=[checkpoint,step_log]", "logger=[csv,lines]"),
)


def as_override(value: Any) -> str:
    """Formats plain data as a value of an override."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{as_override(element)}" for key, element in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(as_override, value)) + "]"
    return json.dumps(value) if isinstance(value, bool | None) else str(value)


# all components, on the command line; the model has the size of model/own.yaml
NODES = (
    *("model=gpt", "model.block_size=32", "model.n_layer=2", "model.n_head=2", "model.n_embd=64"),
    *(f"{'+' if key in ('_target_', 'scale') else ''}model.{key}={as_override(_MODEL[key])}" for key in _MODEL),
    *("~optimizer", f"+optimizer={as_override(_OPTIMIZER)}", "~schedule", f"+schedule={as_override(_SCHEDULE)}"),
    f"+loss={as_override(_LOSS)}",
    "callbacks=checkpoint",
    f"+callbacks.step_log={as_override(_CALLBACK)}",
    f"+logger.lines={as_override(_LOGGER)}",
    "+trainer.flags.detect_anomaly=true",
)


def write_package(folder: Path) -> Path:
    """Writes the package ``mylab`` in a directory, which must be on PYTHONPATH, and returns its directory."""
    package = folder / "mylab"
    package.mkdir(parents=True, exist_ok=True)
    for name, text in MODULES.items():
        (package / name).write_text(dedent(text).lstrip())
    return package


def write_groups(folder: Path) -> Path:
    """Writes the group files of ``OPTIONS`` in a directory for --config-dir, and returns it."""
    for name, values in GROUP_FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(values))  # JSON is YAML
    return folder


def add_to_path(environment: dict[str, str], folder: Path) -> None:
    """Puts a directory in front of PYTHONPATH."""
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), environment.get("PYTHONPATH"))))


@functools.cache
def make_importable() -> None:
    """Makes ``mylab`` importable in this process, until it ends."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    write_package(Path(folder))
    sys.path.append(folder)
