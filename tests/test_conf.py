"""Every option in conf/ and every sweep gives a valid configuration."""

import json

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from configs import resolved
from gptlab.config.base import rebuild, validate
from gptlab.config.command import configuration_folder
from gptlab.config.resolve import resolve_to_dict
from gptlab.config.schema import GPT2_REPOSITORIES, RunConfig
from gptlab.evaluators.settings import EvaluateConfig
from gptlab.training.config import OptimizerConfig
from gptlab.training.optim.schedules import learning_rate

GROUPS = (
    "model",
    "data",
    "tokenizer",
    "optimizer",
    "schedule",
    "trainer",
    "callbacks",
    "logger",
    "lora",
    "loss",
    "experiment",
    "without",
    "debug",
)
# mandatory keys of options
NEEDED = {
    "data=component": ["data.reader._target_=x"],
    "tokenizer=component": ["tokenizer._target_=x"],
    "tokenizer=file": ["tokenizer.path=x"],
    "data=text": ["data.source=x"],
    "data=shards": ["data.path=x"],
    "callbacks=hellaswag": ["callbacks.hellaswag.path=x"],
    "callbacks=timer": ["callbacks.timer.duration=00:12:00:00"],
    "callbacks=energy": ["callbacks.energy.country_iso_code=DEU"],
    "data=huggingface": ["data.path=x", "data.column=text"],
    "model=gpt": ["model.n_layer=1", "model.n_head=1", "model.n_embd=8", "model.block_size=8", "optimizer.lr=1"],
}
OPTIONS = [
    f"{group}={path.stem}"
    for group in (*GROUPS, "sweeps")
    for path in sorted((configuration_folder() / group).glob("*.yaml"))
    if not path.stem.startswith("eval_")
]
EVALUATIONS = sorted(path.stem for path in (configuration_folder() / "experiment").glob("eval_*.yaml"))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_valid_and_workers_rebuild_its_configuration(option):
    recipe = ["experiment=speedrun_cpu"] if option.startswith("without=") else []  # whose parts it removes
    config = resolved(option, *NEEDED.get(option, recipe))
    assert config.seed == 1337
    values = json.loads(json.dumps(config.model_dump(mode="json")))
    rebuilt = rebuild(RunConfig, values)
    assert rebuilt == config
    assert repr(rebuilt) == repr(config)  # distinguishes tuples from lists, and floats from integers
    assert rebuilt.model_dump(mode="json") == values


def evaluate_config(*overrides: str) -> EvaluateConfig:
    """Returns the configuration of a command line of gptlab.evaluate."""
    with initialize_config_dir(str(configuration_folder()), version_base="1.3"):
        return validate(EvaluateConfig, resolve_to_dict(compose("evaluate", overrides=list(overrides))))


def test_evaluations_of_gpt2_have_nanogpts_names_and_corpus():
    assert EVALUATIONS == ["eval_gpt2", "eval_gpt2_large", "eval_gpt2_medium", "eval_gpt2_xl"]
    for name in EVALUATIONS:
        config = evaluate_config(f"experiment={name}")
        assert config.run == name.removeprefix("eval_").replace("_", "-")
        assert config.run in GPT2_REPOSITORIES
        assert config.data == resolved("data=openwebtext").data
        assert config.on_corpus


@pytest.mark.parametrize("option", ["data=text", "data=shakespeare", "data=shards"])
def test_evaluate_accepts_the_data_options_of_train(option):
    data = evaluate_config("run=x", option, *NEEDED.get(option, [])).data
    assert data == resolved(option, *NEEDED.get(option, [])).data


def test_every_directory_of_conf_is_a_tested_group():
    assert {path.name for path in configuration_folder().iterdir() if path.is_dir()} == {*GROUPS, "sweeps", "hydra"}


def test_model_gpt2_sets_tokenizer_and_learning_rate_unless_overridden():
    gpt2 = resolved("model=gpt2")
    assert (gpt2.tokenizer.name, gpt2.optimizer.lr, gpt2.model.block_size) == ("gpt2", 6e-4, 1024)
    other = resolved("model=gpt2", "tokenizer=bytes", "optimizer.lr=1")
    assert (other.tokenizer.name, other.optimizer.lr) == ("bytes", 1)
    assert resolved("experiment=shakespeare_char", "model=gpt2").tokenizer.name == "gpt2"
    assert resolved("model=gpt2", "trainer=ddp").trainer.strategy == "ddp"


