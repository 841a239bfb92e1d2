"""`hack/docs`: write the generated parts of every page below docs/reference/ again."""

from __future__ import annotations

import sys

from hack.lib.docs.errors import DocsError
from hack.lib.docs.pages import PAGES, TABLES
from hack.lib.docs.text import filled


def main() -> int:
    for path in sorted(PAGES.glob("*.md")):
        old = path.read_text(encoding="utf-8")
        new = filled(old, TABLES)
        if new != old:
            path.write_text(new, encoding="utf-8")
            print(f"hack/docs: {path.name} is written again")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DocsError as e:
        sys.exit(f"hack/docs: {e}")
