"""Rejection sampling: draw several answers, keep the good ones, imitate those, repeat.

Each round draws K answers from π to each problem x, keeps some of them, and maximises
Σ log π(y | x) over the kept answers y. The reward decides which are kept, and has no
other part in it.

Source: RAFT, arXiv 2304.06767, algorithm 1; Llama 2, arXiv 2307.09288, section 3.2.3.

What changes from SFT: the demonstrations are the policy's own answers, and a reward
picks them. Nothing pushes a wrong answer down, except that probabilities sum to 1.

Details: RAFT draws at a lower temperature than it learns at, which sharpens the policy
by itself; here both are 1 unless a config says otherwise. RAFT learns from the latest
round alone; Llama 2 went back to all rounds when it saw skills forgotten. A problem
that nobody solved is skipped, and counted.

Lesson: lessons/10_rejection_sampling.py; more rounds in lessons/18_raft.py

Card: Rejection sampling (2304.06767, 2307.09288)
    data: K own answers to each problem, in rounds
    policy: on at the draw, off within a round
    comparison: a threshold, or the best of K
    credit: answer, kept or dropped
    reference: none
    loss: −(1/N) Σ_kept Σ_t log π_t
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minialign.checks import (
    check_groups,
    check_logprobs,
    check_mask,
    check_problems,
    check_reference,
    check_rows,
    check_settings,
    check_shapes,
)
from minialign.evaluation import answer_metrics, binary_kl, measured_kl, style_shares
from minialign.logprobs import (
    Count,
    sequence_sum,
    token_logprobs,
)
from minialign.model import GPT
from minialign.problems import Problem
from minialign.rewards import Reward, score
from minialign.sampling import Example, collate
from minialign.tokenizer import Tokenizer
from minialign.training import (
    Learner,
    Sums,
    draw,
)

Pool = list[Example]  # prompt ids, response ids
Select = Callable[[Tensor, Tensor, torch.Generator, float], Tensor]  # as select_right


@dataclass(frozen=True)
class RejectionSamplingConfig:
    """Defaults: the headline run of 16,384 answers; lr and updates: lesson 10."""

    rounds: int = 4  # draws, each followed by training
    prompts: int = 512  # problems per round
    samples: int = 8  # K, answers per problem
    max_new_tokens: int = 128  # a longer answer is truncated, and counted
    truncated_reward: float = 0.0  # what a truncated answer earns
    threshold: float = 0.0  # an answer that earned no more is not kept
    temperature: float = 1.0  # of sampling; RAFT 0.85
    learning_temperature: float = 1.0  # of scoring what was kept
    updates: int = 32  # optimiser steps per round, however much was kept
    batch_tokens: int = 2048  # response tokens per step, and up to one answer more
    lr: float = 4e-4  # AdamW's peak
    warmup: int = 5  # updates of linear warm-up; then linear decay to 0 over the run
    max_grad_norm: float = 0.4  # a guard: 4 x the usual (see `Learner`)
    micro_batch: int = 64  # answers per backward pass: bounds memory, not the result
    chunk: int = 128  # problems drawn at a time: bounds memory, and changes the draws


def best_of_n_accuracy(p: np.ndarray, n: int) -> np.ndarray:
    """1 − (1 − p)^n: chance that one of n answers is right, p of each. Any shape."""
    p = np.asarray(p, dtype=float)
    if n < 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"best_of_n: n must be >= 1, p in [0, 1]; got {n} and {p}")
    return 1 - (1 - p) ** n


def best_of_n_kl(p: np.ndarray, n: int) -> np.ndarray:
    """KL(best of n ‖ policy) for rewards 0 and 1, in nats: kl(1 − (1 − p)^n ‖ p).

    Exact with ties broken by chance: among the right the shares stay as they were, and
    among the wrong. log n − (n − 1)/n (arXiv 2401.01879) is only a bound.
    """
    return binary_kl(best_of_n_accuracy(p, n), p)


def select_right(
    rewards: Tensor,
    lengths: Tensor,
    generator: torch.Generator,
    threshold: float = 0.0,
) -> Tensor:
    """Every answer that earned more than `threshold`, which is what failure earns.

    Shapes: rewards, lengths (P, K) -> (P, K) bool. Raises: ValueError for another rank
    or rewards that are not finite.
    """
    check_shapes(rewards=rewards, lengths=lengths)
    check_groups("rewards", rewards)
    return rewards > threshold


def select_best(
    rewards: Tensor,
    lengths: Tensor,
    generator: torch.Generator,
    threshold: float = 0.0,
) -> Tensor:
    """One best answer per problem, if it earned more than `threshold`.

    Among equally good answers chance decides.

    Shapes, raises: as `select_right`.
    """
    ranks = _ranks(rewards, lengths, generator)  # (P, K)
    best = ranks == ranks.amin(1, keepdim=True)  # (P, K)
    return best & (rewards > threshold)


def select_top(
    rewards: Tensor,
    lengths: Tensor,
    generator: torch.Generator,
    threshold: float = 0.0,
) -> Tensor:
    """The best P of all P * K answers, of those that earned more than `threshold`.

    Among equally good answers chance decides.

    Shapes, raises: as `select_right`. Source: RAFT's `top`.
    """
    ranks = _ranks(rewards, lengths, generator)  # (P, K)
    return (ranks < len(rewards)) & (rewards > threshold)


def select_random(
    rewards: Tensor,
    lengths: Tensor,
    generator: torch.Generator,
    threshold: float = 0.0,
) -> Tensor:
    """The control: answers by chance, until they have as many *tokens* as
    `select_right` keeps: at most one answer more.

    Shapes, raises: as `select_right`.
    """
    nothing_to_choose = 0 * rewards  # (P, K), not finite where rewards are not
    ranks = _ranks(nothing_to_choose, lengths, generator).flatten()  # (P * K,)
    size = lengths.flatten()[ranks.argsort()]  # (P * K,), in the order of the ranks
    tokens_before = size.cumsum(0) - size  # (P * K,)
    taken = tokens_before < lengths[rewards > threshold].sum()  # (P * K,)
    return taken[ranks].view_as(rewards)


def _ranks(rewards: Tensor, lengths: Tensor, generator: torch.Generator) -> Tensor:
    """(P, K): 0 for the best of all answers, then 1, 2, ...; equals stand by chance."""
    check_shapes(rewards=rewards, lengths=lengths)
    if rewards.dim() != 2 or not rewards.isfinite().all():
        raise ValueError(f"rewards must be (P, K) and finite, got {rewards}")
    shuffled = _shuffled(rewards.numel(), generator).to(rewards.device)  # (P * K,)
    earned = rewards.flatten()[shuffled]  # (P * K,)
    order = shuffled[earned.argsort(descending=True, stable=True)]  # (P * K,)
    return order.argsort().view_as(rewards)


def _shuffled(count: int, generator: torch.Generator) -> Tensor:
    """0 .. count - 1 in random order."""
    return torch.randperm(count, generator=generator, device=generator.device)


def _length(example: Example) -> int:
    prompt, response = example
    return len(prompt) + len(response)


def keep_latest(earlier: Pool, new: Pool) -> Pool:
    """Learn from this round's answers alone. Source: RAFT."""
    return new


