"""What a policy document says, as nouns, and its strict reading: a setting without an effect is an error, not a wish.

Only what the document says of itself is judged here; what needs the cards at hand is `policy`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import NoReturn, TypeVar

from driver.core import quantity
from driver.core.model import Gpu, MigProfile
from driver.errors import ConfigError

API_VERSION = "gpuslice.dev/v1alpha1"
KIND = "Policy"

_T = TypeVar("_T")
KEYS = ("modes", "profiles", "suffixes", "reserve", "static")
_NOT_YET = ("mps", "timeslice")  # words of the design that a later release offers
_PROFILE = re.compile(r"\d+g\.\d+gb([+-][a-z]+(\.[a-z]+)*)?")
_SUFFIX = re.compile(r"[+-][a-z]+(\.[a-z]+)*")
_BYTES = re.compile(r"(\d+(?:\.\d+)?)([KMGT]i|[kMGT])")


class Mode(StrEnum):
    """How a card may be used; one at a time, the scheduler sees to it."""

    GPU = "gpu"
    MIG = "mig"


ProfileRef = str | int  # a name ("1g.10gb"), or the GPU-instance profile id, which no driver update renames


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Which cards an entry speaks for: all named facts must agree, each with any of its values. () is "any"."""

    index: tuple[int, ...] = ()
    uuid: tuple[str, ...] = ()
    product: tuple[str, ...] = ()  # "*" stands for any text; upper and lower case are the same

    def __contains__(self, gpu: Gpu) -> bool:
        return (
            (not self.index or gpu.index in self.index)
            and (not self.uuid or gpu.uuid in self.uuid)
            and (not self.product or any(_glob(glob, gpu.product) for glob in self.product))
        )

    def covers(self, other: Match) -> bool:
        """Whether every card that `other` matches is matched here too."""
        return (
            (not self.index or (bool(other.index) and set(other.index) <= set(self.index)))
            and (not self.uuid or (bool(other.uuid) and set(other.uuid) <= set(self.uuid)))
            and (not self.product or (bool(other.product) and all(map(self._names, other.product))))
        )

    def _names(self, glob: str) -> bool:
        """A star of the other glob is an ordinary character here, which only a star of ours can match: that covers."""
        return any(_glob(mine, glob) for mine in self.product)

    def certain(self) -> bool:
        """Whether the author knew which product this is, so that a profile which it lacks is a mistake."""
        return bool(self.uuid) or (len(self.product) == 1 and "*" not in self.product[0])


def _glob(glob: str, text: str) -> bool:
    pattern = ".*".join(re.escape(part) for part in glob.casefold().split("*"))
    return re.fullmatch(pattern, text.casefold()) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What one section of the policy says; None where it says nothing."""

    modes: tuple[Mode, ...] | None = None
    profiles: tuple[ProfileRef, ...] | None = None
    suffixes: tuple[str, ...] | None = None
    reserve_bytes: int | None = None
    static: tuple[tuple[ProfileRef, int], ...] | None = None

    def over(self, base: Terms) -> Terms:
        """These terms where they say something, else the base's. `profiles` and `suffixes` are one question."""
        said = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if self.profiles is not None or self.suffixes is not None:
            base = replace(base, profiles=None, suffixes=None)
        return replace(base, **said)

    def wants(self, profile: MigProfile) -> bool:
        if self.profiles is not None:
            return profile.id in self.profiles or profile.name in self.profiles
        return not profile.suffix or profile.suffix in (self.suffixes or ())


@dataclass(frozen=True, slots=True)
class Rule:
    path: str
    match: Match
    terms: Terms


ALL_MODES = tuple(Mode)


# ---------------------------------------------------------------- reading


