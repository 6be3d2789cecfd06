"""Liger's losses on several ranks: a head sharded by vocabulary, and the tokens of all ranks. No peer is needed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rlhf_fast.integrations.liger import LigerFusedLinearGRPOLoss, LigerFusedLinearScaledCrossEntropyTPFunction
from rlhf_fast.integrations.liger.cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

N, D, V = 9, 8, 53
COUNTED = (3, 5)  # tokens of each rank
HALF = V // 2
ROWS = (slice(HALF), slice(HALF, V))


def scaled(shard: slice = slice(None), apply=LigerFusedLinearScaledCrossEntropyFunction.apply, *group):
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D).double().requires_grad_(), torch.randn(V, D).double()[shard].requires_grad_()
    target = torch.randint(V, (N,))
    target[4] = -100
    nll, entropy = apply(hidden, weight, target, *group, temperature=1.3, return_entropy=True)
    (nll.sum() + 0.3 * entropy.sum()).backward()
    return {"nll": nll.detach(), "entropy": entropy.detach(), "d hidden": hidden.grad, "d weight": weight.grad}


def grpo(rank, **options):
    """The loss of rank's tokens, and the gradient of its hidden states."""
    torch.manual_seed(rank)
    hidden, weight, ids = torch.randn(2, 4, D).double(), torch.randn(V, D).double(), torch.randint(V, (2, 4))
    mask = (torch.arange(8) < COUNTED[rank]).view(2, 4)
    hidden.requires_grad_()
    loss, _ = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)(
        hidden, weight, ids, mask, torch.tensor([1.0, -2.0]), old_per_token_logps=torch.full((2, 4), -4.0), **options
    )
    loss.backward()
    return {"loss": loss.detach(), "d hidden": hidden.grad}


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {"own": grpo(rank), "given": grpo(rank, num_items_in_batch=torch.tensor(30))}
    found["scaled"] = scaled(ROWS[rank], LigerFusedLinearScaledCrossEntropyTPFunction.apply, None)
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in range(2)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_sharded_head_gives_the_whole_head_s_losses_and_its_rows_of_the_gradient(results, rank):
    expected = scaled()
    expected["d weight"] = expected["d weight"][ROWS[rank]]
    for name, found in results[rank]["scaled"].items():
        torch.testing.assert_close(found, expected[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("case", "tokens"), [("own", sum(COUNTED)), ("given", 30)])
@pytest.mark.parametrize("rank", [0, 1])
def test_dapo_divides_by_the_tokens_of_all_ranks_over_their_number(results, rank, case, tokens):
    expected = grpo(rank, num_items_in_batch=tokens / 2)
    for name, found in results[rank][case].items():
        torch.testing.assert_close(found, expected[name])
