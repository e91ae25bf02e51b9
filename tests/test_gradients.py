"""Forms of single samples' gradients, and batches, against the obvious computation."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from peft_ird.selection.gradients import outer, tiles
from peft_ird.selection.gradients.batching import Sample, cut, plan, stack
from peft_ird.selection.gradients.dense import Dense
from peft_ird.selection.gradients.forms import OuterAndRows, SampleGradients, combine
from peft_ird.selection.gradients.kept import KeptGradients
from peft_ird.selection.gradients.outer import Outer
from peft_ird.selection.gradients.rows import Rows
from peft_ird.selection.gradients.where import Where
from tests import oracles
from tests.oracles import TOL

CPU = torch.device("cpu")


@dataclass
class Case:
    """Gradients in some form, and each sample's as a matrix, ``[n, o, i]``."""

    form: SampleGradients
    gradients: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.gradients.shape[1:]


class Source:
    """Draws gradients of a few samples with respect to one matrix."""

    def __init__(self, draw: Any, dtype: torch.dtype = torch.float64) -> None:
        self.draw = draw
        self.dtype = dtype
        self.samples, self.rows, self.columns = (
            draw(st.integers(1, most)) for most in (4, 5, 5)
        )
        self.unscale = draw(st.sampled_from([1.0, 1 / 1024]))
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def numbers(self, *shape: int) -> Tensor:
        # Small whole numbers cancel, and are zero, every now and then.
        drawn = torch.randint(-3, 4, shape, generator=self.generator)
        return drawn.to(self.dtype)

    def dense(self) -> Case:
        values = self.numbers(self.samples, self.rows * self.columns)
        shape = (self.samples, self.rows, self.columns)
        return Case(Dense(values), values.double().view(shape))

    def outer(self) -> Case:
        tokens = self.draw(st.integers(1, 6))
        left = self.numbers(self.samples, tokens, self.rows)
        right = self.numbers(self.samples, tokens, self.columns)
        alive = st.sampled_from([0.0, 0.3, 1.0])
        for n in range(self.samples):
            chance = torch.rand(tokens, generator=self.generator)
            left[n, chance > self.draw(alive)] = 0
            right[n, chance > self.draw(alive)] = 0
        form = Outer(left, right, self.unscale)
        return Case(form, oracles.outer_sums(left, right) * self.unscale)

    def looked_up(self) -> Case:
        tokens = self.draw(st.integers(1, 6))
        ids = torch.randint(self.rows, (self.samples, tokens), generator=self.generator)
        grads = self.numbers(self.samples, tokens, self.columns)
        return Case(Rows.of_tokens(ids, grads), oracles.row_sums(ids, grads, self.rows))


@st.composite
def uses(draw, kinds: Sequence[str], dtype: torch.dtype = torch.float64):
    """Several uses of one matrix, each of a drawn kind."""
    source = Source(draw, dtype)
    drawn = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3))
    return [getattr(source, kind)() for kind in drawn]


@st.composite
def cases(draw, dtype: torch.dtype = torch.float64):
    """Any form: one use, several of a kind, or a linear layer tied to an embedding."""
    kinds = draw(st.sampled_from([("dense",), ("outer", "looked_up")]))
    parts = draw(uses(kinds, dtype))
    form = combine([part.form for part in parts])
    assert form is not None
    return Case(form, torch.stack([part.gradients for part in parts]).sum(0))


def subset(data: st.DataObject, count: int) -> list[int]:
    """At least one of ``count`` samples, in order."""
    return sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))


