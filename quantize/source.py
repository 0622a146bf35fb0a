"""What is exported: a run folder, or a Hugging Face checkpoint with or without an adapter."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any, Literal

from quantize.checkpoint import Tensors
from quantize.errors import BadInput
from quantize.run_folder import Dialogue, RunFolder, file_sha256, read_dialogues, read_object

Kind = Literal["mue", "lora", "released"]
_INPUT_SUFFIXES = {".json", ".jinja", ".safetensors", ".bin", ".model"}
_RELEASED = "lora_moe_"  # tensor names of adapters that the paper's released code wrote


@dataclass(frozen=True)
class Source:
    """One model to export. `kind` says what `adapter` is; `prompts` is None for a model without our contract.

    `calibration` is what the experts are merged on, `held_out` what is measured; both may be empty.
    """

    name: str
    checkpoint: Path
    adapter: Path | None = None
    kind: Kind | None = None
    prompts: dict[str, Any] | None = None
    calibration: list[Dialogue] = field(default_factory=list)
    held_out: list[Dialogue] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def demonstration(self) -> bool:
        """Whether the run declares its model a demonstration."""
        return bool(self.prompts and self.prompts["demonstration"])

    def inputs(self, given_up: Event | None = None) -> dict[str, str]:
        """sha256 of every file the export depends on, by a name without this machine's folders.

        Stops before the next file once `given_up` is set.
        """
        wanted = sorted(self.files.items())
        return {name: file_sha256(path) for name, path in wanted if not (given_up and given_up.is_set())}


def open_source(path: Path, adapter: Path | None = None, calibration: Path | None = None) -> Source:
    """Recognises a source; no weights are read.

    Parameters:
        path: a run folder (run.json) or a checkpoint folder (config.json).
        adapter: a MUE or LoRA adapter, or one that the paper's released code wrote, for a checkpoint folder.
        calibration: dialogues, one JSON object a line, to merge and measure on.

    Raises BadInput with cause and remedy.
    """
    if (path / "run.json").is_file():
        if adapter is not None:
            raise BadInput(f"{path} is a run folder and has its own adapter; give its 3-dfpo folder with --adapter.")
        return _from_run(RunFolder.open(path), calibration)
    if not path.is_dir():
        raise BadInput(
            f"There is no folder {path}; give a run folder (`pediatricsgpt train RECIPE` makes one under runs/) "
            "or a Hugging Face checkpoint folder."
        )
    if not (path / "config.json").is_file():
        raise BadInput(f"{path} has neither run.json nor config.json: it is no run folder and no checkpoint.")
    files = _inputs(path, "")
    kind: Kind | None = None
    if adapter is not None:
        kind = _kind(adapter)
        files |= _inputs(adapter, "adapter/")
    dialogues = read_dialogues(calibration) if calibration else []
    if calibration:
        files["calibration.jsonl"] = calibration
    name = path.resolve().name
    return Source(name, path, adapter, kind, calibration=dialogues, files=files)


def _from_run(run: RunFolder, calibration: Path | None) -> Source:
    names = ["run.json", "prompts.json", "calibration.jsonl", "held_out.jsonl"]
    files = {name: run.path / name for name in names if (run.path / name).is_file()}
    for stage in (run.checkpoint, run.adapter):
        files |= _inputs(stage, f"{stage.name}/")
    if calibration:
        files["calibration.jsonl"] = calibration
    return Source(
        name=run.name,
        checkpoint=run.checkpoint,
        adapter=run.adapter,
        kind="mue",
        prompts=run.prompts,
        calibration=read_dialogues(calibration) if calibration else run.calibration,
        held_out=run.held_out,
        run=run.run,
        files=files,
    )


def _inputs(folder: Path, prefix: str) -> dict[str, Path]:
    return {f"{prefix}{f.name}": f for f in folder.iterdir() if f.is_file() and f.suffix in _INPUT_SUFFIXES}


def converted(source: Source, work: Path, *, uniform_gates: bool) -> Source:
    """The source with an adapter of the released code turned into a MUE adapter under `work`; others unchanged.

    `uniform_gates`: take an adapter without routers too, giving each specific expert the gate 1/N.
    Raises BadInput.
    """
    if source.kind != "released" or source.adapter is None:
        return source
    from trainer.mue.config import MueError
    from trainer.mue.released import import_released

    target = work / "released"
    try:
        import_released(source.adapter, target, uniform_gates=uniform_gates)
    except MueError as error:
        # The only error with this remedy: a file without routers.
        hint = " `--merge uniform` does that." if "with uniform gates" in str(error) else ""
        raise BadInput(f"{error}{hint}") from error
    return replace(source, adapter=target, kind="mue")


def _kind(folder: Path) -> Kind:
    if not folder.is_dir():
        raise BadInput(f"There is no adapter folder {folder}; give the folder that `save_pretrained` wrote.")
    settings = read_object(folder / "adapter_config.json")
    kind = settings.get("peft_type")
    if kind == "MUE":
        return "mue"
    if kind != "LORA":
        raise BadInput(f"{folder} holds a {kind} adapter; MUE and LoRA adapters can be merged.")
    return "released" if "lora_nums" in settings or _is_released(folder) else "lora"


def _is_released(folder: Path) -> bool:
    file = folder / "adapter_model.safetensors"
    return file.is_file() and any(_RELEASED in name for name in Tensors([file]))
