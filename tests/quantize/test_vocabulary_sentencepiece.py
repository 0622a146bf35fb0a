"""SentencePiece vocabularies: scores, cut-out pieces, role tokens, and fast tokenizers made from them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import piece_vocabulary
import pytest
from llama_vocabulary import SOURCE, LlamaTokenizer, llama_source, needs_source
from sentencepiece import sentencepiece_model_pb2

from quantize.errors import BadInput
from quantize.strings import medical_strings
from quantize.vocabulary import read, reference_ids
from quantize.vocabulary.pieces import CONTROL, NORMAL, UNUSED, USER
from trainer.bases.baichuan_tokenizer import convert_tokenizer
from trainer.prompts import baichuan_template

_pb2: Any = sentencepiece_model_pb2
SETTINGS = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATE = {**SETTINGS, "chat_template": baichuan_template()}


@pytest.fixture(scope="module")
def trained() -> bytes:
    """A small vocabulary like Baichuan2's."""
    return piece_vocabulary.train()


Edit = Callable[[Any], Any]


@pytest.fixture
def native(trained: bytes, tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder as Baichuan publishes it: native(edit of the model, settings)."""

    def write(edit: Edit | None = None, settings: dict[str, Any] = TEMPLATE) -> Path:
        proto = _pb2.ModelProto.FromString(trained)
        if edit:
            edit(proto)
        (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
        llama_source.write_json(tmp_path / "tokenizer_config.json", settings)
        return tmp_path

    return write


def prefixed(proto: Any) -> None:
    """As in Baichuan 1, which does not cut out runs of spaces."""
    proto.normalizer_spec.add_dummy_prefix = True
    for piece in proto.pieces:
        piece.piece = {"▁▁": "<two>", "▁▁▁▁": "<four>"}.get(piece.piece, piece.piece)


def plain(proto: Any) -> None:
    """As in Llama 2, which cuts out nothing."""
    proto.normalizer_spec.add_dummy_prefix = True
    for piece in proto.pieces:
        if piece.type == 4:
            piece.type, piece.score = 1, -1e6


def same_ids(folder: Path, rows: int = 1000) -> int:
    """Compares llama.cpp with the folder's own library; returns how many texts could be compared."""
    vocabulary = read(folder, rows)
    texts = vocabulary.exact(medical_strings())
    llama = LlamaTokenizer(vocabulary, folder)
    assert [llama.ids(text) for text in texts] == reference_ids(folder, texts)
    return len(texts)


@needs_source
def test_llama_2_gives_the_known_ids_through_both_libraries(tmp_path: Path) -> None:
    settings = {**SETTINGS, "add_bos_token": True, "chat_template": "{% for m in messages %}{{ bos_token + '[INST] ' + "
                "m.content + (' [/INST]' if m.role == 'user' else eos_token) }}{% endfor %}"}  # fmt: skip
    llama_source.sentencepiece_tokenizer(SOURCE, "llama-spm", tmp_path, dummy_prefix=True, settings=settings)
    texts, known = zip(*llama_source.vectors(SOURCE, "llama-spm"), strict=True)
    assert reference_ids(tmp_path, list(texts)) == list(known)
    vocabulary = read(tmp_path, 32_000)
    llama = LlamaTokenizer(vocabulary, tmp_path)
    assert [llama.ids(text) for text in texts] == list(known)
    assert llama.ids("发热", special=True) == [1, *llama.ids("发热")]
    assert same_ids(tmp_path, 32_000) == len(medical_strings())
    assert llama.text(vocabulary.eos) == "</s>"


@needs_source
@pytest.mark.parametrize("prefix", [True, False])
def test_baichuan_gives_equal_ids_on_texts_and_on_every_piece(prefix: bool, tmp_path: Path) -> None:
    llama_source.sentencepiece_tokenizer(SOURCE, "baichuan", tmp_path, dummy_prefix=prefix, settings=TEMPLATE)
    vocabulary = read(tmp_path, 64_000)
    assert list(vocabulary.control) == ["<s>", "</s>", "<reserved_106>", "<reserved_107>"]
    assert same_ids(tmp_path, 64_000) >= 500
    pieces = [text.replace("▁", " ") for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
              if kind == NORMAL]  # fmt: skip
    assert len(pieces) > 63_000
    llama = LlamaTokenizer(vocabulary, tmp_path)
    assert [llama.ids(piece) for piece in pieces] == reference_ids(tmp_path, pieces)


@pytest.mark.parametrize("edit", [None, prefixed])
def test_a_small_vocabulary_gives_equal_ids(edit: Edit | None, native: Callable[..., Path]) -> None:
    folder = native(edit)
    assert same_ids(folder, 1007) >= (400 if edit else 573)
    vocabulary = read(folder, 1007)
    assert vocabulary.tokens[1000:] == [f"[PAD{number}]" for number in range(1000, 1007)]
    assert vocabulary.types[1000:] == [UNUSED] * 7
    assert vocabulary.metadata()["tokenizer.ggml.add_space_prefix"] is bool(edit)


def test_cut_out_pieces_are_cut_out_and_role_tokens_are_not_typed(native: Callable[..., Path], tmp_path: Path) -> None:
    folder = native(lambda proto: proto.pieces.add(piece="  ", type=4))
    vocabulary = read(folder, 1001)
    kinds = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert kinds["<reserved_106>"] == kinds["<reserved_107>"] == CONTROL
    assert kinds["<reserved_105>"] == kinds["```"] == kinds["    "] == USER
    assert kinds["0"] == NORMAL
    llama = LlamaTokenizer(vocabulary, tmp_path)
    texts = ["```py\n    x  = 10\n```", "       ", "<reserved_105>", "▁", "0010，，\n\n"]
    assert vocabulary.exact([*texts, "a▁▁b"]) == texts
    assert [llama.ids(text) for text in texts] == reference_ids(folder, texts)
    user, end = vocabulary.control["<reserved_106>"], vocabulary.eos
    assert {user, end}.isdisjoint(llama.ids("<reserved_106>孩子</s>"))
    assert llama.ids("<reserved_106>孩子</s>", control=True) == [user, *llama.ids("孩子"), end]
    assert llama.text(vocabulary.tokens.index("    ")) == "    "


def test_a_bare_space_beside_its_mark_keeps_texts_unique(native: Callable[..., Path], tmp_path: Path) -> None:
    # SentencePiece reads a run of spaces as "▁▁"; its piece of two bare spaces is never used.
    folder = native(lambda proto: [proto.pieces.add(piece=" " * count, type=4) for count in (2, 4)])
    llama = LlamaTokenizer(read(folder, 1002), tmp_path)
    assert llama.ids("a  b    c") == reference_ids(folder, ["a  b    c"])[0]


@pytest.mark.parametrize("edit", [None, prefixed])
@pytest.mark.parametrize("with_model", [True, False])
def test_a_fast_tokenizer_made_from_one_gives_equal_ids(
    edit: Edit | None, with_model: bool, native: Callable[..., Path], tmp_path: Path
) -> None:
    folder, run = native(edit), tmp_path / "run"
    fast = convert_tokenizer(folder / "tokenizer.model", baichuan_template(), 512)
    fast.save_pretrained(run)
    if with_model:
        shutil.copyfile(folder / "tokenizer.model", run / "tokenizer.model")
    assert same_ids(run) >= (400 if edit else 573)
    vocabulary = read(run, 1000)
    assert (vocabulary.add_space_prefix, vocabulary.other_end) == (bool(edit), None)
    messages = [{"role": "user", "content": "发热怎么办？"}, {"role": "assistant", "content": "多喝水。"}]
    text = "<reserved_106>发热怎么办？<reserved_107>多喝水。</s>"
    expected = fast.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert LlamaTokenizer(vocabulary, tmp_path).ids(text, control=True) == expected


def test_a_converted_llama_2_is_read_with_and_without_its_model(native: Callable[..., Path]) -> None:
    folder = native(plain, {**SETTINGS, "chat_template": "{% for m in messages %}{{ m.content + '</s>' }}{% endfor %}"})
    _write_fast(folder, {"type": "Prepend", "prepend": "▁"})
    assert same_ids(folder) >= 400
    (folder / "tokenizer.model").unlink()
    assert same_ids(folder) >= 400


def test_a_fast_tokenizer_with_other_ids_is_refused(native: Callable[..., Path]) -> None:
    folder = native(plain)
    _write_fast(folder, None)
    with pytest.raises(BadInput, match=r"not what SentencePiece makes.*remove tokenizer\.json"):
        read(folder, 1000)
    _write_fast(folder, {"type": "Prepend", "prepend": "▁"}, lambda merges: merges.__delitem__(slice(0, None, 2)))
    (folder / "tokenizer.model").unlink()
    with pytest.raises(BadInput, match=r"Put the tokenizer\.model of its training there"):
        read(folder, 1000)


def _write_fast(folder: Path, prefix: dict[str, Any] | None, edit: Edit | None = None) -> None:
    """A tokenizer.json in the form that Llama 2 was published with."""
    pieces = _pb2.ModelProto.FromString((folder / "tokenizer.model").read_bytes()).pieces
    score = {piece.piece: piece.score for piece in pieces if piece.type == 1}
    merges = [(text[:cut], text[cut:]) for text in sorted(score, key=lambda text: -score[text])
              for cut in range(1, len(text)) if text[:cut] in score and text[cut:] in score]  # fmt: skip
    if edit:
        edit(merges)
    marks = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    added = {"single_word": False, "lstrip": False, "rstrip": False}
    llama_source.write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "added_tokens": [
                {
                    "id": number,
                    "content": piece.piece,
                    "special": piece.type < 4,
                    "normalized": piece.type == 4,
                    **added,
                }
                for number, piece in enumerate(pieces)
                if piece.type in (2, 3, 4)
            ],
            "normalizer": {"type": "Sequence", "normalizers": [*([prefix] if prefix else []), marks]},
            "model": {
                "type": "BPE",
                "unk_token": "<unk>",
                "fuse_unk": True,
                "byte_fallback": True,
                "vocab": {piece.piece: number for number, piece in enumerate(pieces)},
                "merges": merges,
            },
        },
    )


