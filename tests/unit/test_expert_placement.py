"""Where experts and their copies go, and the files that say so."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from tests.models import random_checkpoint as kimi
from tests.models.plans import read
from thalweg.assembly.expert_placement import KEY, busiest, counted, placed_by, read_placements
from thalweg.cli import main
from thalweg.config.engine import EngineConfig
from thalweg.errors import CheckpointError, ConfigError
from thalweg.parallel.placement import Placement, place

MODEL = read(kimi.config(experts=6, layers=4))  # layers 1 to 3 have experts


@pytest.mark.parametrize("seed", range(20))
def test_placements_are_whole_and_better_balanced_than_in_order(seed: int) -> None:
    chance = random.Random(seed)
    ranks = chance.choice([2, 3, 4, 8])
    experts = ranks * chance.randrange(1, 9)
    redundant = ranks * chance.randrange(0, max(1, experts * (ranks - 1) // ranks) + 1)
    tokens = [int(1000 / (1 + chance.randrange(experts))) for _ in range(experts)]
    placement = place(tokens, redundant, ranks)
    assert Placement.of_row(placement.row, experts, ranks, "it") == placement  # which checks it
    assert placement.here * ranks == experts + redundant
    if not redundant:
        return
    # With copies of all on all ranks every rank has the same.
    assert busiest(place(tokens, experts * (ranks - 1), ranks), tokens) == pytest.approx(1)


def test_a_busy_expert_gets_the_copies_and_the_others_make_up_for_it() -> None:
    tokens = [90, 10, 10, 10, 10, 10, 10, 10]
    assert busiest(Placement.even(8, 2), tokens) == pytest.approx(120 / 80)
    placement = place(tokens, 2, 2)
    assert all(0 in own for own in placement.slots)
    assert busiest(placement, tokens) <= 1.04


@pytest.mark.parametrize(
    ("experts", "redundant", "ranks", "message"),
    [
        (8, 1, 2, "8 experts and 1 copies are 9; expected a multiple of 2 ranks"),
        (4, 6, 2, "--redundant is 6; expected at most 4, which puts every expert on every rank"),
    ],
)
def test_copies_that_do_not_go_up_are_refused(experts: int, redundant: int, ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place([1] * experts, redundant, ranks)


def test_tokens_go_to_their_own_rank_s_copy_or_to_all_in_turn() -> None:
    placement = Placement(((0, 1), (1, 2), (2, 0)))
    assert placement.choices(0) == [[0], [1], [3, 4]]
    assert placement.choices(1) == [[0, 5], [2], [3]]
    assert Placement.even(4, 2).choices(1) == [[0], [1], [2], [3]]


def write(path: Path, rows: object) -> str:
    path.write_text(json.dumps({KEY: rows}))
    return str(path)


def test_files_have_a_list_for_each_layer_of_experts_or_for_all_layers(tmp_path: Path) -> None:
    rows = [[0, 1, 2, 3, 0, 4, 5, 1], [5, 4, 3, 2, 1, 0, 5, 4], [0, 1, 2, 3, 2, 3, 4, 5]]
    of_experts = read_placements(write(tmp_path / "a.json", rows), MODEL, 2)
    of_all = read_placements(write(tmp_path / "b.json", [[], *rows]), MODEL, 2)
    assert of_experts == of_all
    assert list(of_experts) == [1, 2, 3]
    assert of_experts[1].slots == ((0, 1, 2, 3), (0, 4, 5, 1))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"has 0 lists; expected 3 lists, one for each layer of experts, or 4 for all layers"),
        ("x", "has 0 lists"),
        ([[0, 1, 2, 3, 4, 5]] * 2, "has 2 lists"),
        ([[0, 1, 2, 3, 4]] * 3, r"layer 1 has 5 slots; expected a multiple of --data-parallel-size 2"),
        ([[0, 1, 2, 3, 4, 4]] * 3, r"layer 1 should have every expert from 0 to 5, and no other; see \[5\]"),
        ([[0, 1, 2, 3, 4, 6]] * 3, r"no other; see \[5, 6\]"),
        ([[0, 1, 2, 3, 4, 5]] * 2 + [[0, 0, 1, 2, 3, 4, 5, 1]], "layer 3 gives rank 0 an expert twice"),
        ([[0, 1, 2, 3, 4, True]] * 3, "is not a list of experts' numbers"),
        ([[0, 1, 2, 3, 4, 5.0]] * 3, "is not a list of experts' numbers"),
        ([None] * 3, "is not a list of experts' numbers"),
    ],
)
def test_files_that_say_nothing_of_use_are_refused(tmp_path: Path, rows: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_placements(write(tmp_path / "a.json", rows), MODEL, 2)


def test_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--expert-placement is .*, and there is no such file"):
        read_placements(str(tmp_path / "none.json"), MODEL, 2)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_placements(str(tmp_path / "broken.json"), MODEL, 2)
    with pytest.raises(ConfigError, match="--expert-placement places experts on data-parallel ranks"):
        EngineConfig(expert_placement="x.json")


def metrics(layers: dict[int, list[int]]) -> str:
    lines = [
        f'thalweg_expert_tokens_total{{expert="{e}",layer="{layer}"}} {float(n)}'
        for layer, counts in layers.items()
        for e, n in enumerate(counts)
    ]
    return "\n".join(["# HELP something", "thalweg_generation_tokens_total 5.0", *lines, ""])


def test_counts_are_read_off_metrics() -> None:
    layers = {1: [5, 0, 12_000_000], 10: [1, 2, 3], 2: [0, 0, 0]}
    assert counted(metrics(layers), "m") == layers
    with pytest.raises(ConfigError, match="m has no thalweg_expert_tokens_total; expected"):
        counted("nothing", "m")
    with pytest.raises(ConfigError, match="the counts of layer 1 leave experts out"):
        counted('thalweg_expert_tokens_total{expert="1",layer="1"} 3.0', "m")
    with pytest.raises(ConfigError, match="m has counted no tokens; expected"):
        counted(metrics({1: [0, 0], 2: [0, 0]}), "m")
    with pytest.raises(ConfigError, match="is no count of an expert's tokens"):
        counted('thalweg_expert_tokens_total{expert="1",layer="1"} NaN', "m")


def test_what_place_experts_writes_is_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = {n: [90, 10, 10, 10, 10, 10] for n in (1, 2, 3)}
    (tmp_path / "metrics").write_text(metrics(counts))
    file = tmp_path / "placement.json"
    arguments = [str(tmp_path / "metrics"), "-dp", "2", "--redundant", "2", "--output", str(file)]
    assert main(["place-experts", *arguments]) == 0
    assert re.search(r"the busiest rank gets 1\.\d\d times the mean, 1\.\d\d times with", capsys.readouterr().out)
    written = read_placements(str(file), MODEL, 2)
    assert written == {n: place(tokens, 2, 2) for n, tokens in counts.items()}
    assert file.read_text() == placed_by(counts, 2, 2)[0]
    assert main(["place-experts", str(tmp_path / "none"), "-dp", "2", "-o", str(file)]) == 2
    assert "METRICS" in capsys.readouterr().err
    assert main(["place-experts", *arguments[:-1], str(tmp_path / "no" / "where")]) == 2
    assert "--output" in capsys.readouterr().err
    (tmp_path / "metrics").write_text(metrics({1: [9, 1, 2]}))  # which two ranks do not divide
    assert main(["place-experts", str(tmp_path / "metrics"), "-dp", "2", "--redundant", "1", "-o", str(file)]) == 0
    assert re.fullmatch(r"\S+: the busiest rank gets 1\.\d\d times the mean\n", capsys.readouterr().out)
