"""Compose a small language model of a projection and an attention, train it, decode with a cache.

    python examples/compose.py

It learns to repeat: the second half of each sequence is the first half again.
"""

import torch

import foveate  # noqa: F401, lets transformers' Auto classes find foveate's models, too
from foveate.models import FoveateConfig, FoveateForCausalLM

HALF = 8


def batch(size: int) -> torch.Tensor:
    first = torch.randint(1, 16, (size, HALF))
    return torch.cat([first, first], dim=1)


def main(steps: int = 120) -> float:
    torch.manual_seed(0)
    config = FoveateConfig(
        vocab_size=16, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        projection="mqa", attention="sink-window(sinks=1, window=12)",
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = FoveateForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        ids = batch(64)
        labels = ids.clone()
        labels[:, :HALF] = -100  # only the repetition can be told
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if step % 30 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    model.eval()
    ids = batch(32)
    made = model.generate(ids[:, :HALF], max_new_tokens=HALF, do_sample=False, use_cache=True)
    right = (made[:, HALF:] == ids[:, HALF:]).float().mean().item()
    print(f"{right:.0%} of the tokens repeated rightly, from a cache of one key and value head")
    return right


if __name__ == "__main__":
    main()
