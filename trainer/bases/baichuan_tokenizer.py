"""Baichuan's SentencePiece tokenizer as a fast tokenizer with identical ids.

Upstream's tokenizer class is remote code that no transformers since 4.34 can build. `tokenizer.model` itself is plain
SentencePiece BPE, so its pieces become vocabulary and merges of a `tokenizers` BPE model:

- SentencePiece joins the neighbours whose union has the best score. Merges are therefore ranked by the score of their
  result (transformers' own converter ranks by id), and only NORMAL pieces take part: SentencePiece never builds a
  byte, control or user-defined piece out of characters.
- User-defined pieces (line ends, code fences, runs of spaces, reserved tokens) are cut out first, the longest at the
  leftmost place; added tokens do the same. They are matched after normalisation, where a space is already "▁".
- A dummy prefix (Baichuan 1 writes "▁" before a text, Baichuan 2 does not) is added once per text between special
  tokens, as upstream's class did.

One thing differs from bare SentencePiece, as it does in upstream's class: `<s>`, `</s>` and `<unk>` written out in a
text are special tokens. A tokenizer for which anything else differs is refused after a comparison on all its pieces.

Roles: Baichuan2-Chat's generation_config has user_token_id 195 and assistant_token_id 196, and so has upstream's
fine-tune.py; in its vocabulary these ids are `<reserved_106>` and `<reserved_107>`. (Baichuan 1's chat models use the
same ids, there called `<reserved_102>` and `<reserved_103>`; its 7B was only published as a base, without roles.)
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from trainer.bases.baichuan_weights import BaichuanError

ROLE_TOKENS = ("<reserved_106>", "<reserved_107>")  # user, assistant
_SPACE = "▁"
_SAMPLES = (
    "宝宝发热38.5℃，按体重10mg/kg用药。",
    "  两个空格 a  b   c\t制表\n\n换行\r\n ",
    "罕见字龘𠮷𪚥，表情👩‍👧🙂，全角ＡＢＣ１２３，零宽\u200b\ufeff",
    "def f(x):\n    return x ** 2  # 注释\n",
    "▁下划线▁ 2024-01-01 0000000 哈哈哈哈哈哈 <0x0A>",
)

_pb2: Any = sentencepiece_model_pb2  # its classes are built at import time, out of a type checker's sight
_Piece = _pb2.ModelProto.SentencePiece


def convert_tokenizer(file: Path, chat_template: str, context: int) -> PreTrainedTokenizerFast:
    """The fast tokenizer for `tokenizer.model`: bos `<s>` (never added), eos `</s>`, pad and unk `<unk>`.

    Raises BaichuanError when the file is missing, is no such tokenizer, or would give other ids.
    """
    proto = _read(file)
    unk, bos, eos = _special(proto)
    tokenizer = _build(proto)
    _compare(file, proto, tokenizer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unk,
        pad_token=unk,
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens=list(ROLE_TOKENS),
        chat_template=chat_template,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def _read(file: Path) -> Any:
    """The parsed model, refused if it does anything that the fast tokenizer is not given."""
    proto = _pb2.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except OSError as error:
        raise BaichuanError(f"{file} cannot be read ({error.strerror}); download the whole checkpoint again.") from None
    except DecodeError as error:
        raise BaichuanError(f"{file} is not a SentencePiece model ({error}); download it again.") from None
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    lacking = {*ROLE_TOKENS, "</s>"} - {piece.piece for piece in proto.pieces}
    for wrong, what in (
        (trainer.model_type != _pb2.TrainerSpec.BPE, "its model is not BPE"),
        (not trainer.byte_fallback, "it has no byte fallback"),
        (trainer.treat_whitespace_as_suffix, "it writes spaces as suffixes"),
        (bool(normalizer.precompiled_charsmap), "it normalises characters"),
        (normalizer.remove_extra_whitespaces, "it drops spaces"),
        (not normalizer.escape_whitespaces, "it does not mark spaces"),
        (any(piece.type == _Piece.UNUSED for piece in proto.pieces), "it has unused pieces"),
        (bool(lacking), f"it lacks {', '.join(sorted(lacking))}"),
    ):
        if wrong:
            raise BaichuanError(f"{file} is not Baichuan's tokenizer: {what}. Use the tokenizer.model of the release.")
    return proto


def _special(proto: Any) -> tuple[str, str, str]:
    """unk, bos and eos."""
    trainer = proto.trainer_spec
    unk, bos, eos = (proto.pieces[number].piece for number in (trainer.unk_id, trainer.bos_id, trainer.eos_id))
    return unk, bos, eos


def _build(proto: Any) -> Tokenizer:
    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, _merges(proto), byte_fallback=True, fuse_unk=True))
    # A user-defined piece with a bare space never matches: SentencePiece looks for it where spaces are "▁" already.
    cut_out = [p.piece for p in proto.pieces if p.type == _Piece.USER_DEFINED and " " not in p.piece]
    prefixed = proto.normalizer_spec.add_dummy_prefix
    # Added tokens are normalised like texts, one by one: the prefix must not be written before a lone one.
    lone = "|".join(re.escape(token) for token in cut_out)
    prefix = normalizers.Replace(Regex(rf"\A(?!(?:{lone})\z)(?=[\s\S])"), _SPACE)
    steps = [normalizers.Replace(" ", _SPACE), *([prefix] if prefixed else [])]
    tokenizer.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    readers = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [*readers, *([decoders.Strip(" ", left=1)] if prefixed else [])]
    )
    special = dict.fromkeys((*_special(proto), *ROLE_TOKENS))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=True) for token in cut_out if token not in special])
    return tokenizer


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the best-scored result first."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _Piece.NORMAL}
    merges = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [(left, right) for left, right in halves if left in scores and right in scores]
    return merges


def _compare(file: Path, proto: Any, tokenizer: Tokenizer) -> None:
    """Encodes every piece, random rows of pieces and awkward texts with both tokenizers."""
    reference = SentencePieceProcessor(model_proto=proto.SerializeToString())
    special = {*_special(proto), *ROLE_TOKENS}
    normal = [piece.piece.replace(_SPACE, " ") for piece in proto.pieces if piece.type == _Piece.NORMAL]
    cut_out = [piece.piece for piece in proto.pieces if piece.type == _Piece.USER_DEFINED]
    draw = random.Random(0)
    pools = (normal, cut_out or normal, normal)
    rows = ["".join(piece for pool in pools for piece in draw.choices(pool, k=6)) for _ in range(4000)]
    texts = [text for text in (*_SAMPLES, *normal, *rows) if not any(token in text for token in special)]
    for text, ours in zip(texts, tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True):
        expected = reference.encode(text)
        if ours.ids != expected:
            raise BaichuanError(
                f"{file} cannot be converted exactly: {text!r} would become {ours.ids}, SentencePiece says {expected}. "
                "Use the tokenizer.model of Baichuan2-7B."
            )
