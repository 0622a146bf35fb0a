"""Files that must not reach llama.cpp are refused in one sentence; sound ones are described."""

import contextlib
import shutil
import struct
import time
from pathlib import Path

import pytest
from tiny_model import write_model

from tui.engine import EngineError, embedded_model
from tui.engine.header import check_memory, read_header


def refused(path: Path) -> str:
    with pytest.raises(EngineError) as caught:
        read_header(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith("。")
    return message


def test_sound_file_is_described(tiny_gguf: Path) -> None:
    header = read_header(tiny_gguf)
    assert (header.architecture, header.quant) == ("qwen3", "F32")
    assert header.number("context_length") == 2048
    assert header.tensors["blk.1.ffn_up.weight"] == ((64, 128), 0)


def test_wrong_files(tmp_path: Path, tiny_gguf: Path) -> None:
    assert "找不到" in refused(tmp_path / "missing.gguf")
    assert "找不到" in refused(tmp_path)
    text = tmp_path / "text.gguf"
    text.write_text("这不是模型")
    assert "不是 GGUF" in refused(text)
    empty = tmp_path / "empty.gguf"
    empty.touch()
    assert "不是 GGUF" in refused(empty)


@pytest.mark.parametrize("part", [5, 20, 100, 5000, -1, -4000])
def test_truncated_anywhere(tmp_path: Path, tiny_gguf: Path, part: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:part])
    assert "损坏" in refused(path)


@pytest.mark.parametrize(
    ("offset", "value"),
    [(4, struct.pack("<I", 99)), (8, b"\xff" * 8), (16, b"\xff" * 8), (24, b"\xff" * 8)],
    ids=["version", "tensors", "keys", "key length"],
)
def test_absurd_numbers_in_the_header(tmp_path: Path, tiny_gguf: Path, offset: int, value: bytes) -> None:
    data = bytearray(tiny_gguf.read_bytes())
    data[offset : offset + len(value)] = value
    path = tmp_path / "absurd.gguf"
    path.write_bytes(data)
    assert "损坏" in refused(path)


def test_every_flipped_header_byte_is_read_without_a_crash(tmp_path: Path, tiny_gguf: Path) -> None:
    data = tiny_gguf.read_bytes()
    path = tmp_path / "flipped.gguf"
    for offset in range(0, 4000, 37):
        flipped = bytearray(data)
        flipped[offset] ^= 0xFF
        path.write_bytes(flipped)
        with contextlib.suppress(EngineError):  # many bytes carry no meaning; anything else fails the test
            read_header(path)


def test_unusable_models(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    assert "没有对话模板" in refused(write_model(path, None, template=None))
    assert "过长" in refused(write_model(path, None, template="x" * 70_000))
    assert "词表" in refused(write_model(path, None, edit=lambda w: w.add_token_scores([0.0])))
    assert "词表" in refused(write_model(path, None, edit=lambda w: w.add_eot_token_id(10**6)))


def test_any_architecture_is_left_to_llama_cpp(tmp_path: Path) -> None:
    assert read_header(write_model(tmp_path / "m.gguf", None, architecture="gemma3")).architecture == "gemma3"


def test_what_a_file_says_cannot_steer_the_terminal(tmp_path: Path) -> None:
    path = write_model(tmp_path / "\x1b[31mm.gguf", None, edit=lambda w: w.add_array("x\x1b]0;t\x07", ["a"]))
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"x\x1b]") + 20])
    message = refused(path)
    assert "[31mm.gguf" in message
    assert message.isprintable()


def test_memory_is_compared_with_need(tiny_gguf: Path) -> None:
    header = read_header(tiny_gguf)
    need = header.memory(2048)
    # 2 layers x 2 KV heads x (16 + 16) x 2 bytes x 2048 tokens
    assert need - header.size - (128 << 20) == 2 * 2 * 32 * 2 * 2048
    check_memory(header, 2048, need)
    check_memory(header, 2048, None)
    with pytest.raises(EngineError, match="内存不够"):
        check_memory(header, 2048, need - 1)


def test_embedded_model_is_named_or_missed(tmp_path: Path, tiny_gguf: Path) -> None:
    with pytest.raises(EngineError, match="内置模型"):
        embedded_model(tmp_path)
    shutil.copy(tiny_gguf, tmp_path / "m.gguf")
    assert embedded_model(tmp_path) == tmp_path / "m.gguf"


def test_big_vocabulary_is_read_quickly(tmp_path: Path) -> None:
    tokens = [f"词{i}" for i in range(150_000)]
    path = write_model(tmp_path / "v.gguf", None, edit=lambda w: w.add_array("test.tokens", tokens))
    begin = time.process_time()
    read_header(path)
    assert time.process_time() - begin < 0.5  # gguf.GGUFReader: 11 s
