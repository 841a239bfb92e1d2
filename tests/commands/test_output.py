"""Help within 80 columns, tables within 80 columns, bodies for programs, colours for persons, completion in a real shell."""

from __future__ import annotations

import argparse
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from gpuslice import cli, node, report
from gpuslice.commands import completion, output
from gpuslice.commands.parser import tree
from gpuslice.config import Config
from gpuslice.core.inventory import Inventory
from gpuslice.core.policy.rules import Policy

from tests.kit.builders import a_gpu
from tests.kit.rig import Rig, a_claim

COMMANDS = [(path, at) for path, at in tree(cli.parser())]
NAMES = [" ".join(path) for path, _ in COMMANDS]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("columns", ["200", "80"])
@pytest.mark.parametrize(("path", "at"), COMMANDS, ids=NAMES)
def test_help_fits_80_columns(
    path: tuple[str, ...], at: argparse.ArgumentParser, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)

    lines = at.format_help().splitlines()

    assert [line for line in lines if len(line) > 80] == []
    assert lines[0].startswith(f"usage: gpuslice{''.join(f' {name}' for name in path)} ")


@pytest.mark.parametrize(("path", "at"), COMMANDS, ids=NAMES)
def test_help_has_an_example_and_says_what_each_value_is(path: tuple[str, ...], at: argparse.ArgumentParser) -> None:
    text = at.format_help()

    assert f"examples:\n  {'source <(' if path == ('completion',) else ''}gpuslice " in text
    assert "…" not in text
    assert [action.dest for action in at._actions if action.help is None and not action.choices] == []


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_command_is_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "help", *name.split()) == said(capsys, *name.split(), "--help")


# ---------------------------------------------------------------- tables and maps


