"""Our own writes count at once; late news changes nothing, and news of others is noticed."""

from __future__ import annotations

from typing import Any

import pytest
from gpuslice.core.pools.slice_cache import SliceCache

pytestmark = pytest.mark.contract(60)


def body(version: int, name: str = "a", uid: str = "") -> dict[str, Any]:
    return {"metadata": {"name": name, "uid": uid or f"uid-{name}", "resourceVersion": str(version)}}


def test_a_list_made_before_our_write_does_not_undo_it() -> None:
    cache = SliceCache()
    began = cache.began()
    cache.mutate(body(12))

    cache.replace([], began)
    assert cache.bodies() == [body(12)]
    cache.replace([], cache.began())
    assert cache.bodies() == []


def test_a_list_made_before_a_change_by_another_does_not_undo_it() -> None:
    cache = SliceCache()
    cache.replace([body(11), body(12, "b")], cache.began())
    began = cache.began()
    cache.observe("MODIFIED", body(13))
    cache.observe("DELETED", body(14, "b"))

    cache.replace([body(11), body(12, "b")], began)

    assert cache.bodies() == [body(13)]


@pytest.mark.parametrize("listed", [[], [body(400)]])
def test_a_list_whose_versions_went_back_counts_as_any_other(listed: list[dict[str, Any]]) -> None:
    """After the restore of an etcd, all writes after its snapshot are gone, whatever their versions are."""
    cache = SliceCache()
    cache.mutate(body(1000))
    cache.mutate(body(1001, "b"))

    cache.replace(listed, cache.began())

    assert cache.bodies() == listed
    cache.observe("MODIFIED", body(401))
    assert cache.bodies() == [body(401)]


def test_what_we_deleted_and_a_restored_server_has_again_is_seen() -> None:
    cache = SliceCache()
    cache.mutate(body(12))
    cache.remove(body(12))

    cache.replace([body(12)], cache.began())

    assert cache.bodies() == [body(12)]


def test_what_we_deleted_does_not_come_back_with_late_news() -> None:
    cache = SliceCache()
    cache.mutate(body(12))
    began = cache.began()
    cache.remove(body(12))

    cache.observe("ADDED", body(12))
    cache.observe("DELETED", body(13))
    cache.replace([body(12)], began)

    assert cache.bodies() == []
    assert not cache.foreign()


@pytest.mark.parametrize("first", ["answer", "watch"])
def test_our_own_write_is_not_foreign_whichever_tells_of_it_first(first: str) -> None:
    cache = SliceCache()
    for teller in ("answer", "watch") if first == "answer" else ("watch", "answer"):
        if teller == "answer":
            cache.mutate(body(12))
        else:
            cache.observe("ADDED", body(12))

    assert cache.bodies() == [body(12)]
    assert not cache.foreign()


def test_a_change_by_another_is_foreign_and_stays_when_our_older_answer_comes_late() -> None:
    cache = SliceCache()
    cache.observe("ADDED", body(12))
    cache.observe("MODIFIED", body(13))
    cache.mutate(body(12))

    assert cache.bodies() == [body(13)]
    assert cache.foreign()
    assert not cache.foreign()


def test_a_deletion_by_another_is_foreign_and_final() -> None:
    cache = SliceCache()
    cache.observe("ADDED", body(12))
    cache.observe("DELETED", body(13))
    cache.mutate(body(12))

    assert cache.bodies() == []
    assert cache.foreign()


@pytest.mark.parametrize("shown", [12, 13])
def test_our_own_write_is_unseen_until_an_event_shows_it_or_a_later_state(shown: int) -> None:
    cache = SliceCache()
    cache.mutate(body(12))
    unseen = cache.unseen()
    cache.observe("ADDED", body(11))
    assert cache.unseen() == unseen != frozenset()

    cache.observe("MODIFIED", body(shown))

    assert cache.unseen() == frozenset()


def test_our_own_deletion_is_unseen_until_an_event_shows_it() -> None:
    cache = SliceCache()
    cache.replace([body(12)], cache.began())
    cache.remove(body(12))
    cache.observe("MODIFIED", body(13))  # of before the deletion
    assert len(cache.unseen()) == 1

    cache.observe("DELETED", body(14))

    assert cache.unseen() == frozenset()


def test_nothing_is_unseen_that_an_event_or_a_later_list_has_shown_or_that_changed_nothing() -> None:
    cache = SliceCache()
    cache.observe("ADDED", body(12))
    cache.mutate(body(12))
    cache.mutate(body(12))
    cache.observe("DELETED", body(13, "b"))
    cache.remove(body(13, "b"))
    assert cache.unseen() == frozenset()

    began = cache.began()
    cache.mutate(body(14, "c"))
    cache.replace([body(12)], began)
    assert len(cache.unseen()) == 1, "the list was asked for before the write"
    cache.replace([body(12)], cache.began())
    assert cache.unseen() == frozenset()
