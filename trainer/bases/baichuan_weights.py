"""The tensors of a Baichuan checkpoint, read from either format and written under Llama's names.

Files stay memory-mapped: only the normalised head is ever held in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.recipe import RecipeError

Progress = Callable[[str, int, int], None]
_SHARD_BYTES = 2 << 30
_HEAD_ROWS = 8192  # rows of the head normalised at a time, in fp32
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class BaichuanError(RecipeError):
    """A checkpoint that cannot be converted; the message names the cause and the remedy."""


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of the checkpoint; raises BaichuanError when the file holds none."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BaichuanError(f"{file} cannot be read ({error.strerror}); give the folder of a checkpoint.") from None
    except ValueError as error:
        raise BaichuanError(f"{file} is not JSON ({error}); download it again.") from None
    if not isinstance(data, dict):
        raise BaichuanError(f"{file} is not a JSON object; download it again.")
    return data


def _files(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = read_json(index).get("weight_map", {}).values()
            return sorted({folder / Path(shard).name for shard in shards})
        if (folder / name).is_file():
            return [folder / name]
    raise BaichuanError(
        f"{folder} has no model.safetensors or pytorch_model.bin (nor their index); download the checkpoint again."
    )


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # Without weights_only a downloaded pickle could run code.
        return dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BaichuanError(f"{file} cannot be read ({reason}); download it again.") from error


def open_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint by name, memory-mapped."""
    found: dict[str, torch.Tensor] = {}
    for file in _files(folder):
        for name, tensor in _load(file).items():
            if name in found:
                raise BaichuanError(f"{file} repeats the tensor {name}; download the checkpoint again.")
            if not isinstance(tensor, torch.Tensor) or tensor.dtype not in _DTYPES:
                kind = getattr(tensor, "dtype", type(tensor).__name__)
                raise BaichuanError(f"{file}: {name} is {kind}; only checkpoints in fp32, fp16 or bf16 are converted.")
            found[name] = tensor
    return found


def _origin(name: str) -> tuple[str, int | None]:
    """Source tensor of a Llama tensor, and which third of its rows."""
    for third, projection in enumerate(("q_proj", "k_proj", "v_proj")):
        if name.endswith(f".self_attn.{projection}.weight"):
            return name.replace(projection, "W_pack"), third
    return name, None


def llama_tensors(config: LlamaConfig, tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """Names, shapes and types of the Llama tensors (on the meta device).

    The names are those of transformers' own class. Raises BaichuanError unless the checkpoint holds exactly what they
    are made of; only `rotary_emb.inv_freq`, which Baichuan 1 saved and the configuration determines, is left over.
    """
    with torch.device("meta"):
        wanted: dict[str, torch.Tensor] = LlamaForCausalLM(config).state_dict()
    needed = {_origin(name)[0] for name in wanted}
    given = {name for name in tensors if not name.endswith(".rotary_emb.inv_freq")}
    for names, problem in ((needed - given, "lacks"), (given - needed, "has, beyond a Baichuan 7B,")):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise BaichuanError(f"{folder} {problem} {listed}; download the whole checkpoint of a 7B release again.")
    for name, tensor in wanted.items():
        source, third = _origin(name)
        rows, *columns = tensor.shape
        shape = (rows if third is None else 3 * rows, *columns)
        if tensors[source].shape != shape:
            raise BaichuanError(
                f"{folder}: {source} has the shape {list(tensors[source].shape)}, config.json makes it {list(shape)}; "
                "download the whole checkpoint again."
            )
        wanted[name] = tensor.to(tensors[source].dtype)
    return wanted


def _converted(name: str, tensors: dict[str, torch.Tensor], normalise_head: bool) -> torch.Tensor:
    source, third = _origin(name)
    tensor = tensors[source]
    if third is not None:
        return tensor.chunk(3)[third]
    if name == "lm_head.weight" and normalise_head:
        head = torch.empty_like(tensor)
        for rows, divided in zip(tensor.split(_HEAD_ROWS), head.split(_HEAD_ROWS), strict=True):
            divided.copy_(torch.nn.functional.normalize(rows.float()))
        return head
    return tensor


def write_tensors(
    part: Path,
    wanted: dict[str, torch.Tensor],
    tensors: dict[str, torch.Tensor],
    normalise_head: bool,
    progress: Progress | None,
) -> None:
    """Writes the `wanted` tensors into one or several safetensors files (with their index) in the folder `part`."""
    split = split_torch_state_dict_into_shards(wanted, max_shard_size=_SHARD_BYTES)
    done = 0
    for file, names in split.filename_to_tensors.items():
        shard = {name: _converted(name, tensors, normalise_head) for name in names}
        save_file(shard, part / file, metadata={"format": "pt"})
        done += len(names)
        if progress:
            progress(file, done, len(wanted))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