def keep_all(earlier: Pool, new: Pool) -> Pool:
    """Learn from every round's answers. Source: Llama 2."""
    return earlier + new


def keep_latest_with(given: Pool) -> Callable[[Pool, Pool], Pool]:
    """Learn from this round's answers and, beside them, from given ones.

    With demonstrations as the given ones this is the online self-training that ReFT is
    measured against. Source: ReFT, arXiv 2401.08967, section 4.2.
    """

    def keep(earlier: Pool, new: Pool) -> Pool:
        return new + given

    return keep


def likelihood_loss(
    logprobs: Tensor, weights: Tensor, mask: Tensor, count: Count | None = None
) -> Tensor:
    """L = −(1/count) Σ_i w_i Σ_s mask[i, s] logprobs[i, s].

    The weight w of an answer is 1 if it was kept and 0 if not. With w = 1 for all and
    the number of live tokens as count, this is the loss of SFT; so `train` calls it.
    With the rewards of fresh answers as weights and the number of answers as count, it
    is REINFORCE without a baseline, whose gradient is unbiased.

    Shapes: logprobs, mask (B, S); weights (B,) -> (). Units: nats x those of w.
    Reduction: sequence sum / count; None: all rows with a live token, kept or not.
    Gradient: through logprobs only. Source: RAFT.
    Raises: as `check_mask`, `check_logprobs` and `check_rows`.
    """
    check_mask(mask)
    check_logprobs("logprobs", logprobs, mask)
    check_rows("weights", weights, mask)
    return -sequence_sum(logprobs * weights.detach()[:, None], mask, count)


