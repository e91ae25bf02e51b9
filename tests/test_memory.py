"""What a selection takes of the memory, measured in a process of its own."""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peft_ird import Calibration, IRDConfig, select_parameters

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
MIB = 1 << 20
WORDS, WIDTH = 20_000, 512
# Libraries, small temporaries and what malloc keeps: 17 MiB were seen.
AROUND = 30 * MIB


class Tagger(nn.Module):
    """An embedding of 39 MiB, and three matrices of 4 MiB each."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        sizes = [WIDTH, 2 * WIDTH, WIDTH, 2 * WIDTH]
        pairs = zip(sizes, [*sizes[1:], WIDTH], strict=True)
        self.body = nn.Sequential(*(nn.Linear(*pair) for pair in pairs))

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(self.words(ids)).square().mean((1, 2))


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(dict(line.split(":", 1) for line in lines)[field].split()[0])


def peak_beyond_the_model(limit: int) -> int:
    torch.manual_seed(0)
    model = Tagger()
    rows = [torch.randint(WORDS, (24,)) for _ in range(12)]
    data = Calibration(rows, loss=lambda m, ids: m(ids))
    config = IRDConfig(density=0.001, num_samples=12)
    model(rows[0][None]).sum()  # what torch loads with a first pass is not the point
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    select_parameters(model, config, data, memory_limit=limit)
    return resident("VmHWM") - before


@pytest.mark.parametrize("copies", [4.2, 6])
def test_a_limit_is_kept(copies):
    """In copies of the embedding, of which a limit must hold four (float64, twice)."""
    limit = int(copies * 4 * WORDS * WIDTH)
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as process:
        peak = process.submit(peak_beyond_the_model, limit).result()
    assert peak <= limit + AROUND, (peak / MIB, limit / MIB)
