"""How fast and how lean the export is, held against llama.cpp's own two steps.

    python scripts/llama_source.py && python benchmarks/export.py [--rounds 3] [--json]
    python benchmarks/export.py --shape 4b --quant Q8_0 --ours-only     (memory alone)

A checkpoint of random bfloat16 weights in the shape of Qwen3-0.6B (or 4B) with the real Qwen vocabulary is exported by
`pediatricsgpt quantize FOLDER --check quick` and by upstream: `convert_hf_to_gguf.py --outtype q8_0`, and for Q4_K_M
the bfloat16 conversion followed by `llama_model_quantize`, all on the same cores. Ours also checks, hashes and
documents what it wrote; upstream's result has not been opened once. Both sides run in turns, each time with the
checkpoint dropped from the page cache (posix_fadvise); intermediates stay in it on both sides. Memory is the peak of
the anonymous memory (RssAnon) of a process and its children together, sampled: what is mapped from files, the kernel
can drop at any time.
Ratios are medians of the rounds' paired ratios, of wall-clock time. Both sides' tensors must be equal to the byte. The
exit code is 1 when a goal is missed. Linux only; the 0.6B shape needs 5 GB of disk under --folder, the 4B shape 22 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from quantize import header, usable

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # scripts/ is not installed
from scripts import llama_source  # noqa: E402

VOCABULARY = 151_936
# hidden, layers, heads, key heads, head size, inner
SHAPES = {"0.6b": (1024, 28, 16, 8, 128, 3072), "4b": (2560, 36, 32, 8, 128, 9728)}
# Wall-clock time over upstream's; anonymous memory in GB by shape; seconds to check a header.
RATIOS = {"Q8_0": 0.4, "Q4_K_M": 0.85}
MEMORY_GB = {"0.6b": 0.5, "4b": 1.5}
HEADER_SECONDS = 0.2
_SAMPLE_SECONDS = 0.02
_UPSTREAM_QUANTIZE = """
import ctypes, sys, llama_cpp
llama_cpp.llama_backend_init()
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype, parameters.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, int(sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(parameters)))
"""
_UPSTREAM_HEADER = """
import sys, time
sys.path.insert(0, sys.argv[2])
from gguf import GGUFReader
start = time.perf_counter()
GGUFReader(sys.argv[1])
print(time.perf_counter() - start)
"""


@dataclass(frozen=True)
class Run:
    """What one side needed: seconds by the clock, seconds of the processor, peak anonymous memory in GB."""

    seconds: float
    cpu_seconds: float
    memory_gb: float

    def __add__(self, other: Run) -> Run:
        """Two steps one after the other."""
        return Run(
            self.seconds + other.seconds,
            self.cpu_seconds + other.cpu_seconds,
            max(self.memory_gb, other.memory_gb),
        )


@dataclass(frozen=True)
class Goal:
    """A measured figure and the limit it must stay below."""

    figure: str
    measured: float
    limit: float
    unit: str

    @property
    def held(self) -> bool:
        return self.measured <= self.limit


def make_checkpoint(folder: Path, shape: str, source: Path) -> None:
    """Writes config, tokenizer and one model.safetensors of bfloat16 weights with the spread of trained ones."""
    hidden, layers, heads, key_heads, head, inner = SHAPES[shape]
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": VOCABULARY, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": key_heads, "head_dim": head, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False,
        "use_sliding_window": False, "torch_dtype": "bfloat16", "eos_token_id": 151645, "bos_token_id": 151643,
    }  # fmt: skip
    folder.mkdir(parents=True)
    llama_source.qwen_tokenizer(source, folder)
    (folder / "config.json").write_text(json.dumps(config))
    layer = {
        "input_layernorm": (hidden,), "self_attn.q_proj": (heads * head, hidden),
        "self_attn.k_proj": (key_heads * head, hidden), "self_attn.v_proj": (key_heads * head, hidden),
        "self_attn.q_norm": (head,), "self_attn.k_norm": (head,), "self_attn.o_proj": (hidden, heads * head),
        "post_attention_layernorm": (hidden,), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (VOCABULARY, hidden), "model.norm.weight": (hidden,)} | {
        f"model.layers.{number}.{name}.weight": size for number in range(layers) for name, size in layer.items()
    }
    random = np.random.default_rng(0)
    # Drawn once and cut from a new place for every tensor: the encoders see the spread, nobody needs fresh numbers.
    pool = (random.standard_normal(1 << 24, dtype=np.float32) * 0.02).view(np.uint32)
    pool = (pool >> 16).astype(np.uint16)
    entries, offset = {}, 0
    for name, size in shapes.items():
        nbytes = 2 * int(np.prod(size))
        entries[name] = {"dtype": "BF16", "shape": size, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    head_text = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(head_text).to_bytes(8, "little") + head_text)
        for size in shapes.values():
            if len(size) == 1:  # norms
                file.write(np.full(size, 0x3F80, np.uint16).data)
                continue
            left = int(np.prod(size))
            while left:
                start = int(random.integers(0, pool.size // 2))
                count = min(left, pool.size - start)
                file.write(pool[start : start + count].data)
                left -= count
        file.flush()
        os.fsync(file.fileno())


class Bench:
    """Both sides of one shape, in a scratch folder."""

    def __init__(self, folder: Path, shape: str, source: Path, cores: list[int]) -> None:
        self._folder, self._source, self._cores = folder, source, cores
        self._checkpoint = folder / "checkpoint"
        make_checkpoint(self._checkpoint, shape, source)

    def ours(self, quant: str) -> tuple[Run, Path]:
        """The whole command."""
        output = self._folder / "ours"
        shutil.rmtree(output, ignore_errors=True)
        command = [sys.executable, str(ROOT / "pediatricsgpt.py"), "quantize", str(self._checkpoint), "--quant", quant]
        run = self._run([*command, "--check", "quick", "--output", str(output), "--name", "ours"])
        return run, output / f"ours-{quant}.gguf"

    def upstream(self, quant: str) -> tuple[Run, Path]:
        """The converter, and for a K-quant the quantizer."""
        converted, target = self._folder / "upstream-float.gguf", self._folder / "upstream.gguf"
        direct = quant == "Q8_0"
        command = [sys.executable, str(self._source / "convert_hf_to_gguf.py"), str(self._checkpoint)]
        kind = ["--outtype", "q8_0" if direct else "bf16", "--outfile", str(target if direct else converted)]
        run = self._run([*command, *kind])
        if not direct:
            script = [sys.executable, "-c", _UPSTREAM_QUANTIZE, str(converted), str(target), str(len(self._cores))]
            run += self._run(script, cold=False)
            converted.unlink()
        return run, target

    def headers(self, path: Path) -> dict[str, float]:
        """Seconds to read and check a header, by us and by upstream's reader."""
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            usable.check(header.read(path))
            seconds.append(time.perf_counter() - start)
        command = [sys.executable, "-c", _UPSTREAM_HEADER, str(path), str(self._source / "gguf-py")]
        reader = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return {"ours": median(seconds), "GGUFReader": float(reader)}

    def _run(self, command: list[str], cold: bool = True) -> Run:
        if cold:
            _drop_from_cache(self._checkpoint / "model.safetensors")
        log = self._folder / "log.txt"
        start = time.perf_counter()
        with log.open("w") as file:
            process = psutil.Popen(
                command, stdout=file, stderr=file, cwd=self._folder,
                preexec_fn=lambda: os.sched_setaffinity(0, self._cores),
            )  # fmt: skip
            peak, done = [0], threading.Event()
            watcher = threading.Thread(target=_watch, args=(process, peak, done))
            watcher.start()
            try:
                _, status, used = os.wait4(process.pid, 0)
            finally:
                done.set()
                watcher.join()
        seconds = time.perf_counter() - start
        if status:
            raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
        return Run(seconds, used.ru_utime + used.ru_stime, peak[0] / 1e9)


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two files hold the same tensors, byte for byte."""
    first, second = header.read(one), header.read(other)
    if first.tensors.keys() != second.tensors.keys():
        return False
    files = [np.memmap(path, np.uint8, "r") for path in (one, other)]
    for name, tensor in first.tensors.items():
        places = [(file, head.tensors[name].offset) for file, head in zip(files, (first, second), strict=True)]
        one_data, other_data = (file[offset : offset + tensor.nbytes] for file, offset in places)
        if second.tensors[name].kind != tensor.kind or not np.array_equal(one_data, other_data):
            return False
    return True


def _drop_from_cache(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def _watch(process: psutil.Popen, peak: list[int], done: threading.Event) -> None:
    while not done.wait(_SAMPLE_SECONDS):
        try:
            family = [process.pid, *(child.pid for child in process.children(recursive=True))]
        except psutil.NoSuchProcess:
            return
        peak[0] = max(peak[0], sum(map(_anonymous_bytes, family)))


def _anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    kilobytes = next((line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")), "0")
    return int(kilobytes) * 1024


def measure(bench: Bench, quants: list[str], rounds: int, ours_only: bool) -> dict[str, Any]:
    """All figures of one shape, by type; ratios only where both sides ran."""
    found: dict[str, Any] = {"rounds": rounds, "load_before": os.getloadavg(), "types": {}}
    sides = {"ours": bench.ours} if ours_only else {"upstream": bench.upstream, "ours": bench.ours}
    for quant in quants:
        runs: dict[str, list[Run]] = {side: [] for side in sides}
        for number in range(rounds):
            files = {}
            for side in list(sides)[:: 1 if number % 2 == 0 else -1]:
                run, files[side] = sides[side](quant)
                runs[side].append(run)
            if not ours_only and not same_tensors(files["upstream"], files["ours"]):
                raise SystemExit(f"{quant}: the two sides' tensors differ")
            found["headers"] = bench.headers(files["ours"])
            for path in files.values():
                path.unlink()
        found["types"][quant] = {side: [asdict(run) for run in each] for side, each in runs.items()}
        if not ours_only:
            paired = zip(runs["ours"], runs["upstream"], strict=True)
            found["types"][quant]["ratio"] = median(ours.seconds / upstream.seconds for ours, upstream in paired)
    return found | {"load_after": os.getloadavg()}


def goals(found: dict[str, Any], shape: str) -> list[Goal]:
    """What the figures are held against."""
    held = []
    for quant, figures in found["types"].items():
        if "ratio" in figures:
            held.append(Goal(f"{quant}, time over upstream's", figures["ratio"], RATIOS[quant], "×"))
        peak = max(run["memory_gb"] for run in figures["ours"])
        held.append(Goal(f"{quant}, anonymous memory", peak, MEMORY_GB[shape], " GB"))
    return [*held, Goal("header read and checked", found["headers"]["ours"], HEADER_SECONDS, " s")]


def show(found: dict[str, Any], held: list[Goal]) -> None:
    """Both tables."""
    table = Table("type", "side", "wall s", "CPU s", "anonymous GB")
    for quant, figures in found["types"].items():
        for side in ("upstream", "ours"):
            if runs := figures.get(side):
                middle = [median(run[key] for run in runs) for key in ("seconds", "cpu_seconds", "memory_gb")]
                table.add_row(quant, side, *(f"{figure:.2f}" for figure in middle))
    for side, seconds in found["headers"].items():
        table.add_row("header", side, f"{seconds:.3f}")
    against = Table("figure", "measured", "goal", "")
    for goal in held:
        values = (f"{goal.measured:.3g}{goal.unit}", f"≤ {goal.limit:.3g}{goal.unit}")
        against.add_row(goal.figure, *values, "held" if goal.held else "missed")
    console = Console()
    load = f"load {found['load_before'][0]:.1f} to {found['load_after'][0]:.1f}"
    console.print(f"Qwen3-{found['shape']} shape, {found['cores']} cores, {found['rounds']} rounds, {load}")
    console.print(table, against)


def main() -> int:
    """Prints the tables, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.6b")
    parser.add_argument("--quant", action="append", choices=RATIOS, help="repeatable (default: both)")
    parser.add_argument("--ours-only", action="store_true", help="leave upstream out: no ratios, memory alone")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cores", type=int, help="use only so many cores (default: all)")
    parser.add_argument("--folder", type=Path, help="where the scratch folder is made (default: the system's)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    source = llama_source.source_package()
    if source is None:
        print("The source package is missing; run `python scripts/llama_source.py` first.", file=sys.stderr)
        return 2
    cores = sorted(os.sched_getaffinity(0))[: arguments.cores]
    with tempfile.TemporaryDirectory(prefix="export-benchmark-", dir=arguments.folder) as folder:
        bench = Bench(Path(folder), arguments.shape, source, cores)
        found = measure(bench, arguments.quant or list(RATIOS), arguments.rounds, arguments.ours_only)
    found |= {"shape": arguments.shape, "cores": len(cores)}
    held = goals(found, arguments.shape)
    if arguments.json:
        print(json.dumps({**found, "goals": [{**asdict(goal), "held": goal.held} for goal in held]}))
    else:
        show(found, held)
    return 0 if all(goal.held for goal in held) else 1


if __name__ == "__main__":
    raise SystemExit(main())