def train(
    policy: GPT,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    reward: Reward,
    config: RejectionSamplingConfig,
    *,
    generator: torch.Generator,
    select: Select = select_right,
    keep: Callable[[Pool, Pool], Pool] = keep_latest,
    reference: GPT | None = None,
    state: dict | None = None,
) -> Iterator[dict[str, float]]:
    """Train the policy in place; one dict of metrics per optimiser step.

    Round r asks problems[r * prompts : (r + 1) * prompts], from the start again when
    they run out. Steps go through the pool in random order, anew when used up; with an
    empty pool a step does nothing. `generator` samples the answers. A `state` dict is
    complete at every yield, inside a round too, and continues a run when it is handed
    in again.

    Metrics: those of `Learner.report`, and

        update               steps so far
        loss                 nats per token of the step's answers; 0 of none

    of the draw, before it is learnt from: `answer_metrics`, and

        round                the round of this step, from 1
        completions          answers drawn so far
        kept                 share of the round's answers
        kept_style_<name>    share of the kept answers; 0 if none was kept
        pool                 answers to learn from
        unanswered           share of problems with no reward above the threshold
        kl                   nats per answer, exact at each choice; with a reference

    Raises: as `check_settings`; ValueError for no problems, a reference that shares the
    policy's weights, a selection that is not bool (P, K), a gradient that is not
    finite.
    """
    check_settings(config)
    check_problems(problems)
    check_reference(policy, reference)
    learner = Learner(
        config,
        config.rounds * config.updates,
        generator,
        state,
        policy=(policy, config.lr),
    )
    device = next(policy.parameters()).device
    pool = learner.state.get("pool", [])
    order = list(learner.state.get("order", []))  # of the answers still to be met
    drawn = learner.state.get("drawn", {})  # metrics of the round's draw

    for update in learner.remaining():
        round_, step = divmod(update, config.updates)
        if step == 0:
            # 1. draw
            asked, rollout = draw(
                policy,
                tokenizer,
                problems,
                round_,
                config,
                generator,
                chunk=config.chunk,
            )

            # 2. score
            rewards = score(
                reward, asked, rollout, tokenizer, config.truncated_reward
            )  # (B,)
            rewards = rewards.view(config.prompts, config.samples)  # (P, K)
            lengths = rollout.lengths().view_as(rewards)  # (P, K)
            drawn = answer_metrics(asked, rollout, rewards, tokenizer)
            drawn["unanswered"] = (
                (rewards <= config.threshold).all(1).float().mean().item()
            )
            drawn["round"] = round_ + 1
            drawn["completions"] = (round_ + 1) * rewards.numel()
            if reference is not None:
                kl = measured_kl(policy, reference, rollout)  # (B,)
                drawn["kl"] = kl.mean().item()

            # 3. compare
            kept = select(
                rewards, lengths, learner.data_order, config.threshold
            )  # (P, K)
            if kept.dtype != torch.bool or kept.shape != rewards.shape:
                raise ValueError(f"select: gave {kept}, must be bool (P, K)")
            answers = rollout.responses()
            new = []  # (prompt, response) of every answer that is kept
            kept_problems = []
            kept_texts = []
            for row in kept.flatten().nonzero()[:, 0].tolist():
                problem = asked[row // config.samples]
                new.append((tokenizer.encode_prompt(problem.question), answers[row]))
                kept_problems.append(problem)
                kept_texts.append(tokenizer.decode_response(answers[row]))
            pool = keep(pool, new)
            order = []
            shares = style_shares(kept_problems, kept_texts) if new else {}
            for name in [name for name in drawn if name.startswith("style_")]:
                drawn[f"kept_{name}"] = shares.get(name, 0.0)
            drawn["kept"] = len(new) / len(answers)
            drawn["pool"] = len(pool)

        # 4. update
        batch = []
        token_count = 0  # of the batch's responses
        while pool and token_count < config.batch_tokens:
            if not order:
                order = _shuffled(len(pool), learner.data_order).tolist()
            example = pool[order.pop()]
            batch.append(example)
            token_count += len(example[1])
        batch.sort(key=_length)  # alike in length side by side: little is padding
        sums = Sums()
        for first in range(0, len(batch), config.micro_batch):
            part = batch[first : first + config.micro_batch]
            tokens, mask = collate(part, tokenizer.pad_id)  # (b, t), (b, s)
            tokens = tokens.to(device)
            mask = mask.to(device)
            logprobs = token_logprobs(
                policy, tokens, mask, config.learning_temperature
            )  # (b, s)
            weights = logprobs.new_ones(len(part))  # (b,)
            loss = likelihood_loss(logprobs, weights, mask, count=token_count)
            learner.backward(loss, mask.sum())
            sums.add(loss=loss)
        learner.step()

        # 5. report
        learner.keep(pool=pool, order=list(order), drawn=drawn)
        yield {
            "update": update + 1,
            **drawn,
            "loss": 0.0,
            **sums.read(),
            **learner.report(),
        }
