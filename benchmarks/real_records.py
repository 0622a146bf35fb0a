"""Public files of other projects as a PedCorpus folder, for studies on this machine only.

    python benchmarks/real_records.py FOLDER [-o PedCorpus/real]

FOLDER holds huatuo/, medicalgpt/, disc-medllm/, toyhom/, medical-kg/ and dxy-dialogues/ as they are upstream. Most of
them may not train a model that is passed on, so neither their text nor a model made from it leaves the work folder.
What must not cross the splits is a record's group: the disease it is about where there is one, else its question.
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import io
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from trainer import prompts
from trainer.corpus.build import write_corpus
from trainer.corpus.record import CorpusError, Message, Record, Source, Split, Task

TASKS: tuple[Task, ...] = ("knowledge", "diagnosis", "treatment")
# Characters of each part; a character is about one token. On one core a run must stay within ten minutes.
CPT = {"medical-kg": 260_000, "toyhom": 220_000, "sharegpt": 120_000}
SFT = {"huatuo": 190_000, "medical_sft": 70_000, "sharegpt": 30_000}
MUE = 60_000  # of each task
PREFERENCES = 320
HELD_OUT_TEXTS, HELD_OUT_QUESTIONS, HELD_OUT_PREFERENCES = 60, 80, 80  # of each source, of each task, in all
HELD_OUT, HELD_OUT_PAIRS = 10, 20  # per cent of the groups
LONGEST, LONGEST_PAIR = 256, 480  # characters of a record; of a pair's question and longer answer
MODELS = ("gpt-4", "gpt-3.5-turbo", "DISC-MedLLM", "huatuo-chat", "baichuan-chat", "bianque-v2")
PAIRS_PER_QUESTION, SCORE_GAP = 3, 2  # of at most 20 points; a smaller gap is the judge's noise

_NO_LIMIT = 10**9
_LICENCES = {
    "huatuo": ("Huatuo-Llama-Med-Chinese", "Apache-2.0, texts of a commercial model"),
    "medical_sft": ("MedicalGPT medical_sft", "research only"),
    "sharegpt": ("MedicalGPT sharegpt_zh", "research only"),
    "dpo": ("MedicalGPT dpo_zh", "research only"),
    "disc": ("DISC-MedLLM evaluation", "Apache-2.0, for research and testing"),
    "toyhom": ("Chinese-medical-dialogue-data", "MIT, privacy unclear"),
    "medical-kg": ("QASystemOnMedicalGraph", "none stated"),
    "dxy": ("imcs21 DXY dialogues", "none stated"),
}
_CHILD = re.compile(
    r"儿科|小儿|婴|幼儿|儿童|新生儿|早产儿|患儿|宝宝|宝贝|孩子|小孩|男孩|女孩|个月大|(?<!\d)(?:\d|1[0-4])岁"
)
_ASKS_DISEASE = re.compile(
    r"(什么|哪种|何种|哪些)(疾?病|疾病)|可能(患|得|是什么)|患(有|上|了|的是)?(什么|哪|何)|诊断(结果|是)"
)
_ASKS_TREATMENT = re.compile(r"治疗|治愈|用药|药物|手术|吃什么药|怎么办|疗法|方案|处理")
# Columns of the knowledge graph and how a sentence about them begins.
_FACTS = {
    "alias": "又称", "age": "多见于", "department": "就诊科室：", "symptom": "常见症状：", "checklist": "常做检查：",
    "complication": "可能并发", "treatment": "治疗方式：", "drug": "常用药物：", "period": "疗程：",
}  # fmt: skip
# What a row lets go wrong when it is not as its file's other rows are.
_BROKEN = (TypeError, KeyError, IndexError, ValueError, AttributeError)


class DataError(ValueError):
    """A file that cannot be used; the message names it and the remedy."""


@dataclass(frozen=True)
class Draft:
    """An example before it has a split: one turn is a text, two or more a dialogue, with `rejected` a preference."""

    source: str
    place: str
    group: str
    task: Task
    turns: tuple[str, ...]
    rejected: str = ""

    @property
    def child(self) -> bool:
        """Whether it is about a child."""
        return bool(_CHILD.search("".join(self.turns)))

    @property
    def characters(self) -> int:
        """Its length; of a preference, with the longer answer."""
        return sum(map(len, self.turns)) + max(0, len(self.rejected) - len(self.turns[-1]))

    @property
    def keys(self) -> set[str]:
        """What no other record may share: the question, a long answer; of a text its group, of a pair all of it."""
        if len(self.turns) == 1:
            return {self.group}
        if self.rejected:
            return {key("".join((*self.turns, self.rejected)))}
        return {key(self.turns[0])} | {key(answer) for answer in self.turns[1::2] if len(answer) >= 40}

    @property
    def held_out(self) -> bool:
        """Whether its group is kept from training."""
        return digest(self.group) % 100 < (HELD_OUT_PAIRS if self.rejected else HELD_OUT)

    def record(self, name: str) -> Record:
        """The record of the corpus file `name`.

        A medical dialogue gets the task's own short sentence as its system message, so that the routers see the
        task as they do in the app; the rest of the app's is left out because it would be as long as the records.
        General dialogues have none.
        """
        split: Split = "held_out_questions" if self.held_out else "train"
        project, licence = _LICENCES[self.source]
        common: dict[str, Any] = {
            "id": f"{name}-{self.place}",
            "task": self.task,
            "source": Source(name=project, licence=licence, reference=self.place),
            "age_group": "child" if self.child else "any",
            "split": split,
            "group": self.group,
        }
        if len(self.turns) == 1:
            return Record(kind="text", text=self.turns[0], **common)
        task = prompts.prompts()["task_prompts"].get(self.task)
        messages = [Message(role="system", content=task)] if task else []
        for index, turn in enumerate(self.turns):
            messages.append(Message(role="assistant" if index % 2 else "user", content=turn))
        if not self.rejected:
            return Record(kind="dialogue", messages=tuple(messages), **common)
        worse = Message(role="assistant", content=self.rejected)
        return Record(
            kind="preference", prompt=tuple(messages[:-1]), chosen=(messages[-1],), rejected=(worse,), **common
        )


def digest(text: str) -> int:
    """A number that depends on the text alone: the same split on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def key(text: str) -> str:
    """The text without what differs between copies of it: punctuation, spaces, case."""
    return re.sub(r"[\W_]+", "", text).lower()


