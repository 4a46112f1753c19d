"""nanoGPT's own configuration files and others give experiments that are equal to gptlab's own ones and to train.py."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from configs import resolved
from gptlab.config.base import validate
from gptlab.config.command import configuration_folder
from gptlab.config.resolve import resolve, resolve_to_dict
from gptlab.config.schema import RunConfig
from gptlab.errors import UserError
from gptlab.evaluators.settings import EvaluateConfig
from gptlab.projects.nanogpt_config import DEFAULTS, read_nanogpt_config
from gptlab.projects.nanogpt_experiment import Experiment, to_experiment, write_experiment
from gptlab.training.optim.schedules import learning_rate

# The statements of the files in config/ of karpathy/nanoGPT (MIT license), commit 3adf61e, without comments.
EVALUATE = "batch_size = 8\neval_iters = 500\neval_only = True\nwandb_log = False\ninit_from = "
FILES = {
    "eval_gpt2": f"{EVALUATE}'gpt2'\n",
    "eval_gpt2_medium": f"{EVALUATE}'gpt2-medium'\n",
    "eval_gpt2_large": f"{EVALUATE}'gpt2-large'\n",
    "eval_gpt2_xl": f"{EVALUATE}'gpt2-xl'\n",
    "finetune_shakespeare": """
import time
out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())
dataset = 'shakespeare'
init_from = 'gpt2-xl'
always_save_checkpoint = False
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
decay_lr = False
""",
    "train_gpt2": """
wandb_log = True
wandb_project = 'owt'
wandb_run_name='gpt2-124M'
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 600000
lr_decay_iters = 600000
eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1
""",
    "train_shakespeare_char": """
out_dir = 'out-shakespeare-char'
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False
wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
""",
}
# the flags of nanoGPT's README for a CPU
FILES["train_shakespeare_char_cpu"] = f"""{FILES["train_shakespeare_char"]}
device = 'cpu'
compile = False
eval_iters = 20
log_interval = 1
block_size = 64
batch_size = 12
n_layer = 4
n_head = 4
n_embd = 128
max_iters = 2000
lr_decay_iters = 2000
dropout = 0.0
"""


@pytest.fixture
def convert(tmp_path):
    def convert_text(text: str, name: str = "train_x") -> Experiment:
        file = tmp_path / f"{name}.py"
        file.write_text(text)
        return to_experiment(read_nanogpt_config(file))

    return convert_text


@pytest.fixture
def composed(tmp_path):
    """Composes an experiment that was written to a directory in Hydra's search path, and validates the result."""

    def compose_experiment(experiment: Experiment, *more: str) -> RunConfig | EvaluateConfig:
        directory = tmp_path / "conf"
        (directory / "experiment").mkdir(parents=True, exist_ok=True)
        (directory / "experiment" / "written.yaml").write_text(write_experiment(experiment))
        overrides = [f"hydra.searchpath=[file://{directory}]", "experiment=written", *more]
        with initialize_config_dir(str(configuration_folder()), version_base="1.3"):
            values = compose(experiment.command, overrides=overrides)
            if experiment.command == "train":
                return resolve(values, overrides)
            return validate(EvaluateConfig, resolve_to_dict(values))

    return compose_experiment


def evaluate_config(*overrides: str) -> EvaluateConfig:
    with initialize_config_dir(str(configuration_folder()), version_base="1.3"):
        return validate(EvaluateConfig, resolve_to_dict(compose("evaluate", overrides=list(overrides))))


def leaves(config: Any) -> dict[str, Any]:
    def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in values.items():
            flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return flat

    return flatten(config.model_dump(mode="json"))


