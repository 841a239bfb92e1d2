"""The pictures of README and docs, drawn again by `hack/pictures`; tests/docs/test_pictures.py compares them.

Each picture is a function that returns its text. Names that end in `.py` are modules below driver/gpuslice, and a test
checks that these modules exist.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

from hack.lib.docs.svg import Box, Colour, Sheet

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "docs/img"

_SLICE = 60  # pixels of one of the eight memory slices of a card
_MAP = 118  # x where the map of a card begins
_SAYS = _MAP + 8 * _SLICE + 18  # x where the column beside the map begins


def shared_cards() -> str:
    """Four cards of one node, each used in another way, and one card at different times."""
    sheet = Sheet(
        900,
        390,
        "Four H100 of one node, each shared in another way at the same time",
        "GPU 0 has three MIG partitions, GPU 1 two MPS shares, GPU 2 is time-sliced by two pods, and GPU 3 belongs to one "
        "pod. Below, one card over time: free, MIG, free, MPS, free, whole.",
    )
    sheet.text((20, 24), "One node, four cards of 80 GB, at the same moment", bold=True, size=13)
    _partitions(sheet, 40)
    _mps(sheet, 102)
    _turns(sheet, 164)
    _whole(sheet, 226)
    _over_time(sheet, 292)
    return sheet.svg()


def _card(sheet: Sheet, y: int, name: str, mode: str, says: tuple[str, str, str]) -> None:
    sheet.text((20, y + 20), name, bold=True)
    sheet.text((20, y + 35), mode)
    for number in range(8):
        sheet.box(Box(_MAP + number * _SLICE, y, _SLICE, 48), (), "white")
    sheet.texts((_SAYS, y + 13), says, soft=True)


def _partitions(sheet: Sheet, y: int) -> None:
    _card(sheet, y, "GPU 0", "MIG", ("hardware keeps them apart:", "memory, compute and engines", "of their own"))
    sheet.box(Box(_MAP, y, 4 * _SLICE, 48), ("pod train", "partition 3g.40gb"), "blue")
    for number, pod in ((5, "pod a"), (6, "pod b")):
        sheet.box(Box(_MAP + number * _SLICE, y, _SLICE, 48), (pod, "1g.10gb"), "blue")


def _mps(sheet: Sheet, y: int) -> None:
    _card(
        sheet,
        y,
        "GPU 1",
        "MPS",
        ("run at once; each program has a", "memory ceiling; a fault of one", "hits all of them"),
    )
    sheet.box(Box(_MAP, y, 142, 48), ("pod infer", "20Gi, 25 % of the SMs"), "green")
    sheet.box(Box(_MAP + 142, y, 71, 48), ("pod serve", "10Gi"), "green")


def _turns(sheet: Sheet, y: int) -> None:
    _card(
        sheet,
        y,
        "GPU 2",
        "time-slicing",
        ("one after the other in short turns;", "nothing keeps a pod within", "its memory"),
    )
    for number in range(8):
        pod, colour = _TURNS[number % 2]
        sheet.box(Box(_MAP + number * _SLICE, y, _SLICE, 48), (pod, "its turn"), colour)


_TURNS: tuple[tuple[str, Colour], ...] = (("pod x", "yellow"), ("pod y", "red"))


def _whole(sheet: Sheet, y: int) -> None:
    _card(sheet, y, "GPU 3", "whole", ("one claim has the", "whole card", ""))
    sheet.box(Box(_MAP, y, 8 * _SLICE, 48), ("pod big", "the whole card"), "grey")


def _over_time(sheet: Sheet, y: int) -> None:
    sheet.text(
        (20, y + 16),
        "One card over time: the first claim decides, the last one to leave frees the card",
        bold=True,
        size=13,
    )
    x = 20
    for width, lines, colour in _LIFE:
        sheet.box(Box(x, y + 30, width, 40), lines, colour)
        x += width
    sheet.arrow((20, y + 84), (x, y + 84))


_LIFE: tuple[tuple[int, tuple[str, ...], Colour], ...] = (
    (60, ("free",), "white"),
    (215, ("MIG", "partitions come and go"), "blue"),
    (60, ("free",), "white"),
    (215, ("MPS", "shares come and go"), "green"),
    (60, ("free",), "white"),
    (140, ("whole card", "one pod"), "grey"),
    (60, ("free",), "white"),
)


def claim() -> str:
    """From the kubelet's call to the container, with everything that is written on the way."""
    sheet = Sheet(
        900,
        470,
        "The way of a claim",
        "The kubelet calls the plugin server; the claim waits in its queue, is fetched from the API server and waits for its "
        "GPUs; a worker thread decides, writes the intent down, acts, writes the CDI file and the finished record.",
    )
    kubelet = sheet.box(Box(20, 40, 152, 56), ("kubelet", "NodePrepareResources"), "grey")
    server = sheet.box(Box(202, 40, 138, 56), ("PluginServer", "gRPC on two sockets"), "blue", note="plugin/server.py")
    queue = sheet.box(
        Box(370, 40, 150, 56), ("ClaimQueue", "one line for each claim"), "blue", note="plugin/claim_queue.py"
    )
    fetch = sheet.box(Box(560, 40, 150, 56), ("fetch the claim", "as it is now"), "blue", note="plugin/service.py")
    tickets = sheet.box(Box(740, 40, 144, 56), ("Tickets", "one line for each GPU"), "blue", note="plugin/tickets.py")
    api = sheet.box(Box(560, 128, 150, 34), ("API server",), "grey")
    for one, two in ((kubelet, server), (server, queue), (queue, fetch), (fetch, tickets)):
        sheet.arrow(one.right, two.left)
    sheet.arrow(api.top, fetch.bottom, both=True)
    sheet.text((20, 24), "on the event loop: a claim that waits holds no thread and no lock", soft=True)
    _transaction(sheet, tickets)
    return sheet.svg()


