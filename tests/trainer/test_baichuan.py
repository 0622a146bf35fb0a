"""Baichuan checkpoints become Llama checkpoints: same logits, same token ids, or a clear refusal."""

from __future__ import annotations

import errno
import io
import json
import math
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as _pb2
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from trainer.bases import baichuan, baichuan_weights
from trainer.bases.baichuan import BaichuanError, convert_baichuan, freeze_head, is_baichuan
from trainer.bases.baichuan_tokenizer import convert_tokenizer
from trainer.recipe import PROJECT

CARDS = PROJECT / "tui" / "library" / "cards"
TEMPLATE = baichuan.CHAT_TEMPLATE_FILE.read_text(encoding="utf-8").strip()
HIDDEN, LAYERS, HEADS, INNER, VOCABULARY = 64, 2, 4, 96, 2048
USER, ASSISTANT = "<reserved_106>", "<reserved_107>"
# As in Baichuan's own vocabulary: line ends, rules, runs of spaces and reserved tokens.
SYMBOLS = ["\n", "\t", "---", "▁▁", "▁▁▁▁", "```", "<reserved_0>", USER, ASSISTANT]
BAICHUAN_2 = {
    "architectures": ["BaichuanForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
    "tokenizer_class": "BaichuanTokenizer",
    "model_type": "baichuan",
    "vocab_size": VOCABULARY,
    "z_loss_weight": 0,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "model_max_length": 4096,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
Weights = dict[str, torch.Tensor]


def _sentences() -> list[str]:
    """Our own Chinese: the lines of the cards."""
    return [line for card in sorted(CARDS.glob("*.md")) for line in card.read_text(encoding="utf-8").splitlines()]


def _train(prefix: bool) -> bytes:
    written = io.BytesIO()
    some = "\n".join(_sentences())[:30_000]  # a part, so that characters of the rest fall back to bytes
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(some.splitlines()),
        model_writer=written,
        model_type="bpe",
        vocab_size=2000,
        character_coverage=0.98,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        user_defined_symbols=SYMBOLS,
        num_threads=1,
        minloglevel=2,
    )
    return written.getvalue()


@pytest.fixture(scope="module")
def sentence_piece() -> bytes:
    return _train(prefix=False)


def _weights(vocabulary: int = VOCABULARY, hidden: int = HIDDEN, dtype: torch.dtype = torch.float32) -> Weights:
    """Random weights in Baichuan's names; rows of the head have very different lengths."""
    draw = torch.Generator().manual_seed(5)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=draw) * 2 / math.sqrt(columns)).to(dtype)

    def scale() -> torch.Tensor:
        return (1 + torch.randn(hidden, generator=draw) / 4).to(dtype)

    lengths = torch.rand(vocabulary, 1, generator=draw) * 5 + 0.1
    weights = {"model.embed_tokens.weight": matrix(vocabulary, hidden), "model.norm.weight": scale()}
    weights["lm_head.weight"] = (matrix(vocabulary, hidden) * lengths).to(dtype)
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        weights[f"{name}.input_layernorm.weight"] = scale()
        weights[f"{name}.post_attention_layernorm.weight"] = scale()
        weights[f"{name}.self_attn.W_pack.weight"] = matrix(3 * hidden, hidden)
        weights[f"{name}.self_attn.o_proj.weight"] = matrix(hidden, hidden)
        weights[f"{name}.mlp.gate_proj.weight"] = matrix(INNER, hidden)
        weights[f"{name}.mlp.up_proj.weight"] = matrix(INNER, hidden)
        weights[f"{name}.mlp.down_proj.weight"] = matrix(hidden, INNER)
    return weights


