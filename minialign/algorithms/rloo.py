"""RLOO: answers to the same problem are each other's baseline.

Objective: J(π) = E_x E_{y ~ π(·|x)} [ r(x, y) ] − β KL(π ‖ reference).
Gradient, from K answers to each problem: ∇J = E[ (1/K) Σ_i A_i ∇ log π(y_i | x) ],
A_i = R_i − mean of the other K − 1, with R = r − β log(π(y|x) / reference(y|x)) held
constant. The others' mean does not look at y_i: the gradient is exactly unbiased. Of
one problem, it is the sample covariance (divisor K − 1) of reward and ∇ log π.

Source: Kool et al. 2019 (ICLR workshop "Buy 4 REINFORCE samples, get a baseline for
free!"); for language models Ahmadian et al. 2024, arXiv 2402.14740.

What changes from ReMax: each problem still has a baseline of its own, but no greedy
answer is spent on it: the answers that are trained on serve each other.

Details: a mean with the answer itself in it gives (K − 1)/K of this gradient. K equal
rewards give exactly 0: such a group is *dead*, and we count it. With β = 0 it was paid
for and teaches nothing; with β > 0 its answers still differ in what KL they cost. No
ratio and no clip, as in the paper (TRL's trainer has both).

Lesson: lessons/13_rloo.py

Card: RLOO (2402.14740)
    data: K own answers to each problem
    policy: on
    comparison: mean of the other K − 1
    credit: answer
    reference: k1 in the reward
    loss: −(R_i − mean_{j≠i} R_j) s_i
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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
from minialign.evaluation import answer_metrics
from minialign.logprobs import (
    Count,
    kl_k1,
    masked_sum,
    sequence_sum,
    token_logprobs,
)
from minialign.model import GPT
from minialign.problems import Problem
from minialign.rewards import Reward, score
from minialign.tokenizer import Tokenizer
from minialign.training import (
    Learner,
    Sums,
    draw,
    rescore_both,
    sampled_kl,
)

Compare = Callable[[Tensor], Tensor]  # rewards (P, K) -> advantages (P, K)


@dataclass(frozen=True)
class RlooConfig:
    """Defaults: the headline run of 16,384 answers; lr: lesson 13."""

    updates: int = 64  # batches drawn, one optimiser step each
    prompts: int = 32  # P, problems per update
    samples: int = 8  # K, answers per problem, 2 or more
    max_new_tokens: int = 128  # a longer answer is truncated, and counted
    truncated_reward: float = 0.0  # what a truncated answer earns
    temperature: float = 1.0  # of sampling and of scoring: one number
    beta: float = 0.0  # reward paid per nat of KL; 0: no reference needed
    lr: float = 8e-4  # AdamW's peak
    warmup: int = 5  # updates of linear warm-up; then linear decay to 0
    max_grad_norm: float = 11.0  # a guard: 4 x the usual (see `Learner`)
    micro_batch: int = 64  # answers per backward pass: bounds memory, not the result


def shape_rewards(
    rewards: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float
) -> Tensor:
    """R = r − β Σ_s k1[s]: the KL to the reference, paid out of the reward.

    Shapes: rewards (B,); logprobs, ref_logprobs, mask (B, S) -> (B,).
    Units: of the reward; beta in reward per nat. Gradient: none, R is a constant.
    Raises: ValueError, TypeError for a negative or non-finite beta, shapes that
    disagree, values that are not finite.
    Source: Ahmadian et al. 2024, arXiv 2402.14740, equation 3.
    """
    if not 0 <= beta < float("inf"):
        raise ValueError(f"beta: got {beta}, must be finite and 0 or more")
    k1 = kl_k1(logprobs, ref_logprobs, mask).detach()  # (B, S)
    check_rows("rewards", rewards, mask)
    return rewards.detach() - beta * masked_sum(k1, mask)


def leave_one_out(rewards: Tensor) -> Tensor:
    """A_i = r_i − mean of the other K − 1 answers to the same problem.

    Equal rewards give exactly 0, in float32 too: what is averaged is the distance to
    the group's first answer. (Seven times 0.1 / 7 would not be 0.1.)

    Shapes: (P, K) -> (P, K). Units: of the reward; each row sums to 0.
    Gradient: none, the advantages are constants.
    Raises: ValueError for another shape, K < 2, values not finite; TypeError for ints.
    Source: Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740.
    """
    check_groups("rewards", rewards, least=2)
    distance = (rewards - rewards[:, :1]).detach()  # (P, K)
    others = (distance.sum(1, keepdim=True) - distance) / (rewards.shape[1] - 1)
    return distance - others  # (P, K)


def rloo_loss(
    logprobs: Tensor, advantages: Tensor, mask: Tensor, count: Count | None = None
) -> Tensor:
    """L = −(1/B) Σ_i A_i Σ_s mask[i, s] logprobs[i, s]; −∇L is the policy gradient.

    Shapes: logprobs, mask (B, S); advantages (B,), B = P x K -> ().
    Units: reward x nats. Reduction: sequence sum / B; `count` replaces B, so that
    micro-batches add up to the batch.
    Gradient: through logprobs only.
    Raises: ValueError for shapes that disagree, (P, K) for (B,), values that are not
    finite, log-probabilities above 0, no live token and no count; TypeError for a mask
    not bool.
    Source: Williams 1992; Ahmadian et al. 2024, arXiv 2402.14740, equation 6.
    """
    check_mask(mask)
    check_logprobs("logprobs", logprobs, mask)
    check_rows("advantages", advantages, mask)
    weighted = logprobs * advantages.detach()[:, None]  # (B, S)
    return -sequence_sum(weighted, mask, count)


def train(
    policy: GPT,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    reward: Reward,
    config: RlooConfig,
    *,
    generator: torch.Generator,
    compare: Compare = leave_one_out,
    reference: GPT | None = None,
    state: dict | None = None,
) -> Iterator[dict[str, float]]:
    """Train the policy in place; one dict of metrics per update.

    Update u asks problems[u * prompts : (u + 1) * prompts], from the start again when
    they run out. `generator` samples the answers. A `state` dict is complete at every
    yield and continues a run when it is handed in again.

    Metrics: those of `answer_metrics`, of the draw before it is learnt from; those of
    `Learner.report`; and

        update           updates so far
        completions      answers drawn so far
        dead             share of problems whose answers all earned the same reward;
                         at beta 0 they teach nothing, above it only their KL does
        advantage_std    over all answers, divisor B
        loss             only its gradient matters
        kl               nats per answer, mean k1; only with a reference

    Raises: as `check_settings`; ValueError for no problems, samples < 2, beta > 0
    without a reference, one that shares the policy's weights, advantages that are not
    (P, K), a gradient that is not finite.
    """
    check_settings(config)
    check_problems(problems)
    if config.samples < 2:
        raise ValueError(f"samples: got {config.samples}, leave-one-out needs K >= 2")
    needed = f"beta is {config.beta}" if config.beta > 0 else ""
    check_reference(policy, reference, needed)
    learner = Learner(
        config, config.updates, generator, state, policy=(policy, config.lr)
    )

    for update in learner.remaining():
        # 1. draw
        asked, rollout = draw(policy, tokenizer, problems, update, config, generator)
        mask = rollout.mask  # (B, S)

        # 2. score
        rewards = score(
            reward, asked, rollout, tokenizer, config.truncated_reward
        )  # (B,)
        old_logprobs, ref_logprobs = rescore_both(
            policy, reference, rollout, config.micro_batch
        )  # (B, S) each
        shaped = shape_rewards(
            rewards, old_logprobs, ref_logprobs, mask, config.beta
        )  # (B,)

        # 3. compare
        groups = shaped.view(config.prompts, config.samples)  # (P, K)
        advantages = compare(groups)  # (P, K)
        check_shapes(rewards=groups, advantages=advantages)
        advantages = advantages.flatten()  # (B,)

        # 4. update
        sums = Sums()
        for rows in rollout.micro_batches(config.micro_batch):
            part = rollout.select(rows)
            logprobs = token_logprobs(
                policy, part.tokens, part.mask, config.temperature
            )  # (b, s)
            loss = rloo_loss(logprobs, advantages[rows], part.mask, count=len(rewards))
            learner.backward(loss, part.mask.sum())
            sums.add(loss=loss)
        learner.step()

        # 5. report
        learner.keep()
        raw = rewards.view_as(groups)  # (P, K)
        equal = (raw == raw[:, :1]).all(1)  # (P,)
        metrics = {
            "update": update + 1,
            "completions": (update + 1) * len(rewards),
            "dead": equal.float().mean().item(),
            "advantage_std": advantages.std(correction=0).item(),
            **sums.read(),
            **learner.report(),
            **answer_metrics(asked, rollout, rewards, tokenizer),
        }
        if reference is not None:
            kl = sampled_kl(old_logprobs, ref_logprobs, mask)  # (B,)
            metrics["kl"] = kl.mean().item()
        yield metrics