def tidy(text: Any) -> str:
    """A value of a file as text: stripped, without runs of spaces and empty lines. Raises TypeError for others."""
    if not isinstance(text, str):
        raise TypeError(text)
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"[ \t\u3000]+", " ", text)).strip()


def shorten(text: str, limit: int = LONGEST) -> str:
    """The text up to its last sentence end within `limit`; empty when there is none."""
    return text if len(text) <= limit else text[: max(text[:limit].rfind(end) for end in "。！？\n") + 1].strip()


def chinese(text: str) -> bool:
    """Whether most characters are Chinese: code and other languages would be bytes to the study's vocabulary."""
    return sum("一" <= character <= "鿿" for character in text) > 0.6 * max(1, len(text))


def longest_name(text: str, names: set[str]) -> str:
    """The longest of the disease names (2 to 20 characters) in a text, or nothing."""
    for length in range(min(20, len(text)), 1, -1):
        for start in range(len(text) - length + 1):
            if text[start : start + length] in names:
                return text[start : start + length]
    return ""


def task_of(question: str) -> Task:
    """Which of the three consultation tasks a medical question belongs to, by its words."""
    if _ASKS_DISEASE.search(question):
        return "diagnosis"
    return "treatment" if _ASKS_TREATMENT.search(question) else "knowledge"


def items(cell: str) -> list[str]:
    """The entries of a knowledge-graph cell; those that the export cut with `...` are left out."""
    parts = re.split(r"[\s、，,;；]+", cell.replace("[详细]", " "))
    whole = (part for part in parts if part and not part.endswith(("...", "…")))
    return [part for part in dict.fromkeys(whole) if part != "暂无相关资料"]


def prose(row: dict[str, str]) -> str:
    """A row of the knowledge graph as sentences, in an order of its own."""
    sentences = []
    for column, opening in _FACTS.items():
        if found := items(row.get(column) or ""):
            more = "等" if "[详细]" in (row[column] or "") else ""
            sentences.append(f"{opening}{'、'.join(found)}{more}。")
    sentences.sort(key=lambda sentence: digest(row["name"] + sentence))
    return f"{tidy(row['name'])}：{''.join(sentences)}" if sentences else ""


