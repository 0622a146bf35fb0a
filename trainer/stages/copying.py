"""Copy exercises: before it reads any text the model learns to find a key in its context and repeat what follows.

``<s> key₁ value₁ <e> key₂ value₂ <e> … <s> keyᵢ → valueᵢ <eos>`` over random tokens: nothing can be memorised, so the
loss falls only when copying heads appear (for a model of a few million parameters after some hundreds of steps).
"""

from __future__ import annotations

import random

IGNORED = -100  # PyTorch's cross entropy skips these labels


def copy_exercises(count: int, vocabulary: list[int], seed: int, *, start: int, end: int, eos: int) -> list[dict[str, list[int]]]:
    """`count` exercises as {"input_ids", "labels"}; only the value to repeat (and eos) is scored."""
    rng = random.Random(seed)
    exercises = []
    for _ in range(count):
        pairs = [
            (rng.choices(vocabulary, k=rng.randint(2, 5)), rng.choices(vocabulary, k=rng.randint(3, 16)))
            for _ in range(rng.randint(1, 6))
        ]
        key, value = rng.choice(pairs)
        prompt = [start]
        for other_key, other_value in pairs:
            prompt += [*other_key, *other_value, end]
        prompt += [start, *key]
        answer = [*value, eos]
        exercises.append({"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer})
    return exercises
