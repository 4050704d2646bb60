"""metrics.jsonl and the trackers beside it, read back from what the real packages wrote."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import wandb
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from flux2_lora.bundled import share
from flux2_lora.errors import RunError, UserError
from flux2_lora.training import tracking
from flux2_lora.training.tracking import LoggerSpec, Metrics, read_metrics

CONFIG = {"seed": 3, "adapter": {"rank": 16}}
KEY = "a" * 40


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """wandb as on a machine where nobody is logged in; its service ends with the test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    yield
    with suppress(ConnectionError, SystemExit):
        wandb.teardown()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    path = tmp_path / "grid.png"
    Image.new("RGB", (6, 4), (200, 30, 10)).save(path)
    return path


def metrics(run: Path, kind: str, resumed_at: int = 0, **spec: str) -> Metrics:
    spec_ = LoggerSpec(kind=kind, wandb_project="mine", **spec)
    return Metrics(run / "metrics.jsonl", spec_, name="rome", config=CONFIG, resumed_at=resumed_at)


def steps(run: Path) -> list[float]:
    return [row["step"] for row in read_metrics(run / "metrics.jsonl")]


def events(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def parts(run: Path) -> list[Path]:
    """Folders of the wandb run, oldest first."""
    return sorted((run / "wandb").glob("*run-*-*"), key=lambda part: part.name.removeprefix("offline-"))


def records(part: Path, kind: str) -> list[Any]:
    """Records of one kind in a .wandb file: a header of 7 bytes, then a LevelDB log in blocks of 32 KiB."""
    raw = next(part.glob("*.wandb")).read_bytes()
    at, whole, found = 7, b"", []
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, place = struct.unpack_from("<HB", raw, at + 4)
        whole += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if place in (1, 4):  # in one piece, or the last
            record = wandb_internal_pb2.Record.FromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == kind:
                found.append(getattr(record, kind))
    return found


def rows(part: Path) -> list[dict[str, Any]]:
    """What was logged, without wandb's own keys; the parts of a value are "key.part"."""
    found = [
        {".".join(item.nested_key): json.loads(item.value_json) for item in row.item}
        for row in records(part, "history")
    ]
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in found]


def end(told: Metrics) -> None:
    """Close, and wait for wandb's service: it is the last to write."""
    told.close()
    wandb.teardown()


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line]


