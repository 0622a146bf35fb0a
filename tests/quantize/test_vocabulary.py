"""Byte-level vocabularies: real ones, through the library they were made with and through llama.cpp."""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llama_vocabulary import SOURCE, LlamaTokenizer, llama_source, needs_source

from quantize.errors import BadInput
from quantize.strings import medical_strings
from quantize.vocabulary import Vocabulary, read, reference_ids

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
WORDS = {**BYTES, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
MARKS = llama_source.QWEN2.replace(r"\p{L}+|\p{N}|", r"[\p{L}\p{M}]+|\p{N}|").replace(r"\s\p{L}", r"\s\p{L}\p{M}")
CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+")


def steps(*given: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(given)}


def split(expression: str) -> dict[str, Any]:
    return llama_source.split_by(expression)["pretokenizers"][0]


# name of upstream's vocabulary, pre-tokenizer, ignore_merges, llama.cpp's name, rows
VOCABULARIES = {
    "qwen35": ("qwen35", llama_source.split_by(MARKS), False, 151_936),
    "llama-bpe": ("llama-bpe", llama_source.split_by(llama_source.LLAMA3), True, 128_256),
    "gpt-2": ("gpt-2", WORDS, False, 50_257),
    "starcoder": ("starcoder", steps(DIGITS, WORDS), False, 49_152),
    "deepseek-coder": ("deepseek-coder", steps(*map(split, CODER), DIGITS, BYTES), False, 32_256),
}


@pytest.fixture(scope="module", params=VOCABULARIES)
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Vocabulary]:
    """A real vocabulary as a Hugging Face folder, and as it is exported."""
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    _, pre, ignore_merges, rows = VOCABULARIES[name]
    given = llama_source.metadata(SOURCE, name)
    eos = given["tokenizer.ggml.tokens"][given["tokenizer.ggml.eos_token_id"]]
    settings = {"eos_token": eos, "chat_template": llama_source.CHATML}
    llama_source.bpe_tokenizer(SOURCE, name, folder, pre=pre, settings=settings, ignore_merges=ignore_merges)
    return name, folder, read(folder, rows)


@needs_source
def test_real_vocabularies_give_the_known_ids_through_both_libraries(real: tuple[str, Path, Vocabulary]) -> None:
    name, folder, vocabulary = real
    assert vocabulary.pre == VOCABULARIES[name][0]
    texts, known = zip(*llama_source.vectors(SOURCE, name), strict=True)
    assert len(texts) >= 46
    assert reference_ids(folder, list(texts)) == list(known)
    llama = LlamaTokenizer(vocabulary, folder)
    assert [llama.ids(text) for text in texts] == list(known)


@needs_source
def test_medical_texts_give_equal_ids_in_llama_cpp(real: tuple[str, Path, Vocabulary]) -> None:
    _, folder, vocabulary = real
    llama, texts = LlamaTokenizer(vocabulary, folder), medical_strings()
    assert len(vocabulary.exact(texts)) == len(texts) >= 500
    assert [llama.ids(text) for text in texts] == reference_ids(folder, texts)


@needs_source
def test_qwen_composes_texts_first(tmp_path: Path) -> None:
    llama_source.qwen_tokenizer(SOURCE, tmp_path)
    vocabulary = read(tmp_path, 151_936)
    assert (vocabulary.pre, vocabulary.nfc, vocabulary.add_bos) == ("qwen2", True, False)
    llama = LlamaTokenizer(vocabulary, tmp_path)
    known = llama_source.vectors(SOURCE, "qwen2")
    assert [llama.ids(text) for text, _ in known] == [ids for _, ids in known]
    texts = medical_strings()
    composed = [unicodedata.normalize("NFC", text) for text in texts]
    assert composed != texts
    expected = reference_ids(tmp_path, texts + [text for text, _ in known])
    assert expected[len(texts) :] == [ids for _, ids in known]
    assert [llama.ids(text) for text in composed] == expected[: len(texts)]
    wrong = LlamaTokenizer(dataclasses.replace(vocabulary, pre="gpt-2"), tmp_path)
    assert sum(wrong.ids(text) != ids for text, ids in zip(composed, expected, strict=False)) > 20


def test_the_token_after_an_answer_is_eos_whatever_the_tokenizer_names(damaged: Path, tmp_path: Path) -> None:
    # As Qwen's base models come: the template is ChatML, the tokenizer's eos is the end of a document.
    change(damaged / "3-dfpo/tokenizer_config.json", lambda settings: settings.update(eos_token="<|endoftext|>"))
    vocabulary = read(damaged / "3-dfpo", 710)
    assert (vocabulary.eos, vocabulary.other_end) == (2, 0)
    llama = LlamaTokenizer(vocabulary, tmp_path)
    assert llama.api.llama_vocab_eos(llama.vocabulary) == 2
    assert [number for number in range(710) if llama.api.llama_vocab_is_eog(llama.vocabulary, number)] == [0, 2]


