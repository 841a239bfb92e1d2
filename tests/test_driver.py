"""The driver as a process, through its real interfaces: started, killed, restarted, updated, misconfigured."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from gpuslice.core.model import ClaimRef
from gpuslice.nvml.sim.node import SimNode
from gpuslice.nvml.sim.nvml import SimNvml
from gpuslice.standin.apiserver import TOKEN
from gpuslice.standin.cluster import DRIVER, NODE, StandInCluster, complete
from gpuslice.standin.kubelet import StandInKubelet
from gpuslice.standin.scheduler import Request
from gpuslice.system.folder_watch import FolderWatch

MIG = Request(name="gpu", driver=DRIVER, where={"type": "mig", "profile": "1g.10gb"})
CARD = Request(name="gpu", driver=DRIVER, where={"type": "gpu"})


@pytest.fixture
async def cluster(short: Path) -> AsyncIterator[StandInCluster]:
    async with StandInCluster(short) as cluster:
        yield cluster


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpuslice", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )


def published(cluster: StandInCluster) -> dict[str, object]:
    """Name → everything in each slice that a write would change."""
    return {
        body["metadata"]["name"]: (body["metadata"]["resourceVersion"], body["spec"])
        for body in cluster.api.all("resourceslices")
    }


def half_made(cluster: StandInCluster) -> list[Path]:
    records = (cluster.plugins / DRIVER / "claims").glob("*/*.json")
    return [path for path in records if json.loads(path.read_text().splitlines()[-1])["prepared"] is None]


async def agreed(cluster: StandInCluster, refs: Sequence[ClaimRef]) -> None:
    """Records, CDI files and partitions belong to exactly these claims."""
    found = (cluster.plugins / DRIVER / "claims").glob("*/*.json")
    records = {path.stem: json.loads(path.read_text().splitlines()[-1]) for path in found}
    files = {path.name for path in cluster.cdi.iterdir()}
    node = SimNvml(cluster.node_folder, latency="zero")
    partitions = [p.uuid for gpu in node.gpus() for p in node.look(gpu.uuid).partitions]
    made = [done["uuid"] for record in records.values() for done in record["done"] if done["uuid"]]
    assert set(records) == {ref.uid for ref in refs}
    assert files == {f"{DRIVER}-claim_{ref.uid}.json" for ref in refs}
    assert sorted(map(str, partitions)) == sorted(made)
    node.close()


# ---------------------------------------------------------------- life


@pytest.mark.contract(9, 13)
async def test_a_restart_keeps_slices_and_claims_and_sigterm_unlinks_the_sockets(cluster: StandInCluster) -> None:
    driver = await cluster.start()
    claim = cluster.claim("one", MIG)
    names = await cluster.run(claim)
    before = published(cluster)

    assert await driver.terminate() == 0
    assert not [path for path in cluster.registry.iterdir() if path.is_socket()]
    await cluster.start()

    assert await cluster.run(claim) == names
    assert published(cluster) == before
    await cluster.end(claim)
    await agreed(cluster, [])


@pytest.mark.contract(33, 41)
async def test_a_driver_that_is_killed_in_a_prepare_and_started_again_leaves_everything_in_agreement(
    cluster: StandInCluster,
) -> None:
    driver = await cluster.start()
    neighbour = cluster.claim("neighbour", MIG)
    await cluster.run(neighbour)
    node = SimNode(cluster.node_folder)
    cue = node.cue("hang", "create_compute_instance")
    doomed = cluster.claim("doomed", MIG)
    call = asyncio.create_task(cluster.run(doomed))
    assert await asyncio.to_thread(node.wait_hung, cue, 30)
    assert len(half_made(cluster)) == 1

    await driver.kill()
    with contextlib.suppress(Exception):
        await call
    node.withdraw()
    again = await cluster.start()
    await cluster.run(doomed)

    assert again.alive
    await agreed(cluster, [neighbour, doomed])
    await cluster.end(doomed)
    await cluster.end(neighbour)
    await agreed(cluster, [])
    node.close()


async def test_a_restart_alone_undoes_what_was_half_made(cluster: StandInCluster) -> None:
    driver = await cluster.start()
    node = SimNode(cluster.node_folder)
    cue = node.cue("hang", "create_compute_instance")
    call = asyncio.create_task(cluster.run(cluster.claim("doomed", MIG)))
    assert await asyncio.to_thread(node.wait_hung, cue, 30)
    await driver.kill()
    with contextlib.suppress(Exception):
        await call
    node.withdraw()

    await cluster.start()
    other = cluster.claim("other", MIG)
    await cluster.run(other)  # after the recovery, which has the first ticket of the card

    await agreed(cluster, [other])
    node.close()


@pytest.mark.contract(10, 68, 69)
async def test_a_rolling_update_serves_on_and_leaves_the_slices_as_they_are(cluster: StandInCluster) -> None:
    old = await cluster.start("--pod-uid", "0f0e0d0c-0b0a-4908-8706-050403020100")
    first, second = cluster.claim("one", MIG), cluster.claim("two", MIG)
    await cluster.run(first)
    before = published(cluster)

    await cluster.start("--pod-uid", "1f1e1d1c-1b1a-4918-9716-151413121110")
    await cluster.run(second)
    assert await old.terminate() == 0
    await cluster.end(first)
    await cluster.end(second)

    assert published(cluster) == before
    await agreed(cluster, [])


@pytest.mark.contract(10)
async def test_a_second_process_with_the_same_sockets_is_refused_and_the_first_serves_on(
    cluster: StandInCluster,
) -> None:
    await cluster.start()

    second = await cluster.start(ready=False)

    assert await second.wait() == 2
    assert "another instance serves" in second.log.read_text()
    await cluster.run(cluster.claim("one", CARD))


async def test_a_second_driver_of_another_namespace_is_refused_and_the_first_serves_on(cluster: StandInCluster) -> None:
    """Two installations would write the same ResourceSlices in turns."""
    await cluster.start("--pod-uid", "0f0e0d0c-0b0a-4908-8706-050403020100", "--pod-namespace", "here")

    second = await cluster.start(
        "--pod-uid", "1f1e1d1c-1b1a-4918-9716-151413121110", "--pod-namespace", "there", ready=False
    )

    assert await second.wait() == 2
    (line,) = second.log.read_text().splitlines()
    assert line == (
        f"gpuslice: another driver of the same name serves this node with the folder {cluster.plugins / DRIVER}: pod "
        "0f0e0d0c-0b0a-4908-8706-050403020100 in namespace here; a node can have one, so remove one of the two installations"
    )
    await cluster.run(cluster.claim("one", CARD))


@pytest.mark.contract(14)
async def test_a_driver_that_lost_a_socket_ends_to_be_started_again(cluster: StandInCluster) -> None:
    driver = await cluster.start()

    (cluster.plugins / DRIVER / "dra.sock").unlink()

    assert await driver.wait() == 1
    assert "is gone; the process ends" in driver.log.read_text()


async def test_a_hung_gpu_does_not_keep_the_process_from_ending(cluster: StandInCluster) -> None:
    driver = await cluster.start()
    node = SimNode(cluster.node_folder)
    cue = node.cue("hang", "create_gpu_instance")
    call = asyncio.create_task(cluster.run(cluster.claim("one", MIG)))
    assert await asyncio.to_thread(node.wait_hung, cue, 30)

    assert await driver.terminate() == 0

    with pytest.raises(Exception, match=r"."):
        await call
    node.withdraw()
    node.close()


async def test_probes_and_metrics_are_served(cluster: StandInCluster) -> None:
    driver = await cluster.start("--http-endpoint", "127.0.0.1:0")
    port = driver.log.read_text().rpartition("probes on 127.0.0.1:")[2].split()[0]
    await cluster.run(cluster.claim("one", MIG))

    def get(path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return str(answer.read().decode())

    assert await asyncio.to_thread(get, "/healthz") == "ok\n"
    assert await asyncio.to_thread(get, "/readyz") == "ok\n"
    metrics = await asyncio.to_thread(get, "/metrics")
    assert 'gpuslice_requests_total{operation="prepare",result="ok"} 1.0' in metrics
    assert "gpuslice_prepared_claims 1.0" in metrics
    assert 'gpuslice_prepared_devices{type="mig"} 1.0' in metrics
    assert "gpuslice_mps_daemons_unwell -1.0" in metrics, "no supervisor runs here"
    assert await driver.terminate() == 0


async def test_the_first_page_shows_the_node_to_a_person_on_it(cluster: StandInCluster) -> None:
    driver = await cluster.start("--http-endpoint", "0")
    address = driver.log.read_text().rpartition("probes on ")[2].split()[0]
    await cluster.run(cluster.claim("one", MIG))

    def get() -> str:
        with urllib.request.urlopen(f"http://localhost:{address.rpartition(':')[2]}/", timeout=10) as answer:
            return str(answer.read().decode())

    text = await asyncio.to_thread(get)

    assert "default/one" in text and "1g.10gb</td>" in text
    assert "answers the kubelet" in text and "the API shows what this node offers" in text


async def test_a_wrong_endpoint_is_told_before_anything_is_served(cluster: StandInCluster) -> None:
    driver = await cluster.start("--http-endpoint", "::1:9510", ready=False)

    assert await driver.wait() == 2
    assert "name a port up to 65535, host:port or [IPv6 address]:port" in driver.log.read_text()
    assert "serving on" not in driver.log.read_text()


async def test_one_op_id_tells_one_request(cluster: StandInCluster) -> None:
    driver = await cluster.start()
    claim = cluster.claim("one", MIG)
    await cluster.run(claim)
    await cluster.end(claim)
    await driver.terminate()  # a line may follow its answer

    ops = [line.split("op=")[1].split()[0] for line in driver.log.read_text().splitlines() if str(claim.uid) in line]

    assert len(set(ops)) == 2
    assert "-" not in ops


# ---------------------------------------------------------------- older API servers, absent ones


async def test_on_1_35_whole_cards_are_published_plainly_and_nothing_that_would_be_over_allocated(short: Path) -> None:
    async with StandInCluster(short, version="1.35") as cluster:
        await cluster.start()

        devices = [device for body in cluster.api.all("resourceslices") for device in body["spec"].get("devices", [])]
        assert [device["name"] for device in devices] == ["gpu", "monitor"] * 2
        assert cluster.api.writes["update resourceslices"] == 0
        claim = cluster.claim("one", CARD)
        assert await cluster.run(claim)


async def test_on_1_35_a_static_layout_of_the_policy_is_published_and_prepared(short: Path) -> None:
    policy = short / "policy.yaml"
    policy.write_text(
        "apiVersion: gpuslice.dev/v1alpha1\nkind: Policy\ndefault:\n  static: {3g.40gb: 1, 1g.10gb: 2}\n",
        encoding="utf-8",
    )
    async with StandInCluster(short, "h100", version="1.35") as cluster:
        await cluster.start("--policy", str(policy))

        claims = [cluster.claim(f"c{number}", MIG) for number in range(2)]
        for claim in claims:
            await cluster.run(claim)
        await agreed(cluster, claims)


async def test_a_driver_starts_without_its_api_server_and_publishes_when_it_comes(cluster: StandInCluster) -> None:
    cluster.api.away()
    driver = await cluster.start(ready=False)
    await cluster.kubelet.wait_registered(DRIVER)
    assert driver.alive

    cluster.api.back()

    await cluster.wait_published()
    await cluster.run(cluster.claim("one", CARD))


@pytest.mark.contract(59)
async def test_a_kubelet_that_starts_after_an_outage_gets_its_slices_before_their_turn(cluster: StandInCluster) -> None:
    """After a restart of the API server a fleet spreads its lists over a minute. This list does not wait."""
    await cluster.start()
    await asyncio.to_thread(cluster.api.wait, lambda: any("watch=true" in r.target for r in cluster.api.requests))
    cluster.api.away()
    for body in cluster.api.all("resourceslices"):
        cluster.api.delete("resourceslices", body["metadata"]["name"])
    cluster.api.add_node("another")
    cluster.api.store.compact()
    cluster.api.requests.clear()
    cluster.api.back()
    await asyncio.to_thread(cluster.api.wait, lambda: any("watch=true" in r.target for r in cluster.api.requests))

    async with StandInKubelet(cluster.registry) as kubelet:
        await kubelet.wait_registered(DRIVER)
        await asyncio.to_thread(cluster.api.wait, lambda: complete(cluster.api.all("resourceslices")))


async def test_a_refused_token_is_told_once_and_ends_with_exit_code_4(cluster: StandInCluster) -> None:
    text = cluster.api.kubeconfig.read_text(encoding="utf-8")
    cluster.api.kubeconfig.write_text(text.replace(f"token: {TOKEN}", "token: revoked"), encoding="utf-8")

    driver = await cluster.start(ready=False)

    assert await driver.wait(45) == 4
    lines = [line for line in driver.log.read_text().splitlines() if "check the token" in line]
    assert len(lines) == 2, "one line when it begins, one at the end"
    assert "ERROR" in lines[1] and "no claim is prepared on this node, so the process ends" in lines[1]


async def test_while_the_api_server_refuses_us_a_prepared_claim_is_still_unprepared(cluster: StandInCluster) -> None:
    driver = await cluster.start()
    claim = cluster.claim("one", MIG)
    await cluster.run(claim)
    await driver.terminate()
    text = cluster.api.kubeconfig.read_text(encoding="utf-8")
    cluster.api.kubeconfig.write_text(text.replace(f"token: {TOKEN}", "token: revoked"), encoding="utf-8")
    await cluster.start(ready=False)
    await cluster.kubelet.wait_registered(DRIVER)

    assert await cluster.kubelet.unprepare([claim]) == {claim.uid: ""}

    await agreed(cluster, [])


@pytest.mark.contract(63)
async def test_a_device_in_use_stays_published_when_the_policy_drops_it(cluster: StandInCluster, short: Path) -> None:
    driver = await cluster.start()
    claim = cluster.claim("one", MIG)
    await cluster.run(claim)
    await driver.terminate()
    policy = short / "policy.yaml"
    policy.write_text("apiVersion: gpuslice.dev/v1alpha1\nkind: Policy\ndefault:\n  modes: [gpu]\n", encoding="utf-8")

    def devices(gpu: int) -> dict[str, bool]:
        pools = sorted({body["spec"]["pool"]["name"] for body in cluster.api.all("resourceslices")})
        return {
            device["name"]: bool(device.get("taints"))
            for body in cluster.api.all("resourceslices")
            if body["spec"]["pool"]["name"] == pools[gpu]
            for device in body["spec"].get("devices", [])
        }

    await cluster.start("--policy", str(policy))
    # The card in use keeps its old devices, closed for new claims; the idle card takes the new shape.
    await asyncio.to_thread(cluster.api.wait, lambda: set(devices(1)) == {"gpu", "monitor"}, 20)
    assert devices(0)["mig-1g-19-6"]
    assert all(devices(0).values())
    assert await cluster.run(claim)  # the kubelet asks again for running pods
    cluster.delete(claim)
    assert await cluster.kubelet.unprepare([claim]) == {claim.uid: ""}
    await asyncio.to_thread(cluster.api.wait, lambda: set(devices(0)) == {"gpu", "monitor"}, 20)


async def test_what_is_odd_at_a_start_is_logged_and_the_driver_serves(cluster: StandInCluster, short: Path) -> None:
    first = await cluster.start()
    claim = cluster.claim("one", CARD)
    await cluster.run(claim)
    assert await first.terminate() == 0
    (record,) = (cluster.plugins / DRIVER / "claims").glob("*/*.json")
    torn = record.with_stem("torn")
    torn.write_text("torn")
    policy = short / "policy.yaml"
    head = "apiVersion: gpuslice.dev/v1alpha1\nkind: Policy\n"
    unsuited = "default: {reserve: 800Gi}\n"
    policy.write_text(head + unsuited + "gpus:\n- match: {product: NVIDIA L4}\n  modes: [gpu]\n", encoding="utf-8")

    driver = await cluster.start("--policy", str(policy))
    assert await cluster.run(claim)
    assert await driver.terminate() == 0

    log = driver.log.read_text()
    assert "gpus[0] matches no GPU of this node" in log
    assert f"policy file {policy}: default.reserve is 819200 MiB, but GPU 0 (" in log
    assert f"record {torn} of claim torn cannot be read" in log


async def test_what_a_lost_card_kept_is_given_back_when_the_card_is_back_without_anybody_asking(
    cluster: StandInCluster,
) -> None:
    driver = await cluster.start()
    node = SimNode(cluster.node_folder)
    kept, other = cluster.claim("kept", MIG), cluster.claim("other", CARD)
    await cluster.run(kept)
    await cluster.run(other)
    (record,) = (cluster.plugins / DRIVER / "claims").glob(f"*/{kept.uid}.json")
    card = next(card.uuid for card in node.cards if card.uuid in record.read_text())
    node.lose(card)
    await cluster.end(kept)
    (left,) = set(record.parent.glob("*.json")) - {record.with_stem(other.uid)}  # the leftover has its own record
    await cluster.end(other)  # the removal of a record triggers a look at the node
    await asyncio.to_thread(cluster.api.wait, lambda: lost(cluster), 20)

    with contextlib.closing(FolderWatch(record.parent)) as watch:
        node.reset(card)
        await cluster.run(again := cluster.claim("again", CARD))
        await cluster.end(again)
        while left.name not in await asyncio.to_thread(arrivals, watch):
            pass

    assert await driver.terminate() == 0
    await agreed(cluster, [])
    node.close()


def lost(cluster: StandInCluster) -> bool:
    """Whether devices of a lost card have taints in the API."""
    found = [device for body in cluster.api.all("resourceslices") for device in body["spec"].get("devices", ())]
    return any(taint.get("value") == "lost" for device in found for taint in device.get("taints", ()))


def arrivals(watch: FolderWatch) -> list[str]:
    """The names of the next files that are deleted from this folder."""
    assert select.select([watch], [], [], 20)[0], "no file has left"
    return [*watch.read()]


# ---------------------------------------------------------------- commands and bad input


async def test_devices_and_claims_show_the_node_of_a_running_driver_without_flags(cluster: StandInCluster) -> None:
    await cluster.start()
    await cluster.run(cluster.claim("one", MIG))
    where = ("--kubelet-plugins-directory-path", str(cluster.plugins))

    devices = await asyncio.to_thread(command, "devices", *where)
    claims = await asyncio.to_thread(command, "claims", "-o", "wide", *where)

    assert devices.returncode == claims.returncode == 0, devices.stderr + claims.stderr
    assert "[1g.10gb]" in devices.stdout
    assert "held by default/one as mig-1g-19-6" in devices.stdout
    assert "default/one" in claims.stdout and "MIG-" in claims.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("run",), 2, "the name of the node is missing; use --node-name or NODE_NAME"),
        (("run", "--node-name", NODE, "--log-level", "loud"), 2, "log level 'loud' is not known; use one of"),
        (("run", "--driver-name", "x" * 37), 2, "at most 36 characters"),
        (("run", "--simulate-folder", "f"), 2, "no effect without --simulate"),
        (("run", "--no-such-flag"), 2, "unrecognized arguments: --no-such-flag"),
        (("devices", "--simulate", "h1000"), 2, "h1000"),
        ((), 2, "COMMAND"),
    ],
)
def test_a_wrong_flag_is_one_sentence_and_exit_code_2(arguments: Sequence[str], code: int, says: str) -> None:
    done = command(*arguments)

    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.contract(8)
def test_a_folder_that_is_too_deep_for_a_socket_is_refused_at_start(short: Path) -> None:
    deep = short / ("d" * 90)
    done = command("run", "--simulate", "l4", "--node-name", NODE, "--kubelet-plugins-directory-path", str(deep),
                   "--kubelet-registrar-directory-path", str(short / "reg"), "--cdi-root", str(short / "cdi"),
                   "--kubeconfig", str(a_kubeconfig(short)))  # fmt: skip

    assert done.returncode == 2
    assert "107 is the limit of unix sockets" in done.stderr


def test_a_folder_that_is_a_file_is_refused_at_start(short: Path) -> None:
    (short / "plugins").write_text("")
    done = command("run", "--simulate", "l4", "--node-name", NODE,
                   "--kubelet-plugins-directory-path", str(short / "plugins"),
                   "--kubeconfig", str(a_kubeconfig(short)))  # fmt: skip

    assert done.returncode == 3
    assert "cannot create folder" in done.stderr


def test_help_teaches_every_command() -> None:
    for arguments in (("--help",), ("run", "--help"), ("demo", "--help"), ("devices", "--help"), ("claims", "--help")):
        done = command(*arguments)
        assert done.returncode == 0
        assert "exit codes:" in done.stdout


def a_kubeconfig(folder: Path) -> Path:
    """The kubeconfig of a cluster that does not exist."""
    path = folder / "kubeconfig"
    path.write_text(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\n"
        "clusters: [{name: c, cluster: {server: 'https://127.0.0.1:9'}}]\n"
        "users: [{name: u, user: {token: t}}]\ncontexts: [{name: c, context: {cluster: c, user: u}}]\n",
        encoding="utf-8",
    )
    return path
