"""That modules whose parameters are found directly behave as before."""

from __future__ import annotations

import torch
from torch import nn

from thalweg.layers.attributes import find_directly


def model() -> nn.Module:
    outer = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    find_directly(outer)
    return outer


def test_parameters_and_submodules_are_found_without_getattr() -> None:
    outer = model()
    for module in outer.modules():
        for name in (*module._parameters, *module._modules):
            assert module.__dict__[name] is getattr(module, name)


def test_what_is_assigned_later_is_found_everywhere() -> None:
    outer = model()
    linear = outer[0]
    linear.weight = nn.Parameter(torch.zeros(3, 3))
    linear.bias = nn.Parameter(torch.ones(3))
    assert linear.weight is linear._parameters["weight"]
    assert (linear(torch.ones(2, 3)) == 1).all()
    outer[1] = nn.Identity()
    assert (outer(torch.ones(2, 3)) == 1).all()
    assert dict(outer.named_parameters())["0.weight"] is linear.weight


def test_values_filled_in_place_are_seen() -> None:
    outer = model()
    with torch.no_grad():
        for parameter in outer.parameters():
            parameter.fill_(2.0)
    assert (outer[0].weight == 2).all()
