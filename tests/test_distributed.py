"""Several processes select what one does."""

import itertools

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from peft_ird import Calibration, IRDConfig, select_parameters
from peft_ird.selection.gradients import ordered
from peft_ird.selection.gradients.ranks import Ranks
from peft_ird.selection.gradients.statistics import Scores
from tests.conftest import make_model, make_samples, task_type

SETTINGS = {
    "ird": {"density": 0.01, "num_samples": 13, "initial_density": 0.1},
    "reverse_ird": {"density": 0.01, "num_samples": 13, "initial_density": 0.1},
    "fish": {"budget": 60, "num_samples": 13, "scope": "per_module"},
    "gradient": {"budget": 60, "num_samples": 9},
}
OPTIONS = {
    "warm": {"head_warmup_steps": 2, "scope": "balanced", "sample_scaling": "loss"},
    "drawn": {"temperature": 2.0},
    "pooled": {"num_ranked_samples": 17, "num_samples": 6, "trim_samples": 0.2},
}
DIFFERING = (
    "seed",
    "scope",
    "candidate parameters",
    "batch_size",
    "number of samples",
    "samples in the same order",
)


def facts(selection):
    return {
        "indices": {
            m: {n: t.tolist() for n, t in parameters.items()}
            for m, parameters in selection.indices.items()
        },
        "scores": {
            m: {n: t.tolist() for n, t in parameters.items()}
            for m, parameters in selection.scores.items()
        },
        "samples": selection.samples,
        "sample_scores": selection.sample_scores.tolist(),
    }


def selections():
    """What is selected with each method and option, in float32."""
    torch.set_num_threads(1)
    found = {}
    for kind, size in itertools.product(("bert", "llama", "t5"), (None, 2)):
        data = Calibration(make_samples(kind, 17), batch_size=size)
        for method, settings in SETTINGS.items():
            config = IRDConfig(task_type=task_type(kind), method=method, **settings)
            found[kind, size, method] = facts(
                select_parameters(make_model(kind), config, data)
            )
    data = Calibration(make_samples("bert", 17))
    for name, options in OPTIONS.items():
        settings = {**SETTINGS["ird"], **options}
        config = IRDConfig(task_type="SEQ_CLS", **settings)
        found["bert", name] = facts(select_parameters(make_model("bert"), config, data))
    return found | in_small_pieces() | one_by_one()


def in_small_pieces():
    """What is selected in groups of parameters, with a part of the gradients kept."""
    found = {}
    data = Calibration(make_samples("bert", 17), batch_size=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ordered, "_TOGETHER_BYTES", 4096)
        patch.setattr(ordered, "_SLICE_BYTES", 100)
        patch.setattr(ordered, "_TABLE_BYTES", 2000)
        for (method, settings), entries in itertools.product(SETTINGS.items(), (4, 40)):
            model = make_model("bert")
            largest = model.bert.embeddings.word_embeddings.weight.nbytes
            config = IRDConfig(
                task_type="SEQ_CLS",
                method=method,
                memory_limit=entries * largest,
                **settings,
            )
            selection = select_parameters(model, config, data)
            found["bert", entries, method] = facts(selection)
    return found


