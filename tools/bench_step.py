"""A teacher, a student and rows of random codes -> whole training steps, by objective and way to the loss.

A step is what a training does: it reads rows, and what a cache says of them, goes forward and backward, clips
and has AdamW work. All variants are one step, `Pretrain`'s, and differ in where the teacher's signal comes
from and how the loss is computed. The learning rate is 0: AdamW does all its work, but the weights stay, so
that variants of one objective must find the same loss. Run by `bench_distill` and `bench_students`.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, linear, log_softmax
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from delvm.distill.cache import CacheConfig, Cached, CachedRows, open_cache, write_cache
from delvm.distill.module import Distill, DistillConfig
from delvm.distill.teacher import Hidden, Live, Signal, Target
from delvm.llama import initialise
from delvm.pretrain import Pretrain, Step
from delvm.tokens.balance import BalanceConfig, plan
from delvm.tokens.rows import TrainingSentences
from delvm.tokens.sentences import SentencesConfig, find_forms
from delvm.tokens.store import Grid, TokenStore, code_dtype

WAYS = ("full logits", "fused", "Liger eager", "Liger compiled")
VARIANTS = [
    *(("live", way) for way in WAYS),
    *((objective, way) for objective in ("top-64", "12 drawn", "CE") for way in WAYS[:2]),
]
"""(objective, way to its loss): CE + KL with a live teacher, from a cache of either kind, or CE alone."""
KINDS = {"top-64": "topk", "12 drawn": "sampled"}
"""By objective, the kind of its cache."""
BATCHES = 4  # different ones, which come over and over
CLIP = 1.0


class Pass(NamedTuple):
    """What one forward and backward pass finds."""

    loss: float
    gradients: Sequence[Tensor]
    """The student's; of a whole step their norm before clipping, which has the same norm."""


class Variant(NamedTuple):
    """Something to measure."""

    run: Callable[[], Pass]
    held: Callable[[], int] = lambda: 0
    """Bytes that it keeps from one run to the next."""


# --- losses ---

Loss = Callable[[Tensor, Tensor, Target | None, Tensor], Tensor]
"""(hidden (tokens, width), head (codes, width), target, labels (tokens,)) -> CE + KL; CE without target."""


def full_logits(hidden: Tensor, head: Tensor, target: Target | None, labels: Tensor) -> Tensor:
    """The textbook's loss: all logits at once."""
    logits = linear(hidden, head).float()
    loss = cross_entropy(logits, labels)
    if target is None:
        return loss
    log_q = log_softmax(logits, -1)
    if isinstance(target, Hidden):
        log_p = log_softmax(linear(target.hidden, target.head).float(), -1)
        return loss + kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    ids, p = target.ids.long(), target.probabilities
    kept = log_q.gather(-1, ids)
    if target.tail:  # one more bucket: all other codes
        p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)
        rest = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        return loss + kl_div(torch.cat([kept, rest], -1), p, reduction="batchmean")
    return loss - (p * kept).sum(-1).mean()


def liger(hidden: Tensor, head: Tensor, target: Target | None, labels: Tensor, *, compiled: bool) -> Tensor:
    """Liger Kernel's: at beta 0 its JSD is forward KL, with both weights at 1 it is the others' loss."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    assert isinstance(target, Hidden)
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=1.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled)
    return loss(hidden, head, target.hidden, target.head, labels)


LOSSES: dict[str, Loss] = {
    "full logits": full_logits,
    "Liger eager": partial(liger, compiled=False),
    "Liger compiled": partial(liger, compiled=True),
}
"""By way, those that the package's own modules do not have."""


class Compared(Pretrain):
    """The one training step, with another way to the loss."""

    def __init__(
        self, model: LlamaForCausalLM, signal: Signal | None, config: DistillConfig, loss: Loss
    ) -> None:
        super().__init__(model, config, config.steps)
        self.signal, self.loss = signal, loss

    def losses(self, step: Step, hidden: Tensor) -> dict[str, Tensor]:
        target = self.signal.targets(step.batch) if self.signal else None
        return {"loss": self.loss(hidden, self.model.lm_head.weight, target, step.labels)}


# --- steps ---