@contextlib.contextmanager
def constants(*, is_wide: bool = False, **values: float) -> Iterator[None]:
    """Other sizes and costs; with ``is_wide``, the ways of a device of many cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outer, "_is_wide", lambda _: is_wide)
        for name, value in values.items():
            patch.setattr(tiles if name == "_TILE_BYTES" else outer, name, value)
        yield


few_bytes = st.sampled_from([1, 64, 4 << 20])


@given(cases(), few_bytes, st.booleans(), st.data())
def test_squares_are_added_sample_by_sample(case, size, wide, data):
    kept = subset(data, len(case.gradients))
    before = torch.randn(case.shape.numel(), dtype=torch.float64)
    total = before.clone()
    with constants(is_wide=wide, _TILE_BYTES=size, _BLOCK_BYTES=size):
        case.form.add_squares_(total, kept)
    squares = case.gradients[kept].square().sum(0)
    assert_close(total, before + squares.flatten(), **TOL[torch.float64])


@given(cases(), st.data())
def test_gradients_are_added_with_their_signs(case, data):
    kept = subset(data, len(case.gradients))
    before = torch.randn(case.shape.numel(), dtype=torch.float64)
    total = before.clone()
    case.form.add_sum_(total, kept)
    expected = before + case.gradients[kept].sum(0).flatten()
    assert_close(total, expected, **TOL[torch.float64])


@given(cases(torch.float32), few_bytes, st.booleans(), st.booleans(), st.data())
def test_a_batch_is_added_to_each_entry_once(case, size, wide, squared, data):
    """Then sums do not depend on where a process begins to add, to the last bit."""
    kept = subset(data, len(case.gradients))
    before = torch.randn(case.shape.numel())
    total, alone = before.clone(), torch.zeros_like(before)
    with constants(is_wide=wide, _TILE_BYTES=size, _BLOCK_BYTES=size):
        for each in (total, alone):
            add = case.form.add_squares_ if squared else case.form.add_sum_
            add(each, kept)
    assert torch.equal(total, before + alone)


@given(cases(), st.data())
def test_the_squared_norm_is_the_sum_of_all_squares(case, data):
    kept = subset(data, len(case.gradients))
    expected = case.gradients[kept].square().sum((1, 2))
    assert_close(case.form.squared_norms(kept), expected, **TOL[torch.float64])


@given(cases(), st.booleans(), st.data())
def test_some_samples_alone_have_the_same_gradients(case, wide, data):
    kept = subset(data, len(case.gradients))
    form = case.form.only(kept, lambda tensor: tensor[kept])
    rows = subset(data, len(kept))
    total = torch.zeros(case.shape.numel(), dtype=torch.float64)
    where = Where(places(data, case.shape), case.shape)
    with constants(is_wide=wide):
        form.add_squares_(total, rows)
        found = form.at(rows, where)
    expected = case.gradients[kept][rows]
    assert_close(total, expected.square().sum(0).flatten(), **TOL[torch.float64])
    assert_close(found, expected.flatten(1)[:, where.flat], **TOL[torch.float64])


def test_a_batch_lets_go_of_what_is_not_wanted_and_shares_its_inputs():
    left, right = torch.randn(2, 8, 3, 5), torch.randn(8, 3, 4)
    batch = KeptGradients()
    keeper = batch.add(range(30), range(10, 18))
    for part, side in enumerate(left):
        keeper.update(part, Outer(side, right), range(8), range(10, 18))
    batch.forget_all_but([*range(10, 15), 99])  # more than half
    assert len(keeper.gradients[0].left) == 8
    batch.forget_all_but([12, 14, 99])
    assert keeper.positions == (12, 14)
    first, second = (keeper.gradients[part] for part in (0, 1))
    assert_close(first.left, left[0, [2, 4]], rtol=0, atol=0)
    assert_close(second.left, left[1, [2, 4]], rtol=0, atol=0)
    assert_close(first.right, right[[2, 4]], rtol=0, atol=0)
    assert first.right.untyped_storage().nbytes() == 2 * 3 * 4 * 4
    assert first.right is second.right


def places(data: st.DataObject, shape: torch.Size) -> Tensor:
    """Entries of a matrix: none, all, anywhere, or all inside a block."""
    rows, columns = shape
    kind = data.draw(st.sampled_from(["none", "all", "scattered", "block"]))
    chosen = {"none": set(), "all": set(range(rows * columns))}.get(kind)
    if kind == "scattered":
        chosen = data.draw(st.sets(st.integers(0, rows * columns - 1)))
    if kind == "block":
        block = [data.draw(st.sets(st.integers(0, s - 1), min_size=1)) for s in shape]
        chosen = {row * columns + column for row in block[0] for column in block[1]}
    return torch.tensor(sorted(chosen), dtype=torch.int64)


def sampling_costs(least=0.0, share=0.0, each=0.0):
    """Constants that decide where entries are sampled."""
    return {
        "_SAMPLED_LEAST": least,
        "_SAMPLED_SHARE": share,
        "_SAMPLED_COST": each,
    }


@given(cases(), st.sampled_from([0, 1, math.inf]), few_bytes, st.booleans(), st.data())
def test_chosen_entries_are_those_of_the_dense_gradient(case, cost, size, wide, data):
    flat = places(data, case.shape)
    kept = subset(data, len(case.gradients))
    costs = {**sampling_costs(each=cost), "_BLOCK_BYTES": size}
    where = Where(flat, case.shape)
    with constants(is_wide=wide, **costs, _TILE_BYTES=size):
        found = case.form.at(kept, where)
        norms = case.form.squared_norms_at(kept, where)
        squares = case.form.squares_at(kept, where)
    expected = case.gradients[kept].flatten(1)[:, flat]
    assert_close(found, expected, **TOL[torch.float64])
    assert_close(norms, expected.square().sum(1), **TOL[torch.float64])
    assert_close(squares, expected.square().sum(0), **TOL[torch.float64])


@given(uses(["outer"]), st.sampled_from([0, math.inf]), few_bytes, st.data())
def test_entries_are_squared_in_the_block_in_use_or_alone(parts, cost, size, data):
    (case, *_) = parts
    flat = places(data, case.shape)
    kept = subset(data, len(case.gradients))
    where = Where(flat, case.shape)
    with constants(**sampling_costs(each=cost), _TILE_BYTES=size):
        norms = case.form.squared_norms_at(kept, where)
        squares = case.form.squares_at(kept, where)
    expected = case.gradients[kept].flatten(1)[:, flat].square()
    assert_close(norms, expected.sum(1), **TOL[torch.float64])
    assert_close(squares, expected.sum(0), **TOL[torch.float64])


@given(
    uses(["outer"]), st.sampled_from(["least", "share", "each"]), st.booleans(),
    st.data(),
)  # fmt: skip
def test_entries_are_sampled_only_where_a_block_of_them_costs_more(
    parts, kind, dear, data
):
    (case, *_) = parts
    calls = []
    sampled = Outer._sampled

    def counted(self, rows, where):
        calls.extend(rows)
        return sampled(self, rows, where)

    flat = places(data, case.shape)
    assume(len(flat))
    kept = subset(data, len(case.gradients))
    rows = len(set((flat // case.shape[1]).tolist()))
    columns = len(set((flat % case.shape[1]).tolist()))
    # What sampling costs is a little less than the block's entries, or a little more.
    factor = 1.01 if dear else 0.99
    units = {"least": 1, "share": case.shape.numel(), "each": len(flat)}
    costs = sampling_costs(**{kind: rows * columns / units[kind] * factor})
    with constants(**costs), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Outer, "_sampled", counted)
        case.form.at(kept, Where(flat, case.shape))
    assert calls == ([] if dear else kept)


@given(uses(["outer"]))
def test_the_transposed_gradient_has_its_factors_swapped(parts):
    (case, *_) = parts
    form = case.form
    swapped = Outer(form.right, form.left, form.unscale)
    everything = Where(torch.arange(case.shape.numel()), case.shape[::-1])
    found = swapped.at(range(len(case.gradients)), everything)
    expected = case.gradients.transpose(1, 2).flatten(1)
    assert_close(found, expected, **TOL[torch.float64])
    total = torch.zeros(case.shape.numel(), dtype=torch.float64)
    swapped.add_squares_(total, range(len(case.gradients)))
    assert_close(total, expected.square().sum(0), **TOL[torch.float64])


@given(uses(["outer"], torch.bfloat16), st.booleans(), st.data())
def test_factors_in_low_precision_are_multiplied_in_float32(parts, wide, data):
    (case, *_) = parts
    flat = places(data, case.shape)
    assume(len(flat))
    kept = range(len(case.gradients))
    total = torch.zeros(case.shape.numel(), dtype=torch.float64)
    with constants(is_wide=wide):
        where = Where(flat, case.shape)
        found = case.form.at(kept, where)
        squares = case.form.squares_at(kept, where)
        case.form.add_squares_(total, kept)
    assert found.dtype == squares.dtype == torch.float32
    expected = case.gradients.flatten(1)
    assert_close(
        squares.double(), expected[:, flat].square().sum(0), **TOL[torch.float32]
    )
    assert_close(found.double(), expected[:, flat], **TOL[torch.float32])
    assert_close(total, expected.square().sum(0), **TOL[torch.float32])


@given(uses(["outer", "looked_up"]), st.randoms(use_true_random=False))
def test_the_order_of_uses_does_not_matter(parts, random):
    gradients = torch.stack([part.gradients for part in parts]).sum(0)
    random.shuffle(parts)
    form = combine([part.form for part in parts])
    kinds = {type(part.form) for part in parts}
    assert type(form) is (OuterAndRows if len(kinds) == 2 else kinds.pop())
    norms = form.squared_norms(range(len(gradients)))
    assert_close(norms, gradients.square().sum((1, 2)), **TOL[torch.float64])


@given(uses(["outer", "looked_up"]), st.data())
def test_dense_gradients_do_not_join_factors(parts, data):
    samples, rows, columns = parts[0].gradients.shape
    extra = Dense(torch.ones(samples, rows * columns, dtype=torch.float64))
    forms = [part.form for part in parts]
    forms.insert(data.draw(st.integers(0, len(forms))), extra)
    assert combine(forms) is None


@given(uses(["looked_up"]))
def test_rows_hold_each_looked_up_row_of_a_sample_once(parts):
    (case, *_) = parts
    for n in range(len(case.gradients)):
        row, values = case.form.part(n)
        assert row.tolist() == sorted(set(row.tolist()))
        assert_close(values, case.gradients[n][row], **TOL[torch.float64])


@given(cases())
def test_reading_leaves_the_gradients_as_they_were(case):
    before = [tensor.clone() for tensor in case.form.tensors()]
    kept = range(len(case.gradients))
    total = torch.zeros(case.shape.numel(), dtype=torch.float64)
    case.form.add_squares_(total, kept)
    case.form.add_sum_(total, kept)
    everything = Where(torch.arange(case.shape.numel()), case.shape)
    case.form.at(kept, everything).square_()
    for now, then in zip(case.form.tensors(), before, strict=True):
        assert torch.equal(now, then)


PAD = 7
FILL = {
    "input_ids": PAD,
    "attention_mask": 0,
    "token_type_ids": 0,
    "labels": -100,
    "decoder_input_ids": PAD,
    "decoder_attention_mask": 0,
    "position_ids": 0,
    "inputs_embeds": 0,
}


def ids(length: int, start: int = 10) -> Tensor:
    return torch.arange(start, start + length)[None]


@st.composite
def samples(draw, most=8, mixed=True):
    """Ragged samples; with ``mixed``, of several sets of fields."""
    found = []
    shared = draw(st.integers(1, 2))
    for position in range(draw(st.integers(1, most))):
        length = draw(st.integers(1, 5))
        inputs = {"input_ids": ids(length, 10 * position)}
        if mixed and draw(st.booleans()):
            inputs["attention_mask"] = torch.ones(1, length, dtype=torch.int64)
        if mixed and draw(st.booleans()):
            inputs["inputs_embeds"] = torch.rand(1, length, shared)
        if mixed and draw(st.booleans()):
            inputs["start_positions"] = torch.tensor([position])
        per_token = ids(length) if mixed and draw(st.booleans()) else None
        inputs["labels"] = torch.tensor([1]) if per_token is None else per_token
        found.append(Sample(position, inputs))
    return found


def positions(batches: Sequence[Sequence[Sample]]) -> list[list[int]]:
    return [[sample.position for sample in batch] for batch in batches]


sizes = st.one_of(st.none(), st.integers(1, 5))


@given(samples(), sizes, st.integers(1, 12), st.booleans())
def test_a_plan_takes_each_sample_once_and_keeps_to_the_size(some, size, tokens, pad):
    batches = plan(some, tokens, size, pad)
    taken = [position for batch in positions(batches) for position in batch]
    assert sorted(taken) == list(range(len(some)))
    for batch in batches:
        lengths = [sample.length for sample in batch]
        assert lengths == sorted(lengths, reverse=True)
        if size is not None:
            assert len(batch) <= size
        elif len(batch) > 1:
            assert len(batch) * lengths[0] <= tokens


@given(samples(), sizes, st.integers(1, 12), st.booleans())
def test_a_plan_has_no_batch_that_could_take_a_sample_of_the_next(
    some, size, tokens, pad
):
    batches = plan(some, tokens, size, pad)
    for first, second in pairwise(batches):
        if first[0].kind(pad) == second[0].kind(pad):
            more = len(first) + 1
            assert more > size if size else more * first[0].length > tokens


@given(samples(), sizes, st.integers(1, 12), st.booleans(), st.data())
def test_a_plan_does_not_depend_on_the_order_of_the_samples(
    some, size, tokens, pad, data
):
    shuffled = data.draw(st.permutations(some))
    expected = positions(plan(some, tokens, size, pad))
    assert positions(plan(shuffled, tokens, size, pad)) == expected


@given(samples(), st.booleans())
def test_samples_share_a_batch_only_with_fields_that_can_be_joined(some, pad):
    for batch in plan(some, 10**6, None, pad):
        first, *others = (sample.inputs for sample in batch)
        for other in others:
            assert other.keys() == first.keys()
            for name, value in other.items():
                assert value.dtype == first[name].dtype
                if pad and name in FILL and value.ndim > 1:
                    assert value.shape[2:] == first[name].shape[2:]
                else:
                    assert value.shape == first[name].shape


@pytest.mark.parametrize(
    ("one", "other", "may"),
    [
        ({"x": torch.zeros(1, 3)}, {"x": torch.zeros(1, 3)}, True),
        ({"x": torch.zeros(1, 3)}, {"x": torch.zeros(1, 4)}, False),
        ({"x": torch.zeros(1, 3)}, {"x": torch.zeros(1, 3).double()}, False),
        ({"x": torch.zeros(2, 3)}, {"x": torch.zeros(2, 3)}, False),
        ({"x": torch.tensor(1.0)}, {"x": torch.tensor(2.0)}, False),
        ({"flag": True}, {"flag": True}, True),
        ({"flag": True}, {"flag": False}, False),
        ({"a": ids(2)}, {"b": ids(2)}, False),
        ({"input_ids": ids(2)}, {"input_ids": ids(3)}, True),
        ({"labels": ids(2)}, {"labels": torch.tensor([1])}, False),
        ((torch.zeros(1, 2), 1), (torch.ones(1, 2), 1), True),
        ((torch.zeros(1, 2), 1), (torch.zeros(1, 3), 1), False),
        (torch.zeros(1, 2), (torch.zeros(1, 2),), False),
    ],
)
def test_what_cannot_be_joined_or_padded_does_not_mix(one, other, may):
    assert (Sample(0, one).kind(True) == Sample(1, other).kind(True)) is may


def test_samples_without_a_length_count_as_one_token():
    samples = [Sample(n, (torch.zeros(1, 2),)) for n in range(40)]
    for tokens, most in ((0, 1), (3, 3), (2048, 16)):
        assert max(map(len, plan(samples, tokens, None, True))) == most
    assert {len(batch) for batch in plan(samples, 3, 8, True)} == {8}


def test_a_tensor_without_rows_of_its_own_is_shared_if_it_is_the_same():
    table = torch.rand(2, 3)
    pair = [Sample(n, {"input_ids": ids(2), "table": table}) for n in range(2)]
    assert positions(plan(pair, 10, None, True)) == [[0, 1]]
    assert stack(pair, PAD, CPU)["table"] is table
    pair[1].inputs["table"] = table.clone()
    assert positions(plan(pair, 10, None, True)) == [[0], [1]]


@given(samples(), st.booleans())
def test_joined_samples_are_padded_on_the_right(some, pad):
    for batch in plan(some, 10**6, None, pad):
        joined = stack(batch, PAD, CPU)
        for row, sample in enumerate(batch):
            for name, value in sample.inputs.items():
                found = joined[name][row]
                assert found.dtype == value.dtype
                if value.ndim == 1:
                    assert found == value[0]
                    continue
                assert torch.equal(found[: value.shape[1]], value[0])
                assert (found[value.shape[1] :] == FILL[name]).all()
                longest = max(s.inputs[name].shape[1] for s in batch)
                assert len(found) == longest


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.booleans())
def test_a_mask_is_made_where_samples_of_several_lengths_have_none(lengths, has_mask):
    batch = []
    for n, length in enumerate(lengths):
        inputs = {"input_ids": ids(length)}
        if has_mask:
            inputs["attention_mask"] = torch.full((1, length), 2)
        batch.append(Sample(n, inputs))
    joined = stack(batch, PAD, CPU)
    if not has_mask and len(set(lengths)) == 1:
        assert "attention_mask" not in joined
        return
    mask = joined["attention_mask"]
    one = 2 if has_mask else 1
    longest = max(lengths)
    expected = [[one] * n + [0] * (longest - n) for n in lengths]
    assert mask.tolist() == expected


@pytest.mark.parametrize("name", FILL)
def test_every_known_field_is_padded_with_its_own_value(name):
    batch = [
        Sample(n, {
            "input_ids": ids(size), "attention_mask": torch.ones(1, size).long(),
            name: torch.ones(1, size).long() * 5,
        })
        for n, size in enumerate((1, 3))
    ]  # fmt: skip
    assert positions(plan(batch, 10, None, True)) == [[1, 0]]
    joined = stack(batch, PAD, CPU)[name]
    assert joined.tolist() == [[5, FILL[name], FILL[name]], [5, 5, 5]]


def test_tuples_and_tensors_are_joined_field_by_field():
    rows = [(torch.tensor([[1.0, 2.0]]), torch.tensor([n])) for n in range(3)]
    joined = stack([Sample(n, row) for n, row in enumerate(rows)], PAD, CPU)
    assert isinstance(joined, tuple)
    assert joined[0].tolist() == [[1.0, 2.0]] * 3
    assert joined[1].tolist() == [0, 1, 2]
    tensors = [Sample(n, torch.full((1, 2), n)) for n in range(2)]
    assert stack(tensors, PAD, CPU).tolist() == [[0, 0], [1, 1]]


@given(
    st.lists(st.booleans(), min_size=1, max_size=6),
    st.lists(st.booleans(), min_size=6, max_size=6),
    st.booleans(),
)
def test_trailing_padding_without_a_label_is_cut_and_nothing_else(
    seen, labelled, per_token
):
    width = len(seen)
    labels = torch.tensor([[5 if here else -100 for here in labelled[:width]]])
    inputs = {
        "input_ids": ids(width),
        "attention_mask": torch.tensor([seen]).long(),
        "token_type_ids": torch.ones(1, width).long(),
        "inputs_embeds": torch.rand(1, width, 2),
        "labels": labels if per_token else torch.tensor([1]),
        "decoder_input_ids": ids(width),
        "decoder_attention_mask": torch.ones(1, width).long(),
    }
    counts = [
        t for t in range(width) if seen[t] or (per_token and labels[0, t] != -100)
    ]
    needed = counts[-1] + 1 if counts else width
    shorter = cut(inputs)
    assert shorter.keys() == inputs.keys()
    for name, value in shorter.items():
        whole = name.startswith("decoder") or value.ndim == 1
        expected = inputs[name] if whole else inputs[name][:, :needed]
        assert torch.equal(value, expected), name


@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": ids(3)},
        {"input_ids": ids(3), "attention_mask": torch.tensor([1, 1, 0])},
        {"input_ids": ids(3), "attention_mask": torch.tensor([[0, 0, 0]])},
        {"input_ids": ids(3), "attention_mask": torch.tensor([[0, 1, 1]])},
        (ids(3), torch.tensor([[1, 1, 0]])),
        ids(3),
    ],
)
def test_inputs_without_padding_that_a_mask_shows_are_not_cut(inputs):
    assert cut(inputs) is inputs