def disease(line: int, row: dict[str, str]) -> Iterator[Draft]:
    """medical-kg: a disease as prose."""
    text, name = shorten(prose(row)), tidy(row["name"])
    if len(text) > 40:
        yield Draft("medical-kg", f"medical-kg:{line}", f"disease:{name}", "general", (text,))


def instruction(line: int, row: dict[str, Any], names: set[str]) -> Iterator[Draft]:
    """huatuo: a question and its answer, grouped by the disease asked about (in a diagnosis: the one answered)."""
    turns = (tidy(row["instruction"] + row["input"]), tidy(row["output"]))
    task = task_of(turns[0])
    first, second = turns[::-1] if task == "diagnosis" else turns
    name = longest_name(first, names) or longest_name(second, names)
    yield Draft("huatuo", f"huatuo:{line}", f"disease:{name}" if name else _by_question(turns[0]), task, turns)


def conversation(line: int, row: dict[str, Any], source: str) -> Iterator[Draft]:
    """medicalgpt: every question of a conversation with its answer; the conversation is one group."""
    said = [(turn["from"], tidy(turn["value"])) for turn in row["conversations"] if turn["from"] != "system"]
    group = _by_question(said[0][1])
    for number, ((who, question), (then, answer)) in enumerate(itertools.pairwise(said)):
        if (who, then) == ("human", "gpt") and chinese(question + answer):
            task: Task = task_of(question) if source == "medical_sft" else "general"
            yield Draft(source, f"{source}:{line}:{number}", group, task, (question, answer))


def general_pair(line: int, row: dict[str, Any]) -> Iterator[Draft]:
    """medicalgpt: a general preference pair."""
    (question,) = [tidy(turn["value"]) for turn in row["conversations"] if turn["from"] == "human"]
    chosen, rejected = tidy(row["chosen"]), tidy(row["rejected"])
    if chosen != rejected and chinese(question + chosen + rejected):
        yield Draft("dpo", f"dpo:{line}", _by_question(question), "general", (question, chosen), rejected)


def outpatient(line: int, row: dict[str, str]) -> Iterator[Draft]:
    """toyhom: a question to a doctor and the answer."""
    turns = (tidy(row["ask"]), tidy(row["answer"]))
    yield Draft("toyhom", f"toyhom:{line}", _by_question(turns[0]), task_of(row["title"] + turns[0]), turns)


def consultation(number: int, row: dict[str, Any]) -> Iterator[Draft]:
    """dxy: a parent's report, the doctor's questions back, the diagnosis."""
    turns = tuple(map(tidy, row["dialog"]))
    if len(turns) % 2 == 0:
        yield Draft("dxy", f"dxy:{number}", _by_question(turns[0]), "diagnosis", turns)


