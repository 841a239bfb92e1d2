"""Our own writes count at once; late news changes nothing, and news of others is noticed."""

from __future__ import annotations

from typing import Any

import pytest
from gpuslice.core.pools.slice_cache import SliceCache

pytestmark = pytest.mark.contract(60)


def body(version: int, name: str = "a", uid: str = "") -> dict[str, Any]:
    return {"metadata": {"name": name, "uid": uid or f"uid-{name}", "resourceVersion": str(version)}}


def test_a_list_made_before_our_write_does_not_undo_it() -> None:
    view = SliceCache()
    view.mutated(body(12))

    view.listed([], "11")
    assert view.bodies() == [body(12)]
    view.listed([], "13")
    assert view.bodies() == []


def test_what_we_deleted_does_not_come_back_with_late_news() -> None:
    view = SliceCache()
    view.mutated(body(12))
    view.removed(body(12))

    view.observed("ADDED", body(12))
    view.observed("DELETED", body(13))
    view.listed([body(12)], "12")

    assert view.bodies() == []
    assert not view.foreign()


@pytest.mark.parametrize("first", ["answer", "watch"])
def test_our_own_write_is_not_foreign_whichever_tells_of_it_first(first: str) -> None:
    view = SliceCache()
    for teller in ("answer", "watch") if first == "answer" else ("watch", "answer"):
        if teller == "answer":
            view.mutated(body(12))
        else:
            view.observed("ADDED", body(12))

    assert view.bodies() == [body(12)]
    assert not view.foreign()


def test_a_change_by_another_is_foreign_and_stays_when_our_older_answer_comes_late() -> None:
    view = SliceCache()
    view.observed("ADDED", body(12))
    view.observed("MODIFIED", body(13))
    view.mutated(body(12))

    assert view.bodies() == [body(13)]
    assert view.foreign()
    assert not view.foreign()


def test_a_deletion_by_another_is_foreign_and_final() -> None:
    view = SliceCache()
    view.observed("ADDED", body(12))
    view.observed("DELETED", body(13))
    view.mutated(body(12))

    assert view.bodies() == []
    assert view.foreign()
