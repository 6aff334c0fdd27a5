"""Downloads from a hub that fails, refuses or is not there, and results pushed to it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from fake_hub import READER, STRANGER, WRITER, FakeHub, Fault

from honeloom.runs.manifest import verify_folder

FETCH = """
import sys
from honeloom.backends import hub
from honeloom.errors import HoneloomError
hub.WAITS, hub.ANSWER_SECONDS = (0.01, 0.02, 0.03), 1
try:
    print(*hub.fetch_model(sys.argv[1]))
except HoneloomError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""
HONELOOM = """
import sys
from honeloom.backends import hub
from honeloom.cli.main import main
hub.WAITS = (0.01, 0.02, 0.03)
main(sys.argv[1:])
"""
pytestmark = pytest.mark.slow  # every call is a process of its own, for its environment decides the cache

WEIGHTS = "model.safetensors"


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[FakeHub]:
    """A hub with the public repository org/tiny."""
    server = FakeHub()
    server.add("org/tiny", {p.name: p.read_bytes() for p in sorted(tiny_model.iterdir())})
    yield server
    server.close()


@pytest.fixture
def call(hub: FakeHub, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python with the hub's address, an empty cache of its own, and no proxy."""

    def run(*arguments: object, token: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("HF_")}
        environment = {
            **kept, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_TOKEN": token, **variables,
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=tmp_path,
            timeout=120, check=False,
        )  # fmt: skip
        for secret in (READER, WRITER, STRANGER, "signed-secret"):
            assert secret not in done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def fetch(call):
    """Fetch one model: its folder, or the message."""

    def run(name: str = "org/tiny", **variables: str) -> Path | str:
        done = call("-c", FETCH, name, **variables)
        return Path(done.stdout.split()[0]) if done.returncode == 0 else done.stderr.splitlines()[-1]

    return run


def same(folder: Path | str, model: Path) -> bool:
    assert isinstance(folder, Path), folder
    return all((folder / name).read_bytes() == (model / name).read_bytes() for name in (WEIGHTS, "config.json"))


@pytest.mark.parametrize(
    ("pattern", "what", "times"),
    [
        ("GET /api/models/org/tiny", 429, 1),
        ("GET /api/models/org/tiny", 503, 3),
        ("GET /api/models/org/tiny/tree", 502, 1),
        (f"HEAD .*{WEIGHTS}", 503, 1),
        (f"GET .*{WEIGHTS}", 500, 2),
        (f"GET .*{WEIGHTS}", 429, 1),
        (f"GET .*{WEIGHTS}", "reset", 1),
        ("GET /api/models/org/tiny", partial(time.sleep, 2), 1),
    ],
)
def test_a_busy_hub_is_asked_again(hub, fetch, tiny_model, pattern, what, times):
    hub.faults.append(Fault(pattern, what, times))
    assert same(fetch(), tiny_model)
    assert hub.faults[0].times == 0


def test_a_broken_connection_is_resumed_where_it_broke(hub, fetch):
    weights = os.urandom(24 << 20)
    hub.add("org/large", {"config.json": b"{}", WEIGHTS: weights})
    hub.faults.append(Fault(f"GET .*{WEIGHTS}", "cut"))
    folder = fetch("org/large")
    assert (folder / WEIGHTS).read_bytes() == weights
    assert hub.count(rf"GET .*{WEIGHTS} bytes={10 << 20}-") == 1  # whole chunks of 10 MiB are kept


def test_a_hub_that_stays_busy_ends_in_a_sentence_and_complete_files_are_kept(hub, fetch, tiny_model):
    hub.faults.append(Fault(f"GET .*{WEIGHTS}", 503, 99))
    message = fetch()
    assert message == (
        f"HubError: model org/tiny: {hub.address} answered 503, 4 times in a row; run the same command again later: "
        "complete files are kept"
    )
    hub.faults.clear()
    hub.log.clear()
    assert same(fetch(), tiny_model)
    assert hub.count(f"GET .*resolve.*{WEIGHTS}") == 1
    assert hub.count("GET .*resolve.*config.json") == 0


def test_a_branch_that_moves_while_files_come_gives_one_commit(hub, fetch, tiny_model, other_model):
    first = hub.repositories["org/tiny"].head
    later = {p.name: p.read_bytes() for p in sorted(other_model.iterdir())}
    hub.faults.append(Fault("HEAD .*", lambda: hub.add("org/tiny", later)))
    folder = fetch()
    assert folder.name == first
    assert same(folder, tiny_model)
    assert same(fetch(), other_model)


def test_a_commit_in_the_cache_needs_no_hub(hub, fetch, tiny_model):
    name = f"org/tiny@{hub.repositories['org/tiny'].head}"
    fetch(name)
    hub.log.clear()
    assert same(fetch(name), tiny_model)
    assert hub.log == []
    assert same(fetch("org/tiny@main"), tiny_model)
    hub.close()
    assert same(fetch("org/tiny@main"), tiny_model)
    assert same(fetch("org/tiny@main", HF_HUB_OFFLINE="1"), tiny_model)


@pytest.mark.parametrize("pinned", [False, True])
def test_a_plan_leaves_no_snapshot_that_is_taken_for_the_model(hub, call, fetch, rows, pinned):
    name = f"org/tiny@{hub.repositories['org/tiny'].head}" if pinned else "org/tiny"
    command = ["-m", "honeloom", "evaluate", name, "--rows", rows]
    for offline in ({}, {}, {"HF_HUB_OFFLINE": "1"}):
        plan = call(*command, "--dry-run", "--json", **offline)
        (stage,) = json.loads(plan.stdout)["stages"]
        assert (stage["downloads"], stage["needs"]["unknown"]) == ([name], None)
        assert stage["needs"]["memory"]["total"] > 0
    offline = call(*command, HF_HUB_OFFLINE="1")
    assert offline.returncode == 2
    assert "its weights are not in the local cache and HF_HUB_OFFLINE is set; download it once" in offline.stderr
    # huggingface_hub returns what it has where it gets no list of the files.
    hub.faults.append(Fault("GET /api/models/org/tiny/tree", 502, 1))
    fetched = fetch(name)
    assert (fetched / WEIGHTS).is_file(), fetched
    done = call(*command, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("lost", ["model-00002-of-00002.safetensors", WEIGHTS, "config.json"])
def test_a_snapshot_without_a_file_that_belongs_to_it_is_completed(hub, fetch, lost):
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    if lost == WEIGHTS:
        files = {"adapter_config.json": b"{}", WEIGHTS: b"a"}
    else:
        index = json.dumps({"weight_map": {str(i): n for i, n in enumerate(shards)}}).encode()
        files = {"config.json": b"{}", "model.safetensors.index.json": index, **dict.fromkeys(shards, b"a")}
    name = f"org/parts@{hub.add('org/parts', files).head}"
    folder = fetch(name)
    (folder / lost).unlink()
    for tree in folder.parents[1].glob("trees/*"):
        tree.unlink()  # as older versions of huggingface_hub leave it
    assert "not in the local cache and HF_HUB_OFFLINE is set" in fetch(name, HF_HUB_OFFLINE="1")
    assert (fetch(name) / lost).is_file()
    assert fetch(name, HF_HUB_OFFLINE="1") == folder


def test_rows_are_in_the_cache_only_where_there_are_some(hub, call):
    head = hub.add("org/rows", {"rows.jsonl": b'{"text": "a"}\n', "dataset_infos.json": b"{}"}).head
    part = "import sys, huggingface_hub as h; h.hf_hub_download('org/rows', 'dataset_infos.json', repo_type='dataset')"
    assert call("-c", part).returncode == 0
    command = ["-m", "honeloom", "select", f"org/rows@{head}", "--keep", "1", "--output-dir", "out"]
    assert "its row files are not in the local cache" in call(*command, HF_HUB_OFFLINE="1").stderr
    done = call(*command)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "variables", "expected"),
    [
        ("org/gated", {}, "gated, and no token says who asks (401); accept its terms at"),
        ("org/absent", {"token": READER}, "no such local folder, and no such repository at"),
        ("org/tiny@gone", {}, "no revision 'gone' on the hub"),
        ("org/tiny", {"HF_HUB_OFFLINE": "1"}, "config.json is not in the local cache and HF_HUB_OFFLINE is set"),
        ("org/tiny", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub at http://127.0.0.1:9 cannot be reached"),
    ],
)
def test_a_plan_says_why_it_knows_nothing_of_a_model(hub, call, rows, name, variables, expected):
    hub.add("org/gated", {"config.json": b"{}", WEIGHTS: b"x"}, gated=True)
    done = call("-m", "honeloom", "tune", name, rows, "--dry-run", **variables)
    assert done.returncode == 0, done.stderr
    assert "memory cannot be told: " in done.stdout
    assert expected in done.stdout


def test_a_password_in_the_address_of_the_hub_is_not_printed(call, rows):
    address = {"HF_ENDPOINT": "http://someone:pass-word-77@127.0.0.1:9"}
    for arguments in (
        ["evaluate", "org/tiny", "--rows", rows],
        ["evaluate", "org/tiny", "--rows", rows, "--dry-run"],
        ["tune", "org/tiny", rows, "--output-dir", "out", "--push-to-hub", "me/x"],
        ["doctor", "--no-devices"],
        ["doctor", "--no-devices", "--json"],
    ):
        done = call("-m", "honeloom", *arguments, token=WRITER, **address)
        assert "127.0.0.1:9" in done.stdout + done.stderr, arguments
        assert "pass-word-77" not in done.stdout + done.stderr, arguments
        assert "someone" not in done.stdout + done.stderr, arguments
    raised = call("-c", FETCH, "org/tiny", **address)
    assert "http://127.0.0.1:9 cannot be reached" in raised.stderr
    assert "pass-word-77" not in raised.stderr


@pytest.mark.parametrize("repository", ["bad repo", "me", "me/x@v1", "a/b/c"])
def test_a_plan_refuses_a_repository_that_is_none(hub, call, rows, repository):
    hub.log.clear()
    done = call("-m", "honeloom", "tune", "lab:base", rows, "--dry-run", "--push-to-hub", repository)
    assert done.returncode == 2
    assert f"--push-to-hub '{repository}': give a repository as org/name" in done.stderr
    assert hub.log == []


def test_a_busy_hub_does_no_harm_to_what_is_in_the_cache(hub, fetch, tiny_model):
    fetch()
    hub.faults.append(Fault("GET /api/", 503, 99))
    assert same(fetch(), tiny_model)


def test_rows_of_a_gated_data_set_name_its_page(hub, call):
    hub.add("org/rows", {"rows.jsonl": b'{"text": "a"}\n'}, gated=True)
    done = call("-m", "honeloom", "select", "org/rows", "--method", "random", "--keep", "1", "--output-dir", "out")
    assert done.returncode == 2
    assert f"accept its terms at {hub.address}/datasets/org/rows" in done.stderr
    hub.repositories["org/rows"].gated = False
    done = call("-m", "honeloom", "select", "org/rows", "--method", "random", "--keep", "1", "--output-dir", "out")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "token", "expected"),
    [
        ("org/gated", "", "gated, and no token says who asks (401); accept its terms at {hub}/org/gated, then set"),
        ("org/gated", READER, "gated, and this account may not read it yet (403); open {hub}/org/gated and accept"),
        ("org/gated", "wrong-token-9999", "the hub does not know the token of HF_TOKEN or `hf auth login` (401)"),
        ("org/private", "", "nothing public at {hub}/org/private (401); for a private one set HF_TOKEN from {hub}/"),
        ("org/private", READER, "no such repository at {hub}/org/private (a private one needs an HF_TOKEN that"),
        ("org/tiny@gone", "", "no revision 'gone' on the hub; see {hub}/org/tiny"),
        ("org/pickled", "", "the repository has no safetensors file; pickled weights are not read"),
    ],
)
def test_what_a_person_can_do_is_said(hub, fetch, name, token, expected):
    files = {"config.json": b"{}", WEIGHTS: b"x"}
    hub.add("org/gated", files, gated=True)
    hub.add("org/private", files, private=True)
    hub.add("org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    message = fetch(name, token=token)
    assert message.startswith(("SourceError: model org/", "SourceError: org/pickled"))
    assert expected.format(hub=hub.address) in message
    assert "wrong-token-9999" not in message


def test_a_token_without_the_scope_is_told_so(hub, fetch):
    hub.faults.append(Fault("HEAD .*", 403, 99))
    message = fetch(token=READER)
    assert "the token lacks a permission that this needs (403)" in message
    assert f"{hub.address}/settings/tokens" in message


@pytest.mark.parametrize("reason", ["offline", "refused", "no such host"])
def test_without_a_hub_the_process_ends_at_once(call, rows, reason):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    variables = {
        "offline": {"HF_HUB_OFFLINE": "1"},
        "refused": {"HF_ENDPOINT": f"http://127.0.0.1:{port}"},
        "no such host": {"HF_ENDPOINT": "http://hub.invalid"},
    }[reason]
    call("-c", "import honeloom.cli.main, huggingface_hub.hf_api, pydantic, numpy")  # a cold disk is not what is timed
    started, used = time.monotonic(), children_seconds()
    done = call("-m", "honeloom", "evaluate", "org/tiny", "--rows", rows, **variables)
    used, seconds = children_seconds() - used, time.monotonic() - started
    assert done.returncode == 2
    why = "HF_HUB_OFFLINE is set" if reason == "offline" else f"the hub at {variables['HF_ENDPOINT']} cannot be reached"
    assert f"model org/tiny: there is no such folder, config.json is not in the local cache and {why}" in done.stderr
    assert used < 3
    assert seconds < 10  # on a busy machine; a hub that is asked again and again costs a minute


def children_seconds() -> float:
    """Processor seconds of all child processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def test_a_model_of_the_hub_is_evaluated_and_its_commit_recorded(hub, call, rows, tmp_path):
    done = call("-m", "honeloom", "evaluate", "org/tiny@main", "--rows", rows, "--output-dir", "out")
    assert done.returncode == 0, done.stderr
    (entry,) = [e for e in json.loads((tmp_path / "out/inputs.json").read_text())["inputs"] if e["kind"] == "model"]
    assert (entry["value"], entry["revision"]) == ("org/tiny@main", hub.repositories["org/tiny"].head)


def download(hub: FakeHub, name: str, folder: Path) -> Path:
    repository = hub.repositories[name]
    for file, data in repository.commits[repository.head].items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(data)
    return folder


def test_a_result_is_pushed_when_it_is_proven_and_again_when_it_is_reused(hub, call, rows, tmp_path):
    command = ["-c", HONELOOM, "tune", "org/tiny", rows, "--max-steps", "1", "--rank", "2", "--output-dir", "a_b"]
    plan = call(*command, "--push-to-hub", "me/tuned", "--dry-run")
    assert "then pushed to me/tuned on the hub" in plan.stdout
    hub.faults.append(Fault("POST .*/commit/", 500, 99))
    failed = call(*command, "--push-to-hub", "me/tuned", token=WRITER)
    assert failed.returncode == 1
    assert "error: me/tuned: not pushed: the hub answered 500; the result stands complete in" in failed.stderr
    assert "repeat the command with --resume --push-to-hub me/tuned" in failed.stderr
    assert verify_folder(tmp_path / "a_b")[1] == []

    hub.faults[:] = [Fault("POST .*/commit/", 503, 1), Fault("PUT /lfs/", 503, 1)]
    hub.blobs.clear()
    done = call(*command, "--resume", "--push-to-hub", "me/tuned", token=WRITER)
    assert done.returncode == 0, done.stderr
    assert "tune: reused" in done.stdout
    assert "503 thrown while requesting PUT" in done.stderr  # without the signature of the address, see `call`
    assert done.stdout.splitlines()[-1] == str(tmp_path / "a_b")
    assert hub.created["me/tuned"]["visibility"] == "private"
    assert "push_to_hub" not in (tmp_path / "a_b/recipe.lock.yaml").read_text()

    pushed = download(hub, "me/tuned", tmp_path / "pushed")
    names = {p.name for p in pushed.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "report.json", "inputs.json",
            "recipe.lock.yaml", "environment.json", "manifest.json"} <= names  # fmt: skip
    assert not {"events.jsonl", "report.html", "training_rows.parquet", "checkpoints"} & names
    assert verify_folder(pushed)[1] == []
    weights = "adapter_model.safetensors"
    assert (pushed / weights).read_bytes() == (tmp_path / "a_b" / weights).read_bytes()
    told = [p.name for p in pushed.iterdir() if str(tmp_path).encode() in p.read_bytes()]
    assert told == [], "paths of this machine were pushed"
    assert "base_model:\n- org/tiny" in (pushed / "README.md").read_text().replace("  - ", "- ")

    again = call("-c", HONELOOM, "evaluate", "me/tuned", "--rows", rows, "--limit", "4", token=WRITER)
    assert again.returncode == 0, again.stderr


def test_a_damaged_result_is_not_pushed_and_a_local_base_is_told(hub, call, rows, tiny_model, tmp_path):
    command = ["-c", HONELOOM, "tune", tiny_model, rows, "--max-steps", "1", "--rank", "2", "--output-dir", "out"]
    done = call(*command, "--push-to-hub", "me/local", token=WRITER)
    assert done.returncode == 0, done.stderr
    assert f"adapter_config.json names its base by a path of this machine, {tiny_model}" in done.stderr
    pushed = download(hub, "me/local", tmp_path / "pushed")
    told = [p.name for p in pushed.iterdir() if str(tiny_model.parent).encode() in p.read_bytes()]
    assert told == ["adapter_config.json"]
    code = (
        "import sys; from pathlib import Path; from honeloom.stages.publish import push_result\n"
        "push_result(Path(sys.argv[1]), 'me/local')"
    )
    (tmp_path / "out/adapter_model.safetensors").write_bytes(b"x")
    hub.log.clear()
    damaged = call("-c", code, tmp_path / "out", token=WRITER)
    assert "VerificationError" in damaged.stderr
    assert "not pushed: adapter_model.safetensors is damaged" in damaged.stderr
    assert hub.log == []


@pytest.mark.parametrize(
    ("repository", "variables", "expected"),
    [
        ("me/x", {}, "there is no token; set HF_TOKEN to one that may write"),
        ("me/x", {"HF_HUB_OFFLINE": "1", "token": WRITER}, "HF_HUB_OFFLINE is set; leave the flag out, and push"),
        ("me/x", {"token": READER}, "the token may only read; make one that may write at"),
        ("me/x", {"token": "wrong-token-9999"}, "the hub does not know the token"),
        ("me/x", {"token": STRANGER}, "this token's account writes to stranger; take one of them before the /"),
        ("me/x@v1", {"token": WRITER}, "give a repository as org/name, without a revision"),
        ("me/x", {"token": WRITER, "HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub at http://127.0.0.1:9 cannot be"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_the_work(hub, call, rows, tmp_path, repository, variables, expected):
    command = ["-c", HONELOOM, "tune", "lab:base", rows, "--output-dir", "out", "--push-to-hub", repository]
    done = call(*command, **variables)
    assert done.returncode == 2
    assert f"--push-to-hub {repository}" in done.stderr.replace("'", "")
    assert expected in done.stderr
    assert "wrong-token-9999" not in done.stderr
    assert not hub.count("POST /api/repos/create")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["merge", "drop"])
def test_models_of_merge_and_drop_are_pushed(hub, call, tiny_model, other_model, rows, tmp_path, verb):
    if verb == "merge":
        (tmp_path / "merge.yaml").write_text(f"models: [{tiny_model}, {other_model}]\nmethod: linear\n")
        command = ["merge", "merge.yaml", "out"]
    else:
        command = ["drop", tiny_model, "out", "--attention", "1", "--calibration", rows, "--samples", "2"]
    done = call("-c", HONELOOM, *command, "--push-to-hub", "me/model", "--json", token=WRITER)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "out/report.json").read_text())
    pushed = download(hub, "me/model", tmp_path / "pushed")
    assert verify_folder(pushed)[1] == []
    assert {"config.json", WEIGHTS, "tokenizer.json"} <= {p.name for p in pushed.iterdir()}
    assert [p.name for p in pushed.iterdir() if str(tmp_path).encode() in p.read_bytes()] == []
    assert [p.name for p in pushed.iterdir() if str(tiny_model.parent).encode() in p.read_bytes()] == []
