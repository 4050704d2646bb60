"""Personal pictures and captions, read once and checked before anything is trained.

Law: `scan` decodes every picture by the very function that training uses, so a picture that it accepts cannot fail
later, and every file that it leaves out has a reason a person can act on. Records are known by their content, not by
name or date.
"""

from flux2_lora.dataset.scan import Mask, Record, Scan, preview_prompts, scan, trigger_words
from flux2_lora.dataset.spec import DatasetSpec, SourceSpec

__all__ = ["DatasetSpec", "Mask", "Record", "Scan", "SourceSpec", "preview_prompts", "scan", "trigger_words"]
