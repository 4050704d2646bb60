"""Rectified flow: the straight path between a picture and noise, and how often each point of it is trained.

    x(sigma) = (1 - sigma) z + sigma eps,    velocity = dx / dsigma = eps - z

Liu et al. 2022 (arXiv:2209.03003); densities and shift after Esser et al. 2024 (arXiv:2403.03206).
Randomness is a function of (seed, step, sample): `generator` makes a stream from such a key, nothing is carried along.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor
from torch.nn import functional as F

from flux2_lora.options import option

# FLUX.1 trained with mu linear in the number of packed tokens; FLUX.2's authors confirm it for fine-tuning.
_TOKENS, _MU = (256, 4096), (0.5, 1.15)
_NORMAL = NormalDist()


WEIGHTINGS = ("none", "sigma_sqrt", "cosmap")


@dataclass(frozen=True, kw_only=True)
class TimestepSpec:
    """Density of noise levels in training: of sigmoid(N(mean, std)), or uniform; then moved by the model's shift.

    min_sigma, max_sigma: the density is cut to this range, after the shift, and keeps its form inside.
    """

    density: str = option("logit_normal", one_of=("logit_normal", "uniform"))
    mean: float = 0.0
    std: float = option(1.0, above=0)
    shift: bool = True
    min_sigma: float = option(0.0, at_least=0, at_most=1)
    max_sigma: float = option(1.0, above=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """kind: mse or huber, which is linear beyond huber_delta; weighting: of noise levels, see `loss_weights`.

    preserve: weight of differential output preservation, 0 for none: the adapted model is held to the base's velocity
    on captions that say preserve_class where they said the trigger word.
    """

    kind: str = option("mse", one_of=("mse", "huber"))
    huber_delta: float = option(1.0, above=0)
    weighting: str = option("none", one_of=WEIGHTINGS)
    preserve: float = option(0.0, at_least=0)
    preserve_class: str = "picture"

    @property
    def delta(self) -> float | None:
        """Where the loss turns linear, None for never."""
        return self.huber_delta if self.kind == "huber" else None

    @property
    def preserved_class(self) -> str | None:
        """What stands for the trigger word in captions to preserve the base on, None where none are."""
        return self.preserve_class if self.preserve else None


def generator(*key: int | str) -> torch.Generator:
    """A CPU random stream that is a function of its key alone: same key, same numbers, in any process."""
    hashed = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(hashed[:8], "little") >> 1)


def linear_mu(tokens: int) -> float:
    """Shift exponent for training: 0.5 at 256 packed tokens, 1.15 at 4096, linear between and beyond."""
    return _MU[0] + (tokens - _TOKENS[0]) * (_MU[1] - _MU[0]) / (_TOKENS[1] - _TOKENS[0])


def shift_sigmas(sigmas: Tensor, mu: float) -> Tensor:
    """Move noise levels towards 1 for larger images.

    sigmas: [n] in [0, 1]; returns [n] in [0, 1], order kept, 0 and 1 fixed.
    Esser et al. 2024 (arXiv:2403.03206), eq. 23, with e^mu = sqrt(m / n).
    """
    stretch = math.exp(mu)
    return stretch * sigmas / (1 + (stretch - 1) * sigmas)


def draw_sigma(spec: TimestepSpec, mu: float, stream: torch.Generator) -> float:
    """One noise level in (0, 1) from the density of `spec`, shifted by mu where the spec says so."""
    low, high = (part_below(spec, mu, sigma) for sigma in (spec.min_sigma, spec.max_sigma))
    part = _NORMAL.cdf(float(torch.randn(1, generator=stream)))
    return sigma_above(spec, mu, low + (high - low) * part)


def sigma_above(spec: TimestepSpec, mu: float, part: float) -> float:
    """The noise level that has `part`, in (0, 1), of the density below it, before that is cut to a range."""
    level = part
    if spec.density == "logit_normal":
        level = 1 / (1 + math.exp(-(spec.mean + spec.std * _NORMAL.inv_cdf(part))))
    return _shifted(level, mu) if spec.shift else level


def part_below(spec: TimestepSpec, mu: float, sigma: float) -> float:
    """The part of the density, before it is cut to a range, that lies below sigma: the inverse of `sigma_above`."""
    level = _shifted(sigma, -mu) if spec.shift else sigma
    if spec.density == "uniform" or level in (0, 1):
        return level
    return _NORMAL.cdf((math.log(level / (1 - level)) - spec.mean) / spec.std)


def _shifted(sigma: float, mu: float) -> float:
    """`shift_sigmas` of one number."""
    stretch = math.exp(mu)
    return stretch * sigma / (1 + (stretch - 1) * sigma)


def loss_weights(weighting: str, sigmas: Tensor) -> Tensor:
    """What the squared error at each noise level counts, [b] -> [b].

    none: 1; sigma_sqrt: sigma^-2; cosmap: 2 / (pi (1 - 2 sigma + 2 sigma^2)). Esser et al. 2024 (arXiv:2403.03206),
    section 3.1, under the names that SD3's trainers gave them.
    """
    if weighting == "sigma_sqrt":
        return sigmas.square().reciprocal()
    if weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas.square()))
    return torch.ones_like(sigmas)


def mix(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """x at noise level sigma. latents, noise: [b c h w]; sigmas: [b]."""
    level = sigmas.view(-1, 1, 1, 1)
    return (1 - level) * latents + level * noise


def raise_noise(x: Tensor, sigma: float, to: float, noise: Tensor) -> Tensor:
    """x at noise level sigma < 1, taken to the higher level `to`. x and fresh standard normal noise: [b c h w]."""
    kept = (1 - to) / (1 - sigma)
    return kept * x + math.sqrt(max(to**2 - (kept * sigma) ** 2, 0.0)) * noise


def velocity_error(
    predicted: Tensor, target: Tensor, mask: Tensor | None = None, *, delta: float | None = None
) -> Tensor:
    """Mean squared error of every sample, in float32, to its target, noise - latents. [b c h w] x 2 -> [b].

    mask: [b 1 h w], what each place counts; its own scale does not matter, and a mask of zeros gives 0. delta: errors
    beyond it count linearly, with the slope at it (Huber 1964).
    """
    if delta is None:
        error = (predicted.float() - target.float()).square()
    else:
        error = 2 * F.huber_loss(predicted.float(), target.float(), reduction="none", delta=delta)
    if mask is None:
        return error.mean(dim=(1, 2, 3))
    total = mask.sum(dim=(1, 2, 3)).clamp_min(1e-6)
    return (error.mean(dim=1, keepdim=True) * mask).sum(dim=(1, 2, 3)) / total