def differences(config: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    """Returns the keys with different values, and both values."""
    ours, theirs = leaves(config), leaves(other)
    return {k: (ours.get(k), theirs.get(k)) for k in ours | theirs if ours.get(k) != theirs.get(k)}


TRAINING = {  # gptlab's own experiment, and the differences from it
    "train_gpt2": (
        ("experiment=gpt2_openwebtext", "logger=wandb"),  # wandb_log=True
        {
            "name": ("train_gpt2", "gpt2_openwebtext"),
            # nanoGPT's file does not say how many GPUs there are: torchrun does. The batch does not depend on it.
            "trainer.devices": (1, "auto"),
            "trainer.strategy": ("single", "ddp"),
            "logger.wandb.project": ("owt", "gptlab"),
        },
    ),
    "train_shakespeare_char": (
        ("experiment=shakespeare_char",),
        {
            "name": ("train_shakespeare_char", "shakespeare_char"),
            # 200 batches of 64 windows. The val split has 435 windows of 256, so all are scored in both cases.
            "train.eval_windows": (12_800, None),
        },
    ),
    "train_shakespeare_char_cpu": (
        ("experiment=shakespeare_char_cpu",),
        {
            "name": ("train_shakespeare_char_cpu", "shakespeare_char_cpu"),
            "train.eval_windows": (240, None),  # 20 batches of 12; gptlab's experiment scores the whole val split
            "train.log_every": (1, 10),
            # explicit in nanoGPT's command, and what auto resolves to for this model on a CPU
            "trainer.accelerator": ("cpu", "auto"),
            "trainer.precision": ("32-true", "auto"),
            "train.compile": (False, "auto"),
        },
    ),
    "finetune_shakespeare": (("experiment=finetune_shakespeare",), {}),
}


@pytest.mark.parametrize("name", TRAINING)
def test_training_configurations_of_nanogpt_equal_gptlabs_experiments(convert, composed, name):
    overrides, expected = TRAINING[name]
    assert differences(composed(convert(FILES[name], name)), resolved(*overrides)) == expected


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("eval_")])
def test_evaluations_of_nanogpt_equal_gptlabs_experiments(convert, composed, name):
    config = composed(convert(FILES[name], name))
    assert differences(config, evaluate_config(f"experiment={name}")) == {
        # nanoGPT estimates both losses on 500 batches of 8; gptlab's experiments score every token of val
        "split": ("all", "val"),
        "windows": (4000, None),
        "batch_size": (8, None),
    }


def test_all_notes_on_nanogpts_files_are_about_their_settings(convert):
    notes = {name: convert(text, name).notes for name, text in FILES.items()}
    assert all(notes[name] == ["Not used by gptlab.evaluate: wandb_log."] for name in notes if "eval_" in name)
    named = {name: [next(s for s in DEFAULTS if s in note) for note in notes[name]] for name in TRAINING}
    unused = ["wandb_log", "out_dir", "always_save_checkpoint"]
    assert named == {
        "train_gpt2": ["wandb_run_name"],
        "train_shakespeare_char": unused,
        "train_shakespeare_char_cpu": unused,
        "finetune_shakespeare": ["wandb_log", "init_from", "out_dir", "always_save_checkpoint"],
    }
    assert all(note.endswith(".") and "\n" not in note for part in notes.values() for note in part)


@pytest.mark.parametrize("name", FILES)
def test_written_file_is_the_experiment(convert, name):
    experiment = convert(FILES[name], name)
    text = write_experiment(experiment)
    assert yaml.safe_load(text) == experiment.document
    assert text.startswith("# @package _global_\n# ")
    assert max(map(len, text.splitlines())) <= 120


def test_written_file_names_the_settings_of_nanogpt(convert):
    lines = write_experiment(convert(FILES["train_gpt2"])).splitlines()
    comments = {line.split(":")[0].strip(): line.split("#")[1].strip() for line in lines[2:] if "#" in line}
    assert comments["global_batch_size"] == "batch_size · gradient_accumulation_steps"
    assert comments["min_lr_ratio"] == "min_lr / learning_rate"
    assert comments["betas"] == "beta1, beta2"
    assert "n_layer" not in comments


