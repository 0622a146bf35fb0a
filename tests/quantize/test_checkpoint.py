"""Reading checkpoints of every form, and refusing the damaged ones with cause and remedy."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_baichuan

from quantize.architectures import for_config
from quantize.checkpoint import Checkpoint, Tensors
from quantize.errors import BadInput

FORMATS = ("model.safetensors", "pytorch_model.bin")
MIXED = {
    "a.weight": torch.randn(7, 4),
    "b.weight": torch.randn(9, 4).half(),
    "c.weight": (torch.randn(300, 5) * 1e4).bfloat16(),
    "d.bias": torch.randn(3).bfloat16(),
}


def save(folder: Path, stem: str, tensors: dict[str, torch.Tensor], shards: int = 1, **config: Any) -> Path:
    """A checkpoint folder in one of both formats, in one file or in several with an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write: Callable[..., Any] = save_file if stem.endswith("safetensors") else torch.save
    if shards == 1:
        write(tensors, folder / stem)
        return folder
    places = {name: f"part-{number % shards}.{stem.split('.')[1]}" for number, name in enumerate(tensors)}
    for file in set(places.values()):
        write({name: tensors[name] for name, place in places.items() if place == file}, folder / file)
    (folder / f"{stem}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("stem", FORMATS)
def test_reads_every_form_and_type(stem: str, shards: int, tmp_path: Path) -> None:
    tensors = Checkpoint(save(tmp_path / "model", stem, MIXED, shards)).tensors
    assert set(tensors) == set(MIXED)
    for name, expected in MIXED.items():
        assert tensors.shape(name) == tuple(expected.shape)
        np.testing.assert_array_equal(tensors.array(name), expected.float().numpy())
        np.testing.assert_array_equal(tensors.rows(name, slice(1, 3)), expected[1:3].float().numpy())
        picked = np.array([2, 0, 1, 2])
        found = tensors.rows(name, picked)
        np.testing.assert_array_equal(found, expected[picked].float().numpy())
        assert found.dtype == np.float32
        assert found.flags.writeable
    assert [tensors.dtype(name) for name in sorted(tensors)] == ["F32", "F16", "BF16", "BF16"]


@pytest.mark.parametrize("stem", FORMATS)
def test_raw_is_the_stored_bits(stem: str, tmp_path: Path) -> None:
    tensors = Checkpoint(save(tmp_path / "model", stem, MIXED)).tensors
    for name, expected in MIXED.items():
        dtype, stored = tensors.raw(name)
        bits = expected if expected.dtype == torch.float32 else expected.view(torch.uint16)
        assert (dtype, stored.dtype) == (tensors.dtype(name), bits.numpy().dtype)
        np.testing.assert_array_equal(stored, bits.numpy())


def test_a_transposed_tensor_of_a_pickle_is_read_in_order(tmp_path: Path) -> None:
    turned = torch.arange(12.0).reshape(3, 4).bfloat16().T
    tensors = Checkpoint(save(tmp_path / "model", "pytorch_model.bin", {"a": turned})).tensors
    np.testing.assert_array_equal(tensors.rows("a", slice(1, 3)), turned[1:3].float().numpy())


def test_safetensors_are_read_without_torch(tmp_path: Path) -> None:
    save(tmp_path / "model", "model.safetensors", MIXED)
    script = (
        "import sys; from pathlib import Path; from quantize.checkpoint import Checkpoint\n"
        f"print(Checkpoint(Path({str(tmp_path / 'model')!r})).tensors.array('c.weight').shape, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(300, 5) False"


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("stem", FORMATS)
def test_buffers_that_old_code_saved_are_passed_over(stem: str, shards: int, tmp_path: Path) -> None:
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8, dtype=torch.float64),
        "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(1, 1, 8, 8),
        "model.future_mask": torch.ones(4, 4, dtype=torch.bool),
        "model.layers.0.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "model.layers.0.attention.masked_bias": torch.tensor(-1e4),
    }
    tensors = Checkpoint(save(tmp_path / "model", stem, MIXED | buffers, shards)).tensors
    assert set(tensors) == set(MIXED)


