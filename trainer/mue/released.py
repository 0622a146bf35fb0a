"""Import of adapters that the paper's released code wrote, into the MUE format.

Released layout (src/llmtuner/model/peft/tuners/lora/layer.py of ydk122024/PediatricsGPT), per adapted module, with
E = `lora_nums` experts of which the first is the universal one:

    lora_moe_A  [E, in, r]     lora_moe_B  [E, r, out]     lora_route.weight  [E-1, in]     w_noise  [in, E-1]

The released `get_peft_model_state_dict` keeps a tensor only if its name holds "lora_" and the adapter's name, which
those of the router do not: adapters saved through it have lost their routers. Raw state dicts still have them.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from functools import reduce
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trainer.mue.config import MueConfig, MueError

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.(?P<part>lora_moe_A|lora_moe_B|lora_route|w_noise)(?:\.default|\.weight)?"
)
_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def import_released(source: Path, target: Path, *, uniform_gates: bool = False) -> None:
    """Converts the adapter folder `source` of the released code into the standard PEFT folder `target`.

    Outside training the imported layer computes what the released one computes without its noise. What the file
    says of noise is kept for further training, and is zero where the file has none; dropout is left out.

    Parameters:
        uniform_gates: a module without router weights gets a zero router, so that each of its N specific experts
            has the gate 1/N for every token; what its router had learnt is lost.

    Raises MueError, with cause and remedy, when `source` cannot be read, uses what MUE does not have, lacks
    routers (and `uniform_gates` is not given), or holds tensors that disagree; nothing is written then.
    """
    if target.exists():
        raise MueError(f"{target} exists already. Remove it or give another folder.")
    settings = _settings(source)
    modules = _modules(source)
    config = _config(settings, modules, source)
    tensors = {}
    for module, parts in modules.items():
        converted = _converted(module, parts, config, uniform_gates)
        tensors.update({f"base_model.model.{module}.{part}.weight": tensor for part, tensor in converted.items()})
    folder = target.with_name(target.name + ".part")
    shutil.rmtree(folder, ignore_errors=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / _FILES[0], metadata={"format": "pt"})
    folder.rename(target)


def _settings(source: Path) -> dict[str, Any]:
    """The released adapter_config.json, refused where it asks for what MUE does not have."""
    file = source / "adapter_config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MueError(f"{file} cannot be read ({error}). Give the folder that the released code saved.") from None
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise MueError(f"{file} is not of an adapter of the released code (peft_type LORA). Give its folder.")
    foreign = [key for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save") if settings.get(key)]
    if settings.get("bias", "none") != "none":
        foreign.append("bias")
    if foreign:
        raise MueError(
            f"{file} sets {', '.join(foreign)}, which MUE does not have, so the imported adapter would answer "
            "differently. Train it again without, or use it with the released code."
        )
    return settings


def _modules(source: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Released tensors by module and part; a frozen base that was saved along is passed over."""
    file = next((source / name for name in _FILES if (source / name).exists()), None)
    if file is None:
        raise MueError(f"{source} has neither {' nor '.join(_FILES)}. Give the folder that the released code saved.")
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True) if file.suffix == ".bin" else load_file(file)
    except UnpicklingError:  # torch's own message recommends to run what the file contains
        raise MueError(f"{file} is damaged or holds more than tensors. Copy or download it again.") from None
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        cause = str(error).partition("\n")[0]
        raise MueError(f"{file} cannot be read ({cause}). Copy or download it again.") from None
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items() if isinstance(tensors, dict) else ():
        if match := _KEY.fullmatch(key):
            if not torch.isfinite(tensor).all():
                raise MueError(f"{file}: {key} holds NaN or infinite numbers. Take another checkpoint.")
            modules.setdefault(match["module"], {})[match["part"]] = tensor
        elif ".lora_" in key:
            raise MueError(f"{file} holds {key}, which is not one of the released experts'; it is another method's.")
    if not modules:
        raise MueError(f"{file} holds no lora_moe_A: it is not an adapter of the released code. Give its folder.")
    return modules


def _config(settings: dict[str, Any], modules: dict[str, dict[str, torch.Tensor]], source: Path) -> MueConfig:
    try:
        r, experts, alpha = int(settings["r"]), int(settings["lora_nums"]), float(settings["lora_alpha"])
    except (KeyError, TypeError, ValueError):
        raise MueError(
            f"{source / 'adapter_config.json'} lacks r, lora_nums or lora_alpha. Copy it from the training run."
        ) from None
    return MueConfig(
        r=r,
        # Rank-stabilised LoRA divides by √r where MUE divides by r.
        alpha=alpha * math.sqrt(r) if settings.get("use_rslora") else alpha,
        num_specific=experts - 1,
        target_modules=settings.get("target_modules") or sorted({name.rpartition(".")[2] for name in modules}),
        layers_to_transform=settings.get("layers_to_transform"),
        layers_pattern=settings.get("layers_pattern"),
        task_type=settings.get("task_type"),
        base_model_name_or_path=settings.get("base_model_name_or_path"),
        inference_mode=True,
    )


def _converted(
    module: str, parts: dict[str, torch.Tensor], config: MueConfig, uniform_gates: bool
) -> dict[str, torch.Tensor]:
    """One module's tensors in our layout, all of the widest dtype among them."""
    for part in ("lora_moe_A", "lora_moe_B"):
        if part not in parts:
            raise MueError(f"{module} lacks {part}: the file is incomplete. Copy or download it again.")
    a, b = parts["lora_moe_A"], parts["lora_moe_B"]
    experts = 1 + config.num_specific
    inputs, outputs = (a.shape[1], b.shape[2]) if a.dim() == b.dim() == 3 else (0, 0)
    if "lora_route" not in parts and not uniform_gates:
        raise MueError(
            f"{module} has no router weights (lora_route): the released code leaves them out of its adapter files. "
            "Take the raw state dict of that training run (pytorch_model.bin), renamed to adapter_model.bin, or "
            "import with uniform gates: every specific expert then weighs the same for every token."
        )
    route = parts.get("lora_route", a.new_zeros(config.num_specific, inputs))
    noise = parts.get("w_noise", a.new_zeros(inputs, config.num_specific))
    wanted = {
        "lora_moe_A": (a, (experts, inputs, config.r)),
        "lora_moe_B": (b, (experts, config.r, outputs)),
        "lora_route": (route, (config.num_specific, inputs)),
        "w_noise": (noise, (inputs, config.num_specific)),
    }
    for part, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise MueError(
                f"{module}: {part} has the shape {list(tensor.shape)}, but r={config.r} and {experts} experts make it "
                f"{list(shape)}. adapter_config.json (r, lora_nums) is of another adapter than the tensors; "
                "take both from one folder."
            )
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor, _ in wanted.values()))
    rank = experts * config.r
    layout = {
        "mue_A": a.transpose(1, 2).reshape(rank, inputs),
        "mue_B": b.reshape(rank, outputs).T,
        "mue_route": route,
        "mue_noise": noise.T,
    }
    return {name: tensor.to(dtype).contiguous() for name, tensor in layout.items()}
