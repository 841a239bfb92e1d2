"""What an operator may write, what it means for a card, and how an error describes a mistake."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from gpuslice.core.policy import schema
from gpuslice.core.policy.rules import Policy
from gpuslice.core.policy.schema import Mode, Parts
from gpuslice.errors import ConfigError

from tests.kit.builders import a_gpu

HEAD = "apiVersion: gpuslice.dev/v1alpha1\nkind: Policy\n"


def policy(text: str) -> Policy:
    return Policy.parse(yaml.safe_load(HEAD + text))


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as refused:
        policy(text)
    return str(refused.value)


def names(text: str, product: str = "h100", **changes: Any) -> list[str]:
    return [profile.name for profile in policy(text).of(a_gpu(product, **changes)).profiles]


# ---------------------------------------------------------------- what it means


def test_the_default_offers_every_mode_and_the_profiles_without_a_suffix() -> None:
    gpu = a_gpu("h100")

    mine = Policy.default().of(gpu)

    assert mine.modes == set(Mode)
    assert mine.profiles == tuple(profile for profile in gpu.profiles if not profile.suffix)
    assert (mine.reserve_bytes, mine.static) == (gpu.reserved_bytes, ())
    assert (mine.mps_shares, mine.timeslice_shares, mine.interval, mine.shared_partitions) == (
        4,
        4,
        "default",
        frozenset(),
    )


def test_a_document_without_sections_is_the_default() -> None:
    assert policy("") == Policy.default()


def test_profiles_are_named_or_numbered() -> None:
    assert names("default: {profiles: [1g.10gb, 9]}") == ["1g.10gb", "3g.40gb"]


def test_suffixed_profiles_come_on_request_beside_the_plain_ones() -> None:
    assert set(names("default: {suffixes: ['+me']}")) - set(names("")) == {"1g.10gb+me"}


def test_an_entry_overrides_the_default_key_by_key() -> None:
    text = """
default: {reserve: 1Gi, suffixes: ["+me"]}
gpus:
- match: {product: "*H100*"}
  profiles: [1g.10gb]
"""
    mine = policy(text).of(a_gpu("h100"))

    assert (mine.reserve_bytes, [profile.name for profile in mine.profiles]) == (2**30, ["1g.10gb"])


def test_the_first_entry_that_matches_counts() -> None:
    text = """
gpus:
- {match: {index: 0}, modes: [gpu]}
- {match: {product: "*h100*"}, modes: [mig]}
"""
    assert policy(text).of(a_gpu("h100", 0)).modes == {Mode.GPU}
    assert policy(text).of(a_gpu("h100", 1)).modes == {Mode.MIG}
    assert policy(text).of(a_gpu("a30", 1)).modes == set(Mode)


def test_all_facts_of_a_match_must_agree() -> None:
    text = "gpus: [{match: {product: '*H100*', index: [0, 2]}, modes: [gpu]}]"

    assert policy(text).of(a_gpu("h100", 2)).modes == {Mode.GPU}
    assert policy(text).of(a_gpu("h100", 1)).modes != {Mode.GPU}
    assert policy(text).of(a_gpu("a30", 0)).modes != {Mode.GPU}


def test_a_card_is_matched_by_its_uuid() -> None:
    gpu = a_gpu("h100", 3)

    assert policy(f"gpus: [{{match: {{uuid: {gpu.uuid}}}, modes: [gpu]}}]").of(gpu).modes == {Mode.GPU}


@pytest.mark.parametrize(
    ("text", "reserve"), [("512Mi", 512 * 2**20), ("1.5Gi", 3 * 2**29), ("80G", 80 * 10**9), ("0", 0), (0, 0)]
)
def test_a_reserve_is_a_kubernetes_quantity(text: object, reserve: int) -> None:
    body = {"apiVersion": "gpuslice.dev/v1alpha1", "kind": "Policy", "default": {"reserve": text}}

    assert Policy.parse(body).of(a_gpu()).reserve_bytes == reserve


def test_a_static_layout_counts_profiles_by_name_or_number() -> None:
    mine = policy("default: {static: {1g.10gb: 2, 14: 1}}").of(a_gpu("h100"))

    assert not isinstance(mine.static, Parts)
    assert [(profile.name, count) for profile, count in mine.static] == [("1g.10gb", 2), ("2g.20gb", 1)]


def test_a_card_that_cannot_be_partitioned_has_no_static_layout() -> None:
    assert policy("default: {static: {1g.10gb: 2}}").of(a_gpu("l4")).static == ()


# ---------------------------------------------------------------- sharing


def test_shares_clients_and_interval_are_set_one_by_one() -> None:
    text = """
