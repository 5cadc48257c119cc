"""GPT-2 written down plainly, float32, whole matrices, one layer in memory at a time: what a precision is held against.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from core.engine.model import Batch, Model, Rows
from core.engine.weights import Checkpoint
from core.tokenizer import Tokenizer

TALK = (
    "Hi, how are you?",
    "I'm good, thanks! How about you?",
    "Pretty good. What are you doing today?",
    "Not much, I'm just watching a movie. Do you like movies?",
    "Yes, I love them. What is your favorite?",
    "I don't know, there are so many good ones.",
)


@torch.inference_mode()
def divergence(model: Model, checkpoint: Checkpoint) -> float:
    """Kullback-Leibler divergence of the model's next token from float32's, nats, mean over some small talk.

    That is the logarithm of what a precision costs in perplexity where float32's probabilities are right; where they
    are not, as a rule it costs less. Raises BadCheckpoint where the folder has no tokenizer.
    """
    tokenizer = Tokenizer.load(checkpoint.folder)
    ids = [i for turn in TALK for i in (*tokenizer.encode(turn), tokenizer.eos_id) if i < checkpoint.config.vocab_size]
    ids = ids[: checkpoint.config.n_positions]
    here, _ = model.forward(Batch(ids, [Rows(model.new_kv(len(ids)), 0, len(ids))], list(range(len(ids)))))
    exact = logits(checkpoint, ids)
    return float(F.kl_div(here.log_softmax(1), exact.log_softmax(1), reduction="batchmean", log_target=True))


@torch.inference_mode()
def logits(checkpoint: Checkpoint, ids: list[int]) -> Tensor:
    """(len(ids), vocab_size), float32. Takes nothing out of the checkpoint."""
    config, tensors = checkpoint.config, checkpoint.tensors

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = tensors[f"{name}.weight"].float(), tensors[f"{name}.bias"].float()
        return F.layer_norm(x, x.shape[1:], weight, bias, config.layer_norm_epsilon)

    def linear(x: Tensor, name: str) -> Tensor:
        return torch.addmm(tensors[f"{name}.bias"].float(), x, tensors[f"{name}.weight"].float())

    def activate(x: Tensor) -> Tensor:
        return F.relu(x) if config.activation == "relu" else F.gelu(x, approximate=config.activation)

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=config.attention_scale(layer))

    x = tensors["wte.weight"][ids].float() + tensors["wpe.weight"][: len(ids)].float()  # (T, E)
    for i in range(config.n_layer):
        qkv = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
        q, k, v = qkv.view(len(ids), 3, config.n_head, -1).permute(1, 2, 0, 3)  # (H, T, D)
        x = x + linear(attend(q, k, v, i).transpose(0, 1).flatten(1), f"h.{i}.attn.c_proj")
        x = x + linear(activate(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")), f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ tensors["wte.weight" if config.tied else "lm_head.weight"].float().T
