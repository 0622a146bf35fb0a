"""The documents of a distribution, and how its files get their names."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from example_distribution import ExampleVocabulary, example_export, inference_template, make_distribution
from jinja2 import Environment

from quantize import chat, distribution, publishing
from quantize.distribution import modelfile
from quantize.distribution.manifest import Distribution, is_name, parse_sums
from quantize.errors import BadInput
from quantize.sizes import Need
from quantize.source import Source

ROOT = Path(__file__).resolve().parents[2]
MODELS = {"tiny-Q8_0.gguf", "tiny-Q4_K_M.gguf", "adapters/diagnosis.gguf"}
DOCUMENTS = {"README.md", "Modelfile", "fidelity.json", "manifest.json", "SHA256SUMS"}

LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
BAICHUAN = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "{{ '<reserved_106>' + m.content }}{% else %}{{ '<reserved_107>' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<reserved_107>' }}{% endif %}"
)
FORGETFUL = (  # drops all but the last answer, as templates of reasoning models do
    "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}[{{ m.role }}]{{ m.content }}[end]{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_sha256sum_accepts_every_file_also_in_subfolders(tmp_path: Path) -> None:
    folder = make_distribution(tmp_path / "dist")
    assert set(files_of(folder)) == MODELS | DOCUMENTS
    command = ["sha256sum", "-c", "--strict", "SHA256SUMS"]
    if shutil.which("sha256sum"):
        checked = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert checked.returncode == 0
        assert checked.stdout.count(": OK") == len(MODELS | DOCUMENTS) - 1
    found = Distribution.open(folder)
    found.verify(folder, lambda *_: None)
    assert found.models == {"Q8_0": "tiny-Q8_0.gguf", "Q4_K_M": "tiny-Q4_K_M.gguf"}
    assert found.adapters == {"diagnosis": "adapters/diagnosis.gguf"}


@pytest.mark.parametrize("name", ["tiny-Q8_0.gguf", "adapters/diagnosis.gguf", "README.md", "manifest.json"])
def test_one_flipped_bit_is_found_and_named(name: str, tmp_path: Path) -> None:
    folder = make_distribution(tmp_path / "dist")
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(BadInput, match=re.escape(name)):
        Distribution.open(folder).verify(folder, lambda *_: None)


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/passwd", "a/../../b", ".hidden", "a//b", "a/", "C:\\x", "a\\b", "", "a\nb", "~/x", "é"]
)
def test_a_name_never_leads_outside(name: str) -> None:
    assert not is_name(name)
    with pytest.raises(BadInput):
        parse_sums(f"{'0' * 64}  {name}\n".encode(), "here")


def test_manifest_and_checksums_must_agree(tmp_path: Path) -> None:
    folder = make_distribution(tmp_path / "dist")
    sums = (folder / "SHA256SUMS").read_text()
    digest = next(line.split()[0] for line in sums.splitlines() if "Q8_0" in line)
    (folder / "SHA256SUMS").write_text(sums.replace(digest, "f" * 64))
    with pytest.raises(BadInput, match=r"disagree about tiny-Q8_0\.gguf"):
        Distribution.open(folder)


def test_the_card_is_one_the_hub_understands(tmp_path: Path) -> None:
    table = [
        {"name": "least-squares", "nll": 1.23456, "kept": 0.912, "kld": 0.0034, "top1": 0.987, "layer_error": 0.1},
        {"name": "base", "nll": 2.0, "kept": 0.0, "kld": 0.5, "top1": 0.5, "layer_error": None},
    ]
    merge = {
        "method": "least-squares", "dialogues": 7, "measured_on": "held-out dialogues", "tokens": 70, "nll_base": 2.0,
        "nll_merged": 1.2, "nll_live": 1.1, "gain": 0.9, "kept": 0.912, "table": table,
    }  # fmt: skip
    work = tmp_path / "work"
    export = example_export(work, fit=[Need("Q8_0", 4096, 600 << 20, 448 << 20, 238 << 20, 100 << 20)])
    export.report["merge"] = merge
    distribution.write_documents(export, work)
    card = (work / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "apache-2.0"
    assert head["language"] == ["zh"]
    assert head["pipeline_tag"] == "text-generation"
    assert {"gguf", "pediatrics"} <= set(head["tags"])
    assert "base_model" not in head  # trained from nothing
    assert "not for clinical use" in card
    assert "不能用于看病" in card
    assert "| least-squares (chosen) | 1.2346 | 91.2% | 0.0034 | 98.7% | 10.0% |" in card
    assert "| base | 2.0000 | 0.0% | 0.5000 | 50.0% | – |" in card
    assert "| `tiny-Q8_0.gguf` | 1.3 | Q8_0×2 | 0.012 | 0.46 | 75.00% |" in card
    assert "perplexity ratio" not in card  # nothing was measured: no empty column
    assert "| diagnosis | `adapters/diagnosis.gguf` |" in card
    assert "| Q8_0 | 4,096 | 1.12 | 0.92 | fits | fits | fits |" in card
    assert "sha256sum -c SHA256SUMS" in card


def test_a_foreign_checkpoint_keeps_its_own_licence(tmp_path: Path) -> None:
    work, source = tmp_path / "work", tmp_path / "Some-Model"
    source.mkdir()
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: theirs\nlicense_link: https://example.org/l\nbase_model: some/base\n"
        "language: en\ndatasets:\n- some/data\n---\n# theirs\n"
    )
    export = example_export(work, source=Source("Some-Model", source), adapters={})
    distribution.write_documents(export, work)
    card = (work / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---\n")[1])
    assert (head["license"], head["license_name"], head["license_link"]) == ("other", "theirs", "https://example.org/l")
    assert (head["base_model"], head["datasets"]) == (["some/base"], ["some/data"])
    assert head["language"] == ["en"]
    assert "pediatrics" not in head["tags"]
    assert "clinical use" not in card
    manifest = json.loads((work / "manifest.json").read_text())
    assert (manifest["contract"], manifest["run"], manifest["merge_method"]) == (None, None, None)
    assert "SYSTEM" not in (work / "Modelfile").read_text()


@pytest.mark.parametrize(
    ("check", "said", "not_said"),
    [
        ("full", "compared with the Hugging Face model", "not compared"),
        ("file", "none with the Hugging Face model", "not compared"),
        ("quick", "was not compared with anything", "measured on fixed texts"),
    ],
)
def test_the_card_claims_no_comparison_that_was_not_made(check: str, said: str, not_said: str, tmp_path: Path) -> None:
    report = {"name": "tiny", "check": check, "passed": True, "failed": [], "gates": [], "merge": None}
    distribution.write_documents(example_export(tmp_path, report=report), tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert said in card
    assert not_said not in card


def test_a_licence_that_nobody_stated_is_not_invented(tmp_path: Path) -> None:
    run = {"recipe": {"base": str(tmp_path / "Base-Model")}}
    work = tmp_path / "work"
    export = example_export(work)
    source = Source("tiny", work, prompts=export.source.prompts, run=run)
    distribution.write_documents(example_export(work, source=source), work)
    card = (work / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "unknown"
    assert "Base-Model" in card
    assert str(tmp_path) not in card


def render_go(template: str, messages: list[dict[str, str]]) -> str:
    """The few actions of Go's template language that our files use, translated to Jinja and rendered there."""
    for pattern, replacement in (
        (r"\{\{- range \.Messages \}\}", "{% for m in messages %}"),
        (r'\{\{ (else )?if eq \.Role "(\w+)" \}\}', lambda m: f"{{% {'el' if m[1] else ''}if m.role == '{m[2]}' %}}"),
        (r"\{\{ else \}\}", "{% else %}"),
        (r"\{\{ \.(Role|Content) \}\}", lambda m: f"{{{{ m.{m[1].lower()} }}}}"),
    ):
        template = re.sub(pattern, replacement, template)
    opened = re.findall(r"\{% (for|if)|(\{\{ end \}\})", template)
    stack = []
    for word, _ in opened:
        end = f"{{% end{stack.pop()} %}}" if not word else stack.append(word)
        template = template.replace("{{ end }}", end, 1) if end else template
    assert "{{-" not in template
    return Environment(keep_trailing_newline=True).from_string(template).render(messages=messages)


