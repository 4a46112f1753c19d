"""Converts a configuration of nanoGPT to the equal experiment of gptlab. Imports no torch."""

import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import yaml

from gptlab.config.schema import GPT2_REPOSITORIES
from gptlab.errors import UserError
from gptlab.projects.nanogpt_config import DEFAULTS, NanoGPTConfig

DATASETS = ("openwebtext", "shakespeare", "shakespeare_char")  # options of the config group data with nanoGPT's names
EVALUATION = {"init_from", "dataset", "eval_iters", "batch_size", "eval_only"}  # what eval_only=True uses
DECAY = {"warmup_iters", "lr_decay_iters", "min_lr"}  # what only decay_lr=True uses
SIZES = {"n_layer", "n_head", "n_embd", "bias"}  # what OpenAI's weights determine


class Setting(NamedTuple):
    """A config key of an experiment.

    Attributes:
        key: Dotted name.
        value: Plain value.
        comment: The setting of nanoGPT that it comes from; empty if that has the same name.
    """

    key: str
    value: Any
    comment: str = ""


class Experiment(NamedTuple):
    """An experiment of ``gptlab.train`` or ``gptlab.evaluate``.

    Attributes:
        name: Name of the experiment, which is valid as a file name and as the name of a run.
        command: Command that has the experiment.
        options: Selected options of config groups.
        settings: Config keys in the order of the file; those of a group are adjacent.
        notes: What is not equal to nanoGPT, or requires an action; one sentence each.
    """

    name: str
    command: Literal["train", "evaluate"]
    options: dict[str, str]
    settings: list[Setting]
    notes: list[str]

    @property
    def document(self) -> dict[str, Any]:
        """Content of the YAML file: the defaults list and the nested config keys."""
        document: dict[str, Any] = {"defaults": [{f"override /{group}": o} for group, o in self.options.items()]}
        for setting in self.settings:
            *groups, key = setting.key.split(".")
            node = document
            for group in groups:
                node = node.setdefault(group, {})
            node[key] = setting.value
        return document


def to_experiment(config: NanoGPTConfig) -> Experiment:
    """Converts a configuration of nanoGPT to the equal experiment.

    ``eval_only=True`` gives an experiment of ``gptlab.evaluate``, everything else one of ``gptlab.train``. Defaults of
    nanoGPT apply to settings that the file does not set, except device, dtype and compile, which gptlab detects.

    Args:
        config: The configuration.

    Raises:
        UserError: No experiment can be equal: ``init_from`` is unknown, OpenAI's weights would read character IDs,
            random weights would be evaluated, or the learning rate would increase after the warm-up.
    """
    values = DEFAULTS | config.values
    _check(config, values)
    return _evaluation(config, values) if values["eval_only"] else _training(config, values)


def write_experiment(experiment: Experiment) -> str:
    """Returns the YAML text of an experiment, with a comment for each key that has another name in nanoGPT."""
    lines = [
        "# @package _global_",
        f"# From a configuration of nanoGPT: python -m gptlab.{experiment.command} experiment={experiment.name}",
        "defaults:",
        *(f"  - override /{group}: {option}" for group, option in experiment.options.items()),
    ]
    open_groups: list[str] = []
    for setting in experiment.settings:
        *groups, key = setting.key.split(".")
        for depth, group in enumerate(groups):
            if open_groups[: depth + 1] != groups[: depth + 1]:
                lines.append(f"{'  ' * depth}{group}:")
                open_groups = groups[: depth + 1]
        line = f"{'  ' * len(groups)}{key}: {_yaml_value(setting.value)}"
        lines.append(f"{line:<31} # {setting.comment}" if setting.comment else line)
        open_groups = groups
    return "\n".join(lines) + "\n"


def _yaml_value(value: Any) -> str:
    """Returns a value on one line. OmegaConf resolves no interpolation in it."""
    if isinstance(value, str):
        value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    text: str = yaml.safe_dump([value], default_flow_style=True, width=10_000)
    return text.strip()[1:-1]


