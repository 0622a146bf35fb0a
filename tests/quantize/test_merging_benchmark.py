"""The merging benchmark runs whole on tiny runs; its goals are not judged here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def merging(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import merging  # pyright: ignore[reportMissingImports]

    return merging


def test_table_is_the_mean_over_runs(
    merging: ModuleType, tiny: Path, make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [tiny, make(tmp_path / "other", seed=3)]
    singles = []
    for run in runs:
        merging.main(["--runs", str(run), "--json"])
        singles.append({row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]})
    code = merging.main(["--runs", *map(str, runs), "--variants", "--json"])
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["rows"]}
    assert code == (0 if all(found["goals_held"].values()) else 1)
    assert set(rows) == set(singles[0]) | set(merging.VARIANTS)
    first, second = (single["usage"]["nll"][0] for single in singles)
    assert rows["usage"]["nll"] == pytest.approx([(first + second) / 2, abs(first - second) / 2**0.5])
    # These runs' experts have a total rank of 8: nothing is cut.
    assert rows["rank 8 of 32"]["layer_error"] == pytest.approx(rows["least-squares"]["layer_error"])


def test_a_folder_that_is_no_run_is_one_message(
    merging: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merging.main(["--runs", str(tmp_path)]) == 2
    assert "3-dfpo" in capsys.readouterr().err
