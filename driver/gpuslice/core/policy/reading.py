"""Strict reader of a policy document: a setting without effect is an error.

This module checks only the document itself. Checks that need the cards of the node are in `rules`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from gpuslice.core import quantity
from gpuslice.core.model import API_VERSION, INTERVALS, Setting
from gpuslice.core.policy import other_formats, strict
from gpuslice.core.policy.schema import (
    ALL_MODES,
    KEYS,
    SHARED,
    SHARES,
    Match,
    Mode,
    Parts,
    ProfileRef,
    Rule,
    Section,
)

KIND = "Policy"
_PROFILE = re.compile(r"\d+g\.\d+gb([+-][a-z]+(\.[a-z]+)*)?")
_SUFFIX = re.compile(r"[+-][a-z]+(\.[a-z]+)*")
_BYTES = re.compile(r"(\d+(?:\.\d+)?)([KMGT]i|[kMGT])")


def read(body: object) -> tuple[Section, tuple[Rule, ...]]:
    """The default section and the entries in order. ConfigError names the path, the limit and the remedy."""
    other = other_formats.name(body)
    if other is not None:
        strict.fail(
            "the document",
            f"is {other}, but must be a Policy; docs/policy.md#from-other-tools shows the same settings in a Policy",
        )
    whole = strict.mapping(body, "the document", ("apiVersion", "kind", "default", "gpus"))
    for key, only in (("apiVersion", API_VERSION), ("kind", KIND)):
        if whole.get(key) != only:
            strict.fail(key, f"is {whole.get(key)!r} and must be {only!r}; write {key}: {only}")
    default = strict.mapping(whole.get("default", {}), "default", KEYS)
    base = _section(default, "default", Section())
    rules: list[Rule] = []
    for i, entry in enumerate(strict.sequence(whole["gpus"], "gpus") if "gpus" in whole else ()):
        rule = _rule(entry, f"gpus[{i}]", base)
        _check_reached(rule, rules)
        rules.append(rule)
    return base, tuple(rules)


def _check_reached(rule: Rule, before: Sequence[Rule]) -> None:
    """Refuse an entry that no card can reach, because earlier entries match all its cards."""
    takers = [
        next((earlier.path for earlier in before if earlier.match.covers(one)), "") for one in rule.match.alternatives()
    ]
    if all(takers):
        several = list(dict.fromkeys(takers))
        verb = "matches" if len(several) == 1 else "match"
        strict.fail(
            rule.path,
            f"is never reached, because {' and '.join(several)} {verb} the same GPUs first; put the narrower one first",
        )


def _rule(entry: object, path: str, base: Section) -> Rule:
    body = strict.mapping(entry, path, ("match", *KEYS))
    if "match" not in body:
        strict.fail(path, "has no match; name its GPUs (index, uuid or product), or put it under default")
    if len(body) == 1:
        strict.fail(path, f"has no setting for the GPUs that it matches; add one of: {', '.join(KEYS)}")
    match = _match(strict.mapping(body["match"], f"{path}.match", ("index", "uuid", "product")), f"{path}.match")
    return Rule(path, match, _section({key: body[key] for key in KEYS if key in body}, path, base))


def _match(body: Mapping[str, object], path: str) -> Match:
    if not body:
        strict.fail(path, "is empty; name index, uuid or product, or put the entry under default")
    index = strict.unique((strict.number(v, p) for v, p in _values(body, "index", path)), f"{path}.index")
    uuid = strict.unique((strict.text(v, p) for v, p in _values(body, "uuid", path)), f"{path}.uuid")
    product = strict.unique((strict.text(v, p) for v, p in _values(body, "product", path)), f"{path}.product")
    for text in uuid:
        if not text.startswith("GPU-"):
            strict.fail(f"{path}.uuid", f"is {text!r} and must be the UUID of a card, which starts with GPU-")
    return Match(index=tuple(index), uuid=tuple(uuid), product=tuple(product))


def _values(body: Mapping[str, object], key: str, path: str) -> Iterable[tuple[object, str]]:
    """One value or a list of them, each with its path."""
    value = body.get(key, ())
    if isinstance(value, list) and not value:
        strict.fail(f"{path}.{key}", "is an empty list, which matches nothing; name a value or leave the key out")
    if isinstance(value, list | tuple):
        return [(item, f"{path}.{key}[{i}]") for i, item in enumerate(value)]
    return [(value, f"{path}.{key}")]


def _section(body: Mapping[str, object], path: str, base: Section) -> Section:
    """The settings of one section. Each setting must have an effect together with the inherited settings."""
    mps = strict.mapping(body.get("mps", {}), f"{path}.mps", ("shares", "clients"))
    timeslice = strict.mapping(body.get("timeslice", {}), f"{path}.timeslice", ("shares", "interval"))
    section = Section(
        modes=strict.optional(body, "modes", path, _modes),
        profiles=strict.optional(body, "profiles", path, _profiles),
        suffixes=strict.optional(body, "suffixes", path, _suffixes),
        reserve_bytes=strict.optional(body, "reserve", path, _bytes),
        mps_shares=strict.optional(mps, "shares", f"{path}.mps", strict.positive),
        mps_clients=strict.optional(mps, "clients", f"{path}.mps", strict.positive),
        timeslice_shares=strict.optional(timeslice, "shares", f"{path}.timeslice", strict.positive),
        timeslice_interval=strict.optional(timeslice, "interval", f"{path}.timeslice", _interval),
        least_share_bytes=strict.optional(body, "leastShare", path, _bytes),
        shared_partitions=strict.optional(body, "sharedPartitions", path, _shared_partitions),
        static=strict.optional(body, "static", path, _static),
        keep=strict.optional(body, "keep", path, _keep),
    )
    in_force = section.merged_over(base)
    _check_effect(body, path, section, in_force)
    _check_consistent(body, path, in_force)
    _check_kept(path, section, in_force)
    return section


_NEEDED = {  # without one of these modes the setting has no effect
    "profiles": (Mode.MIG,),
    "suffixes": (Mode.MIG,),
    "sharedPartitions": (Mode.MIG,),
    "reserve": (Mode.GPU, *SHARED),  # NVML reports the memory of a partition; the policy cannot change it
    "mps": (Mode.MPS,),
    "timeslice": (Mode.TIMESLICE,),
    "leastShare": SHARED,
}


def _check_effect(body: Mapping[str, object], path: str, section: Section, in_force: Section) -> None:
    """Refuse settings of this section that have no effect with the modes of its cards."""
    modes = set(in_force.modes or ALL_MODES)
    shared_partitions = set(in_force.shared_partitions or ()) if Mode.MIG in modes else set[Mode]()
    needed = _NEEDED | {"static": (section.static.mode if isinstance(section.static, Parts) else Mode.MIG,)}
    for key in [key for key in needed if key in body]:
        if not (modes | shared_partitions if key in (*SHARED, "leastShare") else modes).intersection(needed[key]):
            modes_text = " or ".join(needed[key])
            strict.fail(
                f"{path}.{key}", f"has no effect without mode {modes_text}; add it to {path}.modes or leave {key} out"
            )
    if section.timeslice_interval is not None and Mode.TIMESLICE not in modes:
        strict.fail(
            f"{path}.timeslice.interval",
            f"has no effect on partitions, only on whole cards; add timeslice to {path}.modes or leave it out",
        )


_CHANGED_BY = {Setting.COMPUTE_MODE: (Mode.MPS,), Setting.TIME_SLICE: (Mode.GPU, Mode.TIMESLICE)}


def _check_kept(path: str, section: Section, in_force: Section) -> None:
    """Refuse `keep` for a setting that the driver would not change, and a value for a setting that it keeps."""
    modes = set(in_force.modes or ALL_MODES)
    for setting in section.keep or ():
        if not modes.intersection(_CHANGED_BY[setting]):
            changing = " or ".join(_CHANGED_BY[setting])
            strict.fail(
                f"{path}.keep", f"names {setting}, which has no effect: only mode {changing} changes it; leave it out"
            )
    # Without this mode, the driver sets an inherited interval on no card, so there is no contradiction.
    interval = in_force.timeslice_interval or "default"
    if Setting.TIME_SLICE in (in_force.keep or ()) and Mode.TIMESLICE in modes and interval != "default":
        strict.fail(
            f"{path}.{'keep' if section.keep else 'timeslice.interval'}",
            f"contradicts itself: keep names timeSlice, and timeslice.interval is {interval}; "
            "write interval: default, or leave timeSlice out of keep",
        )


def _check_consistent(body: Mapping[str, object], path: str, in_force: Section) -> None:
    """Refuse settings that have no effect because of other settings of this section or inherited settings."""
    for key in SHARED:
        if key in body and not body[key]:
            strict.fail(
                f"{path}.{key}",
                "is empty, so it has no effect; name shares or another of its settings, or leave it out",
            )
    if "profiles" in body and "suffixes" in body:
        strict.fail(
            f"{path}.suffixes", "has no effect beside profiles, which already names every profile; use one of them"
        )
    shares, clients = in_force.mps_shares or SHARES, in_force.mps_clients
    if "mps" in body and clients is not None and clients < shares:
        strict.fail(
            f"{path}.mps", f"has {clients} clients for {shares} shares, but each share needs one; make fewer shares"
        )


def _modes(value: object, path: str, known: Sequence[Mode] = ALL_MODES) -> tuple[Mode, ...]:
    entries = enumerate(strict.sequence(value, path))
    names = strict.unique((strict.text(v, f"{path}[{i}]") for i, v in entries), path)
    for name in names:
        if name not in known:
            strict.fail(path, f"names {name!r}, which is unknown; use {', '.join(known)}")
    return tuple(mode for mode in known if mode in names)


def _shared_partitions(value: object, path: str) -> tuple[Mode, ...]:
    return _modes(value, path, SHARED)


def _keep(value: object, path: str) -> tuple[Setting, ...]:
    entries = enumerate(strict.sequence(value, path))
    names = strict.unique((strict.text(v, f"{path}[{i}]") for i, v in entries), path)
    for name in names:
        if name not in list(Setting):
            strict.fail(path, f"names {name!r}, which is unknown; use {', '.join(Setting)}")
    return tuple(map(Setting, names))


def _interval(value: object, path: str) -> str:
    if value not in INTERVALS:
        strict.fail(path, f"is {value!r} and must be one of {', '.join(INTERVALS)}")
    return str(value)


def _profiles(value: object, path: str) -> tuple[ProfileRef, ...]:
    return tuple(strict.unique((_profile(v, f"{path}[{i}]") for i, v in enumerate(strict.sequence(value, path))), path))


def _profile(value: object, path: str) -> ProfileRef:
    if isinstance(value, int) and not isinstance(value, bool):
        return strict.number(value, path)
    text = strict.text(value, path)
    if text.isdecimal():
        strict.fail(path, f"is the text {text!r}; a profile id is a number: write {int(text)} without quotes")
    if _PROFILE.fullmatch(text) is None:
        strict.fail(
            path, f"is {text!r} and must be a profile name such as 1g.10gb or 1g.10gb+me, or a profile id such as 19"
        )
    return text


def _suffixes(value: object, path: str) -> tuple[str, ...]:
    found = strict.unique((strict.text(v, f"{path}[{i}]") for i, v in enumerate(strict.sequence(value, path))), path)
    for text in found:
        if _SUFFIX.fullmatch(text) is None:
            strict.fail(path, f'names {text!r}; a suffix starts with + or -, such as "+me", "-me" or "+gfx"')
    return tuple(found)


def _static(value: object, path: str) -> tuple[tuple[ProfileRef, int], ...] | Parts:
    if not isinstance(value, Mapping) or not value:
        strict.fail(path, 'must say what a card is cut into, such as {"1g.10gb": 7}, {mps: 4} or {timeslice: 4}')
    for mode in SHARED:
        if mode in value and len(value) > 1:
            strict.fail(
                path, f"mixes {', '.join(map(str, value))}, which nothing keeps apart; name {mode} or the others"
            )
        if mode in value:
            return Parts(mode, strict.positive(value[mode], f"{path}.{mode}"))
    return tuple(
        (_profile(key, f"{path}.{key}"), strict.positive(count, f"{path}.{key}")) for key, count in value.items()
    )


def _bytes(value: object, path: str) -> int:
    """A Kubernetes quantity of memory, in bytes."""
    if value in (0, "0") and not isinstance(value, bool):
        return 0
    if isinstance(value, int | float):
        strict.fail(path, f"is {value!r} without a unit; write bytes with a suffix, such as 512Mi or 2Gi")
    text = strict.text(value, path)
    wrong = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGTkmgt])(i?)[Bb]?", text)
    if _BYTES.fullmatch(text) is None:
        if wrong is not None:
            unit = wrong[2].upper()
            plain = f"{wrong[1]}{'k' if unit == 'K' else unit}"
            strict.fail(path, f"is {text!r}, which is not a Kubernetes quantity; write {plain} or {wrong[1]}{unit}i")
        strict.fail(
            path, f"is {text!r}, which is not a Kubernetes quantity; write a number with Mi or Gi, such as 512Mi"
        )
    return quantity.parse(text)
