"""Reader of nanoGPT's configuration files: their values, and the harmlessness of everything else."""

import sys
from pathlib import Path

import pytest

from gptlab.errors import UserError
from gptlab.projects.nanogpt_config import DEFAULTS, MAX_BYTES, NanoGPTConfig, read_nanogpt_config


@pytest.fixture
def read(tmp_path):
    def read_text(text: str) -> NanoGPTConfig:
        file = tmp_path / "train_x.py"
        file.write_text(text)
        return read_nanogpt_config(file)

    return read_text


def values_of_python(text: str) -> dict:
    """Returns the settings after nanoGPT's own way of reading a configuration, ``exec`` in the globals of train.py."""
    variables = dict(DEFAULTS)
    exec(text, variables)  # noqa: S102
    return {name: variables[name] for name in DEFAULTS}


@pytest.mark.parametrize(
    "text",
    [
        "batch_size = 12\nblock_size = 1024\ngradient_accumulation_steps = 5 * 8",
        "learning_rate = 3e-4\nmin_lr = learning_rate / 10",
        "min_lr = learning_rate / 10",  # of train.py
        "gpus = 2 ** 3\ngradient_accumulation_steps = (48 // gpus) * gpus\nmax_iters = -(-1000 % 37) + 50",
        "n_layer = n_head = 6\nn_embd = n_head * 64",
        "n_layer, n_head = 4, 2\n(n_head, n_layer) = (n_layer, n_head)",
        "batch_size *= 2\nmax_iters -= 1\nweight_decay /= 3",
        "dropout: float = 0.25\n_private = 3",
        "'''Docstring.'''\npass\nbias = True; compile = False\nwandb_project = 'a' + \"-\" + 'b'",
        "warmup_iters = 1_000\r\neval_iters = 0x10\r\n",
        "batch_size = 3\nbatch_size = batch_size + 1",
    ],
)
def test_values_are_those_of_python(read, text):
    config = read(text)
    assert DEFAULTS | config.values == values_of_python(text)
    assert config.ignored == []


def test_only_settings_of_the_file_are_returned_with_their_types(read):
    values = read("gpus = 8\nbatch_size = gpus\nmax_iters = 6e5\ngrad_clip = 0\nbias = 1\n_tags = ['a', (1)]").values
    assert values == {"batch_size": 8, "max_iters": 600_000, "grad_clip": 0.0, "bias": True}
    assert [type(value) for value in values.values()] == [int, int, float, bool]


def test_code_is_reported_with_its_line_and_the_settings_that_it_would_set(read):
    config = read(
        "import time\n"
        "wandb_run_name = 'ft-' + str(time.time())\n"
        "if device == 'cpu':\n    compile = False\n    dtype = 'float32'\n"
        "gpus = len('ab')\n"
        "batch_size = 4\nbatch_size = gpus * 4\n"
        "out_dir = f'out-{batch_size}'\n"
        "dtype = 'bfloat16' if gpus else 'float16'\n"
        "max_iters = 10\n"
    )
    assert config.values == {"max_iters": 10}  # not batch_size, whose last value is unknown
    assert [(line, source) for line, source, _ in config.ignored] == [
        (1, "import time"),
        (2, "wandb_run_name = 'ft-' + str(time.time())"),
        (3, "if device == 'cpu':"),
        (6, "gpus = len('ab')"),
        (8, "batch_size = gpus * 4"),
        (9, "out_dir = f'out-{batch_size}'"),
        (10, "dtype = 'bfloat16' if gpus else 'float16'"),
    ]
    reasons = [reason for _, _, reason in config.ignored]
    assert "function call" in reasons[1]
    assert "wandb_run_name" in reasons[1]
    assert "compile, dtype" in reasons[2]
    assert "gpus, which an ignored statement sets" in reasons[4]


def test_a_later_literal_replaces_an_ignored_value(read):
    config = read("batch_size = int('3')\nbatch_size = 5\nlearning_rate = 1e-3 * batch_size")
    assert config.values == {"batch_size": 5, "learning_rate": 0.005}


def test_reported_source_has_no_control_characters(read):
    (ignored,) = read("print('\x1b[2J')").ignored
    assert ignored.source == "print('\N{REPLACEMENT CHARACTER}[2J')"


def test_a_misspelled_setting_is_reported(read):
    config = read("n_layer = 1\nlearing_rate = 1")
    assert config.values == {"n_layer": 1}
    (ignored,) = config.ignored
    assert ignored.line == 2
    assert "not a setting of nanoGPT. Did you mean learning_rate" in ignored.reason


