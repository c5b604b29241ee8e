"""A prompt of tokens -> its continuation."""

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM


@torch.inference_mode()
def complete(
    model: LlamaForCausalLM,
    prompts: Tensor,
    num_tokens: int,
    num_codes: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Continues every prompt by `num_tokens` image codes (visual prompting: Bai et al. 2024, section 4.4).

    prompts: (n, prefix) int64, without padding. Returns (n, num_tokens) int64 in 0..num_codes-1 on the CPU;
    ids from `num_codes` up (BOS, EOS, padding) are never generated, and only the length ends a sentence.
    temperature 0 takes the most likely code each time; above 0 draws from the smallest set of codes that
    holds `top_p` of the probability. The draw depends on `seed` alone; the global random state is left as it
    was. The model's own generation settings are ignored: what ends a text there is an image code here.
    A compiled model runs uncompiled: every token that is added would make it compile again.

    Raises ValueError for settings out of range and for prompts that leave no room in the model's positions.
    """
    _check(model, prompts, num_tokens, num_codes, temperature, top_p)
    settings = GenerationConfig(
        max_new_tokens=num_tokens,
        do_sample=temperature > 0,
        suppress_tokens=list(range(num_codes, model.config.vocab_size)) or None,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
        use_cache=True,
        **({"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}),
    )
    ids = prompts.to(model.device)
    theirs, was_training = model.generation_config, model.training
    # set, not passed: generate would fill what is None here, eos for one, from the model's own settings
    model.generation_config = settings
    model.eval()
    try:
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(seed)
            out = model.generate(ids, attention_mask=torch.ones_like(ids))
    finally:
        model.generation_config = theirs
        model.train(was_training)
    return out[:, ids.shape[1] :].cpu()


def _check(
    model: LlamaForCausalLM,
    prompts: Tensor,
    num_tokens: int,
    num_codes: int,
    temperature: float,
    top_p: float,
) -> None:
    vocab_size, positions = model.config.vocab_size, model.config.max_position_embeddings
    if prompts.dim() != 2 or prompts.numel() == 0:
        raise ValueError(f"prompts: shape {tuple(prompts.shape)}, must be (at least 1, at least 1)")
    low, high = int(prompts.min()), int(prompts.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"prompts: ids {low}..{high}, must be in 0..{vocab_size - 1}")
    if not 1 <= num_codes <= vocab_size:
        raise ValueError(f"num_codes: {num_codes}, must be in 1..{vocab_size}, the model's vocabulary")
    if num_tokens < 1 or prompts.shape[1] + num_tokens > positions:
        raise ValueError(
            f"num_tokens: {num_tokens} after a prompt of {prompts.shape[1]}, must be at least 1 and end "
            f"within the model's {positions} positions"
        )
    if temperature < 0:
        raise ValueError(f"temperature: {temperature}, must be 0 (most likely) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: {top_p}, must be above 0 and at most 1")
