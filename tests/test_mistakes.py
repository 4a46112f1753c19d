"""Errors in the command line or the input: a message, exit code 2, nothing written, torch not imported."""

import os
import re
import sys

import pytest

from commands import assert_config_error
from gptlab.config.search_path import configuration_folder

TRAIN = "gptlab.train"
TEXT = ("data=text", "data.source=text.txt")


CONFIG_ERRORS = {
    "unknown key": (["modle.n_layer=3"], "Unknown config key `modle.n_layer`. Did you mean model.n_layer?"),
    "added key": (["+model.n_layers=3"], "Unknown config key `model.n_layers`. Did you mean model.n_layer?"),
    "forced unknown key": (["++model.n_layers=3"], "Unknown config key `model.n_layers`. Did you mean model.n_layer?"),
    "added value of a key": (["+model.n_layer=3"], "model.n_layer already has a value. To change it: model.n_layer="),
    "deleted key": (["~optimizer.fused"], "optimizer.fused is missing. Set it on the command line: optimizer.fused="),
    "deleted group": (["~optimizer"], "optimizer needs an option. Valid options: adafactor, adamw"),
    "deleted unknown key": (["~optimizer.fusd"], "'optimizer.fusd' does not exist"),
    "several actions": (["--cfg=job", "--info=all"], "Only one of "),
    "resolve alone": (["--resolve"], "The --resolve flag can only be used"),
    "another option's key": (
        ["schedule=constant", "schedule.decay_steps=3"],
        "`schedule.decay_steps` belongs to other options of schedule=",
    ),
    "wrong type": (
        ["model.n_layer=abc"],
        "model.n_layer='abc' is not valid: it should be an integer greater than 0 and less than or equal to 10,000.",
    ),
    "number for a string": (
        ["name=7"],
        "that begins with a letter or a digit. To pass the number as a string: 'name=\"7\"'",
    ),
    "letters of a name": (["name=é"], "name='é' is not valid: it should be a name of letters (A-Z), digits, '.', '_'"),
    "package of a group": (["model@model=gpt2"], "The defaults list has no model for the package 'model'. To select:"),
    "space before =": (["seed =3"], "'seed =3' has a space before '='. Write seed=3"),
    "several values": (
        ["seed=1,2"],
        "seed=1,2 has several values. To train a run for each: python -m gptlab.train -m 's",
    ),
    "deleted group that is needed": (["~model"], "model needs an option. Valid options: gpt, gpt2,"),
    "directory of Hydra": (["hydra.output_subdir=.hydra"], "hydra.output_subdir=.hydra is not supported: config.yaml"),
    "working directory": (["hydra.job.chdir=true"], "hydra.job.chdir=true is not supported: paths are relative"),
    "file without a key": (["text.txt"], "To use the file: data=text data.source=text.txt"),
    "out of range": (["optimizer.lr=-1"], "optimizer.lr=-1 is not valid: it should be a number greater than 0"),
    "unknown choice": (["trainer.precision=8"], "trainer.precision=8 is not valid: it should be 'auto', '32-true'"),
    "alternatives": (
        ["trainer.devices=two"],
        "trainer.devices='two' is not valid: it should be an integer greater than 0, or 'auto'.",
    ),
    "heads and width": (["model.n_head=3"], "model.n_head=3 does not divide n_embd=128. Nearest divisors: 2 and 4"),
    "batch and micro-batch": (
        ["train.global_batch_size=10", "train.micro_batch_size=4"],
        "train.global_batch_size=10 is not divisible by 4 (1 device x train.micro_batch_size=4). Nearest valid",
    ),
    "batch and devices": (
        ["trainer=ddp", "trainer.devices=8"],
        "train.global_batch_size=12 is not divisible by 8 (8 devices). Nearest valid values: 8 and 16",
    ),
    "an earlier batch and devices": (
        ["train.batch_schedule=[[5,3]]", "trainer=ddp", "trainer.devices=2"],
        "train.batch_schedule: batch size=3 is not divisible by 2 (2 devices x accumulation=1). Nearest",
    ),
    "batches that do not grow": (
        ["train.batch_schedule=[[5,8],[9,4]]"],
        "train.batch_schedule=[[5, 8], [9, 4]] must be a list of [last step, batch size] pairs",
    ),
    "devices without a strategy": (["trainer.devices=2"], "need a distributed strategy, but strategy=single"),
    "devices and groups": (
        ["trainer=fsdp_tp", "trainer.devices=3"],
        "trainer.tensor_parallel=2 does not divide the number of devices per node, trainer.devices=3.",
    ),
    "optimizer that cannot be sharded": (
        ["optimizer=adafactor", "trainer=fsdp"],
        "optimizer=adafactor does not work with trainer=fsdp: torch.optim.Adafactor cannot update sharded weights",
    ),
    "average below the resolution": (
        ["train.ema_decay=0.999", "trainer.precision=bf16-true"],
        "train.ema_decay=0.999 does not work with trainer.precision=bf16-true",
    ),
    "heads and groups": (
        ["trainer=fsdp_tp", "trainer.tensor_parallel=3"],
        "model.n_head=4 is not divisible by trainer.tensor_parallel=3: attention is split by heads.",
    ),
    "too many processes": (
        ["trainer=ddp", "trainer.devices=99999", "trainer.accelerator=cpu", "train.global_batch_size=99999"],
        f"trainer.devices=99999: this machine has no GPU and {os.cpu_count()} CPU cores. Use at most trainer.devices=",
    ),
    "unknown option": (
        ["model=gtp2"],
        "Unknown option model=gtp2. Did you mean gpt2? Valid options: gpt, gpt2, gpt2-large,",
    ),
    "unknown option in a list": (
        ["callbacks=[default,smaples]"],
        "Unknown option callbacks=smaples. Did you mean samples? Valid options: ",
    ),
    "a number as an option": (["lora=5"], "Unknown option lora=5. Valid options: all, attention."),
    "unknown group": (["modl=gpt2"], "Unknown config key `modl`. Did you mean model?"),
    "two lengths": (["train.max_tokens=9", "train.max_steps=9"], "exactly one of max_steps and max_tokens must be set"),
    "missing value": (["data=text"], "data.source is missing. Set it on the command line"),
    "missing file": (["data=text", "data.source=a=b.txt"], "a=b.txt does not exist"),
    "empty file": (["data=text", "data.source=empty.txt"], "empty.txt is empty"),
    "too short": ([*TEXT, "model.block_size=50000"], "is too short: its train split has"),
    "not tinyshakespeare": (["data=shakespeare_char", "data.source=text.txt"], "is not the tinyshakespeare text"),
    "no vocabulary": (
        [*TEXT, "tokenizer=gpt2", "tokenizer.vocab_dir=."],
        " lacks vocab.bpe and encoder.json",
    ),
    "vocabulary too small": (
        [*TEXT, "model.vocab_size=9"],
        "model.vocab_size=9 differs from tokenizer=bytes, which has 257",
    ),
    "shards not there": (["data=shards", "data.path=nothing/*.bin"], "nothing/*.bin matches nothing"),
    "no run directory": (["resume=text.txt"], "resume=text.txt is not a run directory"),
    "no weights": (["init_from=gpt3"], "init_from=gpt3 does not exist"),
    "weights that are text": (["init_from=text.txt"], "init_from=text.txt is not a nanoGPT checkpoint"),
    "no nanoGPT checkpoint": (["resume_from_nanogpt=no.pt"], "resume_from_nanogpt=no.pt is not a nanoGPT checkpoint"),
    "unreadable override": (["{"], "{"),
    "a name that is too long": ([f"name={'x' * 300}"], "should have at most 200 characters"),
    "a path that is too long": ([f"resume={'x' * 300}"], "A path is longer than the file system allows: xxx"),
    "steps that overflow": ([f"train.max_steps={2**31}"], "train.max_steps=2147483648 is not valid"),
    "a batch that overflows": ([f"train.global_batch_size={2**31}"], "less than or equal to 16,777,216"),
    "a window that overflows": ([f"train.spike_window={2**63}"], "less than or equal to 1,000,000"),
    "too many workers": ([f"data.num_workers={2**31}"], "less than or equal to 1,024"),
    "a truth value as a number": (["seed=true"], "seed=True is not valid: it should be an integer"),
    "a number of packages": (["trust=5"], "trust=5 is not a list of packages"),
    "numbers of packages": (["trust=[1e300]"], "is not a list of packages"),
    "name with a path": (["name=../x"], "name='../x' is not valid"),
}


