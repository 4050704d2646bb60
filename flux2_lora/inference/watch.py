"""What a run sees of itself: the loss on held-out pictures, what the base forgets, copies, previews, and the verdict.

Law: looking changes nothing. It goes through the weights that are shown, draws no number that training draws, and what
it concludes is read off metrics.jsonl, so a run that was stopped and went on concludes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from flux2_lora.dataset.pictures import open_picture
from flux2_lora.families import ModelFamily
from flux2_lora.inference.previews import Preview, Previewer
from flux2_lora.networks.features import Features
from flux2_lora.training.averaging import shown
from flux2_lora.training.encoding import CachedSamples
from flux2_lora.training.memorisation import Likeness, latent_features, likeness
from flux2_lora.training.progress import console
from flux2_lora.training.ranking import STOP_AFTER, Row, Verdict, verdict
from flux2_lora.training.shortage import Knob, cause_of, in_words, is_shortage, shortage_told
from flux2_lora.training.state import TrainState
from flux2_lora.training.step import Sample
from flux2_lora.training.tracking import Metrics, read_metrics
from flux2_lora.training.validation import ValidationSpec, validate


@dataclass(kw_only=True)
class Watch:
    """held_out: pictures to validate on, `at_once` together; own: what the base draws by itself; last: the last step.

    training_set: what previews are held against, by `features`; remedies: what would need less memory; rows: the
    evaluations so far.
    """

    family: ModelFamily
    spec: ValidationSpec
    device: torch.device
    last: int
    metrics: Metrics
    previewer: Previewer | None
    held_out: Sequence[Sample]
    own: Sequence[Sample]
    training_set: Likeness | None
    features: Features | None
    remedies: Callable[[], Sequence[Knob]]
    at_once: int
    rows: list[Row] = field(default_factory=list)
    evaluated: bool = False

    @property
    def verdict(self) -> Verdict | None:
        """What the evaluations so far say."""
        return verdict(self.rows)

    @property
    def best_step(self) -> int | None:
        """The step with the lowest validation loss."""
        return self.verdict.best if self.verdict else None

    @property
    def newest_is_best(self) -> bool:
        """Whether this step was evaluated and is the best so far."""
        return self.evaluated and self.best_step == self.rows[-1]["step"]

    @property
    def enough(self) -> bool:
        """Whether `patience` evaluations went by without a new best."""
        found = self.verdict
        return found is not None and 0 < self.spec.patience <= found.since

    @property
    def validation_loss(self) -> float | None:
        """The latest."""
        losses = [row["validation_loss"] for row in self.rows if "validation_loss" in row]
        return losses[-1] if losses else None

    def note(self, state: TrainState, **values: float) -> None:
        """One row a step."""
        skipped = {"skipped": state.skipped} if state.skipped else {}
        self.metrics.write(state.step, **values, **skipped)

    def look(self, state: TrainState) -> None:
        """Validation and preview where their turn has come; RunError where memory runs out in validation."""
        with shortage_told(f"in validation at step {state.step}", self.remedies):
            self._look(state)

    def _look(self, state: TrainState) -> None:
        step, preview = state.step, self.previewer.spec.every if self.previewer else 0
        row: dict[str, float] = {}
        with shown(state.optimizer, state.ema, list(state.parameters.values())):
            if self.held_out and due(step, self.spec.every, self.last):
                row |= self._validated(state)
            if self.previewer is not None and due(step, preview, self.last):
                row |= self._previewed(self.previewer, state)
        if row:
            self.metrics.write(step, **row)
            self.rows.append({"step": step, **row})
        self.evaluated = "validation_loss" in row
        found = self.verdict if self.evaluated else None
        if found is not None and found.since == STOP_AFTER:
            console.print(f"step {step}: validation {row['validation_loss']:.3f}; {found.words}")

    def _validated(self, state: TrainState) -> dict[str, float]:
        found = validate(self.family, state.transformer, self.held_out, self.spec.sigmas, self.device, self.at_once)
        if not self.own:
            return found.row()
        own = validate(self.family, state.transformer, self.own, self.spec.sigmas, self.device, self.at_once)
        return {**found.row(), "base_style_loss": own.mean}

    def _previewed(self, previewer: Previewer, state: TrainState) -> dict[str, float]:
        """A preview that fails is said, and does not end the run."""
        try:
            preview = previewer.draw(state.transformer, state.step)
        except (OSError, RuntimeError, MemoryError) as error:
            short = is_shortage(error)
            if not short and not isinstance(error, OSError):
                raise
            remedy = f"; {in_words(self.remedies())}" if short else ""
            console.print(f"no preview at step {state.step}: {cause_of(error)}{remedy}")
            return {}
        self.metrics.picture(state.step, "preview", preview.grid)
        return {} if self.training_set is None else {"nearest": self._nearest(self.training_set, preview)}

    def _nearest(self, training_set: Likeness, preview: Preview) -> float:
        """The mean likeness of the preview's pictures to their nearest training pictures."""
        if self.features is None:
            features = latent_features(list(preview.latents))
        else:
            features = self.features([Image.open(file) for file in preview.pictures])
        return float(training_set.nearest(features).mean())


def training_set_of(samples: CachedSamples, features: Features | None) -> Likeness:
    """The training pictures, to tell copies of them by. features: what compares them; None for VAE latents."""
    records = {item.record: place for place, item in enumerate(samples.items)}
    if features is None:
        return likeness(latent_features([samples.still(place).latents for place in records.values()]))
    return likeness(features([open_picture(record.path).image for record in records]))


def evaluations(metrics: Path) -> list[Row]:
    """What a run has measured so far, beside the steps that it took."""
    return [row for row in read_metrics(metrics) if "loss" not in row]


def due(step: int, every: int, last: int) -> bool:
    """At step 0, every `every` steps and at the end; never where `every` is 0."""
    return every > 0 and (step % every == 0 or step == last)
