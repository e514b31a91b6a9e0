"""RRHF: rank the answers to each problem by their likelihood as their rewards do.

Objective, for one problem x whose answers y_1 ... y_K earned r_1 ... r_K:

    L = L_rank + sft_weight · L_sft
    L_rank = Σ_{r_i < r_j} max(0, p_i − p_j),    p_i = log π(y_i | x) / |y_i|
    L_sft = −log π(y_best | x)

An answer that earned more shall be likelier per token, and the best is imitated.

Source: Yuan et al. 2023, arXiv 2304.05302, equations 1 to 4.

What changes from DPO: groups of answers instead of pairs, means over tokens instead of
sums, no reference, and a hinge instead of the logistic curve: a pair in the right order
is left alone, however small its lead. With rewards of 0 and 1 every pair is a right and
a wrong answer.

Details: the paper ranks answers of several sources that were drawn once; we draw from
the policy, anew in each round (`given` takes answers from elsewhere). The authors' code
(GanjinZero/RRHF, train.py) overwrites the labels that mark padding before it counts
them, so that every answer's length is the *padded* width, and its mean cross-entropy
has zeros for prompt and padding in it. We follow the paper, but for a mean over tokens
in L_sft. If nothing earned more than 0, the code imitates a wrong answer; we imitate
none, and count the problem as unanswered.

Lesson: lessons/33_rrhf.py

Card: RRHF (2304.05302)
    data: K answers to each problem, own or given
    policy: off within a draw
    comparison: every answer with another reward
    credit: answer, by its mean token
    reference: none
    loss: Σ_{r_i<r_j} max(0, p_i − p_j) − w s_best
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
    check_problems,
    check_reference,
    check_settings,
    check_shapes,
    check_some_live,
)
from minialign.evaluation import answer_metrics, measured_kl
from minialign.logprobs import (
    Count,
    masked_sum,
    normaliser,
    token_logprobs,
)
from minialign.model import GPT
from minialign.problems import Problem
from minialign.rewards import Reward, score
from minialign.sampling import Rollout
from minialign.tokenizer import Tokenizer
from minialign.training import (
    Learner,
    Sums,
    draw,
)

Likelihood = Callable[[Tensor, Tensor], Tensor]  # logprobs, mask (B, S) -> (B,)
Judged = tuple[Rollout, Tensor]  # K answers to each of P problems, rewards (P, K)


@dataclass(frozen=True)
class RRHFConfig:
    """Defaults: the headline run of 16,384 answers; lr and sft_weight: lesson 33."""

    rounds: int = 4  # draws, each followed by training
    prompts: int = 512  # problems per round
    samples: int = 8  # K, answers per problem, 2 or more
    updates: int = 32  # optimiser steps per round
    batch: int = 32  # problems per step, each with all its answers
    max_new_tokens: int = 128  # a longer answer is truncated, and counted
    truncated_reward: float = 0.0  # what a truncated answer earns
    threshold: float = 0.0  # an answer that earned no more is not imitated
    temperature: float = 1.0  # of sampling and of scoring: one number
    # The authors' code weighs L_rank instead: by 1 in its train.sh, and by 100 if
    # nothing is said. The paper's sum over tokens is a weight of some 28 here.
    sft_weight: float = 100.0  # of L_sft, a mean over tokens
    margin: float = 0.0  # by how much the better one must lead; 0: the paper's
    lr: float = 8e-4  # AdamW's peak
    warmup: int = 5  # updates of linear warm-up; then linear decay to 0 over the run
    max_grad_norm: float = 80.0  # a guard: 4 x the usual (see `Learner`)
    micro_batch: int = 64  # answers per backward pass, rounded to whole problems
    chunk: int = 128  # problems drawn at a time: bounds memory, and changes the draws


def summed_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """log π(y | x), a sum over tokens, as in DPO and SLiC.

    Shapes: logprobs, mask (B, S) -> (B,). Units: nats. Gradient: through logprobs, 1 at
    live slots. Raises: as `check_logprobs`; ValueError for a row without a live token,
    whose sum of 0 would beat all.
    """
    check_mask(mask)
    check_logprobs("logprobs", logprobs, mask)
    empty = ~mask.any(1)  # (B,)
    if empty.any():
        raise ValueError(f"mask: row {empty.int().argmax()} has no live token")
    return masked_sum(logprobs, mask)


def mean_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """p = log π(y | x) / |y|: the mean log-probability of a token, EOS included.

    Shapes: logprobs, mask (B, S) -> (B,). Units: nats per token. Gradient: through
    logprobs, 1 / |y| at live slots. Raises: as `summed_logprobs`.
    Source: Yuan et al. 2023, arXiv 2304.05302, equation 1.
    """
    return summed_logprobs(logprobs, mask) / mask.sum(1)


def ranking_loss(
    mean_logprobs: Tensor,
    rewards: Tensor,
    margin: float = 0.0,
    count: Count | None = None,
) -> Tensor:
    """L = 1/P Σ_problems Σ_{r_i < r_j} max(0, margin + p_i − p_j): a *sum* over pairs.

    It is 0 where every answer that earned more has a p that is higher by the margin.
    Answers with equal rewards make no pair.

    Shapes: mean_logprobs, rewards (P, K) -> (). Units: of the former. Reduction: mean
    over problems; `count` replaces P, so that micro-batches of whole problems add up.
    Gradient: through mean_logprobs: a violated pair gives +1/P to p_i, −1/P to p_j; at
    the hinge's kink it is 0.
    Raises: ValueError, TypeError for other shapes, not finite floats, a margin below 0.
    Source: Yuan et al. 2023, arXiv 2304.05302, equation 2; margin: SLiC-HF, arXiv
    2305.10425.
    """
    check_shapes(rewards=rewards, mean_logprobs=mean_logprobs)
    check_groups("rewards", rewards)
    check_groups("mean_logprobs", mean_logprobs)
    if not 0 <= margin < float("inf"):
        raise ValueError(f"margin: got {margin}, must be finite and 0 or more")
    pairs = rewards[:, :, None] < rewards[:, None, :]  # (P, K, K): r_i < r_j
    p_i = mean_logprobs[:, :, None]  # (P, K, 1)
    p_j = mean_logprobs[:, None, :]  # (P, 1, K)
    lacking = torch.where(pairs, margin + p_i - p_j, 0.0)  # (P, K, K)
    return torch.relu(lacking).sum() / normaliser(count, len(rewards))


def best_answers(rewards: Tensor, threshold: float = 0.0) -> Tensor:
    """The best answer to each problem, unless it earned no more than `threshold`.

    `threshold` is what failure earns, 0 in this course. Of equally good answers the
    first is taken: the policy's own come in no order, so that it is a random one.

    Shapes: (P, K) -> (P, K) bool. Raises: ValueError, TypeError as `check_groups`.
    """
    check_groups("rewards", rewards)
    best = F.one_hot(rewards.argmax(1), rewards.shape[1]).bool()  # (P, K)
    return best & (rewards > threshold)


def sft_loss(
    logprobs: Tensor,
    rewards: Tensor,
    mask: Tensor,
    count: Count | None = None,
    threshold: float = 0.0,
) -> Tensor:
    """L = −(1/N) Σ log π of the N tokens of the best answers; 0 where there is none.

    Shapes: logprobs, mask (B, S), problem by problem; rewards (P, K) -> ().
    Units: nats per token; `threshold` that of the rewards, as in `best_answers`.
    Reduction: token mean; `count` replaces N.
    Gradient: through logprobs. Raises: ValueError, TypeError as `check_logprobs`, for
    other than P * K rows.
    Source: Yuan et al. 2023, arXiv 2304.05302, equation 3, a sum over tokens; the
    authors' code averages.
    """
    check_mask(mask)
    check_logprobs("logprobs", logprobs, mask)
    check_shapes(rewards=rewards)
    check_shapes(**{"rows of mask": mask[:, 0], "rewards": rewards.flatten()})
    if count is None:
        check_some_live(mask)
    best = best_answers(rewards, threshold).flatten()  # (B,)
    live = mask & best[:, None]  # (B, S)
    total = -torch.where(live, logprobs, 0.0).sum()
    return total / normaliser(count, max(int(live.sum()), 1))


def rrhf_loss(
    logprobs: Tensor,
    rewards: Tensor,
    mask: Tensor,
    *,
    sft_weight: float = 1.0,
    margin: float = 0.0,
    likelihood: Likelihood = mean_logprobs,
    threshold: float = 0.0,
    counts: Sequence[Count | None] = (None, None),
) -> Tensor:
    """L = L_rank + sft_weight · L_sft.

    Shapes, units, raises: as `ranking_loss` and `sft_loss`. Reduction: `counts`, one
    for each of the two. Gradient: through logprobs only.
    Source: Yuan et al. 2023, arXiv 2304.05302, equation 4.
    """
    if not 0 <= sft_weight < float("inf"):
        raise ValueError(f"sft_weight: got {sft_weight}, must be finite and 0 or more")
    problems_count, tokens_count = counts
    imitation = sft_loss(logprobs, rewards, mask, tokens_count, threshold)
    p = likelihood(logprobs, mask).view_as(rewards)  # (P, K)
    ranking = ranking_loss(p, rewards, margin, problems_count)
    return ranking + sft_weight * imitation


def _check_given(rollout: Rollout, rewards: Tensor, temperature: float) -> None:
    """Given answers have a reward each, and are scored as they were drawn."""
    check_groups("given rewards", rewards, least=2)
    K = rollout.samples
    expected = (len(rollout.tokens) // K, K)
    if tuple(rewards.shape) != expected:
        raise ValueError(
            f"given: rewards have shape {tuple(rewards.shape)}, must be {expected}"
        )
    if rollout.temperature != temperature:
        raise ValueError(
            f"given: drawn at temperature {rollout.temperature}, "
            f"the config's is {temperature}"
        )


def _mean_over(x: Tensor, where: Tensor) -> float:
    """The mean of x where it is asked for, 0 if nowhere."""
    return (x[where].sum() / where.sum().clamp(min=1)).item()


def train(
    policy: GPT,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    reward: Reward,
    config: RRHFConfig,
    *,
    generator: torch.Generator,
    likelihood: Likelihood = mean_logprobs,
    given: Judged | None = None,
    reference: GPT | None = None,
    state: dict | None = None,
) -> Iterator[dict[str, float]]:
    """Train the policy in place; one dict of metrics per optimiser step.

    Round r asks problems[r * prompts : (r + 1) * prompts], from the start again when
    they run out. Steps take them `batch` problems at a time, in random order, anew when
    used up. With `given` answers nothing is drawn or scored: every round has these, and
    the settings of a draw do nothing.
    `generator` samples the answers. A `state` dict is complete at every yield, inside a
    round too, and continues a run when it is handed in again.

    Metrics: those of `Learner.report`, and

        update                steps so far
        round                 the round of this step, from 1
        completions           answers drawn so far

    of the draw, before it is learnt from (not with `given`): `answer_metrics`, and

        kl                    nats per answer, exact at each choice; only with a
                              reference

    of the step's answers, before it:

        loss                  ranking + sft_weight · sft
        ranking               the ranking loss
        sft                   nats per token of the best answers
        violated              share of pairs in the wrong order
        tied                  share of problems without a pair
        unanswered            share of problems with no reward above the threshold: none
                              of their answers is imitated
        mean_logprob_right    of answers above the threshold, what `likelihood` makes of
                              them; `mean_logprob_wrong` of the rest

    Raises: as `check_settings` and `rrhf_loss`; ValueError for no problems, prompts
    that are not whole batches, samples < 2 (unless `given`), a reference that shares
    the policy's weights, a gradient that is not finite.
    """
    check_settings(config)
    check_reference(policy, reference)
    if given is None:
        check_problems(problems)
        if config.samples < 2:
            raise ValueError(f"samples: got {config.samples}, a ranking needs K >= 2")
        if config.prompts % config.batch:
            raise ValueError(
                f"prompts: got {config.prompts}, no multiple of batch, {config.batch}"
            )
    else:
        given_rollout, given_rewards = given
        _check_given(given_rollout, given_rewards, config.temperature)
    learner = Learner(
        config,
        config.rounds * config.updates,
        generator,
        state,
        policy=(policy, config.lr),
    )
    device = next(policy.parameters()).device
    if learner.state:
        rollout = Rollout(**learner.state["rollout"]).to(device)
        rewards = learner.state["rewards"].to(device)  # (P, K)
    elif given is not None:
        rollout = given_rollout.to(device)
        rewards = given_rewards.to(device)  # (P, K)
    order = list(learner.state.get("order", []))  # of the batches still to be met
    drawn = learner.state.get("drawn", {})  # metrics of the round's draw

    for update in learner.remaining():
        round_, step = divmod(update, config.updates)
        if step == 0 and given is None:
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
            drawn = answer_metrics(asked, rollout, rewards, tokenizer)
            if reference is not None:
                kl = measured_kl(policy, reference, rollout)  # (B,)
                drawn["kl"] = kl.mean().item()
            order = []

        # 3. compare
        every_row = torch.arange(len(rollout.tokens), device=device)  # (B,)
        rows = every_row.view_as(rewards)  # (P, K)
        batches = rows.split(config.batch)  # each (p, K), p problems with all answers
        if not order:
            order = torch.randperm(len(batches), generator=learner.data_order).tolist()
        batch = batches[order.pop()]  # (p, K)
        earned = rewards.take(batch)  # (p, K)
        lengths = rollout.lengths()[batch]  # (p, K)
        best = best_answers(earned, config.threshold)  # (p, K)
        best_tokens = int(lengths[best].sum())

        # 4. update
        sums = Sums()
        ranked = torch.zeros_like(earned)  # (p, K), by what the answers are ranked
        total_lengths = rollout.prompt_lengths[batch] + lengths  # (p, K)
        alike = total_lengths.amax(1).argsort(stable=True)  # (p,), so little is padding
        for some in alike.split(max(config.micro_batch // batch.shape[1], 1)):
            part = rollout.select(batch[some].flatten())
            logprobs = token_logprobs(
                policy, part.tokens, part.mask, config.temperature
            )  # (b, s)
            # `rrhf_loss` in its two parts, for both are reported.
            p = likelihood(logprobs, part.mask).view_as(earned[some])
            ranking = ranking_loss(p, earned[some], config.margin, len(batch))
            imitation = sft_loss(
                logprobs,
                earned[some],
                part.mask,
                max(best_tokens, 1),
                config.threshold,
            )
            loss = ranking + config.sft_weight * imitation
            learner.backward(loss, part.mask.sum())
            sums.add(loss=loss, ranking=ranking, sft=imitation)
            ranked[some] = p.detach().to(ranked)
        learner.step()

        # 5. report
        learner.keep(
            rollout=vars(rollout), rewards=rewards, order=list(order), drawn=drawn
        )
        pairs = earned[:, :, None] < earned[:, None, :]  # (p, K, K)
        reversed_ = pairs & (ranked[:, :, None] > ranked[:, None, :])  # (p, K, K)
        right = earned > config.threshold  # (p, K)
        yield {
            "update": update + 1,
            "round": round_ + 1,
            **drawn,
            "completions": 0 if given else (round_ + 1) * rewards.numel(),
            **sums.read(),
            **learner.report(),
            "violated": (reversed_.sum() / pairs.sum().clamp(min=1)).item(),
            "tied": (~pairs.flatten(1).any(1)).float().mean().item(),
            "unanswered": (~right.any(1)).float().mean().item(),
            "mean_logprob_right": _mean_over(ranked, right),
            "mean_logprob_wrong": _mean_over(ranked, ~right),
        }
