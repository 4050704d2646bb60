"""A run that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from flux2_lora import cli

# A run of four steps that looks at nothing on its way.
SHORT = ("max_steps=4", "preview.every=0", "validation.every=4", "batch_size=4", "device=cpu")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of four steps on the demo set, made once, with one preview at each end."""
    outputs = tmp_path_factory.mktemp("trained")
    options = ("train", *SHORT, "preview.every=4", "preview.steps=2", f"output_dir={outputs}", "name=short")
    try:
        cli.main(list(options))
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(f"the run ended with exit code {stop.code}") from stop
    return outputs / "short"