def read(body: object) -> tuple[Terms, tuple[Rule, ...]]:
    """The terms for every card, and the entries in order. ConfigError names the path, the limit and the remedy."""
    document = _mapping(body, "the document", ("apiVersion", "kind", "default", "gpus"))
    for key, only in (("apiVersion", API_VERSION), ("kind", KIND)):
        if document.get(key) != only:
            _fail(key, f"is {document.get(key)!r} and must be {only!r}; write {key}: {only}")
    base = (
        _terms(_mapping(document["default"], "default", KEYS), "default", Terms()) if "default" in document else Terms()
    )
    rules: list[Rule] = []
    for i, entry in enumerate(_sequence(document["gpus"], "gpus") if "gpus" in document else ()):
        rule = _rule(entry, f"gpus[{i}]", base)
        before = next((earlier for earlier in rules if earlier.match.covers(rule.match)), None)
        if before is not None:
            _fail(
                rule.path,
                f"is never reached, for {before.path} matches the same GPUs first; put the narrower one first",
            )
        rules.append(rule)
    return base, tuple(rules)


def _rule(entry: object, path: str, base: Terms) -> Rule:
    body = _mapping(entry, path, ("match", *KEYS))
    if "match" not in body:
        _fail(path, "has no match; say which GPUs it is for (index, uuid or product), or put it under default")
    if len(body) == 1:
        _fail(path, f"says nothing about the GPUs it matches; add one of: {', '.join(KEYS)}")
    match = _match(_mapping(body["match"], f"{path}.match", ("index", "uuid", "product")), f"{path}.match")
    return Rule(path, match, _terms({key: body[key] for key in KEYS if key in body}, path, base))


def _match(body: Mapping[str, object], path: str) -> Match:
    if not body:
        _fail(path, "is empty; name index, uuid or product, or put the entry under default")
    index = _unique((_number(v, p) for v, p in _values(body, "index", path)), f"{path}.index")
    uuid = _unique((_text(v, p) for v, p in _values(body, "uuid", path)), f"{path}.uuid")
    product = _unique((_text(v, p) for v, p in _values(body, "product", path)), f"{path}.product")
    for text in uuid:
        if not text.startswith("GPU-"):
            _fail(f"{path}.uuid", f"is {text!r} and must be the UUID of a card, which starts with GPU-")
    return Match(index=tuple(index), uuid=tuple(uuid), product=tuple(product))


def _values(body: Mapping[str, object], key: str, path: str) -> Iterable[tuple[object, str]]:
    """One value or a list of them, each with its path."""
    value = body.get(key, ())
    if isinstance(value, list) and not value:
        _fail(f"{path}.{key}", "is an empty list, which matches nothing; name a value or leave the key out")
    if isinstance(value, list | tuple):
        return [(item, f"{path}.{key}[{i}]") for i, item in enumerate(value)]
    return [(value, f"{path}.{key}")]


def _terms(body: Mapping[str, object], path: str, base: Terms) -> Terms:
    """One section's settings. Each must have an effect with the modes that are in force there."""
    modes = _modes(body["modes"], f"{path}.modes") if "modes" in body else None
    in_force = modes or base.modes or ALL_MODES
    for key in ("profiles", "suffixes", "static"):
        if key in body and Mode.MIG not in in_force:
            _fail(f"{path}.{key}", f"has no effect without mode mig; add mig to {path}.modes or leave it out")
    if "reserve" in body and Mode.GPU not in in_force:
        _fail(f"{path}.reserve", f"has no effect without mode gpu; add gpu to {path}.modes or leave it out")
    if "profiles" in body and "suffixes" in body:
        _fail(f"{path}.suffixes", "has no effect beside profiles, which already names every profile; use one of them")
    return Terms(
        modes=modes,
        profiles=_profiles(body["profiles"], f"{path}.profiles") if "profiles" in body else None,
        suffixes=_suffixes(body["suffixes"], f"{path}.suffixes") if "suffixes" in body else None,
        reserve_bytes=_bytes(body["reserve"], f"{path}.reserve") if "reserve" in body else None,
        static=_static(body["static"], f"{path}.static") if "static" in body else None,
    )


def _modes(value: object, path: str) -> tuple[Mode, ...]:
    words = _unique((_text(v, f"{path}[{i}]") for i, v in enumerate(_sequence(value, path))), path)
    known = ", ".join(Mode)
    for word in words:
        if word in _NOT_YET:
            _fail(path, f"names {word}, which this release does not offer yet; use {known}")
        if word not in tuple(Mode):
            _fail(path, f"names {word!r}, which is no mode; use {known}")
    return tuple(mode for mode in Mode if mode in words)


