"""What a selection takes of the memory, measured in a process of its own."""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peft_ird import Calibration, IRDConfig, select_parameters
from peft_ird.selection.gradients.ordered import OrderedSums
from peft_ird.selection.gradients.ranks import Ranks
from peft_ird.selection.pool import Pool

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
MIB = 1 << 20
TOKENS, WORDS, WIDTH = 100, 20_000, 512
# Libraries, small temporaries and what malloc keeps: up to 104 MiB were seen.
AROUND = 130 * MIB


class Tagger(nn.Module):
    """Four heads of 39 MiB each, and matrices of 2 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, WIDTH)
        sizes = [WIDTH, 2 * WIDTH, WIDTH]
        self.body = nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(sizes)))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, WORDS) for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.body(self.tokens(ids))
        return sum(head(hidden).square().mean((1, 2)) for head in self.heads)


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(dict(line.split(":", 1) for line in lines)[field].split()[0])


def peak_beyond_the_model(limit: int | None) -> int:
    torch.manual_seed(0)
    model = Tagger()
    rows = [torch.randint(TOKENS, (24,)) for _ in range(12)]
    data = Calibration(rows, loss=lambda m, ids: m(ids))
    config = IRDConfig(density=0.001, num_samples=12)
    model(rows[0][None]).sum()  # what torch loads with a first pass is not the point
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    select_parameters(model, config, data, memory_limit=limit)
    return resident("VmHWM") - before


def in_a_process_of_its_own(limit: int | None) -> int:
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as process:
        return process.submit(peak_beyond_the_model, limit).result()


@pytest.mark.parametrize("copies", [2.2, 3])
def test_a_limit_is_kept(copies):
    """In copies of a head, of which a limit must hold two."""
    limit = int(copies * 4 * WORDS * WIDTH)
    peak = in_a_process_of_its_own(limit)
    assert peak <= limit + AROUND, (peak / MIB, limit / MIB)


def test_without_a_limit_more_is_taken():
    """Else the test above would show nothing."""
    least = 3 * 4 * WORDS * WIDTH + AROUND
    assert in_a_process_of_its_own(None) > least


def test_rows_of_a_table_that_nothing_is_added_to_take_no_memory():
    pool = Pool([("table", "weight", nn.Parameter(torch.zeros(1, 32 << 20)))])
    before = resident("VmRSS")
    sums = OrderedSums(pool, [0], Ranks())
    sums.of(0)[5_000_000:5_001_000] += 1.0
    assert resident("VmRSS") - before < 4 * MIB
    assert float(sums.end()[0].sum()) == 1000