@pytest.mark.parametrize("spec", ["h100x2", "h200", "a30", "l4", "rtx-pro-6000", "a100-40g:mig", "gh200-96g"])
def test_devices_fit_80_columns_and_wide_has_a_line_for_each_thing(
    spec: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    where = ("--kubelet-plugins-directory-path", str(tmp_path))
    narrow = said(capsys, "devices", "--simulate", spec, *where).splitlines()
    wide = said(capsys, "devices", "--simulate", spec, "-o", "wide", *where).splitlines()

    assert [line for line in narrow if len(line) > 80] == []
    assert sum(line.startswith("  offers ") for line in wide) == sum(line.startswith("GPU ") for line in wide)


def test_claims_with_long_names_fit_80_columns_and_wide_has_them_whole(rig: Rig) -> None:
    name = "a-claim-with-a-name-that-somebody-generated-from-three-other-names"
    for number, device in enumerate(("mig-1g-19-6", "mig-3g-9-0")):
        rig.prepare(a_claim(f"{name}-{number}", rig.device(device)))
    records = rig.checkpoint.records()

    narrow, wide = report.claims(records, 80), report.claims(records)

    assert max(map(len, narrow.splitlines())) == 80
    assert "…" in narrow
    assert f"default/{name}-0 " in wide
    assert "MIG-" in wide


def test_a_partition_has_its_name_in_the_map_of_a_card_with_many_slices(rig: Rig) -> None:
    rig.prepare(a_claim("one", rig.device("mig-1g-19-6")))
    pool = rig.inventory.pools[0]
    live = rig.nvml.look(pool.gpu.uuid)
    grants = [grant for record in rig.checkpoint.records().values() for grant in record.plan.grants]

    ruler, cells = report.memory_map(pool, live, grants, tuple(rig.checkpoint.records().values()), 80)
    narrow = report.memory_map(pool, live, grants, tuple(rig.checkpoint.records().values()), 60)

    assert "[1g.10gb]" in cells
    assert len(ruler) <= len(cells) == 80
    assert "[ 1g ]" in narrow[1]


# ---------------------------------------------------------------- for programs


@pytest.mark.parametrize("form", ["json", "yaml"])
def test_devices_for_programs(form: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = said(
        capsys, "devices", "--simulate", "h100+l4", "-o", form, "--kubelet-plugins-directory-path", str(tmp_path)
    )

    first, second = (json.loads(text) if form == "json" else yaml.safe_load(text))["gpus"]

    assert (first["index"], first["product"], first["memoryMiB"]) == (0, "NVIDIA H100 80GB HBM3", 81559)
    assert (first["mig"], first["holders"], first["partitions"], first["unusable"]) == (False, [], [], [])
    assert {"name": "mig-1g-19-0", "type": "mig"} in first["devices"]
    assert [device["name"] for device in second["devices"]] == ["mps", "timeslice", "gpu", "monitor"]


def test_claims_of_a_folder_without_a_driver_are_none_and_the_folder_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = said(capsys, "claims", "-o", "json", "--kubelet-plugins-directory-path", str(tmp_path))

    body = json.loads(text)
    assert body["claims"] == []
    assert body["warnings"] == [
        f"no driver has run with the folder {tmp_path}/gpuslice.dev; if one has run with another folder, use its "
        "--kubelet-plugins-directory-path and --driver-name"
    ]


def test_claims_where_a_driver_runs_without_any_are_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "gpuslice.dev").mkdir()

    text = said(capsys, "claims", "-o", "json", "--kubelet-plugins-directory-path", str(tmp_path))

    assert json.loads(text) == {"claims": [], "warnings": []}


def test_a_node_file_is_found_again_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "node.yaml").write_text("gpus: [{product: l4}]", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plugins/gpuslice.dev").mkdir(parents=True)
    plugins = tmp_path / "plugins"
    node.save_settings(Config(node_name="n", simulate="./node.yaml", kubelet_plugins_directory_path=plugins))
    monkeypatch.chdir("/")

    with node.snapshot(Config(kubelet_plugins_directory_path=plugins)) as seen:
        assert [pool.gpu.product for pool in seen.inventory.pools] == ["NVIDIA L4"]


def test_a_record_that_nobody_can_read_is_a_warning_and_the_others_are_shown(
    rig: Rig, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rig.prepare(a_claim("one", rig.device("mig-1g-19-6")))
    (rig.checkpoint.folder / "uid-two.json").write_text("[]\n", encoding="utf-8")
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "gpuslice.dev").symlink_to(tmp_path)  # its claims and the node of the rig
    simulated = ("--simulate", "h100x2", "--simulate-folder", str(tmp_path / "node"))

    with pytest.raises(SystemExit) as ended:
        cli.main(["claims", "-o", "json", "--kubelet-plugins-directory-path", str(plugins), *simulated])

    out, err = capsys.readouterr()
    body = json.loads(out)
    assert ended.value.code == 0
    assert [claim["name"] for claim in body["claims"]] == ["one"]
    assert [(d["request"], d["device"], d["type"]) for d in body["claims"][0]["devices"]] == [
        ("gpu-0", "mig-1g-19-6", "mig")
    ]
    assert body["claims"][0]["devices"][0]["uuid"].startswith("MIG-")
    assert "uid-two.json of claim uid-two cannot be read" in err
    assert body["warnings"][0] in err


# ---------------------------------------------------------------- policy check


def test_a_policy_is_checked_on_each_card_with_its_warnings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(
        "apiVersion: gpuslice.dev/v1alpha1\nkind: Policy\ndefault: {profiles: [1g.11gb]}\n"
        "gpus: [{match: {index: 1}, modes: [mig], profiles: [3g.40gb], static: {3g.40gb: 2}}]\n",
        encoding="utf-8",
    )

    with pytest.raises(SystemExit) as ended:
        cli.main(["policy", "check", str(path), "--simulate", "h100x2"])

    out, err = capsys.readouterr()
    assert ended.value.code == 0
    assert "GPU 0  NVIDIA H100 80GB HBM3  81559 MiB  as default says\n  offers  mps, timeslice, gpu, monitor\n" in out
    assert "as gpus[0] says\n  offers  3g.40gb at 2 places, monitor\n" in out
    assert "on Kubernetes 1.34 and 1.35  3g.40gb at 2 places, monitor" in out
    assert out.endswith("policy.yaml is a valid policy, with 1 warning\n")
    assert err == (
        "gpuslice: warning: policy: default names profile 1g.11gb, which its GPUs do not have; did you mean 1g.10gb?\n"
    )


def test_a_policy_that_does_not_suit_one_of_its_cards_is_valid_and_the_card_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("apiVersion: gpuslice.dev/v1alpha1\nkind: Policy\ndefault: {reserve: 40Gi}\n", encoding="utf-8")
    said_of_it = (
        f"gpuslice: warning: policy file {path}: default.reserve is 40960 MiB, but GPU 1 (NVIDIA L4) has only 23034 MiB; "
        "write a smaller reserve; until then "
    )
    folder = ("--simulate-folder", str(tmp_path / "no"))

    for command in (("policy", "check", str(path)), ("devices", "--policy", str(path), *folder)):
        with pytest.raises(SystemExit) as ended:
            cli.main([*command, "--simulate", "h100+l4"])

        (warning,) = capsys.readouterr().err.splitlines()
        assert ended.value.code == 0
        assert warning.startswith(said_of_it)


def test_devices_says_what_of_the_policy_has_no_effect(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(
        "apiVersion: gpuslice.dev/v1alpha1\nkind: Policy\ndefault: {profiles: [1g.11gb]}\n", encoding="utf-8"
    )

    with pytest.raises(SystemExit):
        cli.main(["devices", "--simulate", "h100", "--simulate-folder", str(tmp_path / "no"), "--policy", str(path)])

    assert "names profile 1g.11gb" in capsys.readouterr().err


def test_a_card_without_mig_offers_its_shares_and_itself() -> None:
    inventory = Inventory.of([a_gpu("l4")], Policy.default(), "n")

    assert report.offers(inventory.pools[0]) == "mps, timeslice, gpu, monitor"


# ---------------------------------------------------------------- colours


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False),
     ({"TERM": "xterm", "NO_COLOR": ""}, True)],
)  # fmt: skip
def test_colours_are_for_a_terminal_whose_user_has_not_refused_them(
    environment: dict[str, str], coloured: bool, tmp_path: Path
) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
    command = [sys.executable, "-m", "gpuslice", "devices", "--simulate", "l4"]
    where = ["--kubelet-plugins-directory-path", str(tmp_path)]
    ours, theirs = pty.openpty()

    subprocess.run([*command, *where], stdout=theirs, env={**clean, **environment}, check=True, timeout=30)

    os.close(theirs)
    text = os.read(ours, 4096).decode()
    os.close(ours)
    assert text.startswith("\x1b[1mGPU 0\x1b[0m" if coloured else "GPU 0")