@pytest.fixture(scope="module")
def whole() -> RunConfig:
    return resolved("experiment=speedrun_cpu")


@pytest.mark.parametrize("part", [o for o in OPTIONS if o.startswith("without=") and o != "without=nothing"])
def test_removing_a_part_changes_the_recipe(whole, part):
    other = resolved("experiment=speedrun_cpu", part)
    groups = {key for key in RunConfig.model_fields if getattr(whole, key) != getattr(other, key)}
    assert groups
    assert groups <= {"model", "optimizer", "schedule"}  # neither data nor length nor seed


def test_removing_nothing_keeps_the_recipe(whole):
    assert resolved("experiment=speedrun_cpu", "without=nothing") == whole


@pytest.fixture(scope="module")
def muon() -> OptimizerConfig:
    return resolved("optimizer=muon").optimizer


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.startswith(("model=", "experiment="))])
def test_muon_never_gets_a_learning_rate_for_adamw(muon, option):
    named = [need for need in NEEDED.get(option, []) if not need.startswith("optimizer.")]
    if resolved(option, "optimizer.lr=1", *named).optimizer.name == "adamw":
        assert resolved(option, "optimizer=muon", *named).optimizer == muon
    assert resolved(option, "optimizer=muon", "optimizer.lr=1", *named).optimizer.lr == 1


def test_experiments_have_nanogpts_values():
    cpu, gpu, owt = (
        resolved(f"experiment={e}") for e in ("shakespeare_char_cpu", "shakespeare_char", "gpt2_openwebtext")
    )
    shape = [(c.model.n_layer, c.model.n_head, c.model.n_embd, c.model.block_size) for c in (cpu, gpu, owt)]
    assert shape == [(4, 4, 128, 64), (6, 6, 384, 256), (12, 12, 768, 1024)]
    assert [c.train.max_steps for c in (cpu, gpu, owt)] == [2000, 5000, 600_000]
    assert [c.train.global_batch_size for c in (cpu, gpu, owt)] == [12, 64, 480]
    assert [c.model.dropout for c in (cpu, gpu, owt)] == [0.0, 0.2, 0.0]
    assert [c.optimizer.lr for c in (cpu, gpu, owt)] == [1e-3, 1e-3, 6e-4]
    assert [c.optimizer.betas for c in (cpu, gpu, owt)] == [(0.9, 0.99), (0.9, 0.99), (0.9, 0.95)]
    assert [c.schedule.warmup_steps for c in (cpu, gpu, owt)] == [100, 100, 2000]
    assert owt.train.global_batch_size * owt.model.block_size == 491_520
    assert {(c.optimizer.weight_decay, c.train.grad_clip, c.schedule.min_lr_ratio) for c in (cpu, gpu, owt)} == {
        (0.1, 1.0, 0.1)
    }
    assert {(c.model.bias, c.model.activation) for c in (cpu, gpu, owt)} == {(False, "gelu")}


def test_fine_tuning_has_nanogpts_values():
    tuned = resolved("experiment=finetune_shakespeare")
    assert (tuned.init_from, tuned.model.n_layer, tuned.tokenizer.name) == ("gpt2-xl", 48, "gpt2")
    assert (tuned.train.max_steps, tuned.train.global_batch_size, tuned.train.eval_every) == (20, 32, 5)
    assert {learning_rate(step, tuned.schedule, lr=tuned.optimizer.lr, max_steps=20) for step in range(20)} == {3e-5}
    smaller = resolved("experiment=finetune_shakespeare", "model=gpt2", "init_from=gpt2")
    assert (smaller.model.n_layer, smaller.optimizer.lr) == (12, 3e-5)


def test_a_group_accepts_several_options():
    config = resolved("logger=[csv,tensorboard,wandb]", "callbacks=[default,early_stopping]")
    assert config.logger.wandb is not None
    assert config.logger.tensorboard is not None
    assert config.callbacks.early_stopping is not None
    assert config.callbacks.checkpoint is not None


def test_every_yaml_file_begins_with_a_description():
    for path in configuration_folder().rglob("*.yaml"):
        first = next(line for line in path.read_text().splitlines() if "@package" not in line)
        if "hydra/help" not in str(path):
            assert first.startswith("# "), path
        OmegaConf.load(path)
