# ruff: noqa: F811  (fixtures)
"""The documentation: valid commands, a complete configuration reference, existing pictures, and the site."""

import html
import re
import shlex
import sys
import threading
from collections.abc import Iterator
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, zip_longest
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from check_site import broken_links
from commands import assert_success
from config_reference import anchor, page_name, render_pages
from gptlab.benchmarks.config import BenchCommand
from gptlab.config.base import known_keys, validate
from gptlab.config.command import configuration_folder
from gptlab.config.option_groups import OptionGroups
from gptlab.config.overrides import parse_command_line
from gptlab.config.reference import read_config_file, read_configuration
from gptlab.config.resolve import resolve, resolve_to_dict
from gptlab.config.schema import RunConfig
from gptlab.dashboard import DashboardConfig
from gptlab.evaluators.settings import EvaluateConfig
from gptlab.export import ExportConfig
from gptlab.launch.prepare_data import PrepareCommand
from gptlab.new import parse_arguments
from gptlab.planning.settings import KEYS, resolve_plan
from gptlab.projects.project import TEMPLATE
from gptlab.report import ReportConfig
from gptlab.runs import RunsCommand
from gptlab.sample import SampleConfig
from gptlab.verification.configs import ProveArguments, resolve_proof
from report_pages import browser  # noqa: F401

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
OPTIONS = (CONF, TEMPLATE / "conf")  # pages also use the options of the project that gptlab.new writes
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
LITERAL_KEYS = {"report": ("runs", "out"), "runs": ("runs", "filter"), "sample": ("prompt",)}
SUBJECTS = {"evaluate": "run", "export": "run", "report": "runs", "runs": "runs", "sample": "run"}
FENCE = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
COMMANDS = ("train", "plan", "prove", *CONFIGS)
COMMAND = re.compile(rf"(?:-m gptlab\.(?P<name>\w+)|^gptlab\.(?P<bare>{'|'.join(COMMANDS)})(?= ))(?P<arguments>.*)")
PROGRAM = re.compile(r"(?:^|[\s/])(?P<program>pytest|bash|python3?)(?= +(?P<arguments>.*))")
PATH = re.compile(r"(?:tests|src|conf|docs)/[\w./-]*|[\w./-]+\.(?:py|sh)")  # a file or directory of the repository
GROUP = re.compile(r"\+?(?P<group>[a-z_/]+)=(?P<options>\[?[\w,-]+\]?)")
PLACEHOLDER = re.compile(r"<[^<>]*>|(?<![^=,\[])\.\.\.")
PICTURE = re.compile(r"<picture>.*?</picture>", re.DOTALL)
UNCOMMENTED = {  # explained by the summary of the file
    "_target_": "Hydra's key: the class of the launcher or the sweeper",
    "name": "names the option in the configuration of a run, by the name of its file or of the one that it extends",
    "tensorboard": "an empty group that enables the logger",
}
WRONG_KEYS = {"callbacks.gradient_histogram.evry", "optimizer.params"}  # of examples of error messages
CHOICES = {"<suite>": "train", "<format>": "hf"}


def inline_spans(text: str) -> list[str]:
    """Returns the inline code of a Markdown text."""
    return [span.replace("\n", " ") for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCE.sub("", text))]


def code_lines(path: Path) -> list[str]:
    """Returns the lines of code of a page: those of its fenced blocks, and each inline span."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":  # in a help text, a description follows the command after two spaces or more
        lines = re.sub(r"\s*\\\n\s*", " ", text).splitlines()
        return [re.split(r"(?<=\S) {2,}", line.strip())[0] for line in lines]
    fenced = [block[0].replace("\\\n", " ") for block in FENCE.finditer(text)]
    return [*chain.from_iterable(block.splitlines() for block in fenced), *inline_spans(text)]


def command_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yields the name and the arguments of each command of a page."""
    for line in code_lines(path):
        for found in COMMAND.finditer(re.sub(r"\[[^\[\]=]*(=[^\[\]]*)? \.\.\.\]", "", line)):
            arguments = found["arguments"]
            if path.suffix == ".yaml":  # a long command has one space before its description
                arguments = re.sub(r"(?<!--cfg) (?=[a-z][a-z-]*( |$)).*", "", arguments)
            yield found["name"] or found["bare"], arguments


