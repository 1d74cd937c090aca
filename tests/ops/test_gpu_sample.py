"""Op "sample" on the device."""

from __future__ import annotations

import pytest
import torch

from thalweg.ops.sample.reference import gumbel, sample

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("R", [1, 7, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab", [163_840, 1001])
def test_sample(R: int, dtype: torch.dtype, vocab: int) -> None:
    from thalweg.ops.sample.triton import sample as kernel

    logits = (torch.randn(R, vocab, device="cuda") * 2).to(dtype)
    temperatures = torch.rand(R, device="cuda") + 0.1
    temperatures[::3] = 0
    seeds, positions = torch.arange(R, device="cuda") * 1_000_003, torch.arange(R, device="cuda")
    ids, expected = kernel(logits, temperatures, seeds, positions), sample(logits, temperatures, seeds, positions)
    assert ids[::3].tolist() == expected[::3].tolist()
    slots = torch.arange(R, device="cuda").flip(0)
    by_slot = kernel(logits, temperatures.flip(0), seeds.flip(0), positions, slots, check=True)
    assert by_slot.tolist() == ids.tolist()
    for value in (torch.nan, torch.inf, -torch.inf):
        broken = logits.clone()
        broken[R // 2, vocab - 1] = value
        found = kernel(broken, temperatures, seeds, positions, check=True)
        assert found[R // 2] == -1
        assert (found == ids).sum() == R - 1
    # The two round logarithms differently: a draw may differ where two entries are as good as equal.
    hot = temperatures > 0
    score = logits[hot].float() / temperatures[hot][:, None] + gumbel(seeds, positions, vocab)[hot]
    chosen = score.gather(1, ids[hot][:, None])
    torch.testing.assert_close(chosen[:, 0], score.max(1).values, rtol=1e-5, atol=1e-4)