def check(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    checkpoint.check(for_config(checkpoint.config).plan(checkpoint.config))


def refuse(folder: Path, *words: str) -> None:
    """Opening and checking the folder must end in one message of one line."""
    with pytest.raises(BadInput) as caught:
        check(folder)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


# What belongs to what: names, shapes, vocabulary, tied heads.

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
PACKED = "model.layers.31.self_attn.W_pack.weight"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 5,
    "tie_word_embeddings": True,
}


def llama(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], stem: str = FORMATS[0], **config: Any
) -> Path:
    config = LLAMA | config
    plans = for_config(config).plan(config)
    tensors = {plan.source: torch.randn(plan.shape).bfloat16() for plan in plans}
    change(tensors)
    return save(folder, stem, tensors, **config)


@pytest.mark.parametrize("stem", FORMATS)
def test_a_tied_head_may_be_stored_twice(stem: str, tmp_path: Path) -> None:
    check(llama(tmp_path / "model", lambda t: t.update({HEAD: t[EMBEDDING].clone()}), stem))


@pytest.mark.parametrize(
    "head",
    [lambda e: e + 1, lambda e: e.float(), lambda e: e[:4].clone(), lambda e: torch.cat([e[:-1], e[:1]])],
    ids=["other values", "another type", "fewer rows", "another last row"],
)
def test_a_tied_head_that_differs_is_refused(head: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path) -> None:
    refuse(llama(tmp_path / "model", lambda t: t.update({HEAD: head(t[EMBEDDING])})), '"tie_word_embeddings": false')


BELONGS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], dict[str, Any], str]] = {
    "missing": (lambda t: t.pop(NORM), {}, f"{NORM} is missing"),
    "bias missing": (lambda t: t.pop("model.layers.0.self_attn.q_proj.bias"), {"attention_bias": True}, "is missing"),
    "bias unknown": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(8)}),
        {},
        "q_proj.bias is not known",
    ),
    "third layer": (lambda t: t.update({"model.layers.1.input_layernorm.weight": torch.ones(8)}), {}, "is not known"),
    "two unknown": (lambda t: t.update(x=torch.ones(1), y=torch.ones(1)), {}, "x (and 1 more) is not known"),
    "shape": (lambda t: t.update({NORM: torch.ones(9)}), {}, "has shape (9,) but config.json says (8,)"),
    "untied without head": (lambda t: t.pop(HEAD), {"tie_word_embeddings": False}, f"{HEAD} is missing"),
    "vocabulary": (
        lambda t: t.update({EMBEDDING: torch.ones(7, 8)}),
        {},
        "has 7 rows but config.json says vocab_size 5",
    ),
}


@pytest.mark.parametrize("case", BELONGS)
def test_refuses_weights_that_do_not_belong(case: str, tmp_path: Path) -> None:
    change, config, words = BELONGS[case]
    refuse(llama(tmp_path / "model", change, **config), words)


def test_w_pack_is_checked_as_a_whole(tmp_path: Path) -> None:
    make_baichuan(tmp_path / "model", layers=32, vocabulary=64, heads=4, z_loss_weight=0)
    check(tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {PACKED: tensors[PACKED][:-1]}, file)
    refuse(tmp_path / "model", "(143, 48)", "(144, 48)")


def test_plans_that_read_a_row_twice_are_an_error(tmp_path: Path) -> None:
    make_baichuan(tmp_path / "model", layers=32, vocabulary=64, heads=4, z_loss_weight=0)
    checkpoint = Checkpoint(tmp_path / "model")
    plans = for_config(checkpoint.config).plan(checkpoint.config)
    keys = next(plan.order for plan in plans if plan.name == "blk.31.attn_k.weight")
    spoiled = [replace(plan, order=keys) if plan.name == "blk.31.attn_v.weight" else plan for plan in plans]
    with pytest.raises(ValueError, match=f"every row of {PACKED} exactly once"):
        checkpoint.check(spoiled)


# Indexes and folders.


