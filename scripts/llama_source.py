"""Fetches the parts of llama-cpp-python's source package that tests and benchmarks compare with.

    python scripts/llama_source.py

These are the test vocabularies with their vectors, and upstream's converter, which the exporter is timed against. They
go to build/llama-source/, at the version pinned in constraints.txt, and are not fetched twice. An installed
llama-cpp-python does not contain them.

The vocabularies are GGUF files without weights. `*_tokenizer` turn one back into the files of a Hugging Face folder, so
that the original tokenizer libraries can be held against the exporter with a real vocabulary.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
_FOLDER = _ROOT / "build" / "llama-source"
_VENDOR = "vendor/llama.cpp/"
_WANTED = re.compile(
    r"models/ggml-vocab-[^/]+|convert_hf_to_gguf\.py|convert_lora_to_gguf\.py|LICENSE|(conversion|gguf-py)/.+"
)
_DONE = "complete.txt"  # written last: an interrupted run leaves none
_SEPARATOR = "\n__ggml_vocab_test__\n"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_NORMAL, _CONTROL, _USER, _BYTE = 1, 3, 4, 6  # the same numbers in GGUF and SentencePiece
_PADDING = re.compile(r"\[PAD\d+\]")  # upstream's names for rows without a token

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class FetchFailed(Exception):
    """The source package cannot be had; the message says why and what to do."""


def version() -> str:
    """The pinned version of llama-cpp-python."""
    pinned = re.search(r"(?m)^llama[_-]cpp[_-]python==(\S+)$", (_ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert pinned, "constraints.txt pins no llama-cpp-python"
    return pinned[1]


def source_package() -> Path | None:
    """The unpacked llama.cpp folder if it has been fetched, at the pinned version."""
    done = _FOLDER / _DONE
    return _FOLDER if done.is_file() and done.read_text(encoding="utf-8") == version() else None


def fetch() -> Path:
    """Downloads and unpacks the source package with pip, once. Raises FetchFailed."""
    if found := source_package():
        print(f"llama.cpp's test data of llama-cpp-python {version()} is in {found}.")
        return found
    _FOLDER.mkdir(parents=True, exist_ok=True)
    (_FOLDER / _DONE).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=_FOLDER) as work:
        print(f"Downloading the source package of llama-cpp-python {version()} (70 MB) with pip …", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
        result = subprocess.run(
            [*command, "--dest", work, f"llama-cpp-python=={version()}"], capture_output=True, text=True, check=False
        )
        archives = list(Path(work).glob("*.tar.gz"))
        if result.returncode or len(archives) != 1:
            words = " ".join(result.stderr.strip().splitlines()[-2:]) or "pip said nothing"
            raise FetchFailed(
                f"pip could not download llama-cpp-python {version()} ({words}). It needs a package index or a folder "
                "with the source package (PIP_FIND_LINKS=FOLDER); nothing but tests and benchmarks needs this data."
            )
        count = unpack(archives[0], _FOLDER)
    (_FOLDER / _DONE).write_text(version(), encoding="utf-8")
    print(f"{count} files are in {_FOLDER}.")
    return _FOLDER


def unpack(archive: Path, folder: Path) -> int:
    """The wanted regular files of the archive below `folder`, without the archive's own top folders."""
    count = 0
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.partition("/")[2]
            if member.isfile() and name.startswith(_VENDOR) and _WANTED.fullmatch(name.removeprefix(_VENDOR)):
                # Renamed before the filter looks at it: what would leave the folder is refused by tarfile itself.
                tar.extract(member.replace(name=name.removeprefix(_VENDOR)), folder, filter="data")
                count += 1
    return count


def vectors(source: Path, name: str) -> list[tuple[str, list[int]]]:
    """Upstream's test texts of a vocabulary and the ids its original tokenizer gives, without special tokens."""
    file = source / "models" / f"ggml-vocab-{name}.gguf"
    given = Path(f"{file}.inp").read_bytes().decode()  # as bytes: line ends are part of the texts
    texts = given.removesuffix(_SEPARATOR).split(_SEPARATOR)
    lines = Path(f"{file}.out").read_text(encoding="utf-8").splitlines()
    return [(text, [int(number) for number in line.split()]) for text, line in zip(texts, lines, strict=True)]


