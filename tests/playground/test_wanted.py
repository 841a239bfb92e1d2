"""What a person may ask a playground for, and that its classes are those of deploy/."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import pytest
import yaml
from gpuslice.errors import ConfigError
from gpuslice.playground.folder import PlaygroundError, PlaygroundFolder
from gpuslice.playground.wanted import Wanted

from hack.lib.docs import devices
from tests.kit.cel import selected
from tests.kit.markdown import ROOT

CLASSES = [*yaml.safe_load_all((ROOT / "deploy/deviceclasses.yaml").read_text(encoding="utf-8"))]


@pytest.mark.parametrize("body", CLASSES, ids=[body["metadata"]["name"] for body in CLASSES])
def test_a_class_of_the_playground_selects_what_its_cel_selects(
    body: dict[str, dict[str, list[dict[str, dict[str, str]]]]],
) -> None:
    (selector,) = body["spec"]["selectors"]
    chosen = selected(selector["cel"]["expression"])
    where = Wanted(device_class=str(body["metadata"]["name"])).request().where

    assert callable(where)
    published = [*devices.published()]
    assert [where(device) for device in published] == [chosen(device) for device in published]
    assert any(map(where, published))


def test_a_class_may_be_named_without_our_domain() -> None:
    assert Wanted(device_class="mig").words == Wanted(device_class="mig.gpuslice.dev").words == "class mig.gpuslice.dev"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"device_class": "gpus"}, "there is no DeviceClass 'gpus'; use one of gpu.gpuslice.dev"),
        ({"device_class": "mig-"}, "there is no DeviceClass 'mig-'"),
        ({"device_class": ""}, "there is no DeviceClass ''"),
        ({"name": "Mine"}, "claim name 'Mine' is not a DNS label"),
        ({"name": "a" * 64}, "is not a DNS label"),
        ({"memory": "9GB"}, "memory '9GB' is not a Kubernetes quantity"),
        ({"memory": "-1Gi"}, "memory '-1Gi' is not a Kubernetes quantity above 0"),
        ({"sm_percent": "a quarter"}, "smPercent 'a quarter' is not a Kubernetes quantity"),
        ({"shares": "0"}, "shares '0' is not a Kubernetes quantity above 0"),
        ({"count": 0}, "a claim has 1 to 32 devices, not 0"),
        ({"count": 33}, "a claim has 1 to 32 devices, not 33"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_in_one_sentence(change: dict[str, object], says: str) -> None:
    wanted = dataclasses.replace(Wanted(device_class="mig"), **change)  # type: ignore[arg-type]

    with pytest.raises(ConfigError) as refused:
        wanted.request()

    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_long_tmpdir_is_left_for_tmp_because_sockets_have_little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "deep/" * 20)

    assert PlaygroundFolder(None).path.parent == Path("/tmp")


def test_a_chosen_folder_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="longer than the 75 bytes that leave room for sockets; choose a shorter one"):
        PlaygroundFolder(tmp_path / ("a" * 75))


def test_a_folder_of_something_else_is_not_touched(short: Path) -> None:
    (short / "letter").write_text("dear", encoding="utf-8")

    with pytest.raises(PlaygroundError, match="is not a folder of your playground; choose another folder"):
        PlaygroundFolder(short).take()
    assert [path.name for path in short.iterdir()] == ["letter"]


def test_a_link_in_its_place_is_not_followed(short: Path) -> None:
    (short / "link").symlink_to("/")

    with pytest.raises(PlaygroundError, match="is not a folder of your playground"):
        PlaygroundFolder(short / "link").take()
