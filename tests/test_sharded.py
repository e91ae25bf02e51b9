"""A model that FSDP divides among processes trains as a whole one does."""

import warnings
from functools import partial
from itertools import product

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.testing import assert_close

from peft_ird import IRDConfig
from tests.conftest import MODELS, VOCABULARY, make_model, task_type
from tests.oracles import TOL

CPU = torch.device("cpu")
HALF = torch.bfloat16
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def flattened(model, dtype, use_orig_params):
    """As the Trainer does with the first FSDP."""
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=fsdp_auto_wrap_policy(model),
        mixed_precision=MixedPrecision(param_dtype=dtype),
        device_id=CPU,
        use_orig_params=use_orig_params,
    )


def sharded(model, dtype):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shard = partial(
        fully_shard, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype)
    )
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            shard(module)
    return shard(model)


WAYS = {
    "flat": partial(flattened, use_orig_params=False),
    "flat, original parameters": partial(flattened, use_orig_params=True),
    "sharded": sharded,
}


def adapted(name):
    """A model in float64 with random values in all kinds of parameters."""
    torch.manual_seed(1)
    settings = IRDConfig(
        task_type=task_type(name),
        density=0.1,
        method="random",
        scope="per_module",
        init_weights=False,
        modules_to_save=[],
    )
    return get_peft_model(make_model(name).double(), settings).eval()


def batch(name, rows):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (8, 6), generator=generator)
    labels = ids if task_type(name) == "CAUSAL_LM" else ids[:, 0] % 2
    return {"input_ids": ids[rows], "labels": labels[rows]}


def train(model, rows):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for _ in range(3):
        model(**rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model, name):
    with torch.no_grad():
        return model(**batch(name, slice(None))).logits


def work(folder):
    """Train each model in each way; keep what it computes, and that in 16 bits."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    found = {}
    for name, (way, divide) in product(MODELS, WAYS.items()):
        model = adapted(name)
        divided = divide(model, None)
        train(divided, batch(name, mine))
        half = divide(adapted(name).float(), HALF)
        found[name, way] = logits(divided, name), logits(half, name).float()
        if way == "sharded":  # torch cannot gather the flat ones on a CPU
            tensors = get_model_state_dict(divided, options=WHOLE)
            if dist.get_rank() == 0:
                model.save_pretrained(folder / name, state_dict=tensors)
    torch.save(found, folder / str(dist.get_rank()))


def test_a_divided_model_trains_and_is_saved_as_a_whole_one(tmp_path, in_processes):
    in_processes(2, work, tmp_path)
    everything = [torch.load(tmp_path / rank) for rank in ("0", "1")]
    for name in MODELS:
        model = adapted(name)
        in_half = logits(adapted(name).to(HALF), name).float()
        train(model, batch(name, slice(None)))
        expected = logits(model, name)
        loaded = PeftModel.from_pretrained(make_model(name).double(), tmp_path / name)
        assert_close(logits(loaded, name), expected, **TOL[torch.float64])
        for found, way in product(everything, WAYS):
            trained, half = found[name, way]
            assert_close(trained, expected, **TOL[torch.float64])
            assert_close(half, in_half, **TOL[HALF])
