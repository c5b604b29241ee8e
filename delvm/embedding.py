"""A tokenizer's codebook -> what a LLaMA reads for each code.

DeLVM (Guo et al., ICML 2024) learns no table: it reads the frozen vectors of the codebook through a learned
projection. The two are one matrix, so that `fold` leaves a plain model that reads the same.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

EMBEDDINGS = ("learned", "codebook", "codebook_start")
"""What a model reads for a code: a row of a table that is learnt; the code's frozen vector through a learned
projection; or a row of a table that is learnt and starts as that."""


class CodebookEmbedding(nn.Module):
    """(...) int64 ids -> (..., width) float32: frozen vectors through a learned projection without bias.

    Ids that are no codes have learned rows of their own. Under autocast it stays float32, as an embedding's
    rows do: the residual stream begins here. The vectors are a buffer in no state dict: no gradient, no
    optimizer moves them, and what goes on from a checkpoint brings its codebook.
    """

    vectors: Tensor

    def __init__(self, codebook: Tensor, table: Tensor, std: float = 0.02) -> None:
        """The projection is drawn so that code rows have the root mean square `std`, whatever the codes have.

        Args:
            codebook: (codes, code_dim) float; copied, in float32.
            table: (ids, width) float, of a plain embedding in the place of this; ids from `codes` up are
                special and start with their rows of it.
            std: of code rows, in the mean over codes.

        Raises:
            ValueError: fewer ids than codes.
        """
        super().__init__()
        if len(table) < len(codebook):
            raise ValueError(f"codebook: {len(codebook)} codes, the model has {len(table)} ids")
        self.register_buffer("vectors", codebook.detach().float().clone(), persistent=False)
        self.projection = nn.Linear(codebook.shape[1], table.shape[1], bias=False)
        self.specials = nn.Parameter(table[len(codebook) :].detach().clone())
        length = float(self.vectors.square().sum(1).mean().sqrt())
        nn.init.normal_(self.projection.weight, std=std / length if length else std)

    @property
    def weight(self) -> Tensor:
        """(ids, width): the table that this is."""
        with torch.autocast(self.vectors.device.type, enabled=False):
            return torch.cat([self.projection(self.vectors), self.specials])

    def forward(self, ids: Tensor) -> Tensor:
        # the table, not the vectors of these ids: as dear as a few tokens of the model, and bit for bit what
        # is read after folding
        return F.embedding(ids, self.weight)


def fold(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Give a model that reads a codebook the plain embedding that it amounts to, in place; others stay.

    What it computes stays the same. A head that its configuration ties is tied to the new embedding.
    """
    read = model.model.embed_tokens
    if isinstance(read, CodebookEmbedding):
        plain = nn.Embedding.from_pretrained(read.weight.detach(), freeze=False)
        model.model.embed_tokens = plain
        if model.config.tie_word_embeddings:
            model.lm_head.weight = plain.weight
    return model


def count_trained(config: LlamaConfig, num_codes: int, code_dim: int) -> int:
    """Parameters of the embedding of a model in training, where it reads codes of so many numbers each."""
    width: int = config.hidden_size
    return (code_dim + config.vocab_size - num_codes) * width
