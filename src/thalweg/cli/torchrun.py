"""`torchrun ... -m thalweg serve`: each process that torchrun starts is a node of its own."""

from __future__ import annotations

from dataclasses import replace

from thalweg.config import env
from thalweg.config.engine import EngineConfig
from thalweg.errors import ConfigError


def under_torchrun(config: EngineConfig) -> EngineConfig:
    """With the nodes that torchrun's variables tell, if it started this process and the options tell none.

    Ranks are spread evenly over torchrun's processes; those of one host take its devices in turn. torchrun itself
    listens at MASTER_PORT, so node 0 takes the ports after it. Raises ConfigError.
    """
    if env.read("TORCHELASTIC_RUN_ID") is None or config.nnodes > 1:
        return config
    nodes, node, local, port = (_integer(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"))
    address = env.read("MASTER_ADDR") or config.master_addr
    config = replace(config, nnodes=nodes, node_rank=node, master_addr=address, master_port=port + 1)
    if local and config.device in ("auto", "cuda"):
        import torch

        if torch.cuda.is_available():
            return replace(config, device=f"cuda:{local * config.ranks_per_node}")
    return config


def _integer(name: str) -> int:
    value = env.read(name)
    if value is None or not value.isdecimal():
        raise ConfigError(f"{name} is {value!r}; expected the integer that torchrun sets")
    return int(value)
