"""HTML that cannot be injected into: a text becomes part of it only through `tag`, which escapes it."""

from __future__ import annotations

import html

_LINES = ("h1", "h2", "p", "style", "table", "title", "tr")  # the source begins a new line behind them


class Html(str):
    """A piece of finished HTML."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str | int) -> Html:
    """An element with its children; a child that is no `Html` is text. An attribute `class_` is `class`."""
    words = "".join(f' {key.rstrip("_")}="{html.escape(str(value))}"' for key, value in attributes.items())
    end = "\n" if name in _LINES else ""
    return Html(f"<{name}{words}>{joined(*children)}</{name}>{end}")


def joined(*children: str) -> Html:
    return Html("".join(child if isinstance(child, Html) else html.escape(child) for child in children))
