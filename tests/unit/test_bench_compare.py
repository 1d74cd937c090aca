"""Two results files side by side: matching, ratios, and what moved beyond the spread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from thalweg.bench.accuracy import Accuracy
from thalweg.bench.compare import Change, compare_files
from thalweg.bench.spread import Spread
from thalweg.cli import main
from thalweg.errors import ConfigError


def latency_row(batch_size: int, tpot: tuple[float, float, float], **more: Any) -> dict[str, Any]:
    """As `bench latency` writes it: median_X, min_X, max_X."""
    median, least, greatest = tpot
    spread = {"median_tpot_ms": median, "min_tpot_ms": least, "max_tpot_ms": greatest}
    return {"batch_size": batch_size, "input_len": 8, "output_len": 4, "num_iters": 5} | spread | more


def write(path: Path, rows: Any, **more: Any) -> str:
    path.write_text(json.dumps({"machine": {"cpu": "a"}, "results": rows} | more))
    return str(path)


def pair(tmp_path: Path, a: list[dict[str, Any]], b: list[dict[str, Any]]) -> tuple[str, str]:
    return write(tmp_path / "a.json", a), write(tmp_path / "b.json", b)


def test_rows_are_matched_by_their_sizes(tmp_path: Path) -> None:
    one = latency_row(1, (2.0, 1.9, 2.1), output_throughput=400.0, host_us={"build": 10.0}, median_other_ms=None)
    files = pair(
        tmp_path,
        [one, latency_row(8, (4.0, 3.9, 4.1))],
        [latency_row(32, (9.0, 8.9, 9.1)), one | {"median_tpot_ms": 3.0, "max_tpot_ms": 3.1, "num_iters": 9}],
    )
    found = compare_files(*files)
    key = (("batch_size", 1), ("input_len", 8), ("output_len", 4))
    assert found.changes == [
        Change(key, "tpot_ms", Spread(2.0, 1.9, 2.1), Spread(3.0, 1.9, 3.1)),
        Change(key, "output_throughput", 400.0, 400.0),
        Change(key, "host_us.build", 10.0, 10.0),
    ]
    assert [change.ratio for change in found.changes] == [1.5, 1.0, 1.0]
    assert [change.moved for change in found.changes] == [False, None, None]
    assert [dict(k)["batch_size"] for k in (*found.only_a, *found.only_b)] == [8, 32]


def test_spreads_as_bench_decode_and_host_write_them(tmp_path: Path) -> None:
    row = {"batch_size": 1, "context": 64, "step_ms": {"median": 4.0, "min": 3.0, "max": 5.0}, "launches": None}
    after = row | {"step_ms": {"median": 2.0, "min": 1.0, "max": 2.9}}
    [change] = compare_files(*pair(tmp_path, [row], [after])).changes
    assert (change.name, change.ratio, change.moved) == ("step_ms", 0.5, True)


def test_kernels_are_matched_by_name(tmp_path: Path) -> None:
    us = {"median": 4.0, "min": 3.0, "max": 5.0}
    row = {"op": "norm", "case": "M=1", "implementation": "triton", "us": us, "equal_bits": True, "wrong": ""}
    refused = row | {"implementation": "reference", "us": None}
    other = row | {"case": "M=8"}
    found = compare_files(*pair(tmp_path, [row, refused], [refused, row, other]))
    [change] = found.changes
    assert (change.name, change.ratio, change.moved) == ("us", 1.0, False)
    assert [dict(key)["case"] for key in found.only_b] == ["M=8"]


@pytest.mark.parametrize(
    ("b", "moved", "slower_by_10"),
    [
        ((2.0, 1.9, 2.1), False, False),
        ((2.3, 2.1, 2.5), False, False),  # touches A's greatest
        ((2.15, 2.11, 2.2), True, False),  # moved, by less than 10 %
        ((2.3, 2.11, 2.5), True, True),
        ((1.0, 0.9, 1.1), True, False),
    ],
)
def test_moved_means_that_the_ranges_do_not_overlap(
    tmp_path: Path, b: tuple[float, float, float], moved: bool, slower_by_10: bool
) -> None:
    files = pair(tmp_path, [latency_row(1, (2.0, 1.9, 2.1))], [latency_row(1, b)])
    [change] = compare_files(*files).changes
    assert change.moved is moved
    assert change.slower_by(10) is slower_by_10
    assert main(["bench", "compare", *files]) == 0
    assert main(["bench", "compare", *files, "--fail-if-slower", "10"]) == int(slower_by_10)


def test_command_says_what_differs_and_what_is_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", [latency_row(1, (2.0, 1.9, 2.1)), latency_row(2, (1.0, 1.0, 1.0))])
    b = write(tmp_path / "b.json", [latency_row(1, (4.0, 3.9, 4.1))], machine={"cpu": "b", "gpu": "g"})
    assert main(["bench", "compare", a, b]) == 0
    text = capsys.readouterr().out
    assert "differs: cpu: a | b\n" in text
    assert "differs: gpu: - | g\n" in text
    assert ["tpot_ms", "2.000", "(1.900..2.100)", "4.000", "(3.900..4.100)", "2.000", "slower"] in [
        line.split() for line in text.splitlines()
    ]
    assert f"only in {a}: batch_size 2, input_len 8, output_len 4" in text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "JSON list"),
        ("{", "not valid JSON"),
        ("{}", "has no results"),
        ('{"results": [5]}', "has no results"),
        ('{"results": [{"tpot": 5}]}', "does not say what it measured"),
        ('{"results": [{"batch_size": 1}, {"batch_size": 1}]}', "two rows of batch_size 1"),
        ('{"results": [{"batch_size": 7, "tpot": 5}]}', "no row in common"),
        ('{"results": [{"batch_size": 1, "input_len": 8, "output_len": 4, "x": NaN}]}', "no row in common"),
    ],
)
def test_other_files_are_one_line(tmp_path: Path, content: str, reason: str) -> None:
    good = write(tmp_path / "a.json", [latency_row(1, (2.0, 1.9, 2.1), x=1)])
    (tmp_path / "b.json").write_text(content)
    for pair in ((good, str(tmp_path / "b.json")), (str(tmp_path / "b.json"), good)):
        with pytest.raises(ConfigError, match=reason) as caught:
            compare_files(*pair)
        assert "\n" not in str(caught.value)


def test_bad_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    good = write(tmp_path / "a.json", [latency_row(1, (2.0, 1.9, 2.1))])
    assert main(["bench", "compare", good, str(tmp_path / "none.json")]) == 2
    assert main(["bench", "compare", good, good, "--fail-if-slower", "-1"]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def eval_row(right: list[bool] | None, accuracy: float, count: int) -> dict[str, Any]:
    answers = [] if right is None else [{"question": f"q{i // 2}", "correct": r} for i, r in enumerate(right)]
    return {"eval": "gsm8k", "num_questions": count, "accuracy": accuracy, "answers": answers, "seed": 1}


def test_accuracies_of_the_same_questions_are_paired(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = [True] * 60 + [False] * 40
    after = [False] * 2 + [True] * 58 + [True] * 12 + [False] * 28
    files = pair(tmp_path, [eval_row(before, 0.6, 100)], [eval_row(after, 0.7, 100)])
    [change] = compare_files(*files).changes
    assert isinstance(change.a, Accuracy)
    assert isinstance(change.b, Accuracy)
    difference = change.a.to(change.b)
    assert (difference.only_a, difference.only_b) == (2, 12)
    assert difference.delta == pytest.approx(0.1)
    assert difference.error == pytest.approx(((14 - 100 / 100) / 100**2) ** 0.5)
    assert difference.p_value == pytest.approx(2 * (1 + 14 + 91) / 2**14)
    assert change.moved is True
    assert not change.slower_by(0)
    assert main(["bench", "compare", *files, "--fail-if-slower", "0"]) == 0
    text = capsys.readouterr().out
    assert ["accuracy", "0.600", "(+-0.049)", "0.700", "(+-0.046)", "1.167", "better"] in [
        line.split() for line in text.splitlines()
    ]
    assert "changed by +0.1000, standard error 0.0361, paired: 2 right in A alone and 12 in B alone" in text
    assert "McNemar's exact test p = 0.0129" in text


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ((0.60, 200), (0.64, 200), "within its error"),  # the standard error is 0.0484
        ((0.60, 200), (0.66, 200), "better"),
        ((0.60, 200), (0.54, 200), "worse"),
        ((0.0, 200), (0.5, 200), "better"),  # and no ratio
        ((1.0, 200), (1.0, 200), "within its error"),
    ],
)
def test_accuracies_without_answers_are_held_against_the_error_of_both(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, a: tuple[float, int], b: tuple[float, int], verdict: str
) -> None:
    assert main(["bench", "compare", *pair(tmp_path, [eval_row(None, *a)], [eval_row(None, *b)])]) == 0
    text = capsys.readouterr().out
    assert verdict in text
    assert "paired" not in text


def test_many_changed_answers_are_tested_in_a_moment() -> None:
    one = Accuracy(0.5, 200_000, {("q", i): i % 2 == 0 for i in range(200_000)})
    other = Accuracy(0.5, 200_000, {("q", i): i % 2 == 1 for i in range(200_000)})
    assert one.to(other).p_value == pytest.approx(1.0)
    assert one.to(one).p_value == 1.0


def test_answers_to_other_questions_are_not_paired() -> None:
    one = Accuracy(0.5, 2, {("q", 0): True, ("q", 1): False})
    other = Accuracy(0.5, 2, {("q", 0): True, ("r", 0): False})
    assert one.to(other).p_value is None
