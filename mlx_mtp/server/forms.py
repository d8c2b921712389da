"""What the dialects' JSON schemas share. Values must have exactly the type that a field states.

JSON has types, so a number in quotes or a 1 for true is a client's error: pydantic's coercion is off.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from mlx_mtp.server.nouns import invalid


class Form(BaseModel):
    """A JSON object whose unknown fields have no effect, as clients of most dialects expect."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    def given(self, *names: str) -> dict[str, Any]:
        """The fields that the client has set, by name."""
        return {name: value for name in names if (value := vars(self)[name]) is not None}


def stop_strings(stop: Any, param: str) -> tuple[str, ...]:
    """Stop strings, given as one string or a list. Raises ServerError."""
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or not all(isinstance(one, str) for one in stops):
        raise invalid(f"{param} must be a string or a list of strings", param)
    if "" in stops:
        raise invalid(f"{param} has an empty string; expected at least one character", param)
    if len(stops) > 64:
        raise invalid(f"{param} has {len(stops)} strings; expected at most 64", param)
    return tuple(stops)
