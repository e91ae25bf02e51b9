"""The command line: what it prints, writes and refuses."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from peft_ird import IRDConfig, search, select_parameters
from peft_ird.__main__ import main
from tests.conftest import bert_config, make_batch, make_model, make_samples, task_type


def make_adapter(folder, model, base, kind="SEQ_CLS", **options):
    model.save_pretrained(base)
    model = type(model).from_pretrained(base)
    options = {"density": 0.01, "num_samples": 4, "method": "random", **options}
    adapted = get_peft_model(model, IRDConfig(task_type=kind, **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "irdelta" in name:
                parameter.normal_()
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.fixture
def result(tmp_path):
    settings = IRDConfig(
        task_type="SEQ_CLS", density=0.02, schedule=[(8, 0.1), (4, 0.1), (4, 0.02)]
    )
    scores = iter([0.5, 0.75, 0.25])
    return search(
        lambda: make_model("bert"), settings, make_samples("bert"),
        lambda _: next(scores), tmp_path / "search",
    )  # fmt: skip


def test_inspect_a_selection(tmp_path, capsys):
    selection = select_parameters(
        make_model("bert"), IRDConfig(method="random", density=0.01)
    )
    selection.save(tmp_path / "a.safetensors")
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 0
    assert capsys.readouterr().out == selection.summary() + "\n"


def test_inspect_an_adapter(tmp_path, capsys):
    model = make_adapter(tmp_path / "a", make_model("bert"), tmp_path / "base")
    config = model.peft_config["default"]
    assert main(["inspect", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    total = sum(sum(named.values()) for named in config.nnz_pattern.values())
    assert (
        f"entries: {total:,} (1.01 % of {config.provenance['num_candidates']:,})" in out
    )
    assert "format version: 3" in out
    assert '"method": "random"' in out
    assert f"base model: {tmp_path / 'base'}" in out
    for module, named in config.nnz_pattern.items():
        for name, count in named.items():
            row = next(r for r in out.splitlines() if r.split()[:2] == [module, name])
            assert row.split()[2] == f"{count:,}"


def test_inspect_a_search(result, capsys):
    assert main(["inspect", str(result.output_dir)]) == 0
    out = capsys.readouterr().out
    assert "3 of 3 cells scored" in out
    assert result.table() in out


def test_plot_a_search(result, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder, picture = str(result.output_dir), tmp_path / "a.png"
    assert (
        main(["plot", folder, "--counterpart", folder, "--output", str(picture)]) == 0
    )
    assert picture.stat().st_size > 0
    assert main(["plot", folder]) == 0
    assert (result.output_dir / "search.png").stat().st_size > 0
    assert capsys.readouterr().out.split() == [
        str(picture), str(result.output_dir / "search.png"),
    ]  # fmt: skip


def test_plot_a_selection(result, capsys):
    pytest.importorskip("matplotlib")
    file = result.output_dir / "cell-01" / "selection.safetensors"
    assert main(["plot", str(file)]) == 0
    assert file.with_suffix(".png").stat().st_size > 0
    assert main(["plot", str(file), "--counterpart", str(file)]) == 1
    assert "compares two searches" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_merge(kind, tmp_path, capsys):
    task = task_type(kind)
    model = make_adapter(tmp_path / "a", make_model(kind), tmp_path / "base", task)
    assert main(["merge", str(tmp_path / "a"), str(tmp_path / "merged")]) == 0
    assert "without a tokenizer" in capsys.readouterr().out
    auto = (
        AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    )
    merged = auto.from_pretrained(tmp_path / "merged").eval()
    batch = make_batch(kind)
    with torch.no_grad():
        assert torch.equal(merged(**batch).logits, model(**batch).logits)


def test_merge_in_another_dtype(tmp_path, capsys):
    model = make_model("llama").bfloat16()
    make_adapter(tmp_path / "a", model, tmp_path / "base", task_type("llama"))
    for folder, options in (("low", []), ("high", ["--dtype", "float32"])):
        path = tmp_path / folder
        assert main(["merge", str(tmp_path / "a"), str(path), *options]) == 0
    found = [
        AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype="auto").dtype
        for folder in ("low", "high")
    ]
    assert found == [torch.bfloat16, torch.float32]
    capsys.readouterr()
    wrong = ["merge", str(tmp_path / "a"), str(tmp_path / "c"), "--dtype", "rand"]
    assert main(wrong) == 1
    assert "`--dtype` must be 'auto'" in capsys.readouterr().err


def test_merge_a_classifier_with_labels_of_its_own(tmp_path):
    """The base knows two labels, the adapter's head has five."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(bert_config(num_labels=5))
    adapted = make_adapter(tmp_path / "a", model, tmp_path / "base")
    two = BertForSequenceClassification(bert_config())
    two.bert.load_state_dict(model.bert.state_dict())
    two.save_pretrained(tmp_path / "base")
    assert main(["merge", str(tmp_path / "a"), str(tmp_path / "merged")]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    batch = make_batch("bert")
    with torch.no_grad():
        expected = adapted(**batch).logits
        assert expected.shape == (3, 5)
        assert torch.equal(merged.eval()(**batch).logits, expected)


def test_labels_are_not_counted_in_entries(tmp_path):
    """Without a task the head is no head: it has entries like any module."""
    model = make_adapter(
        tmp_path / "a", make_model("bert"), tmp_path / "base", None, density=0.5
    )
    assert main(["merge", str(tmp_path / "a"), str(tmp_path / "merged")]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    batch = make_batch("bert")
    with torch.no_grad():
        assert torch.equal(merged.eval()(**batch).logits, model(**batch).logits)


def test_the_number_of_labels_can_be_given(tmp_path, capsys):
    """A head by another name than those that are known."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24}
    model = XLNetForSequenceClassification(XLNetConfig(**sizes, num_labels=5))
    heads = ["logits_proj", "sequence_summary"]
    adapted = make_adapter(
        tmp_path / "a", model, tmp_path / "base", "SEQ_CLS", modules_to_save=heads
    )
    two = XLNetForSequenceClassification(XLNetConfig(**sizes))
    two.transformer.load_state_dict(model.transformer.state_dict())
    two.save_pretrained(tmp_path / "base")
    command = ["merge", str(tmp_path / "a"), str(tmp_path / "merged")]
    assert main(command) == 1
    assert main([*command, "--num-labels", "7"]) == 1
    assert "no head in" in capsys.readouterr().err
    assert main([*command, "--num-labels", "5"]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    batch = make_batch("bert")
    with torch.no_grad():
        assert torch.equal(merged.eval()(**batch).logits, adapted(**batch).logits)


def test_merge_brings_the_tokenizer_along(tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, "a"))
    make_adapter(tmp_path / "a", make_model("bert"), tmp_path / "base")
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "base")
    assert main(["merge", str(tmp_path / "a"), str(tmp_path / "merged")]) == 0
    assert "with its tokenizer" in capsys.readouterr().out
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "merged")
    assert again.get_vocab() == {"a": 0, "b": 1}


def test_nothing_is_merged_over_what_is_there(tmp_path, capsys):
    make_adapter(tmp_path / "a", make_model("bert"), tmp_path / "base")
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    for there in ("a", "base", "base/model.safetensors"):
        assert main(["merge", str(tmp_path / "a"), str(tmp_path / there)]) == 1
        assert "is not empty. Name a new folder" in capsys.readouterr().err
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before
    (tmp_path / "new").mkdir()
    assert main(["merge", str(tmp_path / "a"), str(tmp_path / "new")]) == 0


def test_an_adapter_without_a_base_model_is_not_merged(tmp_path, capsys):
    settings = IRDConfig(method="random", density=0.01)
    get_peft_model(make_model("bert"), settings).save_pretrained(tmp_path / "a")
    assert main(["merge", str(tmp_path / "a"), str(tmp_path / "merged")]) == 1
    assert "names no base model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "{}"], "is no adapter"),
        (["inspect", "{}/none"], "is no adapter"),
        (["inspect", "{}/broken"], "cannot be read"),
        (["inspect", "{}/lora"], "of type LORA, not IRD"),
        (["merge", "{}/lora", "{}/merged"], "of type LORA, not IRD"),
        (["plot", "{}"], "holds no search"),
        (["plot", "{}/none"], "none"),
        (["merge", "{}/none", "{}/merged"], "none"),
    ],
)
def test_errors_are_told_in_a_line(arguments, message, tmp_path, capsys):
    (tmp_path / "broken").write_bytes(b"what")
    get_peft_model(
        make_model("bert"), LoraConfig(target_modules=["query"])
    ).save_pretrained(tmp_path / "lora")
    assert main([part.format(tmp_path) for part in arguments]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert not printed.out
    assert not (tmp_path / "merged").exists()


def test_a_wrong_command_is_told_by_the_exit_code():
    with pytest.raises(SystemExit) as error:
        main(["fly"])
    assert error.value.code == 2


@pytest.mark.slow
def test_the_module_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "peft_ird", "inspect", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
