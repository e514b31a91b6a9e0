"""RRHF: rank the answers to each problem by their likelihood as their rewards do.

Objective, for one problem x whose answers y_1 ... y_K earned r_1 ... r_K: L = L_rank +
sft_weight · L_sft, with p_i = log π(y_i | x) / |y_i|, the *mean* over tokens,
L_rank = Σ_{r_i < r_j} max(0, p_i − p_j): who earned more shall be likelier per token,
L_sft = −log π(y_best | x): imitate the best.

Source: Yuan et al. 2023, arXiv 2304.05302, equations 1 to 4. What changes from DPO:
groups for pairs, means for sums, no reference, and a hinge for the logistic curve: a
pair in the right order is left alone, however small its lead. With rewards of 0 and 1
every pair is a right and a wrong answer. The authors' code (GanjinZero/RRHF, train.py)
overwrites the labels that mark padding before counting them: every answer's length is
the *padded* width; and its mean cross-entropy has zeros for prompt and padding in it.
We follow the paper, with a token mean in L_sft. If nothing earned above 0 it imitates a
wrong answer; we imitate none, and count it. Lesson: lessons/33_rrhf.py
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minialign.checks import (
    check_groups,
    check_logprobs,
    check_mask,
    check_reference,
    check_settings,
    check_shapes,
)
from minialign.evaluation import answer_metrics, measured_kl
from minialign.logprobs import (
    masked_sum,
    normaliser,
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
    samples: int = 8  # answers per problem: K, 2 or more
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


def ranking_loss(scores: Tensor, rewards: Tensor, margin: float = 0.0,
                 count: int | None = None) -> Tensor:  # fmt: skip
    """L = 1/P Σ_problems Σ_{r_i < r_j} max(0, margin + p_i − p_j): a *sum* over pairs.

    What the scores lack to stand in the order of the rewards: equal ones make no pair.
    Shapes: scores, rewards (P, K) -> (). Units: of the scores. Reduction: mean over
    problems; `count` replaces P, so that micro-batches of whole problems add up.
    Gradient: through scores: a violated pair gives +1/P to p_i, −1/P to p_j; at the
    hinge's kink it is 0. Raises: ValueError, TypeError for other shapes, not finite
    floats, a margin below 0. Source: equation 2; margin: SLiC-HF, arXiv 2305.10425.
    """
    check_shapes(rewards=rewards, scores=scores)
    check_groups("rewards", rewards)
    check_groups("scores", scores)
    if not 0 <= margin < float("inf"):
        raise ValueError(f"margin: got {margin}, must be finite and 0 or more")
    pairs = rewards[:, :, None] < rewards[:, None, :]  # (P, K, K): r_i < r_j
    gaps = torch.where(pairs, margin + scores[:, :, None] - scores[:, None, :], 0.0)
    return torch.relu(gaps).sum() / normaliser(count, len(scores))


def best_answers(rewards: Tensor) -> Tensor:
    """The best of each problem, of equals the first (own answers come in no order: a
    random one); none if it earned 0 or less. Shapes: (P, K) -> (P, K) bool."""
    return F.one_hot(rewards.argmax(1), rewards.shape[1]).bool() & (rewards > 0)


def sft_loss(logprobs: Tensor, rewards: Tensor, mask: Tensor,
             count: int | None = None) -> Tensor:  # fmt: skip
    """L = −(1/N) Σ log π of the N tokens of the best answers; 0 where there is none.

    Shapes: logprobs, mask (P·K, S), problem by problem; rewards (P, K) -> (). Units:
    nats per token. Reduction: token mean; `count` replaces N. Gradient: through
    logprobs. Raises: ValueError, TypeError as `check_logprobs`, for other than P·K
    rows. Source: equation 3, a sum over tokens; the authors' code averages.
    """
    check_mask(mask)
    check_logprobs("logprobs", logprobs, mask)
    check_shapes(rewards=rewards)
    check_shapes(**{"rows of mask": mask[:, 0], "rewards": rewards.flatten()})
    check_groups("rewards", rewards)
    live = mask & best_answers(rewards).flatten()[:, None]  # (P·K, S)
    total = -torch.where(live, logprobs, 0.0).sum()
    return total / normaliser(count, max(int(live.sum()), 1))


def rrhf_loss(
    logprobs: Tensor, rewards: Tensor, mask: Tensor, *, sft_weight: float = 1.0,
    margin: float = 0.0, scoring: Scoring = scores, counts: Sequence = (None, None),
) -> Tensor:  # fmt: skip
    """L = L_rank + sft_weight · L_sft; `counts`, one for each. As these two else.
    Gradient: through logprobs only. Source: equation 4."""
    if not 0 <= sft_weight < float("inf"):
        raise ValueError(f"sft_weight: got {sft_weight}, must be finite and 0 or more")
    sft = sft_loss(logprobs, rewards, mask, counts[1])
    points = scoring(logprobs, mask).view_as(rewards)  # (P, K)
    return ranking_loss(points, rewards, margin, counts[0]) + sft_weight * sft


def train(
    policy: GPT, tokenizer: Tokenizer, problems: Sequence[Problem], reward: Reward,
    config: RRHFConfig, *, generator: torch.Generator, scoring: Scoring = scores,
    given: Judged | None = None, reference: GPT | None = None, state: dict | None = None
) -> Iterator[dict[str, float]]:  # fmt: skip
    """Train the policy in place; one dict of metrics per optimiser step.

    Round r asks problems[r * prompts : (r + 1) * prompts], from the start again when
    they run out, `batch` at a time. Steps take these batches in random order, anew when
    used up. With `given` answers nothing is drawn or scored: every round has these. A
    `state` is complete at every yield, inside a round too, and continues a run.

    Metrics: update, round, completions (drawn so far); of the draw, before learning
    from it (not with `given`): those of `answer_metrics`, kl (nats, exact at each
    choice; with a reference); of the step, before it: loss, ranking, sft, grad_norm,
    violated (share of pairs), tied, unanswered (of problems: no pair, none to imitate),
    score_right, score_wrong (mean score of answers above reward 0, and of the rest).
    Raises: as `check_settings` and `rrhf_loss`; ValueError for no problems, not whole
    batches, samples < 2 (unless `given`); a reference that shares the policy's weights,
    a gradient not finite.
    """
    check_settings(config)
    K, T, steps = config.samples, config.temperature, config.rounds * config.updates
    if not given and (not problems or config.prompts % config.batch or K < 2):
        raise ValueError(f"{len(problems)} problems, {config}: none, ragged or K < 2")
    check_reference(policy, reference)
    state = {} if state is None else state
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.0)
    if state:
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
    home = next(policy.parameters()).device  # a loaded state lies on the CPU
    held = (Rollout(**state["rollout"]), state["rewards"]) if state else given
    rollout, rewards = (x.to(home) for x in held) if held else (None, None)
    order, drawn = list(state.get("order", [])), state.get("drawn", {})
    terms = dict(sft_weight=config.sft_weight, margin=config.margin, scoring=scoring)

    for update in range(state.get("update", 0), steps):
        turn, step = divmod(update, config.updates)
        if step == 0 and not given:
            # 1. draw
            wanted = range(turn * config.prompts, (turn + 1) * config.prompts)
            asked = [problems[i % len(problems)] for i in wanted]
            rollout = generate(
                policy, [tokenizer.encode_prompt(x.question) for x in asked], samples=K,
                eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, generator=generator,
                max_new_tokens=config.max_new_tokens, temperature=T, chunk=config.batch,
            )  # fmt: skip

            # 2. score
            rewards = score(reward, asked, rollout, tokenizer).view(-1, K)  # (P, K)
            order, drawn = [], answer_metrics(asked, rollout, rewards, tokenizer)
            if reference is not None:
                drawn["kl"] = measured_kl(policy, reference, rollout).mean().item()

        # 3. compare
        rows = torch.arange(len(rollout.tokens), device=home).view_as(rewards)  # (P, K)
        every = rows.split(config.batch)  # the round's batches
        if not order:
            lots = torch.rand(len(every), generator=generator, device=generator.device)
            order = lots.argsort().tolist()
        batch = every[order.pop()]  # (p, K)
        earned, lengths = rewards.take(batch), rollout.lengths()[batch]  # (p, K)
        counts = len(batch), max(int(lengths[best_answers(earned)].sum()), 1)

        # 4. update
        up = (update + 1) / max(config.warmup, 1)
        down = (steps - update) / max(steps - config.warmup, 1)
        optimizer.param_groups[0]["lr"] = config.lr * min(up, down, 1.0)
        optimizer.zero_grad(set_to_none=True)
        policy.train()
        loss, sft, points = 0.0, 0.0, torch.zeros_like(earned)  # points: (p, K)
        alike = (rollout.prompt_lengths[batch] + lengths).amax(1).argsort(stable=True)
        for some in alike.split(max(config.micro_batch // batch.shape[1], 1)):
            part, r = rollout.select(batch[some].flatten()), earned[some]
            logprobs = token_logprobs(policy, part.tokens, part.mask, T)  # (b, s)
            piece = rrhf_loss(logprobs, r, part.mask, counts=counts, **terms)
            piece.backward()
            loss, logprobs = loss + piece.item(), logprobs.detach()
            sft += sft_loss(logprobs, r, part.mask, counts[1]).item()
            points[some] = scoring(logprobs, part.mask).view_as(r).to(points)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        if not torch.isfinite(norm):
            raise ValueError(f"update {update}: gradient norm {norm}, loss {loss}")
        optimizer.step()

        # 5. report
        pairs, right = earned[:, :, None] < earned[:, None, :], earned > 0
        violated = pairs & (points[:, :, None] > points[:, None, :])  # (p, K, K)
        state |= {"policy": policy.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"generator": generator.get_state(), "order": order[:], "drawn": drawn}
        state |= {"rollout": vars(rollout), "rewards": rewards, "update": update + 1}
        yield {
            "update": update + 1, "round": turn + 1, **drawn,
            "completions": 0 if given else (turn + 1) * rewards.numel(),
            "loss": loss, "sft": sft, "grad_norm": norm.item(),
            "ranking": ranking_loss(points, earned, config.margin).item(),
            "violated": (violated.sum() / pairs.sum().clamp(min=1)).item(),
            "tied": (~pairs.flatten(1).any(1)).float().mean().item(),
            "unanswered": (~right.any(1)).float().mean().item(),
            "score_right": (points[right].sum() / right.sum().clamp(min=1)).item(),
            "score_wrong": (points[~right].sum() / (~right).sum().clamp(min=1)).item(),
        }  # fmt: skip
