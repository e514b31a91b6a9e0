"""GRPO: an answer is worth what it earns beside other answers to its own problem.

Objective: K answers y_i of π_old to each problem, advantages A_i within the group, and
J(π) = Σ_i Σ_t w_it [min(ρ_it A_i, clip(ρ_it, 1 − ε, 1 + ε) A_i) − β KL_it],
with ρ_it = π(y_it) / π_old(y_it) given all before, and w_it = 1 / (B |y_i|) or another.

Source: Shao et al. 2024, arXiv 2402.03300, equations 3 and 4; Dr. GRPO: Liu et al.
2025, arXiv 2503.20783; `per_token` and a wider upper clip: DAPO, arXiv 2503.14476.

What changes from RLOO: an answer is part of its own baseline, advantages are divided
by the group's std and tokens by their answer's length, and a batch may serve several
steps: ρ corrects for the policy's moving on, and the clip lets go of a token whose ρ
has left 1 ± ε the way its advantage pushed it.

Details: the authors published no training code. Their "std" we take as TRL does,
divisor K − 1 and 1e-4 added, and its beta 0 (paper: 0.04). TRL reduces by `per_token`
now, we as the paper. At ρ = 1, `centred_advantages` with `by_constant` expect the true
gradient times (K − 1) / (K max_new_tokens); std and lengths turn its direction.

Lesson: lessons/14_grpo.py
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minialign.evaluation import style_shares
from minialign.logprobs import (
    LARGEST_EXPONENT,
    check_live,
    check_logprobs,
    check_mask,
    check_rows,
    check_shapes,
    kl_k1,
    kl_k2,
    kl_k3,
    masked_sum,
    token_logprobs,
)
from minialign.model import GPT
from minialign.problems import Problem
from minialign.rewards import Reward, score
from minialign.sampling import Rollout, generate
from minialign.tokenizer import Tokenizer

Advantage = Callable[[Tensor], Tensor]  # rewards (P, K) -> (P, K)
Reduction = Callable[[Tensor, int], Tensor]  # mask, max_new_tokens -> weights (B, S)
KLTerm = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # as `k3_term`


@dataclass(frozen=True)
class GRPOConfig:
    """Defaults: a headline run of the course, 16,384 answers; lr: lesson 14."""

    updates: int = 64  # batches drawn
    prompts: int = 32  # problems per update
    samples: int = 8  # answers per problem, K >= 2
    max_new_tokens: int = 128  # longer answers are cut, earn 0 and are counted
    temperature: float = 1.0  # of sampling and of scoring: one number
    epochs: int = 2  # passes over the update's answers; paper: 1
    minibatches: int = 1  # optimiser steps per pass, answers dealt anew for each pass
    eps_low: float = 0.2  # clip below 1 - eps_low; 1: never, ratios are > 0; PPO's
    eps_high: float = 0.2  # clip above 1 + eps_high; 1e9: never
    beta: float = 0.0  # loss per unit of the KL term; 0: no reference needed
    lr: float = 8e-4  # AdamW's peak
    warmup: int = 5  # updates of linear warm-up; then linear decay to 0
    max_grad_norm: float = 1.0  # gradients longer than this are scaled down
    micro_batch: int = 64  # answers per backward pass: bounds memory, not the result


def centred_advantages(rewards: Tensor) -> Tensor:
    """A = r − mean of the group: (K − 1)/K of RLOO's; Dr. GRPO.

    Shapes: (P, K) -> (P, K), exactly 0 for equal rewards. Gradient: none.
    Raises: ValueError for another rank, K < 2, values not finite; TypeError for ints.
    """
    check_shapes(rewards=rewards)
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (P, K), K >= 2: got {tuple(rewards.shape)}")
    check_live("rewards", rewards, torch.ones_like(rewards, dtype=torch.bool))
    # Seven times 0.1 in float32 has a mean that is not 0.1; seven times 0 has mean 0.
    shifted = (rewards - rewards[:, :1]).detach()  # (P, K)
    return shifted - shifted.mean(1, keepdim=True)


def group_advantages(rewards: Tensor, epsilon: float = 1e-4) -> Tensor:
    """A = (r − mean) / (std + epsilon), std with divisor K − 1: GRPO's own.

    Of 0/1 rewards, for a large K: a problem's mean |A| goes as sqrt(p (1 − p)) of its
    chance p of success; that of `centred_advantages`, for any K, as p (1 − p).

    Shapes: (P, K) -> (P, K), exactly 0 for equal rewards. Gradient: none.
    Raises: as `centred_advantages`; ValueError for an epsilon negative or not finite.
    """
    if not 0 <= epsilon < float("inf"):
        raise ValueError(f"epsilon: got {epsilon}, must be finite and 0 or more")
    centred = centred_advantages(rewards)  # (P, K)
    std = centred.std(1, keepdim=True)  # (P, 1)
    return torch.where(std > 0, centred / (std + epsilon), 0.0)


def per_sequence(mask: Tensor, max_new_tokens: int) -> Tensor:
    """w = 1 / (B |y_i|), the paper's: answers weigh the same, tokens of long ones less.

    Shapes: mask (B, S) -> (B, S) float64, 0 if masked; B: rows with live slots.
    """
    lengths = mask.sum(1, keepdim=True)  # (B, 1)
    return mask.double() / lengths.clamp(min=1) / mask.any(1).sum()


def by_constant(mask: Tensor, max_new_tokens: int) -> Tensor:
    """w = 1 / (B max_new_tokens), Dr. GRPO's: a divisor that no answer can change."""
    return mask.double() / mask.any(1).sum() / max_new_tokens


