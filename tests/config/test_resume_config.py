"""Configuration of a resumed run, and of a run that starts from the weights of another one."""

import logging

import pytest
import yaml

from configs import resolved
from gptlab.config import resolve as resolve_module
from gptlab.config.resolve import add_keys_of_run, resolve_split
from gptlab.config.schema import RunConfig
from gptlab.errors import UserError
from gptlab.tracking.run_directory import without_origin

TEXT = ("data=text", "data.source=text.txt", "model=tiny")


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Stores the configuration of a run in outputs/run/1, as a run does, and returns the override that resumes it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("text")

    def store(*overrides: str) -> str:
        directory = tmp_path / "outputs" / "run" / "1"
        directory.mkdir(parents=True)
        config = resolve_split(resolved(*overrides).with_absolute_paths()).with_vocabulary(257)
        (directory / "config.yaml").write_text(yaml.safe_dump(without_origin(config)))
        return "resume=outputs/run/1"

    return store


def resumed(*overrides: str) -> RunConfig:
    """Resolves overrides as the train command does."""
    return resolved(*add_keys_of_run(overrides))


def test_a_deleted_callback_is_deleted_from_a_resumed_run(monkeypatch):
    earlier = resolved()
    assert earlier.callbacks.samples is not None
    monkeypatch.setattr(resolve_module, "load_config", lambda *_: earlier)
    resumed = resolved("resume=run", "~callbacks.samples")
    assert resumed.callbacks.samples is None
    assert resumed.callbacks.checkpoint == earlier.callbacks.checkpoint


def test_keys_of_the_runs_own_options_can_be_changed(stored):
    run = stored("logger=wandb", "logger.wandb.project=mine", "callbacks=[default,early_stopping]", "lora=attention")
    config = resumed(run, "logger.wandb.mode=offline", "callbacks.early_stopping.patience=7", "~callbacks.samples")
    assert config.logger.wandb.mode == "offline"
    assert config.logger.wandb.project == "mine"
    assert config.callbacks.early_stopping.patience == 7
    assert config.callbacks.samples is None
    assert resumed(run, "~callbacks.early_stopping").callbacks.early_stopping is None
    with pytest.raises(UserError, match=r"lora\.rank cannot change"):
        resumed(run, "lora.rank=5")


def test_a_selected_option_that_the_run_has_keeps_its_values(stored, caplog):
    caplog.set_level(logging.INFO, "gptlab")
    run = stored("logger=wandb", "logger.wandb.project=mine", "logger.wandb.tags=[a]", "callbacks.samples.top_k=9")
    config = resumed(run, "logger=[csv,wandb]", "logger.wandb.mode=offline", "callbacks=[default,early_stopping]")
    assert (config.logger.wandb.project, config.logger.wandb.tags) == ("mine", ["a"])
    assert (config.logger.wandb.mode, config.callbacks.samples.top_k) == ("offline", 9)
    assert config.callbacks.early_stopping.patience == 5  # the default of an added option
    assert "logger.wandb.project=mine" in caplog.text
    assert "callbacks.samples.top_k=9" in caplog.text
    assert "changed   callbacks.early_stopping added, logger.wandb.mode=offline (was auto)" in caplog.text
    assert resumed(run, "logger=csv").logger.wandb is None


@pytest.mark.parametrize(
    "command",
    [
        (*TEXT, "optimizer=muon", "optimizer.ns_steps=3", "train.max_tokens=10000", "logger=wandb"),
        ("experiment=shakespeare_char", "seed=7", "train.max_steps=3"),
        (*TEXT, "init_from=gpt2", "optimizer.lr=0.5"),
    ],
)
def test_the_original_command_can_be_repeated(stored, caplog, command):
    caplog.set_level(logging.INFO, "gptlab")
    run = stored(*command)
    earlier = resumed(run)
    assert resumed(*command, run) == earlier
    assert "changed" not in caplog.text
    longer = [item for item in command if "train.max" not in item]
    assert resumed(*longer, "train.max_steps=77", run).steps == 77


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model=nano", "model.n_layer=4 (was 2)"),
        ("experiment=shakespeare_char", "model.n_layer=6 (was 2)"),
        ("init_from=gpt2-medium", "init_from=gpt2-medium (was gpt2)"),
        ("trainer.precision=bf16-true", "trainer.precision=bf16-true (was auto)"),
    ],
)
def test_a_change_to_another_run_is_an_error_with_both_values(stored, override, key):
    run = stored(*TEXT, "init_from=gpt2")
    with pytest.raises(UserError) as raised:
        resumed(run, override)
    assert key in str(raised.value)


def test_a_deterministic_run_does_not_choose_kernels_by_their_speed():
    for mode in ("max-autotune", "max-autotune-no-cudagraphs"):
        with pytest.raises(UserError, match=rf"compile_mode={mode} .* trainer\.deterministic=true"):
            resolved("trainer.deterministic=true", f"train.compile_mode={mode}")
    assert resolved("trainer.deterministic=true", "train.compile_mode=reduce-overhead").trainer.deterministic


def test_a_run_from_the_weights_of_another_has_its_model_and_tokenizer(stored):
    stored("model=tiny", "model.norm=rms", "tokenizer=gpt2")
    init = "init_from=outputs/run/1"
    config = resolved(init, "model.dropout=0.25")
    trained = resolved("model=tiny", "model.norm=rms", "tokenizer=gpt2")
    assert config.model == trained.model.model_copy(update={"dropout": 0.25})
    assert config.tokenizer == trained.tokenizer
    assert resolved(init, "tokenizer=bytes").tokenizer.name == "bytes"
    assert resolved(init, "model=nano").model == resolved("model=nano").model  # a selected model is not changed


def test_code_that_the_weights_run_names_is_not_trusted(stored, tmp_path):
    stored("model=tiny")
    path = tmp_path / "outputs" / "run" / "1" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"]["block"] = {"_target_": "other.Block"}
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="package other, which is not trusted"):
        resolved("init_from=outputs/run/1")


def test_a_trainer_option_keeps_precision_and_determinism(stored):
    run = stored(*TEXT, "trainer=cpu", "trainer.deterministic=true", "trainer.precision=bf16-mixed")
    trainer = resumed(run, "trainer=ddp").trainer
    assert (trainer.strategy, trainer.deterministic, trainer.precision) == ("ddp", True, "bf16-mixed")
    assert not resumed(run, "trainer=ddp", "trainer.deterministic=false").trainer.deterministic
