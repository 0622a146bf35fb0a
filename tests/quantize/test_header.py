"""The header reader: what it reads, what it refuses, and that llama.cpp survives whatever it lets pass."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from header_fuzz import TEMPLATE, Seed, seed, seeds

from quantize import header, usable

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COUNT = 100_000


def child(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GGML_NO_BACKTRACE": "1"}
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)


def test_a_hundred_thousand_damaged_files_and_llama_cpp_survives_those_let_through(tmp_path: Path) -> None:
    result = child("header_fuzz.py", COUNT, tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    assert found["reasons"] >= 30  # every kind of check was met
    assert COUNT * 0.02 < found["accepted"] < COUNT * 0.2  # most damage is seen, and the rest is worth loading
    assert found["slowest"] < 1  # seconds; a file that could hang the reader would take far longer
    loaded = child("header_load.py", tmp_path)
    name = loaded.stdout.split("\n")[-2:]
    assert loaded.returncode == 0, f"{name} ended llama.cpp: {loaded.stderr[-500:]}"
    assert json.loads(loaded.stdout.splitlines()[-1])["loaded"] == 400


@pytest.mark.parametrize("made", seeds())
def test_reads_what_was_written(made: Seed, tmp_path: Path) -> None:
    path = tmp_path / "seed.gguf"
    path.write_bytes(made.bytes())
    found = header.read(path)
    usable.check(found)
    assert found.metadata["tokenizer.chat_template"] == TEMPLATE
    assert found.metadata["general.name"] == "种子"
    assert found.metadata[f"{found.architecture}.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    tokens = found.metadata["tokenizer.ggml.tokens"].list()
    assert len(tokens) == found.tensors["token_embd.weight"].shape[0]
    assert tokens[2] in ("<|im_end|>", "</s>")
    assert found.metadata["tokenizer.ggml.token_type"].list()[1] == 3
    expected = np.array([(n * 37 % 101 - 50) / 100 for n in range(64)], np.float32).reshape(8, 8)
    np.testing.assert_array_equal(found.rows("blk.0.ffn_down.weight", 0, 8), expected)
    np.testing.assert_array_equal(found.rows("blk.0.ffn_norm.weight", 2, 5), expected[0, 2:5])


def test_agrees_with_the_writer_of_the_gguf_package(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("texts", ["", "儿科", "x"])
    writer.add_float64("double", 0.1)
    writer.add_int16("short", -7)
    matrix = np.arange(24, dtype=np.float32).reshape(4, 6)
    writer.add_tensor("matrix", matrix)
    writer.add_tensor("half", matrix.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = header.read(path)
    assert found.metadata["numbers"].list() == [1, -2, 3]
    assert found.metadata["texts"].list() == ["", "儿科", "x"]
    assert (found.metadata["double"], found.metadata["short"]) == (0.1, -7)
    np.testing.assert_array_equal(found.rows("matrix", 1, 3), matrix[1:3])
    np.testing.assert_array_equal(found.rows("half", 0, 4), matrix)


def with_key(name: str, kind: int, value: Any, architecture: str = "qwen3", tokenizer: str = "gpt2") -> Seed:
    """A seed in which one metadata entry says something else."""
    made = seed(architecture, tokenizer)
    other = Seed()
    other.key(name, kind, value)
    start = struct.pack("<Q", len(name)) + name.encode()
    made.keys = [other.keys[0] if entry.startswith(start) else entry for entry in made.keys]
    if other.keys[0] not in made.keys:
        made.keys.append(other.keys[0])
    return made


def without(name: str, made: Seed) -> Seed:
    """A seed without its last tensor, which must have this name."""
    assert name.encode() in made.tensors[-1]
    made.tensors.pop()
    return made


U32, I32, F32, BOOL, STRING, ARRAY = header.U32, header.I32, header.F32, header.BOOL, header.STRING, header.ARRAY
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "Ċ", "Ġ", "åĦ", "¿", "åĦ¿"]
WITHOUT_A_BYTE = [
    "<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" if byte != 0xE2 else "another" for byte in range(256)), "▁", "儿", "科",
]  # fmt: skip
UNUSABLE = {
    "another architecture": (with_key("general.architecture", STRING, "gpt2"), "'gpt2' is not one of"),
    "an adapter": (with_key("general.type", STRING, "adapter"), "of type 'adapter'"),
    "one of several files": (with_key("split.count", 2, 3), "several files"),
    "600 layers": (with_key("qwen3.block_count", U32, 600), "claims 600 layers"),
    "no heads": (with_key("qwen3.attention.head_count", U32, 0), "head_count is 0"),
    "layers of the wrong type": (with_key("qwen3.block_count", F32, 1.0), "block_count has the wrong type"),
    "experts": (with_key("qwen3.expert_count", U32, 8), "mixture-of-experts"),
    "unknown rope": (with_key("qwen3.rope.scaling.type", STRING, "spiral"), "rope.scaling.type is unknown"),
    "rope of zero": (with_key("qwen3.rope.freq_base", F32, 0.0), "rope.freq_base is 0.0"),
    "uneven groups": (with_key("qwen3.attention.head_count_kv", U32, 4), "does not fit together"),
    "repeated token": (with_key("tokenizer.ggml.tokens", ARRAY, (STRING, [*TOKENS[:10], "a"])), "same token"),
    "tokens alike up to a zero": (
        with_key("tokenizer.ggml.tokens", ARRAY, (STRING, [*TOKENS[:9], "x\0y", "x\0z"])),
        "same token",
    ),
    "a token named like an empty one": (
        with_key("tokenizer.ggml.tokens", ARRAY, (STRING, [*TOKENS[:9], "", "[EMPTY_9]"])),
        "same token",
    ),
    "not UTF-8": (with_key("tokenizer.ggml.tokens", ARRAY, (STRING, [*TOKENS[:10], b"\xff"])), "not UTF-8"),
    "too few tokens": (with_key("tokenizer.ggml.tokens", ARRAY, (STRING, TOKENS[:9])), "11 entries for 9 tokens"),
    "too few types": (with_key("tokenizer.ggml.token_type", ARRAY, (I32, [1])), "1 entries for 11 tokens"),
    "no end": (with_key("tokenizer.ggml.eos_token_id", U32, 11), "eos_token_id is 11"),
    "no merges": (with_key("tokenizer.ggml.merges", ARRAY, (STRING, [])), "merges is missing"),
    "unknown splitter": (with_key("tokenizer.ggml.pre", STRING, "mine"), "'mine' is unknown"),
    "byte token missing": (
        with_key("tokenizer.ggml.tokens", ARRAY, (STRING, WITHOUT_A_BYTE), "llama", "llama"),
        "lacks byte tokens",
    ),
    "endless template": (with_key("tokenizer.chat_template", STRING, "x" * 70_000), "template"),
    "dropped bias": (without("attn_v.bias", seed("qwen2")), "blk.0.attn_v.bias is missing"),
    "dropped norm": (without("attn_k_norm.weight", seed()), "blk.0.attn_k_norm.weight is missing"),
    "embedding of another size": (with_key("qwen3.embedding_length", U32, 16), "has the shape"),
}


@pytest.mark.parametrize("kind", [header.GGMLQuantizationType.Q8_1, header.GGMLQuantizationType.Q8_K])
def test_refuses_types_of_intermediate_results(kind: header.GGMLQuantizationType) -> None:
    made, (block, size) = seed(), header.GGML_QUANT_SIZES[kind]
    made.tensors.append(struct.pack("<Q1sI2QIQ", 1, b"x", 2, block, 2, kind, len(made.data)))
    made.data += bytes(2 * size)
    with pytest.raises(header.Malformed, match=f"has the type {kind.name}, which cannot be used"):
        usable.check(header.parse(made.bytes(), Path("x.gguf")))


@pytest.mark.parametrize("case", UNUSABLE)
def test_refuses_what_llama_cpp_cannot_use(case: str) -> None:
    made, words = UNUSABLE[case]
    found = header.parse(made.bytes(), Path("x.gguf"))
    with pytest.raises(header.Malformed, match=re.escape(words)):
        usable.check(found)


ABORTING = ("repeated token", "600 layers", "unknown rope", "tokens alike up to a zero", "byte token missing")


@pytest.mark.parametrize("case", ABORTING)
def test_llama_cpp_would_have_been_aborted(case: str, tmp_path: Path) -> None:
    """Contract with llama.cpp: without our check these files end the process, which shows what the checks are for."""
    (tmp_path / "x.gguf").write_bytes(UNUSABLE[case][0].bytes())
    assert child("header_load.py", tmp_path).returncode < 0


def damaged(change: Any) -> bytes:
    made = seed()
    change(made)
    return made.bytes()


def second_offset(value: int) -> Any:
    def change(made: Seed) -> None:
        made.tensors[1] = made.tensors[1][:-8] + struct.pack("<Q", value)

    return change


MALFORMED = {
    "an older version": (b"GGUF\x01" + seed().bytes()[5:], "version 1"),
    "another file": (b"PK\x03\x04" + bytes(100), "not a GGUF"),
    "cut short": (seed().bytes()[:-40], "not complete"),
    "cut in the header": (seed().bytes()[:300], "past the end"),
    "repeated key": (damaged(lambda m: m.keys.append(m.keys[3])), "occurs twice"),
    "repeated tensor": (damaged(lambda m: m.tensor("output_norm.weight", 8)), "name occurs twice"),
    "overlapping tensors": (damaged(second_offset(0)), "lies at 0"),
    "misaligned tensors": (damaged(second_offset(7)), "lies at 7"),
    "long name": (damaged(lambda m: m.tensor("x" * 64, 8)), "64 bytes for a tensor's name"),
    "five dimensions": (damaged(lambda m: m.tensor("x", 1, 1, 1, 1, 2)), "5 dimensions"),
    "overflowing shape": (
        damaged(lambda m: m.tensors.append(struct.pack("<Q1sI3QIQ", 1, b"x", 3, 2**32, 2**32, 4, 0, 0))),
        "impossible shape",
    ),
    "empty tensor": (damaged(lambda m: m.tensor("x", 0, 8)), "impossible shape"),
    "alignment of 8": (damaged(lambda m: m.key("general.alignment", U32, 8)), "alignment"),
    "half a block": (
        damaged(lambda m: m.tensors.append(struct.pack("<Q1sI1QIQ", 1, b"x", 1, 33, 8, len(m.data)))),
        "do not fill blocks",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_names_the_damage(case: str, tmp_path: Path) -> None:
    data, words = MALFORMED[case]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    with pytest.raises(header.Malformed, match=re.escape(words)) as caught:
        header.read(path)
    assert str(caught.value).startswith("damaged.gguf: ")


def test_an_array_of_strings_that_ends_with_the_file_is_cut_short() -> None:
    """Without tensors nothing is read after it, which would notice."""
    made = seed()
    made.tensors.clear()
    tokens = next(entry for entry in made.keys if b"tokenizer.ggml.tokens" in entry)
    made.keys = [entry for entry in made.keys if entry is not tokens] + [tokens]
    data = made.bytes()
    end = data.rindex(tokens) + len(tokens)
    for cut in range(1, 60):
        with pytest.raises(header.Malformed, match="past the end"):
            header.parse(data[: end - cut], Path("x.gguf"))


def test_a_message_holds_no_control_characters(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(damaged(lambda m: m.key("a\x1b[2J", 99 - 92, True) or m.keys.append(m.keys[-1])))
    with pytest.raises(header.Malformed) as caught:
        header.read(path)
    assert str(caught.value).isprintable()


def test_allocates_nothing_that_only_the_file_claims() -> None:
    """Lengths of gigabytes in a file of kilobytes cost kilobytes."""
    made, damagers = seed(), []
    for part, entry, offset in made.lengths:
        entries = list(made.keys if part == "keys" else made.tensors)
        for value in (3_999_999, 16 << 20, 2**31, 2**63):
            changed = list(entries)
            changed[entry] = changed[entry][:offset] + struct.pack("<Q", value) + changed[entry][offset + 8 :]
            keys, tensors = (changed, made.tensors) if part == "keys" else (made.keys, changed)
            damagers.append(Seed(keys, tensors, made.data).bytes())
    tracemalloc.start()
    for file in damagers:
        with pytest.raises(header.Malformed):
            usable.check(header.parse(file, Path("x")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_patches_a_reserved_place(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(seed().bytes())
    before = header.read(path)
    header.patch(path, "pediatricsgpt.fidelity", '{"儿":1}')
    after = header.read(path)
    assert after.metadata["pediatricsgpt.fidelity"] == '{"儿":1}'.ljust(62)
    assert after.tensors == before.tensors
    assert {**after.metadata, "pediatricsgpt.fidelity": ""} == {**before.metadata, "pediatricsgpt.fidelity": ""}
    with pytest.raises(ValueError, match="no room of 65 bytes"):
        header.patch(path, "pediatricsgpt.fidelity", "x" * 65)
    with pytest.raises(ValueError, match="no room"):
        header.patch(path, "pediatricsgpt.other", "x")


def test_a_large_vocabulary_is_kept_as_bytes(tmp_path: Path) -> None:
    """151,936 tokens and as many merges, as Qwen's: nothing is decoded before somebody asks."""
    made = Seed()
    made.key("general.architecture", STRING, "qwen3")
    tokens = [f"词{number}" for number in range(151_936)]
    made.key("tokenizer.ggml.tokens", ARRAY, (STRING, tokens))
    made.key("tokenizer.ggml.merges", ARRAY, (STRING, [f"{text} x" for text in tokens]))
    found = header.parse(made.bytes(), tmp_path)
    assert found.metadata["tokenizer.ggml.tokens"].list() == tokens
    assert len(found.metadata["tokenizer.ggml.merges"]) == 151_936
