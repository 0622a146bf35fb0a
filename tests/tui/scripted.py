"""A consultation that replays written events, for tests of the app alone. No model, no library."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from textual.app import App
from textual.pilot import Pilot

from tui.app import ConsultationApp
from tui.consultation import (
    Answer,
    Delta,
    Event,
    Finished,
    Found,
    Mode,
    Passage,
    Reading,
    Source,
    StopReason,
    Task,
)
from tui.engine.contract import ModelInfo, Prompts
from tui.screens.opening import Opened
from tui.widgets.composer import Composer
from tui.widgets.hint import HintLine

SOURCE = Source(key="a-2018", title="手足口病诊疗指南", edition="2018", organisation="国家卫生健康委员会")
SENTENCES = (
    "手足口病的孩子在家要多喝水，吃温凉软烂的食物，每6～8小时量一次体温。",
    "家里人接触孩子后用肥皂和流动水洗手，餐具和玩具煮沸消毒15分钟。",
)


def passage(number: int = 1, *, title: str = "手足口病", section: str = "家庭护理") -> Passage:
    """A passage with two sentences, one source and three danger signs."""
    return Passage(
        number=number,
        card_id=f"card-{number}",
        title=title,
        section=section,
        sentences=SENTENCES,
        sources=(SOURCE,),
        red_flags=("持续高热不退", "精神差或嗜睡", "肢体抖动"),
        score=1.0 / number,
    )


PASSAGES = (passage(1), passage(2, title="发热", section="处理"), passage(3, title="口炎", section="表现"))
TEXT = f"您先别着急。\n根据手足口病·家庭护理[1]：\n{SENTENCES[0]}\n{SENTENCES[1]}\n"


@dataclass
class Script:
    """What one turn replays. `hold` keeps the answer open after `text` until it is set or stopped."""

    text: str = TEXT
    passages: tuple[Passage, ...] = PASSAGES
    cited: tuple[int, ...] = (1,)
    stop_reason: StopReason = "eos"
    error: str | None = None
    unsupported: tuple[str, ...] = ()
    refused: bool = False
    raises: Exception | None = None
    piece: int = 4  # characters per delta
    hold: threading.Event | None = None


@dataclass
class ScriptedConsultation:
    """Behaves like tui.consultation.Consultation: `stop` ends the turn, the last event is Finished."""

    scripts: list[Script] = field(default_factory=lambda: [Script()])
    task: Task = Task.KNOWLEDGE
    mode: Mode = Mode.QUOTE
    asked: list[tuple[str, Task, Mode]] = field(default_factory=list)
    resets: int = 0
    _stopped: threading.Event = field(default_factory=threading.Event)

    def ask(self, question: str) -> Iterator[Event]:
        script = self.scripts[min(len(self.asked), len(self.scripts) - 1)]
        self.asked.append((question, self.task, self.mode))
        self._stopped.clear()
        yield Found(script.passages)
        yield Reading(64, 128)
        yield Reading(128, 128)
        for start in range(0, len(script.text), script.piece):
            yield Delta(script.text[start : start + script.piece])
        while script.hold is not None and not script.hold.wait(0.005) and not self._stopped.is_set():
            pass
        if script.raises is not None:
            raise script.raises
        reason: StopReason = "stopped" if self._stopped.is_set() else script.stop_reason
        yield Finished(
            Answer(
                text=script.text, mode=self.mode, task=self.task, passages=script.passages,
                cited=script.cited, refused=script.refused, stop_reason=reason, error=script.error, tokens=62,
                prompt_tokens=128, reused_tokens=0, seconds=2.4, first_token_seconds=0.8,
                unsupported=script.unsupported,
            )
        )  # fmt: skip

    def stop(self) -> None:
        self._stopped.set()

    def reset(self) -> None:
        self.resets += 1


@dataclass
class ScriptedOpener:
    """Opens `consultation` at once, after `gate` is set, or fails with each of `failures` first."""

    consultation: ScriptedConsultation = field(default_factory=ScriptedConsultation)
    demonstration: bool = True
    failures: list[Exception] = field(default_factory=list)
    gate: threading.Event | None = None
    closed: bool = False

    def open(self) -> Opened:
        while self.gate is not None and not self.gate.wait(0.005) and not self.closed:
            pass
        if self.failures:
            raise self.failures.pop(0)
        model = ModelInfo(
            name="ped-demo", architecture="qwen3", size_bytes=24_000_000, parameters=20_000_000, context=2048,
            quant="Q8_0", demonstration=self.demonstration, prompts=Prompts.builtin(), foreign=False,
        )  # fmt: skip
        return Opened(cast("Any", self.consultation), model)

    def close(self) -> None:
        self.closed = True


async def until(predicate: Callable[[], object], *, seconds: float = 20.0) -> None:
    """Let the app work until ``predicate`` holds; fail with its source line otherwise."""
    deadline = time.monotonic() + seconds
    while not predicate():
        assert time.monotonic() < deadline, "the app did not reach the expected state"
        await asyncio.sleep(0.01)


def screen_text(app: App[None]) -> list[str]:
    """What the terminal shows, one string per row."""
    strips = app.screen._compositor.render_strips()
    return ["".join(segment.text for segment in strip) for strip in strips]


def app_of(*scripts: Script, mode: Mode | None = None, **options: Any) -> tuple[ConsultationApp, ScriptedOpener]:
    """An app over scripted turns in `mode` (None: quote); ``options`` go to the opener."""
    opener = ScriptedOpener(ScriptedConsultation(list(scripts) or [Script()], mode=mode or Mode.QUOTE), **options)
    return ConsultationApp(opener, mode=mode), opener


def shown(app: App[None]) -> str:
    """The whole screen without blanks and line ends, so that alignment does not matter."""
    return "".join("".join(row.split()) for row in screen_text(app))


def hint(app: ConsultationApp) -> str:
    """What the line above the composer says."""
    return app.consultation_screen.query_one(HintLine).text


async def send(pilot: Pilot[None], text: str) -> None:
    """Type ``text`` at once and press Enter."""
    pilot.app.screen.query_one(Composer).insert(text)
    await pilot.press("enter")