def _logits(weights: Weights, ids: torch.Tensor, norm_head: bool) -> torch.Tensor:
    """Baichuan's forward pass in float64, written from the architecture's description: [time] → [time, vocabulary]."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    time, hidden = len(ids), w["model.norm.weight"].shape[0]
    size = hidden // HEADS
    angles = torch.arange(time).double()[:, None] / 10000 ** (torch.arange(0, size, 2).double() / size)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[name]

    def rotate(x: torch.Tensor) -> torch.Tensor:  # [heads, time, size]: element i turns with element i + size/2
        first, second = x[..., : size // 2], x[..., size // 2 :]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    x = w["model.embed_tokens.weight"][ids]
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        packed = norm(x, f"{name}.input_layernorm.weight") @ w[f"{name}.self_attn.W_pack.weight"].T
        query, key, value = packed.view(time, 3, HEADS, size).permute(1, 2, 0, 3)
        scores = rotate(query) @ rotate(key).transpose(1, 2) / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(time, time).triu(1).bool(), -math.inf)
        mixed = (scores.softmax(-1) @ value).transpose(0, 1).reshape(time, hidden)
        x = x + mixed @ w[f"{name}.self_attn.o_proj.weight"].T
        inner = norm(x, f"{name}.post_attention_layernorm.weight")
        gate = inner @ w[f"{name}.mlp.gate_proj.weight"].T
        up = inner @ w[f"{name}.mlp.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ w[f"{name}.mlp.down_proj.weight"].T
    head = w["lm_head.weight"]
    if norm_head:
        head = head / head.square().sum(1, keepdim=True).sqrt()
    return norm(x, "model.norm.weight") @ head.T


def _save(folder: Path, weights: Weights, form: str) -> None:
    """As one or two safetensors or .bin files."""
    kind, sharded = form.removeprefix("sharded "), form.startswith("sharded")
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    names = sorted(weights)
    groups = [names[::2], names[1::2]] if sharded else [names]
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"{stem}-{number:05}-of-{len(groups):05}.{suffix}" if sharded else f"{stem}.{suffix}"
        shard = {name: weights[name] for name in group}
        save_file(shard, folder / file) if kind == "safetensors" else torch.save(shard, folder / file)
        weight_map |= dict.fromkeys(group, file)
    if sharded:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def checkpoint(tmp_path: Path, sentence_piece: bytes) -> Callable[..., Path]:
    """Writes a small Baichuan checkpoint and returns its folder."""

    def write(weights: Weights | None = None, form: str = "safetensors", **config: Any) -> Path:
        folder = tmp_path / "baichuan"
        folder.mkdir()
        settings = {key: value for key, value in (BAICHUAN_2 | config).items() if value is not None}
        (folder / "config.json").write_text(json.dumps(settings))
        (folder / "tokenizer.model").write_bytes(sentence_piece)
        _save(folder, _weights() if weights is None else weights, form)
        return folder

    return write


# --- weights


@pytest.mark.parametrize("form", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
def test_the_converted_model_gives_the_logits_of_baichuan2(checkpoint, tmp_path: Path, form: str) -> None:
    weights = _weights()
    convert_baichuan(checkpoint(weights, form), tmp_path / "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    ids = torch.randint(VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids).logits
    expected = torch.stack([_logits(weights, row, norm_head=True) for row in ids])
    assert model.config.model_type == "llama"
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=1e-5)
    assert not torch.allclose(expected, torch.stack([_logits(weights, row, norm_head=False) for row in ids]), atol=0.1)


def test_baichuan1_keeps_its_plain_head_and_its_saved_frequencies_are_dropped(checkpoint, tmp_path: Path) -> None:
    weights = _weights(64000, 16)
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(LAYERS)}
    convert_baichuan(
        checkpoint(weights | buffers, "bin", vocab_size=64000, hidden_size=16, z_loss_weight=None), tmp_path / "llama"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    ids = torch.arange(7, 60_000, 2345)
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    torch.testing.assert_close(logits.double(), _logits(weights, ids, norm_head=False), atol=1e-4, rtol=1e-5)
    assert not freeze_head(model)
    assert model.lm_head.weight.requires_grad


def test_the_released_vocabulary_of_baichuan2_means_a_norm_head(checkpoint, tmp_path: Path) -> None:
    source = checkpoint(_weights(125696, 16), vocab_size=125696, hidden_size=16, z_loss_weight=None)
    convert_baichuan(source, tmp_path / "llama")
    head = load_file(tmp_path / "llama" / "model.safetensors")["lm_head.weight"]
    torch.testing.assert_close(head.norm(dim=1), torch.ones(125696))


def test_half_precision_is_kept_bit_for_bit_and_the_head_is_divided_in_fp32(
    checkpoint, tmp_path: Path, monkeypatch
) -> None:
    weights = _weights(dtype=torch.bfloat16)
    monkeypatch.setattr(baichuan_weights, "_SHARD_BYTES", 100_000)
    seen: list[tuple[str, int, int]] = []
    convert_baichuan(checkpoint(weights, "sharded bin"), tmp_path / "llama", lambda *step: seen.append(step))
    files = sorted(file.name for file in (tmp_path / "llama").glob("*.safetensors"))
    assert len(files) > 3
    assert [(name, total) for name, _, total in seen] == [(name, 21) for name in files]
    assert seen[-1][1] == 21
    found = {name: tensor for file in files for name, tensor in load_file(tmp_path / "llama" / file).items()}
    packed = weights.pop("model.layers.1.self_attn.W_pack.weight")
    for third, projection in enumerate("qkv"):
        rows = packed[third * HIDDEN : (third + 1) * HIDDEN]
        assert torch.equal(found[f"model.layers.1.self_attn.{projection}_proj.weight"], rows)
    wide = weights["lm_head.weight"].float()
    assert torch.equal(found["lm_head.weight"], (wide / wide.norm(dim=1, keepdim=True)).bfloat16())
    for name in set(weights) & set(found) - {"lm_head.weight"}:
        assert torch.equal(found[name], weights[name])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "llama").dtype == torch.bfloat16


def test_the_head_stays_frozen_through_training_and_saving(checkpoint, tmp_path: Path) -> None:
    convert_baichuan(checkpoint(), tmp_path / "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    model.save_pretrained(tmp_path / "stage")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stage")
    assert freeze_head(model)
    ids = torch.arange(10)[None]
    model(ids, labels=ids).loss.backward()
    untrained = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert untrained == {"lm_head.weight"}


def test_configuration_of_the_converted_model(checkpoint, tmp_path: Path) -> None:
    source = checkpoint()
    sampling = {"do_sample": True, "temperature": 0.3, "top_k": 5, "top_p": 0.85, "repetition_penalty": 1.05}
    roles = {"user_token_id": 3 + SYMBOLS.index(USER), "assistant_token_id": 3 + SYMBOLS.index(ASSISTANT)}
    (source / "generation_config.json").write_text(json.dumps(sampling | roles | {"max_new_tokens": 2048}))
    assert is_baichuan(source)
    convert_baichuan(source, tmp_path / "llama")
    config = AutoConfig.from_pretrained(tmp_path / "llama")
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert (config.max_position_embeddings, config.rms_norm_eps, config.tie_word_embeddings) == (4096, 1e-6, False)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert config.num_key_value_heads == HEADS
    written = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert not {"auto_map", "tokenizer_class", "z_loss_weight"} & set(written)
    generation = GenerationConfig.from_pretrained(tmp_path / "llama").to_dict()
    assert {key: generation[key] for key in sampling} == sampling
    assert not set(roles) & set(generation)
    assert not is_baichuan(tmp_path / "llama")
    assert not is_baichuan(tmp_path / "nowhere")


# --- refusals


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_hidden_layers": 40}, "13B.*ALiBi.*Use Baichuan2-7B"),
        ({"hidden_size": 5120}, "13B"),
        ({"position_embedding": "ALIBI"}, "13B"),
        ({"max_position_embeddings": None}, "13B"),
        ({"z_loss_weight": None}, "neither Baichuan 1 .* nor Baichuan 2"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"intermediate_size": None}, "lacks intermediate_size"),
        ({"intermediate_size": INNER + 1}, r"has the shape \[96, 64\], config.json makes it \[97, 64\]"),
        ({"num_hidden_layers": "two"}, "damaged"),
        ({"num_hidden_layers": LAYERS - 1}, "has, beyond a Baichuan 7B, model.layers.1.input_.* and 4 more"),
        ({"num_hidden_layers": LAYERS + 1}, "lacks model.layers.2.input_layernorm.weight.* and 4 more"),
        ({"vocab_size": VOCABULARY + 1}, "shape"),
        ({"eos_token_id": 5}, "eos_token_id is 2, the checkpoint says 5"),
    ],
)
def test_configurations_that_cannot_be_converted(checkpoint, tmp_path: Path, config: dict, says: str) -> None:
    _refused(checkpoint(**config), tmp_path / "llama", says)


def _without_a_tensor(weights: Weights) -> None:
    del weights["model.layers.1.self_attn.W_pack.weight"]


def _with_another_tensor(weights: Weights) -> None:
    weights["model.layers.0.self_attn.W_pack.bias"] = torch.zeros(3 * HIDDEN)


def _with_eight_bits(weights: Weights) -> None:
    weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.int8)


@pytest.mark.parametrize("form", ["safetensors", "sharded bin"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_without_a_tensor, "lacks model.layers.1.self_attn.W_pack.weight;"),
        (_with_another_tensor, "has, beyond a Baichuan 7B, model.layers.0.self_attn.W_pack.bias;"),
        (_with_eight_bits, "lm_head.weight is torch.int8"),
    ],
)
def test_every_tensor_is_used_and_none_is_missing(checkpoint, tmp_path: Path, damage, says: str, form: str) -> None:
    weights = _weights()
    damage(weights)
    _refused(checkpoint(weights, form), tmp_path / "llama", says)


def test_a_tensor_in_two_files_is_refused(checkpoint, tmp_path: Path) -> None:
    source = checkpoint(form="sharded safetensors")
    extra = {"model.norm.weight": torch.ones(HIDDEN)}
    for file in source.glob("*.safetensors"):
        save_file(load_file(file) | extra, file)
    _refused(source, tmp_path / "llama", "repeats the tensor model.norm.weight")


class _Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (print, ("owned",))


def test_files_that_are_no_checkpoint(checkpoint, tmp_path: Path, capsys) -> None:
    source = checkpoint(form="sharded bin")
    first, second = sorted(source.glob("*.bin"))
    content = first.read_bytes()
    first.write_bytes(content[: len(content) // 2])
    _refused(source, tmp_path / "llama", "00001-of-00002.bin cannot be read")
    torch.save({"model.norm.weight": _Payload()}, first)
    _refused(source, tmp_path / "llama", "00001-of-00002.bin cannot be read")
    assert "owned" not in capsys.readouterr().out
    torch.save([torch.ones(3)], first)
    _refused(source, tmp_path / "llama", "cannot be read")
    second.unlink()
    first.write_bytes(content)
    _refused(source, tmp_path / "llama", "00002-of-00002.bin cannot be read")
    (source / "pytorch_model.bin.index.json").unlink()
    _refused(source, tmp_path / "llama", "has no model.safetensors or pytorch_model.bin")
    (source / "config.json").write_text("{")
    _refused(source, tmp_path / "llama", "is not JSON")
    _refused(tmp_path / "nowhere", tmp_path / "llama", "give the folder of a checkpoint")


def test_tokenizers_that_do_not_belong(checkpoint, tmp_path: Path, sentence_piece: bytes) -> None:
    source = checkpoint()
    (source / "generation_config.json").write_text(json.dumps({"user_token_id": 195}))
    _refused(source, tmp_path / "llama", "user_token_id is 10, the checkpoint says 195")
    (source / "generation_config.json").unlink()
    proto = _pb2.ModelProto.FromString(sentence_piece)  # type: ignore[attr-defined]
    for number in range(100):
        proto.pieces.add(piece=f"<more_{number}>", type=4)
    (source / "tokenizer.model").write_bytes(proto.SerializeToString())
    _refused(source, tmp_path / "llama", "has 2100 tokens, the model 2048")
    (source / "tokenizer.model").unlink()
    _refused(source, tmp_path / "llama", "tokenizer.model cannot be read")


def _refused(source: Path, target: Path, says: str) -> None:
    with pytest.raises(BaichuanError, match=says):
        convert_baichuan(source, target)
    assert not list(target.parent.glob(f"{target.name}*"))


# --- interruptions

KILLED = """
import os, signal, sys
from pathlib import Path
from trainer.bases import baichuan, baichuan_weights
baichuan_weights._SHARD_BYTES = 100_000
baichuan.convert_baichuan(Path(sys.argv[1]), Path(sys.argv[2]), lambda *step: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_a_kill_midway_leaves_nothing_under_the_final_name(checkpoint, tmp_path: Path) -> None:
    source, target = checkpoint(), tmp_path / "llama"
    killed = subprocess.run([sys.executable, "-c", KILLED, source, target], cwd=PROJECT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "llama.part").is_dir()
    assert not target.exists()
    convert_baichuan(source, target)
    assert not (tmp_path / "llama.part").exists()
    AutoModelForCausalLM.from_pretrained(target)
    before = (target / "model.safetensors").read_bytes()
    with pytest.raises(BaichuanError, match="exists already"):
        convert_baichuan(source, target)
    assert (target / "model.safetensors").read_bytes() == before


def test_an_interrupted_or_failed_conversion_cleans_up(checkpoint, tmp_path: Path, monkeypatch) -> None:
    source, target = checkpoint(), tmp_path / "llama"

    def interrupt(*step: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_baichuan(source, target, interrupt)
    assert not list(tmp_path.glob("llama*"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
        _refused(source, target, "0.0 GiB are free")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(baichuan_weights, "save_file", full)
    _refused(source, target, "No space left on device.*Make room")


# --- tokenizer


def _strings() -> list[str]:
    """Card lines, awkward texts, and random mixtures."""
    draw = random.Random(3)
    characters = [*"发热孩子体温℃。，abcXYZ0123456789-=_\n\t\r▁🙂龘𠮷\u200bé", *[" "] * 12]
    mixtures = ["".join(draw.choices(characters, k=draw.randint(1, 40))) for _ in range(300)]
    repeats = ["哈" * n for n in range(1, 12)] + ["0" * n for n in range(1, 12)] + ["-" * n for n in range(1, 12)]
    awkward = [
        "",
        " ",
        "    四个空格",
        " 前后空格 ",
        "体温38.5℃，每次10mg/kg，24小时≤4次",
        "\n\n\n",
        "a\r\nb",
        "家庭👩‍👩‍👧与表情🙂",
        "罕见字龘𠮷𪚥",
        "<0x0A><0xE4>",
        "<reserved_0>夹在中间<reserved_0>",
        "```python\n    x = 1\n```",
        "全角ＡＢＣ１２３",
    ]
    return [*_sentences()[::8], *mixtures, *repeats, *awkward]


@pytest.mark.parametrize("prefix", [False, True], ids=["Baichuan 2", "dummy prefix"])
def test_token_ids_and_texts_are_those_of_sentencepiece(tmp_path: Path, sentence_piece: bytes, prefix: bool) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(_train(prefix=True) if prefix else sentence_piece)
    reference, fast = SentencePieceProcessor(model_file=str(file)), convert_tokenizer(file, TEMPLATE, 4096)
    # With a prefix, a text that is nothing but one of the symbols is the one place where the two differ.
    strings = [text for text in _strings() if not prefix or text.replace(" ", "▁") not in SYMBOLS]
    assert len(strings) > 500
    for text in strings:
        ids = reference.encode(text)
        assert fast.encode(text) == ids, text
        assert fast.decode(ids) == reference.decode(ids), text
    assert {token: fast.convert_tokens_to_ids(token) for token in ("<unk>", "<s>", "</s>", USER)} == {
        token: reference.piece_to_id(token) for token in ("<unk>", "<s>", "</s>", USER)
    }


def test_merges_follow_the_scores_not_the_ids(tmp_path: Path, sentence_piece: bytes) -> None:
    proto = _pb2.ModelProto.FromString(sentence_piece)  # type: ignore[attr-defined]
    joined = [piece for piece in proto.pieces if piece.type == 1 and len(piece.piece) > 1]
    scores = [piece.score for piece in joined]
    random.Random(0).shuffle(scores)
    for piece, score in zip(joined, scores, strict=True):
        piece.score = score
    file = tmp_path / "tokenizer.model"
    file.write_bytes(proto.SerializeToString())
    changed, before = SentencePieceProcessor(model_file=str(file)), SentencePieceProcessor(model_proto=sentence_piece)
    fast = convert_tokenizer(file, TEMPLATE, 4096)
    assert any(changed.encode(text) != before.encode(text) for text in _strings())
    for text in _strings():
        assert fast.encode(text) == changed.encode(text), text


def test_pieces_that_never_match_in_sentencepiece_do_not_match_here(tmp_path: Path, sentence_piece: bytes) -> None:
    proto = _pb2.ModelProto.FromString(sentence_piece)  # type: ignore[attr-defined]
    proto.pieces.add(piece="   ", type=4)  # bare spaces
    known = {piece.piece for piece in proto.pieces}
    # The name of a byte piece, written out, could be joined up to its last character.
    for piece in ("<", ">", "x", "A", "0", "<0", "<0x", "<0x0", "<0x0A"):
        if piece not in known:
            proto.pieces.add(piece=piece, score=-5000.0 - len(piece), type=1)
    file = tmp_path / "tokenizer.model"
    file.write_bytes(proto.SerializeToString())
    reference, fast = SentencePieceProcessor(model_file=str(file)), convert_tokenizer(file, TEMPLATE, 4096)
    for text in ("a   b", "<0x0A>"):
        assert fast.encode(text) == reference.encode(text)
        assert fast.decode(fast.encode(text)) == text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        # SentencePiece joins two unknown characters into a piece; merges of pieces cannot.
        (lambda proto: proto.pieces.add(piece="龘龘", score=-1.0, type=1), "cannot be converted exactly: '龘龘'"),
        (lambda proto: setattr(proto.trainer_spec, "model_type", 1), "its model is not BPE"),
        (lambda proto: setattr(proto.trainer_spec, "byte_fallback", False), "no byte fallback"),
        (lambda proto: setattr(proto.normalizer_spec, "remove_extra_whitespaces", True), "drops spaces"),
        (lambda proto: setattr(proto.normalizer_spec, "precompiled_charsmap", b"x"), "normalises characters"),
        (lambda proto: setattr(proto.pieces[500], "type", 5), "unused pieces"),
        (lambda proto: setattr(proto.pieces[10], "piece", "<reserved_1>"), "lacks <reserved_106>"),
    ],
)
def test_tokenizers_that_would_differ_are_refused(tmp_path: Path, sentence_piece: bytes, change, says: str) -> None:
    proto = _pb2.ModelProto.FromString(sentence_piece)  # type: ignore[attr-defined]
    change(proto)
    file = tmp_path / "tokenizer.model"
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(BaichuanError, match=says):
        convert_tokenizer(file, TEMPLATE, 4096)
    file.write_bytes(b"\xffnot a model")
    with pytest.raises(BaichuanError, match="is not"):
        convert_tokenizer(file, TEMPLATE, 4096)


# --- chat


@pytest.fixture(scope="module")
def chat(tmp_path_factory, sentence_piece: bytes) -> PreTrainedTokenizerFast:
    """The tokenizer as a stage gets it: loaded from the converted checkpoint."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "baichuan").mkdir()
    (folder / "baichuan" / "config.json").write_text(json.dumps(BAICHUAN_2))
    (folder / "baichuan" / "tokenizer.model").write_bytes(sentence_piece)
    _save(folder / "baichuan", _weights(), "safetensors")
    convert_baichuan(folder / "baichuan", folder / "llama")
    return AutoTokenizer.from_pretrained(folder / "llama")


ANSWERS = ("🙂先测体温。\n超过38.5℃再用药。", " 前面有空格", "龘")


def _conversation(turns: int) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": "你是儿科助手。"}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"宝宝发热第{turn}天怎么办？"})
        messages.append({"role": "assistant", "content": ANSWERS[turn % len(ANSWERS)]})
    return messages


def _ids(chat: PreTrainedTokenizerFast, messages: list[dict[str, str]], **kwargs: Any) -> list[int]:
    return chat.apply_chat_template(messages, return_dict=True, **kwargs)["input_ids"]  # type: ignore[index]


def test_the_reloaded_tokenizer_is_still_exact(chat: PreTrainedTokenizerFast, sentence_piece: bytes) -> None:
    reference = SentencePieceProcessor(model_proto=sentence_piece)
    for text in _strings():
        assert chat.encode(text) == reference.encode(text), text
    assert (chat.pad_token, chat.bos_token, chat.eos_token, chat.unk_token) == ("<unk>", "<s>", "</s>", "<unk>")
    assert (chat.pad_token_id, chat.eos_token_id, chat.model_max_length) == (0, 2, 4096)


def test_a_conversation_is_encoded_part_by_part_as_upstream_does(
    chat: PreTrainedTokenizerFast, sentence_piece: bytes
) -> None:
    reference = SentencePieceProcessor(model_proto=sentence_piece)
    role = {"user": reference.piece_to_id(USER), "assistant": reference.piece_to_id(ASSISTANT)}
    expected = reference.encode("你是儿科助手。")
    for message in _conversation(3)[1:]:
        expected += [role[message["role"]], *reference.encode(message["content"])]
        expected += [2] if message["role"] == "assistant" else []
    assert _ids(chat, _conversation(3)) == expected


def test_rendering_is_append_only(chat: PreTrainedTokenizerFast) -> None:
    for turns in (1, 2, 3):
        whole = _ids(chat, _conversation(turns))
        assert _ids(chat, _conversation(turns + 1))[: len(whole)] == whole
        prompt = _ids(chat, _conversation(turns)[:-1], add_generation_prompt=True)
        assert whole[: len(prompt)] == prompt
        assert prompt[-1] == chat.convert_tokens_to_ids(ASSISTANT)


def test_exactly_the_answers_and_their_ends_are_scored(chat: PreTrainedTokenizerFast) -> None:
    both = chat.apply_chat_template(_conversation(3), return_dict=True, return_assistant_tokens_mask=True)
    scored = [
        token
        for token, mark in zip(both["input_ids"], both["assistant_masks"], strict=True)  # type: ignore[index]
        if mark
    ]
    assert scored == [token for answer in ANSWERS for token in [*chat.encode(answer), 2]]
