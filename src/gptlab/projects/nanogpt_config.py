"""Reads the configuration files of nanoGPT without executing them. Imports no torch.

nanoGPT executes its configuration, a Python file that assigns the global variables of train.py. Here the file is only
parsed: assignments of literals and arithmetic are evaluated, and all other statements are returned as ignored.
"""

import ast
import operator
import re
import reprlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gptlab.errors import UserError, did_you_mean, failure_reason

# Settings of nanoGPT and their defaults: train.py of karpathy/nanoGPT, commit 3adf61e.
DEFAULTS: dict[str, Any] = {
    "out_dir": "out",
    "eval_interval": 2000,
    "log_interval": 1,
    "eval_iters": 200,
    "eval_only": False,
    "always_save_checkpoint": True,
    "init_from": "scratch",
    "wandb_log": False,
    "wandb_project": "owt",
    "wandb_run_name": "gpt2",
    "dataset": "openwebtext",
    "gradient_accumulation_steps": 40,
    "batch_size": 12,
    "block_size": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "dropout": 0.0,
    "bias": False,
    "learning_rate": 6e-4,
    "max_iters": 600_000,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "decay_lr": True,
    "warmup_iters": 2000,
    "lr_decay_iters": 600_000,
    "min_lr": 6e-5,
    "backend": "nccl",
    "device": "cuda",
    "dtype": "bfloat16",  # float16 on GPUs without bfloat16
    "compile": True,
}

MAX_BYTES = 65_536  # nanoGPT's own files have at most 1.2 kB
MAX_STRING = 4096  # characters
MAX_NUMBER = 2**63
MAX_POWER_BITS = 4096  # size of the result of a power

OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
CODE = {  # what a statement or expression is called in the reason for which it is ignored
    ast.Call: "a function call",
    ast.JoinedStr: "an f-string",
    ast.NamedExpr: "an assignment expression",
    ast.IfExp: "a conditional expression",
    ast.Import: "an import",
    ast.ImportFrom: "an import",
    ast.If: "an if statement",
    ast.For: "a loop",
    ast.While: "a loop",
}


class Ignored(NamedTuple):
    """A statement that was not evaluated.

    Attributes:
        line: Line number, counted from 1.
        source: First line of the statement.
        reason: Why it was ignored, and which settings therefore have nanoGPT's default.
    """

    line: int
    source: str
    reason: str


class NanoGPTConfig(NamedTuple):
    """Content of a configuration file of nanoGPT.

    Attributes:
        path: The file.
        values: Settings of the file, with the types of ``DEFAULTS``. Settings that the file does not set are missing.
        ignored: Statements that were not evaluated, in the order of the file.
    """

    path: Path
    values: dict[str, Any]
    ignored: list[Ignored]


UNKNOWN = object()  # value of a variable that an ignored statement sets


class _NotLiteral(Exception):  # noqa: N818
    """Raised for code other than literals and arithmetic. The message describes the code."""


def read_nanogpt_config(path: Path) -> NanoGPTConfig:
    """Reads a configuration file of nanoGPT; no code of it is executed.

    Raises:
        UserError: The file cannot be read or parsed, uses an undefined name, or sets a variable of nanoGPT to a value
            of another type.
    """
    text = _read_text(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escape sequences
            tree = ast.parse(text)
        return _evaluate_module(path, tree, re.split(r"\r\n?|\n", text))
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno or 1}: invalid Python syntax: {error.msg}.") from None
    except (RecursionError, MemoryError):  # MemoryError: the stack of Python's parser is full
        raise UserError(f"{path}: an expression is nested too deeply for a configuration file.") from None


def _read_text(path: Path) -> str:
    try:
        if not path.is_file():  # a named pipe would block
            raise UserError(f"{path} is not a file (working directory: {Path.cwd()}).")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f"{path} has more than {MAX_BYTES:,} bytes, so it is not a configuration of nanoGPT.")
        return content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {failure_reason(error)}.") from None


def _evaluate_module(path: Path, tree: ast.Module, lines: list[str]) -> NanoGPTConfig:
    names: dict[str, Any] = dict(DEFAULTS)
    assigned: dict[str, int] = {}  # line of the last assignment of each variable
    ignored: list[Ignored] = []
    for statement in tree.body:
        try:
            for name, value in _assignments(statement, names):
                names[name], assigned[name] = value, statement.lineno
        except _NotLiteral as error:
            unknown = set(_bound_names(statement))
            names.update(dict.fromkeys(unknown, UNKNOWN))
            unset = ", ".join(sorted(unknown & DEFAULTS.keys()))
            reason = f"it is {error}" + (f", so nanoGPT's default is used for {unset}" if unset else "")
            ignored.append(Ignored(statement.lineno, _printable(lines[statement.lineno - 1]), reason))
        except (ArithmeticError, ValueError) as error:
            raise UserError(f"{path}:{statement.lineno}: {error}.") from None
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    values = {}
    for name, line in assigned.items():
        if name in DEFAULTS and names[name] is not UNKNOWN:
            values[name] = _convert(name, names[name], f"{path}:{line}")
        elif name not in DEFAULTS and name not in used and not name.startswith("_"):
            reason = f"it is not a setting of nanoGPT.{did_you_mean(name, DEFAULTS)}"
            ignored.append(Ignored(line, _printable(lines[line - 1]), reason))
    return NanoGPTConfig(path, values, ignored)


