"""Mistakes of a person on the command line, and the one sentence of each. A row is a mistake; the folder has the files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpuslice import cli

POLICY = "apiVersion: gpuslice.dev/v1alpha1\nkind: Policy\n"
KUBECONFIG = (
    "apiVersion: v1\nkind: Config\ncurrent-context: c\n"
    "clusters: [{name: c, cluster: {server: 'https://127.0.0.1:9'}}]\n"
    "users: [{name: u, user: {token: t}}]\ncontexts: [{name: c, context: {cluster: c, user: u}}]\n"
)
FILES = {
    "ok": KUBECONFIG,
    "broken": "a: [b\n",
    "list": "- a\n- b\n",
    "text": "hello\n",
    "empty": "",
    "number": KUBECONFIG.replace("'https://127.0.0.1:9'", "5"),
    "host": KUBECONFIG.replace("https://", ""),
    "twice": f"{POLICY}default: {{modes: [gpu]}}\ndefault: {{modes: [mig]}}\n",
    "covered": f"{POLICY}gpus:\n- {{match: {{product: '*'}}, modes: [gpu]}}\n- {{match: {{index: 0}}, modes: [mig]}}\n",
    "reserve": f"{POLICY}gpus: [{{match: {{index: 1}}, reserve: 800Gi}}]\n",
    "shares": f"{POLICY}default: {{mps: {{shares: 40}}, reserve: 81500Mi}}\n",
    "profile": f"{POLICY}gpus: [{{match: {{product: NVIDIA H100 80GB HBM3}}, profiles: [1g.11gb]}}]\n",
    "layout": f"{POLICY}default: {{static: {{7g.80gb: 2}}}}\n",
    "plugin": "version: v1\nsharing: {timeSlicing: {resources: [{name: nvidia.com/gpu, replicas: 4}]}}\n",
    "parted": "version: v1\nmig-configs: {all-1g.10gb: [{devices: all, mig-enabled: true}]}\n",
    "date": f"{POLICY}default: {{reserve: 2026-13-41}}\n",
    "key": f"{POLICY}default: {{? [a] : 1}}\n",
}

RUN = "run --simulate l4 --node-name n --kubelet-plugins-directory-path {0}/p --kubelet-registrar-directory-path {0}/r"
START = f"{RUN} --cdi-root {{0}}/cdi"
CHECK = "policy check --simulate h100x2 {0}/"

# (what is typed, the exit code, the sentence on standard error); {0} is the folder
MISTAKES = [
    ("bogus", 2, "gpuslice: error: argument COMMAND: invalid choice: 'bogus'"),
    ("", 2, "gpuslice: error: the following arguments are required: COMMAND; see gpuslice --help"),
    ("run --log-levl debug", 2, "run: error: unrecognized arguments: --log-levl debug; did you mean --log-level?"),
    ("devices --sim x", 2, "gpuslice devices: error: unrecognized arguments: --sim x"),
    ("policy", 2, "gpuslice policy: error: the following arguments are required: COMMAND"),
    ("policy check", 2, "gpuslice policy check: error: the following arguments are required: FILE"),
    ("claims -o xml", 2, "argument -o/--output: invalid choice: 'xml'"),
    ("completion csh", 2, "argument SHELL: invalid choice: 'csh'"),
    ("run --driver-name GPU.example", 2, "of lower-case letters, digits, - and .; write gpu.example"),
    (f"run --driver-name {'x' * 37}", 2, "has 37 characters and may have at most 36 characters"),
    ("devices --simulate H100x2", 2, "'H100x2' has capital letters, but names of products have none; write h100x2"),
    ("devices --simulate h100x0", 2, "'h100x0' is not a card; write a product, x and a count from 1 to 16"),
    ("devices --simulate h100,l4", 2, "as in h100x8, and + between several"),
    ("devices --simulate {0}/no.yaml", 2, "no.yaml does not exist; check the path"),
    ("devices --simulate {0}/list", 2, "is not a mapping of keys to values; see docs/simulator.md"),
    ("mps-supervisor --simulate l4x0 --mps-root {0}/mps", 2, "'l4x0' is not a card"),
    ("mps-supervisor --simulate l4 --mps-root mps", 2, "--mps-root is 'mps', a relative path, but each container"),
    ("mps-supervisor --simulate l4 --mps-root {0}/ok", 1, "cannot create folder {0}/ok: {0}/ok is a file; move the file"),
    (f"{RUN} --cdi-root cdi", 2, "--cdi-root is 'cdi', a relative path, but the container runtime has"),
    (f"{RUN} --cdi-root {{0}}/cid --kubeconfig {{0}}/ok", 2, "--cdi-root is {0}/cid, which does not exist; container"),
    (f"{START} --registration-socket ../x", 2, "--registration-socket is '../x' and must be the name of a file"),
    (START, 2, "cannot use this pod's service account for the API server"),
    (f"{START} --kubeconfig {{0}}/none", 2, "kubeconfig {0}/none does not exist; check the path that --kubeconfig names"),
    (f"{START} --kubeconfig {{0}}/cdi", 2, "kubeconfig {0}/cdi cannot be read (Is a directory)"),
    (f"{START} --kubeconfig {{0}}/broken", 2, "kubeconfig {0}/broken is not usable (ParserError"),
    (f"{START} --kubeconfig {{0}}/list", 2, "kubeconfig {0}/list is not usable"),
    (f"{START} --kubeconfig {{0}}/text", 2, "kubeconfig {0}/text is not usable"),
    (f"{START} --kubeconfig {{0}}/empty", 2, "kubeconfig {0}/empty is not usable"),
    (f"{START} --kubeconfig {{0}}/number", 2, "try it with kubectl --kubeconfig {0}/number get nodes"),
    (f"{START} --kubeconfig {{0}}/host", 2, "names the server '127.0.0.1:9', which is not a URL; write https://HOST:PORT"),
    (f"{CHECK}none", 2, "policy file {0}/none does not exist; check the path"),
    (f"{CHECK}cdi", 2, "policy file {0}/cdi is a folder; name the file in it"),
    (f"{CHECK}broken", 2, "policy file {0}/broken is not YAML, line 2, column 1"),
    (f"{CHECK}list", 2, "policy file {0}/list: the document must be a mapping"),
    (f"{CHECK}twice", 2, "twice, line 4, column 1: key 'default' is in line 3, too; keep one"),
    (f"{CHECK}covered", 2, "gpus[1] is never reached, because gpus[0] matches the same GPUs first"),
    (f"{CHECK}reserve", 2, "gpus[0].reserve is 819200 MiB, but GPU 1 (NVIDIA H100 80GB HBM3) has only 81559 MiB"),
    (f"{CHECK}shares", 2, "default.mps: 40 shares of GPU 0 (NVIDIA H100 80GB HBM3) would have less than 2 MiB each of 59 MiB"),
    (f"{CHECK}profile", 2, "profile: gpus[0] names profile 1g.11gb, which its GPUs do not have; did you mean 1g.10gb?"),
    (f"{CHECK}layout", 2, "layout: default.static, the static layout of GPU 0 (NVIDIA H100 80GB HBM3), 2 x 7g.80gb, does not"),
    (f"{CHECK}plugin", 2, "is a configuration of NVIDIA's device plugin, but must be a Policy; docs/policy.md#from-other"),
    (f"{CHECK}parted", 2, "is a layout file of NVIDIA's mig-parted"),
    (f"{CHECK}date", 2, "is not YAML: month must be in 1..12"),
    (f"{CHECK}key", 2, "line 3, column 13: found unhashable key"),
]  # fmt: skip


@pytest.fixture
def folder(short: Path) -> Path:
    for name, text in FILES.items():
        (short / name).write_text(text, encoding="utf-8")
    (short / "cdi").mkdir()
    return short


def gpuslice(*arguments: str, stdout: int = subprocess.PIPE, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KUBE")}
    return subprocess.run(
        [sys.executable, "-m", "gpuslice", *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=30,
        env={**environment, **more},
        check=False,
    )


SERVICES = (["run"], ["mps-supervisor"])  # they set up logging, so each needs its own process


def process(arguments: list[str]) -> tuple[object, str, str]:
    done = gpuslice(*arguments)
    return done.returncode, done.stdout, done.stderr


def here(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("typed", "code", "sentence"), MISTAKES, ids=[typed.replace("{0}/", "") for typed, *_ in MISTAKES]
)
def test_a_wrong_input_is_one_sentence(
    folder: Path, typed: str, code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    arguments = typed.format(folder).split()

    ended, stdout, stderr = process(arguments) if arguments[:1] in SERVICES else here(arguments, capsys)

    *_, last = stderr.splitlines()
    assert sentence.format(folder) in last
    assert ended == code
    assert "Traceback" not in stderr
    assert not stdout
    assert sorted(folder.rglob("*")) == before, "a start that fails leaves nothing"


# ---------------------------------------------------------------- running.json, other users, full outputs


LATENCY = '{"node_name": "n", "policy": "", "simulate": "", "simulate_folder": "", "simulate_latency": "x"}'


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[", "is not JSON"),
        ("[]", "is not what a driver writes"),
        ("5", "is not what a driver writes"),
        ("{}", "it has no node_name"),
        ('{"node_name": 5}', "node_name is 5 and must be a printable text"),
        (LATENCY, "simulated latency 'x' is not known"),
    ],
)  # fmt: skip
def test_what_the_driver_wrote_and_nobody_can_read_is_one_sentence(folder: Path, text: str, sentence: str) -> None:
    where = ("--kubelet-plugins-directory-path", str(folder))
    (folder / "gpuslice.dev").mkdir()
    (folder / "gpuslice.dev/running.json").write_text(text, encoding="utf-8")

    devices, claims = gpuslice("devices", *where), gpuslice("claims", *where)

    assert devices.returncode == 3
    assert len(devices.stderr.splitlines()) == 1
    assert sentence in devices.stderr
    assert claims.returncode == 0, "the records suffice"
    assert sentence in claims.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("command", ["devices", "claims"])
def test_another_user_is_told_whose_files_these_are(folder: Path, command: str, unmeasured: None) -> None:
    (folder / "gpuslice.dev/claims/boot").mkdir(parents=True)
    (folder / "gpuslice.dev/running.json").write_text("{}", encoding="utf-8")
    (folder / "gpuslice.dev").chmod(0o700)
    folder.chmod(0o755)
    # All imports come first, because on some machines the other user cannot read the interpreter's files.
    program = (
        "import os, sys; from gpuslice.cli import main; from gpuslice.commands import show; from gpuslice.system import host; "
        "os.setuid(65534); main(sys.argv[1:])"
    )
    arguments = [command, "--kubelet-plugins-directory-path", str(folder)]

    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=30, check=False
    )

    assert done.returncode == 3
    assert "is not readable for uid 65534; use the user of the driver" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("typed", ["devices --simulate h100", "devices --simulate h100 -o json", "claims", "help run"])
def test_an_output_that_is_full_is_one_sentence(folder: Path, typed: str) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = gpuslice(*typed.split(), stdout=full.fileno(), KUBELET_PLUGINS_DIRECTORY_PATH=str(folder))

    assert "Traceback" not in done.stderr
    assert done.returncode == 1
    assert done.stderr == (
        "gpuslice: cannot write the output: No space left on device; send the output to a place with free space\n"
    )


@pytest.mark.parametrize("typed", ["devices --simulate h100", "policy check {0}/ok-policy --simulate l4"])
def test_without_a_folder_for_temporary_files_a_look_at_simulated_cards_names_the_remedy(
    folder: Path, typed: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose root is read-only."""
    (folder / "ok-policy").write_text(POLICY, encoding="utf-8")
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: ["/proc/nothing"])
    monkeypatch.setenv("KUBELET_PLUGINS_DIRECTORY_PATH", str(folder))

    code, _, stderr = here(typed.format(folder).split(), capsys)

    assert code == 3
    assert stderr == (
        "gpuslice: no folder for temporary files is writable, and simulated cards without a folder of their own need one; "
        "set TMPDIR to a writable folder\n"
    )


def test_an_error_that_nobody_foresaw_is_one_sentence_with_the_place_of_its_trace(folder: Path) -> None:
    program = "from gpuslice import cli; cli._claims = lambda parsed: {}['a key']; cli.main(['claims'])"

    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "TMPDIR": str(folder)},
        check=False,
    )

    (trace,) = folder.glob("gpuslice-trace-*.txt")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith("gpuslice: unexpected error at ")
    assert str(trace) in line
    assert "Traceback" in trace.read_text(encoding="utf-8")


# ---------------------------------------------------------------- a look changes nothing


@pytest.mark.parametrize(
    "typed", ["devices --simulate h100x2", "claims --simulate h100x2", "policy check {0}/ok-policy --simulate l4"]
)
def test_a_look_makes_no_folder(folder: Path, typed: str) -> None:
    (folder / "ok-policy").write_text(POLICY, encoding="utf-8")
    before = sorted(folder.rglob("*"))

    done = gpuslice(
        *typed.format(folder).split(), KUBELET_PLUGINS_DIRECTORY_PATH=str(folder / "plugins"), TMPDIR=str(folder)
    )

    assert done.returncode == 0, done.stderr
    assert sorted(folder.rglob("*")) == before
