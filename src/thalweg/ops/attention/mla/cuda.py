"""mla_prefill with attention in CUDA C++."""

from functools import partial

from thalweg.ops.attention.mla.expanded import prefill_by
from thalweg.ops.attention.prompt_cuda import attend_latent

mla_prefill = partial(prefill_by, attend_latent)
