"""RRHF: rank the answers to each problem by their likelihood as their rewards do.

Objective, for one problem x whose answers y_1 ... y_K earned r_1 ... r_K: L = L_rank +
sft_weight · L_sft, with p_i = log π(y_i | x) / |y_i|, the *mean* over tokens,
L_rank = Σ_{r_i < r_j} max(0, p_i − p_j): who earned more shall be likelier per token,
L_sft = −log π(y_best | x): imitate the best.

Source: Yuan et al. 2023, arXiv 2304.05302, equations 1 to 4.

What changes from DPO: groups for pairs, means for sums, no reference, and a hinge for
the logistic curve: a pair in the right order is left alone, however small its lead.
With rewards 0 and 1 only pairs of a right and a wrong answer count: ties ask nothing.

The authors' code (GanjinZero/RRHF, train.py) overwrites the labels that mark padding
before counting them, so that the *padded* width is every answer's length; and its mean
cross-entropy has zeros for prompt and padding in it. We follow the paper, with a mean
over tokens in L_sft. Where no answer earned more than 0, the paper would imitate a
wrong one; we imitate none, and count the problem.

Lesson: lessons/33_rrhf.py
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from minialign.evaluation import measured_kl, style_shares
from minialign.logprobs import (
    check_live,
    check_logprobs,
    check_mask,
    check_shapes,
    masked_sum,
    token_logprobs,
)
from minialign.model import GPT
from minialign.problems import Problem
from minialign.rewards import Reward, score
from minialign.sampling import Rollout, generate
from minialign.tokenizer import Tokenizer

Scoring = Callable[[Tensor, Tensor], Tensor]  # logprobs, mask (B, S) -> (B,)
Judged = tuple[Rollout, Tensor]  # K answers to each of P problems, rewards (P, K)


@dataclass(frozen=True)
class RRHFConfig:
    """Defaults: the course's run of 16,384 answers; lr, sft_weight: lesson 33."""

    rounds: int = 4  # draws, each followed by training
    prompts: int = 512  # problems per round
    samples: int = 8  # answers per problem: K
    updates: int = 16  # optimiser steps per round
    batch: int = 32  # problems drawn, and learnt from, together
    max_new_tokens: int = 128  # longer answers are cut, earn 0 and are counted
    temperature: float = 1.0  # of sampling and of scoring: one number
    sft_weight: float = 100.0  # of imitating the best answer; 1: the paper's
    margin: float = 0.0  # by how much the better one must lead; 0: the paper's
    lr: float = 8e-4  # AdamW's peak
    warmup: int = 5  # updates of linear warm-up; then linear decay to 0 over the run
    max_grad_norm: float = 1.0  # gradients longer than this are scaled down
    micro_batch: int = 64  # answers per backward pass, rounded to whole problems


def summed_scores(logprobs: Tensor, mask: Tensor) -> Tensor:
    """log π(y | x), a sum, as in DPO and SLiC. Units: nats. Else as `scores`."""
    check_mask(mask)
    check_logprobs("logprobs", logprobs, mask)
    if not mask.any(1).all():
        raise ValueError(f"mask: row {mask.any(1).int().argmin()} has no live token")
    return masked_sum(logprobs, mask)


def scores(logprobs: Tensor, mask: Tensor) -> Tensor:
    """p = log π(y | x) / |y|: the mean log-probability of a token, EOS included.

    Shapes: logprobs, mask (B, S) -> (B,). Units: nats per token. Gradient: through
    logprobs, 1 / |y| at live slots. Raises: as `check_logprobs`; ValueError for a row
    without a live token, whose mean of 0 would beat all. Source: equation 1.
    """
    return summed_scores(logprobs, mask) / mask.sum(1)


def ranking_loss(
    scores: Tensor, rewards: Tensor, margin: float = 0.0, count: int | None = None
) -> Tensor:
    """What the scores lack to stand in the order of the rewards.

    L = (1/P) Σ_problems Σ_{r_i < r_j} max(0, margin + p_i − p_j): a *sum* over pairs.
    Equal rewards make no pair. At the hinge's kink the gradient is 0.

    Shapes: scores, rewards (P, K) -> (). Units: of the scores. Reduction: mean over
    problems; `count` replaces P, so that micro-batches of whole problems add up.
    Gradient: through scores: each violated pair gives +1/P to p_i, −1/P to p_j.
    Raises: ValueError, TypeError for other shapes, not finite floats, a margin below 0.
    Source: equation 2; the margin: SLiC-HF, arXiv 2305.10425.
    """
    _check_groups(rewards=rewards, scores=scores)
    _check_strength("margin", margin)
    gaps = margin + scores[:, :, None] - scores[:, None, :]  # (P, K, K): p_i − p_j
    lacking = torch.relu(torch.where(worse(rewards), gaps, 0.0))  # relu'(0) is 0
    return lacking.sum() / (len(scores) if count is None else count)