def split_arguments(text: str) -> list[str]:
    """Splits the arguments of a command; omits comments, pipes and subsequent commands. A shell variable is 1."""
    words = shlex.split(re.sub(r"\$[A-Z_]+", "1", text), comments=True)
    end = next((n for n, word in enumerate(words) if word in ("|", "&&", ";", ">", "...")), len(words))
    return words[:end]


def points(overrides: list[str]) -> Iterator[list[str]]:
    """Yields the overrides of trials of a sweep, such that every value occurs in a trial."""
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
    if name == "new":
        parse_arguments(arguments)
        return
    flags, _, overrides = parse_command_line(arguments, (), LITERAL_KEYS.get(name, ()), SUBJECTS.get(name))
    groups = OptionGroups(name, OPTIONS)
    overrides = groups.normalize(overrides)
    groups.check_experiments(overrides)
    for trial in points(overrides) if flags.multirun else [overrides]:
        trial = ["resume=auto" if override.startswith("resume=") else override for override in trial]
        values = compose(name, overrides=[*trial, f"hydra.searchpath=[file://{TEMPLATE / 'conf'}]"])
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


def fill(text: str, value: str) -> str:
    """Returns a command with a value for each placeholder."""
    return PLACEHOLDER.sub(lambda placeholder: CHOICES.get(placeholder[0], value), text)


@cache
def problem(name: str, text: str) -> str | None:
    """Returns the error of a command line, or None if it is valid with some value for its placeholders."""
    if name == "worker":  # started by gptlab itself
        return None
    found = None
    for filling in ("x", "1"):
        filled = fill(text, filling)
        try:
            check_command(name, split_arguments(filled))
        except (Exception, SystemExit) as error:  # any error of Hydra, OmegaConf or gptlab
            found = f"python -m gptlab.{name}{text}: {type(error).__name__}: {error} {error.__cause__ or ''}"
        else:
            return None
    return found


@pytest.fixture
def composing(tmp_path, monkeypatch):
    """Initializes Hydra in a directory without runs."""
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
        ("gptlab.train modle.n_layer=3", "modle"),
        ("python -m gptlab.train model.n_layers=3", "n_layers"),
        ("python -m gptlab.train model=gtp2", "gtp2"),
        ("python -m gptlab.train train.compile=sometimes", "train.compile"),
        ("python -m gptlab.train -m optimizer.lr=1e-3,-1", "optimizer.lr"),
        ("python -m gptlab.train -m hydra.sweeper.serach=tpe", "serach"),
        ("python -m gptlab.evaluate run=<model> windos=3", "windos"),
        ("python -m gptlab.tran", "tran"),
        ("python -m gptlab.train --mulitrun", "mulitrun"),
    ],
)
def test_an_invalid_command_of_a_page_is_found(composing, tmp_path, line, message):
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n```sh\n{line}   # what it does\n```\n", encoding="utf-8")
    (command,) = command_lines(page)
    assert message in (problem(*command) or "")


def named_paths(line: str) -> set[str]:
    """Returns the files and directories that a line of code passes to pytest, bash or python."""
    found = set()
    for command in PROGRAM.finditer(line):
        words = split_arguments(command["arguments"])
        words = words if command["program"] == "pytest" else words[:1]
        found |= {word.partition("::")[0] for word in words if PATH.fullmatch(word.partition("::")[0])}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_path_of_a_command_exists(page):
    paths = set().union(*map(named_paths, code_lines(page)))
    paths |= {span for span in inline_spans(page.read_text(encoding="utf-8")) if re.fullmatch(r"tests/[\w./-]+", span)}
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(
    ("line", "paths"),
    [
        ("OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m slow tests/a.py tests/b -k asha", {"tests/a.py", "tests/b"}),
        ("pytest 'tests/a.py::test_b'   # tests/c.py", {"tests/a.py"}),
        ("bash tests/gpu/check.sh 1 && python docs/tools/a.py tests", {"tests/gpu/check.sh", "docs/tools/a.py"}),
        ("python -m gptlab.train data=text data.source=docs/a.py", set()),
    ],
)
def test_paths_of_a_command_are_found(line, paths):
    assert named_paths(line) == paths


