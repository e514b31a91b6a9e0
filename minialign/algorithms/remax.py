"""ReMax: compare a sampled answer with the answer the policy would give greedily.

Objective: J(π) = E_x E_{y ~ π(·|x)} [ r(x, y) ] − β KL(π ‖ reference).
Gradient: ∇J = E[ (r(x, y) − r(x, greedy(x)) − β Σ_s k1[s]) ∇ log π(y | x) ], with
k1 = log π − log reference. The greedy answer takes the likeliest token at every step.
Its reward does not depend on the sampled answer, so it is a baseline like any other:
subtracting it leaves the mean of the gradient as it was.

Source: Li et al. 2023, arXiv 2310.10505: Σ_t ∇ log π_t times the sampled answer's
reward less the greedy one's, averaged over prompts; no discount, no critic, no ratio.

What changes from REINFORCE: the baseline knows the problem and rises with the policy.
The price is one more answer per problem, and no gradient where the two rewards tie.

Details: the KL of the whole answer comes out of its reward: that is the exact gradient.
The authors' code (liziniu/ReMax) discounts by 0.99 from the last token, clamps at ±5,
takes the mean over tokens, gives a token the KL of that token alone (its issue 4: there
is `=` where `+=` was meant), and samples with top-p 0.9 while it scores without.
`code_weights` does all of this except top-p.

Lesson: lessons/12_remax.py

Card: ReMax (2310.10505)
    data: own answers, and one greedy answer to each problem
    policy: on
    comparison: reward of the greedy answer
    credit: answer
    reference: k1 in the reward
    loss: −(r − r_greedy − β d) s
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minialign.checks import (
    check_groups,
    check_live,
    check_logprobs,
    check_mask,
    check_problems,
    check_reference,
    check_rows,
    check_settings,
    check_shapes,
    check_some_live,
)
from minialign.evaluation import answer_metrics
from minialign.logprobs import (
    Count,
    kl_k1,
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

Compare = Callable[[Tensor, Tensor], Tensor]  # as remax_advantages
Weigh = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # as whole_answer
GAMMA = 0.99  # the authors' discount, for `code_returns`
LARGEST_ADVANTAGE = 5.0  # theirs too: larger ones are clamped to it


@dataclass(frozen=True)
class RemaxConfig:
    """Defaults: the headline run of 16,384 answers; lr: lesson 12."""

    updates: int = 64  # batches drawn, one optimiser step each
    prompts: int = 128  # problems per update, each with one greedy answer besides
    samples: int = 1  # K, sampled answers per problem
    max_new_tokens: int = 128  # a longer answer is truncated, and counted
    truncated_reward: float = 0.0  # what a truncated answer earns
    temperature: float = 1.0  # of sampling and of scoring: one number
    beta: float = 0.0  # reward paid per nat of KL; 0: no reference needed
    lr: float = 4e-4  # AdamW's peak
    warmup: int = 5  # updates of linear warm-up; then linear decay to 0
    max_grad_norm: float = 14.0  # a guard: 4 x the usual (see `Learner`)
    micro_batch: int = 64  # answers per backward pass: bounds memory, not the result


def remax_advantages(rewards: Tensor, greedy_rewards: Tensor) -> Tensor:
    """A = r − r of the greedy answer to the same problem: exactly 0 where they tie.

    Shapes: rewards (prompts, K), greedy_rewards (prompts,) -> (prompts, K); K >= 1.
    Units: of the reward. Gradient: none. Raises: ValueError, TypeError.
    Source: Li et al. 2023, arXiv 2310.10505.
    """
    check_groups("rewards", rewards)
    first_column = {"rewards[:, 0]": rewards[:, 0]}
    check_shapes(**first_column, greedy_rewards=greedy_rewards)
    every = torch.ones_like(greedy_rewards, dtype=torch.bool)  # (P,)
    check_live("greedy_rewards", greedy_rewards, every)
    return rewards.detach() - greedy_rewards.detach()[:, None]


def whole_answer(advantages: Tensor, k1: Tensor, mask: Tensor, beta: float) -> Tensor:
    """A − β Σ_s k1[s] at every token: the answer is one action with one reward.

    Shapes: advantages (B,); k1, mask (B, S) -> (B, S), 0 at masked slots.
    Units: of the reward; beta in reward per nat. Gradient: none, it is a constant.
    Raises: ValueError for a beta below 0 and shapes or values of no use; TypeError.
    Source: InstructGPT, arXiv 2203.02155, equation 2, as the reward.
    """
    k1 = _check(advantages, k1, mask, beta)
    shaped = advantages.detach() - beta * k1.sum(1)  # (B,)
    return torch.where(mask, shaped[:, None], 0.0)


def code_returns(advantages: Tensor, k1: Tensor, mask: Tensor, beta: float) -> Tensor:
    """γ^n clamp(A, ±5) − β k1[s], n = live tokens from s to the end, s included.

    Biased: early tokens count less, large differences are clamped, and what a token
    does to the KL of later ones is missing.

    Shapes, units, gradient, raises: as `whole_answer`.
    Source: liziniu/ReMax, step3_rlhf_finetuning/remax_trainer.py, compute_returns.
    """
    k1 = _check(advantages, k1, mask, beta)
    to_end = mask.flip(1).cumsum(1).flip(1).to(k1)  # (B, S)
    clamped = advantages.detach().clamp(-LARGEST_ADVANTAGE, LARGEST_ADVANTAGE)  # (B,)
    return torch.where(mask, clamped[:, None] * GAMMA**to_end - beta * k1, 0.0)


def code_weights(advantages: Tensor, k1: Tensor, mask: Tensor, beta: float) -> Tensor:
    """`code_returns` x answers / tokens: `remax_loss` is then their token mean."""
    check_some_live(mask)
    returns = code_returns(advantages, k1, mask, beta)  # (B, S)
    return returns * mask.any(1).sum() / mask.sum()


def remax_loss(
    logprobs: Tensor, weights: Tensor, mask: Tensor, count: Count | None = None
) -> Tensor:
    """L = −(1/B) Σ_i Σ_s mask[i, s] weights[i, s] logprobs[i, s].

    Shapes: logprobs, weights, mask (B, S) -> (). Units: reward x nats.
    Reduction: sequence sum / B; `count` replaces B, so that micro-batches add up.
    Gradient: through logprobs only.
    Raises: as `check_mask`, `check_logprobs` and `check_live`.
    Source: Li et al. 2023, arXiv 2310.10505.
    """
    check_mask(mask)
    check_logprobs("logprobs", logprobs, mask)
    check_live("weights", weights, mask)
    weights = torch.where(mask, weights.detach(), 0.0)  # 0 x inf would give nan
    return -sequence_sum(logprobs * weights, mask, count)


def _check(advantages: Tensor, k1: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Refuse bad input; give k1 as a constant, 0 where masked."""
    if not 0 <= beta < float("inf"):
        raise ValueError(f"beta: got {beta}, must be finite and 0 or more")
    check_mask(mask)
    check_live("k1", k1, mask)
    check_rows("advantages", advantages, mask)
    return torch.where(mask, k1.detach(), 0.0)