default: {mps: {shares: 8, clients: 40}, timeslice: {interval: short}}
gpus:
- match: {index: 1}
  mps: {shares: 10}
  timeslice: {shares: 2}
"""
    first, second = (policy(text).of(a_gpu("h100", index)) for index in (0, 1))

    assert (first.mps_shares, first.mps_clients, first.timeslice_shares, first.interval) == (8, 40, 4, "short")
    assert (second.mps_shares, second.mps_clients, second.timeslice_shares, second.interval) == (10, 40, 2, "short")


@pytest.mark.parametrize(
    ("cuda", "clients"), [("12.4", 48), ("13.0", 48), ("13.1", 60), ("13.10", 60), ("14.0", 60), ("", 48)]
)
def test_mps_serves_48_clients_and_60_from_cuda_13_1_on(cuda: str, clients: int) -> None:
    assert Policy.default().of(a_gpu("l4", cuda_version=cuda)).mps_clients == clients


def test_more_clients_than_the_nvidia_driver_serves_are_not_offered_and_said() -> None:
    offered, gpu = policy("default: {mps: {clients: 60, shares: 50}}"), a_gpu("l4", cuda_version="13.0")

    assert (offered.of(gpu).mps_clients, offered.of(gpu).mps_shares) == (48, 48)
    assert offered.unused([gpu]) == (
        "policy: mps.clients is 60, but GPU 0 serves at most 48 with CUDA 13.0",
        "policy: mps.shares is 50, but GPU 0 serves at most 48 with CUDA 13.0",
    )
    assert offered.unused([a_gpu("l4", cuda_version="13.1")]) == ()


@pytest.mark.parametrize(("capability", "offered"), [("6.1", False), ("7.0", True), ("7.5", True), ("12.0", True)])
def test_cards_older_than_volta_offer_no_mps(capability: str, offered: bool) -> None:
    assert (Mode.MPS in Policy.default().of(a_gpu("l4", compute_capability=capability)).modes) == offered


def test_a_product_that_is_too_old_for_the_mps_that_is_asked_of_it_is_named() -> None:
    text = "gpus: [{match: {product: NVIDIA L4}, modes: [gpu, mps]}]"
    old = a_gpu("l4", compute_capability="6.1")

    (misfit,) = policy(text).misfits(old)

    assert "gpus[0] asks for mode mps, for which its GPUs are too old" in misfit.sentence
    assert policy(text).of(old).modes == {Mode.GPU}


def test_partitions_are_shared_only_where_the_policy_says_so() -> None:
    text = "default: {sharedPartitions: [timeslice, mps]}\ngpus: [{match: {index: 1}, modes: [gpu, mps]}]"

    assert policy(text).of(a_gpu("h100")).shared_partitions == {Mode.MPS, Mode.TIMESLICE}
    assert policy(text).of(a_gpu("h100", 1)).shared_partitions == frozenset()


def test_shares_of_partitions_need_no_shares_of_cards() -> None:
    mine = policy("default: {modes: [mig], sharedPartitions: [mps], mps: {shares: 2}}").of(a_gpu("h100"))

    assert (set(mine.modes), set(mine.shared_partitions), mine.mps_shares) == ({Mode.MIG}, {Mode.MPS}, 2)


@pytest.mark.parametrize("mode", [Mode.MPS, Mode.TIMESLICE])
def test_a_card_may_be_cut_into_equal_parts(mode: Mode) -> None:
    text = f"default: {{static: {{{mode}: 3}}}}\ngpus: [{{match: {{index: 1}}, modes: [gpu]}}]"

    assert policy(text).of(a_gpu("h100")).static == Parts(mode, 3)
    assert policy(text).of(a_gpu("h100", 1)).static == ()


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("defaults: {}", "the document has the unknown key 'defaults'; known keys: apiVersion, kind, default, gpus"),
        ("default: {mode: [gpu]}", "default has the unknown key 'mode'; known keys: modes, profiles"),
        ("default:", "default must be a mapping with the keys modes"),
        ("default: {modes: []}", "default.modes is an empty list"),
        ("default: {modes: gpu}", "default.modes must be a list, not a text"),
        ("default: {modes: [gpu, gpu]}", "default.modes names gpu twice; name it once"),
        ("default: {modes: [whole]}", "names 'whole', which is unknown; use gpu, mig, mps, timeslice"),
        ("default: {modes: [gpu], mps: {shares: 2}}", "default.mps has no effect without mode mps; add it to"),
        ("default: {modes: [mps], timeslice: {shares: 2}}", "default.timeslice has no effect without mode timeslice"),
        (
            "default: {modes: [mig], sharedPartitions: [timeslice], timeslice: {interval: short}}",
            "default.timeslice.interval has no effect on partitions, only on whole cards",
        ),
        ("default: {mps: {}}", "default.mps is empty, so it has no effect; name shares or another of its settings"),
        ("default: {mps: 4}", "default.mps must be a mapping with the keys shares, clients, not 4"),
        (
            "default: {mps: {interval: short}}",
            "default.mps has the unknown key 'interval'; known keys: shares, clients",
        ),
        ("default: {mps: {shares: 0}}", "default.mps.shares is 0, which has no effect"),
        ("default: {mps: {clients: '9'}}", "default.mps.clients is the text '9' and must be a number; write 9"),
        ("default: {mps: {clients: 3}}", "default.mps has 3 clients for 4 shares, but each share needs one"),
        ("default: {timeslice: {interval: 2ms}}", "is '2ms' and must be one of default, short, medium, long"),
        ("default: {timeslice: {shares: true}}", "default.timeslice.shares must be a whole number from 0 on"),
        ("default: {sharedPartitions: [gpu]}", "names 'gpu', which is unknown; use mps, timeslice"),
        ("default: {sharedPartitions: mps}", "default.sharedPartitions must be a list, not a text"),
        ("default: {modes: [mps], sharedPartitions: [mps]}", "default.sharedPartitions has no effect without mode mig"),
        ("default: {static: {mps: 2, 19: 1}}", "default.static mixes mps, 19, which nothing keeps apart"),
        ("default: {static: {mps: 2, timeslice: 2}}", "default.static mixes mps, timeslice"),
        ("default: {static: {timeslice: 0}}", "default.static.timeslice is 0, which has no effect"),
        ("default: {modes: [gpu], static: {mps: 2}}", "default.static has no effect without mode mps"),
        ("default: {modes: [true]}", "default.modes[0] must be a text, not true or false"),
        ("default: {modes: [gpu], profiles: [19]}", "default.profiles has no effect without mode mig"),
        ("default: {modes: [gpu], static: {19: 1}}", "default.static has no effect without mode mig"),
        ("default: {modes: [gpu], suffixes: ['+me']}", "default.suffixes has no effect without mode mig"),
        ("default: {modes: [mig], reserve: 1Gi}", "default.reserve has no effect without mode gpu or mps or timeslice"),
        ("default: {profiles: [19], suffixes: ['+me']}", "default.suffixes has no effect beside profiles"),
        ("default: {profiles: [19, 19]}", "default.profiles names 19 twice"),
        ("default: {profiles: ['19']}", "is the text '19'; a profile id is a number: write 19 without quotes"),
        ("default: {profiles: [1g10gb]}", "is '1g10gb' and must be a profile name such as 1g.10gb"),
        ("default: {profiles: [all]}", "must be a profile name such as 1g.10gb"),
        ("default: {profiles: [true]}", "default.profiles[0] must be a text, not true or false"),
        ("default: {suffixes: [me]}", "default.suffixes names 'me'; a suffix starts with + or -, such as \"+me\""),
        ("default: {reserve: 80GB}", "is '80GB', which is not a Kubernetes quantity; write 80G or 80Gi"),
        ("default: {leastShare: 512}", "default.leastShare is 512 without a unit; write bytes with a suffix"),
        (
            "default: {modes: [gpu, mig], leastShare: 1Gi}",
            "default.leastShare has no effect without mode mps or timeslice",
        ),
        ("default: {reserve: 512mb}", "write 512M or 512Mi"),
        ("default: {reserve: 512}", "is 512 without a unit; write bytes with a suffix, such as 512Mi or 2Gi"),
        ("default: {reserve: true}", "is True without a unit"),
        ("default: {reserve: much}", "is 'much', which is not a Kubernetes quantity"),
        ("default: {static: [19]}", "default.static must say what a card is cut into, such as"),
        ("default: {static: {19: 0}}", "default.static.19 is 0, which has no effect"),
        ("default: {static: {19: '7'}}", "default.static.19 is the text '7' and must be a number; write 7"),
        ("default: {static: {19: true}}", "default.static.19 must be a whole number from 0 on, not true or false"),
        ("default: {keep: computeMode}", "default.keep must be a list, not a text"),
        (
            "default: {keep: [clocks]}",
            "default.keep names 'clocks', which is unknown; use computeMode, timeSlice",
        ),
        ("default: {keep: [timeSlice, timeSlice]}", "default.keep names timeSlice twice"),
        (
            "default: {modes: [gpu, mig], keep: [computeMode]}",
            "default.keep names computeMode, which has no effect: only mode mps changes it",
        ),
        (
            "default: {modes: [mps], keep: [timeSlice]}",
            "default.keep names timeSlice, which has no effect: only mode gpu or timeslice changes it",
        ),
        (
            "default: {timeslice: {interval: short}, keep: [timeSlice]}",
            "default.keep contradicts itself: keep names timeSlice, and timeslice.interval is short",
        ),
        (
            "default: {keep: [timeSlice]}\ngpus: [{match: {index: 0}, timeslice: {interval: long}}]",
            "gpus[0].timeslice.interval contradicts itself: keep names timeSlice, and timeslice.interval is long",
        ),
        (
            "default: {timeslice: {interval: short}}\ngpus: [{match: {index: 0}, keep: [timeSlice]}]",
            "gpus[0].keep contradicts itself: keep names timeSlice, and timeslice.interval is short; "
            "write interval: default, or leave timeSlice out of keep",
        ),
        (
            "default: {modes: [gpu], keep: [timeSlice]}\n"
            "gpus: [{match: {index: 0}, modes: [timeslice], timeslice: {interval: long}}]",
            "gpus[0].timeslice.interval contradicts itself",
        ),
        (
            "default: {modes: [mig], sharedPartitions: [mps], keep: [computeMode]}",
            "default.keep names computeMode, which has no effect: only mode mps changes it",
        ),
        ("gpus: {}", "gpus must be a list, not a mapping"),
        ("gpus: []", "gpus is an empty list"),
        ("gpus: [{modes: [gpu]}]", "gpus[0] has no match"),
        ("gpus: [{match: {index: 0}}]", "gpus[0] has no setting for the GPUs that it matches"),
        ("gpus: [{match: {}, modes: [gpu]}]", "gpus[0].match is empty"),
        ("gpus: [{match: {name: x}, modes: [gpu]}]", "gpus[0].match has the unknown key 'name'"),
        ("gpus: [{match: {index: '0'}, modes: [gpu]}]", "gpus[0].match.index is the text '0' and must be a number"),
        ("gpus: [{match: {index: true}, modes: [gpu]}]", "gpus[0].match.index must be a whole number from 0 on"),
        ("gpus: [{match: {index: -1}, modes: [gpu]}]", "gpus[0].match.index must be a whole number from 0 on"),
        ("gpus: [{match: {index: []}, modes: [gpu]}]", "gpus[0].match.index is an empty list, which matches nothing"),
        ("gpus: [{match: {index: [1, 1]}, modes: [gpu]}]", "gpus[0].match.index names 1 twice"),
        ("gpus: [{match: {uuid: MIG-1}, modes: [gpu]}]", "must be the UUID of a card, which starts with GPU-"),
        ("gpus: [{match: {product: [3]}, modes: [gpu]}]", "gpus[0].match.product[0] must be a text, not 3"),
    ],
)
def test_a_mistake_is_told_with_its_path_and_its_remedy(text: str, told: str) -> None:
    assert told in refusal(text)


def test_a_document_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"apiVersion is 'v1' and must be 'gpuslice\.dev/v1alpha1'"):
        Policy.parse({"apiVersion": "v1", "kind": "Policy"})
    with pytest.raises(ConfigError, match="kind is None and must be 'Policy'"):
        Policy.parse({"apiVersion": "gpuslice.dev/v1alpha1"})


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("{product: '*H100*'}", "{product: 'NVIDIA H100 80GB HBM3'}"),
        ("{product: '*H100*'}", "{product: '*h100 80GB*'}"),
        ("{product: '*'}", "{product: 'a', index: 0}"),
        ("{index: [0, 1]}", "{index: 1}"),
        ("{uuid: GPU-1}", "{uuid: GPU-1, index: 0}"),
        ("{product: '*'}", "{index: 0}"),
        ("{product: '**'}", "{uuid: GPU-1}"),
        ("{product: ['*L4*', '*']}", "{product: '*H100*'}"),
    ],
)
def test_an_entry_that_an_earlier_one_covers_is_an_error(first: str, second: str) -> None:
    text = f"gpus: [{{match: {first}, modes: [gpu]}}, {{match: {second}, modes: [mig]}}]"

    assert "gpus[1] is never reached, because gpus[0] matches the same GPUs first" in refusal(text)


def test_an_entry_that_several_earlier_ones_cover_together_is_an_error() -> None:
    entries = ["{index: 0, product: '*H100*'}", "{index: 0}", "{product: '*L4*'}", "{index: [0, 1], product: '*L4*'}"]
    text = "gpus: [" + ", ".join(f"{{match: {match}, modes: [gpu]}}" for match in entries) + "]"

    assert "gpus[3] is never reached, because gpus[1] and gpus[2] match the same GPUs first" in refusal(text)


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({"version": "v1", "mig-configs": {"all-1g.10gb": []}}, "NVIDIA's mig-parted"),
        ([{"devices": "all", "mig-enabled": True, "mig-devices": {"1g.10gb": 7}}], "without version and mig-configs"),
        ({"version": "v1", "sharing": {"timeSlicing": {"resources": []}}}, "NVIDIA's device plugin"),
        ({"version": "v1", "flags": {"migStrategy": "mixed"}}, "NVIDIA's device plugin"),
        (
            {"apiVersion": "v1", "kind": "ConfigMap", "data": {"any": "version: v1\nsharing: {timeSlicing: {}}\n"}},
            "a ConfigMap with a configuration of NVIDIA's device plugin",
        ),
        (
            {"apiVersion": "v1", "kind": "ConfigMap", "data": {"policy.yaml": "kind: Policy\n"}},
            "a ConfigMap with a Policy below data.policy.yaml, of which only that text is the policy",
        ),
        ({"dev": "version: v1\nsharing: {}\n", "prod": "version: v1\nsharing: {}\n"}, "the data of a ConfigMap with"),
        ({"apiVersion": "nvidia.com/v1", "kind": "ClusterPolicy", "spec": {}}, "GPU Operator"),
        ({"apiVersion": "gpuslice.dev/v1alpha1", "kind": "SliceConfig"}, "opaque parameters of a claim"),
    ],
)
def test_a_file_of_another_tool_is_called_by_its_name(body: object, name: str) -> None:
    with pytest.raises(ConfigError, match=r"docs/policy\.md#from-other-tools") as refused:
        Policy.parse(body)

    assert name in str(refused.value)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("{product: '*H100*'}", "{product: '*100*'}"),
        ("{product: 'a', index: 0}", "{product: 'a'}"),
        ("{index: 0}", "{index: [0, 1]}"),
        ("{index: 0}", "{product: a}"),
    ],
)
def test_an_entry_that_an_earlier_one_covers_in_part_is_none(first: str, second: str) -> None:
    policy(f"gpus: [{{match: {first}, modes: [gpu]}}, {{match: {second}, modes: [mig]}}]")


def test_a_profile_that_a_product_lacks_is_named_where_the_product_is() -> None:
    text = "gpus: [{match: {product: 'NVIDIA H100 80GB HBM3'}, profiles: [1g.5gb]}]"

    (misfit,) = policy(text).misfits(a_gpu("h100"))

    assert (
        "gpus[0] names profile 1g.5gb, which its GPUs do not have; " in misfit.sentence
        and "1g.10gb (19)" in misfit.sentence
    )
    assert policy(text).of(a_gpu("h100")).profiles == ()


def test_a_static_layout_of_a_profile_that_the_card_lacks_is_named_and_left_out() -> None:
    stated = policy("default: {static: {1g.5gb: 7}}")

    (misfit,) = stated.misfits(a_gpu("h100"))

    assert "names profile 1g.5gb, which it does not have" in misfit.sentence
    assert stated.of(a_gpu("h100")).static == ()


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("default: {keep: [computeMode, timeSlice]}", {"computeMode", "timeSlice"}),
        ("default: {timeslice: {interval: default}, keep: [timeSlice]}", {"timeSlice"}),
        # An entry for cards that are not time-sliced inherits an interval that is set on none of them.
        (
            "default: {timeslice: {interval: short}}\ngpus: [{match: {index: 0}, modes: [gpu, mps], keep: [timeSlice]}]",
            {"timeSlice"},
        ),
        # The interval of default is taken back where the time slice is kept, and the other way round.
        (
            "default: {timeslice: {interval: short}}\n"
            "gpus: [{match: {index: 0}, timeslice: {interval: default}, keep: [timeSlice]}]",
            {"timeSlice"},
        ),
        (
            "default: {keep: [timeSlice]}\n"
            "gpus: [{match: {index: 0}, timeslice: {interval: short}, keep: [computeMode]}]",
            {"computeMode"},
        ),
        # What default keeps reaches entries whose modes change none of it; that is no mistake of theirs.
        ("default: {keep: [computeMode]}\ngpus: [{match: {index: 0}, modes: [mig]}]", {"computeMode"}),
        # A static part counts on old clusters only, so the other modes keep their meaning.
        ("default: {static: {timeslice: 4}, keep: [computeMode, timeSlice]}", {"computeMode", "timeSlice"}),
        ("default: {static: {mps: 4}, keep: [computeMode]}", {"computeMode"}),
    ],
)
def test_settings_can_be_kept_wherever_nothing_asks_to_change_them(text: str, keep: set[str]) -> None:
    gpu = a_gpu("h100", 0)

    assert policy(text).of(gpu).keep == keep
    assert policy(text).unused([gpu]) == ()


# ---------------------------------------------------------------- what only a node can tell


def test_what_has_no_effect_on_this_node_is_said_in_sentences() -> None:
    text = """