class Recurrent(nn.Module):
    """Most of its parameters are taken one sample at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 6)
        self.body = nn.LSTM(6, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, ids):
        return self.head(self.body(self.tokens(ids))[0].mean(1))


def one_by_one():
    torch.manual_seed(0)
    rows = [(ids, ids.sum() % 3) for ids in torch.randint(20, (11, 5))]

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    data = Calibration(rows, loss=loss, batch_size=2)
    config = IRDConfig(density=0.05, num_samples=11, initial_density=0.2)
    return {"one by one": facts(select_parameters(Recurrent(), config, data))}


def late_error(rank):
    """What a process says to an error in its second batch of a pass."""
    calls = []

    def loss(model, batch):
        calls.append(len(batch["input_ids"]))
        if rank == 1 and calls.count(2) > 4:
            raise RuntimeError("out of memory")
        return model(**batch).loss

    data = Calibration(make_samples("bert", 40), loss=loss, batch_size=2)
    config = IRDConfig(task_type="SEQ_CLS", method="fish", density=0.1, num_samples=40)
    with pytest.raises((RuntimeError, ValueError), match="out of mem") as caught:
        select_parameters(make_model("bert"), config, data)
    return str(caught.value)


def errors(rank):
    """What a process says to a bad sample that only one of them looks at."""

    def loss(model, batch):
        value = model(**batch).loss
        is_mine = batch["input_ids"].shape[0] == 1 and rank == 1
        return value * float("nan") if is_mine else value

    data = Calibration(make_samples("bert", 12), loss=loss, batch_size=1)
    config = IRDConfig(task_type="SEQ_CLS", density=0.1, num_samples=12)
    with pytest.raises(ValueError, match="loss of calibration sample") as caught:
        select_parameters(make_model("bert"), config, data)
    return str(caught.value)


def differences(rank):
    """What a process says where it was asked for something else than the first."""
    settings = {"task_type": "SEQ_CLS", "density": 0.1, "num_samples": 12}
    samples = make_samples("bert", 12)
    reordered = samples[::-1] if rank else samples
    modules = ["key", "value"] if rank else ["query", "value"]
    return [
        difference(IRDConfig(**settings, **options), data)
        for options, data in [
            ({"seed": rank}, samples),
            ({"scope": "balanced" if rank else "global"}, samples),
            ({"target_modules": modules}, samples),
            ({}, Calibration(samples, batch_size=1 + rank)),
            ({}, make_samples("bert", 13 if rank else 12)),
            ({}, reordered),
        ]
    ]


def difference(config, data):
    with pytest.raises(ValueError, match="must select with the same") as caught:
        select_parameters(make_model("bert"), config, data)
    return str(caught.value)


def overflowing():
    """Select in float16 with a loss that overflows when it is scaled."""

    def loss(model, batch):
        return 3e3 * model(**batch).loss.float()

    config = IRDConfig(task_type="SEQ_CLS", density=0.02, num_samples=12)
    data = Calibration(make_samples("bert", 12), loss=loss)
    selection = select_parameters(make_model("bert").half(), config, data)
    return facts(selection)


def replayed(rank):
    """What a process says to an error of one of them over gradients that are kept."""

    def fail(*_):
        raise RuntimeError("out of memory")

    config = IRDConfig(task_type="SEQ_CLS", density=0.02, num_samples=12)
    data = Calibration(make_samples("bert", 12), batch_size=2)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(Scores, "update", fail)
        with pytest.raises((RuntimeError, ValueError), match="out of mem") as caught:
            select_parameters(make_model("bert"), config, data)
    return str(caught.value)


def work():
    rank = dist.get_rank()
    heard = errors(rank), replayed(rank), late_error(rank)
    return selections(), heard, differences(rank), overflowing()


@pytest.fixture(scope="module")
def alone():
    return selections()


@pytest.mark.parametrize("size", [2, 4])
def test_every_process_selects_what_one_does_and_hears_of_errors(
    size, alone, in_processes
):
    everything = in_processes(size, work)
    first = everything[0]
    for found, caught, unequal, in_half in everything:
        assert in_half == first[3]
        assert found == alone
        assert "calibration sample" in caught[0]
        assert "out of memory" in caught[1]
        assert "out of memory" in caught[2]
        for message, fact in zip(unequal, DIFFERING, strict=True):
            assert f"the same {fact}, but rank" in message


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_work_is_dealt_out_once_and_in_order(size):
    ranks = [Ranks() for _ in range(size)]
    for rank, each in enumerate(ranks):
        each.rank, each.size = rank, size
    work = list(range(23))
    dealt = [list(each.rounds(work)) for each in ranks]
    assert len({len(each) for each in dealt}) == 1  # none waits for another
    rounds = list(zip(*dealt, strict=True))
    pieces = [own for one in rounds for _, own in one]
    assert pieces[:23] == work
    assert set(pieces[23:]) <= {None}
    for one in rounds:
        every = [own for _, own in one if own is not None]
        assert all(list(of_all) == every for of_all, _ in one)


@pytest.fixture
def mesh():
    """Two devices, of which only this one is there."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def test_sharded_weights_are_neither_chosen_from_nor_merged_into(mesh):
    config = IRDConfig(density=0.3, method="random", init_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), config)
    first, last = model.base_model.model
    before = first.base_layer.weight.clone()
    base = last.get_base_layer()
    base.weight = nn.Parameter(distribute_tensor(base.weight.detach(), mesh))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"'1\.weight' is sharded"):
            merge()
        assert torch.equal(first.base_layer.weight, before)
        assert not first.merged
    with pytest.raises(ValueError, match=r"'1\.weight' is sharded"):
        select_parameters(nn.Sequential(nn.Linear(4, 4), base), config)
