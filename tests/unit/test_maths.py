"""Laws of flow, samplers and latent geometry."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flux2_lora import latents as geometry
from flux2_lora.flow import (
    TimestepSpec,
    draw_sigma,
    generator,
    linear_mu,
    mix,
    raise_noise,
    shift_sigmas,
    velocity_error,
)
from flux2_lora.inference.edit import keep_outside
from flux2_lora.samplers import SAMPLERS, Filling, empirical_mu, euler, from_level, from_strength, guided, schedule
from flux2_lora.tiles import tiled


@given(mu=st.floats(-3, 3))
def test_a_shift_keeps_the_order_and_the_ends(mu: float) -> None:
    moved = shift_sigmas(torch.linspace(0, 1, 11), mu)
    assert moved[0] == 0
    assert moved[-1] == pytest.approx(1)
    assert (moved.diff() > 0).all()


def test_the_shift_for_training_counts_packed_tokens_as_flux_does() -> None:
    assert linear_mu(256) == pytest.approx(0.5)
    assert linear_mu(4096) == pytest.approx(1.15)


def test_the_shift_for_inference_has_the_measured_values() -> None:
    assert empirical_mu(4096, 50) == pytest.approx(2.02, abs=0.01)
    assert empirical_mu(4096, 4) == pytest.approx(2.29, abs=0.01)
    assert empirical_mu(1024, 50) == pytest.approx(1.70, abs=0.01)


def test_euler_is_exact_on_a_straight_path() -> None:
    picture, noise = torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3)
    ended = euler(lambda x, sigma: noise - picture, noise, schedule(4, 1.3))
    torch.testing.assert_close(ended, picture, atol=1e-5, rtol=1e-5)


def test_guidance_of_one_is_the_prompt_and_of_zero_the_negative() -> None:
    x = torch.zeros(1)
    for scale, expected in ((0.0, -1.0), (1.0, 2.0), (3.0, 8.0)):
        velocity = guided(lambda x, s: torch.full_like(x, 2.0), lambda x, s: torch.full_like(x, -1.0), scale)
        assert velocity(x, 0.5).item() == pytest.approx(expected)


def test_strength_one_runs_the_whole_schedule_and_a_half_its_second_half() -> None:
    sigmas = schedule(10, 0.5)
    assert torch.equal(from_strength(sigmas, 1.0), sigmas)
    assert torch.equal(from_strength(sigmas, 0.5), sigmas[5:])


def test_a_stream_is_a_function_of_its_key() -> None:
    first, again = torch.randn(3, generator=generator(1, "a")), torch.randn(3, generator=generator(1, "a"))
    assert torch.equal(first, again)
    assert not torch.equal(first, torch.randn(3, generator=generator(1, "b")))


def test_noise_levels_follow_the_shifted_logit_normal_density() -> None:
    stream = generator("density")
    drawn = torch.tensor([draw_sigma(TimestepSpec(), 0.5, stream) for _ in range(4000)])
    median = math.exp(0.5) / (1 + math.exp(0.5))
    assert (drawn < median).float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_the_right_velocity_has_no_error() -> None:
    picture, noise = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    assert torch.equal(velocity_error(noise - picture, noise - picture), torch.zeros(2))
    assert torch.equal(mix(picture, noise, torch.tensor([0.0, 1.0])), torch.stack([picture[0], noise[1]]))


def test_patches_tokens_and_statistics_come_back() -> None:
    raw = torch.randn(2, 32, 8, 6)
    mean, var = torch.randn(128), torch.rand(128) + 0.5
    latents = geometry.normalise(geometry.patchify(raw), mean, var, 1e-4)
    tokens = geometry.pack(latents)
    assert tokens.shape == (2, 12, 128)
    back = geometry.unpatchify(geometry.denormalise(geometry.unpack(tokens, 4, 3), mean, var, 1e-4))
    torch.testing.assert_close(back, raw, atol=1e-5, rtol=1e-5)


def test_heun_is_of_second_order_where_euler_is_of_first() -> None:
    """On v = x the exact end of a path from 1 to 0 is x / e."""
    x, ends = torch.ones(1, 1, 1, 1, dtype=torch.float64), {}
    for name, sampler in SAMPLERS.items():
        errors = [float(sampler(lambda x, _: x, x, torch.linspace(1, 0, n + 1), None) - x / math.e) for n in (20, 40)]
        ends[name] = abs(errors[0] / errors[1])
    assert ends["euler"] == pytest.approx(2, rel=0.1)
    assert ends["heun"] > 2.5  # the Euler step to 0 counts less and less


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_returns_the_picture_from_its_true_velocity(sampler: str) -> None:
    picture, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for strength in (0.0, 0.3, 1.0):
        sigmas = from_strength(schedule(7, 1.1), strength)
        start = mix(picture, noise, sigmas[:1].expand(2))
        end = SAMPLERS[sampler](lambda _x, _s: noise - picture, start, sigmas, None)
        torch.testing.assert_close(end, picture, atol=1e-5, rtol=0)


@given(sigma=st.floats(0, 0.99), further=st.floats(0, 1))
def test_noise_is_raised_to_what_a_picture_has_at_the_higher_level(sigma: float, further: float) -> None:
    """Of a picture z and independent noises of variance 1: z counts 1 - to, and the noises to^2 together."""
    to, nothing, one = sigma + (1 - sigma) * further, torch.zeros(1), torch.ones(1)
    z = raise_noise((1 - sigma) * one, sigma, to, nothing)
    first, second = raise_noise(sigma * one, sigma, to, nothing), raise_noise(nothing, sigma, to, one)
    assert z.item() == pytest.approx(1 - to, abs=1e-5)
    assert first.square().item() + second.square().item() == pytest.approx(to**2, abs=1e-5)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_what_is_put_back_is_heeded_by_steps_taken_again_and_by_bent_ones(sampler: str) -> None:
    """Two values that are nearly the same, one of them known: the other one is drawn near to it, from any noise."""
    precision, known, steps = 0.999, 2.0, schedule(20, 1.0)
    covariance = torch.tensor([[1, precision], [precision, 1]])

    def velocity(x: Tensor, sigma: float) -> Tensor:
        """Of the mean of all pictures that x may be: noise - picture."""
        of_x = (1 - sigma) ** 2 * covariance + sigma**2 * torch.eye(2)
        return (x.flatten(1) @ torch.linalg.solve(of_x, sigma * torch.eye(2) - (1 - sigma) * covariance)).view_as(x)

    noise, mask = torch.randn(500, 1, 1, 2, generator=generator("two values")), torch.tensor([[[[0.0, 1.0]]]])
    pictures = torch.tensor([[[[known, 0.0]]]])  # what is hidden must not count

    def off(fill: Filling) -> float:
        taken = fill.sampler(SAMPLERS[sampler], mask, pictures, 0)
        drawn = taken(velocity, noise, steps, keep_outside(mask, pictures, noise))
        return float((drawn[..., 1] - known).abs().mean())

    usual = SAMPLERS[sampler](velocity, noise, steps, keep_outside(mask, pictures, noise))
    assert off(Filling()) == float((usual[..., 1] - known).abs().mean())
    assert off(Filling(resample=8)) < 0.5 * off(Filling())
    assert off(Filling(reconstruction=True)) < 0.25 * off(Filling())
    assert off(Filling(resample=4, reconstruction=True)) < 0.4 * off(Filling())


def test_nothing_is_bent_where_nothing_is_kept() -> None:
    noise, steps, pictures = torch.randn(2, 3, 4, 4), schedule(5, 1.0), torch.randn(1, 3, 4, 4)
    new = Filling(reconstruction=True).sampler(euler, torch.ones(1, 1, 4, 4), pictures, 0)
    drawn = new(lambda x, sigma: sigma * x.sin(), noise, steps, None)
    assert torch.equal(drawn, euler(lambda x, sigma: sigma * x.sin(), noise, steps, None))
    assert not drawn.requires_grad


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 21), (30, 13), (5, 40)])
def test_tiles_of_a_velocity_that_is_local_are_the_whole(height: int, width: int) -> None:
    sizes = []

    def local(x: Tensor, sigma: float) -> Tensor:
        sizes.append(x.shape[2:])
        return sigma * x.sin()

    x = torch.randn(2, 3, height, width)
    torch.testing.assert_close(tiled(local, 8, 2)(x, 0.5), local(x, 0.5))
    assert all(tall <= 8 and wide <= 8 for tall, wide in sizes[:-1])


def test_tiles_that_disagree_fade_into_each_other() -> None:
    def contrary(x: Tensor, _sigma: float) -> Tensor:
        return torch.full_like(x, float(x[..., 0, 0].mean()))

    x = torch.arange(14.0).expand(1, 1, 8, 14)
    found = tiled(contrary, 8, 2)(x, 1.0)[0, 0, 0]
    assert found[0] == 0
    assert found[-1] == pytest.approx(6)
    assert (found.diff() >= 0).all()
    assert found.diff().max() < 4


def test_refining_starts_at_its_level_and_takes_its_part_of_the_steps() -> None:
    torch.testing.assert_close(from_level(20, 0.35), torch.linspace(0.35, 0, 8))
    assert from_level(4, 0.1).tolist() == pytest.approx([0.1, 0.0])
    assert not from_level(20, 0.0).any()
