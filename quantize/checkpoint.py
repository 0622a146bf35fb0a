"""A Hugging Face checkpoint, read by memory map, row block by row block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quantize.architectures import TensorPlan, source_shapes
from quantize.errors import BadInput
from quantize.run_folder import read_object
from quantize.weight_files import Stored, is_buffer, open_file

_STEMS = ("model.safetensors", "pytorch_model.bin")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_COMPARED_ROWS = 4096


class Tensors:
    """The tensors of one or several weight files; data stays on disk until rows are asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._tensors: dict[str, Stored] = {}
        for file in files:
            for name, tensor in open_file(file).items():
                if name in self._tensors:
                    raise BadInput(f"{file} repeats the tensor {name}; the checkpoint is damaged, save it again.")
                self._tensors[name] = tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """F32, F16 or BF16."""
        return self._tensors[name].dtype

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._tensors[name].file

    def raw(self, name: str) -> tuple[str, np.ndarray]:
        """(dtype, the tensor as it is stored): float32, or uint16 for both 16-bit types. Mapped, read only."""
        tensor = self._tensors[name]
        return tensor.dtype, tensor.read()

    def rows(self, name: str, rows: slice | np.ndarray) -> np.ndarray:
        """Rows (of the first dimension) as a new float32 array, whatever the stored type."""
        dtype, stored = self.raw(name)
        picked = np.asarray(stored[rows])
        if dtype == "BF16":
            # A bfloat16 is the upper half of a float32.
            bits = picked.astype(np.uint32, order="C")
            bits <<= 16
            return bits.view(np.float32)
        return (picked.view(np.float16) if dtype == "F16" else picked).astype(np.float32, order="C")

    def array(self, name: str) -> np.ndarray:
        """The whole tensor as float32."""
        return self.rows(name, slice(None))


class Checkpoint:
    """A checkpoint folder: configuration and tensors."""

    def __init__(self, folder: Path) -> None:
        """Opens safetensors or pytorch_model.bin, in one file or with an index. Raises BadInput."""
        self.folder = folder
        self.config: dict[str, Any] = read_object(folder / "config.json")
        stem = _stem(folder)
        index = folder / f"{stem}.index.json"
        if not index.is_file():
            self.tensors = Tensors([folder / stem])
            return
        places = _weight_map(index)
        self.tensors = Tensors([folder / name for name in sorted(set(places.values()))])
        held = {name: self.tensors.file(name).name for name in self.tensors}
        for name in sorted({*held, *(name for name in places if not is_buffer(name))}):
            if held.get(name) != places.get(name):
                raise BadInput(
                    f"{index} places {name} in {places.get(name, 'no file')}, but {held.get(name, 'no file')} has it; "
                    "index and files are of two checkpoints, copy the whole folder again."
                )

    def check(self, plans: Sequence[TensorPlan]) -> None:
        """Every tensor that the plans need is present in its shape, and no other is.

        Raises BadInput otherwise: a tensor left out loads fine in llama.cpp and answers nonsense. A tied model's copy
        of its embedding is passed over. Raises ValueError for plans that do not read every row exactly once.
        """
        shapes = source_shapes(plans)
        extra = set(self.tensors) - set(shapes)
        if _HEAD in extra and _EMBEDDING in self.tensors:
            self._refuse_untied_head()
            extra.remove(_HEAD)
        for problem, names in (
            ("is missing", sorted(set(shapes) - set(self.tensors))),
            ("is not known", sorted(extra)),
        ):
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise BadInput(
                    f"{self.folder}: the tensor {names[0]}{more} {problem}; the weights do not belong to the "
                    f"architecture in config.json, so export the checkpoint again."
                )
        for name, shape in shapes.items():
            self._check_shape(name, shape)
        _read_once(plans, shapes)

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        found = self.tensors.shape(name)
        if found == shape:
            return
        if name in (_HEAD, _EMBEDDING) and found[1:] == shape[1:]:
            raise BadInput(
                f"{self.folder}: {name} has {found[0]} rows but config.json says vocab_size {shape[0]}; tokens were "
                "added without saving the configuration: save model and tokenizer together again."
            )
        raise BadInput(
            f"{self.folder}: {name} has shape {found} but config.json says {shape}; export the checkpoint again."
        )

    def _refuse_untied_head(self) -> None:
        (kind, head), (other, embedding) = self.tensors.raw(_HEAD), self.tensors.raw(_EMBEDDING)
        blocks = [slice(start, start + _COMPARED_ROWS) for start in range(0, len(head), _COMPARED_ROWS)]
        same = kind == other and head.shape == embedding.shape
        same = same and all(np.array_equal(head[rows], embedding[rows]) for rows in blocks)
        if not same:
            raise BadInput(
                f"{self.folder}: config.json ties the output layer to the embedding, but {_HEAD} differs from it; if "
                'the model was trained with its own output layer, set "tie_word_embeddings": false, else save it again.'
            )


def _stem(folder: Path) -> str:
    """Which of the known names the weights have; safetensors first, as everywhere."""
    for stem in _STEMS:
        single, index = (folder / stem).exists(), (folder / f"{stem}.index.json").exists()
        if single and index:
            raise BadInput(f"{folder} holds both {stem} and {stem}.index.json; remove the one of the older model.")
        if single or index:
            return stem
    raise BadInput(
        f"{folder} holds no weights ({' or '.join(_STEMS)}, or their index); give a complete checkpoint folder."
    )


def _weight_map(index: Path) -> dict[str, str]:
    """File names by tensor; every file lies beside the index."""
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise BadInput(f"{index} holds no `weight_map`; copy the whole folder again.")
    for name, file in places.items():
        if not isinstance(file, str) or file in ("", ".", "..") or set(file) & set("/\\:\0"):
            raise BadInput(f"{index} places {name} in {file!r}, which is no file of this folder; download it again.")
    return places


def _read_once(plans: Sequence[TensorPlan], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless the plans of each source together read all of its rows, each once."""
    read: dict[str, list[np.ndarray]] = {}
    for plan in plans:
        if plan.values is None:
            read.setdefault(plan.source, []).append(np.arange(plan.shape[0]) if plan.order is None else plan.order)
    for name, orders in read.items():
        if not np.array_equal(np.sort(np.concatenate(orders)), np.arange(shapes[name][0])):
            raise ValueError(f"the plans do not read every row of {name} exactly once")
