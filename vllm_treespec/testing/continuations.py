"""Text that a target model writes once, for benchmarks to replay."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from vllm_treespec.testing.replay import MAX_DEPTH, Texts


@torch.inference_mode()
def continued(
    prompts: torch.Tensor,  # [num_prompts, prompt_len] int64
    num_tokens: int,
    temperature: float,
    *,
    model: Path,
    kept_in: Path,
) -> Texts:
    """What the model says after the prompts in float32, written only once."""
    key = hashlib.sha256((model / "model.safetensors").read_bytes())
    key.update(prompts.numpy().tobytes())
    key.update(f"{num_tokens} {temperature} {MAX_DEPTH}".encode())
    path = kept_in / f"continued_{key.hexdigest()[:16]}.npz"
    if not path.exists():
        kept_in.mkdir(exist_ok=True)
        token_ids = _generate(model, prompts, num_tokens + MAX_DEPTH, temperature)
        np.savez_compressed(path, token_ids=token_ids.int().numpy())
    token_ids = torch.from_numpy(np.load(path)["token_ids"]).long()
    return Texts(token_ids, prompts.shape[1], num_tokens, temperature)


def _generate(
    path: Path, prompts: torch.Tensor, length: int, temperature: float
) -> torch.Tensor:
    """By hand, because transformers would stop at the end of a file."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    token_ids, cache = [prompts], None
    for _ in range(length):
        output = model(
            token_ids[-1], past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache, logits = output.past_key_values, output.logits[:, -1]
        if temperature:
            probs = (logits / temperature).softmax(-1)
            token_ids.append(torch.multinomial(probs, 1, generator=generator))
        else:
            token_ids.append(logits.argmax(-1, keepdim=True))
    return torch.cat(token_ids, 1)


def spread_prompts(
    files: Sequence[torch.Tensor],  # token ids of a file each
    num_prompts: int,
    prompt_len: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets ``[num_prompts, prompt_len]`` from different places in the same files."""
    files = [tokens for tokens in files if len(tokens) >= 4 * prompt_len]
    num_turns = 2 * -(-num_prompts // len(files))
    prompts: list[list[torch.Tensor]] = [[], []]
    for turn in range(num_turns):
        for tokens in files:
            start = (len(tokens) - prompt_len) * turn // num_turns
            prompts[turn % 2].append(tokens[start : start + prompt_len])
    first, second = (torch.stack(each[:num_prompts]) for each in prompts)
    return first, second