def test_the_folder_must_hold_weights_once(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "model.safetensors", MIXED, shards=2)
    save_file(MIXED, folder / "model.safetensors")
    refuse(folder, "holds both", "remove")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    refuse(folder, "holds no weights", "complete checkpoint folder")
    (folder / "config.json").unlink()
    refuse(folder, "config.json is missing")


def move(places: dict[str, Any]) -> None:
    places["a.weight"] = places["b.weight"]


INDEXES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "file missing": (lambda places: places.update({"e": "part-9.safetensors"}), "part-9.safetensors is missing"),
    "tensor not in its file": (lambda places: places.update({"e": "part-0.safetensors"}), "but no file has it"),
    "tensor not named": (lambda places: places.pop("a.weight"), "places a.weight in no file"),
    "tensor in another file": (move, "places a.weight in part-1"),
    "path upwards": (lambda places: places.update({"e": "../part-0.safetensors"}), "no file of this folder"),
    "absolute path": (lambda places: places.update({"e": "/etc/passwd"}), "no file of this folder"),
    "Windows path": (lambda places: places.update({"e": "..\\part"}), "no file of this folder"),
    "the folder above": (lambda places: places.update({"e": ".."}), "no file of this folder"),
    "no name": (lambda places: places.update({"e": 3}), "no file of this folder"),
    "empty": (lambda places: places.clear(), "no `weight_map`"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_refuses_an_index_that_does_not_fit(case: str, tmp_path: Path) -> None:
    change, words = INDEXES[case]
    folder = save(tmp_path / "model", "model.safetensors", MIXED, shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    refuse(folder, words)
    index.write_text(json.dumps({"weight_map": list(content["weight_map"])}))
    refuse(folder, "no `weight_map`")
    index.write_text(json.dumps({"weight_map": content["weight_map"]})[:-9])
    refuse(folder, "not readable JSON")


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "model.safetensors", MIXED, shards=2)
    save_file({"a.weight": MIXED["a.weight"], "b.weight": MIXED["b.weight"]}, folder / "part-1.safetensors")
    refuse(folder, "repeats the tensor a.weight")


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "model", "model.safetensors", MIXED)

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(BadInput, match="Permission denied"):
        Tensors([folder / "model.safetensors"])


# Damaged safetensors.


