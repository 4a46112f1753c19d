"""How a token is drawn from a model's distribution: the settings. Imports no torch."""

from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from gptlab.config.base import FrozenConfig


class Sampling(FrozenConfig):
    """What is drawn from; the filters apply in this order, from below.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Draw only from the k likeliest tokens (Fan et al. 2018, section 5.1); None: from all.
        top_p: Draw only from the likeliest tokens that together have this probability (Holtzman et al. 2020, section
            3.1); None: from all.
        min_p: Draw only from tokens at least this times as likely as the likeliest (Nguyen et al. 2024, section 3);
            None: from all.
        repetition_penalty: Divides the logits above 0, and multiplies those below, of tokens that the text already has
            (Keskar et al. 2019, CTRL, section 4.1), before all else; 1 leaves them.
    """

    temperature: NonNegativeFloat
    top_k: PositiveInt | None
    top_p: Annotated[float, Field(gt=0, le=1)] | None
    min_p: Annotated[float, Field(ge=0, le=1)] | None
    repetition_penalty: PositiveFloat
