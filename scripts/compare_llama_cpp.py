"""Speed of Thalweg beside llama.cpp's on this machine's CPU: the same GGUF files, in turn, in one run.

    python scripts/compare_llama_cpp.py model-f16.gguf model-Q8_0.gguf --llama-bench PATH/llama-bench --threads 1,2

Each round runs `llama-bench -p P -n N` and `thalweg bench latency` once for each file and number of threads, one after
the other, so that both meet the machine in the same state. Of every figure the best round counts. llama-bench times a
prompt and generation apart; TTFT and the time per output token of a single request stand for them here, with the
step loop, sampling and the API in them. Build it with

    cmake -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON && cmake --build build --target llama-bench
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second."""

    prompt: float
    generated: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.gguf")
    parser.add_argument("--llama-bench", required=True, type=Path, metavar="PROGRAM")
    parser.add_argument("--threads", default="1", metavar="N,N", help="numbers of threads, one run for each")
    parser.add_argument("--prompt", default=512, type=int, metavar="TOKENS")
    parser.add_argument("--generate", default=64, type=int, metavar="TOKENS")
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="OPTION",
        help="of thalweg bench latency, e.g. --option=--dtype=bfloat16; may be repeated",
    )
    args = parser.parse_args()
    print("| file | threads | prompt: llama.cpp | Thalweg | ratio | generated: llama.cpp | Thalweg | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for file in args.files:
        for threads in map(int, args.threads.split(",")):
            theirs, ours = zip(*rounds(file, threads, args), strict=True)
            cells = [f"{file.stem} | {threads}"]
            for name in ("prompt", "generated"):
                a, b = (max(getattr(speed, name) for speed in speeds) for speeds in (theirs, ours))
                cells.append(f"{a:.0f} | {b:.0f} | {b / a:.2f}")
            print(f"| {' | '.join(cells)} |", flush=True)


def rounds(file: Path, threads: int, args: argparse.Namespace) -> Iterator[tuple[Speed, Speed]]:
    """Speeds of llama.cpp and of Thalweg, round by round."""
    for _ in range(args.rounds):
        yield llama_cpp(file, threads, args), thalweg(file, threads, args)


def llama_cpp(file: Path, threads: int, args: argparse.Namespace) -> Speed:
    sizes = ["-p", str(args.prompt), "-n", str(args.generate)]
    command = [str(args.llama_bench), "-m", str(file), "-t", str(threads), *sizes, "-r", "1", "-o", "json"]
    results = json.loads(run(command, os.environ))
    by_kind = {bool(result["n_gen"]): result["avg_ts"] for result in results}
    return Speed(by_kind[False], by_kind[True])


def thalweg(file: Path, threads: int, args: argparse.Namespace) -> Speed:
    sizes = [
        "--batch-size",
        "1",
        "--input-len",
        str(args.prompt),
        "--output-len",
        str(args.generate),
        "--num-iters",
        "2",
    ]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "figures.json")
        command = [sys.executable, "-m", "thalweg", "bench", "latency", str(file), *sizes, *args.option]
        run([*command, "--device", "cpu", "--output-json", str(out)], {**os.environ, "OMP_NUM_THREADS": str(threads)})
        [row] = json.loads(out.read_text())["results"]
    return Speed(1e3 * args.prompt / row["min_ttft_ms"], 1e3 / row["min_tpot_ms"])


def run(command: list[str], environment: os._Environ[str] | dict[str, str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