def entry(begin: int, end: int, dtype: Any = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def safetensors(header: Any, data: bytes = bytes(16), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a readable"),
    "half a length": (b"\x08\x00", "not a readable"),
    "length 0": (safetensors(b""), "not a readable"),
    "huge length": (safetensors({"a": entry(0, 16)}, length=2**63), "not a readable"),
    "length beyond the file": (safetensors({"a": entry(0, 16)}, length=4096), "not a readable"),
    "not JSON": (safetensors(b"{]"), "not a readable"),
    "not UTF-8": (safetensors(b'{"\xff": 1}'), "not a readable"),
    "a list": (safetensors([]), "no object"),
    "endless nesting": (safetensors(b"[" * 200_000), "not a readable"),
    "a name twice": (
        safetensors(b'{"a": %s, "a": %s}' % ((json.dumps(entry(0, 8)).encode(),) * 2)),
        "it holds 'a' twice",
    ),
    "no dtype": (safetensors({"a": {"shape": [2], "data_offsets": [0, 8]}}), "has no type, shape or place"),
    "not a tensor": (safetensors({"a": 3}), "has no type, shape or place"),
    "three offsets": (safetensors({"a": entry(0, 8) | {"data_offsets": [0, 4, 8]}}), "has no type, shape or place"),
    "negative offset": (safetensors({"a": entry(-8, 8)}), "impossible shape or place"),
    "negative shape": (safetensors({"a": entry(0, 16, shape=(-2, -2))}), "impossible shape or place"),
    "fractional shape": (safetensors({"a": entry(0, 16, shape=(2.0, 2))}), "impossible shape or place"),
    "true as a size": (safetensors({"a": entry(0, 16, shape=(True, 4))}), "impossible shape or place"),
    "data cut off": (safetensors({"a": entry(0, 16, shape=(4,))}, bytes(15)), "cut off or damaged at a"),
    "data left over": (safetensors({"a": entry(0, 16, shape=(4,))}, bytes(17)), "cut off or damaged at its end"),
    "overlap": (safetensors({"a": entry(0, 8), "b": entry(4, 12)}), "cut off or damaged at b"),
    "hole": (safetensors({"a": entry(0, 4, shape=(1,)), "b": entry(8, 16)}), "cut off or damaged at b"),
    "backwards": (safetensors({"a": entry(0, 16), "b": entry(16, 8)}), "cut off or damaged"),
    "size of another shape": (safetensors({"a": entry(0, 16, shape=(3,))}), "cut off or damaged at a"),
    "huge shape": (safetensors({"a": entry(0, 16, shape=(2**62, 2**62))}), "cut off or damaged at a"),
    "scalar": (safetensors({"a": entry(0, 16, shape=())}), "cut off or damaged at a"),
    "no rows": (safetensors({"a": entry(0, 0, shape=(0, 4))}, b""), "cut off or damaged at a"),
    "float8": (safetensors({"a": entry(0, 16, "F8_E4M3", (16,))}), "a is F8_E4M3; only F32, F16 and BF16"),
    "a type that is none": (safetensors({"a": entry(0, 16, {"x": 1})}), "only F32, F16 and BF16"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_refuses_damaged_safetensors(case: str, tmp_path: Path) -> None:
    content, words = DAMAGED[case]
    save(tmp_path / "model", "model.safetensors", MIXED)
    (tmp_path / "model/model.safetensors").write_bytes(content)
    refuse(tmp_path / "model", words)


def test_mutated_headers_are_refused_or_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(MIXED, file)
    data, draw = file.read_bytes(), random.Random(3)
    header = 8 + int.from_bytes(data[:8], "little")
    refused = 0
    for _ in range(600):
        mutated = bytearray(data)
        for _ in range(draw.randint(1, 3)):
            mutated[draw.randrange(header)] = draw.choice((draw.randrange(256), *b"9-]"))
        file.write_bytes(mutated[: len(mutated) - draw.choice((0, 0, 0, 5))])
        try:
            tensors = Tensors([file])
        except BadInput:
            refused += 1
            continue
        assert sum(tensors.array(name).size for name in tensors) <= sum(t.numel() for t in MIXED.values())
    assert 200 < refused < 600


# Pickles.


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code was run",)


def old_format(file: Path) -> None:
    torch.save(MIXED, file, _use_new_zipfile_serialization=False)


def cut(file: Path, size: int) -> None:
    torch.save(MIXED, file)
    file.write_bytes(file.read_bytes()[:size])


PICKLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "code": (lambda file: torch.save(MIXED | {"x": _Code()}, file), "foreign code"),
    "a module": (lambda file: torch.save(torch.nn.Linear(2, 2), file), "foreign code"),
    "cut off": (lambda file: cut(file, 900), "is cut off"),
    "empty": (lambda file: cut(file, 0), "is cut off"),
    "before torch 1.6": (old_format, "from before torch 1.6"),
    "a list": (lambda file: torch.save([torch.ones(2)], file), "holds a list"),
    "a trainer's state": (lambda file: torch.save({"model": MIXED}, file), "model is a dict, no tensor"),
    "integers": (lambda file: torch.save({"a": torch.ones(2, dtype=torch.int8)}, file), "a is int8"),
    "sparse": (lambda file: torch.save({"a": torch.eye(3).to_sparse()}, file), "only F32, F16 and BF16"),
    "scalar": (lambda file: torch.save({"a": torch.tensor(1.0)}, file), "damaged at a"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_refuses_pickles(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write, words = PICKLES[case]
    save(tmp_path / "model", "pytorch_model.bin", MIXED)
    write(tmp_path / "model/pytorch_model.bin")
    refuse(tmp_path / "model", words)
    assert "code was run" not in capsys.readouterr().out


def test_a_damaged_zip_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "pytorch_model.bin", MIXED)
    file = folder / "pytorch_model.bin"
    data = bytearray(file.read_bytes())
    start = data.index(b"data.pkl")
    data[start + 64 : start + 200] = bytes(136)
    file.write_bytes(data)
    refuse(folder, "pytorch_model.bin")
