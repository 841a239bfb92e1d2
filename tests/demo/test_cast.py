"""The parts of the story for each kind of node: pure, from the value of --simulate."""

import pytest
from gpuslice.demo.cast import Cast, numbers
from gpuslice.demo.screen import CardRow, folded, map_lines
from gpuslice.nvml.sim import spec


@pytest.mark.parametrize(
    ("node", "cut", "shared", "extras"),
    [
        ("h100", 0, 0, ()),
        ("h100x2", 0, 1, ()),
        ("h100x4", 0, 1, (2, 3)),
        ("l4+h100", 1, 0, ()),
        ("h100+l4+h100", 0, 2, (1,)),  # the one that can do more is shared
        ("l4x3", None, 0, (1, 2)),
        ("a30", None, 0, ()),  # Ampere switches MIG mode only with a reset
        ("a30:mig", 0, None, ()),
        ("a30:mig+l4", 0, 1, ()),
        ("a100-40gx2:mig+l4x2", 0, 2, (3,)),  # the second A100 stays in MIG mode, so no claim gets it whole
    ],
)
def test_each_card_has_a_part_that_it_can_play(
    node: str, cut: int | None, shared: int | None, extras: tuple[int, ...]
) -> None:
    cast = Cast.of(spec.parse(node))

    assert (cast.cut, cast.shared, cast.extras) == (cut, shared, extras)


def test_amounts_suit_the_card_that_is_asked_for_them() -> None:
    cast = Cast.of(spec.parse("h100+l4"))

    assert (cast.gib(3 / 8, 0), cast.gib(3 / 8)) == ("30Gi", "8Gi")


def test_cards_are_named_as_a_sentence_names_them() -> None:
    assert [numbers(them) for them in ((2,), (2, 3), (2, 3, 4), (1, 3, 4))] == [
        "GPU 2",
        "GPU 2 and 3",
        "GPU 2 to 4",
        "GPU 1, 3 and 4",
    ]


def test_a_map_of_twelve_memory_slices_fits_a_terminal() -> None:
    ruler = " " * 8 + "".join(str(number).center(6) for number in range(12))
    cells = "  memory" + "[ .  ]" * 9 + "[" + "1g.24gb".center(16) + "]"

    lines = map_lines([CardRow(0, (ruler, cells)), CardRow(1, (ruler, cells))])

    assert lines[0].split() == ["GPU", "0-1", *map(str, range(12))]
    assert lines[1] == " " * 7 + "[ .  ]" * 9 + "[    1g.24gb     ]"


def test_a_path_that_is_longer_than_a_line_is_broken() -> None:
    assert max(map(len, folded(f"serving on /{'deep/' * 30}dra.sock", 4))) <= 80