def random_rows(num_rows: int, length: int, codes: int) -> TrainingSentences:
    """Rows of `length` random codes, as a training reads them."""
    drawn = np.random.default_rng(0).integers(codes, size=(num_rows, 1, 1, length)).astype(code_dtype(codes))
    store = TokenStore(
        {"num_codes": codes, "tokens_per_image": length},
        {"train": {"random": Grid([drawn])}},
        {"train": {}},
    )
    config = SentencesConfig(specials=False)
    forms = find_forms(config, {"random": (1, 1)}, length)
    plans = plan({"random": num_rows}, {"random": length}, BalanceConfig(strategy="none"))
    return TrainingSentences(store, plans, forms, config, num_rows=num_rows, seed=0, details=True)


def random_model(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """A model on the CPU whose logits have a spread of about 1: so KL is a good part of the loss."""
    model = initialise(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(model.lm_head.weight, std=config.hidden_size**-0.5, generator=generator)
    return model


class Steps:
    """Training steps of one student.

    Args:
        student, teacher: configuration; precision (`32`, `bf16`) -> the teacher, asked only where it is run.
        caches: folder of the teacher's caches, which `write_caches` writes.
        length, rows: tokens of a row, rows of a step.
        workers: processes that read ahead; 0 reads within the step.
    """

    def __init__(
        self,
        student: LlamaConfig,
        teacher: Callable[[str], Live],
        caches: Path,
        *,
        length: int,
        rows: int,
        device: torch.device,
        workers: int = 0,
    ) -> None:
        self.config, self.teacher, self.caches = student, teacher, caches
        self.rows, self.device, self.workers = rows, device, workers
        self.data = random_rows(BATCHES * rows, length, student.vocab_size)
        self.distill = DistillConfig()

    @cached_property
    def student(self) -> LlamaForCausalLM:
        """The one that all variants share."""
        return random_model(self.config, seed=0).to(self.device)

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """Its AdamW, as in training but for the learning rate."""
        pretrain = Pretrain(self.student, self.distill, self.distill.steps)
        optimizer = pretrain.configure_optimizers()["optimizer"]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        return optimizer

    def write_caches(self, precision: str) -> None:
        """Write one cache of each kind."""
        for kind in KINDS.values():
            folder = self.caches / kind
            folder.mkdir()
            write_cache(
                folder, self.data, self.teacher(precision), CacheConfig(kind), temperature=1.0, seed=0,
                batch_size=self.rows, device=self.device, teacher_hash="random", tokenizer_hash="random",
            )  # fmt: skip

    def source(self, objective: str, precision: str) -> tuple[TrainingSentences | CachedRows, Signal | None]:
        """Where the rows of an objective and its teacher's signal come from."""
        if objective == "CE":
            return self.data, None
        if objective == "live":
            return self.data, self.teacher(precision).to(self.device)
        cache = open_cache(self.caches / KINDS[objective])
        return CachedRows(self.data, cache), Cached(cache)

    def batches(self, data: TrainingSentences | CachedRows) -> Iterator[dict[str, Tensor]]:
        """The rows, `rows` at a time, without end."""
        loader: DataLoader[Any] = DataLoader(
            data,
            batch_size=self.rows,
            sampler=cycle(range(len(data))),
            num_workers=self.workers,
            collate_fn=data.collate,  # type: ignore[arg-type]  # of a batch, not of items
        )
        return iter(loader)

    def variant(self, objective: str, way: str, *, mixed: bool) -> Variant:
        """One of VARIANTS; `mixed`: in bf16-mixed, with a teacher in bf16."""
        student, optimizer, device = self.student, self.optimizer, self.device
        data, signal = self.source(objective, "bf16" if mixed else "32")
        batches = self.batches(data)
        if way != "fused":
            module: Pretrain = Compared(student, signal, self.distill, LOSSES[way])
        elif signal is None:
            module = Pretrain(student, self.distill, self.distill.steps)
        else:
            module = Distill(student, signal, self.distill)

        def run() -> Pass:
            batch = {key: part.to(device) for key, part in next(batches).items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                loss = module.training_step(batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            module.configure_gradient_clipping(optimizer, CLIP)
            optimizer.step()
            assert module.gradient_norm is not None
            return Pass(loss.item(), [module.gradient_norm])

        def held() -> int:
            parameters = [*student.parameters()]
            kept = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
            kept += [part for state in optimizer.state.values() for part in state.values()]
            if isinstance(signal, Live):
                kept += signal.model.parameters()
            return sum(part.numel() * part.element_size() for part in kept)

        return Variant(run, held)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a page, numbers to the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
