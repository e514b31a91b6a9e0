"""GRPO: an answer is worth what it earns beside other answers to its own problem.

Objective: π_old draws K answers y_i to each problem, whose advantages A_i compare them
within their group. Then a few steps ascend

    J(π) = Σ_i Σ_t w_it [ min(ρ_it A_i, clip(ρ_it, 1 − ε, 1 + ε) A_i) − β KL_it ],

with ρ_it = π(y_it) / π_old(y_it), given all tokens before, and w_it = 1 / (B |y_i|) or
another weight.

Source: Shao et al. 2024, arXiv 2402.03300, equations 3 and 4. The variants: Dr. GRPO,
Liu et al. 2025, arXiv 2503.20783; `per_token` and a wider upper clip, DAPO, arXiv
2503.14476.

What changes from RLOO: an answer is part of its own baseline. Advantages are divided by
the standard deviation of their group, and tokens by the length of their answer. And a
draw may serve several steps: ρ corrects for the policy's having moved on, and the clip
lets go of a token whose ρ has left 1 ± ε in the direction that A asked for. At ρ = 1,
`centred_advantages` with `by_constant` have the true gradient as their expectation,
times (K − 1) / (K max_new_tokens). Dividing by deviations and lengths turns it.

Details: the authors published no training code. The divisor K − 1 of the deviation, the
1e-4 that is added to it, and a β of 0 (paper: 0.04) are TRL's. TRL reduces by
`per_token` now, and we as the paper does.

Lesson: lessons/16_grpo.py

Card: GRPO (2402.03300)
    data: K own answers to each problem, several passes
    policy: near
    comparison: mean of the group, divided by its deviation
    credit: answer, shared among its n tokens
    reference: k3 in the loss
    loss: −(1/n) Σ_t [min(ρ_t A, clip(ρ_t, 1 ± ε) A) − β k3_t]

Card: Dr. GRPO (2503.20783)
    data: K own answers to each problem, several passes
    policy: near
    comparison: mean of the group
    credit: answer
    reference: usually none
    loss: as GRPO, with a constant for n
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from minialign.checks import (
    check_groups,
    check_logprobs,
    check_problems,
    check_reference,
    check_rows,
    check_settings,
    check_shapes,
    check_some_live,
    check_weights,
)
from minialign.evaluation import answer_metrics
from minialign.logprobs import (
    kl_k1,
    kl_k2,
    kl_k3,
    masked_sum,
    probability_ratio,
    sequence_mean,
    token_logprobs,
)
from minialign.model import GPT
from minialign.problems import Problem
from minialign.rewards import Reward, score
from minialign.sampling import rescore
from minialign.tokenizer import Tokenizer
from minialign.training import (
    Learner,
    Sums,
    deal,
    draw,
    sampled_kl,
)

Advantage = Callable[[Tensor], Tensor]  # rewards (P, K) -> (P, K)
Reduction = Callable[[Tensor, int], Tensor]  # mask, max_new_tokens -> weights (B, S)
KLTerm = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # as `k3_term`


@dataclass(frozen=True)
class GRPOConfig:
    """Defaults: the headline run of 16,384 answers; lr and epochs: lesson 16."""

    updates: int = 64  # batches drawn
    prompts: int = 32  # problems per update
    samples: int = 8  # K, answers per problem, 2 or more
    max_new_tokens: int = 128  # a longer answer is truncated, and counted
    truncated_reward: float = 0.0  # what a truncated answer earns
    temperature: float = 1.0  # of sampling and of scoring: one number
    epochs: int = 2  # passes over the update's answers; paper: 1
    minibatches: int = 1  # optimiser steps per pass, answers dealt anew for each pass
    eps_low: float = 0.2  # clip below 1 - eps_low; 1: never, for ratios are > 0; as PPO
    eps_high: float = 0.2  # clip above 1 + eps_high; inf: never
    beta: float = 0.0  # loss per unit of the KL term; 0: no reference needed
    lr: float = 8e-4  # AdamW's peak
    warmup: int = 5  # updates of linear warm-up; then linear decay to 0
    max_grad_norm: float = 2.5  # a guard: 4 x the usual, while groups are alive
    micro_batch: int = 64  # answers per backward pass: bounds memory, not the result


def centred_advantages(rewards: Tensor) -> Tensor:
    """A = r − mean of the group: (K − 1)/K of RLOO's.

    Shapes: (P, K) -> (P, K), exactly 0 for equal rewards. Units: of the reward.
    Gradient: none.
    Raises: ValueError for another rank, K < 2, values not finite; TypeError for ints.
    Source: Dr. GRPO, arXiv 2503.20783.
    """
    check_groups("rewards", rewards, least=2)
    # Seven times 0.1 in float32 has a mean that is not 0.1; seven times 0 has mean 0.
    shifted = (rewards - rewards[:, :1]).detach()  # (P, K)
    return shifted - shifted.mean(1, keepdim=True)


def group_advantages(rewards: Tensor, epsilon: float = 1e-4) -> Tensor:
    """A = (r − mean) / (std + epsilon), the std with divisor K − 1: GRPO's own.

    With rewards of 0 and 1, a problem that is solved with chance p has a mean |A| that
    goes as p (1 − p) for `centred_advantages`, and here, if K is large, as its square
    root: problems that are nearly always or nearly never solved count for more.

    Shapes, gradient, raises: as `centred_advantages`; ValueError for an epsilon below 0
    or not finite. Units: standard deviations.
    Source: Shao et al. 2024, arXiv 2402.03300, section 4.1.2; epsilon: TRL.
    """
    if not 0 <= epsilon < float("inf"):
        raise ValueError(f"epsilon: got {epsilon}, must be finite and 0 or more")
    centred = centred_advantages(rewards)  # (P, K)
    std = centred.std(1, keepdim=True)  # (P, 1)
    return torch.where(std > 0, centred / (std + epsilon), 0.0)


def per_sequence(mask: Tensor, max_new_tokens: int) -> Tensor:
    """w = 1 / (B |y_i|), the paper's: answers weigh the same, tokens of long ones less.

    Shapes: mask (B, S) -> (B, S) float64, 0 if masked; B: rows with live slots.

    Reduction: sequence mean. Gradient: none. Raises: as `check_some_live`.
    """
    check_some_live(mask)
    lengths = mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
    return mask.double() / lengths / mask.any(1).sum()


def by_constant(mask: Tensor, max_new_tokens: int) -> Tensor:
    """w = 1 / (B max_new_tokens), Dr. GRPO's: a divisor that no answer can change.

    Reduction: sequence sum / (B max_new_tokens). Gradient: none.
    Raises: as `check_some_live`.
    """
    check_some_live(mask)
    return mask.double() / mask.any(1).sum() / max_new_tokens


def per_token(mask: Tensor, max_new_tokens: int) -> Tensor:
    """w = 1 / live slots of the batch: every token weighs the same.

    That is DAPO's code. By its equation every group weighs the same, and every token
    within it.

    Reduction: token mean. Gradient: none. Raises: as `check_some_live`.
    """
    check_some_live(mask)
    return mask.double() / mask.sum()


def k1_term(logprobs: Tensor, old: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
    """k1: on fresh answers, as a loss, it has no expected gradient at all.

    That, and what is said of k2 and k3 below, holds with `by_constant`. A weight that
    looks at the answer changes it: with `per_sequence`, k1 at ratio 1 turns A into
    A − beta, and so pays for length. See minialign.logprobs for all three.
    """
    return kl_k1(logprobs, ref, mask)


def k2_term(logprobs: Tensor, old: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
    """k2: on fresh answers the gradient of each choice's own KL(π ‖ ref).

    On later passes over the same answers `kl_ratio_k3` has it.
    """
    return kl_k2(logprobs, ref, mask)


def k3_term(logprobs: Tensor, old: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
    """k3, the paper's: on fresh answers the gradient of each choice's KL(ref ‖ π)."""
    return kl_k3(logprobs, ref, mask)


def clipped_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
) -> Tensor:
    """−min(ρ A, clip(ρ, 1 − eps_low, 1 + eps_high) A) of each token.

    Shapes: advantages (B,), the rest (B, S) -> (B, S), 0 where masked. Units: of A.
    Reduction: none; `grpo_loss` has it. Gradient: through logprobs: −ρ A, 0
    where the clip binds: A > 0 and ρ > 1 + eps_high, or A < 0 and ρ < 1 − eps_low.
    Raises: ValueError for eps_low outside (0, 1], eps_high <= 0, log ρ > 80 nats,
    shapes that disagree, values not finite; TypeError for a mask not bool.
    Source: arXiv 2402.03300, equation 3; the clip: PPO, arXiv 1707.06347, equation 7.
    """
    if not 0 < eps_low <= 1:
        raise ValueError(f"eps_low: got {eps_low}, must be in (0, 1]")
    if not eps_high > 0:
        raise ValueError(f"eps_high: got {eps_high}, must be above 0")
    ratio = probability_ratio(logprobs, old_logprobs, mask)  # (B, S)
    check_rows("advantages", advantages, mask)
    A = torch.where(mask, advantages.detach()[:, None], 0.0)  # (B, S)
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)  # (B, S)
    return -torch.minimum(ratio * A, clipped * A)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    beta: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_term: KLTerm = k3_term,
) -> Tensor:
    """The whole loss: clipped choices and their KL, each with its weight in the batch.

        L = Σ_b Σ_s w[b, s] (−min(ρ A_b, clip(ρ, 1 − eps_low, 1 + eps_high) A_b)
                             + beta KL[b, s]),  ρ = π / π_old

    `weights` are those of a reduction over the *whole* batch, such as `per_token`: a
    micro-batch takes its own rows of them, and then the parts add up to the whole.

    Shapes: advantages (B,), the rest (B, S) -> (). Units: of A; beta: of A per nat.
    Reduction: Σ of `weights` times each choice, 0 where all is masked; None: sequence
        mean, which is that of `per_sequence`, the paper's.
    Gradient: through logprobs only: w (that of `clipped_loss` + beta · that of KL).
    Raises: as `clipped_loss` and `kl_term`; as `check_live` for weights; as
        `check_logprobs` for ref_logprobs, even at beta 0; ValueError for beta < 0 or
        not finite, beta > 0 without ref_logprobs, weights < 0, and for a mask without
        a live token where there are no weights.
    Source: arXiv 2402.03300, equation 3, which `weights` of None follows.
    """
    if not 0 <= beta < float("inf"):
        raise ValueError(f"beta: got {beta}, must be finite and 0 or more")
    per_choice = clipped_loss(
        logprobs, old_logprobs, advantages, mask, eps_low, eps_high
    )  # (B, S)
    if ref_logprobs is not None:
        check_logprobs("ref_logprobs", ref_logprobs, mask)
    elif beta > 0:
        raise ValueError(f"ref_logprobs: beta is {beta}, so they are needed")
    if beta > 0:
        kl = kl_term(logprobs, old_logprobs, ref_logprobs, mask)  # (B, S)
        per_choice = per_choice + beta * kl
    if weights is None:
        check_some_live(mask)
        return sequence_mean(per_choice, mask)
    check_weights("weights", weights, mask)  # of -w the clip would be no bound
    weights = torch.where(mask, weights.detach(), 0.0)  # 0 x inf would give nan
    return masked_sum(weights.to(per_choice.dtype) * per_choice, mask).sum()


def train(
    policy: GPT,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    reward: Reward,
    config: GRPOConfig,
    *,
    generator: torch.Generator,
    advantage: Advantage = group_advantages,
    reduction: Reduction = per_sequence,
    kl_term: KLTerm = k3_term,
    reference: GPT | None = None,
    state: dict | None = None,
) -> Iterator[dict[str, float]]:
    """Train the policy in place; one dict of metrics per update, that is per draw.

    Update u asks problems[u * prompts : (u + 1) * prompts], from the start again when
    they run out. `generator` samples the answers. A `state` dict is complete at every
    yield and continues a run when it is handed in again.

    Metrics: those of `answer_metrics`, of the draw before it is learnt from; those of
    `Learner.report`; and

        update           updates so far
        completions      answers drawn so far
        dead             share of problems whose answers all earned the same reward
        length_up        mean length of answers with A > 0; 0 if there is none
        length_down      mean length of answers with A < 0; 0 if there is none
        loss             mean over the steps
        clip_fraction    share of live tokens where the clip binds, mean over the steps
        approx_kl        KL(π_old ‖ π), nats per token, before the last step
        ratio_first      largest |ρ − 1| in the first step: 0
        kl               nats per answer, mean k1; only with a reference

    Raises: as `check_settings`; ValueError for no problems, samples < 2, more
    minibatches than answers, beta > 0 without a reference, one that shares the policy's
    weights, advantages that are not (P, K), a gradient that is not finite.
    """
    check_settings(config)
    check_problems(problems)
    needed = f"beta is {config.beta}" if config.beta > 0 else ""
    check_reference(policy, reference, needed)
    if config.samples < 2:
        raise ValueError(f"samples: got {config.samples}, a group needs K >= 2")
    answers = config.prompts * config.samples
    if config.minibatches > answers:
        raise ValueError(
            f"minibatches: got {config.minibatches}, must be 1 to {answers} answers"
        )
    learner = Learner(
        config, config.updates, generator, state, policy=(policy, config.lr)
    )

    for update in learner.remaining():
        # 1. draw
        asked, rollout = draw(policy, tokenizer, problems, update, config, generator)
        mask = rollout.mask  # (B, S)
        steps = deal(
            rollout,
            config.epochs,
            config.minibatches,
            config.micro_batch,
            learner.data_order,
        )

        # 2. score
        rewards = score(
            reward, asked, rollout, tokenizer, config.truncated_reward
        )  # (B,)
        first_epoch = steps[: config.minibatches]
        parts = list(chain.from_iterable(first_epoch))  # every row once
        old_logprobs = rescore(policy, rollout, parts)  # (B, S)
        if reference is not None:
            ref_logprobs = rescore(reference, rollout, parts)  # (B, S)

        # 3. compare
        groups = rewards.view(config.prompts, config.samples)  # (P, K)
        advantages = advantage(groups)  # (P, K)
        check_shapes(rewards=groups, advantages=advantages)
        A = advantages.flatten()  # (B,)

        # 4. update
        sums = Sums()
        ratio_first = torch.zeros((), device=mask.device)  # the largest |ρ − 1|
        for step, minibatch in enumerate(steps):
            live = mask[torch.cat(minibatch)]  # (M, S), a minibatch of M answers
            weights = reduction(live, config.max_new_tokens)  # (M, S)
            shares = weights.split(config.micro_batch)  # one for each micro-batch
            for rows, share in zip(minibatch, shares, strict=True):
                part = rollout.select(rows)
                width = part.mask.shape[1]  # these answers need no more columns
                logprobs = token_logprobs(
                    policy, part.tokens, part.mask, config.temperature
                )  # (b, s)
                old = old_logprobs[rows, :width]  # (b, s)
                ref = None
                if reference is not None:
                    ref = ref_logprobs[rows, :width]  # (b, s)
                loss = grpo_loss(
                    logprobs,
                    old,
                    A[rows],
                    part.mask,
                    share[:, :width],
                    eps_low=config.eps_low,
                    eps_high=config.eps_high,
                    beta=config.beta,
                    ref_logprobs=ref,
                    kl_term=kl_term,
                )
                learner.backward(loss, part.mask.sum())

                # For the report: how far has the policy moved since it drew?
                log_ratio = torch.where(part.mask, logprobs.detach() - old, 0.0)
                ratio = log_ratio.exp()  # (b, s), ρ; 1 at masked slots
                clipped = ratio.clamp(1 - config.eps_low, 1 + config.eps_high)
                flat = A[rows, None] * (ratio - clipped) > 0  # (b, s), the clip holds
                sums.add(
                    loss=loss.double() / len(steps),
                    clip_fraction=(flat.sum() / live.sum()).double() / len(steps),
                )
                if step == 0:  # no weight has moved yet
                    ratio_first = torch.maximum(ratio_first, (ratio - 1).abs().max())
                if step + 1 == len(steps):
                    k3 = torch.expm1(log_ratio) - log_ratio  # (b, s), of KL(π_old ‖ π)
                    sums.add(approx_kl=k3.sum() / live.sum())
            learner.step()

        # 5. report
        learner.keep()
        lengths = rollout.lengths().float().view_as(groups)  # (P, K)
        lengths_up = lengths[advantages > 0]
        lengths_down = lengths[advantages < 0]
        metrics = {
            "update": update + 1,
            "completions": (update + 1) * answers,
            "ratio_first": ratio_first.item(),
            **answer_metrics(asked, rollout, rewards, tokenizer),
            **sums.read(),
            **learner.report(),
            "length_up": lengths_up.sum().item() / max(len(lengths_up), 1),
            "length_down": lengths_down.sum().item() / max(len(lengths_down), 1),
            "dead": (groups == groups[:, :1]).all(1).float().mean().item(),
        }
        if reference is not None:
            kl = sampled_kl(old_logprobs, ref_logprobs, mask)  # (B,)
            metrics["kl"] = kl.mean().item()
        yield metrics
