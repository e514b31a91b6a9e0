"""Rejection sampling: draw several answers, keep the good ones, imitate those, repeat.

Objective, each round anew: maximise Σ log π(y | x) over the answers y that were kept
among K drawn from π to each problem x. The reward decides what is kept, nothing else.

Source: RAFT, arXiv 2304.06767, algorithm 1; Llama 2, arXiv 2307.09288, section 3.2.3.
What changes from SFT: the demonstrations are the policy's own answers, and a reward
picks them. Nothing pushes a wrong answer down, except that probabilities sum to 1.

Details: RAFT draws colder than it trains, which sharpens by itself; we draw and score
at one temperature. RAFT learns from the latest round alone; Llama 2 went back to all
rounds when it saw skills forgotten. A problem that nobody solved is skipped: counted.
Lesson: lessons/10_rejection_sampling.py
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minialign.checks import (
    check_logprobs,
    check_mask,
    check_reference,
    check_rows,
    check_settings,
    check_shapes,
)
from minialign.evaluation import answer_metrics, binary_kl, style_shares
from minialign.logprobs import (
    sequence_sum,
    token_logprobs,
)
from minialign.model import GPT
from minialign.problems import Problem
from minialign.rewards import Reward, score
from minialign.sampling import Example, collate, generate, rescore
from minialign.tokenizer import Tokenizer

CHUNK = 128  # problems drawn at a time: bounds memory
Pool = list[Example]  # prompt ids, response ids
Select = Callable[[Tensor, Tensor, torch.Generator], Tensor]  # -> (P, K) bool


@dataclass(frozen=True)
class RejectionSamplingConfig:
    """Defaults: the course's headline run of 16,384 answers; lr, updates: lesson 10."""

    rounds: int = 4  # draws, each followed by training
    prompts: int = 512  # problems per round
    samples: int = 8  # answers per problem: K
    max_new_tokens: int = 128  # longer answers are cut, earn 0 and are counted
    temperature: float = 1.0  # of sampling and of scoring: one number
    updates: int = 32  # optimiser steps per round, however much was kept
    batch_tokens: int = 2048  # response tokens per step, and up to one answer more
    lr: float = 6e-4  # AdamW's peak
    warmup: int = 5  # updates of linear warm-up; then linear decay to 0 over the run
    max_grad_norm: float = 1.0  # gradients longer than this are scaled down
    micro_batch: int = 64  # answers per backward pass: bounds memory, not the result


def best_of_n_accuracy(p: np.ndarray, n: int) -> np.ndarray:
    """1 − (1 − p)^n: chance that one of n answers is right, p of each. Any shape."""
    p = np.asarray(p, dtype=float)
    if n < 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"best_of_n: n must be >= 1, p in [0, 1]; got {n} and {p}")
    return 1 - (1 - p) ** n


def best_of_n_kl(p: np.ndarray, n: int) -> np.ndarray:
    """KL(best of n ‖ policy) for rewards 0 and 1, in nats: kl(1 − (1 − p)^n ‖ p).

    Exact with ties broken by lot: among the right the shares stay as they were, and
    among the wrong. log n − (n − 1)/n (arXiv 2401.01879) is only a bound.
    """
    return binary_kl(best_of_n_accuracy(p, n), p)


def select_right(rewards: Tensor, lengths: Tensor, generator: torch.Generator):
    """Every answer that earned more than 0. Shapes, here and below: -> (P, K) bool."""
    return (_ranks(rewards, lengths, generator) >= 0) & (rewards > 0)


def select_best(rewards: Tensor, lengths: Tensor, generator: torch.Generator):
    """One best answer per problem, ties by lot; none where nothing earned above 0."""
    ranks = _ranks(rewards, lengths, generator)
    return (ranks == ranks.amin(1, keepdim=True)) & (rewards > 0)


def select_top(rewards: Tensor, lengths: Tensor, generator: torch.Generator):
    """The best P of all P·K answers, ties by lot; none at 0 or less. RAFT's `top`."""
    return (_ranks(rewards, lengths, generator) < len(rewards)) & (rewards > 0)


