"""Runs lm-evaluation-harness against `thalweg serve` and compares its figures with Thalweg's own.

    python scripts/clients/lm_eval_check.py --lm-eval /path/to/bin/lm_eval [--num-questions 100]

The harness lives in an environment of its own (`pip install torch "lm-eval[api]"`). Two tasks over problems of the
bundled model's evaluation split, both as `local-completions`: one generates answers, one ranks choices by their
log-likelihood. The same questions are asked of the engine directly. Exits with 1 where a figure differs.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from thalweg import LLM, SamplingParams
from thalweg.evals.arith_problems import problems
from thalweg.evals.gsm8k import Example, few_shot_questions, read_examples

SHOTS = 3
NUMBER = r"(-?[0-9]+)"

GENERATE = """\
task: thalweg_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/generate.jsonl"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["Question"], do_sample: false, max_gen_toks: 64}}
filter_list:
  - name: last-number
    filter: [{{function: regex, regex_pattern: "#### (-?[0-9]+)"}}, {{function: take_first}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CHOOSE = """\
task: thalweg_choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/choose.jsonl"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: " "
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lm-eval", required=True, help="the harness's command")
    parser.add_argument("--num-questions", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts, answers, choices = write_tasks(folder, args.num_questions)
        own = own_figures(prompts, answers, choices)
        theirs = harness_figures(args.lm_eval, folder)
    for task, figure in own.items():
        print(f"{task}: thalweg {figure:.4f}, lm-evaluation-harness {theirs[task]:.4f}")
    return int(any(abs(own[task] - theirs[task]) > 1e-9 for task in own))


def write_tasks(folder: Path, count: int) -> tuple[list[str], list[int], list[list[str]]]:
    """Questions behind worked examples, in GSM8K's form, and four candidate answers for each."""
    lines = folder / "examples.jsonl"
    shots = [
        ("Tom has 3 apples. He buys 4 more apples. How many apples does Tom have now?", "3 + 4 = 7\n#### 7")
    ] * SHOTS
    asked = [(p.question, f"#### {p.answer}") for p in problems("eval", 0, count)]
    lines.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in shots + asked))
    examples: list[Example] = read_examples(str(lines), SHOTS + count)
    questions = few_shot_questions(examples, SHOTS)
    prompts = [str(q.prompt) for q in questions]
    answers = [int(q.answer) for q in questions]
    choices = [[str(a + more) for more in (0, 1, 10, -1)] for a in answers]
    rows = zip(prompts, answers, choices, strict=True)
    with (folder / "generate.jsonl").open("w") as generate, (folder / "choose.jsonl").open("w") as choose:
        for prompt, answer, options in rows:
            generate.write(json.dumps({"prompt": prompt, "answer": str(answer)}) + "\n")
            choose.write(json.dumps({"prompt": f"{prompt} ####", "choices": options, "gold": 0}) + "\n")
    (folder / "generate.yaml").write_text(GENERATE.format(folder=folder))
    (folder / "choose.yaml").write_text(CHOOSE.format(folder=folder))
    return prompts, answers, choices


def own_figures(prompts: list[str], answers: list[int], choices: list[list[str]]) -> dict[str, float]:
    """The same from the engine directly, computed here: number after the first ####, likeliest of the choices."""
    with LLM() as llm:
        params = SamplingParams(temperature=0, max_tokens=64, stop=("Question",))
        texts = [o.outputs[0].text for o in llm.generate(prompts, params)]
        found = [re.search(rf"#### {NUMBER}", text) for text in texts]
        right = [m is not None and int(m[1]) == a for m, a in zip(found, answers, strict=True)]
        tokenizer = llm.tokenizer
        best = []
        for prompt, options in zip(prompts, choices, strict=True):
            context = tokenizer.encode(f"{prompt} ####")
            whole = [tokenizer.encode(f"{prompt} #### {option}") for option in options]
            score = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
            sums = []
            for ids, output in zip(whole, llm.generate(whole, score), strict=True):
                given = output.prompt_logprobs
                assert given is not None
                sums.append(sum(entry.logprob for entry in given[len(context) :] if entry is not None))
                assert len(given) == len(ids)
            best.append(sums.index(max(sums)))
    return {
        "thalweg_generate": sum(right) / len(right),
        "thalweg_choose": best.count(0) / len(best),
    }


def harness_figures(lm_eval: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "thalweg", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            url = server.stdout.readline().split()[-1]
            model = f"model=thalweg-tiny,base_url={url}/completions,tokenizer_backend=remote,max_length=2048"
            run: list[Any] = [lm_eval, "run", "--model", "local-completions", "--model_args", model]
            run += ["--include_path", folder, "--tasks", "thalweg_generate,thalweg_choose"]
            run += ["--output_path", folder / "out", "--batch_size", "8"]
            subprocess.run(run, check=True)
        finally:
            server.terminate()
    [file] = (folder / "out").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    return {
        "thalweg_generate": results["thalweg_generate"]["exact_match,last-number"],
        "thalweg_choose": results["thalweg_choose"]["acc,none"],
    }


if __name__ == "__main__":
    sys.exit(main())
