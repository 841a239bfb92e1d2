"""JSON objects, by what may be done with one: every alias of them is here, so that a name means one thing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Body = dict[str, Any]  # an object of the API, as json.loads gives it; may be changed and sent back
ReadOnlyBody = Mapping[str, Any]  # only read: a shape that is trusted, so a wrong one surfaces as KeyError or TypeError
UncheckedBody = Mapping[str, object]  # somebody else's: each value is checked before it is used