def _assignments(statement: ast.stmt, names: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Returns the variables that a statement assigns, with their values.

    Raises:
        _NotLiteral: The statement is not an assignment of literals and arithmetic.
        ArithmeticError, ValueError: A value cannot be computed.
    """
    match statement:
        case ast.Pass() | ast.Expr(value=ast.Constant()):  # a docstring
            return []
        case ast.Assign(targets=targets):
            value = _evaluate(statement.value, names)
            return [pair for target in targets for pair in _unpack(target, value)]
        case ast.AnnAssign(target=ast.Name(id=name), annotation=ast.Name(), value=ast.expr() as expression):
            return [(name, _evaluate(expression, names))]
        case ast.AugAssign(target=ast.Name(id=name)):
            return [(name, _compute(statement.op, _load(name, names), _evaluate(statement.value, names)))]
    raise _NotLiteral(_describe(statement))


def _unpack(target: ast.expr, value: Any) -> list[tuple[str, Any]]:
    match target:
        case ast.Name(id=name):
            return [(name, value)]
        case ast.Tuple(elts=parts) if isinstance(value, tuple) and len(value) == len(parts):
            return [pair for part, item in zip(parts, value, strict=True) for pair in _unpack(part, item)]
    raise _NotLiteral("an assignment to something other than variables")


def _evaluate(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """Returns the value of literals and arithmetic; raises as ``_assignments`` does."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return _bounded(value)
        case ast.Name(id=name):
            return _load(name, names)
        case ast.UnaryOp(op=ast.UAdd() | ast.USub()):
            return _compute(
                ast.Sub() if isinstance(node.op, ast.USub) else ast.Add(), 0, _evaluate(node.operand, names)
            )
        case ast.BinOp():
            return _compute(node.op, _evaluate(node.left, names), _evaluate(node.right, names))
        case ast.Tuple() | ast.List():
            items = [_evaluate(item, names) for item in node.elts]
            if any(isinstance(item, list | tuple) for item in items):
                raise _NotLiteral("a nested list")  # repeated nesting would grow exponentially
            return tuple(items) if isinstance(node, ast.Tuple) else items
    raise _NotLiteral(_describe(node))


def _load(name: str, names: Mapping[str, Any]) -> Any:
    if name not in names:
        raise ValueError(f"the name {name} is not defined")
    if names[name] is UNKNOWN:
        raise _NotLiteral(f"an expression with {name}, which an ignored statement sets")
    return names[name]


def _compute(operation: ast.operator, left: Any, right: Any) -> Any:
    """Returns the result of arithmetic on two numbers, or of the concatenation of two strings."""
    is_text = isinstance(left, str) and isinstance(right, str) and isinstance(operation, ast.Add)
    is_number = isinstance(left, int | float) and isinstance(right, int | float)
    if type(operation) not in OPERATORS or not (is_text or is_number):
        raise _NotLiteral("an operation other than arithmetic on numbers")
    if isinstance(operation, ast.Pow) and isinstance(left, int) and right * left.bit_length() > MAX_POWER_BITS:
        raise ValueError("the value of a power is too large")
    try:
        return _bounded(OPERATORS[type(operation)](left, right))
    except OverflowError:  # of floats
        raise ValueError("the value of a power is too large") from None


def _bounded(value: Any) -> Any:
    """Returns ``value``; raises ValueError if it is too large for a setting, or complex."""
    if isinstance(value, str) and len(value) > MAX_STRING:
        raise ValueError(f"a string has more than {MAX_STRING:,} characters")
    if isinstance(value, complex) or (isinstance(value, int | float) and not -MAX_NUMBER < value < MAX_NUMBER):
        raise ValueError("a number is too large, or not a real number")
    return value


def _bound_names(statement: ast.stmt) -> Iterator[str]:
    """Yields the variables that a statement may set; those of a function or class body are local."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
        return
    for node in ast.walk(statement):
        match node:
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
                yield name
            case ast.alias():
                yield (node.asname or node.name).partition(".")[0]


def _convert(name: str, value: Any, place: str) -> Any:
    """Returns the value of a setting with the type of its default; raises UserError if that would change it."""
    is_number = isinstance(value, int | float)
    match DEFAULTS[name]:
        case bool() if is_number and value in (0, 1):
            return bool(value)
        case bool():
            kind = "True or False"
        case int() if is_number and value == int(value):
            return int(value)
        case int():
            kind = "an integer"
        case float() if is_number:
            return float(value)
        case float():
            kind = "a number"
        case _ if isinstance(value, str):
            return value
        case _:
            kind = "a string"
    raise UserError(f"{place}: {name}={reprlib.repr(value)} is not valid: it should be {kind}.")


def _describe(node: ast.AST) -> str:
    return CODE.get(type(node), f"Python code ({type(node).__name__})")


def _printable(line: str) -> str:
    """Returns a line of the file without characters that would control a terminal."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line.strip())[
        :200
    ]