ERRORS = {
    "syntax": ("batch_size = 1\nn_layer = = 2", ":2: invalid Python syntax"),
    "null byte": ("batch_size = 1\0", "null bytes"),
    "undefined name": ("a = 1\nbatch_size = a * b", ":2: the name b is not defined"),
    "wrong type": ("\nbatch_size = 'x'", ":2: batch_size='x' is not valid: it should be an integer"),
    "fraction": ("batch_size = 1 / 2", "batch_size=0.5 is not valid: it should be an integer"),
    "not a boolean": ("compile = 'no'", "compile='no' is not valid: it should be True or False"),
    "not a number": ("dropout = None", "dropout=None is not valid: it should be a number"),
    "not a string": ("dataset = 3", "dataset=3 is not valid: it should be a string"),
    "a list": ("dropout = [0.1]", "dropout=[0.1] is not valid"),
    "division by zero": ("batch_size = 1 // (2 - 2)", ":1: integer division or modulo by zero"),
    "not real": ("learning_rate = (-1) ** 0.5", "not a real number"),
    "tower": ("batch_size = 9**9**9", "too large"),
    "tower of negative numbers": ("batch_size = (-9)**9**9", "too large"),
    "power of a float": ("learning_rate = 10.0**400", "too large"),
    "squares": ("a = 10**10\na *= a\na *= a", ":2: a number is too large"),
    "infinity": ("learning_rate = 1e999", "too large"),
    "digits": ("batch_size = " + "9" * 5000, "invalid Python syntax: Exceeds the limit"),
    "hexadecimal digits": ("batch_size = 0x" + "f" * 50_000, "too large"),
    "doubled string": ("a = 'ab'\n" + "a = a + a\n" * 20, "a string has more than"),
    "large string": (f"dataset = '{'x' * 50_000}'", "a string has more than"),
    "large file": (f"dataset = '{'x' * 10_000_000}'", f"more than {MAX_BYTES:,} bytes"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error_names_file_line_and_problem(read, case):
    text, message = ERRORS[case]
    with pytest.raises(UserError) as error:
        read(text)
    assert message in str(error.value)
    assert "train_x.py" in str(error.value)
    assert len(str(error.value)) < 400


def test_unreadable_file_is_a_user_error(tmp_path):
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe")
    for name, message in {"missing.py": "not a file", ".": "not a file", "binary.py": "not UTF-8"}.items():
        with pytest.raises(UserError, match=message):
            read_nanogpt_config(tmp_path / name)
    with pytest.raises(UserError, match="not a file"):
        read_nanogpt_config(Path("/dev/zero"))


NESTED = {
    "parentheses": lambda n: "(" * n + "1" + ")" * n,
    "signs": lambda n: "-" * n + "1",
    "sum": lambda n: "1" + "+1" * n,
    "powers": lambda n: "1" + "**1" * n,
    "attributes": lambda n: "a" + ".b" * n,
    "calls": lambda n: "f" + "()" * n,
    "negations": lambda n: "not " * n + "1",
    "conditions": lambda n: "1 if 1 else " * n + "1",
    "functions": lambda n: "lambda:" * n + "1",
    "tuples": lambda n: "(" * n + ",)" * n,
}


@pytest.mark.parametrize("kind", NESTED)
def test_deep_nesting_is_harmless(read, kind):
    limit = sys.getrecursionlimit()
    for depth in (90, limit - 150, limit, 2 * limit, 5000, 20_000):
        text = f"batch_size = {NESTED[kind](depth)}"
        try:
            read(text)
        except UserError as error:
            assert len(str(error)) < 400  # noqa: PT017  (whether it is raised depends on the version of Python)


@pytest.mark.parametrize("kind", ["parentheses", "sum"])
def test_too_deep_nesting_is_a_user_error(read, kind):
    with pytest.raises(UserError, match="nested"):
        read(f"batch_size = {NESTED[kind](10_000)}")


def test_many_ignored_statements_are_all_reported(read):
    assert len(read("f()\n" * 16_000).ignored) == 16_000


MALICIOUS = [
    "__import__('os').mkdir(CANARY)",
    "import os\nos.mkdir(CANARY)",
    "batch_size = __import__('os').mkdir(CANARY) or 12",
    "batch_size = (n := __import__('os').mkdir(CANARY)) or 12",
    "out_dir = f'{__import__(\"os\").mkdir(CANARY)}'",
    "batch_size = [n for n in (1, __import__('os').mkdir(CANARY))][0]",
    "batch_size = {__import__('os').mkdir(CANARY): 1}[None]",
    "batch_size = (lambda: __import__('os').mkdir(CANARY))() or 1",
    "batch_size: __import__('os').mkdir(CANARY) = 12",
    "x = [0]\nx[__import__('os').mkdir(CANARY) or 0] = 1",
    "if __import__('os').mkdir(CANARY):\n    batch_size = 1",
    "for n in [__import__('os').mkdir(CANARY)]:\n    batch_size = 1",
    "try:\n    __import__('os').mkdir(CANARY)\nexcept ImportError:\n    pass",
    "def f(n=__import__('os').mkdir(CANARY)):\n    pass",
    "@(lambda f: __import__('os').mkdir(CANARY))\ndef f():\n    pass",
    "class A:\n    n = __import__('os').mkdir(CANARY)",
    "class A:\n    def __radd__(self, n):\n        __import__('os').mkdir(CANARY)\nbatch_size = 1 + A()",
    "assert not __import__('os').mkdir(CANARY)",
    "exec(\"__import__('os').mkdir(CANARY)\".replace('CANARY', repr(CANARY)))",
    "batch_size = '%s' % __import__('os').mkdir(CANARY)",
    "batch_size = 1 if __import__('os').mkdir(CANARY) else 12",
]


@pytest.mark.parametrize("code", MALICIOUS)
def test_no_code_of_the_file_is_executed(read, tmp_path, code):
    canary = tmp_path / "canary"
    text = f"CANARY = {str(canary)!r}\n{code}\n"
    exec(text, {})  # noqa: S102
    assert canary.exists(), "the code has no effect, so the test would prove nothing"
    canary.rmdir()
    config = read(text)
    assert not canary.exists()
    assert config.values == {}
    assert config.ignored
