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
rewards give exactly 0: such a group is *dead*, paid for and without a lesson, and we
count it. No ratio and no clip, as in the paper (TRL's trainer has both).

Lesson: lessons/13_rloo.py
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minialign.checks import (
    check_groups,
    check_logprobs,
    check_mask,
    check_reference,
    check_rows,
    check_settings,
    check_shapes,
)
from minialign.evaluation import answer_metrics
from minialign.logprobs import (
    kl_k1,
    masked_sum,
    sequence_sum,
    token_logprobs,
)
from minialign.model import GPT
from minialign.problems import Problem
from minialign.rewards import Reward, score
from minialign.sampling import generate, rescore
from minialign.tokenizer import Tokenizer

Compare = Callable[[Tensor], Tensor]  # rewards (P, K) -> advantages (P, K)


@dataclass(frozen=True)
class RlooConfig:
    """Defaults: a headline run of the course, 16,384 answers; lr: lesson 13."""

    updates: int = 64  # batches drawn, one optimiser step each
    prompts: int = 32  # P, problems per update
    samples: int = 8  # K, answers per problem, 2 or more
    max_new_tokens: int = 128  # longer answers are cut, earn 0 and are counted
    temperature: float = 1.0  # of sampling and of scoring: one number
    beta: float = 0.0  # reward paid per nat of KL; 0: no reference needed
    lr: float = 8e-4  # AdamW's peak
    warmup: int = 5  # updates of linear warm-up; then linear decay to 0
    max_grad_norm: float = 1.0  # gradients longer than this are scaled down
    micro_batch: int = 64  # answers per backward pass: bounds memory, not the result


def shape_rewards(
    rewards: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float
) -> Tensor:
    """R = r − β Σ_s k1[s]: the KL to the reference, paid out of the reward.

    Shapes: rewards (B,); logprobs, ref_logprobs, mask (B, S) -> (B,).
    Units: of the reward; beta in reward per nat. Gradient: none, R is a constant.
    Raises: ValueError, TypeError for a negative or non-finite beta, shapes that
    disagree, values that are not finite.
    Source: Ahmadian et al. 2024, arXiv 2402.14740, equation 3; properties PG-7.
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
    Source: Kool et al. 2019; Ahmadian et al. 2024; properties ADV-1 to ADV-3.
    """
    check_groups("rewards", rewards, least=2)
    distance = (rewards - rewards[:, :1]).detach()  # (P, K)
    others = (distance.sum(1, keepdim=True) - distance) / (rewards.shape[1] - 1)
    return distance - others  # (P, K)


def rloo_loss(
    logprobs: Tensor, advantages: Tensor, mask: Tensor, count: int | None = None
) -> Tensor:
    """L = −(1/B) Σ_b A_b Σ_s mask[b, s] logprobs[b, s]; −∇L is the policy gradient.

    Shapes: logprobs, mask (B, S); advantages (B,), B = P x K -> ().
    Units: reward x nats. Reduction: sequence sum / B; `count` replaces B, so that
    micro-batches add up to the batch.
    Gradient: through logprobs only.
    Raises: ValueError for shapes that disagree, (P, K) for (B,), no live token, values
    that are not finite, log-probabilities above 0; TypeError for a mask not bool.
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
    yield and continues a run when handed in again.

    Metrics: update, completions (answers drawn so far), reward (mean raw reward of
    this batch: sampled accuracy on fresh problems, before the step), dead (share of
    groups whose raw rewards are all equal: no signal), advantage_std (divisor B),
    truncated (share), length (tokens per answer), loss, grad_norm (before clipping), kl
    (nats per answer, mean k1 to the reference; only with one), style_<name> (shares).

    Raises: as `check_settings`; ValueError for samples < 2, beta > 0 without a
    reference, one that shares the policy's weights, no problems, advantages not (P, K),
    a gradient not finite.
    """
    check_settings(config)
    if config.samples < 2:
        raise ValueError(f"samples: got {config.samples}, leave-one-out needs K >= 2")
    needed = f"beta is {config.beta}" if config.beta > 0 else ""
    check_reference(policy, reference, needed)
    if not problems:
        raise ValueError("problems: got none, need at least one")
    state = {} if state is None else state
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.0)
    if state:
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
    device = next(policy.parameters()).device

    for update in range(state.get("update", 0), config.updates):
        # 1. draw
        first = update * config.prompts
        asked = [problems[(first + i) % len(problems)] for i in range(config.prompts)]
        rollout = generate(
            policy,
            [tokenizer.encode_prompt(problem.question) for problem in asked],
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            max_new_tokens=config.max_new_tokens,
            samples=config.samples,
            temperature=config.temperature,
            generator=generator,
        )

        # 2. score
        rewards = score(reward, asked, rollout, tokenizer).to(device)  # (B,)
        shaped, kl = rewards, {}
        if reference is not None:
            parts = rollout.micro_batches(config.micro_batch)
            ref_logprobs = rescore(reference, rollout, parts)  # (B, S)
            arguments = rollout.logprobs, ref_logprobs, rollout.mask
            shaped = shape_rewards(rewards, *arguments, config.beta)  # (B,)
            kl = {"kl": kl_k1(*arguments).sum(1).mean().item()}

        # 3. compare
        groups = shaped.view(config.prompts, config.samples)  # (P, K)
        advantages = compare(groups)  # (P, K)
        check_shapes(rewards=groups, advantages=advantages)
        advantages = advantages.flatten()  # (B,)
        raw = rewards.view_as(groups)  # (P, K)
        dead = (raw == raw[:, :1]).all(1).float().mean().item()

        # 4. update
        up = (update + 1) / max(config.warmup, 1)
        down = (config.updates - update) / max(config.updates - config.warmup, 1)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(up, down, 1.0)
        optimizer.zero_grad(set_to_none=True)
        policy.train()
        loss = 0.0
        for rows in rollout.micro_batches(config.micro_batch):
            part = rollout.select(rows)
            scored = policy, part.tokens, part.mask, config.temperature
            logprobs = token_logprobs(*scored)  # (b, s)
            piece = rloo_loss(logprobs, advantages[rows], part.mask, len(rewards))
            piece.backward()
            loss += piece.item()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        if not torch.isfinite(norm):
            raise ValueError(f"update {update}: gradient norm {norm}, loss {loss}")
        optimizer.step()

        # 5. report
        state["policy"] = policy.state_dict()
        state["optimizer"] = optimizer.state_dict()
        state["generator"] = generator.get_state()
        state["update"] = update + 1
        yield {
            "update": update + 1,
            "completions": (update + 1) * len(rewards),
            "dead": dead,
            "advantage_std": advantages.std(correction=0).item(),
            "loss": loss,
            "grad_norm": norm.item(),
            **kl,
            **answer_metrics(asked, rollout, rewards, tokenizer),
        }
