"""House rules that no linter knows."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/contract.md"
SITTING = 350  # lines of a file that a stranger reads in one sitting

# The DRA contract has 77 statements. 70 to 77 are about health, metadata and status, which this release does not have;
# 26, 35 and 64 are about shares of a device.
NOT_YET = frozenset(range(70, 78))
STATEMENTS = frozenset(range(1, 78)) - NOT_YET


def shown() -> Iterator[tuple[int, str]]:
    """(statement, test) for every `@pytest.mark.contract(…)` in the tests, in the order of the files."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        marks = _contract(module.body)
        for test in ast.walk(module):
            if isinstance(test, ast.FunctionDef | ast.AsyncFunctionDef) and test.name.startswith("test_"):
                numbers = {n for mark in test.decorator_list for n in _numbers(mark)} | marks
                yield from ((number, f"{path.relative_to(ROOT)}::{test.name}") for number in sorted(numbers))


def _contract(body: list[ast.stmt]) -> set[int]:
    """The numbers of a `pytestmark` of a whole file."""
    marks = [s.value for s in body if isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) == "pytestmark"]
    return {n for mark in marks for call in ast.walk(mark) for n in _numbers(call)}


def _numbers(mark: ast.AST) -> list[int]:
    if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.contract":
        return [int(ast.literal_eval(argument)) for argument in mark.args]
    return []


def page(text: str) -> str:
    """docs/contract.md with a new last column of its table, from the tests."""
    tests: dict[int, list[str]] = {}
    for number, test in shown():
        tests.setdefault(number, []).append(f"`{test.removeprefix('tests/')}`")
    lines = []
    for line in text.splitlines():
        match = re.match(r"\| (\d+) \| (.*?) \|", line)
        number = int(match[1]) if match else 0
        cell = "not in this release" if number in NOT_YET else "<br>".join(tests.get(number, ["**no test yet**"]))
        lines.append(f"| {number} | {match[2]} | {cell} |" if match else line)
    return "\n".join(lines) + "\n"


def test_every_statement_of_the_contract_has_a_test_that_shows_it() -> None:
    missing = STATEMENTS - {number for number, _ in shown()}

    assert sorted(missing) == []


def test_the_table_of_the_contract_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")

    assert {int(n) for n in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)} == STATEMENTS | NOT_YET
    assert text == page(text), "write it again: python -m tests.test_house"


def test_no_file_of_the_driver_is_longer_than_one_sitting() -> None:
    """A longer file says so, and why, in its docstring: "Longer than one sitting, because …"."""
    texts = {p: p.read_text(encoding="utf-8") for p in (ROOT / "driver").rglob("*.py") if p.parent.name != "pb"}
    long = {str(path.relative_to(ROOT)) for path, text in texts.items() if len(text.splitlines()) > SITTING}
    excused = {
        str(p.relative_to(ROOT)) for p, text in texts.items() if "Longer than one sitting, because " in _docstring(text)
    }

    assert sorted(long - excused) == []
    assert sorted(excused - long) == [], "these are short enough by now"


def _docstring(text: str) -> str:
    return ast.get_docstring(ast.parse(text)) or ""


def test_no_two_modules_of_the_driver_name_two_classes_alike() -> None:
    """Aliases count, too: a reader who knows a name from one module must not find another thing under it."""
    places: dict[str, list[str]] = {}
    for path in sorted((ROOT / "driver/gpuslice").rglob("*.py")):
        if path.parent.name != "pb":
            for name in _classes(ast.parse(path.read_text(encoding="utf-8"))):
                places.setdefault(name, []).append(str(path.relative_to(ROOT)))

    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def _classes(module: ast.Module) -> Iterator[str]:
    """Names of the module's classes, Protocols and type aliases."""
    for statement in module.body:
        match statement:
            case ast.ClassDef(name=name):
                yield name
            case ast.Assign(targets=[ast.Name(id=name)]) if re.fullmatch(r"_*[A-Z][A-Z0-9]*[a-z]\w*", name):
                yield name


def test_the_door_to_the_api_server_loads_no_typed_models() -> None:
    """All of them take half a second and 20 MB at the start (measured)."""
    program = "import sys, gpuslice.kube; print(sum(n.startswith('kubernetes.client.models.') for n in sys.modules))"

    count = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert int(count) <= 10


def test_a_wrong_flag_is_answered_without_loading_the_driver() -> None:
    program = "import sys, gpuslice.cli; print([n for n in sys.modules if n in ('grpc', 'kubernetes', 'pynvml')])"

    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert loaded.strip() == "[]"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
