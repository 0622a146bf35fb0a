"""SentencePiece BPE (Baichuan, Llama 2): `tokenizer.model`, or the scores behind a tokenizer.json made from one.

llama.cpp joins the neighbours whose union has the best score, as SentencePiece does, so the scores are the vocabulary.
What it does not know are SentencePiece's user-defined pieces, which are cut out of a text before anything is joined:

- One character long, they are NORMAL here: nothing but themselves can come of a character no longer piece contains.
- Longer ones are USER_DEFINED tokens, which llama.cpp cuts out too. It looks for them in the text as it was written,
  so their "▁" is a space here, and a "▁" that a user writes is not found. In a vocabulary with a dummy prefix it
  writes a "▁" after each (`Pieces.inexact`).
- Those the chat template uses (Baichuan's role tokens) are CONTROL: no text of a user may become one.

A piece with a bare space never matches in SentencePiece, where every space is a "▁" already; its row stays empty here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from quantize import strings
from quantize.errors import BadInput
from quantize.vocabulary.pieces import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER, Pieces, filled
from quantize.vocabulary.settings import Settings, open_tokenizer, optional

_pb2: Any = sentencepiece_model_pb2  # its classes are built at import time, out of a type checker's sight
_Piece = _pb2.ModelProto.SentencePiece
_SPACE = "▁"
_ADDED_SCORE, _PADDING_SCORE = -1000.0, -10000.0
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
_TYPES = {
    _Piece.NORMAL: NORMAL,
    _Piece.UNKNOWN: UNKNOWN,
    _Piece.CONTROL: CONTROL,
    _Piece.USER_DEFINED: USER,
    _Piece.BYTE: BYTE,
}


def load(file: Path) -> Any:
    """The parsed tokenizer.model. Raises BadInput when llama.cpp cannot do what it asks for."""
    proto = _pb2.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except OSError as error:
        raise BadInput(f"{file} cannot be read ({error.strerror}); download the whole checkpoint again.") from error
    except DecodeError as error:
        raise BadInput(f"{file} is not a SentencePiece model ({error}); download it again.") from error
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    cut_out = [piece.piece for piece in proto.pieces if piece.type == _Piece.USER_DEFINED]
    lacking = _BYTES - {piece.piece for piece in proto.pieces if piece.type == _Piece.BYTE}
    for wrong, what in (
        (trainer.model_type != _pb2.TrainerSpec.BPE, "its model is not BPE"),
        (bool(lacking), f"it has no byte fallback ({len(lacking)} of 256 byte pieces are missing)"),
        (trainer.treat_whitespace_as_suffix, "it writes spaces as suffixes"),
        (bool(normalizer.precompiled_charsmap), "it normalises characters"),
        (normalizer.remove_extra_whitespaces, "it drops spaces"),
        (not normalizer.escape_whitespaces, "it does not mark spaces"),
        (any(piece.type == _Piece.UNUSED for piece in proto.pieces), "it has unused pieces"),
        (normalizer.add_dummy_prefix and any(_SPACE in text for text in cut_out), "it cuts out its own dummy prefix"),
    ):
        if wrong:
            raise BadInput(f"{file} cannot be exported: {what}, which llama.cpp does not do.")
    return proto


def derived(file: Path, source: dict[str, Any], settings: Settings) -> Any:
    """A SentencePiece model for a tokenizer.json that was made from one: the earlier a merge, the better its score.

    Whether that is right is for `compare` to say.
    """
    model = source["model"]
    vocabulary: dict[str, int] = model.get("vocab") or {}
    added = {entry["content"]: bool(entry.get("special")) for entry in source.get("added_tokens") or []}
    parts = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or []]
    order = {text: -float(rank) for rank, text in enumerate(dict.fromkeys("".join(pair) for pair in parts))}
    lowest = -float(len(order) + 1)
    if sorted(vocabulary.values()) != list(range(len(vocabulary))) or _BYTES - set(vocabulary):
        raise BadInput(f"{file}: the ids have gaps or byte tokens are missing; put the original tokenizer.model there.")
    proto = _pb2.ModelProto()
    unk = model.get("unk_token") or settings.text("unk_token") or "<unk>"
    for text in sorted(vocabulary, key=vocabulary.__getitem__):
        kind = _Piece.NORMAL
        if text == unk:
            kind = _Piece.UNKNOWN
        elif text in _BYTES:
            kind = _Piece.BYTE
        elif text in added:
            kind = _Piece.CONTROL if added[text] else _Piece.USER_DEFINED
        proto.pieces.add(piece=text, score=order.get(text, lowest) if kind == _Piece.NORMAL else 0.0, type=kind)
    proto.trainer_spec.model_type = _pb2.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.unk_id = vocabulary.get(unk, 0)
    for key in ("bos", "eos"):
        setattr(proto.trainer_spec, f"{key}_id", vocabulary.get(settings.text(f"{key}_token") or "", -1))
    proto.normalizer_spec.remove_extra_whitespaces = False
    first = open_tokenizer(file).encode("小", add_special_tokens=False).tokens
    proto.normalizer_spec.add_dummy_prefix = bool(first) and first[0].startswith(_SPACE)
    return proto


def compare(file: Path, proto: Any, source: dict[str, Any]) -> None:
    """Holds a tokenizer.json against SentencePiece on every piece, on medical texts, and after a special token.

    Raises BadInput when they differ anywhere.
    """
    ours, reference = open_tokenizer(file), SentencePieceProcessor(model_proto=proto.SerializeToString())
    special = {entry["content"]: entry["id"] for entry in source.get("added_tokens") or [] if entry.get("special")}
    alone = _alone(proto)
    normal = (piece.piece.replace(_SPACE, " ") for piece in proto.pieces if piece.type == _Piece.NORMAL)
    medical = [text for text in strings.medical_strings() if text not in alone]
    texts = [text for text in (*normal, *medical) if not any(token in text for token in special)]
    after = [(token, number, text) for token, number in list(special.items())[:4] for text in medical[:8]]
    given = texts + [token + text for token, _, text in after]
    expected = reference.encode(texts) + [[number, *reference.encode(text)] for _, number, text in after]
    found = ours.encode_batch_fast(given, add_special_tokens=False)
    for text, encoding, ids in zip(given, found, expected, strict=True):
        if encoding.ids != ids:
            raise BadInput(
                f"{file} is not what SentencePiece makes of this vocabulary ({text!r} becomes {encoding.ids[:8]}, "
                f"there {ids[:8]}), so llama.cpp would read texts differently. Put the tokenizer.model of its training "
                "there; if it is there already, remove tokenizer.json."
            )


def read(folder: Path, proto: Any, settings: Settings, rows: int, template: str | None) -> Pieces:
    """The vocabulary, padded to the embedding's rows. Raises BadInput."""
    joined = {c for p in proto.pieces if p.type == _Piece.NORMAL and len(p.piece) > 1 for c in p.piece}
    never = {number for number, p in enumerate(proto.pieces) if p.type == _Piece.USER_DEFINED and " " in p.piece}
    by_id = {number: _piece(piece, joined) for number, piece in enumerate(proto.pieces) if number not in never}
    scores = [piece.score for piece in proto.pieces]
    for number, text, special in _added(folder, settings):
        known = by_id.get(number)
        if number in never:
            continue
        if known is None:
            by_id[number] = (text, CONTROL if special else USER)
        elif special and text != known[0]:
            raise BadInput(
                f"{folder}: id {number} is {known[0]!r} in the vocabulary and {text!r} among the added tokens; use the "
                "tokenizer that the checkpoint was trained with."
            )
        elif special and known[1] in (NORMAL, USER):
            by_id[number] = (text, CONTROL)
    for number, (text, kind) in by_id.items():
        if kind == USER and text in (template or "") and re.fullmatch(r"<\S+>", text):
            by_id[number] = (text, CONTROL)
    tokens, types = filled(folder / "tokenizer.model", by_id, rows)
    _refuse_spelled(folder, tokens, types)
    scores += [_ADDED_SCORE if number in by_id else _PADDING_SCORE for number in range(len(scores), rows)]
    ids = {token: number for number, token in enumerate(tokens)}
    prefix = proto.normalizer_spec.add_dummy_prefix
    cut_out = [text for text, kind in by_id.values() if kind == USER]

    def named(key: str) -> int | None:
        number, own = settings.special(f"{key}_token", ids), getattr(proto.trainer_spec, f"{key}_id")
        return number if number is not None or own < 0 else own

    bos = named("bos")
    return Pieces(
        model="llama",
        pre="default",
        tokens=tokens,
        types=types,
        merges=[],
        # A control token's score of 0 would be the best of all, should a text spell it out.
        scores=[_PADDING_SCORE if kind == CONTROL else score for score, kind in zip(scores, types, strict=True)],
        bos=bos,
        eos=named("eos"),
        pad=named("pad"),
        unk=named("unk"),
        add_bos=settings.add_bos and bos is not None,
        add_space_prefix=prefix,
        nfc=False,
        inexact=tuple(cut_out if prefix else (text.replace(" ", _SPACE) for text in cut_out if " " in text)),
        inexact_alone=_alone(proto),
    )


