"""The front door: help that teaches, one clear sentence for what is wrong, extras named when they are missing."""

from __future__ import annotations

import sys

import pytest

import pediatricsgpt


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert pediatricsgpt.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in pediatricsgpt.COMMANDS)
    assert "demonstration" in text


@pytest.mark.parametrize("command", sorted(pediatricsgpt.COMMANDS))
def test_every_command_explains_itself_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = pediatricsgpt.main([command, "--help"])
    except SystemExit as left:
        code = left.code
    assert code == 0
    text = capsys.readouterr().out
    assert f"usage: pediatricsgpt {command}" in text
    assert "example" in text


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert pediatricsgpt.main(["trian"]) == 2
    assert "no command 'trian'" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # What the import system says when the train extra is not installed.
    monkeypatch.setitem(sys.modules, "trainer.cli", None)
    monkeypatch.delitem(sys.modules, "pydantic", raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Without("trainer.cli", "pydantic"), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "trainer.cli")
    assert pediatricsgpt.main(["train", "x.yaml"]) == 2
    message = capsys.readouterr().err
    assert "needs pydantic" in message
    assert "pip install 'pediatricsgpt[train]'" in message


class _Without:
    """An import finder for which `module` fails because `needs` is not installed."""

    def __init__(self, module: str, needs: str) -> None:
        self.module, self.needs = module, needs

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name == self.module:
            raise ModuleNotFoundError(f"No module named {self.needs!r}", name=self.needs)
