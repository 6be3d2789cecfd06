"""A PPO loop of OpenRLHF's functions on our ops, in which a policy learns to write the token 7.

python examples/dropin/openrlhf_losses.py

In OpenRLHF itself `rlhf_fast.patch("openrlhf")` puts the same objects in the place of its own; it must run in every Ray
worker. Here they are imported, so that nothing but PyTorch is needed.
"""

import torch

from rlhf_fast.integrations.openrlhf import (
    PolicyLoss,
    ValueLoss,
    compute_approx_kl,
    compute_entropy,
    compute_reward,
    get_advantages_and_returns,
    log_probs_from_logits,
    masked_normalize,
)

BATCH, LENGTH, VOCABULARY, WANTED = 64, 12, 16, 7
TEMPERATURE, KL_COEF, ROUNDS, EPOCHS = 1.0, 0.02, 40, 4


def log_probs(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Of ids (B, T) under a policy that has one distribution for each position: `table`, (T, V) logits."""
    return log_probs_from_logits(table.expand(len(ids), -1, -1) * 1, ids, TEMPERATURE)


def main() -> None:
    torch.manual_seed(0)
    table, values = torch.zeros(LENGTH, VOCABULARY, requires_grad=True), torch.zeros(LENGTH, requires_grad=True)
    base = table.detach().clone()
    optimizer = torch.optim.Adam([table, values], lr=0.05)
    policy_loss, value_loss = PolicyLoss(clip_eps_high=0.28, dual_clip=10.0), ValueLoss(clip_eps=0.5)
    print("round  share of 7  policy loss  value loss  clipped   KL, nats  entropy, nats")
    for step in range(ROUNDS):
        with torch.no_grad():
            ids = torch.multinomial(table.softmax(-1), BATCH, replacement=True).T
            mask = torch.arange(LENGTH) < torch.randint(LENGTH // 2, LENGTH + 1, (BATCH, 1))
            old, old_values = log_probs(table, ids), values.expand(BATCH, -1).clone()
            kl = compute_approx_kl(old, log_probs(base, ids), kl_estimator="k1")
            share = ((ids == WANTED) & mask).sum(1) / mask.sum(1)
            rewards = compute_reward(share, KL_COEF, kl, mask, reward_clip_range=(-1, 1))
        advantages, returns = get_advantages_and_returns(None, old_values, rewards, mask, 1.0, 0.95)
        advantages = masked_normalize(advantages, mask, dim=0)
        for _ in range(EPOCHS):
            loss, clipped, *_ = policy_loss(log_probs(table, ids), old, advantages, mask)
            critic = value_loss(values.expand(BATCH, -1), old_values, returns, mask)
            optimizer.zero_grad()
            (loss + critic).backward()
            optimizer.step()
        if step % 5 == 0 or step == ROUNDS - 1:
            print(
                f"{step:5d}  {share.mean():10.3f}  {loss:11.4f}  {critic:10.4f}  {clipped:7.3f}  "
                f"{kl[mask].mean():9.3f}  {compute_entropy(table.detach()).mean():13.3f}"
            )


if __name__ == "__main__":
    main()
