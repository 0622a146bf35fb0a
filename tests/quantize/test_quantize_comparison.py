"""Distances against hand computations."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter

from quantize import comparison, header
from quantize.comparison import Comparison, LogitDistance, Track, weight_errors
from quantize.writer import row_blocks


def track(rows: list[list[float]], ids: list[int], folder: Path) -> Track:
    """What a model with these logits says about one sequence."""
    made = Track([ids], folder, budget=100)
    made.add(0, 0, np.array(rows, dtype=np.float32))
    return made


def distance(
    reference: list[list[float]], tested: list[list[float]], ids: list[int], folder: Path, tie: float = 1e-4
) -> LogitDistance:
    compared = Comparison(track(reference, ids, folder), tie)
    compared.add(0, 0, np.array(tested, dtype=np.float32))
    return compared.result()


def test_kl_divergence_and_agreement(tmp_path: Path) -> None:
    found = distance([[math.log(3), 0.0], [0.0, 5.0]], [[0.0, math.log(3)], [0.0, 5.0]], [0, 1], tmp_path)
    expected = 0.75 * math.log(3) + 0.25 * math.log(1 / 3)
    assert found.max_kld == pytest.approx(expected, rel=1e-6)
    assert found.mean_kld == found.median_kld == pytest.approx(expected / 2, rel=1e-6)
    assert found.kld_99 == pytest.approx(0.99 * expected, rel=1e-6)
    assert (found.mismatches, found.ties, found.agreement) == (1, 0, 0.5)


def test_perplexity_and_change_of_probability(tmp_path: Path) -> None:
    # The token that follows is 1: probability 1/4 in the reference, 3/4 in the tested model.
    found = distance([[math.log(3), 0.0], [9.0, 9.0]], [[0.0, math.log(3)], [9.0, 9.0]], [0, 1], tmp_path)
    assert found.perplexity == pytest.approx((4, 4 / 3), rel=1e-6)
    assert found.perplexity_ratio == pytest.approx(1 / 3, rel=1e-6)
    assert found.rms_dp == pytest.approx(0.5, rel=1e-6)


def test_agrees_with_torch_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of any size, and parts smaller than a block, add up to the same figures."""
    monkeypatch.setattr(comparison, "_ELEMENTS", 150)
    random = np.random.default_rng(0)
    ids = [random.integers(0, 50, size).tolist() for size in (30, 41)]
    a, b = ([random.normal(size=(len(one), 50)).astype(np.float32) for one in ids] for _ in range(2))
    reference = Track(ids, tmp_path, budget=55)  # all of the first sequence, 25 positions of the second
    for number, logits in enumerate(a):
        for start in range(0, len(logits), 7):
            reference.add(number, start, logits[start : start + 7])
    compared = Comparison(reference, 0.0)
    for number, logits in enumerate(b):
        for start in range(0, len(logits), 16):
            compared.add(number, start, logits[start : start + 16])
    found = compared.result()
    p, q = (torch.from_numpy(np.concatenate([x[0], x[1][:25]])).double().log_softmax(-1) for x in (a, b))
    klds = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert found.positions == 55
    assert found.mean_kld == pytest.approx(klds.mean().item(), rel=1e-9)
    assert found.kld_99 == pytest.approx(klds.quantile(0.99).item(), rel=1e-9)
    assert found.mismatches == int((p.argmax(-1) != q.argmax(-1)).sum())
    losses = [
        torch.nn.functional.cross_entropy(torch.from_numpy(x[:-1]).double(), torch.tensor(i[1:]), reduction="none")
        for x, i in zip(b, ids, strict=True)
    ]
    assert found.perplexity[1] == pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-6)
    assert {path.name for path in tmp_path.iterdir()} == {"logits-0.npy", "logits-1.npy"}


def test_a_near_tie_is_not_a_mismatch_but_counted(tmp_path: Path) -> None:
    reference = [[1.0, 1.00005, -3.0], [1.0, 1.001, -3.0]]
    tested = [[1.00002, 1.0, -3.0], [1.00002, 1.0, -3.0]]
    found = distance(reference, tested, [0, 1], tmp_path)
    assert (found.mismatches, found.ties) == (1, 1)


def test_not_a_number_never_agrees(tmp_path: Path) -> None:
    found = distance([[1.0, 0.0], [1.0, 0.0]], [[math.nan, 0.0], [1.0, 0.0]], [0, 1], tmp_path)
    assert found.mismatches == 1
    assert not found.mean_kld <= 1e9
    assert not found.perplexity_ratio <= 1e9


def test_vocabularies_of_different_size_are_refused(tmp_path: Path) -> None:
    compared = Comparison(track([[1.0, 0.0], [1.0, 0.0]], [0, 1], tmp_path), 0.0)
    with pytest.raises(ValueError, match="2 and 3 tokens"):
        compared.add(0, 0, np.zeros((2, 3), np.float32))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_one_changed_bit_of_a_float_tensor_is_counted(kind: str, tmp_path: Path) -> None:
    """Of a tensor that is rounded to its type, as the writers round."""
    source = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    source[0, :3] = torch.tensor([0.0, -0.0, 1e-41])
    rounded = source.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind])
    stored = rounded.view(torch.int32 if kind == "F32" else torch.int16).numpy().copy()
    for changed in (0, 1):
        stored[3, 7] ^= changed
        path = tmp_path / f"{changed}.gguf"
        writer = GGUFWriter(path, "llama")
        types = {"F32": 0, "F16": 1, "BF16": 30}
        writer.add_tensor_info("w", (4, 64), np.dtype(np.float32), stored.nbytes, raw_dtype=types[kind])  # type: ignore
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.write_tensor_data(stored)
        writer.close()
        error = weight_errors(header.read(path), lambda _name, start, stop: source.numpy()[start:stop])["w"]
        assert (error.kind, error.changed) == (kind, changed)
        assert error.relative < 5e-3


def test_row_blocks_cover_every_row_once_within_bounds() -> None:
    blocks = row_blocks((151_936, 1024))
    assert [start for start, _ in blocks[1:]] == [stop for _, stop in blocks[:-1]]
    assert (blocks[0][0], blocks[-1][1]) == (0, 151_936)
    assert max(stop - start for start, stop in blocks) * 1024 * 4 <= 32 << 20
    assert row_blocks((7,)) == [(0, 7)]
