"""The documentation: its commands are valid, its configuration reference is whole, and its pictures are there."""

import re
import shlex
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from config_reference import meaning, read_configuration, render_pages
from config_reference import comments as known_comments
from gptlab.benchmarks.config import BenchCommand
from gptlab.config.base import known_keys, validate
from gptlab.config.command import _quote_override, configuration_folder
from gptlab.config.option_groups import OptionGroups
from gptlab.config.resume import resolve, resolve_to_dict
from gptlab.config.schema import RunConfig
from gptlab.dashboard import DashboardConfig
from gptlab.evaluators.settings import EvaluateConfig
from gptlab.export import ExportConfig
from gptlab.launch.prepare_data import PrepareCommand
from gptlab.planning.settings import KEYS, resolve_plan
from gptlab.report import ReportConfig
from gptlab.runs import RunsCommand
from gptlab.sample import SampleConfig
from gptlab.verification.configs import ProveArguments, resolve_proof

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
PAGES = [
    *(path for name in ("README.md", "CONTRIBUTING.md") if (path := ROOT / name).exists()),
    *sorted((ROOT / "docs").rglob("*.md")),
]
HELP = sorted((CONF / "hydra" / "help").glob("*.yaml"))
CONFIGS = {
    "bench": BenchCommand,
    "dashboard": DashboardConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "prepare": PrepareCommand,
    "report": ReportConfig,
    "runs": RunsCommand,
    "sample": SampleConfig,
}
EXTRA_KEYS = {"plan": set(KEYS), "prove": set(known_keys(ProveArguments))}  # in addition to those of a run
LITERAL_KEYS = {"report": ("runs", "out"), "runs": ("filter",), "sample": ("prompt",)}
FENCE = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"-m gptlab\.(\w+)(.*)")
PLACEHOLDER = re.compile(r"<[^<>]*>|(?<![^=,\[])\.\.\.")
CHOICES = {"<suite>": "train", "<format>": "hf"}


def code_lines(path: Path) -> list[str]:
    """Lines of code of a page: of its fenced blocks, and each inline span."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":  # in a help text, a description follows the command after two spaces or more
        return [re.split(r"(?<=\S) {2,}", line.strip())[0] for line in text.splitlines()]
    fenced = [block[0].replace("\\\n", " ") for block in FENCE.finditer(text)]
    inline = re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCE.sub("", text))
    return [*chain.from_iterable(block.splitlines() for block in fenced), *(span.replace("\n", " ") for span in inline)]


def command_lines(path: Path) -> Iterator[tuple[str, str]]:
    """The commands of a page: their names and their arguments."""
    for line in code_lines(path):
        for found in COMMAND.finditer(re.sub(r"\[[^\[\]=]*(=[^\[\]]*)? \.\.\.\]", "", line)):
            yield found[1], found[2]


def split_arguments(text: str) -> list[str]:
    """Arguments of a command, without a comment and what a shell would do next."""
    words = shlex.split(text, comments=True)
    end = next((n for n, word in enumerate(words) if word in ("|", "&&", ";", ">", "...")), len(words))
    return words[:end]


def points(overrides: list[str]) -> Iterator[list[str]]:
    """The overrides of trials of a sweep, so that each value is in one of them."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    fixed = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
    varied = []
    for override in parsed:
        if override.is_discrete_sweep():
            values = [str(value) for value in override.sweep_string_iterator()]
        elif override.is_sweep_override():
            values = [str(override.value().start), str(override.value().end)]
        else:
            continue
        varied.append([f"{override.get_key_element()}={value}" for value in values])
    for trial in zip_longest(*varied):
        yield [*fixed, *(choice or choices[-1] for choice, choices in zip(trial, varied, strict=True))]
    if not varied:
        yield fixed


def check_command(name: str, arguments: list[str]) -> None:
    """Composes and validates the configuration of a command, and of each trial of a sweep."""
    flags = get_args_parser().parse_args(arguments)
    OptionGroups(name, [CONF]).check_experiments(flags.overrides)
    overrides = [_quote_override(override, LITERAL_KEYS.get(name, ())) for override in flags.overrides]
    for trial in points(overrides) if flags.multirun else [overrides]:
        trial = ["resume=auto" if override.startswith("resume=") else override for override in trial]
        values = compose(name, overrides=trial)
        if flags.cfg is None and not flags.help:
            validate_command(name, values, [o for o in trial if not o.startswith("hydra")])


def validate_command(name: str, values: DictConfig, overrides: list[str]) -> None:
    match name:
        case "train":
            resolve(values, overrides)
        case "plan":
            resolve_plan(values, overrides)
        case "prove":
            resolve_proof(values, overrides)
        case _:
            validate(CONFIGS[name], resolve_to_dict(values))


def problem(name: str, text: str) -> str | None:
    """What is wrong with a command line; None if it is valid with some value for its placeholders."""
    if name == "worker":  # started by gptlab itself
        return None
    found = None
    for filling in ("x", "1"):
        filled = PLACEHOLDER.sub(lambda place: CHOICES.get(place[0], filling), text)
        try:
            check_command(name, split_arguments(filled))
        except (Exception, SystemExit) as error:  # whatever Hydra, OmegaConf or gptlab raise
            found = f"python -m gptlab.{name}{text}: {type(error).__name__}: {error} {error.__cause__ or ''}"
        else:
            return None
    return found


@pytest.fixture
def composing(tmp_path, monkeypatch):
    """Hydra can compose, in a directory without runs."""
    monkeypatch.chdir(tmp_path)
    with initialize_config_dir(str(configuration_folder()), version_base="1.3"):
        yield


@pytest.mark.parametrize("page", [*PAGES, *HELP], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_of_a_page_is_valid(composing, page):
    problems = [found for command in command_lines(page) if (found := problem(*command))]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("python -m gptlab.train modle.n_layer=3", "modle"),
        ("python -m gptlab.train model.n_layers=3", "n_layers"),
        ("python -m gptlab.train model=gtp2", "gtp2"),
        ("python -m gptlab.train train.compile=sometimes", "train.compile"),
        ("python -m gptlab.train -m optimizer.lr=1e-3,-1", "optimizer.lr"),
        ("python -m gptlab.train -m hydra.sweeper.serach=tpe", "serach"),
        ("python -m gptlab.evaluate run=<model> windos=3", "windos"),
        ("python -m gptlab.tran", "tran"),
        ("python -m gptlab.train --mulitrun", "SystemExit"),
    ],
)
def test_a_mistake_in_a_command_of_a_page_is_found(composing, tmp_path, line, message):
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n```sh\n{line}   # what it does\n```\n", encoding="utf-8")
    (command,) = command_lines(page)
    assert message in (problem(*command) or "")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_make_target_of_a_page_exists(page):
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {target for line in code_lines(page) for target in re.findall(r"(?:^|&& )make ([a-z][\w-]*)", line.strip())}
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_config_key_of_a_page_exists(page):
    keys = {*known_keys(RunConfig), *chain.from_iterable(EXTRA_KEYS.values())}
    keys |= {key for config in CONFIGS.values() for key in known_keys(config)}
    keys |= {key.name for file in read_configuration(CONF) for key in file.keys}
    groups = {key.partition(".")[0] for key in keys if "." in key}
    spans = (span for line in code_lines(page) for span in re.findall(r"(?:^| )\+?([a-z_]+(?:\.[a-z_0-9]+)+)=", line))
    assert {span for span in spans if span.partition(".")[0] in groups} <= keys