def role_template(folder: Path, proto: Any, template: str) -> str | None:
    """`template`, written for Baichuan2-Chat, with the role tokens that the folder's generation_config.json names.

    None for a checkpoint without roles: a base model, or another vocabulary.
    """
    generation = optional(folder / "generation_config.json")
    roles = [generation.get(key) for key in ("user_token_id", "assistant_token_id")]
    if not all(isinstance(number, int) and 0 <= number < len(proto.pieces) for number in roles):
        return None
    user, assistant = (proto.pieces[number].piece for number in roles)
    return template.replace("<reserved_106>", user).replace("<reserved_107>", assistant)


def encode(file: Path, texts: list[str]) -> list[list[int]]:
    """The ids SentencePiece itself gives, without special tokens."""
    return SentencePieceProcessor(model_proto=load(file).SerializeToString()).encode(texts)


def _refuse_spelled(folder: Path, tokens: list[str], types: list[int]) -> None:
    """llama.cpp joins characters to whatever token they spell; SentencePiece to no control or byte token."""
    known = {text for text, kind in zip(tokens, types, strict=True) if kind != UNUSED}
    for text, kind in zip(tokens, types, strict=True):
        halves = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        if kind in (CONTROL, UNKNOWN, BYTE) and any(
            all(len(half) == 1 or half in known for half in pair) for pair in halves
        ):
            raise BadInput(
                f"{folder}: whoever types {text!r} would write that token, because llama.cpp can join it from its "
                "parts; this vocabulary cannot be exported."
            )