def select_random(rewards: Tensor, lengths: Tensor, generator: torch.Generator):
    """The control: answers drawn by lot, as many *tokens* as in all right answers."""
    lots = _ranks(0 * rewards, lengths, generator).flatten()  # (P·K,)
    size = lengths.flatten()[lots.argsort()]  # (P·K,), in the order of the lots
    enough = size.cumsum(0) - size < lengths[rewards > 0].sum()
    return enough[lots].view_as(rewards)


def _ranks(rewards: Tensor, lengths: Tensor, generator: torch.Generator) -> Tensor:
    """(P, K): 0 for the best of all answers, then 1, 2, ...; equals stand by lot.

    Every selection draws lots once, needed or not: all leave the generator alike.
    """
    check_shapes(rewards=rewards, lengths=lengths)
    if rewards.dim() != 2 or not rewards.isfinite().all():
        raise ValueError(f"rewards must be (P, K) and finite, got {rewards}")
    lots = _lots(rewards.numel(), generator).to(rewards.device)
    order = lots[rewards.flatten()[lots].argsort(descending=True, stable=True)]
    return order.argsort().view_as(rewards)


def _lots(n: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(n, generator=generator, device=generator.device)


def keep_latest(earlier: Pool, new: Pool) -> Pool:
    """Learn from this round's answers alone. Source: RAFT."""
    return new


def keep_all(earlier: Pool, new: Pool) -> Pool:
    """Learn from every round's answers. Source: Llama 2."""
    return earlier + new


def likelihood_loss(
    logprobs: Tensor, weights: Tensor, mask: Tensor, count: float | None = None
) -> Tensor:
    """L = −(1/count) Σ_b w_b Σ_s mask[b, s] logprobs[b, s]: w = 1 kept, w = 0 not.

    All w = 1 and count the number of live tokens: SFT, as `train` does. w the rewards
    of fresh answers and count their number: REINFORCE without a baseline, unbiased.
    Shapes: logprobs, mask (B, S); weights (B,) -> (). Units: nats x those of w.
    Reduction: sequence sum / count; None: all rows with a live token, kept or not.
    Gradient: through logprobs only. Raises: as the three checks. Source: RAFT.
    """
    check_mask(mask)
    check_logprobs("logprobs", logprobs, mask)
    check_rows("weights", weights, mask)
    return -sequence_sum(logprobs * weights.detach()[:, None], mask, count)


def train(
    policy: GPT, tokenizer: Tokenizer, problems: Sequence[Problem], reward: Reward,
    config: RejectionSamplingConfig, *, generator: torch.Generator,
    select: Select = select_right, keep: Callable[[Pool, Pool], Pool] = keep_latest,
    reference: GPT | None = None, state: dict | None = None,
) -> Iterator[dict[str, float]]:  # fmt: skip
    """Train the policy in place; one dict of metrics per optimiser step.

    Round r asks problems[r * prompts : (r + 1) * prompts], from the start again when
    they run out. Steps go through the pool in random order, anew when used up. `state`
    is complete at every yield, inside a round too, and continues a run when handed in.
    Metrics of the draw, before it is learnt from: round, completions (so far), those of
    `answer_metrics`, entropy (nats per token), kept (share of answers), pool (answers),
    unanswered (share of problems with no reward above 0), kept_style_<name> (shares; 0
    where none was kept), kl (nats per answer, mean k1; only with a reference). Of the
    step: update, loss (nats per token), grad_norm (before clipping), tokens (trained on
    so far). With an empty pool a step does nothing: loss 0, grad_norm 0.
    Raises: as `check_settings`; ValueError for no problems, a reference that shares the
    policy's weights, a selection not bool (P, K), a gradient not finite.
    """
    check_settings(config)
    if not problems:
        raise ValueError("problems: got none, need at least one")
    check_reference(policy, reference)
    state = {} if state is None else state
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.0)
    if state:
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
    pool, order = state.get("pool", []), list(state.get("order", []))
    drawn, seen = state.get("drawn", {}), state.get("tokens", 0)
    K, heat, pad_id = config.samples, config.temperature, tokenizer.pad_id
    steps, device = config.rounds * config.updates, next(policy.parameters()).device

    for update in range(state.get("update", 0), steps):
        round_, turn = divmod(update, config.updates)
        if turn == 0:
            # 1. draw
            wanted = range(round_ * config.prompts, (round_ + 1) * config.prompts)
            asked = [problems[i % len(problems)] for i in wanted]
            prompts = [tokenizer.encode_prompt(problem.question) for problem in asked]
            rollout = generate(
                policy, prompts, samples=K, temperature=heat, generator=generator,
                eos_id=tokenizer.eos_id, pad_id=pad_id, chunk=CHUNK,
                max_new_tokens=config.max_new_tokens,
            )  # fmt: skip

            # 2. score
            rewards = score(reward, asked, rollout, tokenizer).view(-1, K)  # (P, K)
            lengths = rollout.lengths().view(-1, K)  # (P, K)
            nats = -rollout.logprobs.double().sum().item()
            drawn = answer_metrics(asked, rollout, rewards, tokenizer)
            drawn["entropy"] = nats / lengths.sum().item()
            drawn["unanswered"] = (rewards <= 0).all(1).float().mean().item()
            drawn |= {"round": round_ + 1, "completions": (round_ + 1) * len(asked) * K}
            if reference is not None:
                parts = torch.arange(len(asked) * K).split(CHUNK * K)
                them = rescore(reference, rollout, parts).double().sum().item()
                drawn["kl"] = (-nats - them) / (len(asked) * K)

            # 3. compare
            kept = select(rewards, lengths, generator)  # (P, K)
            if kept.dtype != torch.bool or kept.shape != rewards.shape:
                raise ValueError(f"select: gave {kept}, must be bool (P, K)")
            answers = rollout.responses()
            rows = kept.flatten().nonzero()[:, 0].tolist()
            pool, order = keep(pool, [(prompts[i // K], answers[i]) for i in rows]), []
            texts = [tokenizer.decode_response(answers[i]) for i in rows]
            shares = style_shares([asked[i // K] for i in rows], texts) if rows else {}
            drawn |= {f"kept_{x}": shares.get(x, 0.0) for x in drawn if "style_" in x}
            drawn |= {"kept": len(rows) / len(answers), "pool": len(pool)}

        # 4. update
        up = (update + 1) / max(config.warmup, 1)
        down = (steps - update) / max(steps - config.warmup, 1)
        optimizer.param_groups[0]["lr"] = config.lr * min(up, down, 1.0)
        batch, held, loss = [], 0, 0.0
        while pool and held < config.batch_tokens:
            order = order or _lots(len(pool), generator).tolist()
            batch.append(pool[order.pop()])
            held += len(batch[-1][1])
        batch.sort(key=lambda row: len(row[0]) + len(row[1]))  # little padding
        optimizer.zero_grad(set_to_none=True)
        policy.train()
        for i in range(0, len(batch), config.micro_batch):
            part = collate(batch[i : i + config.micro_batch], pad_id)
            tokens, mask = (x.to(device) for x in part)  # (b, t), (b, s)
            logprobs = token_logprobs(policy, tokens, mask, heat)  # (b, s)
            piece = likelihood_loss(logprobs, logprobs.new_ones(len(mask)), mask, held)
            piece.backward()
            loss += piece.item()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        if not torch.isfinite(norm):
            raise ValueError(f"update {update}: gradient norm {norm}, loss {loss}")
        optimizer.step()
        seen += held

        # 5. report
        state |= {"policy": policy.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"generator": generator.get_state(), "update": update + 1}
        state |= {"pool": pool, "order": list(order), "drawn": drawn, "tokens": seen}
        step = {"loss": loss, "grad_norm": norm.item(), "tokens": seen}
        yield {"update": update + 1, **drawn, **step}
