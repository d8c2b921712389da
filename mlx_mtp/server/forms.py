"""What the dialects' JSON forms are made of: values of exactly the type they claim, and a form that ignores the rest.

JSON says what type a value has, so a number in quotes or a 1 for true is an error of the client's, not to be read
kindly: pydantic's own leniency is off.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Strict

Number = Annotated[float, Strict()]
Integer = Annotated[int, Strict()]
Flag = Annotated[bool, Strict()]
Word = Annotated[str, Strict()]


class Lenient(BaseModel):
    """A form whose unknown fields have no effect, as the clients of most dialects expect."""

    model_config = ConfigDict(extra="ignore", frozen=True)