def per_token(mask: Tensor, max_new_tokens: int) -> Tensor:
    """w = 1 / live slots of the batch, DAPO's: every token weighs the same."""
    return mask.double() / mask.sum()


def k1_term(logprobs: Tensor, old: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
    """k1: on fresh answers, as a loss, no expected gradient. See minialign.logprobs."""
    return kl_k1(logprobs, ref, mask)


def k2_term(logprobs: Tensor, old: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
    """k2: that of each choice's KL(π ‖ ref); on later passes `kl_ratio_k3` has it."""
    return kl_k2(logprobs, ref, mask)


def k3_term(logprobs: Tensor, old: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
    """k3, the paper's: on fresh answers that of each choice's own KL(ref ‖ π)."""
    return kl_k3(logprobs, ref, mask)


def probability_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """ρ = π / π_old, 1 where masked. Shapes: (B, S). Raises: where log ρ > 80 nats."""
    check_mask(mask)
    check_logprobs("logprobs", logprobs, mask)
    check_logprobs("old_logprobs", old_logprobs, mask)
    log_ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0.0)  # (B, S)
    if (most := log_ratio.max().item()) > LARGEST_EXPONENT:
        raise ValueError(f"logprobs - old_logprobs: got {most}, must be <= 80 nats")
    return log_ratio.exp()


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
    Reduction: none: sum it with weights made for the whole batch.
    Gradient: through logprobs only: −ρ A, but 0 where the clip binds: A > 0 and
    ρ > 1 + eps_high, or A < 0 and ρ < 1 − eps_low.
    Raises: ValueError for eps_low outside (0, 1], eps_high <= 0, log ρ > 80 nats,
    shapes that disagree, values not finite; TypeError for a mask not bool.
    Source: arXiv 2402.03300, equation 3; the clip: PPO, arXiv 1707.06347, equation 7.
    """
    if not (0 < eps_low <= 1 and eps_high > 0):
        got = f"got {eps_low} and {eps_high}"
        raise ValueError(f"eps_low, eps_high: {got}, must be in (0, 1] and positive")
    ratio = probability_ratio(logprobs, old_logprobs, mask)  # (B, S)
    check_rows("advantages", advantages, mask)
    A = torch.where(mask, advantages.detach()[:, None], 0.0)  # (B, S)
    return -torch.minimum(ratio * A, ratio.clamp(1 - eps_low, 1 + eps_high) * A)


@torch.no_grad()
def rescore(model: GPT, rollout: Rollout, parts: Iterable[Tensor]) -> Tensor:
    """Log-probs (B, S) as training computes them, in its own parts: the same bits."""
    logprobs = torch.zeros_like(rollout.logprobs)  # (B, S)
    for rows in parts:
        part = rollout.select(rows)
        scored = model, part.tokens, part.mask, rollout.temperature
        logprobs[rows, : part.mask.shape[1]] = token_logprobs(*scored)
    return logprobs


def deal(rollout: Rollout, config: GRPOConfig, dealer: torch.Generator) -> list:
    """For each optimiser step of all passes, the rows of each of its micro-batches."""
    order, steps = torch.arange(len(rollout.tokens), device=dealer.device), []
    for _ in range(config.epochs):
        if config.minibatches > 1:
            order = torch.randperm(len(order), generator=dealer, device=dealer.device)
        for rows in order.to(rollout.tokens.device).tensor_split(config.minibatches):
            parts = rollout.select(rows).micro_batches(config.micro_batch)
            steps.append([rows[part] for part in parts])
    return steps


def _check(config: GRPOConfig, policy: GPT, reference: GPT | None) -> None:
    if not 0 <= config.beta < float("inf"):
        raise ValueError(f"beta: got {config.beta}, must be finite and 0 or more")
    if config.beta > 0 and reference is None:
        raise ValueError(f"reference: beta is {config.beta}, so a reference is needed")
    if reference is not None:
        ours = {p.data_ptr() for p in policy.parameters()}
        if any(p.data_ptr() in ours for p in reference.parameters()):
            raise ValueError("reference: shares weights with the policy; pass a copy")
    B = config.prompts * config.samples
    for name, low, high in ("samples", 2, B), ("epochs", 1, 99), ("minibatches", 1, B):
        if not low <= (got := getattr(config, name)) <= high:
            raise ValueError(f"{name}: got {got}, must be {low} to {high}")


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
    they run out. `generator` samples the answers and deals them to minibatches. A
    `state` dict is complete at every yield and continues a run when handed in again.

    Metrics: update, completions (answers drawn so far), reward (mean of this batch),
    truncated (share), length (tokens per answer), length_up and length_down (of those
    with A > 0 and A < 0; 0 if there are none), dead (share of groups of equal rewards,
    which only the KL term moves), ratio_first (largest |ρ − 1| in the first step: 0),
    kl (nats per answer, mean k1 to the reference before the update; only with one),
    style_<name> (shares). Means over the update's steps: loss, grad_norm (before
    clipping), clip_fraction (share of live tokens where the clip binds).

    Raises: ValueError for a config out of range, beta > 0 without a reference, one that
    shares the policy's weights, no problems, advantages not (P, K), a gradient of inf.
    """
    _check(config, policy, reference)
    if not problems:
        raise ValueError("problems: got none, need at least one")
    state = {} if state is None else state
    low, high = config.eps_low, config.eps_high
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.0)
    if state:
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])

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
        rewards = score(reward, asked, rollout, tokenizer)  # (B,)
        steps = deal(rollout, config, generator)
        parts = [rows for step in steps[: config.minibatches] for rows in step]
        old_logprobs = rescore(policy, rollout, parts)  # (B, S)
        kl = {}
        if reference is not None:
            ref_logprobs = rescore(reference, rollout, parts)  # (B, S)
            k1 = kl_k1(old_logprobs, ref_logprobs, rollout.mask)  # (B, S)
            kl = {"kl": k1.sum(1).mean().item()}

        # 3. compare
        groups = rewards.view(config.prompts, config.samples)  # (P, K)
        advantages = advantage(groups)  # (P, K)
        check_shapes(rewards=groups, advantages=advantages)
        advantages = advantages.flatten()  # (B,)

        # 4. update
        up = (update + 1) / max(config.warmup, 1)
        down = (config.updates - update) / max(config.updates - config.warmup, 1)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(up, down, 1.0)
        policy.train()
        off, sums = [], dict.fromkeys(("loss", "grad_norm", "clip_fraction"), 0.0)
        for i, step in enumerate(steps):
            chosen = torch.cat(step)  # (M,) rows of this minibatch
            weights = torch.zeros_like(old_logprobs)  # (B, S)
            mask = rollout.mask[chosen]  # (M, S)
            weights[chosen] = reduction(mask, config.max_new_tokens).to(weights)
            optimizer.zero_grad(set_to_none=True)
            for rows in step:
                part = rollout.select(rows)
                at = rows, slice(part.mask.shape[1])  # these rows, as narrow as part
                scored = policy, part.tokens, part.mask, config.temperature
                logprobs = token_logprobs(*scored)  # (b, s)
                old, A = old_logprobs[at], advantages[rows]  # (b, s), (b,)
                losses = clipped_loss(logprobs, old, A, part.mask, low, high)  # (b, s)
                ratio = probability_ratio(logprobs.detach(), old, part.mask)  # (b, s)
                binds = losses > -ratio * A[:, None]  # (b, s)
                if config.beta > 0:
                    term = kl_term(logprobs, old, ref_logprobs[at], part.mask)  # (b, s)
                    losses = losses + config.beta * term
                loss = masked_sum(weights[at] * losses, part.mask).sum()
                loss.backward()
                sums["loss"] += loss.item() / len(steps)
                share = (binds & part.mask).sum() / mask.sum()
                sums["clip_fraction"] += share.item() / len(steps)
                if i == 0:
                    off.append((ratio - 1).abs().max().item())
            every = policy.parameters()
            norm = torch.nn.utils.clip_grad_norm_(every, config.max_grad_norm)
            if not torch.isfinite(norm):
                raise ValueError(f"update {update}: gradient norm {norm}, step {i}")
            sums["grad_norm"] += norm.item() / len(steps)
            optimizer.step()

        # 5. report
        texts = [tokenizer.decode_response(ids) for ids in rollout.responses()]
        repeated = [problem for problem in asked for _ in range(config.samples)]
        lengths = rollout.lengths().float()  # (B,)
        better, worse = lengths[advantages > 0], lengths[advantages < 0]
        state["policy"] = policy.state_dict()
        state["optimizer"] = optimizer.state_dict()
        state["generator"] = generator.get_state()
        state["update"] = update + 1
        yield {
            "update": update + 1,
            "completions": (update + 1) * len(rewards),
            "reward": rewards.mean().item(),
            "truncated": rollout.truncated.float().mean().item(),
            "length": lengths.mean().item(),
            "length_up": better.sum().item() / max(len(better), 1),
            "length_down": worse.sum().item() / max(len(worse), 1),
            "dead": (groups == groups[:, :1]).all(1).float().mean().item(),
            "ratio_first": max(off),
            **sums,
            **kl,
            **style_shares(repeated, texts),
        }
