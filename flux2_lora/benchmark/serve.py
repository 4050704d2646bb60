"""The process that a `Worker` starts: one base with an adapter, and answers to what training on it takes."""

from __future__ import annotations

import json
import sys

import torch

from flux2_lora.benchmark.cases import MODELS
from flux2_lora.benchmark.steps import build
from flux2_lora.benchmark.worker import Answer
from flux2_lora.devices import pick_device


def serve(setting: Answer) -> None:
    """Answer each line of the input until it ends; the base is loaded early where it takes turns, else when asked."""
    device = pick_device("auto")
    model = MODELS[setting["model"]].small() if setting["small"] else MODELS[setting["model"]]
    trained = build(model, setting, device) if setting["early"] else None
    if trained:
        print("{}", flush=True)
    for line in sys.stdin:
        trained = trained or build(model, setting, device)
        try:
            answer = trained.measure(**json.loads(line))
        except torch.OutOfMemoryError:
            answer = {"failed": "memory ran out"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
