"""flash-attn's cross-entropy of logits where flash-attn is not installed, the call that verl and OpenRLHF make.

python examples/dropin/flash_attn_cross_entropy.py
"""

import torch

from rlhf_fast.integrations import flash_attn

TOKENS, VOCABULARY, TEMPERATURE = 256, 8192, 0.7


def main() -> None:
    flash_attn.install()
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss  # as verl and OpenRLHF import it

    torch.manual_seed(0)
    logits, labels = 8 * torch.randn(TOKENS, VOCABULARY), torch.randint(VOCABULARY, (TOKENS,))
    labels[0] = logits[0].argmax()  # a token that the model is certain of
    logits[0, labels[0]] += 10
    exact = torch.nn.functional.cross_entropy(logits.double() / TEMPERATURE, labels, reduction="none")
    eager = torch.nn.functional.cross_entropy(logits / TEMPERATURE, labels, reduction="none")

    losses, _ = cross_entropy_loss(logits, labels, logit_scale=1 / TEMPERATURE)
    print(f"mean loss {losses.mean():.6f} nats, in float64 {exact.mean():.6f}")
    print("            of the certain token, nats   largest error of the others")
    for name, found in (("ours", losses), ("PyTorch", eager), ("float64", exact)):
        print(f"{name:9s} {found[0].item():29.3e} {(found - exact)[1:].abs().max().item():29.1e}")
    flash_attn.uninstall()


if __name__ == "__main__":
    main()