def unknown_options(text: str) -> list[str]:
    """Returns each ``group=option`` of a page's inline code whose group is in conf/ and whose option is unknown."""
    words = (word for span in inline_spans(text) for word in span.split())
    chosen = [found for word in words if (found := GROUP.fullmatch(word)) and (CONF / found["group"]).is_dir()]
    return [
        f"{found['group']}={option}"
        for found in chosen
        for option in found["options"].strip("[]").split(",")
        if option not in ("null", "basic")  # Hydra's
        and not any((conf / found["group"] / f"{option}.yaml").exists() for conf in OPTIONS)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_option_of_a_page_exists(page):
    assert unknown_options(page.read_text(encoding="utf-8")) == []


def test_unknown_options_of_a_page_are_found():
    text = "`model=gtp2` `python -m gptlab.train callbacks=[default,sample]` `data=<name>` `hydra/launcher=slrm` `x=y`"
    assert unknown_options(text) == ["model=gtp2", "callbacks=sample", "hydra/launcher=slrm"]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_make_target_of_a_page_exists(page):
    makefiles = "".join((root / "Makefile").read_text(encoding="utf-8") for root in (ROOT, TEMPLATE))
    targets = set(re.findall(r"^([\w.-]+):", makefiles, re.MULTILINE))
    named = {target for line in code_lines(page) for target in re.findall(r"(?:^|&& )make ([a-z][\w-]*)", line.strip())}
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_config_key_of_a_page_exists(page):
    keys = {*known_keys(RunConfig), *chain.from_iterable(EXTRA_KEYS.values())}
    keys |= {key for config in CONFIGS.values() for key in known_keys(config)}
    keys |= {key.name for conf in OPTIONS for file in read_configuration(conf) for key in file.keys}
    groups = {key.partition(".")[0] for key in keys if "." in key}
    spans = (span for line in code_lines(page) for span in re.findall(r"(?:^| )\+?([a-z_]+(?:\.[a-z_0-9]+)+)=", line))
    named = {span for span in spans if span.partition(".")[0] in groups}
    arguments = {span for span in named if f"{span.rpartition('.')[0]}._target_" in named}  # of components
    flags = {span for span in named if span.startswith("trainer.flags.")}  # arguments of Lightning's Trainer
    assert named - arguments - flags - WRONG_KEYS <= keys


def flatten(values: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yields the keys and values of a file, except for the defaults list."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        elif key != "defaults":
            yield f"{prefix}{key}", value


REFERENCE = render_pages(CONF)
FILES = [path for path in sorted(CONF.rglob("*.yaml")) if path.parts[-2] not in ("help", "wandb")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONF).as_posix())
def test_the_reference_has_every_key_with_its_default_and_its_comment(path):
    name = path.relative_to(CONF).with_suffix("").as_posix()
    group = name.rpartition("/")[0]
    text = path.read_text(encoding="utf-8")
    prefix = f"{group.replace('/', '.')}." if group and "@package _global_" not in text else ""
    section = REFERENCE[page_name(group)].partition(f"{{ #{anchor(name)} }}")[2].partition("\n## ")[0]
    rows = [re.fullmatch(r"\| `(.*?)` \| <code>(.*)</code> \| (.*) \|", line) for line in section.splitlines()]
    shown = {row[1]: (yaml.safe_load(html.unescape(row[2])), row[3]) for row in rows if row}
    assert {key: default for key, (default, _) in shown.items()} == dict(flatten(yaml.safe_load(text), prefix))
    uncommented = [key for key, (_, comment) in shown.items() if len(comment) < 3]
    assert [key for key in uncommented if key.rpartition(".")[2] not in UNCOMMENTED] == []
    assert read_config_file(path, CONF).summary


def test_comments_are_read_after_a_value_and_above_a_key(tmp_path):
    (tmp_path / "group").mkdir()
    path = tmp_path / "group" / "option.yaml"
    path.write_text(
        "# Summary.\n# Second line.\ndefaults:\n  - base   # no key\na: 1   # behind\n       # and below\n"
        "# above\nb: 'x # y'\n# Heading\nc:   # of c\n  d: {e: [1, 2]}   # flow | pipe\nf: null\n",
        encoding="utf-8",
    )
    file = read_config_file(path, tmp_path)
    assert (file.name, file.summary, file.defaults) == ("group/option", "Summary. Second line.", ["base"])
    assert [tuple(key) for key in file.keys] == [
        ("group.a", "1", "behind and below", ""),
        ("group.b", "'x # y'", "above", ""),
        ("group.c.d.e", "[1, 2]", "", "Heading of c flow | pipe"),
        ("group.f", "null", "", ""),
    ]


def test_every_picture_is_small_and_exists_in_light_and_dark():
    figures = ROOT / "docs" / "figures"
    names = {path.name for path in figures.iterdir()}
    light = {name for name in names if not Path(name).stem.endswith("-dark")}
    assert {f"{Path(name).stem}-dark{Path(name).suffix}" for name in light} == names - light
    assert [path.name for path in figures.iterdir() if path.stat().st_size > 200_000] == []
    made = (ROOT / "docs" / "tools" / "make_figures.py").read_text(encoding="utf-8")
    assert [name for name in light if f'"{Path(name).stem}": ' not in made] == []


def test_every_picture_is_on_a_page():
    shown = set()
    for page in PAGES:
        for picture in PICTURE.findall(page.read_text(encoding="utf-8")):
            shown |= {(page.parent / name).resolve() for name in re.findall(r"(?:srcset|src)=\"([^\"]+)\"", picture)}
    assert shown == set((ROOT / "docs" / "figures").iterdir())


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_picture_of_a_page_has_both_files_and_an_alt_text(page):
    for picture in PICTURE.findall(page.read_text(encoding="utf-8")):
        dark, light = re.findall(r"(?:srcset|src)=\"([^\"]+)\"", picture)
        assert "prefers-color-scheme: dark" in picture
        assert Path(light).stem + "-dark" == Path(dark).stem
        assert (page.parent / light).exists()
        assert (page.parent / dark).exists()
        assert re.search(r"alt=\"[^\"]+\"", picture)


def test_dead_links_and_requests_to_the_network_are_found(tmp_path):
    (tmp_path / "other.html").write_text('<h1 id="there">Other</h1>')
    links = ("other.html", "other.html#there", "https://example.com", "other.html#nothing", "nothing.html", "#nothing")
    (tmp_path / "index.html").write_text(
        "".join(f'<a href="{link}">link</a>' for link in links) + '<script src="https://example.com/x.js"></script>'
    )
    assert [message.split()[-1].split("/")[-1] for message in broken_links(tmp_path)] == [
        *("anchor", "exist", "anchor", "network")
    ]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(place)]
    assert_success(run(command, cwd=ROOT, capture_output=True, text=True, check=False))
    return place


