"""A ComfyUI server on this machine: started from a checkout, asked as its editor asks it, with a folder of its own.

Nothing of ComfyUI is imported here or stands in this repository; all goes through its HTTP interface.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CHECKOUT, PYTHON = "FLUX2_LORA_COMFYUI", "FLUX2_LORA_COMFYUI_PYTHON"
_FOLDERS = ("diffusion_models", "vae", "loras", "text_encoders")
_START_S, _DRAW_S = 300, 300


class RefusedError(Exception):
    """What /prompt finds wrong with a graph: number of a node -> its errors."""

    def __init__(self, answer: Mapping[str, Any]) -> None:
        super().__init__(json.dumps(answer))
        self.nodes: Mapping[str, list[Mapping[str, Any]]] = {
            number: found["errors"] for number, found in answer["node_errors"].items()
        }


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """picture: [h w 3] in 0..255; log: what ComfyUI wrote meanwhile."""

    picture: np.ndarray[Any, Any]
    log: str


@dataclass(frozen=True, kw_only=True)
class Server:
    """folder: where it looks for models/, input/ and writes output/."""

    folder: Path
    address: str
    log: Path

    def ask(self, path: str, content: Any = None) -> Any:
        """The answer to a GET, or to a POST of JSON."""
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(f"{self.address}/{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def draw(self, graph: Mapping[str, Any]) -> Drawn:
        """Run a graph with one SaveImage; RefusedError where validation fails, RuntimeError where a node does."""
        start = self.log.stat().st_size
        try:
            number = self.ask("prompt", {"prompt": graph})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise RefusedError(json.load(error)) from error
        done = self._awaited(number)
        with self.log.open(errors="replace") as file:
            file.seek(start)
            log = file.read()
        if done["status"]["status_str"] != "success":
            raise RuntimeError(json.dumps(done["status"], indent=1))
        [output] = done["outputs"].values()
        [image] = output["images"]
        path = self.folder / "output" / image["subfolder"] / image["filename"]
        return Drawn(picture=np.asarray(Image.open(path)).astype(float), log=log)

    def _awaited(self, number: str) -> Any:
        for _ in range(_DRAW_S * 10):
            history = self.ask(f"history/{number}")
            if number in history:
                return history[number]
            time.sleep(0.1)
        raise TimeoutError(self.log.read_text(errors="replace")[-4000:])


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    """A server in float32 on the CPU, with the stand-in for text encoders; ends with the block."""
    checkout = Path(os.environ[CHECKOUT])
    for name in _FOLDERS:
        (folder / "models" / name).mkdir(parents=True)
    for name in ("custom_nodes", "input", "output", "user", "web"):
        (folder / name).mkdir()
    shutil.copy(Path(__file__).with_name("comfyui_texts.py"), folder / "custom_nodes")
    (folder / "web" / "index.html").touch()  # its editor is a package of its own, and not needed
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        *("--cpu", "--force-fp32", "--disable-api-nodes", "--disable-metadata", "--cache-none"),
        *("--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(folder)),
        *("--front-end-root", str(folder / "web"), "--database-url", f"sqlite:///{folder / 'user' / 'comfyui.db'}"),
    ]
    log = folder / "log.txt"
    with log.open("wb") as out:
        command = [os.environ.get(PYTHON, sys.executable), str(checkout / "main.py"), *options]
        process = subprocess.Popen(command, cwd=checkout, stdout=out, stderr=subprocess.STDOUT, env=_environment())
    try:
        server = Server(folder=folder, address=f"http://127.0.0.1:{port}", log=log)
        _await_start(server, process)
        yield server
    finally:
        process.terminate()
        process.wait()


def _environment() -> dict[str, str]:
    """Ours without the path to our modules: ComfyUI has top-level names of its own, such as utils and tests."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _await_start(server: Server, process: subprocess.Popen[bytes]) -> None:
    for _ in range(_START_S * 2):
        if process.poll() is not None:
            break
        try:
            server.ask("system_stats")
        except urllib.error.URLError:
            time.sleep(0.5)
        else:
            return
    raise RuntimeError(f"ComfyUI does not start:\n{server.log.read_text(errors='replace')[-4000:]}")