def test_the_template_of_a_chat_model_that_has_none_uses_its_own_role_tokens(native: Callable[..., Path]) -> None:
    folder = native(settings=SETTINGS)
    with pytest.raises(BadInput, match="no chat template"):
        read(folder, 1000)
    given = read(folder, 1000, baichuan_template())
    assert "<reserved_106>" in given.control
    pieces = [piece.piece for piece in _pb2.ModelProto.FromString((folder / "tokenizer.model").read_bytes()).pieces]
    roles = {"user_token_id": pieces.index("<reserved_104>"), "assistant_token_id": pieces.index("<reserved_105>")}
    (folder / "generation_config.json").write_text(json.dumps(roles))
    vocabulary = read(folder, 1000)
    assert list(vocabulary.control) == ["<s>", "</s>", "<reserved_104>", "<reserved_105>"]
    assert "<reserved_106>" not in vocabulary.chat_template
    assert vocabulary.eos == pieces.index("</s>")


def test_added_tokens_follow_the_pieces(native: Callable[..., Path]) -> None:
    decoder = {"1000": {"content": "<|wait|>", "special": True}, "1001": {"content": "宝宝们", "special": False}}
    folder = native(settings={**TEMPLATE, "added_tokens_decoder": decoder, "pad_token": {"content": "<|wait|>"}})
    vocabulary = read(folder, 1003)
    assert vocabulary.tokens[1000:] == ["<|wait|>", "宝宝们", "[PAD1002]"]
    assert vocabulary.types[1000:] == [CONTROL, USER, UNUSED]
    assert vocabulary.pad == 1000
    decoder["5"] = {"content": "<elsewhere>", "special": True}
    with pytest.raises(BadInput, match=r"id 5 is .* and '<elsewhere>' among the added tokens"):
        read(native(settings={**TEMPLATE, "added_tokens_decoder": decoder}), 1003)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda proto: setattr(proto.trainer_spec, "model_type", 1), "its model is not BPE"),
        (lambda proto: setattr(proto.trainer_spec, "treat_whitespace_as_suffix", True), "spaces as suffixes"),
        (lambda proto: setattr(proto.normalizer_spec, "remove_extra_whitespaces", True), "drops spaces"),
        (lambda proto: setattr(proto.normalizer_spec, "precompiled_charsmap", b"x"), "normalises characters"),
        (lambda proto: setattr(proto.normalizer_spec, "escape_whitespaces", False), "does not mark spaces"),
        (lambda proto: setattr(proto.pieces[900], "type", 5), "unused pieces"),
        (lambda proto: setattr(proto.pieces[-1], "piece", "</s"), "whoever types '</s>' would write that token"),
        (lambda proto: setattr(proto.normalizer_spec, "add_dummy_prefix", True), "cuts out its own dummy prefix"),
        (lambda proto: setattr(proto.pieces[-1], "piece", proto.pieces[-2].piece), "same token text under two ids"),
        (lambda proto: [p for p in proto.pieces if p.type == 6][10].Clear(), "1 of 256 byte pieces are missing"),
    ],
)
def test_models_that_llama_cpp_cannot_follow_are_refused(edit: Edit, message: str, native: Callable[..., Path]) -> None:
    with pytest.raises(BadInput, match=message):
        read(native(edit), 1000)


def test_reading_needs_neither_torch_nor_transformers(native: Callable[..., Path]) -> None:
    folder = native()
    program = (
        "import sys; from pathlib import Path; from quantize.vocabulary import read, reference_ids; "
        f"folder = Path({str(folder)!r}); reference_ids(folder, ['小儿']); read(folder, 1000); "
        "print({'torch', 'transformers', 'trl'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout == "set()\n", result.stderr


def test_damaged_and_oversized_models_are_refused(native: Callable[..., Path]) -> None:
    folder = native()
    with pytest.raises(BadInput, match="ids up to 999, the embedding has 900 rows"):
        read(folder, 900)
    (folder / "tokenizer.model").write_bytes(b"\xff\xfe no model")
    with pytest.raises(BadInput, match="not a SentencePiece model"):
        read(folder, 1000)