@pytest.fixture(scope="module")
def address(site):
    handler = partial(SimpleHTTPRequestHandler, directory=site)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "found"),
    [("loss_chunk", "train.loss_chunk"), ("LanguageModel", "LanguageModel"), ("preemption", "Preemption")],
)
def test_the_search_finds_keys_classes_and_prose(address, browser, words, found):
    page = browser.new_page()
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(f"{address}/index.html")
    shown = "text => document.querySelector('.md-search-result').innerText.includes(text)"
    page.wait_for_function(shown, arg="Type to start searching")  # words entered before the index is loaded are ignored
    page.locator(".md-search__input").press_sequentially(words)  # key events, for which the search listens
    page.wait_for_function(shown, arg=found)
    assert not [url for url in requests if not url.startswith((address, "blob:", "data:"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "names", "shaped"),
    [
        ("models", ("load", "LanguageModel", "GPTConfig", "GPT.forward", "build_gpt"), ("GPT.forward",)),
        ("data", ("TokenDataset", "WindowOrder", "TokenDataModule"), ("Batch", "TokenDataModule")),
        ("training", ("RunConfig", "build_optimizer"), ("GPTModule.training_step", "GPTModule.validation_step")),
    ],
)
def test_the_api_pages_show_docstrings_with_shapes(site, page, names, shaped):
    text = (site / "api" / f"{page}.html").read_text(encoding="utf-8")
    for name in (*names, *shaped):
        heading = re.search(rf'id="gptlab\.[\w.]*\.{name}"', text)
        assert heading, name
        assert name not in shaped or "(B, T)" in re.split(r'<h\d id="', text[heading.end() :])[0], name


@pytest.mark.slow
def test_the_site_has_no_dead_links(site):
    assert list(broken_links(site)) == []
