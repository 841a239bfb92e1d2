"""Facts from the driver's source, read as a syntax tree: taints and refusals."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[3]
PRODUCT = ROOT / "driver/gpuslice"
_NOT_THE_DRIVER = ("standin", "demo", "sim", "pb")


def calls(name: str) -> Iterator[tuple[Path, ast.Call]]:
    """Every call of this name in the driver, except in stand-ins and simulators; in the order of the files."""
    for path in sorted(PRODUCT.rglob("*.py")):
        if set(path.relative_to(PRODUCT).parts).isdisjoint(_NOT_THE_DRIVER):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == name]
            yield from ((path, call) for call in sorted(found, key=lambda call: call.lineno))


def returned(function: Callable[..., str]) -> list[str]:
    """The texts that this function returns, without the empty text."""
    nodes = ast.walk(ast.parse(inspect.getsource(function)))
    values = [node.value for node in nodes if isinstance(node, ast.Return) and node.value is not None]
    return [text for value in values for text in texts(value) if text]


def texts(node: ast.expr) -> list[str]:
    """The texts that this expression can have, with … for each inserted value. None if it is no text by itself."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.IfExp(body=one, orelse=other):
            return [*texts(one), *texts(other)]
        case ast.JoinedStr(values=parts):
            return ["".join(_part(part) for part in parts)]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return [one + other for one in texts(left) for other in texts(right)]
        case _:
            return []


def _part(part: ast.expr) -> str:
    return part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else "…"