@pytest.mark.parametrize(("arguments", "message"), CONFIG_ERRORS.values(), ids=CONFIG_ERRORS)
def test_an_invalid_command_line_is_a_config_error(without_torch, arguments, message):
    (without_torch.folder / "empty.txt").touch()
    assert_config_error(without_torch.python(TRAIN, *arguments), message)
    assert not (without_torch.folder / "outputs").exists()


def test_more_gpus_than_available_is_a_config_error(user):
    done = user.train("trainer=gpu", "trainer.devices=1", "trainer.accelerator=gpu")
    assert_config_error(done, "PyTorch finds no GPU on this machine. Use trainer=cpu")
    assert not (user.folder / "outputs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=text.txt"], "run=text.txt is not a nanoGPT checkpoint"),
        (["run=nowhere"], "run=nowhere does not exist"),
        (["rum=x"], "Unknown config key `rum`. Did you mean run?"),
        ([], "run is missing"),
        (["run=x", "temperature=-1"], "temperature=-1 is not valid"),
        (["run=x", f"num_samples={2**31}"], "less than or equal to 100,000"),
        (["run=x", f"max_new_tokens={2**63}"], "less than or equal to 1,000,000"),
        ([f"run={'x' * 300}"], "A path is longer than the file system allows: xxx"),
    ],
)
def test_an_invalid_sample_command_is_a_config_error(without_torch, arguments, message):
    assert_config_error(without_torch.python("gptlab.sample", *arguments), message)