class Files:
    """Reads the upstream files row by row, strictly in their encodings.

    Broken rows are left out and counted in `skipped`; every file that was read has its sha256 in `sources`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sources: dict[str, str] = {}
        self.skipped: Counter[str] = Counter()

    def text(self, name: str, encoding: str = "utf-8") -> str:
        """A whole file; a line that is not in the encoding becomes a broken row. Raises DataError."""
        try:
            content = (self.folder / name).read_bytes()
        except OSError as error:
            raise DataError(
                f"{self.folder / name} cannot be read ({error.strerror}). Give the folder that holds huatuo/, "
                "medicalgpt/, disc-medllm/, toyhom/, medical-kg/ and dxy-dialogues/."
            ) from None
        self.sources[name] = hashlib.sha256(content).hexdigest()
        return content.decode(encoding, errors="replace")

    def json_lines(self, name: str, parse: Callable[[int, Any], Iterable[Draft]]) -> Iterator[Draft]:
        """One JSON object a line."""
        for line, text in enumerate(self.text(name).splitlines(), 1):
            yield from self._row(name, line, text, lambda line, text: parse(line, json.loads(text)))

    def table(self, name: str, parse: Callable[[int, Any], Iterable[Draft]]) -> Iterator[Draft]:
        """A CSV file in GB18030 with a header."""
        rows = csv.DictReader(io.StringIO(self.text(name, "gb18030"), newline=""))
        for line, row in enumerate(rows, 2):
            yield from self._row(name, line, row, parse)

    def literals(self, name: str, parse: Callable[[int, Any], Iterable[Draft]]) -> Iterator[Draft]:
        """Lines `SPLIT [...]`, each a list of Python literals; never evaluated as code."""
        number = 0
        for line in filter(str.strip, self.text(name).splitlines()):
            try:
                rows = list(ast.literal_eval(line.partition(" ")[2].strip()))
            except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
                self.skipped[name] += 1
                continue
            for row in rows:
                number += 1
                yield from self._row(name, number, row, parse)

    def _row(self, name: str, line: int, row: Any, parse: Callable[[int, Any], Iterable[Draft]]) -> list[Draft]:
        try:
            drafts = list(parse(line, row))
            if "\ufffd" in str(row) or not all(all(draft.turns) for draft in drafts):
                raise ValueError
        except _BROKEN:
            self.skipped[name] += 1
            return []
        return drafts


def judged_pairs(files: Files) -> Iterator[Draft]:
    """disc-medllm: first answers of two models whose dialogues a judge (GPT-4) scored clearly apart, widest gap first.

    A score is four marks of 1 to 5, added.
    """
    for part in ("cmid", "cmb-clin"):
        answers: dict[str, list[tuple[int, str, str]]] = {}
        for model in MODELS:
            scores = _scores(files, f"disc-medllm/gpt4scores_{model}_{part}.jsonl")
            name = f"disc-medllm/dialogues_{model}_{part}.json"
            for dialogue in json.loads(files.text(name)):
                try:
                    question, answer = (tidy(turn["content"]) for turn in dialogue["conversation"][:2])
                    answers.setdefault(question, []).append((scores[dialogue["id"]], model, answer))
                except _BROKEN:
                    files.skipped[name] += 1
        for question, judged in answers.items():
            yield from _widest(part, question, judged)


def _scores(files: Files, name: str) -> dict[str, int]:
    scores = {}
    for line in files.text(name).splitlines():
        try:
            row = json.loads(line)
            first, second, third, fourth = (int(mark) for mark in re.findall(r": *([1-5])\b", row["scores"]))
            scores[row["id"]] = first + second + third + fourth
        except _BROKEN:
            files.skipped[name] += 1
    return scores


def _widest(part: str, question: str, judged: list[tuple[int, str, str]]) -> Iterator[Draft]:
    group, task = _by_question(question), task_of(question)
    pairs = []
    for (high, better, chosen), (low, worse, rejected) in itertools.permutations(judged, 2):
        place = f"{part}:{digest(question) % 10**8}:{better}:{worse}"
        draft = Draft("disc", place, group, task, (question, chosen), rejected)
        if high - low >= SCORE_GAP and draft.characters <= LONGEST_PAIR:
            pairs.append((low - high, digest(place), draft))
    yield from (draft for _, _, draft in sorted(pairs)[:PAIRS_PER_QUESTION])


def _by_question(question: str) -> str:
    return f"question:{key(question)[:80]}"


def unique(drafts: Iterable[Draft], seen: set[str], longest: int = LONGEST) -> list[Draft]:
    """The drafts of at most `longest` characters that share nothing with what was `seen` before."""
    kept = []
    for draft in drafts:
        if draft.characters <= longest and not draft.keys & seen:
            seen |= draft.keys
            kept.append(draft)
    return kept


def choose(drafts: Iterable[Draft], characters: int = _NO_LIMIT, count: int = _NO_LIMIT) -> list[Draft]:
    """Up to so many drafts and characters in all, those about children first, otherwise by chance."""
    chosen, length = [], 0
    for draft in sorted(drafts, key=lambda draft: (not draft.child, digest(draft.place))):
        length += draft.characters
        if length > characters or len(chosen) == count:
            break
        chosen.append(draft)
    return chosen


def as_text(draft: Draft) -> Draft:
    """A question and its answer rewritten as completion text, the paper's hybrid; long ones end with a sentence."""
    return replace(draft, task="general", turns=(shorten(f"问：{draft.turns[0]}\n答：{draft.turns[1]}"),))


def _share(draft: Draft, parts: int) -> bool:
    """Whether a draft's group belongs to one of so many equal parts (independent of the split)."""
    return digest(f"part {draft.group}") % parts == 0


