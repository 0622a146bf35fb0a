"""The help: every key from the bindings themselves, the modes, and the limits of use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

from rich.cells import cell_len
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalGroup, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from tui.consultation import Mode
from tui.engine.contract import ModelInfo
from tui.widgets.text import printable

MODE_MEANING = {
    Mode.QUOTE: "只摘录资料原句",
    Mode.GROUNDED: "依据资料自行表述，资料未支持的句子会标出",
    Mode.FREE: "不用资料，内容未经核对",
}
_LIMITS = (
    "回答由程序生成，只供基层医务人员参考，不能代替医生诊断、处方和急救。",
    "用药前核对年龄、体重、过敏史和药品说明书；未完成的回答不要用来用药。",
    "孩子出现危险信号时先转诊，不要等回答。",
    "全部内容只在这台电脑上处理，关闭程序后不保存。",
)


class HelpScreen(ModalScreen[None]):
    """Built from ``bindings``, so that it cannot disagree with the keys."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,f1,enter", "dismiss", "关闭")]

    def __init__(self, bindings: Iterable[BindingType], model: ModelInfo | None) -> None:
        """``model`` is None while it is loading."""
        super().__init__()
        self._keys = [item for item in bindings if isinstance(item, Binding) and item.description]
        self._model = model

    def compose(self) -> ComposeResult:
        """Keys, modes, limits, model."""
        with VerticalGroup(id="dialog"), VerticalScroll():
            yield Static("帮助  （Esc 关闭）", classes="help-title", markup=False)
            yield Static(_table(self._key_rows()), markup=False)
            yield Static("回答模式", classes="help-title", markup=False)
            yield Static(_table((mode.label, meaning) for mode, meaning in MODE_MEANING.items()), markup=False)
            yield Static("使用限制", classes="help-title", markup=False)
            yield Static("\n".join(_LIMITS), markup=False)
            yield Static("模型", classes="help-title", markup=False)
            yield Static(self._model_line(), markup=False)

    def _key_rows(self) -> Iterable[tuple[str, str]]:
        for item in self._keys:
            yield self.app.get_key_display(replace(item, key_display=None)), item.tooltip or item.description

    def _model_line(self) -> str:
        if (model := self._model) is None:
            return "还没有加载"
        parts = (model.architecture, model.quant, f"{model.size_bytes / 1e6:.0f} MB", *model.notes)
        return printable(f"{model.name}（{'，'.join(parts)}）")


def _table(rows: Iterable[tuple[str, str]]) -> Content:
    pairs = list(rows)
    width = max(cell_len(left) for left, _ in pairs)
    lines = [
        Content.assemble((left, "bold $primary"), " " * (width - cell_len(left) + 2), right) for left, right in pairs
    ]
    return Content("\n").join(lines)