def train(
    policy: GPT,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    reward: Reward,
    config: RemaxConfig,
    *,
    generator: torch.Generator,
    compare: Compare = remax_advantages,
    weigh: Weigh = whole_answer,
    greedy_policy: GPT | None = None,
    reference: GPT | None = None,
    state: dict | None = None,
) -> Iterator[dict[str, float]]:
    """Train the policy in place; one dict of metrics per update.

    Update u asks problems[u * prompts : (u + 1) * prompts], from the start again when
    they run out. `generator` samples the answers; the greedy ones are the policy's as
    it stands, or a `greedy_policy`'s. A `state` dict is complete at every yield and
    continues a run when it is handed in again.

    Metrics: those of `answer_metrics`, of the sampled answers before they are learnt
    from; those of `Learner.report`; and

        update              updates so far
        completions         answers drawn so far, greedy ones too
        greedy_reward       mean over the greedy answers
        greedy_truncated    share of the greedy answers that did not end
        ties                share of sampled answers whose advantage is 0
        loss                only its gradient matters
        kl                  nats per answer, mean k1; only with a reference

    Raises: as `check_settings`; ValueError for no problems, beta > 0 without a
    reference, one that shares the policy's weights, advantages or weights of another
    shape, a gradient that is not finite.
    """
    check_settings(config)
    check_problems(problems)
    needed = f"beta is {config.beta}" if config.beta > 0 else ""
    check_reference(policy, reference, needed)
    learner = Learner(
        config, config.updates, generator, state, policy=(policy, config.lr)
    )

    for update in learner.remaining():
        # 1. draw
        asked, rollout = draw(policy, tokenizer, problems, update, config, generator)
        _, greedy = draw(
            greedy_policy or policy,
            tokenizer,
            problems,
            update,
            config,
            None,
            greedy=True,
        )
        mask = rollout.mask  # (B, S)

        # 2. score
        rewards = score(
            reward, asked, rollout, tokenizer, config.truncated_reward
        )  # (B,)
        greedy_rewards = score(
            reward, asked, greedy, tokenizer, config.truncated_reward
        )  # (P,)
        old_logprobs, ref_logprobs = rescore_both(
            policy, reference, rollout, config.micro_batch
        )  # (B, S) each
        k1 = kl_k1(old_logprobs, ref_logprobs, mask)  # (B, S), 0 without a reference

        # 3. compare
        groups = rewards.view(config.prompts, config.samples)  # (P, K)
        advantages = compare(groups, greedy_rewards)  # (P, K)
        check_shapes(rewards=groups, advantages=advantages)
        weights = weigh(advantages.flatten(), k1, mask, config.beta)  # (B, S)
        check_shapes(mask=mask, weights=weights)

        # 4. update
        sums = Sums()
        for rows in rollout.micro_batches(config.micro_batch):
            part = rollout.select(rows)
            logprobs = token_logprobs(
                policy, part.tokens, part.mask, config.temperature
            )  # (b, s)
            width = part.mask.shape[1]  # these answers need no more columns
            part_weights = weights[rows, :width]  # (b, s)
            loss = remax_loss(logprobs, part_weights, part.mask, count=len(rewards))
            learner.backward(loss, part.mask.sum())
            sums.add(loss=loss)
        learner.step()

        # 5. report
        learner.keep()
        metrics = {
            "update": update + 1,
            "completions": (update + 1) * (len(rewards) + len(greedy_rewards)),
            "greedy_reward": greedy_rewards.mean().item(),
            "ties": (advantages == 0).float().mean().item(),
            "greedy_truncated": greedy.truncated.float().mean().item(),
            **sums.read(),
            **learner.report(),
            **answer_metrics(asked, rollout, rewards, tokenizer),
        }
        if reference is not None:
            kl = sampled_kl(old_logprobs, ref_logprobs, mask)  # (B,)
            metrics["kl"] = kl.mean().item()
        yield metrics