def corpus_files(files: Files) -> dict[str, list[Draft]]:
    """What goes into each file of the corpus."""
    diseases = unique(files.table("medical-kg/disease.gb18030.csv", disease), set())
    names = {draft.group.removeprefix("disease:") for draft in diseases}
    pairs = unique(
        [*judged_pairs(files), *files.json_lines("medicalgpt/dpo_zh_500.jsonl", general_pair)], set(), LONGEST_PAIR
    )
    seen = {key(draft.turns[0]) for draft in pairs}  # what a pair asks is in no other file
    huatuo = unique(files.json_lines("huatuo/llama_data.json", partial(instruction, names=names)), seen)
    medical = partial(conversation, source="medical_sft")
    medical = unique(files.json_lines("medicalgpt/medical_sft_1K_format.jsonl", medical), seen)
    dxy = unique(files.literals("dxy-dialogues/dxy_dialog_data_dialog_v2.txt", consultation), seen)
    toyhom = unique(files.table("toyhom/internal_medicine_sample.gb18030.csv", outpatient), seen)
    chats = partial(conversation, source="sharegpt")
    chats = unique(files.json_lines("medicalgpt/sharegpt_zh_1K_format.jsonl", chats), seen, longest=4 * LONGEST)

    asked = [*huatuo, *dxy, *(draft for draft in toyhom if _share(draft, 5))]
    by_task = [[draft for draft in asked if draft.task == task] for task in TASKS]
    told = [as_text(draft) for draft in toyhom if not _share(draft, 5)]
    short = [draft for draft in chats if _share(draft, 3) and draft.characters <= LONGEST]
    chatter = [as_text(draft) for draft in chats if not _share(draft, 3)]

    def train(drafts: Iterable[Draft], characters: int = _NO_LIMIT, count: int = _NO_LIMIT) -> list[Draft]:
        return choose((draft for draft in drafts if not draft.held_out), characters, count)

    def kept(drafts: Iterable[Draft], count: int) -> list[Draft]:
        return choose((draft for draft in drafts if draft.held_out), count=count)

    mue = [draft for drafts in by_task for draft in train(drafts, MUE)]
    places = {draft.place for draft in mue}
    rest = [draft for draft in huatuo if draft.place not in places]
    parts = {
        "cpt": [(diseases, CPT["medical-kg"]), (told, CPT["toyhom"]), (chatter, CPT["sharegpt"])],
        "sft": [(rest, SFT["huatuo"]), (medical, SFT["medical_sft"]), (short, SFT["sharegpt"])],
    }
    return {name: [draft for part in given for draft in train(*part)] for name, given in parts.items()} | {
        "preferences": train(pairs, count=PREFERENCES),
        "mue": mue,
        "held_out_texts": [*kept(diseases, HELD_OUT_TEXTS), *kept(told, HELD_OUT_TEXTS)],
        "held_out_questions": [draft for drafts in by_task for draft in kept(drafts, HELD_OUT_QUESTIONS)],
        "held_out_preferences": kept(pairs, HELD_OUT_PREFERENCES),
    }


def build(folder: Path, output: Path) -> dict[str, Any]:
    """Writes the corpus `output`; returns its manifest. The same files give the same bytes.

    Raises DataError for a file that is missing or unreadable, CorpusError when `output` holds something else.
    Broken rows are left out; the manifest counts them under `skipped`.
    """
    files = Files(folder)
    drafts = corpus_files(files)
    manifest = {"name": "real", "seed": 0, "sources": files.sources, "skipped": dict(files.skipped)}
    return write_corpus(output, {n: (draft.record(n) for draft in d) for n, d in drafts.items()}, manifest)


def main() -> int:
    """Builds the corpus and prints what went into it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="FOLDER", help="the upstream files")
    parser.add_argument("-o", "--output", type=Path, default=Path("PedCorpus/real"))
    arguments = parser.parse_args()
    try:
        manifest = build(arguments.data, arguments.output)
    except (DataError, CorpusError, OSError) as error:
        print(f"real_records: {error}", file=sys.stderr)
        return 2
    for name, count in manifest["counts"].items():
        print(f"{name:<22}{count:>7}")
    print(f"wrote {arguments.output}; broken rows left out: {sum(manifest['skipped'].values())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