def test_what_is_unavailable_is_red() -> None:
    assert output.coloured("  unavailable now: it is lost") == "  \x1b[31munavailable now:\x1b[0m it is lost"


# ---------------------------------------------------------------- completion


def completed(*words: str) -> set[str]:
    """What a real bash offers behind these words."""
    program = (
        'source /dev/stdin; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _gpuslice; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", program, "bash", "gpuslice", *words],
        input=completion.script(cli.parser(), "bash"),
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    assert not done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("",), {*(path[0] for path, _ in COMMANDS if path), "-h", "--help", "--version"}),
        (("d",), {"demo", "devices"}),
        (("policy", ""), {"check", "-h", "--help"}),
        (("run", "--log-l"), {"--log-level"}),
        (("run", "--log-level", ""), {"debug", "info", "warning", "error"}),
        (("run", "--node-name", "n", "--simulate-latency", "z"), {"zero"}),
        (("devices", "-o", ""), {"json", "yaml", "wide"}),
        (("policy", "check", "--sim"), {"--simulate"}),
        (("completion", ""), {"bash", "zsh", "fish", "-h", "--help"}),
    ],
)  # fmt: skip
def test_a_shell_completes_commands_flags_and_values(words: tuple[str, ...], offered: set[str]) -> None:
    assert completed(*words) == offered


def test_a_shell_completes_files_where_a_file_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").touch()

    for words in (("run", "--policy"), ("policy", "check"), ("devices", "--policy")):
        assert f"{tmp_path}/policy.yaml" in completed(*words, f"{tmp_path}/pol")


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_a_completion_script_knows_every_flag(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "completion", shell)

    flags = {
        option for _, at in COMMANDS for action in at._actions for option in action.option_strings if action.nargs != 0
    }
    assert [
        flag for flag in flags if (flag if shell != "fish" else f"-l {flag[2:]}") not in text and flag != "-o"
    ] == []
