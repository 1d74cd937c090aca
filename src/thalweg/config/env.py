"""The only reader of environment variables; each is named here, with what it does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLES = {
    "THALWEG_API_KEY": "the key clients of the server must send; --api-key comes first",
    "THALWEG_CLUSTER_KEY": "the secret of the hosts of one engine (--nnodes), the same on all of them",
    "OMP_NUM_THREADS": "threads of one rank on a CPU; by default by the model's size, at most one per core",
    "THALWEG_LOG_LEVEL": "debug, info, warning or error",
    "HF_HUB_CACHE": "where models are kept that are named OWNER/NAME; HF_HOME/hub if unset",
    "HF_HOME": "the folder of that; ~/.cache/huggingface if unset, or huggingface in XDG_CACHE_HOME",
    "XDG_CACHE_HOME": "see HF_HOME; also where what is compiled for a CPU is kept, in thalweg; ~/.cache if unset",
    "CXX": "the C++ compiler for ops on a CPU, with a launcher and options if need be; c++, g++ or clang++ if unset",
    "TORCHELASTIC_RUN_ID": "set by torchrun: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are then read",
    "CUDA_VISIBLE_DEVICES": "as CUDA reads it; it says which device a GPU is that Ray gives this process",
    "RANK": "see TORCHELASTIC_RUN_ID",
    "WORLD_SIZE": "see TORCHELASTIC_RUN_ID",
    "LOCAL_RANK": "see TORCHELASTIC_RUN_ID",
    "MASTER_ADDR": "see TORCHELASTIC_RUN_ID",
    "MASTER_PORT": "see TORCHELASTIC_RUN_ID",
    "HF_HUB_OFFLINE": "1: models are never downloaded",
}


def read(name: str) -> str | None:
    """The value of one of VARIABLES, None when it is unset or empty. Raises KeyError for any other name."""
    if name not in VARIABLES:
        raise KeyError(name)
    return os.environ.get(name) or None


@contextmanager
def unless_set(**variables: str) -> Iterator[None]:
    """Around a library's call that takes options from the environment alone: what it finds if the user says nothing.
    Other threads see it meanwhile."""
    new = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]


def for_child(**variables: str) -> dict[str, str]:
    """The environment of a child process: this one's, with some variables set."""
    return {**os.environ, **variables}
