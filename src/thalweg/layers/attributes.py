"""Attributes of modules without torch's detour."""

from __future__ import annotations

from torch import nn


def find_directly(model: nn.Module) -> None:
    """Let every module of `model`, which is complete, find parameters and submodules as any object its attributes.

    `nn.Module.__getattr__` takes 0.4 us for each, and a step of a small model on a CPU looks up some 160: a tenth of
    its time. A parameter or module that is assigned later takes the place of the one found before. Nothing notices what
    puts new objects into a module otherwise: None for a parameter, `Module.to` and `Module._apply`.
    """
    for module in model.modules():
        module.__dict__.update(module._parameters)
        module.__dict__.update(module._modules)
