"""REINFORCE: make what was rewarded more likely, by as much as it was rewarded.

Objective: J(π) = E_x E_{y ~ π(·|x)} [ r(x, y) ] − β KL(π ‖ reference).
Gradient: ∇J = E[ (R − b) ∇ log π(y | x) ], with R = r − β log(π(y|x) / reference(y|x))
held constant and any baseline b that does not look at y. The whole answer is one
action, so its log-probability is the *sum* over its tokens.

Source: Williams 1992 (Machine Learning 8, 229-256), section 4, baseline included; for
language models Ahmadian et al. 2024, arXiv 2402.14740, equations 3, 6 and 7.

What changes from SFT: the answers are the policy's own, and each is weighted by how
much better than b it did. A weight of 1 on given answers is SFT again.

Details: the batch mean includes the answer it is subtracted from, which multiplies the
expected gradient by (B − 1)/B and leaves its direction; RLOO repairs that, problem by
problem. We divide by the number of answers and never by their length, which keeps the
gradient unbiased.

Lesson: lessons/11_reinforce.py

Card: REINFORCE
    data: own answers
    policy: on
    comparison: none, running mean or batch mean
    credit: answer
    reference: k1 in the reward
    loss: −(R − b) s
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minialign.checks import (
    check_logprobs,
    check_mask,
    check_problems,
    check_reference,
    check_rows,
    check_settings,
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
from minialign.training import Learner, Sums, draw, rescore_both, sampled_kl

Baseline = Callable[[Tensor, float], Tensor]  # (rewards (B,), memory) -> () or (B,)


@dataclass(frozen=True)
class ReinforceConfig:
    """Defaults: the headline run of 16,384 answers; lr: lesson 11."""

    updates: int = 64  # batches drawn, one optimiser step each
    prompts: int = 32  # problems per update
    samples: int = 8  # K, answers per problem
    max_new_tokens: int = 128  # a longer answer is truncated, and counted
    truncated_reward: float = 0.0  # what a truncated answer earns
    temperature: float = 1.0  # of sampling and of scoring: one number
    beta: float = 0.0  # reward paid per nat of KL; 0: no reference needed
    lr: float = 8e-4  # AdamW's peak
    warmup: int = 5  # updates of linear warm-up; then linear decay to 0
    memory_decay: float = 0.8  # of `moving_average`'s memory; others have none
    max_grad_norm: float = 9.0  # a guard: 4 x the usual (see `Learner`)
    micro_batch: int = 64  # answers per backward pass: bounds memory, not the result


def no_baseline(rewards: Tensor, memory: float) -> Tensor:
    """b = 0: every rewarded answer is pushed up, none down. Shapes: (B,) -> ()."""
    return torch.zeros_like(rewards[0])


def moving_average(rewards: Tensor, memory: float) -> Tensor:
    """b = the moving average over *earlier* batches. Shapes: (B,) -> ().

    It has not seen this batch, so the gradient stays exactly unbiased. 0 at first.
    """
    return torch.full_like(rewards[0], memory)


def batch_mean(rewards: Tensor, memory: float) -> Tensor:
    """b = the mean over this batch. Shapes: (B,) -> ().

    Each answer is part of its own baseline: in expectation the gradient is (B − 1)/B
    of the true one, where answers are independent of each other given their prompts.
    """
    # From the first reward on: the mean of equal rewards is then one of them, exactly.
    return rewards[0] + (rewards - rewards[0]).mean()


def shape_rewards(
    rewards: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float
) -> Tensor:
    """R = r − β Σ_s k1[s]: the KL to the reference, paid out of the reward.

    Shapes: rewards (B,); logprobs, ref_logprobs, mask (B, S) -> (B,).
    Units: of the reward; beta in reward per nat. Gradient: none, R is a constant.
    Raises: ValueError, TypeError for a negative or non-finite beta, shapes that
    disagree, values that are not finite.
    Source: InstructGPT, arXiv 2203.02155, equation 2.
    """
    if not 0 <= beta < float("inf"):
        raise ValueError(f"beta: got {beta}, must be finite and 0 or more")
    k1 = kl_k1(logprobs, ref_logprobs, mask).detach()  # (B, S)
    check_rows("rewards", rewards, mask)
    return rewards.detach() - beta * masked_sum(k1, mask)


def reinforce_loss(
    logprobs: Tensor, advantages: Tensor, mask: Tensor, count: Count | None = None
) -> Tensor:
    """The loss whose negative gradient is the policy gradient.

    L = −(1/B) Σ_i A_i Σ_s mask[i, s] logprobs[i, s], A_i = R_i − b.

    Only its gradient matters: its value is no measure of progress. (Where A averages to
    0, it is minus the covariance of A and log π(y).)

    Shapes: logprobs, mask (B, S); advantages (B,) -> ().
    Units: reward x nats. Reduction: sequence sum / B; `count` replaces B, so that
    micro-batches add up to the batch.
    Gradient: through logprobs only.
    Raises: ValueError for shapes that disagree, (B, 1) for (B,), values that are not
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
    config: ReinforceConfig,
    *,
    generator: torch.Generator,
    baseline: Baseline = no_baseline,
    reference: GPT | None = None,
    state: dict | None = None,
) -> Iterator[dict[str, float]]:
    """Train the policy in place; one dict of metrics per update.

    Update u asks problems[u * prompts : (u + 1) * prompts], from the start again when
    they run out. `generator` samples the answers. A `state` dict is complete at every
    yield and continues a run when it is handed in again.

    Metrics: those of `answer_metrics`, of the draw before it is learnt from; those of
    `Learner.report`; and

        update         updates so far
        completions    answers drawn so far
        baseline       mean of b over the answers
        loss           only its gradient matters
        kl             nats per answer, mean k1; only with a reference

    Raises: as `check_settings`; ValueError for no problems, beta > 0 without a
    reference, one that shares the policy's weights, a baseline that is not () or (B,),
    a gradient that is not finite.
    """
    check_settings(config)
    check_problems(problems)
    needed = f"beta is {config.beta}" if config.beta > 0 else ""
    check_reference(policy, reference, needed)
    learner = Learner(
        config, config.updates, generator, state, policy=(policy, config.lr)
    )
    memory = learner.state.get("memory", 0.0)

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
        baselines = baseline(shaped, memory)  # () or (B,)
        if not isinstance(baselines, Tensor):
            raise TypeError(
                f"baseline: gave {type(baselines).__name__}, must be a tensor"
            )
        if baselines.dim() > 0 and baselines.shape != shaped.shape:
            raise ValueError(
                f"baseline: gave shape {tuple(baselines.shape)}, "
                f"must be () or {tuple(shaped.shape)}"
            )
        advantages = shaped - baselines  # (B,)
        mean = shaped.mean().item()
        if update == 0:
            memory = mean
        memory += (1 - config.memory_decay) * (mean - memory)

        # 4. update
        sums = Sums()
        for rows in rollout.micro_batches(config.micro_batch):
            part = rollout.select(rows)
            logprobs = token_logprobs(
                policy, part.tokens, part.mask, config.temperature
            )  # (b, s)
            loss = reinforce_loss(
                logprobs, advantages[rows], part.mask, count=len(rewards)
            )
            learner.backward(loss, part.mask.sum())
            sums.add(loss=loss)
        learner.step()

        # 5. report
        learner.keep(memory=memory)
        metrics = {
            "update": update + 1,
            "completions": (update + 1) * len(rewards),
            "baseline": baselines.mean().item(),
            **sums.read(),
            **learner.report(),
            **answer_metrics(asked, rollout, rewards, tokenizer),
        }
        if reference is not None:
            kl = sampled_kl(old_logprobs, ref_logprobs, mask)  # (B,)
            metrics["kl"] = kl.mean().item()
        yield metrics
