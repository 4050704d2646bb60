"""What a run learned from, written down beside it: enough to tell later whether a folder is the same.

Law: no picture, name of a file or caption is told: pictures and captions are digests. Only the frequency of tags, which
managers show as the words that a LoRA knows, tells what captions say; `Learned.strict` leaves it out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from flux2_lora.dataset import Record
from flux2_lora.errors import listed
from flux2_lora.files import digest, write_text

FILE = "learned.json"
_MOST_PICTURES, _MOST_TAGS, _SHORT = 2000, 400, 12


@dataclass(frozen=True, kw_only=True)
class Learned:
    """pictures: (digest of the file, digest of its texts) of each, none where there are more than 2000.

    held_out: how many validation has; tags: source -> tag -> how many captions have it; digest: of all pictures.
    """

    count: int
    held_out: int
    digest: str
    pictures: tuple[tuple[str, str], ...] = ()
    tags: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def strict(self, trigger: str | None) -> Learned:
        """The same without what captions say, digests of them included, and what folders are called."""
        known = tuple((picture, "") for picture, _ in self.pictures)
        return replace(self, pictures=known, tags={trigger: {trigger: self.count}} if trigger else {})


def learned_from(training: Sequence[Record], held_out: Sequence[Record]) -> Learned:
    """What these records are, in no order."""
    pictures = sorted(_marks(record) for record in training)
    tags: dict[str, Counter[str]] = {}
    for record in training:
        words = dict.fromkeys(word.strip() for word in record.caption.split(",") if word.strip())
        tags.setdefault(Path(record.source.name).name, Counter()).update(words.keys())
    return Learned(
        count=len(training),
        held_out=len(held_out),
        digest=digest(*(part for marks in pictures for part in marks)),
        pictures=tuple(pictures) if len(pictures) <= _MOST_PICTURES else (),
        tags={source: dict(counts.most_common(_MOST_TAGS)) for source, counts in tags.items()},
    )


def differences(before: Learned, training: Sequence[Record], held_out: Sequence[Record]) -> list[str]:
    """How these records differ from those that a run learned from, a line each; empty where they are the same."""
    now = learned_from(training, held_out)
    if now.digest == before.digest:
        return []
    if not before.pictures:
        return [f"the pictures or captions differ from those of then ({before.count} then, {now.count} now)"]
    then = dict(before.pictures)
    here = {_marks(record)[0]: record for record in training}
    new = [record.name for mark, record in here.items() if mark not in then]
    recaptioned = [record.name for mark, record in here.items() if then.get(mark) and _marks(record)[1] != then[mark]]
    gone = len(then.keys() - here.keys())
    lines = [f"{len(new)} pictures are new: {listed(new)}"] if new else []
    lines += [f"{gone} of the {before.count} pictures of then are not here"] if gone else []
    lines += [f"{len(recaptioned)} have another caption: {listed(recaptioned)}"] if recaptioned else []
    told = all(then.values())  # a private card tells of captions only that something differs
    return lines or [f"the same pictures, with other {'repeats' if told else 'captions or repeats'}"]


def save_learned(run: Path, learned: Learned) -> None:
    write_text(run / FILE, json.dumps(asdict(learned), ensure_ascii=False) + "\n")


def read_learned(run: Path) -> Learned | None:
    """What `save_learned` wrote; None where a run has not, or it is damaged."""
    try:
        return learned_of(json.loads((run / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def learned_of(content: Mapping[str, Any]) -> Learned:
    """Of what `dataclasses.asdict` made, by way of JSON; KeyError or TypeError for anything else."""
    pictures = tuple((str(picture), str(texts)) for picture, texts in content["pictures"])
    return Learned(**{**content, "pictures": pictures})


def _marks(record: Record) -> tuple[str, str]:
    return record.digest[:_SHORT], digest(*record.texts)[:_SHORT]
