"""Type aliases for JSON objects, by their use. All aliases are here, so that each name has one meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Body = dict[str, Any]  # an object of the API, as json.loads gives it; may be changed and sent back
ReadOnlyBody = Mapping[str, Any]  # only read; its shape is trusted, so a wrong shape shows as KeyError or TypeError
UncheckedBody = Mapping[str, object]  # from another program or a user: each value is checked before use
