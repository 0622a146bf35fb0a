"""report.md from synthetic run folders whose numbers are known, whole and in pieces."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from trainer.recipe import PROJECT, load_recipe
from trainer.report import ReportError, write_report
from trainer.reporting.forgetting import forgetting_notes, held_out_table
from trainer.reporting.formats import duration, number
from trainer.reporting.plots import plot_losses

HELD_OUT = {
    "start": {"general_perplexity": 100.0, "domain_perplexity": 200.0, "assistant_loss": 4.0,
              "assistant_loss/knowledge": 4.5, "preference_accuracy": 0.5, "preference_margin": -0.02},
    "cpt": {"general_perplexity": 105.0, "domain_perplexity": 20.0, "assistant_loss": 3.0,
            "assistant_loss/knowledge": 3.0, "preference_accuracy": 0.5, "preference_margin": -0.02},
    "sft": {"general_perplexity": 126.0, "domain_perplexity": 22.0, "assistant_loss": 1.0,
            "assistant_loss/knowledge": 1.2, "preference_accuracy": 0.4, "preference_margin": -0.05},
    "dfpo": {"general_perplexity": 126.5, "domain_perplexity": 21.9, "assistant_loss": 1.1,
             "assistant_loss/knowledge": 1.1, "preference_accuracy": 0.9, "preference_margin": 0.31},
    "mue": {"general_perplexity": 126.0, "domain_perplexity": 21.9, "assistant_loss": 0.8,
            "assistant_loss/knowledge": 1.25, "preference_accuracy": 0.9, "preference_margin": 0.31},
}  # fmt: skip


def _stage(steps: int, seconds: float, **changes: Any) -> dict[str, Any]:
    base = {"steps": steps, "loss": 1.5, "seconds": seconds, "tokens": 1234567, "gpu_hours": seconds * 8 / 3600,
            "peak_memory_bytes": 17_500_000_000, "best_step": None, "stopped_early": False, "files": {}}  # fmt: skip
    return {**base, **changes}


def _rows(stage: str, count: int, loss: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for n in range(count):
        rows.append({"stage": stage, "step": 10 * (n + 1), "seconds": 30.0 * (n + 1), "loss": loss / (n + 1),
                     "tokens_per_second": 900 + 50 * n, "mfu": 0.40 + 0.01 * n, "memory_bytes": 9e9})  # fmt: skip
        rows.append({"stage": stage, "step": 10 * (n + 1), "seconds": 31.0 * (n + 1), "eval_loss": loss / (n + 1) + 1})
    return rows


@pytest.fixture
def run(tmp_path: Path) -> Path:
    recipe = load_recipe(PROJECT / "tests" / "recipes" / "tiny.yaml", ["stages.sft.max_length=512"])
    record = {
        "name": "tiny", "created": "2026-01-02T03:04:05+00:00", "seed": 1, "corpus_sha256": "ab" * 32,
        "recipe": recipe.model_dump(mode="json", exclude={"corpus": {"cards"}}),
        "versions": {"torch": "2.13.0", "trl": "1.16.0"}, "git_commit": "c0ffee",
        "hardware": {"cpus": 96, "gpus": 8, "gpu_name": "NVIDIA H200", "threads": 12, "processes": 8},
        "held_out": HELD_OUT,
        "stages": {
            "cpt": _stage(40, 3723.0), "sft": _stage(50, 61.0, best_step=40, stopped_early=True),
            "dfpo": _stage(30, 45.25), "mue": _stage(30, 100.0, gpu_hours=0.5),
        },
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(record), encoding="utf-8")
    rows = _rows("cpt", 4, 8.0) + _rows("sft", 5, 3.0) + _rows("mue", 3, 1.0)
    rows += [
        {"stage": "dfpo", "step": step, "loss": 0.7, "rewards/accuracies": 0.5 + step / 100, "rewards/margins": 0.1}
        for step in (10, 20)
    ]
    rows.append({"stage": "mue", "step": 30, "router/entropy": 1.05})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def _change(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / "run.json").read_text(encoding="utf-8")) | changes
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")


def _cells(text: str, title: str, first: str, row: int = 0) -> list[str]:
    """Cells of the table line of a section whose first cell is `first`."""
    section = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    lines = [[cell.strip() for cell in line[2:-2].split(" | ")] for line in section.splitlines()]
    return [line[1:] for line in lines if line[0] == first][row]


def test_the_numbers_of_a_finished_run(run: Path) -> None:
    text = write_report(run).read_text(encoding="utf-8")
    assert _cells(text, "Stages", "steps") == ["40", "50", "30", "30"]
    assert _cells(text, "Stages", "tokens") == ["1,234,567"] * 4
    assert _cells(text, "Stages", "training loss, first → last") == [
        "8.000 → 2.000", "3.000 → 0.6000", "0.7000 → 0.7000", "1.000 → 0.3333",
    ]  # fmt: skip
    assert _cells(text, "Stages", "held-out loss, first → last")[:3] == ["9.000 → 3.000", "4.000 → 1.600", "–"]
    assert _cells(text, "Stages", "reward accuracy, first → last") == ["–", "–", "0.6000 → 0.7000", "–"]
    assert _cells(text, "Stages", "tokens per second (median)") == ["975", "1,000", "–", "950"]
    assert _cells(text, "Stages", "MFU (median)") == ["41.5 %", "42.0 %", "–", "41.0 %"]
    assert _cells(text, "Stages", "peak memory") == ["17.50 GB"] * 4
    assert _cells(text, "Stages", "wall time") == ["1 h 02 min", "1 min 01 s", "45.2 s", "1 min 40 s"]
    assert _cells(text, "Stages", "GPU-hours") == ["8.273", "0.136", "0.101", "0.500"]
    assert _cells(text, "Stages", "best step") == ["–", "40", "–", "–"]
    assert _cells(text, "Stages", "stopped early") == ["no", "yes", "no", "no"]
    assert "- cost: 9.009 GPU-hours\n" in text
    assert "- state: finished\n" in text
    assert "- hardware: 8 × NVIDIA H200, 96 CPU cores, 12 threads × 8 process(es)\n" in text
    assert "- versions: torch 2.13.0, trl 1.16.0\n" in text
    assert "not a medical device" in text


def test_forgetting_is_shown_and_pointed_out(run: Path) -> None:
    text = write_report(run).read_text(encoding="utf-8")
    assert _cells(text, "Forgetting", "`general_perplexity`") == [
        "100.0", "105.0 **▲ 5.0 %**", "126.0 **▲ 20.0 %**", "126.5 ▲ 0.4 %", "126.0 ▼ 0.4 %",
    ]  # fmt: skip
    assert _cells(text, "Forgetting", "`domain_perplexity`")[1:3] == ["20.00 ▼ 90.0 %", "22.00 **▲ 10.0 %**"]
    assert _cells(text, "Forgetting", "`preference_accuracy`") == [
        "50.0 %", "50.0 %", "40.0 % **▼ 10.0 pt**", "90.0 % ▲ 50.0 pt", "90.0 %",
    ]  # fmt: skip
    assert _cells(text, "Forgetting", "`preference_margin`")[2:4] == ["-0.05000 **▼ 0.03000**", "0.3100 ▲ 0.3600"]
    assert "⚠ SFT raised general perplexity by 20.0 % (105.0 → 126.0)" in text
    assert text.count("⚠") == 1


def test_forgetting_little_by_little_and_none_at_all() -> None:
    slow = {
        name: {"general_perplexity": value} for name, value in zip(HELD_OUT, [10, 10.8, 11.6, 12, 12.1], strict=True)
    }
    assert forgetting_notes(slow)[0].startswith(
        "⚠ No stage alone, but the run as a whole raised general perplexity by 21"
    )
    from_scratch = {"start": {"general_perplexity": 3000.0}, "cpt": {"general_perplexity": 400.0}}
    assert forgetting_notes(from_scratch) == []
    assert forgetting_notes({"start": {}, "cpt": {"assistant_loss": 1.0}}) == []
    assert "nan" in held_out_table({"start": {"assistant_loss": 1.0}, "cpt": {"assistant_loss": float("nan")}})


def test_each_stage_is_held_against_its_purpose(run: Path) -> None:
    text = write_report(run).read_text(encoding="utf-8")
    title = "What each stage was for"
    assert _cells(text, title, "CPT")[1:] == ["`domain_perplexity`", "200.0", "20.00", "improved"]
    assert _cells(text, title, "SFT")[1:] == ["`assistant_loss`", "3.000", "1.000", "improved"]
    assert _cells(text, title, "DFPO")[1:] == ["`preference_accuracy`", "40.0 %", "90.0 %", "improved"]
    assert _cells(text, title, "DFPO", 1)[1:] == ["`preference_margin`", "-0.05000", "0.3100", "improved"]
    assert _cells(text, title, "DFPO", 2)[1:] == ["`preference_log_odds`", "–", "–", "not measured"]
    assert _cells(text, title, "PSFT")[1:] == ["`assistant_loss/knowledge`", "1.100", "1.250", "**worse**"]


def test_settings_say_what_is_inherited_and_what_is_not(run: Path) -> None:
    text = write_report(run).read_text(encoding="utf-8")
    assert _cells(text, "Settings", "`batch_size`") == ["16", "″", "**8**", "**16**"]
    assert _cells(text, "Settings", "`max_length`") == ["1024", "**512**", "″", "″"]
    assert _cells(text, "Settings", "`beta`") == ["", "", "0.1", ""]
    assert _cells(text, "Settings", "`learning_rate`") == ["0.003", "″", "**0.0003**", "**0.003**"]


def _png_size(file: Path) -> tuple[int, int]:
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_every_picture_and_file_that_is_linked_exists(run: Path) -> None:
    (run / "plots").mkdir()
    (run / "plots" / "router-usage.png").write_bytes(b"")
    (run / "samples.md").write_text("# Samples\n", encoding="utf-8")
    text = write_report(run).read_text(encoding="utf-8")
    links = [part.partition(")")[0] for part in text.split("](")[1:]]
    assert links == [
        "plots/loss.png", "plots/throughput.png", "plots/held_out.png", "plots/router-usage.png", "samples.md",
    ]  # fmt: skip
    assert all((run / link).exists() for link in links)
    widths = {link: _png_size(run / link)[0] for link in links[:3]}
    # Four stages have losses, three a throughput (DFPO logged none); three groups of held-out figures.
    assert widths["plots/loss.png"] > widths["plots/throughput.png"] > 1000


def test_a_run_in_progress_on_a_processor(run: Path) -> None:
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    _change(
        run,
        hardware={"cpus": 4, "gpus": 0, "gpu_name": None, "threads": 4, "processes": 2},
        stages={"cpt": {**record["stages"]["cpt"], "gpu_hours": None, "peak_memory_bytes": None}},
        held_out={"start": HELD_OUT["start"], "cpt": HELD_OUT["cpt"]},
    )
    rows = _rows("cpt", 4, 8.0) + _rows("sft", 2, 3.0)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(lines + '{"stage": "sft", "st', encoding="utf-8")
    text = write_report(run).read_text(encoding="utf-8")
    assert "- state: not finished; done: CPT; SFT is at step 20\n" in text
    assert _cells(text, "Stages", "steps") == ["40", "20"]
    assert _cells(text, "Stages", "CPU-hours") == ["8.273", "0.138"]  # 3723 s and 62 s of 4 threads in 2 processes
    assert "- cost: 8.411 CPU-hours\n" in text
    assert "PSFT" not in text.partition("## What each")[2].partition("## ")[0]


@pytest.mark.parametrize("missing", ["held_out", "stages", "hardware", "versions", "recipe", "git_commit"])
def test_missing_pieces_are_left_out(run: Path, missing: str) -> None:
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    del record[missing]
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    if missing != "stages":
        (run / "metrics.jsonl").unlink()
    text = write_report(run).read_text(encoding="utf-8")
    assert "None" not in text
    assert (missing == "stages") == ("at step 30" in text)


def test_a_run_that_has_just_begun(run: Path) -> None:
    _change(run, stages={}, held_out={})
    (run / "metrics.jsonl").unlink()
    text = write_report(run).read_text(encoding="utf-8")
    assert "Nothing was logged yet." in text
    assert "No held-out figures were measured yet." in text
    assert "- cost: not known yet\n" in text
    assert plot_losses(run) is None


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content, encoding="utf-8")
    with pytest.raises(ReportError, match=r"run\.json cannot be read .* Give the folder"):
        write_report(tmp_path)
    assert not (tmp_path / "report.md").exists()


def test_figures_as_they_are_written() -> None:
    shown = [number(value) for value in (None, 0, 1234567, 12345.6, 3.14159, 0.00012346, float("inf"))]
    assert shown == ["", "0", "1,234,567", "12,346", "3.142", "0.0001235", "inf"]
    assert [duration(s) for s in (None, 0.04, 59.94, 60, 3599.6, 90000)] == [
        "", "0.0 s", "59.9 s", "1 min 00 s", "1 h 00 min", "25 h 00 min",
    ]  # fmt: skip
