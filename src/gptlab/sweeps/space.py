"""Search space of a sweep: the points of a grid, or distributions to draw from. Imports no torch."""

import itertools
from collections.abc import Mapping
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from gptlab.errors import UserError

Point = dict[str, str]  # what a trial changes, as it is written on a command line


class SearchSpace:
    """Overrides of a sweep, split into varied and fixed ones.

    Args:
        params: Of hydra.sweeper.params; what the command line says of a key comes before it.
        arguments: The overrides of the command line.

    Attributes:
        varied: The overrides with several values, by key.
        fixed: All the others, as they are written.

    """

    def __init__(self, params: Mapping[str, Any], arguments: list[str]) -> None:
        parser = OverridesParser.create()
        typed = parser.parse_overrides(arguments)
        named = {override.get_key_element() for override in typed}
        ready = [o for o in parser.parse_overrides([f"{k}={v}" for k, v in params.items()]) if _key(o) not in named]
        overrides = [*ready, *typed]
        self.varied = {_key(override): override for override in overrides if override.is_sweep_override()}
        self.fixed = [str(override.input_line) for override in overrides if not override.is_sweep_override()]

    @property
    def written(self) -> dict[str, str]:
        """Varied keys, with their values as on a command line."""
        return {key: str(override.get_value_string()) for key, override in self.varied.items()}

    def grid(self) -> list[Point]:
        """Returns every combination of the values, the last key varying fastest; one point if nothing is varied.

        Raises:
            UserError: A key has infinitely many values, or none.
        """
        values = []
        for key, override in self.varied.items():
            if not override.is_discrete_sweep():
                raise UserError(
                    f"{key}={override.get_value_string()} has infinitely many values: a grid needs them one by one "
                    f"({key}=1,2,3), and a search draws from them (hydra.sweeper.search=tpe hydra.sweeper.n_trials=20)."
                )
            values.append([str(value) for value in override.sweep_string_iterator()])
        empty = [key for key, found in zip(self.varied, values, strict=True) if not found]
        if empty:
            raise UserError(f"{empty[0]}={self.written[empty[0]]} has no value: the sweep would be empty.")
        return [dict(zip(self.varied, point, strict=True)) for point in itertools.product(*values)]

    def example(self) -> Point:
        """A point that a search might draw."""
        return {key: _first(distribution) for key, distribution in self.distributions().items()}

    def distributions(self) -> dict[str, BaseDistribution]:
        """Returns the distributions of a search, by key; raises UserError if there are none."""
        if not self.varied:
            raise UserError(
                "The sweep varies nothing that could be searched: it needs a key with several values or an interval, "
                "optimizer.lr='tag(log, interval(1e-4, 1e-2))'."
            )
        return {key: _distribution(override) for key, override in self.varied.items()}


def _first(distribution: BaseDistribution) -> str:
    """The first value of a distribution."""
    if isinstance(distribution, CategoricalDistribution):
        return str(distribution.choices[0])
    assert isinstance(distribution, FloatDistribution | IntDistribution)  # noqa: S101
    return format_value(distribution.low)


def format_value(value: Any) -> str:
    """Formats a drawn value as on a command line."""
    return repr(value) if isinstance(value, float) else str(value)


def _key(override: Override) -> str:
    return str(override.get_key_element())


def _distribution(override: Override) -> BaseDistribution:
    sweep, key = override.value(), _key(override)
    if isinstance(sweep, IntervalSweep):
        low, high = sweep.start, sweep.end
        if low is None or high is None or not low < high:
            raise UserError(f"{key}={override.get_value_string()} is empty: it has to begin before its end.")
        is_log = "log" in sweep.tags
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=is_log)
        return FloatDistribution(float(low), float(high), log=is_log)
    values = [str(value) for value in override.sweep_string_iterator()]
    if not values:
        raise UserError(f"{key}={override.get_value_string()} has no value: the sweep would be empty.")
    return CategoricalDistribution(values)
