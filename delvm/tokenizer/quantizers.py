"""Latents -> codes while a tokenizer is trained: QUANTIZERS.

Every one of them starts at the k-means of the first batch, and starts a code that fell out of use anew at a
latent of the batch. What they leave is a plain codebook: the code of a latent is the nearest (L2) of it.
"""

from typing import Any

from vector_quantize_pytorch import VectorQuantize

from delvm import ranks

QUANTIZERS: dict[str, dict[str, Any]] = {
    # the codes are moving averages of the latents they stand for (van den Oord et al. 2017, appendix A.1)
    "ema": {},
    # and the gradient turns with the step from latent to code (Fifty et al. 2024)
    "rotation": {"rotation_trick": True},
    # codes and latents have length 1 (Yu et al. 2022); of such codes the one at the smallest angle is also
    # the nearest to the latent as it is, so that a lookup need not know
    "cosine": {"use_cosine_sim": True},
    "cosine_rotation": {"use_cosine_sim": True, "rotation_trick": True},
    # the codes follow the gradient of their distance to the latents, with the weight of the commitment
    "learned": {"learnable_codebook": True, "ema_update": False},
}
"""What sets each apart, as settings of vector_quantize_pytorch.VectorQuantize."""


def build_quantizer(
    name: str, *, num_codes: int, code_dim: int, commitment: float, decay: float, restart_below: float
) -> VectorQuantize:
    """The quantizer of that name: (batch, code_dim, rows, columns) latents -> codes, ids and its loss.

    Args:
        name: a key of QUANTIZERS.
        num_codes: of the codebook, each (code_dim,).
        commitment: weight of the latents' squared distance to their codes, in the loss.
        decay: of the moving averages, from 0 to below 1.
        restart_below: uses a batch (moving average) below which a code starts anew; 0 never.
    """
    settings = {"rotation_trick": False, **QUANTIZERS[name]}
    return VectorQuantize(
        dim=code_dim,
        codebook_size=num_codes,
        decay=decay,
        kmeans_init=True,
        threshold_ema_dead_code=restart_below,
        commitment_weight=commitment,
        accept_image_fmap=True,
        # several processes have one codebook; left to itself it keeps what it found at the first call of all
        sync_codebook=ranks.world() > 1,
        **settings,
    )
