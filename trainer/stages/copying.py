"""Copy exercises: before any dialogue the model learns to find a key in its context and repeat what follows.

``<s> key₁ value₁ <e> key₂ value₂ <e> … <s> keyᵢ → valueᵢ <eos>`` over random tokens: nothing can be memorised, so
the loss falls only when copying heads appear (for a model of a few million parameters after some hundreds of steps).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

IGNORED = -100  # PyTorch's cross entropy skips these labels
_RARE = 0.3  # share of exercises over the whole vocabulary, so that characters the corpus lacks are copied too


def copy_exercises(
    count: int, running: Sequence[int], vocabulary: Sequence[int], seed: int, *, start: int, end: int, eos: int
) -> list[dict[str, list[int]]]:
    """`count` exercises as {"input_ids", "labels"}; only the value to repeat (and eos) is scored.

    Tokens are drawn as often as they occur in `running` text (the heads appear sooner on a skewed distribution) or,
    in a share of the exercises, evenly from the whole `vocabulary`.
    """
    rng = random.Random(seed)
    exercises = []
    for _ in range(count):
        tokens = vocabulary if rng.random() < _RARE else running
        pairs = [
            (rng.choices(tokens, k=rng.randint(2, 4)), rng.choices(tokens, k=rng.randint(3, 14)))
            for _ in range(rng.randint(1, 4))
        ]
        key, value = rng.choice(pairs)
        prompt = [start]
        for other_key, other_value in pairs:
            prompt += [*other_key, *other_value, end]
        prompt += [start, *key]
        answer = [*value, eos]
        exercises.append({"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer})
    return exercises
