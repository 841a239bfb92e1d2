"""Every key of a policy: its values, its default, and the modes with which it has an effect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from gpuslice.core.model import API_VERSION, INTERVALS, Setting
from gpuslice.core.policy import reading
from gpuslice.core.policy.rules import Policy, client_limit
from gpuslice.core.policy.schema import ALL_MODES, KEYS, LEAST_SHARE_MIB, SHARED, SHARES, Match, Section
from gpuslice.errors import ConfigError

from hack.lib.docs import devices
from hack.lib.docs.text import code, codes, paired, table

_CARD_CLIENTS = client_limit(devices.a_card())


class KeyText(NamedTuple):
    values: str
    default: str
    meaning: str
    examples: tuple[object, ...]  # the key's modes are those with which the driver accepts one of these


SECTION = {
    "modes": KeyText(f"a list of {codes(ALL_MODES)}", "all", "how claims may use the card", ()),
    "profiles": KeyText(
        "a list of names (`1g.10gb`) and ids (`19`)",
        "all without a suffix",
        "the only MIG profiles that the card offers",
        ([19],),
    ),
    "suffixes": KeyText('a list, such as `"+me"`', "none", "MIG profiles with these suffixes too", (["+me"],)),
    "reserve": KeyText(
        "a quantity of bytes, such as `512Mi`", "what NVML reserves", "memory that no claim gets", ("512Mi",)
    ),
    "mps": KeyText("`shares`, `clients`: below", "", "how MPS divides the card", ({"shares": 2},)),
    "timeslice": KeyText("`shares`, `interval`: below", "", "how time-slicing divides the card", ({"shares": 2},)),
    "leastShare": KeyText(
        "a quantity of bytes, such as `1Gi`",
        f"`{LEAST_SHARE_MIB}Mi`",
        "a smaller request for memory is charged so much",
        ("1Gi",),
    ),
    "sharedPartitions": KeyText(f"a list of {codes(SHARED)}", "none", "claims may share a partition too", (["mps"],)),
    "static": KeyText(
        "`{1g.10gb: 4}`, `{mps: 4}` or `{timeslice: 4}`",
        "none",
        "the fixed parts of the card on Kubernetes 1.34 and 1.35",
        ({19: 1}, {"mps": 4}, {"timeslice": 4}),
    ),
    "keep": KeyText(
        f"a list of {codes(Setting)}",
        "none",
        "settings of the card that the driver does not change",
        tuple([one] for one in Setting),
    ),
}

SHARED_KEYS = {
    "mps.shares": KeyText(
        "a number N from 1 on", str(SHARES), "a claim without a memory request gets 1/N of the memory", (2,)
    ),
    "mps.clients": KeyText(
        "a number from 1 on", f"what MPS can serve, {_CARD_CLIENTS} or more", "CUDA contexts of the whole card", (40,)
    ),
    "timeslice.shares": KeyText(
        "a number N from 1 on",
        str(SHARES),
        "at most N shares; without a memory request, each gets 1/N of the memory",
        (2,),
    ),
    "timeslice.interval": KeyText(
        f"one of {codes(INTERVALS)}", "`default`", "how long a share computes at a time", ("long",)
    ),
}

MATCH = {
    "index": KeyText("a number, or a list", "any card", "NVML's index of the card on its node", (0,)),
    "uuid": KeyText("a UUID, or a list", "any card", "UUID of the card", (devices.NOWHERE,)),
    "product": KeyText(
        "a text, or a list; `*` is any text", "any card", "product name; upper and lower case are equal", ("*H100*",)
    ),
}

DOCUMENT = {
    "apiVersion": f"`{API_VERSION}`",
    "kind": f"`{reading.KIND}`",
    "default": "a section, for every card",
    "gpus": "a list of sections, each with `match`; the first one that matches a card counts, and overrides `default` "
    "key by key",
}


def document() -> str:
    return table(["key", "value"], ([code(key), text] for key, text in DOCUMENT.items()))


def match() -> str:
    rows = paired("keys of match", Match.__dataclass_fields__, MATCH)
    return table(["key", "values", "without the key", "meaning"], ([code(name), *key[:3]] for name, key in rows))


def section() -> str:
    head = ["key", "values", "without the key", "has an effect with mode", "meaning"]
    return table(head, (_row(name, key) for name, key in paired("keys of a section", KEYS, SECTION)))


def shared() -> str:
    head = ["key", "values", "without the key", "has an effect with mode", "meaning"]
    found = (name.replace("_", ".", 1) for name in Section.__dataclass_fields__ if name.startswith((*SHARED,)))
    return table(head, (_row(name, key) for name, key in paired("keys of shares", found, SHARED_KEYS)))


def _row(name: str, key: KeyText) -> list[str]:
    return [code(name), key.values, key.default, _modes(name, key.examples), key.meaning]


def _modes(name: str, examples: tuple[object, ...]) -> str:
    """The modes with which the driver accepts this key. The driver refuses a setting without an effect."""
    sections = [_nested(name, example) for example in examples]
    found = [mode for mode in ALL_MODES if any(_accepted({"modes": [mode], **section}) for section in sections)]
    return codes(found) or "any"


def _nested(name: str, example: object) -> Mapping[str, object]:
    first, _, rest = name.partition(".")
    return {first: {rest: example} if rest else example}


def _accepted(default: Mapping[str, object]) -> bool:
    try:
        Policy.parse({"apiVersion": API_VERSION, "kind": reading.KIND, "default": default})
    except ConfigError:
        return False
    return True