class Server(ThreadingHTTPServer):
    """As much of a wandb server as its client needs: it keeps what it is sent, and knows a run again."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.speaking, self.known = threading.Event(), ""
        self.speaking.set()
        self.configs: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.files: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        """The client drops its connections without a word."""

    def data(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        owner = {"id": "p", "name": "mine", "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "b", "name": self.known, "displayName": "rome", "config": "{}", "project": owner}
        if operation == "RunResumeStatus":
            past = {
                "wandbConfig": '{"t": 1}',  # tells the client that the run has begun
                "summaryMetrics": "{}",
                "historyTail": f'["{{\\"_step\\":{len(self.rows) - 1}}}"]',
                "eventsTail": "[]",
                "historyLineCount": len(self.rows),
                "eventsLineCount": 0,
                "logLineCount": 0,
            }
            return {"model": owner | {"bucket": bucket | past if self.known == given["name"] else None}}
        if operation == "UpsertBucket":
            self.known = self.known or given["name"]
            self.configs.append(json.loads(given["config"]))
            return {"upsertBucket": {"bucket": bucket | {"name": self.known, "historyLineCount": 0}, "inserted": True}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        """Nothing on the console."""

    def do_PUT(self) -> None:
        self.body()
        self.server.files.append(self.path)
        self.answer({})

    def do_POST(self) -> None:
        sent = json.loads(self.body())
        self.server.speaking.wait(20)
        if self.path != "/graphql":
            history = sent.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
            if history["content"]:
                self.server.rows[history["offset"] :] = [json.loads(line) for line in history["content"]]
            return self.answer({})
        operation = re.search(r"(?:query|mutation)\s+(\w+)", sent["query"])
        return self.answer({"data": self.server.data(operation[1] if operation else "", sent["variables"])})

    def body(self) -> bytes:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        return gzip.decompress(raw) if self.headers["Content-Encoding"] == "gzip" else raw

    def answer(self, content: dict[str, Any]) -> None:
        raw = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    yield server
    server.speaking.set()
    server.shutdown()
    server.server_close()


def test_every_logger_lists_the_same_options_with_their_defaults() -> None:
    for kind in ("jsonl", "tensorboard", "wandb"):
        given = yaml.safe_load((share() / f"configs/logger/{kind}.yaml").read_text())
        assert given == vars(LoggerSpec(kind=kind))


def test_a_resume_drops_later_rows_and_a_fresh_start_drops_all(run: Path) -> None:
    first = metrics(run, "jsonl")
    for step in range(6):
        first.write(step, loss=float(step))
    with first.path.open("a") as file:
        file.write('{"step": 6, "lo')
    metrics(run, "jsonl", resumed_at=3).write(4, loss=0.0)
    assert steps(run) == [0, 1, 2, 3, 4]
    metrics(run, "jsonl")
    assert steps(run) == []


def test_sync_puts_the_file_on_the_disk(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    told = metrics(run, "jsonl")
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    told.write(1, loss=1.0)
    assert synced == []
    told.sync()
    assert synced == [told.path.stat().st_ino]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is a file of Linux")
def test_a_full_disk_is_an_error_with_the_path(run: Path) -> None:
    told = metrics(run, "jsonl")
    told.path.unlink()
    told.path.symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"the disk is full: .*metrics\.jsonl needs"):
        told.write(1, loss=1.0)


def test_tensorboard_holds_numbers_pictures_and_the_configuration(run: Path, grid: Path) -> None:
    told = metrics(run, "tensorboard")
    told.write(1, loss=0.5, lr=1e-4)
    told.write(2, loss=0.25)
    told.picture(2, "preview", grid)
    told.close()
    found = events(run)
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert found.Tags()["scalars"] == ["loss", "lr"]
    (picture,) = found.Images("preview")
    assert picture.step == 2
    assert Image.open(io.BytesIO(picture.encoded_image_string)).convert("RGB").getpixel((5, 3)) == (200, 30, 10)
    (text,) = found.Tensors("config/text_summary")
    assert json.loads(text.tensor_proto.string_val[0].decode().strip("`")) == CONFIG


@pytest.mark.parametrize(("resumed_at", "kept"), [(2, [1, 2, 3]), (0, [3])])
def test_tensorboard_hides_what_metrics_drops(run: Path, resumed_at: int, kept: list[int]) -> None:
    first = metrics(run, "tensorboard")
    for step in range(1, 6):
        first.write(step, loss=float(step))
    first.close()
    second = metrics(run, "tensorboard", resumed_at=resumed_at)
    second.write(3, loss=-1.0)
    second.close()
    found = events(run).Scalars("loss")
    assert [event.step for event in found] == steps(run) == kept
    assert found[-1].value == -1


def test_tensorboard_without_its_package_names_the_command(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match="logger=tensorboard needs tensorboard") as raised:
        metrics(run, "tensorboard")
    assert raised.value.remedy == "pip install 'flux2-lora[tensorboard]'"
    assert not run.exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_that_cannot_write_is_said_once(run: Path, grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = metrics(run, "tensorboard")
    (run / "tensorboard").rename(run / "gone")  # at once: its thread may be writing there
    for step in range(1, 100):
        told.write(step, loss=1.0)
        time.sleep(0.001)
    told.picture(99, "preview", grid)
    told.close()
    (line,) = said(capsys)
    assert line.startswith("tensorboard: FileNotFoundError: ")
    assert line.endswith("; the run goes on without it, and with metrics.jsonl")
    assert steps(run) == list(range(1, 100))


def test_wandb_offline_holds_numbers_pictures_and_the_configuration(
    run: Path, grid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = metrics(run, "wandb", wandb_mode="offline")
    told.write(1, loss=0.5, lr=1e-4)
    told.picture(1, "preview", grid)
    told.write(2, loss=0.25)
    end(told)
    (part,) = parts(run)
    assert said(capsys) == [f"wandb: offline as asked, to upload it later: wandb sync {part}"]
    (made,) = records(part, "run")
    config = {entry.key: json.loads(entry.value_json) for entry in made.config.update}
    assert (made.project, made.display_name) == ("mine", "rome")
    assert {key: config[key] for key in CONFIG} == CONFIG
    first, picture, second = rows(part)
    assert (first, second) == ({"step": 1, "loss": 0.5, "lr": 1e-4}, {"step": 2, "loss": 0.25})
    assert picture["step"] == 1
    assert (part / "files" / picture["preview.path"]).read_bytes() == grid.read_bytes()
    assert {"*": "step"}.items() <= {metric.glob_name: metric.step_metric for metric in records(part, "metric")}.items()


def test_a_resumed_run_is_the_same_to_wandb_and_its_replacement_is_not(run: Path) -> None:
    for resumed_at in (0, 1, 0):
        told = metrics(run, "wandb", resumed_at, wandb_mode="offline")
        told.write(resumed_at + 1, loss=1.0)
        end(told)
    made = {(run / "wandb-run-id.txt").read_text()} | {records(part, "run")[0].run_id for part in parts(run)}
    assert len(parts(run)) == 3
    assert len(made) == 2


@pytest.mark.parametrize(
    ("mode", "why"), [("offline", "offline as asked"), ("disabled", "disabled by WANDB_MODE, or no answer")]
)
def test_the_mode_of_the_environment_counts_but_never_loses_the_run(
    run: Path, mode: str, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    told = metrics(run, "wandb")
    told.write(1, loss=1.0)
    end(told)
    (line,) = said(capsys)
    assert why in line
    assert rows(parts(run)[-1]) == [{"step": 1, "loss": 1.0}]


def test_wandb_online_gets_it_all_and_knows_a_resumed_run_again(run: Path, grid: Path, server: Server) -> None:
    first = metrics(run, "wandb")
    for step in (1, 2, 3):
        first.write(step, loss=float(step))
    first.picture(3, "preview", grid)
    end(first)
    assert [row["step"] for row in server.rows] == [1, 2, 3, 3]
    assert [name for name in server.files if name.endswith(".png")] == [f"/{server.rows[3]['preview']['path']}"]
    second = metrics(run, "wandb", resumed_at=2)
    second.write(3, loss=3.0)
    end(second)
    assert server.known == (run / "wandb-run-id.txt").read_text()
    assert [row["step"] for row in server.rows] == [1, 2, 3, 3, 3]
    assert all({key: config[key]["value"] for key in CONFIG} == CONFIG for config in server.configs)


def test_without_an_api_key_wandb_goes_on_offline(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = metrics(run, "wandb")
    told.write(1, loss=0.5)
    end(told)
    (line,) = said(capsys)
    assert "No API key configured" in line
    assert line.endswith(f"; the run goes on offline, to upload it later: wandb sync {parts(run)[-1]}")
    assert rows(parts(run)[-1]) == [{"step": 1, "loss": 0.5}]


def test_where_no_server_listens_wandb_goes_on_offline(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("WANDB_BASE_URL", closed)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(tracking, "_START_S", 1)
    began = time.monotonic()
    told = metrics(run, "wandb")
    assert time.monotonic() - began < 20
    told.write(1, loss=0.5)
    end(told)
    (line,) = [line for line in said(capsys) if "goes on" in line]
    assert line.startswith("wandb: CommError: ")
    assert rows(parts(run)[-1]) == [{"step": 1, "loss": 0.5}]


@pytest.mark.slow
def test_a_server_that_never_answers_ends_neither_the_run_nor_its_process_late(run: Path) -> None:
    program = f"""