@pytest.mark.parametrize("module", ["gptlab.train", "gptlab.sample"])
@pytest.mark.parametrize("flag", ["--help", "--cfg=job"])
def test_help_and_configuration_need_no_torch(without_torch, module, flag):
    done = without_torch.python(module, flag)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^seed[:=] ?1337$", done.stdout, re.MULTILINE)


COMMANDS = ("train", "bench", "dashboard", "evaluate", "export", "plan", "prepare", "prove", "report", "runs", "sample")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns(user, command):
    done = user.python(f"gptlab.{command}", "--help")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not re.match(r"/|[\w.]+=", line)]  # no paths, no values
    assert [line for line in lines if len(line) > 80] == []
    assert "\n\n\n" not in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_key_and_names_the_configuration_directory(user, command):
    done = user.python(f"gptlab.{command}", "--help")
    lines = done.stdout.splitlines()
    keys = [number for number, line in enumerate(lines) if re.match(r"[\w.]+=", line)]
    assert keys
    assert [lines[number] for number in keys if not lines[number + 1].startswith("    ")] == []
    assert f"{configuration_folder()} (gptlab's own)" in lines


def test_help_explains_a_key_as_the_selected_option_and_the_command_do(user):
    (user.folder / "conf" / "optimizer").mkdir(parents=True)
    (user.folder / "conf" / "optimizer" / "mine.yaml").write_text("defaults: [adamw]\nlr: 0.5  # my own rate\n")
    assert "\noptimizer.lr=0.5\n    my own rate\n" in user.python(TRAIN, "--help", "optimizer=mine").stdout
    assert "\nlimit=40\n    maximum number of runs to print; null: all\n" in user.python("gptlab.runs", "--help").stdout


@pytest.mark.parametrize(
    ("module", "own", "other", "message"),
    [
        (
            TRAIN,
            "speedrun_cpu",
            "eval_gpt2",
            "is for python -m gptlab.evaluate: it sets run, which gptlab.train does not have.",
        ),
        (
            "gptlab.evaluate",
            "eval_gpt2",
            "quickstart",
            "is for python -m gptlab.train: it sets name, which gptlab.evaluate",
        ),
    ],
)
def test_an_experiment_of_another_command_is_a_config_error(without_torch, module, own, other, message):
    assert_config_error(without_torch.python(module, f"experiment={other}"), f"experiment={other} {message}")
    done = without_torch.python(module, "--help")
    (paragraph,) = re.findall(r"^experiment: (.*(?:\n  .*)*)", done.stdout, re.MULTILINE)
    listed = re.split(r",\s+", paragraph)
    assert own in listed
    assert other not in listed


@pytest.mark.parametrize("rank", [0, 1])
def test_a_sweep_under_torchrun_is_a_config_error_on_every_rank(without_torch, rank):
    variables = {"TORCHELASTIC_RUN_ID": "none", "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    without_torch.environment |= variables
    done = without_torch.python(TRAIN, "-m", "seed=1,2")
    assert done.returncode == 2
    assert ("cannot be started by torchrun" in done.stderr) == (rank == 0)  # once for all ranks


@pytest.mark.parametrize(
    ("command", "argument"), [("runs", "runs=~/x"), ("train", "--config-dir=~/x"), ("new", "from_nanogpt=~/x")]
)
def test_a_missing_home_directory_is_a_config_error(user, command, argument):
    del user.environment["HOME"]
    arguments = [command, *(["mylab"] if command == "new" else []), argument]
    code = (
        "import pwd, runpy, sys; pwd.getpwuid = lambda uid: {}[uid]; "  # as for a user without an entry
        f"sys.argv[:] = {arguments}; runpy.run_module('gptlab.{command}', run_name='__main__', alter_sys=True)"
    )
    assert_config_error(user.run(sys.executable, "-c", code), "Set HOME")
