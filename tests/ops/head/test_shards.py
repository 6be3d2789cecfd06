"""linear_logprobs with a vocabulary split over processes gives what one process gives with the whole head."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rlhf_fast import linear_logprobs
from rlhf_fast.ops.head import _logprobs_op

WORLD = 4
N, D, V, R = 9, 8, 41, 2
SPLITS = {2: [30, 11], 3: [1, 25, 15], 4: [10, 10, 10, 11]}  # ids per rank
MASK = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1, 1])
TEMPERATURES = torch.linspace(0.5, 2.0, N)

# What is trained beside hidden, options of the call, whether the entropy gets a gradient, bytes for G.
CASES = {
    "frozen": ((), {}, False, 1 << 20),
    "frozen, entropy": ((), {}, True, 1 << 20),
    "kept": (("weight", "bias"), {"mask": MASK}, False, 1 << 20),
    "remade": (("weight", "bias"), {"mask": MASK}, False, 0),
    "entropy": (("weight",), {"chunk_tokens": 4}, True, 1 << 20),
    "lora": (("lora_a", "lora_b"), {"softcap": 5.0}, False, 1 << 20),
    "lora, remade": (("lora_a", "lora_b"), {"temperature": TEMPERATURES, "logit_scale": 0.7}, True, 0),
    "targets": (("weight",), {"mask": MASK}, True, 1 << 20),
    "forbidden": (("weight",), {}, True, 1 << 20),  # of two ranks the second has no other tokens
}


def draw(case):
    g = torch.Generator().manual_seed(0)
    tensors = {
        "hidden": torch.randn(N, D, generator=g),
        "weight": torch.randn(V, D, generator=g),
        "bias": torch.randn(V, generator=g),
        "lora_a": torch.randn(R, D, generator=g),
        "lora_b": torch.randn(V, R, generator=g) / 4,
    }
    targets = torch.randint(0, V, (N, 3) if case == "targets" else (N,), generator=g)
    upstream = torch.randn(targets.shape, generator=g)
    upstream[3] = 0
    if case == "forbidden":
        tensors["bias"][30:] = -torch.inf
        targets %= 30
    return tensors, targets, upstream


def run(case, ids=slice(None), group=None, dtype=torch.float32):
    """Results and gradients of the head's rows `ids`."""
    trained, options, entropy_gradient, budget = CASES[case]
    tensors, targets, upstream = draw(case)
    tensors = {k: (x if k in ("hidden", "lora_a") else x[ids]).to(dtype).clone() for k, x in tensors.items()}
    for name in ("hidden", *trained):
        tensors[name].requires_grad_()
    lora = (tensors["lora_a"], tensors["lora_b"], 0.5) if "lora_a" in trained else None
    _logprobs_op.KEPT_BYTES["cpu"] = budget
    logprobs, entropy, stats = linear_logprobs(
        tensors["hidden"], tensors["weight"], targets, bias=tensors["bias"], head_lora=lora, return_entropy=True,
        return_stats=True, process_group=group, backend="cpu", **options,
    )  # fmt: skip
    loss = (logprobs * upstream).sum()
    (loss + entropy.square().sum() if entropy_gradient else loss).backward()
    results = {"logprobs": logprobs.detach(), "entropy": entropy.detach(), **stats._asdict()}
    return results | {f"d {name}": tensors[name].grad for name in ("hidden", *trained)}


def rank_slice(ranks, rank):
    start = sum(SPLITS[ranks][:rank])
    return slice(start, start + SPLITS[ranks][rank])


def confident(group, ids):
    """A margin of 20 nats to the only other likely token, which another rank holds."""
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.full((V, 1), -200.0)
    weight[0], weight[V - 1] = 20.0, 0.0
    logprob, entropy = linear_logprobs(
        hidden, weight[ids], torch.tensor([0]), return_entropy=True, process_group=group, backend="cpu"
    )
    logprob.sum().backward()
    return {"logprob": logprob.detach(), "entropy": entropy.detach(), "d hidden": hidden.grad}


def outside(group, ids):
    try:
        linear_logprobs(torch.ones(3, 1), torch.ones(V, 1)[ids], torch.tensor([0, 40, 41]), process_group=group)
    except IndexError as error:
        return str(error)


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    for ranks in SPLITS:
        group = dist.new_group(range(ranks))
        if rank < ranks:
            ids = rank_slice(ranks, rank)
            results = {case: run(case, ids, group) for case in CASES}
            results |= {"float64": run("frozen", ids, group, torch.float64), "again": run("entropy", ids, group)}
            results |= {"confident": confident(group, ids), "outside": outside(group, ids)}
            torch.save(results, f"{folder}/{ranks}-{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(ranks, rank) -> what that process found, for 2, 3 and 4 of them."""
    folder = tmp_path_factory.mktemp("shards")
    mp.spawn(work, (str(folder),), nprocs=WORLD)
    return {(n, r): torch.load(folder / f"{n}-{r}") for n in SPLITS for r in range(n)}


RANKS = [(n, r) for n in SPLITS for r in range(n)]


@pytest.fixture(autouse=True)
def same_budget(monkeypatch):
    monkeypatch.setitem(_logprobs_op.KEPT_BYTES, "cpu", 0)  # restored after `run` has set it


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("at", RANKS, ids=str)
def test_values_and_gradients_of_every_rank_are_those_of_the_whole_head(results, at, case):
    expected = run(case)
    for name, found in results[at][case].items():
        local = expected[name][rank_slice(*at)] if name in ("d weight", "d bias", "d lora_b") else expected[name]
        torch.testing.assert_close(found, local, rtol=2e-5, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("at", RANKS, ids=str)
def test_in_float64_the_shards_merge_exactly(results, at):
    expected = run("frozen", dtype=torch.float64)
    for name, found in results[at]["float64"].items():
        torch.testing.assert_close(found, expected[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("at", RANKS, ids=str)
def test_a_confident_token_stays_exact_across_ranks(results, at):
    found = results[at]["confident"]
    rest = math.exp(-20.0)
    assert found["logprob"].item() == pytest.approx(-rest, rel=1e-6)
    assert found["entropy"].item() == pytest.approx(21 * rest, rel=1e-5)  # p = rest: -log(1 - p) - p log p
    assert found["d hidden"].item() == pytest.approx(20 * rest, rel=1e-5)  # (1 - p_y) W[y] - p W[V - 1]


@pytest.mark.parametrize("ranks", SPLITS)
def test_every_rank_has_the_same_bits_and_has_them_again(results, ranks):
    for case in CASES:
        found, *others = (results[ranks, rank][case] for rank in range(ranks))
        for name in ("logprobs", "entropy", "d hidden"):
            assert all(torch.equal(found[name], other[name]) for other in others), (case, name)
    for rank in range(ranks):
        first, second = results[ranks, rank]["entropy"], results[ranks, rank]["again"]
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_target_outside_the_whole_vocabulary_raises_on_every_rank(results):
    for at in RANKS:
        assert results[at]["outside"] == "targets: row 2 is 41, outside [0, 41)"
