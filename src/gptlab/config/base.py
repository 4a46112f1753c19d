"""The base of every settings class: typed, closed and without defaults.

Default values live in ``conf/`` alone, so a settings class names each field, its type and its range, and nothing else.
"""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """An immutable set of checked values; an unknown key or a wrong type is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
