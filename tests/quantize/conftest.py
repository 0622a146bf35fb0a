"""A tiny but real run folder: every file as the trainer writes it, weights random."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from peft import get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from quantize.hugging_face import suitable_threads
from quantize.strings import medical_strings
from trainer.mue import MueConfig
from trainer.prompts import chat_template, prompts, system

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ANSWERS = (
    "多喝水，注意休息。\n",
    "体温超过38.5℃时请就医。\n",
    "口服补液盐，少量多次。\n",
    "观察精神和尿量。\n",
)


def make_run(folder: Path, *, hidden: int = 64, tied: bool = True, seed: int = 0) -> Path:
    """Writes a run folder with a 2-layer Qwen3 model and an adapter whose gates really differ."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 5,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4 + 16,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=0.15,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder / "3-dfpo")
    tokenizer.save_pretrained(folder / "3-dfpo")
    adapted = get_peft_model(model, MueConfig(r=2, alpha=4, num_specific=3, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "mue_B" in name:
                parameter.normal_(0, 0.1)
            elif "mue_route" in name:
                parameter.normal_(0, 0.5)
    adapted.save_pretrained(str(folder / "4-mue"))
    (folder / "run.json").write_text(json.dumps({"name": "tiny", "corpus_sha256": "c" * 64, "git_commit": "g"}))
    (folder / "prompts.json").write_text(json.dumps(prompts(), ensure_ascii=False), encoding="utf-8")
    with (folder / "calibration.jsonl").open("w", encoding="utf-8") as file:
        # Each three times: random experts generalise to nothing, so what is kept out of the fit is of the same text.
        for number, answer in enumerate(ANSWERS * 3):
            task = ("knowledge", "diagnosis", "treatment")[number % 4 % 3]
            messages = [
                {"role": "system", "content": system(task)},
                {"role": "user", "content": f"孩子发热{number % 4 + 1}天怎么办？"},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"task": task, "messages": messages}, ensure_ascii=False) + "\n")
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()  # type: ignore[assignment]
    core.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(QWEN2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(medical_strings(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=chat_template(),
    )


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Models this small run several times faster without waiting for a second thread."""
    with suitable_threads(0):
        yield


@pytest.fixture(autouse=True, scope="package")
def short_texts():
    """Enough text for every check to have something to see; the figures do not matter for random weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantize.reference._TEXT_TOKENS", (256, 512))
        patch.setattr("quantize.reference._GREEDY_TOKENS", 16)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hidden size 64: too narrow for K-quants, quick for everything else. Read only."""
    return make_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hidden size 256 and untied embeddings: real K-quants. Read only."""
    return make_run(tmp_path_factory.mktemp("runs") / "wide", hidden=256, tied=False, seed=1)


@pytest.fixture
def make() -> Callable[..., Path]:
    """Makes another run folder: make(folder, hidden=…, tied=…, seed=…)."""
    return make_run


@pytest.fixture
def damaged(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny run that a test may damage."""
    return shutil.copytree(tiny, tmp_path / "run")
