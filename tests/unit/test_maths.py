"""Laws of flow, samplers and latent geometry."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flux2_lora import latents as geometry
from flux2_lora.flow import TimestepSpec, draw_sigma, generator, linear_mu, mix, shift_sigmas, velocity_error
from flux2_lora.samplers import empirical_mu, euler, from_strength, guided, schedule


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
