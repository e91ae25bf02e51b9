"""The stock Trainer on a learnable toy task."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_ird import Calibration, IRDConfig
from tests.conftest import VOCABULARY, make_batch, make_model, task_type

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*", "ignore:.*no accelerator is found.*"
)


def toy_task(kind: str, count: int = 64) -> list[dict[str, torch.Tensor]]:
    """Classify by the first token; or count to four again and again."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (8,), generator=generator)
        if task_type(kind) == "SEQ_CLS":
            labels = (ids[0] > VOCABULARY // 2).long()
        else:
            ids = 3 + (ids[0] + torch.arange(8)) % 4
            labels = ids.clone()
        samples.append(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        )
    return samples


def adapted(kind: str, data, dtype=torch.float32) -> nn.Module:
    settings = IRDConfig(
        task_type=task_type(kind), density=0.05, num_samples=16, initial_density=0.2,
        calibration=Calibration(data),
    )  # fmt: skip
    return get_peft_model(make_model(kind).to(dtype), settings)


def arguments(folder, **options) -> TrainingArguments:
    options = {"max_steps": 30, "save_strategy": "no", "learning_rate": 2e-2, **options}
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        report_to="none",
        use_cpu=True,
        seed=0,
        logging_steps=5,
        disable_tqdm=True,
        **options,
    )


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16 base"])
def test_the_loss_falls(name, tmp_path, precision):
    data = toy_task(name)
    dtype = torch.bfloat16 if precision == "bf16 base" else torch.float32
    model = adapted(name, data, dtype)
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    options = arguments(tmp_path, bf16=precision == "bf16", max_steps=60)
    trainer = Trainer(model=model, args=options, train_dataset=data)
    trainer.train()
    found = losses(trainer)
    assert sum(found[-2:]) < 0.85 * sum(found[:2]), found
    frozen = dict(model.named_parameters())
    assert all(torch.equal(frozen[n], p) for n, p in before.items())
    values = [p for n, p in model.named_parameters() if "irdelta" in n]
    assert all(p.count_nonzero() > 0 for p in values)


def test_a_resumed_run_ends_at_the_same_weights(name, tmp_path):
    data = toy_task(name)

    def run(folder, resume=None, **options):
        model = adapted(name, data)
        args = arguments(
            folder, save_strategy="steps", save_steps=10, max_steps=20, **options
        )
        Trainer(model=model, args=args, train_dataset=data).train(
            resume_from_checkpoint=resume
        )
        return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    whole = run(tmp_path / "a")
    resumed = run(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-10"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)


def test_resuming_takes_the_entries_of_the_checkpoint(name, tmp_path):
    """Another seed selects other entries; the checkpoint's are the ones trained."""
    data = toy_task(name)
    options = {"task_type": task_type(name), "density": 0.03, "method": "random"}

    def run(folder, seed, resume=None):
        model = get_peft_model(make_model(name), IRDConfig(seed=seed, **options))
        args = arguments(folder, save_strategy="steps", save_steps=5, max_steps=10)
        Trainer(model=model, args=args, train_dataset=data).train(
            resume_from_checkpoint=resume
        )
        return model.eval()

    whole = run(tmp_path / "a", seed=0)
    resumed = run(tmp_path / "b", seed=1, resume=str(tmp_path / "a" / "checkpoint-5"))
    batch = make_batch(name)
    with torch.no_grad():
        assert torch.equal(whole(**batch).logits, resumed(**batch).logits)
    origins = [m.peft_config["default"].provenance for m in (whole, resumed)]
    assert origins[0]["seed"] == 0
    assert origins[1] is None  # seed 1 chose other entries than are in there


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    data = toy_task("bert")
    model = adapted("bert", data)
    args = arguments(
        tmp_path, max_steps=12, eval_strategy="steps", eval_steps=4,
        save_strategy="steps", save_steps=4, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    best = min(r["eval_loss"] for r in trainer.state.log_history if "eval_loss" in r)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)