def worse(rewards: Tensor) -> Tensor:
    """True at [., i, j] where r_i < r_j. Shapes: (P, K) -> (P, K, K) bool."""
    return rewards[:, :, None] < rewards[:, None, :]


def best_answers(rewards: Tensor) -> Tensor:
    """The best of each problem, of equals the first; none if it earned 0 or less.

    Own answers come in no order: the first right one is a random right one.
    Shapes: (P, K) -> (P, K) bool.
    """
    return F.one_hot(rewards.argmax(1), rewards.shape[1]).bool() & (rewards > 0)


def sft_loss(
    logprobs: Tensor, rewards: Tensor, mask: Tensor, count: int | None = None
) -> Tensor:
    """L = −(1/N) Σ log π of the N tokens of the best answers; 0 where there is none.

    Shapes: logprobs, mask (P·K, S), problem by problem; rewards (P, K) -> (). Units:
    nats per token. Reduction: token mean; `count` replaces N. Gradient: through
    logprobs. Raises: ValueError, TypeError as `check_logprobs`, for other than P·K
    rows. Source: equation 3, a sum over tokens; the authors' code averages.
    """
    check_mask(mask)
    check_logprobs("logprobs", logprobs, mask)
    _check_groups(rewards=rewards)
    if len(mask) != rewards.numel():
        raise ValueError(f"rewards {tuple(rewards.shape)}: mask has {len(mask)} rows")
    live = mask & best_answers(rewards).flatten()[:, None]  # (P·K, S)
    total = -torch.where(live, logprobs, 0.0).sum()
    return total / (max(int(live.sum()), 1) if count is None else count)


def rrhf_loss(
    logprobs: Tensor, rewards: Tensor, mask: Tensor, *, sft_weight: float = 1.0,
    margin: float = 0.0, scoring: Scoring = scores, counts: Sequence = (None, None),
) -> Tensor:  # fmt: skip
    """L = L_rank + sft_weight · L_sft; `counts`, one for each. As these two else.

    Gradient: through logprobs only. Source: equation 4.
    """
    _check_strength("sft_weight", sft_weight)
    rewards = rewards.detach()
    sft = sft_loss(logprobs, rewards, mask, counts[1])
    points = scoring(logprobs, mask).view_as(rewards)  # (P, K)
    return ranking_loss(points, rewards, margin, counts[0]) + sft_weight * sft


def _check_groups(**groups: Tensor) -> None:
    check_shapes(**groups)
    for name, x in groups.items():
        if x.dim() != 2:
            raise ValueError(f"{name} must be (P, K), got shape {tuple(x.shape)}")
        check_live(name, x, torch.ones_like(x, dtype=torch.bool))


def _check_strength(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}: got {value}, must be finite and 0 or more")


def _moved(rollout: Rollout, device: torch.device) -> Rollout:
    parts = {k: x.to(device) for k, x in vars(rollout).items() if isinstance(x, Tensor)}
    return replace(rollout, **parts)


