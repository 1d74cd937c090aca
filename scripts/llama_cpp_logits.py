"""Compare Thalweg with llama.cpp on a GGUF file: record llama.cpp's logits, then hold ours against them.

    python scripts/llama_cpp_logits.py record MODEL.gguf OUT.npz [TEXT.txt]   # needs llama-cpp-python, no dependency
    python scripts/llama_cpp_logits.py compare MODEL.gguf OUT.npz             # needs Thalweg

Without a text the tokens are random ids, which suit random models only: a trained one is far from all it knows there,
and differs by more than it does on text.
"""

from __future__ import annotations

import sys

import numpy as np

TOKENS, GREEDY = 70, 16


def record(model: str, out: str, text: str | None = None) -> None:
    """Logits of the tokens, and GREEDY tokens that follow the first 20, as the oracles have them."""
    import llama_cpp

    llama = llama_cpp.Llama(model, n_ctx=512, n_batch=512, logits_all=True, n_threads=2, verbose=False)
    ids = np.random.default_rng(3).integers(0, llama.n_vocab(), TOKENS)
    if text is not None:
        with open(text, "rb") as file:
            ids = np.array(llama.tokenize(file.read(), add_bos=False, special=True)[:512])
    llama.eval(ids.tolist())
    logits = np.array(llama.scores[: len(ids)], dtype=np.float32)
    llama.reset()
    greedy = ids[:20].tolist()
    llama.eval(greedy)
    for _ in range(GREEDY):
        greedy.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        llama.eval(greedy[-1:])
    np.savez(out, ids=ids, logits=logits, greedy=np.array(greedy))


def compare(model: str, out: str) -> None:
    import torch

    from thalweg import LLM, SamplingParams

    recorded = np.load(out)
    with LLM(model, max_num_seqs=2) as llm:
        ours = llm.prompt_logits(recorded["ids"].tolist()).double()
        params = SamplingParams(max_tokens=GREEDY, temperature=0, ignore_eos=True)
        greedy = llm.generate(recorded["greedy"][:20].tolist(), params)[0].outputs[0].token_ids
    theirs = torch.from_numpy(recorded["logits"]).double()
    p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    same = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
    print(f"largest difference of logits {(ours - theirs).abs().max():.2e}, KL mean {kl.mean():.2e},", end=" ")
    print(f"median {kl.median():.2e}, same first choice {same:.1%},", end=" ")
    print(f"greedy tokens equal: {greedy == recorded['greedy'][20:].tolist()}")


if __name__ == "__main__":
    {"record": record, "compare": compare}[sys.argv[1]](*sys.argv[2:])