@pytest.mark.parametrize(
    ("template", "eos", "bos"),
    [(inference_template(), "<|im_end|>", ""), (LLAMA_3, "<|eot_id|>", ""), (BAICHUAN, "</s>", "")],
    ids=["ours", "llama 3", "baichuan"],
)
def test_ollamas_template_writes_what_the_models_own_writes(template: str, eos: str, bos: str) -> None:
    found = modelfile.turns(template, eos, bos)
    assert found is not None
    messages = [
        {"role": "system", "content": "你是儿科助手。"},
        {"role": "user", "content": "发热 user 39℃？"},
        {"role": "assistant", "content": "多喝水。\n看医生 assistant。"},
        {"role": "user", "content": "谢谢"},
    ]
    own = Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    for start, stop in ((0, 2), (1, 2), (0, 4), (1, 4)):
        conversation = messages[start:stop]
        expected = own.render(messages=conversation, add_generation_prompt=True, eos_token=eos, bos_token=bos)
        assert render_go(found.go(), conversation) == expected


def test_chatml_is_written_as_everybody_writes_it() -> None:
    found = modelfile.turns(inference_template(), "<|im_end|>", "")
    assert found is not None
    assert found.go() == (
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "template",
    [FORGETFUL, "{% for m in messages %}{{ '{{' + m.content }}{% endfor %}", "{{ raise_exception('no') }}", "{% if %}"],
    ids=["forgets", "braces", "refuses", "broken"],
)
def test_a_template_that_cannot_be_proven_is_not_written(template: str, tmp_path: Path) -> None:
    assert modelfile.turns(template, "</s>", "") is None
    work = tmp_path / "work"
    distribution.write_documents(example_export(work, vocabulary=ExampleVocabulary(template)), work)
    text = (work / "Modelfile").read_text(encoding="utf-8")
    assert 'TEMPLATE """' not in text
    assert "Write a TEMPLATE by hand" in text