@cache
def metadata(source: Path, name: str) -> dict[str, Any]:
    """Everything the header of a vocabulary says, arrays included (gguf's own reader takes ten times as long)."""
    data = (source / "models" / f"ggml-vocab-{name}.gguf").read_bytes()
    count, position = struct.unpack_from("<Q", data, 16)[0], 24
    values = {}
    for _ in range(count):
        (key,), position = _items(data, position, _STRING, 1)
        kind, length = struct.unpack_from("<I", data, position)[0], 1
        position += 4
        if array := kind == _ARRAY:
            kind, length = struct.unpack_from("<IQ", data, position)
            position += 12
        items, position = _items(data, position, kind, length)
        values[key] = items if array else items[0]
    return values


def _items(data: bytes, position: int, kind: int, count: int) -> tuple[list[Any], int]:
    """`count` values of a type, and where they end."""
    if kind != _STRING:
        form = f"<{count}{_SCALARS[kind]}"
        return list(struct.unpack_from(form, data, position)), position + struct.calcsize(form)
    length, items = struct.Struct("<Q").unpack_from, []
    for _ in range(count):
        start = position + 8
        position = start + length(data, position)[0]
        items.append(data[start:position].decode("utf-8", "replace"))
    return items, position


def qwen_tokenizer(source: Path, folder: Path) -> None:
    """Writes Qwen2's tokenizer (151,936 rows with padding) into `folder`, with a ChatML template."""
    bpe_tokenizer(
        source, "qwen2", folder, pre=split_by(QWEN2), normalizer={"type": "NFC"},
        settings={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None, "chat_template": CHATML,
                  "tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False},
    )  # fmt: skip


def bpe_tokenizer(
    source: Path,
    name: str,
    folder: Path,
    *,
    pre: dict[str, Any],
    settings: dict[str, Any],
    normalizer: dict[str, Any] | None = None,
    post: dict[str, Any] | None = None,
    ignore_merges: bool = False,
) -> None:
    """Writes tokenizer.json and tokenizer_config.json of a byte-level BPE vocabulary."""
    given = metadata(source, name)
    tokens, types = given["tokenizer.ggml.tokens"], given["tokenizer.ggml.token_type"]
    byte_level: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": number, "content": text, "special": kind == _CONTROL, **added}
                for number, (text, kind) in enumerate(zip(tokens, types, strict=True))
                if kind != _NORMAL and not _PADDING.fullmatch(text)
            ],
            "normalizer": normalizer,
            "pre_tokenizer": pre,
            "post_processor": post or {**byte_level, "use_regex": False},
            "decoder": {**byte_level, "use_regex": False},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": ignore_merges,
                "vocab": {text: number for number, text in enumerate(tokens) if types[number] == _NORMAL},
                "merges": [merge.split(" ") for merge in given["tokenizer.ggml.merges"]],
            },
        },
    )
    write_json(folder / "tokenizer_config.json", settings)


def sentencepiece_tokenizer(
    source: Path, name: str, folder: Path, *, dummy_prefix: bool, settings: dict[str, Any]
) -> None:
    """Writes tokenizer.model and tokenizer_config.json of a SentencePiece vocabulary.

    A GGUF of upstream's converter calls user-defined pieces normal. They are the ones before the byte pieces.
    """
    from sentencepiece import sentencepiece_model_pb2

    pb2: Any = sentencepiece_model_pb2
    given = metadata(source, name)
    proto = pb2.ModelProto()
    tokens, scores, types = (given[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    first = types.index(_BYTE)
    for number, (text, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
        proto.pieces.add(piece=text, score=score, type=_USER if kind == _NORMAL and number < first else kind)
    proto.trainer_spec.model_type = pb2.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.vocab_size = len(proto.pieces)
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = dummy_prefix
    proto.normalizer_spec.remove_extra_whitespaces = False
    write_json(folder / "tokenizer_config.json", settings)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())


def split_by(expression: str) -> dict[str, Any]:
    """The pre-tokenizer of most byte-level vocabularies: split by an expression, then write bytes as letters."""
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        ],
    }


def write_json(file: Path, value: dict[str, Any]) -> None:
    """UTF-8, readable."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    try:
        fetch()
    except FetchFailed as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\nInterrupted. The same command starts again.", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        print(f"{error}. Make room on the disk and start again.", file=sys.stderr)
        raise SystemExit(2) from None
