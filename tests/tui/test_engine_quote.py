"""Whatever the model says, quote mode emits whole reviewed pieces, each sentence once."""

import random
from collections.abc import Callable

import pytest

from tui.engine.quote import Grammar, Piece, QuotePassage, QuoteSpec, QuoteWeights, State, Walk, scored

END = 2
SPEC = QuoteSpec(
    passages=(
        QuotePassage("根据资料[1]：\n", 3.0, ("发热要喝水。\n", "发热要休息。\n", "同一句话。\n"), (1.0, 1.0, 1.0)),
        QuotePassage("根据资料[2]：\n", 1.0, ("腹泻要补液。\n", "同一句话。\n"), (1.0, 1.0)),
    ),
    refusal="资料中没有相关内容。\n",
    refusal_weight=0.4,
    openings=("您先别着急。\n", "您先坐下。\n"),
    closings=("请及时就医。\n",),
)


def tokenise(text: str) -> list[int]:
    """One token per byte, above the special ids: shares prefixes inside characters."""
    return [byte + 3 for byte in text.encode()]


class Noise:
    """Logits that are different at every look."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def __getitem__(self, token: int) -> float:
        return self._random.choice([self._random.gauss(0, 8), float("nan"), float("inf"), float("-inf")])


def run(spec: QuoteSpec, logits: Callable[[], object], room: int = 10_000) -> tuple[list[Piece], list[int], int]:
    """Pieces, tokens and the number of looks at the model."""
    grammar, state = Grammar(spec, tokenise, END), State()
    pieces: list[Piece] = []
    tokens: list[int] = []
    looks = 0
    while state.phase != "ended":
        walk = Walk(grammar.offers(state, room - len(tokens))[0], spec.weights.prior)
        while walk.piece is None:
            tokens += walk.forced()
            if walk.piece is None:
                looks += 1
                tokens.append(walk.choose(logits()))
        pieces.append(walk.piece)
        state = grammar.advance(state, walk.piece)
    return pieces, tokens, looks


def written(piece: Piece) -> str:
    """The text of a piece of SPEC."""
    match piece.kind:
        case "opening":
            return SPEC.openings[piece.index]
        case "closing":
            return SPEC.closings[piece.index]
        case "cite":
            return SPEC.passages[piece.passage].cite
        case "sentence":
            return SPEC.passages[piece.passage].sentences[piece.index]
        case _:
            return SPEC.refusal if piece.kind == "refusal" else ""


@pytest.mark.parametrize("seed", range(50))
def test_only_whole_pieces_each_sentence_once(seed: int) -> None:
    pieces, tokens, looks = run(SPEC, lambda: Noise(seed))
    assert tokens[-1] == END
    assert END not in tokens[:-1]
    text = bytes(token - 3 for token in tokens[:-1]).decode()
    assert text == "".join(written(piece) for piece in pieces)
    sentences = [written(piece) for piece in pieces if piece.kind == "sentence"]
    assert len(set(sentences)) == len(sentences) <= 8
    kinds = [piece.kind for piece in pieces]
    assert kinds[-1] == "end"
    assert "refusal" in kinds or sentences
    assert not ("refusal" in kinds and sentences)
    assert looks < len(tokens) / 3


def test_sentences_belong_to_the_passage_cited_last() -> None:
    for seed in range(50):
        cited = None
        for piece in run(SPEC, lambda seed=seed: Noise(seed))[0]:
            if piece.kind == "cite":
                cited = piece.passage
            if piece.kind == "sentence":
                assert piece.passage == cited


def test_at_most_eight_sentences() -> None:
    lines = tuple(f"第{i}句话。\n" for i in range(20))
    spec = QuoteSpec((QuotePassage("一：\n", 1.0, lines, (1.0,) * 20),), "无。\n", 0.0, weights=QuoteWeights(end=1e-9))
    pieces, _, _ = run(spec, lambda: dict.fromkeys(range(260), 0.0))
    assert [piece.kind for piece in pieces].count("sentence") == 8


def test_prior_decides_where_the_model_is_indifferent() -> None:
    flat = dict.fromkeys(range(260), 0.0)
    sure = run(QuoteSpec(SPEC.passages, SPEC.refusal, 0.05), lambda: flat)[0]
    assert (sure[0].kind, sure[0].passage) == ("cite", 0)
    unsure = run(QuoteSpec(SPEC.passages, SPEC.refusal, 0.95), lambda: flat)[0]
    assert [piece.kind for piece in unsure] == ["refusal", "end"]


def test_model_decides_where_it_is_sure() -> None:
    class Likes:
        def __init__(self, text: str) -> None:
            self._bytes = {token: 50.0 for token in tokenise(text)}

        def __getitem__(self, token: int) -> float:
            return self._bytes.get(token, 0.0)

    pieces, _, _ = run(QuoteSpec(SPEC.passages, SPEC.refusal, 0.3), lambda: Likes("根据资料[2]"))
    assert (pieces[0].kind, pieces[0].passage) == ("cite", 1)


def test_score_is_log_softmax_over_the_allowed_tokens_plus_log_share() -> None:
    scores = scored({7: 1.0, 8: 3.0, 9: 99.0}, {7: 3.0, 8: 1.0}, prior=0.5)
    # computed by hand: log(e^1/(e^1+e^3)) + 0.5 log(3/4), log(e^3/(e^1+e^3)) + 0.5 log(1/4)
    assert scores[7] == pytest.approx(-2.126928 - 0.143841, abs=1e-5)
    assert scores[8] == pytest.approx(-0.126928 - 0.693147, abs=1e-5)


def test_nothing_that_does_not_fit_is_begun() -> None:
    for room in range(1, 120):
        pieces, tokens, _ = run(SPEC, lambda: Noise(1), room=room)
        assert len(tokens) <= room
        assert pieces[-1].kind == "end"


def test_what_does_not_fit_is_told() -> None:
    grammar = Grammar(SPEC, tokenise, END)
    # Two sentences of 19 bytes, one of 16, and room must stay for the end.
    for room, whole, sentences in ((20, True, 3), (19, False, 1), (16, False, 0)):
        pieces, all_fit = grammar.offers(State("passage", 0), room)
        assert [len([p for p in pieces if p.kind == "sentence"]), all_fit] == [sentences, whole]


def test_identity_is_offered_only_when_asked() -> None:
    assert "identity" not in {p.kind for p in Grammar(SPEC, tokenise, END).offers(State(), 999)[0]}
    spec = QuoteSpec((), SPEC.refusal, 1.0, identity="我是演示模型。\n")
    pieces, _, _ = run(spec, lambda: dict.fromkeys(range(260), 0.0))
    assert [piece.kind for piece in pieces] == ["identity", "end"]


def test_shorter_piece_wins_where_one_begins_another() -> None:
    short, long = Piece("closing", (5, 6), 1.0), Piece("closing", (5, 6, 7), 9.0, 1)
    walk = Walk([long, short], 1.0)
    assert walk.forced() == [5, 6]
    assert walk.piece is short