def _check(config: NanoGPTConfig, values: Mapping[str, Any]) -> None:
    weights = values["init_from"]
    if weights not in ("scratch", "resume", *GPT2_REPOSITORIES):
        raise UserError(
            f"{config.path}: init_from={weights!r} is not valid: it should be scratch, resume, "
            f"{', '.join(GPT2_REPOSITORIES)}."
        )
    if weights in GPT2_REPOSITORIES and values["dataset"] == "shakespeare_char":
        raise UserError(
            f"{config.path}: dataset='shakespeare_char' has IDs of characters, which are not the tokens of "
            f"init_from={weights!r}. Use dataset='shakespeare'."
        )
    if values["eval_only"] and weights == "scratch":
        raise UserError(
            f"{config.path}: eval_only=True with init_from='scratch' evaluates random weights, which gptlab does "
            "not do. Set another init_from, or eval_only=False."
        )
    if not values["eval_only"] and values["learning_rate"] <= 0:
        raise UserError(f"{config.path}: learning_rate={values['learning_rate']} must be greater than 0.")
    if not values["eval_only"] and values["decay_lr"] and values["min_lr"] > values["learning_rate"]:
        raise UserError(
            f"{config.path}: min_lr={values['min_lr']} is greater than learning_rate={values['learning_rate']}, so the "
            "learning rate would increase after the warm-up. Set a smaller min_lr, or decay_lr=False."
        )


def _evaluation(config: NanoGPTConfig, values: Mapping[str, Any]) -> Experiment:
    """Returns the experiment of ``gptlab.evaluate`` for ``eval_only=True``."""
    is_checkpoint = values["init_from"] == "resume"
    options, data_settings = _data(values)
    settings = [
        Setting("run", _checkpoint(values) if is_checkpoint else values["init_from"], "init_from"),
        *data_settings,
        Setting("split", "all", "nanoGPT evaluates train and val"),
        Setting("windows", values["eval_iters"] * values["batch_size"], "eval_iters · batch_size windows per split"),
        Setting("batch_size", values["batch_size"]),
    ]
    notes = [*_data_notes(values)]
    if values["device"].startswith("cuda"):
        match config.values.get("dtype"):
            case "float32" | "bfloat16" as dtype:
                settings.append(Setting("precision", dtype, "dtype"))
            case str() as dtype:
                notes.append(_dtype_note(dtype, "precision"))
    else:
        settings.append(Setting("precision", "float32", f"nanoGPT's precision with device={values['device']!r}"))
    used = EVALUATION | {"out_dir"} if is_checkpoint else EVALUATION
    if unused := _named(config.values.keys() - used - {"block_size", "device", "dtype"}):
        notes.append(f"Not used by gptlab.evaluate: {unused}.")
    if values["block_size"] != DEFAULTS["block_size"]:
        notes.append(f"block_size={values['block_size']} has no counterpart: windows have the block size of the model.")
    if "device" in config.values:
        notes.append(f"device={values['device']!r} has no counterpart: gptlab.evaluate uses a GPU if there is one.")
    return Experiment(_name(config), "evaluate", options, settings, notes)


def _training(config: NanoGPTConfig, values: Mapping[str, Any]) -> Experiment:
    """Returns the experiment of ``gptlab.train``."""
    options, data_settings = _data(values)
    pretrained = values["init_from"] in GPT2_REPOSITORIES
    options["model"] = values["init_from"] if pretrained else "gpt"
    if not pretrained and not values["dataset"].startswith("shakespeare"):
        options["tokenizer"] = "gpt2"
    if not values["decay_lr"]:
        options["schedule"] = "constant"
    if device := _trainer(config.values.get("device", "")):
        options["trainer"] = device
    if values["wandb_log"]:
        options["logger"] = "wandb"
    settings = [
        Setting("name", _name(config)),
        *_start(values),
        *data_settings,
        *_model(values),
        *_optimizer(values),
        *_train(config, values),
        *_precision(config, values),
    ]
    if values["wandb_log"]:
        settings.append(Setting("logger.wandb.project", values["wandb_project"], "wandb_project"))
    notes = [
        *_data_notes(values),
        *_unused_notes(config, values),
        *_start_notes(values),
        *_system_notes(config, values),
    ]
    return Experiment(_name(config), "train", options, settings, notes)


