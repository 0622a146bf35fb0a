"""Render the real app to docs/screenshot.svg and docs/screenshot.png.

    python docs/make_screenshot.py [--size 120x36] [--question TEXT] [--model FILE.gguf]

Asks one question of the embedded model (or --model) in the app itself, without a terminal. The PNG needs
`rsvg-convert` and a Chinese font (Debian: apt-get install librsvg2-bin fonts-noto-cjk); without it only the
SVG is written.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import shutil
import subprocess
import sys
from html import escape, unescape
from pathlib import Path

from rich.cells import cell_len

sys.path.insert(0, str(Path(__file__).parent.parent))

from tui.app import ConsultationApp
from tui.consultation import Task
from tui.screens.opening import ModelOpener, Opener

QUESTION = "我家孩子两岁半，手心脚心起红点，嘴疼不肯吃饭，是手足口病吗？在家怎么护理？"
FONTS = "'DejaVu Sans Mono', Menlo, Consolas, 'Noto Sans Mono CJK SC', 'PingFang SC', monospace"
CELL = 12.2  # width of one cell in the coordinates of Textual's SVG


def terminal_svg(svg: str) -> str:
    """Give every character its place in the grid of cells and take out the fonts fetched from the network.

    SVG viewers without `textLength` would otherwise let Chinese and Latin drift apart.
    """

    def in_cells(match: re.Match[str]) -> str:
        head, start, tail, text = (
            match.group(1),
            float(match.group(2)),
            match.group(3),
            unescape(match.group(4)),
        )
        parts: list[str] = []
        cells = 0
        for run in re.findall(r"[\x20-\x7e\xa0]+|.", unescape(text)):
            word, blank = run.lstrip(), len(run) - len(run.lstrip())
            if word:
                at = start + (cells + blank) * CELL
                parts.append(f'<tspan x="{at:.1f}" font-size="{_size(word)}">{escape(word.rstrip())}</tspan>')
            cells += cell_len(run)
        return f"<text{head}{tail}>{''.join(parts)}</text>"

    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.S)
    svg = svg.replace("font-variant-east-asian: full-width;", "").replace("Fira Code, monospace", FONTS)
    svg = re.sub(r' textLength="[^"]*"', "", svg)
    return re.sub(r'<text( [^>]*?) x="([\d.]+)"([^>]*)>([^<]*)</text>', in_cells, svg)


def _size(run: str) -> int:
    if cell_len(run) == 2 * len(run):
        return 23  # a Chinese character fills its two cells
    return 14 if run in "℃℉" else 20  # Chinese fonts draw these two cells wide


async def capture(opener: Opener, size: tuple[int, int], question: str, *, seconds: float = 300) -> str:
    """Ask `question` in the app and return its screen as SVG; raises TimeoutError after ``seconds``."""
    app = ConsultationApp(opener, task=Task.KNOWLEDGE)
    async with app.run_test(size=size) as pilot:
        screen = app.consultation_screen
        async with asyncio.timeout(seconds):
            while screen.opened is None:
                if screen.load_failed:
                    raise RuntimeError("the model could not be opened")
                await pilot.pause(0.05)
            screen.ask(question)
            while screen.running is not None:
                await pilot.pause(0.05)
        await pilot.pause(0.2)
        return terminal_svg(app.export_screenshot(title="儿科助手", simplify=True))


def write(svg: str, path: Path) -> None:
    """Write ``path`` (SVG) and, where a converter is installed, the PNG beside it."""
    path.write_text(svg, encoding="utf-8")
    if converter := shutil.which("rsvg-convert"):
        subprocess.run([converter, "-o", str(path.with_suffix(".png")), str(path)], check=True)
    else:
        print("rsvg-convert is not installed: no PNG written", file=sys.stderr)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="120x36", help="columns x rows (default 120x36)")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "screenshot.svg")
    options = parser.parse_args()
    columns, rows = (int(part) for part in options.size.split("x"))
    opener = ModelOpener(options.model, Task.KNOWLEDGE, None)
    write(asyncio.run(capture(opener, (columns, rows), options.question)), options.out)


if __name__ == "__main__":
    main()