def _transaction(sheet: Sheet, tickets: Box) -> None:
    sheet.frame(Box(20, 190, 864, 130), "the transaction, in a worker thread under file locks: plugin/prepare.py", 100)
    decide = sheet.box(
        Box(720, 224, 145, 70),
        ("1. decide", "a plan, or the claims", "in the way, or an error"),
        "green",
        note="core/plan.py",
    )
    intent = sheet.box(Box(550, 224, 130, 70), ("2. write down", "the record: intent"), "yellow", note="checkpoint.py")
    act = sheet.box(
        Box(370, 224, 140, 70),
        ("3. act", "step by step; each", "result is written down"),
        "red",
        note="plugin/steps.py",
    )
    cdi = sheet.box(
        Box(205, 224, 125, 70), ("4. CDI file", "what containers get"), "yellow", note="plugin/cdi_writer.py"
    )
    done = sheet.box(Box(35, 224, 130, 70), ("5. write down", "the record: finished"), "yellow", note="checkpoint.py")
    sheet.arrow(tickets.bottom, (tickets.bottom[0], decide.y))
    for one, two in ((decide, intent), (intent, act), (act, cdi), (cdi, done)):
        sheet.arrow(one.left, two.right)
    sheet.arrow((85, decide.y), (85, 96))
    sheet.text((93, 130), "CDI names of the devices,")
    sheet.text((93, 145), "or one sentence that says what is wrong")
    _hardware(sheet, act, cdi)


def _hardware(sheet: Sheet, act: Box, cdi: Box) -> None:
    nvml = sheet.box(Box(370, 360, 140, 52), ("NVML, nvidia-smi", "partitions, modes"), "grey", note="nvml/")
    mps = sheet.box(
        Box(550, 360, 150, 52), ("MPS supervisor", "a process of its own"), "grey", note="mps/supervisor.py"
    )
    runtime = sheet.box(Box(190, 360, 150, 52), ("container runtime", "reads the CDI file"), "grey")
    sheet.arrow(act.bottom, nvml.top, both=True)
    sheet.arrow((480, act.bottom[1]), (480, 338), (mps.top[0], 338), mps.top)
    sheet.arrow(cdi.bottom, (cdi.bottom[0], runtime.y), dashed=True)
    sheet.texts(
        (20, 438),
        (
            "The way back (NodeUnprepareResources) takes the same lines and locks: CDI file, then hardware, then the record.",
            "A process killed at any point leaves a finished record, or a record that says what to undo.",
        ),
    )