def _alone(proto: Any) -> tuple[str, ...]:
    """The user-defined pieces of a vocabulary with a dummy prefix, which a fast tokenizer does not put before them."""
    prefix = proto.normalizer_spec.add_dummy_prefix
    return tuple(piece.piece for piece in proto.pieces if prefix and piece.type == _Piece.USER_DEFINED)


def _piece(piece: Any, joined: set[str]) -> tuple[str, int]:
    """Text and type of a piece in the GGUF; `joined`: the characters that longer pieces contain."""
    text, kind = piece.piece, _TYPES[piece.type]
    if kind != USER:
        return text, kind
    return (text, NORMAL) if len(text) == 1 and text not in joined else (text.replace(_SPACE, " "), USER)


def _added(folder: Path, settings: Settings) -> Iterable[tuple[int, str, bool]]:
    """(id, text, special) of the tokens that transformers adds to the pieces, wherever they are written down."""
    for text, number in optional(folder / "added_tokens.json").items():
        yield number, text, bool(text.startswith("<") and text.endswith(">"))
    for number, entry in (settings.values.get("added_tokens_decoder") or {}).items():
        yield int(number), entry["content"], bool(entry.get("special"))
    for entry in optional(folder / "tokenizer.json").get("added_tokens") or []:
        yield entry["id"], entry["content"], bool(entry.get("special"))