from pathlib import Path
from flux2_lora.training import tracking
tracking._START_S = tracking._FINISH_S = 2
path, spec = Path({str(run / "metrics.jsonl")!r}), tracking.LoggerSpec(kind="wandb")
metrics = tracking.Metrics(path, spec, name="rome", config={{}}, resumed_at=0)
for step in range(1, 21):
    metrics.write(step, loss=1.0)
metrics.close()
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        environment = os.environ | {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY}
        command = [sys.executable, "-c", program]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.count("; the run goes on offline, to upload it later: wandb sync") == 1
    assert steps(run) == list(range(1, 21))
    assert [row["step"] for row in rows(parts(run)[-1])] == list(range(1, 21))


def test_a_server_that_falls_silent_holds_the_end_up_no_longer_than_said(
    run: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "_FINISH_S", 1)
    told = metrics(run, "wandb")
    server.speaking.clear()
    told.write(1, loss=0.5)
    began = time.monotonic()
    end(told)
    assert time.monotonic() - began < 5
    assert said(capsys) == [f"wandb: the upload did not end in 1 s; to upload the rest: wandb sync {parts(run)[-1]}"]
    assert rows(parts(run)[-1]) == [{"step": 1, "loss": 0.5}]


def test_a_wandb_whose_service_dies_is_said_once(run: Path, grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = metrics(run, "wandb", wandb_mode="offline")
    told.write(1, loss=1.0)
    capsys.readouterr()
    (service,) = [child for child in psutil.Process().children() if "wandb-core" in child.name()]
    service.kill()
    service.wait()
    for step in range(2, 6):
        told.write(step, loss=1.0)
        told.picture(step, "preview", grid)
    told.close()
    (line,) = said(capsys)
    assert line.startswith("wandb: ")
    assert line.endswith("; the run goes on without it, and with metrics.jsonl")
    assert steps(run) == [1, 2, 3, 4, 5]