def train(
    policy: GPT, tokenizer: Tokenizer, problems: Sequence[Problem], reward: Reward,
    config: RRHFConfig, *, generator: torch.Generator, scoring: Scoring = scores,
    given: Sequence[Judged] = (), reference: GPT | None = None,
    state: dict | None = None,
) -> Iterator[dict[str, float]]:  # fmt: skip
    """Train the policy in place; one dict of metrics per optimiser step.

    Round r asks problems[r * prompts : (r + 1) * prompts], from the start again when
    they run out, `batch` at a time. Steps take these batches in random order, anew when
    used up. With `given` batches nothing is drawn or scored: every round has these. A
    `state` is complete at every yield, inside a round too, and continues a run.

    Metrics: update, round, completions (drawn so far); of the draw, before learning
    from it (not with `given`): reward (mean), truncated (share), length (tokens),
    style_<name> (shares), kl (nats, exact at each choice; with a reference); of the
    step, before it: loss, ranking, sft, grad_norm, violated (share of pairs), tied
    (share of problems without a pair), unanswered (share without an answer to imitate),
    score_right, score_wrong (mean score of answers above reward 0, and of the rest).

    Raises: ValueError for no problems, prompts that are not whole batches, a reference
    that shares the policy's weights, a gradient not finite; as `rrhf_loss`.
    """
    if not given and (not problems or config.prompts % config.batch):
        raise ValueError(f"{len(problems)} problems, {config}: none, or not in batches")
    ours = {p.data_ptr() for p in policy.parameters()}
    if reference and any(p.data_ptr() in ours for p in reference.parameters()):
        raise ValueError("reference: shares weights with the policy; pass a copy")
    state = {} if state is None else state
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.0)
    if state:
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
    home = next(policy.parameters()).device  # a loaded state lies on the CPU
    data = [(Rollout(**x), r) for x, r in state.get("data", [])] or list(given)
    data = [(_moved(rollout, home), r.to(home)) for rollout, r in data]
    order, drawn = list(state.get("order", [])), state.get("drawn", {})
    K, T, device = config.samples, config.temperature, generator.device
    steps = config.rounds * config.updates

    for update in range(state.get("update", 0), steps):
        turn, step = divmod(update, config.updates)
        if step == 0 and not given:
            data, order, drawn = [], [], {}
            wanted = range(turn * config.prompts, (turn + 1) * config.prompts)
            for i in range(0, config.prompts, config.batch):
                # 1. draw
                rows = wanted[i : i + config.batch]
                asked = [problems[j % len(problems)] for j in rows]
                rollout = generate(
                    policy, [tokenizer.encode_prompt(each.question) for each in asked],
                    eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, samples=K,
                    max_new_tokens=config.max_new_tokens, temperature=T,
                    generator=generator,
                )  # fmt: skip

                # 2. score
                rewards = score(reward, asked, rollout, tokenizer).view(-1, K)  # (P, K)
                data.append((rollout, rewards))
                texts = [tokenizer.decode_response(ids) for ids in rollout.responses()]
                means = style_shares([each for each in asked for _ in range(K)], texts)
                means["reward"] = rewards.mean().item()
                means["truncated"] = rollout.truncated.float().mean().item()
                means["length"] = rollout.lengths().float().mean().item()
                if reference:
                    nats = measured_kl(policy, reference, rollout)  # (B,)
                    means["kl"] = nats.mean().item()
                for name, mean in means.items():
                    share = config.batch / config.prompts
                    drawn[name] = drawn.get(name, 0.0) + share * mean

        # 3. compare
        if not order:
            lots = torch.rand(len(data), generator=generator, device=device)
            order = lots.argsort().tolist()
        rollout, rewards = data[order.pop()]
        P, K = rewards.shape  # given answers may be more than config.samples
        lengths = rollout.lengths().view_as(rewards)  # (P, K)
        tokens = int(lengths[best_answers(rewards)].sum())
        counts = P, max(tokens, 1)

        # 4. update
        up = (update + 1) / max(config.warmup, 1)
        down = (steps - update) / max(steps - config.warmup, 1)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(up, down, 1.0)
        optimizer.zero_grad(set_to_none=True)
        policy.train()
        loss, sft, points = 0.0, 0.0, torch.zeros_like(rewards)  # points: (P, K)
        ends = (rollout.prompt_lengths.view_as(rewards) + lengths).amax(1)  # (P,)
        for some in ends.argsort(stable=True).split(max(config.micro_batch // K, 1)):
            rows = (some[:, None] * K + torch.arange(K).to(some)).flatten()
            part, earned = rollout.select(rows), rewards[some]
            logprobs = token_logprobs(policy, part.tokens, part.mask, T)  # (b, s)
            piece = rrhf_loss(
                logprobs, earned, part.mask, sft_weight=config.sft_weight,
                margin=config.margin, scoring=scoring, counts=counts,
            )  # fmt: skip
            piece.backward()
            loss, logprobs = loss + piece.item(), logprobs.detach()
            sft += sft_loss(logprobs, earned, part.mask, counts[1]).item()
            points[some] = scoring(logprobs, part.mask).view_as(earned).to(points)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        if not torch.isfinite(norm):
            raise ValueError(f"update {update}: gradient norm {norm}, loss {loss}")
        optimizer.step()

        # 5. report
        pairs, right = worse(rewards), rewards > 0
        violated = pairs & (points[:, :, None] > points[:, None, :])  # (P, K, K)
        state["policy"] = policy.state_dict()
        state["optimizer"] = optimizer.state_dict()
        state["generator"] = generator.get_state()
        state["data"] = [[vars(rollout), rewards] for rollout, rewards in data]
        state |= {"order": list(order), "drawn": drawn, "update": update + 1}
        yield {
            "update": update + 1, "round": turn + 1, **drawn,
            "completions": 0 if given else (turn + 1) * config.prompts * K,
            "loss": loss, "sft": sft, "grad_norm": norm.item(),
            "ranking": ranking_loss(points, rewards, config.margin).item(),
            "violated": (violated.sum() / pairs.sum().clamp(min=1)).item(),
            "tied": (~pairs.flatten(1).any(1)).float().mean().item(),
            "unanswered": (~right.any(1)).float().mean().item(),
            "score_right": (points[right].sum() / right.sum().clamp(min=1)).item(),
            "score_wrong": (points[~right].sum() / (~right).sum().clamp(min=1)).item(),
        }  # fmt: skip
