"""The objective: shares of a batch, noise by place, densities, weightings, Huber, and the base's output preserved."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from flux2_lora.adapters import AdapterSpec, attach, lora_layers, state_of, trainable
from flux2_lora.conditioning import Conditioning
from flux2_lora.families import ModelFamily
from flux2_lora.flow import (
    LossSpec,
    TimestepSpec,
    draw_sigma,
    generator,
    loss_weights,
    part_below,
    shift_sigmas,
    sigma_above,
    velocity_error,
)
from flux2_lora.training.report import estimate, noise_levels
from flux2_lora.training.step import Draws, Sample, average_gradients, share_of, training_loss
from tests.conftest import drawn

DENSITIES = [
    TimestepSpec(),
    TimestepSpec(density="uniform"),
    TimestepSpec(mean=0.5, std=0.7, shift=False),
    TimestepSpec(min_sigma=0.2, max_sigma=0.6),
    TimestepSpec(density="uniform", shift=False, min_sigma=0.5),
]


def samples(count: int, *, preserved: bool = False) -> list[Sample]:
    noise = torch.Generator().manual_seed(0)
    texts = torch.randn(2 * count, 1, 5, 24, generator=noise)
    return [
        Sample(
            latents=torch.randn(128, 2, 3, generator=noise),
            conditioning=Conditioning(embeds=texts[place]),
            mask=torch.ones(1, 2, 3),
            key=str(place),
            preserved=Conditioning(embeds=texts[count + place]) if preserved else None,
        )
        for place in range(count)
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_each_picture_of_a_batch_once(count: int, processes: int) -> None:
    batch = [(index, 0) for index in range(count)]
    shares = [share_of(batch, rank, processes) for rank in range(processes)]
    counted = [item for share in shares if share.counts for item in share.items]
    assert sorted(counted) == batch
    assert all(share.items for share in shares)
    assert sum(share.size for share in shares) == pytest.approx(count)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_the_mean_of_the_shares_losses_is_the_loss_of_the_batch(
    family: ModelFamily, transformer: nn.Module, count: int
) -> None:
    whole = samples(count)
    draws, batch = Draws(family=family, density=TimestepSpec(), seed=0), [(index, 0) for index in range(count)]

    def loss(rank: int, processes: int) -> Tensor:
        share = share_of(batch, rank, processes)
        return training_loss(family, transformer, draws.of([whole[index] for index, _ in share.items], share, 3))

    with torch.no_grad():
        torch.testing.assert_close((loss(0, 2) + loss(1, 2)) / 2, loss(0, 1), rtol=1e-5, atol=1e-6)


def test_gradients_are_averaged_in_their_own_shapes() -> None:
    parameters = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4))]
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, float(number + 1))
    average_gradients(parameters, lambda flat: flat / 2)
    assert [parameter.grad.unique().tolist() for parameter in parameters if parameter.grad is not None] == [
        [0.5],
        [1.0],
    ]


@pytest.mark.parametrize("spec", DENSITIES)
def test_drawn_noise_levels_have_the_density_and_stay_in_the_range(spec: TimestepSpec) -> None:
    levels = torch.tensor([draw_sigma(spec, 0.8, generator("density", number)) for number in range(4000)])
    assert levels.min() >= spec.min_sigma
    assert levels.max() <= spec.max_sigma
    low, high = (part_below(spec, 0.8, edge) for edge in (spec.min_sigma, spec.max_sigma))
    for part in (0.1, 0.5, 0.9):
        level = sigma_above(spec, 0.8, low + part * (high - low))
        assert float((levels < level).float().mean()) == pytest.approx(part, abs=0.03)


@pytest.mark.parametrize("spec", DENSITIES)
def test_the_part_below_is_the_inverse_of_the_level_above(spec: TimestepSpec) -> None:
    parts = [0.01, 0.2, 0.5, 0.77, 0.99]
    assert [part_below(spec, 1.1, sigma_above(spec, 1.1, part)) for part in parts] == pytest.approx(parts)


def test_a_density_that_is_not_cut_is_a_shifted_logit_normal() -> None:
    for number in range(20):
        normal = torch.randn(1, generator=generator("plain", number))
        expected = float(shift_sigmas(torch.sigmoid(0.3 + 0.9 * normal), 0.7))
        assert draw_sigma(TimestepSpec(mean=0.3, std=0.9), 0.7, generator("plain", number)) == pytest.approx(expected)


def test_weightings_are_their_formulas() -> None:
    levels = torch.tensor([0.25, 0.5])
    assert loss_weights("none", levels).tolist() == [1, 1]
    assert loss_weights("sigma_sqrt", levels).tolist() == [16, 4]
    cosmap = [2 / (math.pi * (1 - 2 * level + 2 * level**2)) for level in (0.25, 0.5)]
    assert loss_weights("cosmap", levels).tolist() == pytest.approx(cosmap)


def test_huber_is_the_square_near_zero_and_straight_beyond_delta() -> None:
    target = torch.zeros(3, 1, 1, 1)
    errors = velocity_error(torch.tensor([0.5, 2.0, 3.0]).view(3, 1, 1, 1), target, delta=1.0)
    assert errors.tolist() == pytest.approx([0.25, 3.0, 5.0])


def test_the_weighting_and_the_kind_of_loss_reach_the_loss(family: ModelFamily, transformer: nn.Module) -> None:
    batch = drawn(family, samples(2))
    specs = [LossSpec(), LossSpec(weighting="cosmap"), LossSpec(kind="huber", huber_delta=0.1)]
    with torch.no_grad():
        losses = [float(training_loss(family, transformer, batch, spec)) for spec in specs]
    assert len(set(losses)) == 3


def adapted(transformer: nn.Module) -> nn.Module:
    attach(transformer, "flux2", AdapterSpec(rank=2), seed=0)
    for _, layer in lora_layers(transformer):
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)  # type: ignore[arg-type]
    return transformer


def test_preserving_costs_nothing_before_the_adapter_has_moved(family: ModelFamily, transformer: nn.Module) -> None:
    attach(transformer, "flux2", AdapterSpec(rank=2), seed=0)
    batch = drawn(family, samples(2, preserved=True))
    with torch.no_grad():
        plain, held = (training_loss(family, transformer, batch, LossSpec(preserve=weight)) for weight in (0.0, 2.0))
    assert float(held) == pytest.approx(float(plain), rel=1e-6)


def test_preserving_pulls_the_adapted_output_back_to_the_base(family: ModelFamily, transformer: nn.Module) -> None:
    """Its gradient lowers the distance to the base's velocity on the other caption."""
    adapted(transformer)
    batch = drawn(family, samples(2, preserved=True))
    losses = [training_loss(family, transformer, batch, LossSpec(preserve=weight)) for weight in (0.0, 1.0)]
    parameters = list(trainable(transformer).values())
    gradients = torch.autograd.grad(losses[1] - losses[0], parameters)
    distance = (losses[1] - losses[0]).detach()
    assert distance > 0
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(0.01 * distance / sum(g.square().sum() for g in gradients) * gradient)
        after = [training_loss(family, transformer, batch, LossSpec(preserve=weight)) for weight in (0.0, 1.0)]
    assert after[1] - after[0] < distance


