"""Supervised fine-tuning (SFT): imitate demonstrations, token by token.

Objective: maximise Σ_t log π(y_t | x, y_<t) over demonstrations (x, y): maximum
likelihood of the answers, their end-of-sequence token included, given the questions.
Question tokens are read but not scored.

It is the first step of most recipes for alignment (InstructGPT, arXiv 2203.02155, step
1), and what the other methods are measured against. SFT reproduces its teachers in the
proportions in which it met them. What it cannot do is prefer the better ones.

Details that differ between codes: TRL averages over the tokens of a batch, the DPO
authors sum over each answer. We divide by a token count common to many batches, so a
batch of short answers does not count for more than its share (a mean of means would).
Optimisers: AdamW for all weights, or Muon (github.com/KellerJordan/Muon, as in torch)
for the matrices inside the blocks and AdamW for the rest.

Lesson: lessons/01_sft.py

Card: SFT
    data: given answers
    policy: off
    comparison: –
    credit: token
    reference: none
    loss: −(1/N) Σ_t log π_t
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from minialign.checks import (
    check_logprobs,
    check_mask,
    check_settings,
)
from minialign.logprobs import (
    Count,
    token_logprobs,
    token_mean,
)
from minialign.model import GPT
from minialign.sampling import Example, collate


@dataclass(frozen=True)
class SFTConfig:
    """Defaults: the course's base. Optimiser, lr, batch and cooldown: lesson 01's
    trials; weight decay and the limit of gradients as GPT-3 has them (arXiv
    2005.14165, appendix B).
    """

    updates: int = 5000  # optimiser steps
    batch_size: int = 32  # examples per update
    lr: float = 4e-3  # peak; Muon's is matched to AdamW's scale of update
    warmup: int = 60  # updates over which the learning rate rises to its peak
    cooldown: float = 1.0  # last share of the rest over which it falls to 0
    muon: bool = True  # Muon for the blocks' matrices; False: AdamW for all
    weight_decay: float = 0.1  # on matrices only, as usual
    max_grad_norm: float = 1.0  # gradients longer than this are scaled down
    window: int = 64  # batches drawn together and sorted by length: less padding
    learn_prompt: bool = False  # score the question too (the broken variant)
    seed: int = 0  # of the order of the examples


def sft_loss(logprobs: Tensor, mask: Tensor, count: Count | None = None) -> Tensor:
    """Mean negative log-likelihood of the live tokens.

    L = -(1/N) Σ_b Σ_s mask[b, s] logprobs[b, s], N the number of live tokens.

    Shapes: logprobs (B, S), mask (B, S) bool -> (). Units: nats per token.
    Reduction: token mean; `count` replaces N, so that the micro-batches of one batch,
    each divided by the batch's own N, add up to its loss.
    Gradient: through logprobs.
    Raises: ValueError, TypeError as `logprobs.check_logprobs`.
    Source: InstructGPT, arXiv 2203.02155, section 3.5.
    """
    check_mask(mask)
    check_logprobs("logprobs", logprobs, mask)
    return token_mean(-logprobs, mask, count)


def learning_rate(step: int, config: SFTConfig) -> float:
    """Share of the peak at update `step`: linear up to 1, flat, linear down to 0."""
    up = (step + 1) / max(config.warmup, 1)
    falling = config.cooldown * (config.updates - config.warmup)
    down = (config.updates - step) / max(falling, 1)
    return min(up, down, 1.0)


def batches(
    examples: Sequence[Example], config: SFTConfig, pad_id: int, start: int = 0
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Batches from update `start` on: tokens, mask, and the count to divide by.

    Every epoch has its own order, a function of seed and epoch alone, so a resumed run
    meets the same batches. A window of batches is sorted by length, cut, and its
    batches shuffled; the count is the window's mean number of live tokens per batch.
    The last, smaller batch of an epoch is used too.
    """
    per_epoch = ceil(len(examples) / config.batch_size)
    for epoch in range(start // per_epoch, ceil(config.updates / per_epoch)):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(examples), generator=generator).tolist()
        for first in range(0, per_epoch, config.window):
            last = min(first + config.window, per_epoch)
            shuffled = torch.randperm(last - first, generator=generator).tolist()
            done = start - epoch * per_epoch - first
            if done >= last - first:
                continue  # the whole window lies before `start`
            rows = order[first * config.batch_size : last * config.batch_size]
            window = sorted((examples[i] for i in rows), key=_length)
            cut = [
                collate(window[i : i + config.batch_size], pad_id, config.learn_prompt)
                for i in range(0, len(window), config.batch_size)
            ]
            count = sum(int(mask.sum()) for _, mask in cut) / len(cut)
            for i in shuffled[max(done, 0) :]:
                yield *cut[i], count


def _length(example: Example) -> int:
    prompt, response = example
    return len(prompt) + len(response)


def optimizers(model: GPT, config: SFTConfig) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices where asked, AdamW for everything else."""
    blocks = [p for p in model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in blocks}
    others = [p for p in model.parameters() if p.ndim == 2 and id(p) not in inside]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    if not config.muon:
        others = others + blocks
        blocks = []
    adamw = torch.optim.AdamW(
        [
            {"params": others, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    if not blocks:
        return [adamw]
    muon = torch.optim.Muon(
        blocks,
        lr=config.lr,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return [adamw, muon]


def train(
    model: GPT,
    examples: Sequence[Example],
    config: SFTConfig,
    *,
    pad_id: int,
    state: dict | None = None,
) -> Iterator[dict[str, float]]:
    """Train in place; one dict of metrics per update.

    `examples` may be computed on demand: only `len` and `[i]` are used. A `state` dict
    is complete at every yield and continues a run when handed in again.

    Metrics:

        update            updates so far
        loss              nats per live token of this batch
        lr                share of the peak
        grad_norm         before it is scaled down to max_grad_norm
        steps             optimiser steps: 1
        tokens_trained    live tokens
        tokens            real ones, prompts included
        padding           share of the batch's slots

    Raises: as `check_settings`; ValueError for no examples, one that does not fit the
    context, or a loss that is not finite (before the step that would spread it).
    """
    check_settings(config)
    state = {} if state is None else state
    device = next(model.parameters()).device
    if len(examples) == 0:
        raise ValueError("examples: got none, need at least one")
    steppers = optimizers(model, config)
    if state:
        model.load_state_dict(state["model"])
        for stepper, saved in zip(steppers, state["optimizers"], strict=True):
            stepper.load_state_dict(saved)
    start = state.get("update", 0)
    model.train()

    # 1. draw
    drawn = batches(examples, config, pad_id, start)
    for update in range(start, config.updates):
        tokens, mask, count = next(drawn)  # (B, T), (B, S)
        if tokens.shape[1] > model.config.context:
            raise ValueError(
                f"examples: one has {tokens.shape[1]} tokens, "
                f"more than the model's context of {model.config.context}"
            )

        # 2. score
        tokens = tokens.to(device)
        mask = mask.to(device)
        logprobs = token_logprobs(model, tokens, mask)  # (B, S)

        # 3. compare
        # With the demonstration itself: there is nothing else.
        loss = sft_loss(logprobs, mask, count)

        # 4. update
        share = learning_rate(update, config)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        if not torch.isfinite(norm):
            raise ValueError(f"update {update}: gradient norm {norm}, loss {loss}")
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = config.lr * share
            stepper.step()
            stepper.zero_grad(set_to_none=True)

        # 5. report
        live = int(mask.sum())
        real = int((tokens != pad_id).sum())
        state["model"] = model.state_dict()
        state["optimizers"] = [stepper.state_dict() for stepper in steppers]
        state["update"] = update + 1
        yield {
            "update": update + 1,
            "loss": loss.item() * count / live,
            "lr": share,
            "grad_norm": norm.item(),
            "tokens": real,
            "steps": 1,
            "tokens_trained": live,
            "padding": 1 - real / tokens.numel(),
        }
