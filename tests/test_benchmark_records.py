"""The study's converters, on inputs written here in the upstream files' formats."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest

from trainer.corpus.build import check_records
from trainer.corpus.record import read_records

_FILE = Path(__file__).parent.parent / "benchmarks" / "real_records.py"
_spec = importlib.util.spec_from_file_location("real_records", _FILE)
assert _spec is not None
assert _spec.loader is not None
records = importlib.util.module_from_spec(_spec)
sys.modules["real_records"] = records  # dataclasses look their module up
_spec.loader.exec_module(records)

KG_HEADER = "name,alias,age,department,checklist,symptom,complication,treatment,drug,period,rate\n"
CONVERSATIONS = ("medicalgpt/medical_sft_1K_format.jsonl", "medicalgpt/sharegpt_zh_1K_format.jsonl")


def _write(folder: Path, name: str, text: str | bytes, encoding: str = "utf-8") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))


def _lines(rows: list) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _characters(number: int, count: int = 24) -> str:
    """Chinese characters without meaning, another string for every number."""
    rng = random.Random(number)
    return "".join(chr(rng.randrange(0x4E00, 0x9FA0)) for _ in range(count))


def _chat(*values: str) -> dict:
    return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]}


def _names() -> list[str]:
    return [f"甲{_characters(number, 3)}热" for number in range(200)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """All upstream files, small, with broken rows in every format."""
    folder, names = tmp_path / "data", _names()
    kg = [f"{name},,儿童,儿科,,{_characters(1000 + i)} [详细],,,,7天,\n" for i, name in enumerate(names)]
    _write(folder, "medical-kg/disease.gb18030.csv", KG_HEADER + "".join(kg), "gb18030")
    questions = [
        {
            "instruction": f"孩子患{name}，{asks}{_characters(i)}？",
            "input": "",
            "output": _characters(2000 + i, 50) + "。",
        }
        for i, (name, asks) in enumerate(zip(names, ["有何表现", "如何治疗"] * 100, strict=True))
    ]
    _write(folder, "huatuo/llama_data.json", _lines(questions) + '{"instruction": "半行\n' + _lines([{"input": ""}]))
    for at, name in enumerate(CONVERSATIONS):
        chats = [_chat(_characters(3000 + 500 * at + i), _characters(4000 + 500 * at + i)) for i in range(60)]
        _write(folder, name, _lines([*chats, {"conversations": []}, {"conversations": [{"from": "human"}]}]))
    pairs = [
        {**_chat(_characters(5000 + i)), "chosen": _characters(6000 + i), "rejected": _characters(7000 + i)}
        for i in range(40)
    ]
    _write(folder, "medicalgpt/dpo_zh_500.jsonl", _lines([*pairs, {**pairs[0], "chosen": None}]))
    rows = [f"儿科,标题,{_characters(8000 + i)},{_characters(9000 + i)}\n" for i in range(100)]
    broken = "儿科,标题,问题".encode("gb18030") + b"\xff\xff," + "回答\n儿科,标题,只有三栏\n".encode("gb18030")
    toyhom = ("department,title,ask,answer\n" + "".join(rows)).encode("gb18030") + broken
    _write(folder, "toyhom/internal_medicine_sample.gb18030.csv", toyhom)
    dialogues = [{"dialog": [_characters(10000 + i), "发热吗？", "有", "可能是感冒。"]} for i in range(60)]
    dialogues += [{"dialog": ["一", "二", "三"]}, {"dialog": None}]
    text = f"train {dialogues!r}\ntest [__import__('os').abort()]\n"
    _write(folder, "dxy-dialogues/dxy_dialog_data_dialog_v2.txt", text)
    for part in ("cmid", "cmb-clin"):
        for model, mark in zip(records.MODELS, (5, 5, 4, 4, 3, 3), strict=True):
            dialogues = [
                {"id": str(i), "conversation": [
                    {"role": "patient", "content": _characters(11000 + i) + part},
                    {"role": "doctor", "content": _characters(12000 + i) + f"这是分数{mark}的回答。{model}"},
                ]} for i in range(20)
            ]  # fmt: skip
            scores = [{"id": str(i), "scores": f"Proactivity: {mark}\nA: {mark}\nH: {mark}\nL: 5"} for i in range(20)]
            _write(folder, f"disc-medllm/dialogues_{model}_{part}.json", json.dumps(dialogues))
            _write(
                folder, f"disc-medllm/gpt4scores_{model}_{part}.jsonl", _lines([*scores, {"id": "x", "scores": "?"}])
            )
    return folder


def test_the_corpus_is_whole_and_the_same_every_time(data: Path, tmp_path: Path) -> None:
    first = records.build(data, tmp_path / "one")
    second = records.build(data, tmp_path / "two")
    check_records(tmp_path / "one")
    assert first["sha256"] == second["sha256"]
    assert all(first["counts"].values()), first["counts"]
    assert first["skipped"] == {
        "huatuo/llama_data.json": 2,
        **dict.fromkeys(CONVERSATIONS, 2),
        "medicalgpt/dpo_zh_500.jsonl": 1,
        "toyhom/internal_medicine_sample.gb18030.csv": 2,
        "dxy-dialogues/dxy_dialog_data_dialog_v2.txt": 2,
        **{f"disc-medllm/gpt4scores_{m}_{part}.jsonl": 1 for m in records.MODELS for part in ("cmid", "cmb-clin")},
    }


def test_no_group_question_or_disease_crosses_the_split(data: Path, tmp_path: Path) -> None:
    records.build(data, tmp_path / "corpus")
    found = {path.stem: list(read_records(path)) for path in (tmp_path / "corpus").glob("*.jsonl")}
    trained = [r for name, rows in found.items() if not name.startswith("held_out") for r in rows]
    kept = [r for name, rows in found.items() if name.startswith("held_out") for r in rows]
    assert {r.split for r in trained} == {"train"}
    assert "train" not in {r.split for r in kept}
    assert not {r.group for r in trained} & {r.group for r in kept}
    text = "\n".join(r.model_dump_json() for r in trained)
    diseases = {r.group.removeprefix("disease:") for r in kept if r.group.startswith("disease:")}
    assert diseases
    assert not [name for name in diseases if name in text]


def test_no_question_is_in_two_files(data: Path, tmp_path: Path) -> None:
    repeated = _chat(_characters(8000), "另一个回答" * 4)  # also asked in the table of outpatients
    _write(data, CONVERSATIONS[0], _lines([repeated]))
    records.build(data, tmp_path / "corpus")
    text = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "corpus").glob("*.jsonl"))
    rows = [line for line in text.splitlines() if _characters(8000) in json.loads(line)["group"]]
    assert len(rows) == 1


def test_better_scored_answers_are_chosen(data: Path, tmp_path: Path) -> None:
    records.build(data, tmp_path / "corpus")
    judged = [r for r in read_records(tmp_path / "corpus/preferences.jsonl") if "DISC" in r.source.name]
    assert judged
    per_question: dict[str, int] = {}
    for record in judged:
        assert record.chosen
        assert record.rejected
        marks = [int(answer[0].content.split("分数")[1][0]) for answer in (record.chosen, record.rejected)]
        assert marks[0] > marks[1]
        assert 3 * (marks[0] - marks[1]) >= records.SCORE_GAP
        per_question[record.group] = per_question.get(record.group, 0) + 1
    assert max(per_question.values()) == records.PAIRS_PER_QUESTION


def test_cut_entries_and_suffixes_of_the_graph_do_not_reach_the_text() -> None:
    row = {"name": " 甲热 ", "alias": "乙热，丙热", "symptom": "发热 头痛 发热 [详细]"}
    row |= {"drug": "全名片 盐酸半... [详细]", "treatment": "暂无相关资料", "period": ""}
    text = records.prose(row)
    assert text.startswith("甲热：")
    assert sorted(text.removeprefix("甲热：").split("。")[:-1]) == sorted(
        ["又称乙热、丙热", "常见症状：发热、头痛等", "常用药物：全名片等"]
    )


def test_a_dialogue_keeps_its_turns_and_its_task(data: Path, tmp_path: Path) -> None:
    records.build(data, tmp_path / "corpus")
    dialogue = next(r for r in read_records(tmp_path / "corpus/mue.jsonl") if "DXY" in r.source.name)
    assert dialogue.task == "diagnosis"
    assert [m.role for m in dialogue.messages or ()] == ["system", "user", "assistant", "user", "assistant"]
    assert [m.content for m in dialogue.messages or ()][2:] == ["发热吗？", "有", "可能是感冒。"]


@pytest.mark.parametrize(
    ("question", "task"),
    [
        ("一名患儿咳嗽三天，可能患了什么病？", "diagnosis"),
        ("小儿肺炎如何治疗？", "treatment"),
        ("有哪些并发症？", "knowledge"),
    ],
)
def test_questions_go_to_their_task(question: str, task: str) -> None:
    assert records.task_of(question) == task


def test_long_text_ends_with_a_sentence() -> None:
    assert records.shorten("一二三。四五六。七八九", 9) == "一二三。四五六。"
    assert records.shorten("没有句号的文字", 4) == ""
    assert records.shorten("短。", 9) == "短。"


def test_a_missing_file_is_named_with_its_remedy(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (data / "huatuo/llama_data.json").unlink()
    monkeypatch.setattr(sys, "argv", ["real_records.py", str(data), "-o", str(tmp_path / "corpus")])
    assert records.main() == 2
    message = capsys.readouterr().err
    assert "llama_data.json" in message
    assert "Give the folder" in message
    assert not (tmp_path / "corpus").exists()