def offer() -> str:
    """From the hardware to the ResourceSlices that the scheduler reads."""
    sheet = Sheet(
        960,
        390,
        "The way of a GPU's offer",
        "Cards and policy make the inventory; inventory, counters and taints make the pools; the publisher writes the "
        "difference to the API server as ResourceSlices, which the scheduler reads.",
    )
    cards = sheet.box(Box(20, 50, 160, 56), ("cards", "profiles, places, memory"), "grey", note="nvml/")
    policy = sheet.box(
        Box(20, 138, 160, 56), ("policy file", "what a card may offer"), "grey", note="core/policy/rules.py"
    )
    inventory = sheet.box(
        Box(230, 94, 140, 56), ("Inventory", "devices of each card"), "green", note="core/inventory.py"
    )
    pools = sheet.box(
        Box(410, 84, 160, 76),
        ("pools", "counters, capacities,", "attributes, taints"),
        "green",
        note="core/pools/pool.py",
    )
    shape = sheet.box(Box(610, 94, 140, 56), ("shape", "may it change now?"), "green", note="core/pools/shape.py")
    write = sheet.box(
        Box(790, 84, 150, 76), ("Publisher", "writes only", "what differs"), "blue", note="publishing/publisher.py"
    )
    sheet.arrow(cards.right, (205, cards.right[1]), (205, 112), (inventory.x, 112))
    sheet.arrow(policy.right, (205, policy.right[1]), (205, 132), (inventory.x, 132))
    for one, two in ((inventory, pools), (pools, shape), (shape, write)):
        sheet.arrow(one.right, two.left)
    sheet.text((20, 28), "once, at the start of the driver", soft=True)
    sheet.text((410, 28), "after each claim, after each change and every 30 s: publishing/controller.py", soft=True)
    _looks(sheet, pools, write)
    return sheet.svg()


def _looks(sheet: Sheet, pools: Box, write: Box) -> None:
    health = sheet.box(
        Box(410, 216, 160, 56), ("NodeHealth", "what is unavailable now"), "red", note="publishing/node_health.py"
    )
    probe = sheet.box(
        Box(600, 216, 165, 56),
        ("dry run, once", "what the API server keeps"),
        "blue",
        note="publishing/api_features.py",
    )
    api = sheet.box(Box(810, 216, 130, 56), ("API server", "ResourceSlices"), "grey")
    scheduler = sheet.box(Box(810, 320, 130, 44), ("scheduler", "chooses a device"), "grey")
    sources = (("cards now", "nvml/"), ("records of claims", "checkpoint.py"), ("MPS daemons", "mps/client.py"))
    for number, (name, module) in enumerate(sources):
        box = sheet.box(Box(220 + number * 190, 320, 160, 44), (name,), "grey", note=module)
        end = health.x + 40 * (number + 1)
        sheet.arrow(box.top, (box.top[0], 296), (end, 296), (end, health.bottom[1]))
    sheet.arrow(health.top, pools.bottom)
    sheet.arrow((api.top[0], write.bottom[1]), api.top, both=True)
    sheet.arrow(probe.right, api.left, both=True)
    sheet.arrow(probe.top, (probe.top[0], 188), (540, 188), (540, pools.bottom[1]))
    sheet.arrow(api.bottom, scheduler.top)


def layers() -> str:
    """Which module may import which, from the first import contract of pyproject.toml."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    rows = [str(row).split(" | ") for row in config["tool"]["importlinter"]["contracts"][0]["layers"]]
    sheet = Sheet(
        760,
        50 + 50 * len(rows),
        "Who may import whom",
        "From top to bottom: "
        + "; ".join(", ".join(row) for row in rows)
        + ". A module may import what stands below it.",
    )
    sheet.text(
        (20, 24), "a module may import what stands below it; modules of one row do not know each other", soft=True
    )
    for number, row in enumerate(rows):
        width = (720 - 10 * (len(row) - 1)) // len(row)
        for place, name in enumerate(row):
            y = 40 + 50 * number
            sheet.box(
                Box(20 + place * (width + 10), y, width, 38),
                (name,),
                _ROOMS.get(name, "grey"),
                note=_SAYS_OF.get(name, ""),
            )
    return sheet.svg()


_ROOMS: Mapping[str, Colour] = {
    "plugin": "blue",
    "publishing": "blue",
    "core": "green",
    "nvml": "red",
    "mps": "red",
    "system": "red",
}
_SAYS_OF = {
    "cli": "the command line",
    "app": "the wiring",
    "playground": "stand-in cluster in the background",
    "demo": "the story of hack/demo",
    "config": "flags and environment",
    "report": "text for people",
    "errors": "who can fix it",
    "hardware": "real or simulated: chosen here",
    "plugin": "the kubelet's side",
    "publishing": "the API server's side",
    "standin": "stand-in control plane",
    "node": "one look from outside",
    "checkpoint": "records on disk",
    "kube": "API client",
    "nvml": "GPUs, real or simulated",
    "mps": "MPS daemons",
    "telemetry": "logs, metrics",
    "web": "the HTTP port",
    "system": "the machine: files, programs, NVIDIA's libraries",
    "core": "every decision, pure",
    "pb": "generated gRPC code",
}

PICTURES: Mapping[str, Callable[[], str]] = {
    "shared-cards.svg": shared_cards,
    "claim.svg": claim,
    "offer.svg": offer,
    "layers.svg": layers,
}


def main() -> None:
    """Write all pictures."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
        print(f"docs/img/{name}")


if __name__ == "__main__":
    main()
