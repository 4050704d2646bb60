"""Where the files beside the library lie; imports nothing, so that the command line can ask at once."""

from __future__ import annotations

from pathlib import Path


def share() -> Path:
    """The folder that holds configs/, data/, train/ and scripts/: the checkout, or flux2_lora/share of a wheel."""
    package = Path(__file__).parent
    installed = package / "share"
    return installed if installed.is_dir() else package.parent
