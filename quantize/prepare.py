"""A source read and checked: which tensors the GGUF gets, which vocabulary, which hyper-parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quantize import architectures, vocabulary
from quantize.architectures import TensorPlan, Value
from quantize.checkpoint import Checkpoint
from quantize.errors import BadInput
from quantize.run_folder import NAME
from quantize.source import Source
from quantize.vocabulary import Vocabulary


@dataclass(frozen=True)
class Prepared:
    """Everything an export knows before it touches a weight. `stored`: type of the checkpoint's matrices."""

    source: Source
    name: str
    checkpoint: Checkpoint
    architecture: str
    plans: list[TensorPlan]
    hyper_parameters: dict[str, Value]
    vocabulary: Vocabulary
    parameters: int
    stored: str

    @property
    def runnable(self) -> bool:
        """Whether transformers can run the checkpoint; Baichuan's own code needs a version of years ago."""
        return self.architecture != "baichuan"

    @property
    def context(self) -> int:
        """How many tokens the model was made for."""
        context = self.hyper_parameters[f"{self.architecture}.context_length"]
        assert isinstance(context, int)
        return context


def prepare(source: Source, name: str | None) -> Prepared:
    """Reads headers, configuration and tokenizer, no weights. Raises BadInput for what cannot be exported."""
    name = name or source.name
    if not NAME.fullmatch(name):
        raise BadInput(f"The model is called {name!r}, which makes no file name; choose one with --name.")
    checkpoint = Checkpoint(source.checkpoint)
    architecture = architectures.for_config(checkpoint.config)
    plans = architecture.plan(checkpoint.config)
    checkpoint.check(plans)
    return Prepared(
        source=source,
        name=name,
        checkpoint=checkpoint,
        architecture=architecture.NAME,
        plans=plans,
        hyper_parameters=architecture.metadata(checkpoint.config),
        vocabulary=vocabulary.read(source.checkpoint, checkpoint.config["vocab_size"]),
        parameters=sum(math.prod(plan.shape) for plan in plans),
        stored=_stored(checkpoint, plans),
    )


def _stored(checkpoint: Checkpoint, plans: list[TensorPlan]) -> str:
    """The type that holds every matrix without loss."""
    found = {checkpoint.tensors.dtype(plan.source) for plan in plans if plan.is_matrix and plan.source}
    return found.pop() if len(found) == 1 else "F32"