def test_empty_configuration_has_the_defaults_of_train_py(convert, composed):
    config = composed(convert(""))
    assert (config.data.path, config.tokenizer.name, config.schedule.name) == (
        "Skylion007/openwebtext",
        "gpt2",
        "cosine",
    )
    shape = (config.model.n_layer, config.model.n_head, config.model.n_embd, config.model.block_size)
    assert shape == (12, 12, 768, 1024)
    assert config.with_vocabulary(50_257).model.padded_vocab_size == 50_304
    assert (config.train.eval_every, config.train.eval_windows, config.train.log_every) == (2000, 2400, 1)
    assert (config.train.global_batch_size, config.train.micro_batch_size) == (480, 12)
    assert (config.trainer.precision, config.train.compile) == ("auto", "auto")


def nanogpt_lr(it: int, s: dict[str, Any]) -> float:
    """The learning rate of nanoGPT's train.py."""
    if not s["decay_lr"]:
        return s["learning_rate"]
    if it < s["warmup_iters"]:
        return s["learning_rate"] * (it + 1) / (s["warmup_iters"] + 1)
    if it > s["lr_decay_iters"]:
        return s["min_lr"]
    decay_ratio = (it - s["warmup_iters"]) / (s["lr_decay_iters"] - s["warmup_iters"])
    return s["min_lr"] + 0.5 * (1.0 + math.cos(math.pi * decay_ratio)) * (s["learning_rate"] - s["min_lr"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lr_decay_iters": 60},
        {"lr_decay_iters": 300},
        {"warmup_iters": 0, "min_lr": 0.0},
        {"learning_rate": 3e-5, "min_lr": 7e-6},
        {"decay_lr": False, "learning_rate": 3e-5},
        {"warmup_iters": 80, "lr_decay_iters": 50},
    ],
)
def test_learning_rates_are_nanogpts(convert, composed, changes):
    settings = {"max_iters": 100, "lr_decay_iters": 100, "warmup_iters": 10, **changes}
    config = composed(convert("".join(f"{key} = {value!r}\n" for key, value in settings.items())))
    rates = [learning_rate(s, config.schedule, lr=config.optimizer.lr, max_steps=config.steps) for s in range(100)]
    assert rates == pytest.approx([nanogpt_lr(it, DEFAULTS | settings) for it in range(100)], rel=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dtype = 'float32'", {"trainer.precision": "32-true"}),
        (
            "dtype = 'bfloat16'\ndevice = 'cuda'\ncompile = True\ngrad_clip = 0.0\nlr_decay_iters = 5\nmax_iters = 7",
            {
                "trainer.precision": "bf16-mixed",
                "trainer.accelerator": "gpu",
                "train.compile": True,
                "train.grad_clip": 0.0,
                "schedule.decay_steps": 5,
                "train.max_steps": 7,
            },
        ),
        ("dtype = 'bfloat16'\ndevice = 'cpu'", {"trainer.precision": "32-true"}),  # no autocast on a CPU
        (
            "learning_rate = 7e-4\nmin_lr = 7e-5\nweight_decay = 0\nbeta1 = 0.8\nbias = True\ndataset = 'mine'",
            {
                "schedule.min_lr_ratio": 0.1,  # not 0.09999999999999999
                "optimizer.weight_decay": 0.0,
                "optimizer.betas": [0.8, 0.95],
                "model.bias": True,
                "data.path": "data/mine",
                "tokenizer.name": "gpt2",
            },
        ),
        ("init_from = 'resume'\nout_dir = 'out-x'", {"resume_from_nanogpt": "out-x/ckpt.pt"}),
        (
            "init_from = 'gpt2'\nblock_size = 256\nbias = False",
            {
                "model.block_size": 256,
                "model.bias": True,
                "model.pad_vocab_to_multiple_of": "auto",
            },  # of OpenAI's weights
        ),
        ("init_from = 'gpt2-medium'\ndropout = 0.1", {"model.dropout": 0.1}),
        ("dataset = 'shakespeare'", {"model.pad_vocab_to_multiple_of": 64}),
        ("dataset = 'shakespeare_char'", {"model.pad_vocab_to_multiple_of": "auto"}),
        ("wandb_log = True\nwandb_project = 'a: # b'", {"logger.wandb.project": "a: # b"}),
        (
            "wandb_log = True\nwandb_project = '${oc.env:HOME}'\n" + r"dataset = 'a\\${name}\n'",
            {"logger.wandb.project": "${oc.env:HOME}", "data.path": "data/a\\${name}\n"},
        ),
    ],
)
def test_settings_determine_the_keys(convert, composed, text, expected):
    found = leaves(composed(convert(text)))
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("init_from = 'resume'\nout_dir = 'o'", "run", "o/ckpt.pt"),
        ("init_from = 'gpt2'\ndtype = 'float32'", "precision", "float32"),
        ("init_from = 'gpt2'\ndtype = 'bfloat16'", "precision", "bfloat16"),
        ("init_from = 'gpt2'\ndtype = 'float16'", "precision", "auto"),
        ("init_from = 'gpt2'\ndevice = 'cpu'", "precision", "float32"),
        ("init_from = 'gpt2'\ndataset = 'shakespeare'", "data.corpus", "shakespeare"),
        ("init_from = 'gpt2'\ndataset = 'mine'", "data.path", "data/mine"),
    ],
)
def test_setting_determines_the_key_of_an_evaluation(convert, composed, text, key, value):
    assert leaves(composed(convert(f"eval_only = True\n{text}")))[key] == value


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("dtype = 'float16'", "dtype='float16' has no counterpart"),
        ("device = 'cuda:1'", "CUDA_VISIBLE_DEVICES"),
        ("device = 'mps'", "device='mps' is not supported"),
        ("backend = 'gloo'", "backend='gloo' has no counterpart"),
        ("decay_lr = False\nmin_lr = 1\nwarmup_iters = 5", "No effect with decay_lr=False: warmup_iters, min_lr."),
        ("init_from = 'gpt2'\nn_layer = 3", "whose weights determine them: n_layer."),
        ("init_from = 'resume'", "resume_from_nanogpt='out/ckpt.pt'"),
        ("dataset = 'mine'", "set data.path"),
        ("eval_only = True\ninit_from = 'gpt2'\nblock_size = 64", "block_size=64 has no counterpart"),
        ("eval_only = True\ninit_from = 'gpt2'\ndtype = 'float16'", "dtype='float16' has no counterpart"),
    ],
)
def test_setting_without_a_counterpart_has_a_note(convert, text, note):
    (found,) = [line for line in convert(text).notes if note in line]
    assert found.endswith(".")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("init_from = 'gpt3'", "init_from='gpt3' is not valid"),
        ("init_from = 'gpt2'\ndataset = 'shakespeare_char'", "IDs of characters"),
        ("eval_only = True", "random weights"),
        ("learning_rate = 3e-5", "min_lr=6e-05 is greater than learning_rate=3e-05"),
        ("learning_rate = 0.0", "learning_rate=0.0 must be greater than 0"),
    ],
)
def test_configuration_without_an_equal_experiment_is_a_user_error(convert, text, message):
    with pytest.raises(UserError) as error:
        convert(text)
    assert message in str(error.value)
    assert "train_x.py" in str(error.value)


@pytest.mark.parametrize(("stem", "name"), [("my run", "my_run"), ("-x=1", "x_1"), ("\n${a}", "a"), ("#", "nanogpt")])
def test_name_is_valid_for_a_run(composed, tmp_path, stem, name):
    path = Path(tmp_path / f"{stem}.py")
    path.write_text("dataset = 'shakespeare'")
    experiment = to_experiment(read_nanogpt_config(path))
    assert experiment.name == name
    assert composed(experiment).name == name