default: {profiles: [1g.10gb, 1g.5gb]}
gpus:
- {match: {product: "*A100*"}, modes: [gpu]}
- {match: {index: 1}, suffixes: ["+gfx"]}
"""
    said = policy(text).unused([a_gpu("h100", 0), a_gpu("h100", 1)])

    assert said == (
        "policy: gpus[0] matches no GPU of this node, so it has no effect here; the node has NVIDIA H100 80GB HBM3",
        "policy: gpus[1] asks for suffix +gfx, which no profile of its GPUs has",
        "policy: default names profile 1g.5gb, which its GPUs do not have; did you mean 1g.20gb?",
    )


def test_an_entry_whose_cards_are_all_taken_by_another_one_is_said() -> None:
    text = "gpus: [{match: {product: '*H100*'}, modes: [gpu]}, {match: {index: 0}, modes: [mig]}]"

    assert policy(text).unused([a_gpu("h100", 0)]) == (
        "policy: gpus[1] applies to no GPU of this node, because gpus[0] matches those GPUs first",
    )


def test_a_card_left_with_nothing_to_offer_is_said() -> None:
    assert policy("default: {modes: [mig]}").unused([a_gpu("l4")]) == (
        "policy: GPU 0 (NVIDIA L4) offers nothing, because it supports none of the modes mig",
    )


def test_a_policy_that_fits_its_node_has_nothing_unused() -> None:
    assert Policy.default().unused([a_gpu("h100"), a_gpu("l4", 1)]) == ()
    assert policy("default: {suffixes: ['+me']}").unused([]) == ()


# ---------------------------------------------------------------- the documentation


def test_the_documented_policy_means_what_the_text_says() -> None:
    text = (Path(__file__).parents[3] / "docs" / "policy.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    documented = Policy.parse(yaml.safe_load(example))

    l4, a100 = documented.of(a_gpu("l4")), documented.of(a_gpu("a100-80g", 1))
    assert (set(l4.modes), l4.timeslice_shares, l4.interval) == ({Mode.GPU, Mode.TIMESLICE}, 6, "short")
    assert {profile.id for profile in a100.profiles} == {9, 19}
    assert (set(a100.modes), set(a100.shared_partitions), a100.mps_shares) == ({Mode.MIG}, {Mode.MPS}, 8)
    assert {profile.suffix for profile in documented.of(a_gpu("a100-80g", 2)).profiles} == {"", "+me"}


def test_every_key_and_mode_of_a_policy_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs" / "policy.md").read_text(encoding="utf-8")

    for word in (*schema.KEYS, *Mode):
        assert f"`{word}`" in text
