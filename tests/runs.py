"""The state of a small run, and steps of it along gradients that are a function of a seed."""

from __future__ import annotations

import torch
from torch import nn

from flux2_lora.adapters import Adapter, trainable
from flux2_lora.families import ModelFamily
from flux2_lora.training.averaging import Ema
from flux2_lora.training.optimizers import OptimizerSpec, grouped, make_optimizer
from flux2_lora.training.state import TrainState


def built(transformer: nn.Module, spec: OptimizerSpec) -> TrainState:
    """The state of a run on an adapted transformer, before its first step."""
    parameters = trainable(transformer)
    ema = Ema(spec.ema_decay, list(parameters.values())) if spec.ema_decay else None
    optimizer = make_optimizer(spec, grouped(spec, "flux2", parameters))
    return TrainState(transformer=transformer, parameters=parameters, optimizer=optimizer, ema=ema)


def step(state: TrainState, seed: int) -> None:
    """One step along gradients that are a function of the seed."""
    noise = torch.Generator().manual_seed(seed)
    for parameter in state.parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=noise)
    state.optimizer.step()
    if state.ema is not None:
        state.ema.update()
    state.step += 1


def adapter_of(state: TrainState, family: ModelFamily) -> Adapter:
    return Adapter(state=state.adapter(), rank=2, alpha=2, targets=["attention", "mlp"], family=family.name)