def _profiles(value: object, path: str) -> tuple[ProfileRef, ...]:
    return tuple(_unique((_profile(v, f"{path}[{i}]") for i, v in enumerate(_sequence(value, path))), path))


def _profile(value: object, path: str) -> ProfileRef:
    if isinstance(value, int) and not isinstance(value, bool):
        return _number(value, path)
    text = _text(value, path)
    if text.isdecimal():
        _fail(path, f"is the text {text!r}; a profile id is a number: write {int(text)} without quotes")
    if _PROFILE.fullmatch(text) is None:
        _fail(path, f"is {text!r} and must be a profile name such as 1g.10gb or 1g.10gb+me, or a profile id such as 19")
    return text


def _suffixes(value: object, path: str) -> tuple[str, ...]:
    found = _unique((_text(v, f"{path}[{i}]") for i, v in enumerate(_sequence(value, path))), path)
    for text in found:
        if _SUFFIX.fullmatch(text) is None:
            _fail(path, f'names {text!r}; a suffix starts with + or -, such as "+me", "-me" or "+gfx"')
    return tuple(found)


def _static(value: object, path: str) -> tuple[tuple[ProfileRef, int], ...]:
    if not isinstance(value, Mapping) or not value:
        _fail(path, 'must say how many partitions of each profile, such as {"1g.10gb": 7}')
    layout = []
    for key, count in value.items():
        ref = _profile(key, f"{path}.{key}")
        if _number(count, f"{path}.{key}") == 0:
            _fail(f"{path}.{key}", "is 0, which has no effect; write how many, or leave the profile out")
        layout.append((ref, _number(count, f"{path}.{key}")))
    return tuple(layout)


def _bytes(value: object, path: str) -> int:
    """A Kubernetes quantity of memory, in bytes."""
    if value in (0, "0") and not isinstance(value, bool):
        return 0
    if isinstance(value, int | float):
        _fail(path, f"is {value!r} without a unit; write bytes with a suffix, such as 512Mi or 2Gi")
    text = _text(value, path)
    wrong = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGTkmgt])(i?)[Bb]?", text)
    if _BYTES.fullmatch(text) is None:
        if wrong is not None:
            unit = wrong[2].upper()
            plain = f"{wrong[1]}{'k' if unit == 'K' else unit}"
            _fail(path, f"is {text!r}, which is no Kubernetes quantity; write {plain} or {wrong[1]}{unit}i")
        _fail(path, f"is {text!r}, which is no Kubernetes quantity; write a number with Mi or Gi, such as 512Mi")
    return quantity.parse(text)


# ---------------------------------------------------------------- plain shapes


def _fail(path: str, what: str) -> NoReturn:
    raise ConfigError(f"policy: {path} {what}")


def _mapping(value: object, path: str, known: Sequence[str]) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        _fail(path, f"must be a mapping with the keys {', '.join(known)}, not {_kind(value)}")
    for key in value:
        if key not in known:
            _fail(path, f"has the unknown key {key!r}; known keys: {', '.join(known)}")
    return value


def _sequence(value: object, path: str) -> Sequence[object]:
    if not isinstance(value, list | tuple):
        _fail(path, f"must be a list, not {_kind(value)}; write it in brackets or with dashes")
    if not value:
        _fail(path, "is an empty list, which would leave nothing; name what you want, or leave the key out")
    return value


def _text(value: object, path: str) -> str:
    if not isinstance(value, str) or not value:
        _fail(path, f"must be a text, not {_kind(value)}; write it in quotes")
    return value


def _number(value: object, path: str) -> int:
    if isinstance(value, str) and value.isdecimal():
        _fail(path, f"is the text {value!r} and must be a number; write {int(value)} without quotes")
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        _fail(path, f"must be a whole number from 0 on, not {_kind(value)}")
    return value


def _unique(values: Iterable[_T], path: str) -> list[_T]:
    found = list(values)
    for i, value in enumerate(found):
        if value in found[:i]:
            _fail(path, f"names {value} twice; name it once")
    return found


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    names = {bool: "true or false", str: "a text", list: "a list", dict: "a mapping"}
    return names.get(type(value), repr(value)) if value != "" else "an empty text"
