"""Adopt a method on a transformers model, look at what it costs, and undo it.

    python examples/adopt.py [FOLDER OF A MODEL]

Without a folder it makes a tiny Llama with random weights, so that it runs anywhere in seconds.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import foveate


def load(folder: str | None) -> torch.nn.Module:
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def main(folder: str | None = None) -> None:
    torch.manual_seed(0)
    model = load(folder)
    ids = torch.randint(model.config.vocab_size, (1, 512))
    with torch.no_grad():
        dense = model(ids).logits.log_softmax(-1)
        for method in ("full", "sink-window(sinks=4, window=128)", "block-sparse(fraction=0.5)"):
            with foveate.use(model, method):  # undone at the end of the block
                ours = model(ids).logits.log_softmax(-1)
            kl = (dense.exp() * (dense - ours)).sum(-1).mean()
            print(f"{method}: KL {kl:.2e} from dense")
        again = model(ids).logits.log_softmax(-1)
    assert torch.equal(again, dense), "undone is exactly as before"


if __name__ == "__main__":
    main(*sys.argv[1:])