def test_looking_at_the_base_moves_no_number_of_the_adapter(family: ModelFamily, transformer: nn.Module) -> None:
    adapted(transformer)
    before = state_of(transformer)
    training_loss(family, transformer, drawn(family, samples(2, preserved=True)), LossSpec(preserve=1.0)).backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in state_of(transformer).items())
    assert all(parameter.grad is not None for parameter in trainable(transformer).values())


def test_the_weight_of_a_picture_is_what_its_loss_counts(family: ModelFamily, transformer: nn.Module) -> None:
    one, other = samples(2)
    with torch.no_grad():
        single = float(training_loss(family, transformer, drawn(family, [one])))
        doubled = float(training_loss(family, transformer, drawn(family, [replace(one, weight=2.0)])))
    assert doubled == pytest.approx(2 * single, rel=1e-5)
    assert other.weight == 1


def test_the_histogram_tells_where_the_density_lies() -> None:
    shown = noise_levels(TimestepSpec(min_sigma=0.5), 0.0)
    bars = shown.removeprefix("0 ").partition(" 1,")[0]
    assert len(bars) == 16
    assert bars[:8].strip() == ""
    assert "█" in bars[8:]
    assert noise_levels(TimestepSpec(), 0.0).endswith("median 0.50")


def test_the_estimate_is_in_words_that_people_use() -> None:
    assert estimate(0.5, 100, 2**30) == "0.50 s a step, 50 s for 100 steps, 1.0 GiB"
    assert "25 min" in estimate(1.5, 1000, 0)
    assert "2.5 h" in estimate(9, 1000, 0)
