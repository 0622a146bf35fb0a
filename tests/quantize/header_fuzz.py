"""Small GGUF files written byte by byte, and damaged ones made of them. Run in a child by test_header.py.

`python header_fuzz.py COUNT FOLDER`: reads COUNT damaged files with quantize.header and quantize.usable, lets
nothing but Malformed pass, keeps some of those that were accepted as FOLDER/N.gguf, and prints figures as JSON.
"""

from __future__ import annotations

import json
import random
import re
import resource
import struct
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantize import header, usable

KEPT = 400
# More memory than the interpreter and numpy map at the start; a reader that believes a length field needs more.
MEMORY = 512 << 20
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Names, numbers and quotations of a message: what is left tells how many different checks refused something.
_PARTICULARS = re.compile(r"'.*'|\(.*\)|^.*(?= has the unknown type)|\S*[._\d\x00]\S*", re.DOTALL)
_U16, _U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 2, 4, 5, 6, 7, 8, 9
_HUGE = (0, 1, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 9, 2**64 - 1)


@dataclass
class Seed:
    """A file in pieces: metadata entries, tensor entries, data; lengths and types are where they say."""

    keys: list[bytes] = field(default_factory=list)
    tensors: list[bytes] = field(default_factory=list)
    data: bytes = b""
    lengths: list[tuple[str, int, int]] = field(default_factory=list)  # ("keys" or "tensors", entry, place in it)
    types: list[tuple[str, int, int]] = field(default_factory=list)
    version: int = 3

    def key(self, name: str, kind: int, value: Any) -> None:
        number = len(self.keys)
        entry = _text(name) + struct.pack("<I", kind)
        self.lengths.append(("keys", number, 0))
        self.types.append(("keys", number, len(entry) - 4))
        if kind != _ARRAY:
            if kind == _STRING:
                self.lengths.append(("keys", number, len(entry)))
            self.keys.append(entry + _value(kind, value))
            return
        item, items = value
        self.types.append(("keys", number, len(entry)))
        self.lengths.append(("keys", number, len(entry) + 4))
        if item == _STRING:
            self.lengths.append(("keys", number, len(entry) + 12))
        body = b"".join(_value(item, one) for one in items)
        self.keys.append(entry + struct.pack("<IQ", item, len(items)) + body)

    def tensor(self, name: str, *shape: int) -> None:
        """A float32 tensor of numpy shape `shape` with small numbers in it."""
        number, count = len(self.tensors), 1
        for size in shape:
            count *= size
        entry = _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        self.lengths += [
            ("tensors", number, 0),
            ("tensors", number, len(name) + 12),
            ("tensors", number, len(entry) + 4),
        ]
        self.types += [("tensors", number, len(name) + 8), ("tensors", number, len(entry))]
        self.tensors.append(entry + struct.pack("<IQ", 0, len(self.data)))
        values = struct.pack(f"<{count}f", *((n * 37 % 101 - 50) / 100 for n in range(count)))
        self.data += values.ljust(-(-len(values) // 32) * 32, b"\0")

    def bytes(self) -> bytes:
        """The whole file."""
        head = b"GGUF" + struct.pack("<IQQ", self.version, len(self.tensors), len(self.keys))
        head += b"".join(self.keys) + b"".join(self.tensors)
        return head.ljust(-(-len(head) // 32) * 32, b"\0") + self.data


def _text(text: str | bytes) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(kind: int, value: Any) -> bytes:
    if kind == _STRING:
        return _text(value)
    return struct.pack({_U16: "<H", _U32: "<I", _I32: "<i", _F32: "<f", _BOOL: "<?"}[kind], value)


def seed(architecture: str = "qwen3", tokenizer: str = "gpt2", version: int = 3) -> Seed:
    """A model of one layer that llama.cpp loads and runs."""
    made = Seed(version=version)
    width, heads, groups, inner = 8, 2, 1, 8
    key = 6 if architecture == "qwen3" else 4
    made.key("general.architecture", _STRING, architecture)
    made.key("general.name", _STRING, "种子")
    for name, value in {
        "block_count": 1, "context_length": 64, "embedding_length": width, "feed_forward_length": inner,
        "attention.head_count": heads, "attention.head_count_kv": groups, "attention.key_length": key,
        "attention.value_length": key, "rope.dimension_count": key,
    }.items():  # fmt: skip
        made.key(f"{architecture}.{name}", _U32, value)
    made.key(f"{architecture}.attention.layer_norm_rms_epsilon", _F32, 1e-5)
    made.key(f"{architecture}.rope.freq_base", _F32, 1e4)
    count = _vocabulary(made, tokenizer)
    made.key("pediatricsgpt.fidelity", _STRING, " " * 64)
    made.tensor("token_embd.weight", count, width)
    made.tensor("output_norm.weight", width)
    if architecture == "baichuan":
        made.tensor("output.weight", count, width)
    layer = {
        "attn_norm.weight": (width,), "attn_q.weight": (heads * key, width), "attn_k.weight": (groups * key, width),
        "attn_v.weight": (groups * key, width), "attn_output.weight": (width, heads * key), "ffn_norm.weight": (width,),
        "ffn_gate.weight": (inner, width), "ffn_up.weight": (inner, width), "ffn_down.weight": (width, inner),
    }  # fmt: skip
    if architecture == "qwen3":
        layer |= {"attn_q_norm.weight": (key,), "attn_k_norm.weight": (key,)}
    if architecture == "qwen2":
        layer |= {"attn_q.bias": (heads * key,), "attn_k.bias": (groups * key,), "attn_v.bias": (groups * key,)}
    for name, shape in layer.items():
        made.tensor(f"blk.0.{name}", *shape)
    return made


def _vocabulary(made: Seed, tokenizer: str) -> int:
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    types = [3, 3, 3]
    if tokenizer == "llama":
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "儿", "科"]
        types = [2, 3, 3, *[6] * 256, 1, 1, 1]
    else:
        tokens += ["a", "b", "ab", "Ċ", "Ġ", "åĦ", "¿", "åĦ¿"]
        types += [1] * 8
    made.key("tokenizer.ggml.model", _STRING, tokenizer)
    made.key("tokenizer.ggml.pre", _STRING, "qwen2" if tokenizer == "gpt2" else "default")
    made.key("tokenizer.ggml.tokens", _ARRAY, (_STRING, tokens))
    made.key("tokenizer.ggml.token_type", _ARRAY, (_I32, types))
    if tokenizer == "llama":
        made.key("tokenizer.ggml.scores", _ARRAY, (_F32, [-float(number) for number in range(len(tokens))]))
    else:
        made.key("tokenizer.ggml.merges", _ARRAY, (_STRING, ["a b", "åĦ ¿"]))
    made.key("tokenizer.ggml.bos_token_id", _U32, 1)
    made.key("tokenizer.ggml.eos_token_id", _U32, 2)
    made.key("tokenizer.ggml.add_bos_token", _BOOL, tokenizer == "llama")
    made.key("tokenizer.chat_template", _STRING, TEMPLATE)
    return len(tokens)


def seeds() -> list[Seed]:
    """One file of each architecture and kind of vocabulary."""
    return [seed(), seed("qwen2", version=2), seed("llama", "llama"), seed("baichuan", "llama"), seed("llama")]


class Damage:
    """Makes damaged files; the same ones for the same random numbers."""

    def __init__(self, made: list[Seed], number: int) -> None:
        self._random = random.Random(number)
        self._seeds, self._files = made, [one.bytes() for one in made]
        self._heads = [len(file) - len(one.data) for one, file in zip(made, self._files, strict=True)]

    def next(self) -> bytes:
        """One more damaged file."""
        which = self._random.randrange(len(self._seeds))
        return self._random.choice(
            (
                self._bits,
                self._bits,
                self._cut,
                self._length,
                self._length,
                self._type,
                self._last,
                self._entries,
                self._splice,
            )
        )(which)

    def _bits(self, which: int) -> bytes:
        file = bytearray(self._files[which])
        for _ in range(self._random.choice((1, 1, 2, 5, 20))):
            file[self._random.randrange(self._heads[which])] ^= 1 << self._random.randrange(8)
        return bytes(file)

    def _cut(self, which: int) -> bytes:
        return self._files[which][: self._random.randrange(len(self._files[which]))]

    def _length(self, which: int) -> bytes:
        value = self._random.choice((*_HUGE, self._random.randrange(300)))
        return self._changed(which, self._random.choice(self._seeds[which].lengths), struct.pack("<Q", value))

    def _type(self, which: int) -> bytes:
        value = self._random.choice((*range(42), 2**31, 2**32 - 1))
        return self._changed(which, self._random.choice(self._seeds[which].types), struct.pack("<I", value))

    def _last(self, which: int) -> bytes:
        """Another number at the end of a metadata entry."""
        value = self._random.choice((*range(12), 33, 2**16, 2**31, 2**32 - 1, 0x7F800000, 0x7FC00000, 0x3F800000))
        entry = self._random.randrange(len(self._seeds[which].keys))
        place = ("keys", entry, len(self._seeds[which].keys[entry]) - 4)
        return self._changed(which, place, struct.pack("<I", value))

    def _changed(self, which: int, place: tuple[str, int, int], value: bytes) -> bytes:
        part, entry, offset = place
        old = self._seeds[which]
        keys, tensors = list(old.keys), list(old.tensors)
        entries = keys if part == "keys" else tensors
        entries[entry] = entries[entry][:offset] + value + entries[entry][offset + len(value) :]
        return Seed(keys, tensors, old.data, version=old.version).bytes()

    def _entries(self, which: int) -> bytes:
        """An entry twice, left out, in another place, or from another file."""
        old, other = self._seeds[which], self._random.choice(self._seeds)
        keys, tensors = list(old.keys), list(old.tensors)
        for _ in range(self._random.choice((1, 1, 2))):
            entries, theirs = self._random.choice(((keys, other.keys), (tensors, other.tensors)))
            place = self._random.randrange(len(entries))
            action = self._random.randrange(4)
            if action == 0:
                entries.insert(self._random.randrange(len(entries)), entries[place])
            elif action == 1 and len(entries) > 1:
                del entries[place]
            elif action == 2:
                entries.insert(self._random.randrange(len(entries)), entries.pop(place))
            else:
                entries[place] = self._random.choice(theirs)
        return Seed(keys, tensors, old.data, version=old.version).bytes()

    def _splice(self, which: int) -> bytes:
        other = self._random.choice(self._files)
        middle = self._random.randrange(self._heads[which])
        return self._files[which][:middle] + other[self._random.randrange(len(other)) :]


def main(count: int, folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_mapped() + MEMORY,) * 2)
    damage = Damage(seeds(), 4)
    originals = {one.bytes() for one in seeds()}
    outcomes: Counter[str] = Counter()
    slowest, started = 0.0, time.process_time()
    for _ in range(count):
        file = damage.next()
        before = time.process_time()
        try:
            usable.check(header.parse(file, folder))
            if file not in originals:
                if outcomes["accepted"] < KEPT:
                    (folder / f"{outcomes['accepted']}.gguf").write_bytes(file)
                outcomes["accepted"] += 1
        except header.Malformed as error:
            outcomes[_PARTICULARS.sub("…", str(error))] += 1
        slowest = max(slowest, time.process_time() - before)
    seconds = time.process_time() - started
    accepted = outcomes.pop("accepted")
    print(json.dumps({"accepted": accepted, "reasons": len(outcomes), "slowest": slowest, "seconds": seconds}))


def _mapped() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
