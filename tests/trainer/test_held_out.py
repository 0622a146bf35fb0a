"""Held-out figures against an unbatched float64 computation, and the training that they must not disturb."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl.trainer.utils import add_fused_lm_head

from trainer.corpus.record import CorpusError, Message, Record, Source
from trainer.evaluate import held_out as room
from trainer.evaluate import likelihood
from trainer.evaluate.held_out import GENERAL_FILE, HeldOut, figures, load_held_out, measure, sums
from trainer.evaluate.likelihood import HeldOutError
from trainer.mue import MueConfig
from trainer.recipe import TokenizerRecipe
from trainer.tokenizer import train_tokenizer

_TEXT = "孩子发热两天，精神好，先多喝水。体温超过三十八度五再用药，按体重算。今天下雨，路上很滑。"
_LONG = 64  # tokens; some of the records below are longer


def _record(**fields) -> Record:
    source = Source(name="test", licence="Apache-2.0", reference="none")
    base = {"id": "1", "task": "general", "source": source, "age_group": "", "split": "train", "group": "a"}
    return Record(**{**base, **fields})


def _turns(*contents: str) -> tuple[Message, ...]:
    roles = ["system", *("user", "assistant") * len(contents)]
    return tuple(Message(role=role, content=text) for role, text in zip(roles, contents, strict=False))  # type: ignore[arg-type]


def _answer(text: str) -> tuple[Message, ...]:
    return (Message(role="assistant", content=text),)


HELD_OUT = HeldOut(
    general=("今天下雨，路上很滑。", "雨", "路上很滑，先多喝水，再喝水。" * 3),
    texts=("孩子发热两天。", "体温超过三十八度五再用药，按体重算。龘"),
    questions=(
        _record(kind="dialogue", task="knowledge", messages=_turns("问答", "发热？", "多喝水。")),
        _record(kind="dialogue", task="treatment", messages=_turns("治疗", "用药？", "按体重算，三十八度五再用药。")),
        _record(kind="dialogue", task="treatment", messages=_turns("治疗", "发热？", "喝水", "再？", "按体重用药。")),
        _record(kind="dialogue", task="diagnosis", messages=_turns("诊断", "天" * 70, "在六十四个之后。")),
    ),
    new_cards=(_record(kind="dialogue", task="knowledge", messages=_turns("问答", "下雨？", "路上很滑。")),),
    preferences=(
        *(
            _record(kind="preference", prompt=_turns("问", q), chosen=_answer(good), rejected=_answer(bad))
            for q, good, bad in [
                ("发热？", "先多喝水。", "用药。"),
                ("用药？", "算", "孩子精神好，先多喝水，按体重算。"),
                ("路？", "很滑，路上很滑。", "滑"),
            ]
        ),
        # The prompt has an answer of its own, which is not part of the pair.
        _record(
            kind="preference", prompt=_turns("问", "发热？", "喝水", "再？"),
            chosen=_answer("按体重。"), rejected=_answer("天。"),
        ),
        _record(kind="preference", prompt=_turns("问", "天" * 70), chosen=_answer("在之后"), rejected=_answer("也在")),
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([_TEXT] * 3, TokenizerRecipe(vocab_size=420), 256)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=256, attention_dropout=0.2,
        tie_word_embeddings=True, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def _log_prob(model, prompt: list[int], scored: list[int]) -> torch.Tensor:
    """Log-probabilities of `scored` after `prompt`: float64, alone, all logits."""
    ids = torch.tensor([prompt + scored])
    logits = model.double()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    table = torch.log_softmax(logits, dim=-1)
    return torch.stack([table[len(prompt) + n - 1, token] for n, token in enumerate(scored)])


def _expected(model, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """The figures, straight from their definitions; prompts and answers are rendered one by one."""
    model = model.eval()

    def prompt_ids(messages) -> list[int]:
        text = "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in messages)
        return tokenizer.encode(text + "<|im_start|>assistant\n")

    def answer_ids(message) -> list[int]:
        return tokenizer.encode(message.content + "<|im_end|>")

    values = {}
    for name, texts in (("general", HELD_OUT.general), ("domain", HELD_OUT.texts)):
        ids = [tokenizer.encode(text)[:_LONG] for text in texts]
        ids = [row for row in ids if len(row) > 1]
        nats = torch.cat([-_log_prob(model, row[:1], row[1:]) for row in ids])
        characters = sum(len(tokenizer.decode(row[1:])) for row in ids)
        values[f"{name}_perplexity"] = nats.mean().exp().item()
        values[f"{name}_bits_per_character"] = nats.sum().item() / math.log(2) / characters
    losses: dict[str, list[torch.Tensor]] = {}
    for records, new in ((HELD_OUT.questions, False), (HELD_OUT.new_cards, True)):
        for record in records:
            messages = record.messages or ()
            for index in range(2, len(messages), 2):
                prompt = prompt_ids(messages[:index])
                answer = answer_ids(messages[index])[: max(0, _LONG - len(prompt))]
                if answer:
                    nats = -_log_prob(model, prompt, answer)
                    for name in ["/new_cards"] if new else ["", f"/{record.task}"]:
                        losses.setdefault(f"assistant_loss{name}", []).append(nats)
    values |= {name: torch.cat(nats).mean().item() for name, nats in losses.items()}
    margins, odds = [], []
    for record in HELD_OUT.preferences:
        prompt = prompt_ids(record.prompt or ())
        if len(prompt) < _LONG:
            good, bad = (
                _log_prob(model, prompt, answer_ids((answer or ())[0])[: _LONG - len(prompt)])
                for answer in (record.chosen, record.rejected)
            )
            margins.append((good.mean() - bad.mean()).item())
            odds.append((good.sum() - bad.sum()).item())
    assert len(margins) == 4
    values["preference_accuracy"] = sum(margin > 0 for margin in margins) / 4
    values["preference_margin"] = sum(margins) / 4
    values["preference_log_odds"] = sum(odds) / 4
    return values


@pytest.mark.parametrize("tokens_per_batch", [8192, 150, 1])
def test_figures_equal_an_unbatched_float64_computation(
    model, tokenizer: PreTrainedTokenizerFast, tokens_per_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_TOKENS_PER_BATCH", tokens_per_batch)
    monkeypatch.setattr(likelihood, "_LOGITS_PER_CHUNK", 3 * len(tokenizer))  # three positions at a time
    measured = measure(model, tokenizer, HELD_OUT, _LONG)
    with torch.no_grad():
        expected = _expected(model, tokenizer)
    assert set(measured) == set(expected)
    assert "assistant_loss/diagnosis" not in measured  # its only answer lies behind max_length
    assert 0 < expected["preference_accuracy"] < 1
    for name, value in expected.items():
        assert measured[name] == pytest.approx(value, rel=2e-5), name


def test_the_output_layer_never_sees_more_than_a_chunk(
    model, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "_LOGITS_PER_CHUNK", 5 * len(tokenizer))
    largest = []
    forward = model.lm_head.forward

    def counted(hidden: torch.Tensor) -> torch.Tensor:
        largest.append(hidden.flatten(0, -2).shape[0])
        return forward(hidden)

    monkeypatch.setattr(model.lm_head, "forward", counted)
    measure(model, tokenizer, HeldOut(general=HELD_OUT.general[-1:]), _LONG)
    assert max(largest) == 5
    assert not model.lm_head._forward_hooks
    assert not model.lm_head._forward_pre_hooks


def test_ranks_share_the_work_and_call_the_model_equally_often(
    model, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_TOKENS_PER_BATCH", 200)
    whole = sums(model, tokenizer, HELD_OUT, _LONG)
    calls, shares = [], []
    for rank in range(3):
        seen: list[tuple[int, int]] = []
        shares.append(
            sums(model, tokenizer, HELD_OUT, _LONG, rank=rank, world=3, progress=lambda *at, seen=seen: seen.append(at))
        )
        calls.append(seen)
    assert calls[0] == calls[1] == calls[2]
    assert calls[0][-1] == (len(calls[0]), len(calls[0]))
    assert list(shares[0]) == list(shares[1]) == list(shares[2]) == list(whole)
    added = {key: sum(share[key] for share in shares) for key in whole}
    assert added == pytest.approx(whole, rel=1e-12)
    assert all(share != whole for share in shares)
    assert figures(added) == pytest.approx(measure(model, tokenizer, HELD_OUT, _LONG), rel=1e-12)


def _on_rank(rank: int, folder: str, model, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    room._TOKENS_PER_BATCH = 200
    plain = measure(model, tokenizer, HELD_OUT, _LONG, rank=rank, world=2)
    add_fused_lm_head(model)  # as TRL's trainers do
    mesh = init_device_mesh("cpu", (2,))
    for module in [*model.model.layers, model]:
        fully_shard(module, mesh=mesh)
    sharded = measure(model, tokenizer, HELD_OUT, _LONG, rank=rank, world=2)
    Path(folder, f"{rank}.json").write_text(json.dumps([plain, sharded]), encoding="utf-8")
    torch.distributed.destroy_process_group()


def test_every_rank_gets_the_figures_of_all_also_of_a_sharded_model(
    model, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    multiprocessing.spawn(_on_rank, (str(tmp_path), model, tokenizer), nprocs=2)  # type: ignore[attr-defined]
    alone = measure(model, tokenizer, HELD_OUT, _LONG)
    for rank in range(2):
        plain, sharded = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        assert plain == pytest.approx(alone, rel=1e-5)
        assert sharded == pytest.approx(alone, rel=1e-5)


def _train(model, tokenizer: PreTrainedTokenizerFast, measuring: bool) -> list[float]:
    """A few steps with dropout and router noise; the losses depend on every random number drawn."""
    torch.manual_seed(5)
    peft = get_peft_model(model, MueConfig(r=2, alpha=4.0, num_specific=2, task_type="CAUSAL_LM"))
    peft.train()
    layer = peft.get_base_model().model.layers[0].mlp
    layer.eval()  # a mode of its own, which must come back as such

    def draw(module: torch.nn.Module, given: object) -> None:
        """A model may draw numbers while it is measured; the training must not notice."""
        if not module.training:
            torch.rand(3)

    peft.register_forward_pre_hook(draw)
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.tensor([tokenizer.encode(_TEXT)])
    losses = []
    for _ in range(4):
        if measuring:
            before = measure(peft, tokenizer, HELD_OUT, _LONG)
            assert before == measure(peft, tokenizer, HELD_OUT, _LONG)
            assert peft.training
            assert peft.get_base_model().model.layers[1].mlp.training
            assert not layer.training
        loss = peft(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_measuring_does_not_disturb_a_training(model, tokenizer: PreTrainedTokenizerFast) -> None:
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    plain = _train(model, tokenizer, measuring=False)
    again = Qwen3ForCausalLM(model.config)
    again.load_state_dict(weights)
    assert _train(again, tokenizer, measuring=True) == plain
    assert plain[0] != plain[-1]


def test_bf16_is_close_and_other(model, tokenizer: PreTrainedTokenizerFast) -> None:
    exact, rounded = (measure(model, tokenizer, HELD_OUT, _LONG, bf16=bf16)["assistant_loss"] for bf16 in (False, True))
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)


def test_a_model_without_meaning_gives_no_crash(model, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    assert math.isnan(measure(model, tokenizer, HELD_OUT, _LONG)["general_perplexity"])
    assert (
        figures({"general nats": 1e6, "general tokens": 10.0, "general characters": 10.0})["general_perplexity"] > 1e9
    )


class _Scaled(Qwen3ForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output


def test_what_cannot_be_measured_is_said(model, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(HeldOutError, match="after the output layer"):
        measure(_Scaled(model.config), tokenizer, HELD_OUT, _LONG)
    with pytest.raises(HeldOutError, match="Raise max_length"):
        measure(model, tokenizer, HELD_OUT, 4)


def test_files_that_are_not_there_give_no_figures(model, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    held_out = load_held_out(tmp_path)
    assert [*held_out.texts, *held_out.questions, *held_out.new_cards, *held_out.preferences] == []
    assert set(measure(model, tokenizer, held_out, 16)) == {"general_perplexity", "general_bits_per_character"}
    assert measure(model, tokenizer, HeldOut(), 16) == {}
    (tmp_path / "held_out_texts.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(CorpusError, match="line 1"):
        load_held_out(tmp_path)


def test_the_general_passages_are_varied_prose() -> None:
    passages = GENERAL_FILE.read_text(encoding="utf-8").splitlines()
    assert len(passages) >= 60
    assert all(80 <= len(passage) <= 160 for passage in passages)
    assert len({passage[:4] for passage in passages}) == len(passages)
    assert len(set("".join(passages))) > 1000
