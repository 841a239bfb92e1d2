"""`hack/scale --fleet`: its pure parts, and its publishers against a stand-in API server. The tests measure nothing."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

from gpuslice.standin.apiserver import StandInApiServer

from hack.lib.scale import figures
from hack.lib.scale.figures import Phase, Stamp
from hack.lib.scale.fleet import REPOSITORY, name_of
from hack.lib.scale.phases import listing
from hack.lib.scale.publishers import publishers, with_counters

METRICS = """\
# TYPE apiserver_request_total counter
apiserver_request_total{code="200",component="apiserver",group="resource.k8s.io",resource="resourceslices",verb="LIST"} 7
apiserver_request_total{code="410",component="apiserver",group="resource.k8s.io",resource="resourceslices",verb="LIST"} 1
apiserver_request_total{code="200",group="",resource="pods",verb="LIST"} 99
apiserver_request_total{code="200",group="resource.k8s.io",resource="resourceclaims",subresource="status",verb="PATCH"} 5
apiserver_response_sizes_sum{group="resource.k8s.io",resource="resourceslices",subresource="",verb="LIST"} 1.5e+06
etcd_request_duration_seconds_count{operation="list",type="/registry/resourceclaims"} 3
etcd_request_duration_seconds_count{operation="get",group="",resource="nodes"} 2
process_cpu_seconds_total 12.5
"""
SIZE = {"nodes": 2, "cards": "h100x8", "claims": 10, "outage_s": 60}


def stamps(*times: float, verb: str = "list", resource: str = "resourceslices") -> list[Stamp]:
    return [Stamp(at, number, verb, resource) for number, at in enumerate(times)]


def a_phase(found: list[Stamp]) -> Phase:
    usage = Counter({"bytes LIST resourceslices": 1_500_000, "etcd list resourceslices": 4})
    return Phase(name="start", began=100.0, took_s=12.4, lasted_s=20.0, cpu_s=3.21, stamps=found, usage=usage)


def test_the_figures_of_an_api_server_are_those_of_our_objects() -> None:
    assert figures.usage(METRICS) == {
        "requests LIST resourceslices": 8,
        "bytes LIST resourceslices": 1_500_000,
        "etcd list resourceclaims": 3,
        "etcd get nodes": 2,
    }


def test_counters_of_a_process_that_was_started_again_begin_at_nothing() -> None:
    before, after = Counter({"a": 5, "b": 1}), Counter({"a": 7, "b": 4})

    assert figures.spent(before, after) == {"a": 2, "b": 3}
    assert figures.spent(before, Counter({"a": 2, "b": 4})) == {"a": 2, "b": 4}


def test_a_phase_that_did_not_end_shows_how_long_it_was_given() -> None:
    phase = dataclasses.replace(a_phase([]), took_s=None, lasted_s=300.4)

    assert "until all is published        not in 300 s" in figures.table(figures.report([phase], SIZE))


def test_how_far_requests_are_spread_and_how_many_come_together() -> None:
    together = stamps(*[100.2] * 40)
    spread = stamps(*(100.0 + number for number in range(40)))

    assert (figures.busiest(together), figures.spread_s(together)) == (40, 0.0)
    assert (figures.busiest(spread), figures.spread_s(spread)) == (1, 35.0)
    assert (figures.busiest([]), figures.spread_s([])) == (0, 0.0)


def test_a_node_counts_once_however_often_it_lists() -> None:
    assert listing([*stamps(1.0, 2.0), *stamps(3.0), *stamps(1.0, 1.0, 1.0, verb="watch")]) == {0, 1}


def test_a_pool_with_counters_is_one_that_has_not_changed_yet() -> None:
    pools = {"n/a": [{"sharedCounters": [{"name": "c"}]}, {"devices": []}], "n/b": [{"devices": []}], "n/c": []}

    assert with_counters(json.dumps({"format": 1, "pools": pools})) == 1


def test_the_table_has_each_kind_of_request_with_its_busiest_second() -> None:
    found = [*stamps(100.0, 100.1, 130.0), *stamps(101.0, resource="resourceclaims")]

    text = figures.table(figures.report([a_phase(found)], SIZE))

    lines = {line.partition("  ")[0]: line.rpartition("  ")[2] for line in text.splitlines()}
    assert lines["until all is published"] == "12 s"
    assert lines["counted for"] == "20 s"
    assert lines["API server CPU"] == "3.2 s"
    assert lines["requests of the fleet"] == "4"
    assert lines["list resourceslices"] == "3/2 in 30 s"
    assert lines["list resourceclaims"] == "1/1 in 0 s"
    assert lines["bytes of LIST resourceslices"] == "1.5 MB"
    assert lines["etcd lists of resourceslices"] == "4"


def test_the_publishers_of_a_fleet_are_the_product_s_own(tmp_path: Path, short: Path) -> None:
    def policy(*modes: str) -> dict[str, object]:
        return {"apiVersion": "gpuslice.dev/v1alpha1", "kind": "Policy", "default": {"modes": list(modes)}}

    with StandInApiServer(tmp_path) as server:
        for number in range(2):
            server.add_node(name_of(number))
        with publishers(server.kubeconfig, short, 2, REPOSITORY) as fleet:
            fleet.order("start", policy=policy("gpu", "mig"))
            server.wait(lambda: len(server.all("resourceslices")) == 32, 30)
            fleet.order("look")
            assert fleet.counters == 16
            fleet.order("start", policy=policy("gpu"))
            server.wait(lambda: len(server.all("resourceslices")) == 16, 30)
            fleet.order("look")

            assert fleet.counters == 0
            assert listing(fleet.stamps) == {0, 1}
            lists = [stamp.node for stamp in fleet.stamps if (stamp.verb, stamp.resource) == ("list", "resourceclaims")]
            assert sorted(lists) == [0, 1], "one list for a wait"
