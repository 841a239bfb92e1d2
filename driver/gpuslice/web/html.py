"""HTML that is safe against injection: text becomes part of it only through `tag`, which escapes the text."""

from __future__ import annotations

import html

_LINES = ("h1", "h2", "p", "style", "table", "title", "tr")  # elements with a line break after them in the source


class Html(str):
    """A piece of finished HTML."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str | int) -> Html:
    """An element with its children. A child that is not `Html` is text. The attribute `class_` becomes `class`."""
    words = "".join(f' {key.rstrip("_")}="{html.escape(str(value))}"' for key, value in attributes.items())
    end = "\n" if name in _LINES else ""
    return Html(f"<{name}{words}>{joined(*children)}</{name}>{end}")


def joined(*children: str) -> Html:
    return Html("".join(child if isinstance(child, Html) else html.escape(child) for child in children))
