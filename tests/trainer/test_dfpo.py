"""The SFT regulariser of DFPO against the paper code's formula, on answers of unequal length."""

from __future__ import annotations

import inspect

import pytest
import torch
from trl.trainer.dpo_trainer import DPOTrainer

from trainer.stages.dfpo import sft_regulariser


def test_each_sample_counts_the_same() -> None:
    log_probs = torch.tensor([[-1.0, -3.0, 9.0, 9.0], [-2.0, -4.0, -6.0, -8.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    loss = sft_regulariser(log_probs, mask)
    assert loss.item() == pytest.approx((2.0 + 5.0) / 2)  # the token mean would be 4.0
    loss.backward()
    torch.testing.assert_close(log_probs.grad, torch.tensor([[-0.25, -0.25, 0, 0], [-0.125] * 4]))


def test_trl_still_computes_the_loss_where_dfpo_hooks_in() -> None:
    source = inspect.getsource(DPOTrainer._compute_loss)
    assert list(inspect.signature(DPOTrainer._compute_loss).parameters) == ["self", "model", "inputs", "return_outputs"]
    assert "outputs.log_probs[:, -seq_len:]" in source
