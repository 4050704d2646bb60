"""Who looks at what was drawn: two small networks that name the subject and the style of a picture.

They learn from real pictures and never from samples. What they are worth is measured on pictures that they have not
seen: subjects on a whole set of drawings by other hands, styles on every eighth label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from flux2_lora.miniature.icons import DEMOS, STYLES, having, load_pictures
from flux2_lora.miniature.subjects import COMMON

UNSEEN = "emojitwo"
LOOKS = (*STYLES, *(s.style for s in DEMOS))
STEPS, BATCH = 1500, 64
JUDGED_PX = 64  # what tells subjects and styles apart is to be seen at this size


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Networks over pictures [n 3 64 64] in [-1, 1]: logits [n 50] of COMMON, and [n 5] of LOOKS."""

    subject: nn.Module
    look: nn.Module

    def subjects(self, pictures: Sequence[Image.Image]) -> list[str]:
        """The one of COMMON that each picture shows."""
        return [COMMON[i] for i in self._named(self.subject, pictures)]

    def looks(self, pictures: Sequence[Image.Image]) -> list[str]:
        """The one of LOOKS that each picture is drawn in."""
        return [LOOKS[i] for i in self._named(self.look, pictures)]

    def _named(self, network: nn.Module, pictures: Sequence[Image.Image]) -> list[int]:
        with torch.no_grad():
            found: list[int] = network(torch.stack([pixels(p) for p in pictures])).argmax(1).tolist()
        return found


def pixels(picture: Image.Image) -> Tensor:
    """A picture as [3 64 64] in [-1, 1]."""
    small = picture.convert("RGB").resize((JUDGED_PX, JUDGED_PX), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 127.5 - 1


def train_judge(work: Path) -> None:
    """Train both networks, tell what they get right, and write judge.pt."""
    pictures, rows = load_pictures(work)
    pictures = F.interpolate(pictures, size=(JUDGED_PX, JUDGED_PX), mode="bicubic", antialias=True).clamp(-1, 1)
    common = torch.tensor([row.label in COMMON for row in rows])
    unseen = having(rows, styles=[UNSEEN])
    subjects = torch.tensor([COMMON.index(row.label) if row.label in COMMON else -1 for row in rows])
    subject = trained(pictures[common & ~unseen], subjects[common & ~unseen], len(COMMON), much=1.0, recoloured=True)
    print(f"subjects: {right(subject, pictures[common & unseen], subjects[common & unseen]):.3f} right in {UNSEEN}")
    labels = sorted({row.label for row in rows})
    held = torch.tensor([row.label in labels[::8] for row in rows])
    looks = torch.tensor([LOOKS.index(row.style) if row.style in LOOKS else -1 for row in rows])
    seen = having(rows, styles=LOOKS) & ~held
    look = trained(pictures[seen], looks[seen], len(LOOKS), much=0.25, recoloured=False)
    for index, style in enumerate(LOOKS):
        shown = held & (looks == index)
        print(f"style {style}: {right(look, pictures[shown], looks[shown]):.3f} right of {int(shown.sum())} never seen")
    torch.save({"subject": subject.state_dict(), "look": look.state_dict()}, work / "judge.pt")


def load_judge(work: Path) -> Judge:
    state = torch.load(work / "judge.pt", weights_only=True)
    subject, look = make_network(len(COMMON)), make_network(len(LOOKS))
    subject.load_state_dict(state["subject"])
    look.load_state_dict(state["look"])
    return Judge(subject=subject.eval(), look=look.eval())


def make_network(classes: int) -> nn.Sequential:
    """Five strided convolutions and a linear layer."""
    widths = [3, 32, 64, 96, 128, 160]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.GELU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(160 * 4, classes))


def trained(pictures: Tensor, classes: Tensor, count: int, *, much: float, recoloured: bool) -> nn.Module:
    """A network that tells classes [n] of pictures [n 3 h w] apart, disturbed so much: a style is in the details."""
    torch.manual_seed(0)
    network = make_network(count)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        index = torch.randint(len(pictures), (BATCH,), generator=generator)
        shown = disturbed(pictures[index], generator, much)
        if recoloured:
            grey = shown.mean(1, keepdim=True).expand_as(shown)
            shown = torch.where(torch.rand(BATCH, 1, 1, 1, generator=generator) < 0.3, grey, shown)
        loss = F.cross_entropy(network(shown), classes[index], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return network.eval()


def disturbed(pictures: Tensor, generator: torch.Generator, much: float = 1.0) -> Tensor:
    """Pictures [n 3 h w] moved, scaled, turned and flipped, then made soft and noisy as samples are; much: 0 to 1."""
    n = len(pictures)
    draw = torch.rand(n, 5, generator=generator)
    angle, scale = (draw[:, 0] - 0.5) * 0.4 * much, 1 + (draw[:, 1] - 0.5) * 0.4 * much
    shift = (draw[:, 3:] - 0.5) * 0.3 * much
    flip = torch.where(draw[:, 2] < 0.5, -1.0, 1.0)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    moved = torch.stack([cos * flip, -sin, shift[:, 0], sin * flip, cos, shift[:, 1]], 1)
    places = F.affine_grid(moved.view(n, 2, 3), list(pictures.shape), align_corners=False)
    shown = 1 - F.grid_sample(1 - pictures, places, align_corners=False)  # what comes in from outside is white
    soft = F.avg_pool2d(shown, 3, stride=1, padding=1, count_include_pad=False)
    shown = torch.lerp(shown, soft, much * torch.rand(n, 1, 1, 1, generator=generator))
    return shown + 0.08 * much * torch.randn(shown.shape, generator=generator)


def right(network: nn.Module, pictures: Tensor, classes: Tensor) -> float:
    """The part of pictures [n 3 h w] whose class [n] is named."""
    with torch.no_grad():
        named: Tensor = network(pictures).argmax(1)
    return (named == classes).float().mean().item()
