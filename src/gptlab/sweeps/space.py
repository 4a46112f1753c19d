"""Search space of a sweep: the points of a grid, or distributions to sample from. Imports no torch."""

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from gptlab.errors import UserError
from gptlab.tracking.run_store.sweeps import format_overrides

MAX_POINTS = 10_000  # of a grid
Point = dict[str, str]  # overrides of a trial: key -> value as on the command line


class SearchSpace:
    """Overrides of a sweep, split into varied and fixed ones.

    Args:
        params: Values of hydra.sweeper.params; an override of the same key on the command line takes precedence.
        arguments: Command-line overrides.
        loader: Hydra's loader, which lists the options of a group for ``model=glob(*)``.

    Attributes:
        varied: Overrides with several values or an interval, by key.
        fixed: All other overrides, as written.
    """

    def __init__(self, params: Mapping[str, Any], arguments: list[str], loader: ConfigLoader | None = None) -> None:
        parser = OverridesParser.create(loader)
        typed = parser.parse_overrides(arguments)
        named = {override.get_key_element() for override in typed}
        ready = [o for o in parser.parse_overrides([f"{k}={v}" for k, v in params.items()]) if _key(o) not in named]
        overrides = [*ready, *typed]
        self.varied = {_key(override): override for override in overrides if override.is_sweep_override()}
        self.fixed = [str(override.input_line) for override in overrides if not override.is_sweep_override()]

    @property
    def written(self) -> dict[str, str]:
        """Varied keys and their values, as on the command line."""
        return {key: str(override.get_value_string()) for key, override in self.varied.items()}

    def grid(self) -> list[Point]:
        """Returns every combination of the values, with the last key varying fastest; one point if nothing is varied.

        Raises:
            UserError: A key has an interval (infinitely many values) or no value.
        """
        values: list[list[str]] = []
        for key, override in self.varied.items():
            if not override.is_discrete_sweep():
                swept = override.value()
                assert isinstance(swept, IntervalSweep)  # noqa: S101  (every other sweep is discrete)
                raise UserError(
                    f"{key}={override.get_value_string()} has infinitely many values, which a grid cannot enumerate. "
                    f"List the values, for example {key}={swept.start},{swept.end}, or set hydra.sweeper.search=tpe "
                    "hydra.sweeper.n_trials=20."
                )
            values.append(_values(override))
        empty = [key for key, found in zip(self.varied, values, strict=True) if not found]
        if empty:
            raise UserError(f"{empty[0]}={self.written[empty[0]]} has no values, so the sweep has no trials.")
        if (number := math.prod(map(len, values))) > MAX_POINTS:
            raise UserError(
                f"{format_overrides(self.written)} has {number:,} points, but a grid has at most {MAX_POINTS:,}. To "
                "try some of them: hydra.sweeper.search=random hydra.sweeper.n_trials=<number>"
            )
        return [dict(zip(self.varied, point, strict=True)) for point in itertools.product(*values)]

    def ends(self) -> list[Point]:
        """Returns two points of the space: the first and the last value of each distribution."""
        ends = {key: _ends(distribution) for key, distribution in self.distributions().items()}
        return [{key: values[end] for key, values in ends.items()} for end in (0, -1)]

    def contains(self, point: Point) -> bool:
        """Whether a point, as read from a file, has exactly the varied keys, each with one of its values."""
        return point.keys() == self.varied.keys() and all(_has(self.varied[key], point[key]) for key in point)

    def distributions(self) -> dict[str, BaseDistribution]:
        """Returns the distribution of each varied key; raises UserError if no key is varied."""
        if not self.varied:
            raise UserError(
                "No key is varied. A search needs at least one key with several values or an interval, for example "
                "optimizer.lr='tag(log, interval(1e-4, 1e-2))'."
            )
        return {key: _distribution(override) for key, override in self.varied.items()}


def _has(override: Override, value: str) -> bool:
    """Whether a value of the command line is one of a sweep override; any number is one of an interval."""
    if override.is_discrete_sweep():
        return value in {str(choice) for choice in override.sweep_string_iterator()}
    return re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", value) is not None


def _ends(distribution: BaseDistribution) -> list[str]:
    """Returns the first and the last value of a distribution."""
    if isinstance(distribution, CategoricalDistribution):
        return [str(distribution.choices[0]), str(distribution.choices[-1])]
    assert isinstance(distribution, FloatDistribution | IntDistribution)  # noqa: S101
    return [format_value(distribution.low), format_value(distribution.high)]


def _values(override: Override) -> list[str]:
    """Returns the values of a sweep override in the order of the grid.

    Raises:
        UserError: It is a range that has no end, or one with more than ``MAX_POINTS`` values.
    """
    swept = override.value()
    if isinstance(swept, RangeSweep) and swept.start is not None and swept.stop is not None:
        span = float(swept.stop) - float(swept.start)
        if not swept.step or span / float(swept.step) > MAX_POINTS:
            raise UserError(
                f"{_key(override)}={override.get_value_string()} has "
                f"{'no end: its step is 0' if not swept.step else f'more than {MAX_POINTS:,} values'}."
            )
    return [str(value) for value in override.sweep_string_iterator()]


def format_value(value: Any) -> str:
    """Formats a sampled value as on the command line."""
    return repr(value) if isinstance(value, float) else str(value)


def _key(override: Override) -> str:
    return str(override.get_key_element())


def _distribution(override: Override) -> BaseDistribution:
    sweep, key = override.value(), _key(override)
    if isinstance(sweep, IntervalSweep):
        low, high = sweep.start, sweep.end
        if low is None or high is None or not low < high:
            raise UserError(f"{key}={override.get_value_string()} is an empty interval: start must be less than end.")
        written = f"{key}={override.get_value_string()}"
        if unknown := sorted(sweep.tags - {"log"}):
            raise UserError(f"{written}: the tag {unknown[0]} is unknown. The tag of an interval can be log.")
        is_log = "log" in sweep.tags
        if is_log and low <= 0:
            raise UserError(f"{written}: an interval on a log scale starts above 0, for example at {high / 1000:g}.")
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=is_log)
        return FloatDistribution(float(low), float(high), log=is_log)
    values = _values(override)
    if not values:
        raise UserError(f"{key}={override.get_value_string()} has no values, so the sweep has no trials.")
    return CategoricalDistribution(values)