def test_modelfile_says_all_that_ollama_needs(tmp_path: Path) -> None:
    export = example_export(tmp_path)
    distribution.write_documents(export, tmp_path)
    text = (tmp_path / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith('FROM ./tiny-Q8_0.gguf\nTEMPLATE """')
    assert 'PARAMETER stop "<|im_end|>"\n' in text
    assert "PARAMETER temperature 0\nPARAMETER num_ctx 4096\n" in text
    assert export.source.prompts is not None
    assert f'SYSTEM """{export.source.prompts["system_prompt"]}' in text
    assert "\n# ADAPTER ./adapters/diagnosis.gguf\n" in text
    assert text.endswith("\n# FROM ./tiny-Q4_K_M.gguf\n")


def test_a_new_export_takes_the_place_of_the_old_and_of_nothing_else(tmp_path: Path) -> None:
    folder = make_distribution(tmp_path / "dist")
    (folder / "adapters/mine.txt").write_text("mine")
    (folder / "notes.md").write_text("mine")
    (folder / "tiny-Q4_K_M.gguf").write_bytes(b"changed by somebody")
    with publishing.work_folder(folder) as work:
        export = example_export(work, adapters={})
        only = {"Q8_0": export.files["Q8_0"]}
        documents = distribution.write_documents(example_export(work, adapters={}, files=only), work)
        publishing.publish(
            folder, {folder / "tiny-Q8_0.gguf": only["Q8_0"]} | {folder / d: work / d for d in documents}
        )
    kept = {"adapters/mine.txt", "notes.md", "tiny-Q4_K_M.gguf"}
    assert set(files_of(folder)) == DOCUMENTS | {"tiny-Q8_0.gguf"} | kept
    Distribution.open(folder).verify(folder, lambda *_: None)
    (folder / "adapters/mine.txt").unlink()
    assert (folder / "adapters").exists()


def test_an_emptied_subfolder_goes_away(tmp_path: Path) -> None:
    folder = make_distribution(tmp_path / "dist")
    make_distribution(folder, adapters={})
    assert not (folder / "adapters").exists()
    assert {path.name for path in folder.iterdir()} == DOCUMENTS | {"tiny-Q8_0.gguf", "tiny-Q4_K_M.gguf"}


def test_a_manifest_cannot_make_us_remove_something_elsewhere(tmp_path: Path) -> None:
    folder = make_distribution(tmp_path / "dist")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = hashlib.sha256(b"mine").hexdigest()
    manifest["outputs"]["../victim"] = {"sha256": digest, "bytes": 4}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    make_distribution(folder)
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("failing", [1, 4, 8, 9, 13, 16])
def test_a_failing_rename_leaves_the_old_export_whole(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_distribution(tmp_path / "dist")
    before = files_of(folder)
    real, count = os.replace, 0

    def replace(source: Path, target: Path) -> None:
        nonlocal count
        count += 1
        if count == failing:
            raise PermissionError(13, "in use", str(target))
        real(source, target)

    monkeypatch.setattr(publishing.os, "replace", replace)
    with pytest.raises(PermissionError):
        make_distribution(folder, parameters=2_000_000)
    assert files_of(folder) == before


def test_kill_9_between_two_renames_brings_the_old_export_back(tmp_path: Path) -> None:
    folder = make_distribution(tmp_path / "dist")
    before = files_of(folder)
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from quantize import publishing\n"
        "from example_distribution import make_distribution\n"
        "real = os.replace\n"
        "def replace(source, target):\n"
        "    if Path(target).name == 'manifest.json' and '.part' not in str(target):\n"
        "        print('here', flush=True); time.sleep(60)\n"
        "    real(source, target)\n"
        "publishing.os.replace = replace\n"
        "make_distribution(Path(sys.argv[1]), parameters=2_000_000, adapters={})\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(Path(__file__).parent)))}
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "SHA256SUMS").exists()  # half published: nothing that could be taken for a whole export
    with publishing.locked(folder):
        pass
    kept = {name: data for name, data in files_of(folder).items() if not name.startswith(".quantize.part/")}
    assert kept == before


def test_files_that_are_not_an_export_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(BadInput, match=r"files of the same names.*README\.md"):
        publishing.refuse_overwriting(tmp_path, [], force=False)
    publishing.refuse_overwriting(tmp_path, [], force=True)


def test_sentinels_do_not_survive_in_the_template() -> None:
    found = modelfile.turns(inference_template(), "<|im_end|>", "")
    assert found is not None
    assert not re.search("说|38", found.go())
    assert chat.render(inference_template(), [{"role": "user", "content": "x"}], answer_next=True) == found.render(
        [{"role": "user", "content": "x"}]
    )