def _name(config: NanoGPTConfig) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", config.path.stem).strip("._-") or "nanogpt"


def _named(names: set[str]) -> str:
    """Returns a list of settings in the order of train.py."""
    return ", ".join(name for name in DEFAULTS if name in names)


def _checkpoint(values: Mapping[str, Any]) -> str:
    return f"{values['out_dir']}/ckpt.pt"


def _data(values: Mapping[str, Any]) -> tuple[dict[str, str], list[Setting]]:
    if values["dataset"] in DATASETS:
        return {"data": values["dataset"]}, []
    return {"data": "shards"}, [Setting("data.path", f"data/{values['dataset']}", "dataset: its train.bin and val.bin")]


def _data_notes(values: Mapping[str, Any]) -> Iterator[str]:
    if values["dataset"] not in DATASETS:
        yield (
            f"dataset={values['dataset']!r} is read from nanoGPT's token files; set data.path to their directory "
            "and, if it has a meta.pkl, also tokenizer=characters and model.pad_vocab_to_multiple_of=1."
        )


def _start(values: Mapping[str, Any]) -> Iterator[Setting]:
    if values["init_from"] == "resume":
        yield Setting("resume_from_nanogpt", _checkpoint(values), "init_from='resume', out_dir")
    elif values["init_from"] != "scratch":
        yield Setting("init_from", values["init_from"])


def _start_notes(values: Mapping[str, Any]) -> Iterator[str]:
    if values["init_from"] == "resume":
        yield (
            f"init_from='resume' is resume_from_nanogpt={_checkpoint(values)!r}, relative to the working directory; "
            "the sizes of the model must be those of the checkpoint."
        )
    elif values["init_from"] != "scratch":
        yield (
            f"init_from={values['init_from']!r} uses OpenAI's tanh approximation of GELU, with which the weights were "
            "trained; nanoGPT uses the exact GELU, which is model.activation=gelu."
        )


def _model(values: Mapping[str, Any]) -> Iterator[Setting]:
    if values["init_from"] in GPT2_REPOSITORIES:
        if values["block_size"] != DEFAULTS["block_size"]:
            yield Setting("model.block_size", values["block_size"])
        yield Setting("model.dropout", values["dropout"])
        return
    for key in ("block_size", "n_layer", "n_head", "n_embd", "bias", "dropout"):
        yield Setting(f"model.{key}", values[key])
    yield Setting("model.activation", "gelu", "exact GELU, as in nanoGPT")
    if values["dataset"] != "shakespeare_char":
        yield Setting(
            "model.pad_vocab_to_multiple_of",
            64,
            "50,304 rows, as in nanoGPT, but without the 47 padding rows in the softmax",
        )


def _optimizer(values: Mapping[str, Any]) -> Iterator[Setting]:
    yield Setting("optimizer.lr", values["learning_rate"], "learning_rate")
    yield Setting("optimizer.betas", [values["beta1"], values["beta2"]], "beta1, beta2")
    yield Setting("optimizer.weight_decay", values["weight_decay"])
    if not values["decay_lr"]:
        yield Setting("schedule.warmup_steps", 0, "decay_lr=False: no warm-up either")
        return
    yield Setting("schedule.warmup_steps", values["warmup_iters"], "warmup_iters")
    if values["lr_decay_iters"] != values["max_iters"]:
        yield Setting("schedule.decay_steps", values["lr_decay_iters"], "lr_decay_iters")
    ratio = Decimal(repr(values["min_lr"])) / Decimal(repr(values["learning_rate"]))  # 0.1, where floats give 0.0999...
    yield Setting("schedule.min_lr_ratio", float(ratio), "min_lr / learning_rate")