@pytest.mark.parametrize("added", [True, False])
def test_a_text_begins_with_bos_if_the_tokenizer_says_so(added: bool, damaged: Path, tmp_path: Path) -> None:
    # llama.cpp itself would add one under this pre-tokenizer's name, whatever the tokenizer does.
    folder, bos = damaged / "3-dfpo", "<|endoftext|>"
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [0], "tokens": [bos]}},
    }
    change(
        folder / "tokenizer.json",
        lambda source: source.update(
            pre_tokenizer=llama_source.split_by(llama_source.LLAMA3),
            post_processor={"type": "Sequence", "processors": [BYTES, template]} if added else BYTES,
            model={**source["model"], "ignore_merges": True},
        ),
    )
    vocabulary = read(folder, 710)
    assert (vocabulary.pre, vocabulary.add_bos) == ("llama-bpe", added)
    llama = LlamaTokenizer(vocabulary, tmp_path)
    assert llama.ids("发热", special=True) == [0] * added + llama.ids("发热")


def change(file: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    source = json.loads(file.read_text(encoding="utf-8"))
    edit(source)
    file.write_text(json.dumps(source), encoding="utf-8")


def change_model(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda source: source["model"].update(values)


def add_token(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda source: source["added_tokens"].append({"id": 701, "special": False, **values})


def post_process(*single: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    return lambda source: source.update(post_processor={"type": "TemplateProcessing", "single": list(single)})


SEQUENCE, END = {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<|im_end|>"}}
REFUSED = {
    "another way to split": (
        lambda s: s["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\p{L}+|\s+"),
        "Train the tokenizer with the Qwen2 expression",
    ),
    "one blank more": (
        lambda s: s["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=llama_source.QWEN2 + " "),
        "pre-tokenizer",
    ),
    "pieces removed": (lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "pre-tokenizer"),
    "a prefix space": (
        lambda s: s["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        "pre-tokenizer",
    ),
    "no pre-tokenizer": (lambda s: s.update(pre_tokenizer=None), "pre-tokenizer"),
    "whole words first": (change_model(ignore_merges=True), "ignore_merges"),
    "dropout": (change_model(dropout=0.1), "dropout"),
    "another model": (change_model(type="Unigram"), "Unigram"),
    "another normalizer": (lambda s: s.update(normalizer={"type": "Lowercase"}), "Lowercase"),
    "no merges": (change_model(merges=[]), "no merges"),
    "half a merge": (lambda s: s["model"]["merges"].append(["a"]), "two parts"),
    "an eos after every text": (post_process(SEQUENCE, END), "post-processor"),
    "an unknown token before every text": (
        post_process({"SpecialToken": {"id": "<bos>"}}, SEQUENCE),
        "adds '<bos>', which is no token",
    ),
    "a token that eats blanks": (add_token(content="<x>", lstrip=True), "strips its neighbours"),
    "a text twice": (add_token(content="A"), "same token text under two ids"),
    "an id beyond the rows": (add_token(content="<x>", id=9999), "ids up to 9999"),
    "a vocabulary that is no object": (change_model(vocab=[1, 2]), "damaged"),
    "an added token without a text": (lambda s: s["added_tokens"].append({"id": 3}), "damaged"),
    "merges that are numbers": (change_model(merges=[1, 2]), "damaged"),
    "no byte": (lambda s: s["model"]["vocab"].pop("Ċ"), "1 of 241 byte tokens"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_llama_cpp_would_read_differently_is_refused(fault: str, damaged: Path) -> None:
    edit, message = REFUSED[fault]
    change(damaged / "3-dfpo/tokenizer.json", edit)
    with pytest.raises(BadInput, match=message):
        read(damaged / "3-dfpo", 710)


def test_a_tokenizer_of_a_much_smaller_model_is_refused(tiny: Path) -> None:
    assert read(tiny / "3-dfpo", 1700).tokens[-1] == "[PAD1699]"
    with pytest.raises(BadInput, match="has 700 tokens, the embedding has 5000 rows"):
        read(tiny / "3-dfpo", 5000)


def test_a_file_that_its_own_library_cannot_read_is_refused(damaged: Path) -> None:
    (damaged / "3-dfpo/tokenizer.json").write_text("{")
    with pytest.raises(BadInput, match="cannot be read"):
        reference_ids(damaged / "3-dfpo", ["小儿"])


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"neither tokenizer\.json nor tokenizer\.model"):
        read(tmp_path, 100)


def test_merges_written_as_one_string_are_the_same(damaged: Path) -> None:
    expected = read(damaged / "3-dfpo", 710)
    change(
        damaged / "3-dfpo/tokenizer.json",
        lambda source: source["model"].update(merges=[" ".join(merge) for merge in source["model"]["merges"]]),
    )
    assert read(damaged / "3-dfpo", 710) == expected


def test_an_own_vocabulary_gives_equal_ids_in_llama_cpp(tiny: Path, tmp_path: Path) -> None:
    vocabulary = read(tiny / "3-dfpo", 710)
    llama = LlamaTokenizer(vocabulary, tmp_path)
    texts = [unicodedata.normalize("NFC", text) for text in medical_strings()]
    assert [llama.ids(text) for text in texts] == reference_ids(tiny / "3-dfpo", texts)
    assert llama.ids("孩子<|im_end|>") != [*llama.ids("孩子"), vocabulary.eos]
    assert llama.ids("孩子<|im_end|>", control=True) == [*llama.ids("孩子"), vocabulary.eos]
