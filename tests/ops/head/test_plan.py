import pytest
import torch

from rlhf_fast.ops.head._loss import rows_that_fit
from rlhf_fast.ops.head._plan import make
from rlhf_fast.ops.head.head import Head

CPU, GPU = torch.device("cpu"), torch.device("meta")


def groups(plan):
    """The rows of every tile of every group."""
    return [[torch.arange(100)[plan.order.pick(tile)].tolist() for tile in group] for group in plan.groups]


def test_a_pair_is_taken_with_both_of_its_sequences_and_without_masked_rows():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 1]], dtype=torch.uint8)
    plan = make("pair", (4, 3), None, mask, CPU, 5, 100)
    assert groups(plan) == [[[0, 1, 6, 7, 8]], [[3, 11]]]


def test_packed_sequences_are_joined_while_they_fit_a_tile():
    plan = make("sequence", (9,), torch.tensor([0, 3, 3, 5, 9]), None, CPU, 5, 100)
    assert groups(plan) == [[[0, 1, 2, 3, 4]], [[5, 6, 7, 8]]]


def test_a_sequence_longer_than_a_tile_is_one_tile_while_the_budget_lasts_and_several_beyond_it():
    assert groups(make("sequence", (1, 6), None, None, CPU, 2, 6)) == [[[0, 1, 2, 3, 4, 5]]]
    assert groups(make("sequence", (1, 6), None, None, CPU, 2, 4)) == [[[0, 1, 2], [3, 4, 5]]]


def test_a_unit_beyond_the_budget_is_summed_by_its_sequences_where_that_is_asked_for():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 1], [1, 0, 1]], dtype=torch.uint8)
    plan = make("pair", (4, 3), None, mask, CPU, 2, 4, 2)
    assert groups(plan) == [[[3, 9, 11]]]
    units = [
        [[torch.arange(12)[plan.order.pick(tile)].tolist() for tile in tiles] for tiles in unit] for unit in plan.summed
    ]
    assert units == [[[[0, 1], [2]], [[7, 8]]]]
    assert max(tile.stop - tile.start for tile in plan.slices) == 3


def test_on_a_device_sequences_of_summed_units_are_known_by_shape():
    plan = make("pair", (4, 3), None, torch.ones(4, 3, device=GPU), GPU, 2, 4, 2)
    assert plan.groups == []
    assert plan.summed[1] == [[slice(6, 8), slice(8, 9)], [slice(9, 11), slice(11, 12)]]
    assert make("sequence", (2, 3), None, None, GPU, 2, 2, 2).summed == [
        [[slice(0, 2), slice(2, 3)]], [[slice(3, 5), slice(5, 6)]],
    ]  # fmt: skip


def test_what_couples_the_batch_is_never_summed():
    plan = make("batch", (2, 3), None, None, CPU, 2, 4, 2)
    assert plan.groups == [[slice(0, 3), slice(3, 6)]]
    assert plan.summed == []


def test_tokens_that_are_not_coupled_go_in_tiles_of_equal_height():
    assert groups(make("token", (6,), None, None, CPU, 4, 100)) == [[[0, 1, 2]], [[3, 4, 5]]]


def test_a_loss_that_couples_the_batch_takes_all_of_it():
    assert len(make("batch", (4, 3), None, None, CPU, 2, 12).groups) == 1


def test_on_a_device_units_are_known_by_shape_alone():
    assert make("sequence", (2, 3), None, torch.ones(2, 3, device=GPU), GPU, 4, 100).groups == [
        [slice(0, 3)], [slice(3, 6)],
    ]  # fmt: skip
    pairs = make("pair", (4, 3), None, None, GPU, 6, 100)
    assert pairs.groups == [[slice(0, 6)], [slice(6, 12)]]
    assert pairs.order.rows.shape == (12,)
    assert make("pair", (7,), torch.zeros(5, device=GPU), None, GPU, 6, 100).groups == [[slice(0, 7)]]


def test_on_a_device_a_count_of_the_mask_leaves_the_other_rows_out():
    mask = torch.ones(4, 10, device=GPU)
    assert make("token", (4, 10), None, mask, GPU, 8, 100, mask_count=12).groups == [[slice(0, 6)], [slice(6, 12)]]
    packed = torch.zeros(5, device=GPU)
    assert make("sequence", (40,), packed, mask.view(-1), GPU, 8, 100, mask_count=39).groups == [[slice(0, 39)]]


@pytest.mark.parametrize("coupling", ["sequence", "pair"])
@pytest.mark.parametrize(("mask_count", "rows"), [(29, [29]), (30, [10, 10, 10, 10]), (None, [10, 10, 10, 10])])
def test_on_a_device_known_sequences_are_given_up_where_few_rows_count(coupling, mask_count, rows):
    rows = [20, 20] if coupling == "pair" and len(rows) > 1 else rows
    plan = make(coupling, (4, 10), None, torch.ones(4, 10, device=GPU), GPU, 8, 100, mask_count=mask_count)
    assert [tile.stop - tile.start for group in plan.groups for tile in group] == rows


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_rows_behind_the_mask_are_taken_on_a_device_alone(device):
    assert make("token", (2, 3), None, torch.ones(2, 3, device=device), device, 4, 100).order.masked is (device == GPU)
    assert not make("token", (2, 3), None, None, device, 4, 100).order.masked


@pytest.mark.parametrize("coupling", ["token", "sequence", "pair", "batch"])
def test_no_rows_give_no_group(coupling):
    assert make(coupling, (0, 4), None, None, CPU, 2, 2).groups == []


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 8192), (torch.float32, 4096)], ids=str)
def test_a_pair_of_32k_tokens_with_a_vocabulary_of_152k_fits_one_gibibyte(dtype, width):
    head = Head(torch.empty(151936, width, dtype=dtype, device="meta"))
    rows = rows_that_fit(head, 65536, 1 << 30)
    plan = make("pair", (2, 32768), None, None, CPU, rows, rows)
    assert len(plan.groups) == 1
    assert max(tile.stop - tile.start for tile in plan.groups[0]) * 151936 * 4 < 1 << 30
    assert sum(tile.stop - tile.start for tile in plan.groups[0]) == 65536


def test_a_budget_below_one_row_says_what_is_needed():
    head = Head(torch.empty(97, 16))
    needed = 10 * 128 + 97 * 4 + 2 * 16 * 4
    with pytest.raises(ValueError, match=rf"scratch_bytes must be >= {needed} for 10 tokens and a head \(97, 16\)"):
        rows_that_fit(head, 10, needed - 1)
    assert rows_that_fit(head, 10, needed) == 1