def _train(config: NanoGPTConfig, values: Mapping[str, Any]) -> Iterator[Setting]:
    batch, accumulation = values["batch_size"], values["gradient_accumulation_steps"]
    yield Setting("train.max_steps", values["max_iters"], "max_iters, without the step after the last evaluation")
    yield Setting("train.global_batch_size", batch * accumulation, "batch_size · gradient_accumulation_steps")
    if accumulation > 1:
        yield Setting("train.micro_batch_size", batch, "batch_size; on several GPUs: trainer=ddp")
    yield Setting("train.eval_every", values["eval_interval"], "eval_interval")
    yield Setting(
        "train.eval_windows", values["eval_iters"] * batch, "eval_iters · batch_size; evenly spaced, not random"
    )
    yield Setting("train.grad_clip", values["grad_clip"])
    yield Setting("train.log_every", values["log_interval"], "log_interval")
    if "compile" in config.values:
        yield Setting("train.compile", values["compile"])


def _trainer(device: str) -> str | None:
    return "cpu" if device == "cpu" else "gpu" if device.startswith("cuda") else None


def _precision(config: NanoGPTConfig, values: Mapping[str, Any]) -> Iterator[Setting]:
    if not values["device"].startswith("cuda"):
        yield Setting("trainer.precision", "32-true", f"nanoGPT's precision with device={values['device']!r}")
    elif (
        precision := {"float32": "32-true", "bfloat16": "bf16-mixed"}.get(config.values.get("dtype", ""))
    ) is not None:
        yield Setting("trainer.precision", precision, "dtype")


def _dtype_note(dtype: str, key: str) -> str:
    return f"dtype={dtype!r} has no counterpart: {key}=auto is bfloat16 on GPUs that support it, and float32 on others."


def _unused_notes(config: NanoGPTConfig, values: Mapping[str, Any]) -> Iterator[str]:
    """Yields notes on settings of the file that nanoGPT does not use in this combination."""
    if not values["decay_lr"] and (unused := _named(config.values.keys() & DECAY)):
        yield f"No effect with decay_lr=False: {unused}."
    if values["init_from"] in GPT2_REPOSITORIES and (unused := _named(config.values.keys() & SIZES)):
        yield f"No effect with init_from={values['init_from']!r}, whose weights determine them: {unused}."
    if not values["wandb_log"] and (unused := _named(config.values.keys() & {"wandb_project", "wandb_run_name"})):
        yield f"No effect with wandb_log=False: {unused}; for W&B, use logger=wandb logger.wandb.project=<project>."


def _system_notes(config: NanoGPTConfig, values: Mapping[str, Any]) -> Iterator[str]:
    """Yields notes on settings of the file that have no counterpart."""
    given = config.values
    if "out_dir" in given and values["init_from"] != "resume":
        yield f"out_dir={given['out_dir']!r} has no counterpart: runs are written to outputs/{_name(config)}/<time>."
    if "always_save_checkpoint" in given:
        yield (
            f"always_save_checkpoint={given['always_save_checkpoint']} has no counterpart: a checkpoint is saved after "
            "every evaluation; the last two and the best one are kept."
        )
    if "wandb_run_name" in given and values["wandb_log"]:
        yield (
            f"wandb_run_name={given['wandb_run_name']!r} has no counterpart: the W&B run is named "
            f"{_name(config)}/<time>; to change the first part: name=<name>."
        )
    if "backend" in given:
        yield f"backend={given['backend']!r} has no counterpart: it is NCCL on GPUs and Gloo on CPUs."
    device = given.get("device", "cuda")
    if device.startswith("cuda:"):
        yield f"device={device!r} is trainer=gpu; to select the GPU, set the environment variable CUDA_VISIBLE_DEVICES."
    elif _trainer(device) is None:
        yield f"device={device!r} is not supported: trainer=auto uses an NVIDIA GPU if there is one, otherwise the CPU."
    if given.get("dtype", "float32") not in ("float32", "bfloat16") and device.startswith("cuda"):
        yield _dtype_note(given["dtype"], "trainer.precision")
