"""PPO: several careful steps on the same answers, judged token by token by a critic.

Objective: J(π) = E_x E_{y ~ π(·|x)} [ r(x, y) ] − β KL(π ‖ reference), approached in
rounds. π_old draws answers; then a few steps ascend

    E[ min( ρ A, clip(ρ, 1 − ε, 1 + ε) A ) ],    ρ = π / π_old of each token.

A *critic* guesses, before each token, what the answer will still earn: the *value* V.
The *advantage* A of a token compares what came after it with that guess; the loss takes
it *whitened*, shifted and scaled to mean 0 and deviation 1 over the draw. The KL to the
*reference*, a frozen model, is paid inside the rewards, token by token. The *clip* lets
more than one step be taken on the same answers: a token whose ratio ρ has moved out of
1 ± ε in the direction that A asked for has no slope of its own any more. That is no
bound on how far it moves, since other tokens and the optimiser's momentum still move
it.

Source: Schulman et al. 2017, arXiv 1707.06347, equation 7.

What changes from REINFORCE: every token has a baseline of its own, and a draw serves
several steps. With one step a draw, values of 0, β = 0, no whitening, and γ = λ = 1 (no
discount, and nothing but what was earned counts) it is REINFORCE without a baseline,
exactly.

Details: whitening and the clip of values are in no equation. They follow "The N+
Implementation Details of RLHF with PPO" (*N-details* below: arXiv 2403.17031). We
differ from it in three things. It takes token means, we sum over an answer and divide
by the number of answers. Its Adam has an epsilon of 1e-5, ours torch's 1e-8. Its
answers that do not end earn -1, ours `truncated_reward`.

A *pretraining mix* adds γ E_D[ log π(y|x) ] to the objective: beside every step of
reinforcement the policy imitates some texts D that it knew before (PPO-ptx of
InstructGPT, arXiv 2203.02155, equation 2; there D is text from the web, here D are
answers to prompts).

Lesson: lessons/15_ppo.py; with a learned reward and the mix, lessons/22_rlhf.py

Card: PPO (1707.06347)
    data: own answers, several passes
    policy: near
    comparison: a critic V, by GAE
    credit: token
    reference: k1 in each token's reward
    loss: −Σ_t min(ρ_t A_t, clip(ρ_t, 1 ± ε) A_t) + c Σ_t (V_t − R_t)²

Card: PPO-ptx (2203.02155)
    data: own answers, several passes; and texts to imitate
    policy: near
    comparison: a critic V, by GAE
    credit: token
    reference: k1 in each token's reward
    loss: as PPO, − γ log π(text)
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from minialign.checks import (
    check_apart,
    check_live,
    check_logits,
    check_logprobs,
    check_mask,
    check_problems,
    check_reference,
    check_rows,
    check_settings,
    check_some_live,
    check_temperature,
    check_tokens,
)
from minialign.evaluation import answer_metrics
from minialign.logprobs import (
    Count,
    at_least_float32,
    kl_k1,
    probability_ratio,
    sequence_sum,
    token_logprobs,
    token_mean,
)
from minialign.model import GPT, ScalarHead
from minialign.problems import Problem
from minialign.rewards import Reward, score
from minialign.sampling import Rollout, collate, rescore
from minialign.tokenizer import Tokenizer
from minialign.training import (
    Learner,
    Sums,
    deal,
    draw,
    sampled_kl,
)


@dataclass(frozen=True)
class PPOConfig:
    """Defaults: a headline run of 16,384 answers; lr: lesson 15. In [brackets]: what
    N-details has."""

    updates: int = 64  # batches drawn
    prompts: int = 32  # problems per update
    samples: int = 8  # K, answers per problem
    max_new_tokens: int = 128  # a longer answer is truncated, and counted
    truncated_reward: float = 0.0  # what a truncated answer earns
    temperature: float = 1.0  # of sampling and of scoring: one number [0.7]
    beta: float = 0.0  # reward paid per nat of KL; 0: no reference needed [0.05]
    epochs: int = 4  # times each answer is used [4]
    minibatches: int = 1  # optimiser steps per epoch [1]
    eps_low: float = 0.2  # clip below 1 - eps_low; 1: never, for ratios are > 0 [0.2]
    eps_high: float = 0.2  # clip above 1 + eps_high; inf: never [0.2]
    value_clip: float | None = 0.2  # reward units from the old value; None: off [0.2]
    kl_stop: float | None = 0.05  # nats per token since the draw; None: never [None]
    gamma: float = 1.0  # discount per token [1]
    lam: float = 0.95  # 1: A is what was earned less V; 0: one token, then the next V
    value_coef: float = 0.1  # weight of the critic's token mean beside the policy's
    #  sequence sums, for a shared trunk [0.1, beside token means: weighs more there]
    entropy_coef: float = 0.0  # bonus for the mean entropy per token, nats [0]
    lr: float = 4e-4  # AdamW's peak, policy [3e-6, for 1 billion weights]
    critic_lr: float = 1e-3  # AdamW's peak, critic [the policy's]
    warmup: int = 5  # updates of linear warm-up; then linear decay to 0
    max_grad_norm: float = 25.0  # a guard, each model apart: 4 x the usual (`Learner`)
    micro_batch: int = 32  # answers per backward pass: bounds memory, not the result


@dataclass(frozen=True)
class PretrainingMix:
    """Texts that the policy keeps imitating beside what it is rewarded for."""

    examples: Sequence[tuple[list[int], list[int]]]  # (prompt, response) as token ids,
    #  taken in this order, and from the start again
    weight: float = 1.0  # γ: reward that a nat of an example is worth
    batch: int = 64  # examples in a step

    def __post_init__(self) -> None:
        if not self.examples:
            raise ValueError("examples: got none, need at least one")
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight: got {self.weight}, must be finite and 0 or more")
        if self.batch < 1:
            raise ValueError(f"batch: got {self.batch}, must be 1 or more")

    def take(self, start: int) -> list[tuple[list[int], list[int]]]:
        """The examples of one step, of which number `start` is the first."""
        count = len(self.examples)
        return [self.examples[(start + i) % count] for i in range(self.batch)]


class Critic(nn.Module):
    """Values of every prefix, by a network of its own or by a head on the policy's.

    Its own network is at first a copy of the policy without the last layer: it judges
    words and writes none. `shared` puts a head on the policy's hidden states instead,
    and then the critic's loss moves the policy too. Every value is 0 at first,
    so that the first advantages are the rewards to come, faded by γλ a token.

    Shapes: inputs (B, S), the policy's hidden states of them (B, S, D) -> (B, S).
    """

    def __init__(self, policy: GPT, shared: bool = False) -> None:
        super().__init__()
        self.trunk = None
        if not shared:
            self.trunk = copy.deepcopy(policy).requires_grad_(True)
            self.trunk.lm_head = None
        self.head = ScalarHead(policy.config.dim).to(next(policy.parameters()))

    def forward(self, inputs: Tensor, hidden: Tensor) -> Tensor:
        if self.trunk is not None:
            hidden = self.trunk(inputs)  # (B, S, D)
        return self.head(hidden)  # (B, S)


def score_tokens(
    policy: GPT, critic: nn.Module, tokens: Tensor, mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What policy and critic say of every choice: logprobs, values, entropies.

    Slot s is about the choice of tokens[:, s + 1], and there are S = T - 1 of them.
    `mask` is True at the *live* ones: the answer's tokens, its end included, and not
    the prompt's or the padding. All three are read off hidden state s, which has seen
    tokens[:, ..s]: the log-probability of the choice, the value *before* it, and the
    entropy of the choice over all words.

    Shapes: tokens (B, T), mask (B, S) -> three of (B, S), 0 at masked slots.
    Units: nats; of the reward; nats. Half precision is lifted to float32.
    Gradient: through both models. Raises: ValueError, TypeError as `token_logprobs`.
    """
    check_tokens(policy, tokens, mask)
    check_temperature(temperature)
    inputs = tokens[:, :-1]  # (B, S)
    rows, slots = mask.nonzero(as_tuple=True)  # (L,) each, of the L live tokens
    hidden = policy(inputs)  # (B, S, D)
    logits = at_least_float32(policy.logits(hidden[rows, slots]))  # (L, V)
    values = at_least_float32(critic(inputs, hidden)[rows, slots])  # (L,)
    check_logits("logits", logits)
    every = torch.log_softmax(logits / temperature, dim=-1)  # (L, V)
    targets = tokens[rows, slots + 1]  # (L,)
    logprobs = every.gather(1, targets[:, None])[:, 0]  # (L,)
    entropies = -(every.exp() * every).sum(1)  # (L,)
    places = (rows, slots)
    zeros = logprobs.new_zeros(mask.shape)  # (B, S)
    return (
        zeros.index_put(places, logprobs),
        zeros.index_put(places, values),
        zeros.index_put(places, entropies),
    )


@torch.no_grad()
def score_answers(
    policy: GPT, critic: nn.Module, rollout: Rollout, parts: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """log π_old and V_old of every choice, before the first step.

    Computed in the micro-batches of the first epoch, `parts`, and not taken from the
    sampler, whose numbers differ by rounding: so they are the same bits as in the first
    step, whose ratio is then exactly 1.

    Shapes: parts: rows, together all B -> two of (B, S), 0 where masked.
    Gradient: none.
    """
    old_logprobs = torch.zeros_like(rollout.logprobs)  # (B, S)
    old_values = torch.zeros_like(rollout.logprobs)  # (B, S)
    for rows in parts:
        part = rollout.select(rows)
        width = part.mask.shape[1]  # these answers need no more columns
        logprobs, values, _ = score_tokens(
            policy, critic, part.tokens, part.mask, rollout.temperature
        )  # (b, s) each
        old_logprobs[rows, :width] = logprobs.to(old_logprobs)
        old_values[rows, :width] = values.to(old_values)
    return old_logprobs, old_values


def shape_token_rewards(
    rewards: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float
) -> Tensor:
    """−β k1 on every live token, and the answer's reward on the last of them.

    k1 = log π − log π_ref. The last is EOS, unless the answer was cut.

    Shapes: rewards (B,), the others (B, S) -> (B, S), 0 at masked slots.
    Units: of the reward; beta in reward per nat. Gradient: none.
    Raises: ValueError, TypeError; every row must have a live token.
    Source: InstructGPT, arXiv 2203.02155, equation 2.
    """
    _require(0 <= beta < float("inf"), "beta", beta, "finite and 0 or more")
    k1 = kl_k1(logprobs, ref_logprobs, mask).detach()  # (B, S)
    check_rows("rewards", rewards, mask)
    _require(bool(mask.any(1).all()), "mask", "an empty row", "live in every row")
    still_to_come = mask.flip(1).cumsum(1).flip(1)  # (B, S), this token included
    last = mask & (still_to_come == 1)  # (B, S)
    return torch.where(last, rewards.detach()[:, None], 0.0) - beta * k1


def gae(
    token_rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> Tensor:
    """How much better it went after each token than the critic had guessed.

    Generalised advantage estimation. With t counting the live tokens of an answer, r
    the token rewards, and V_t the value before token t,

        δ_t = r_t + γ V_{t+1} − V_t        the surprise of one token
        A_t = δ_t + γ λ A_{t+1}            it, and a fading share of the later ones

    After the last token V = A = 0, in truncated answers too: they have earned what they
    have earned, and no guess takes its place. A masked slot between two live ones is
    skipped.

    Shapes: all (B, S) -> (B, S), 0 at masked slots. Units: of the reward.
    Gradient: none. Raises: ValueError for a gamma or lam outside [0, 1], TypeError.
    Source: Schulman et al. 2015, arXiv 1506.02438, equation 16.
    """
    _require(0 <= gamma <= 1, "gamma", gamma, "in [0, 1]")
    _require(0 <= lam <= 1, "lam", lam, "in [0, 1]")
    check_mask(mask)
    r = _live("token_rewards", token_rewards, mask).detach()  # (B, S)
    v = _live("values", values, mask).detach()  # (B, S)
    advantages = torch.zeros_like(r)  # (B, S)
    next_value = torch.zeros_like(r[:, 0])  # (B,), of the live token after this one
    next_advantage = torch.zeros_like(r[:, 0])  # (B,)
    for s in reversed(range(mask.shape[1])):
        live = mask[:, s]  # (B,)
        surprise = r[:, s] + gamma * next_value - v[:, s]  # (B,)
        advantage = surprise + gamma * lam * next_advantage  # (B,)
        advantages[:, s] = torch.where(live, advantage, 0.0)
        next_advantage = torch.where(live, advantage, next_advantage)
        next_value = torch.where(live, v[:, s], next_value)
    return advantages


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x − mean) / √(population variance + 1e-8) over live slots; 0 if all are equal.

    `train` whitens the advantages of a whole draw at once, so that the size of a step
    does not depend on the scale of the rewards. An advantage may change its sign: a
    token that did well, but less well than the mean, is pushed down.

    Shapes: (B, S) -> (B, S), 0 at masked slots. Units: standard deviations.
    Gradient: none. Raises: ValueError, TypeError. Source: N-details, 1e-8 included.
    """
    check_some_live(mask)
    live = _live("x", x, mask).detach()[mask]  # (L,)
    unequal = live.min() < live.max()  # where not, live − mean would be rounding alone
    centred = (live - live.mean()) * unequal  # (L,)
    scaled = centred / (centred.square().mean() + 1e-8).sqrt()  # (L,)
    return torch.zeros_like(x).masked_scatter(mask, scaled)  # (B, S)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    eps_low: float,
    eps_high: float,
    count: Count | None = None,
) -> Tensor:
    """−(1/B) Σ_b Σ_s min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A), ρ = π / π_old.

    Flat where A > 0 and ρ > 1 + ε_high, or A < 0 and ρ < 1 − ε_low (and where A = 0): a
    token that has moved far enough as A wished is let go, one that moved the wrong way
    is not.

    Shapes: all (B, S) -> (). Units: of A. Reduction: sequence sum / B; `count` replaces
    B, so that micro-batches add up to the batch.
    Gradient: through logprobs. Raises: ValueError, TypeError; log ρ > 80 nats too.
    Source: Schulman et al. 2017, arXiv 1707.06347, equation 7.
    """
    _require(0 < eps_low <= 1, "eps_low", eps_low, "in (0, 1]")
    _require(eps_high > 0, "eps_high", eps_high, "above 0")
    check_mask(mask)
    A = _live("advantages", advantages, mask).detach()  # (B, S)
    ratio = probability_ratio(logprobs, old_logprobs, mask)  # (B, S)
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)  # (B, S)
    return -sequence_sum(torch.minimum(ratio * A, clipped * A), mask, count)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float | None = None,
    count: Count | None = None,
) -> Tensor:
    """½ mean of max((V − R)², (V_old + clip(V − V_old, ±c) − R)²).

    A `clip` of None leaves the second of the two out. The loss is flat where V has
    moved by more than c and lies nearer to R than the clipped value does: it came far
    enough for one draw. A value that moved away from R keeps its slope.

    Shapes: all (B, S) -> (). Units: of the reward, squared. Reduction: token mean;
    `count` replaces the number of live tokens.
    Gradient: through values. Raises: ValueError, TypeError. Source: N-details.
    """
    c = float("inf") if clip is None else clip
    _require(c > 0, "clip", clip, "above 0")
    check_mask(mask)
    V = _live("values", values, mask)  # (B, S)
    V_old = _live("old_values", old_values, mask).detach()  # (B, S)
    R = _live("returns", returns, mask).detach()  # (B, S)
    near = V_old + (V - V_old).clamp(-c, c)  # (B, S)
    worse = torch.maximum((V - R) ** 2, (near - R) ** 2)  # (B, S)
    return 0.5 * token_mean(worse, mask, count)


def pretraining_loss(
    logprobs: Tensor, mask: Tensor, weight: float, count: Count | None = None
) -> Tensor:
    """−γ (1/N) Σ_n log π(example n): the mix pulls every example up.

    It knows of no reward and no ratio, and has a count of its own: N examples, however
    many answers the step learns from.

    Shapes: (N, S) each -> (). Units: of the reward; weight: reward per nat.
    Reduction: sequence sum / N; `count` replaces N.
    Gradient: through logprobs. Raises: ValueError, TypeError.
    Source: Ouyang et al. 2022, arXiv 2203.02155, equation 2.
    """
    _require(0 <= weight < float("inf"), "weight", weight, "finite and 0 or more")
    check_mask(mask)
    check_logprobs("logprobs", logprobs, mask)
    return -weight * sequence_sum(torch.where(mask, logprobs, 0.0), mask, count)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """How much of what was earned the critic foresaw: 1 − Var(R − V) / Var(R).

    R is what V should have guessed; only live tokens count. The best is 1, a constant
    guess has 0, and a worse one less than 0.

    Shapes: all (B, S) -> a number; 0 where R does not vary, and nothing is to explain.
    Raises: ValueError, TypeError.
    """
    check_some_live(mask)
    V = _live("values", values, mask)[mask].double()  # (L,)
    R = _live("returns", returns, mask)[mask].double()  # (L,)
    if R.min() == R.max():
        return 0.0
    unexplained = (R - V).var(correction=0) / R.var(correction=0)
    return 1 - unexplained.item()


def adapt_beta(
    beta: float, kl: float, target: float, horizon: float, completions: int
) -> float:
    """The next β = β (1 + clip(KL / target − 1, ±0.2) · completions / horizon).

    Units: kl and target in nats per answer; completions: the answers of *one* update,
    horizon: over how many β may change by a fifth. Raises: ValueError.
    Source: arXiv 1909.08593, section 2.2; the last factor is from its authors' code.
    """
    _require(0 < target < float("inf"), "target", target, "finite and above 0")
    _require(abs(kl) < float("inf"), "kl", kl, "finite")
    _require(0 < completions <= horizon, "completions", completions, "in 1..horizon")
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * completions / horizon)


def same_beta(beta: float, kl: float) -> float:
    """The next β is this one: a fixed price."""
    return beta


def _live(name: str, x: Tensor, mask: Tensor) -> Tensor:
    """x at live slots, which must be finite, and 0 elsewhere."""
    check_live(name, x, mask)
    return torch.where(mask, x, 0.0)


def _require(fine: bool | Tensor, name: str, value: object, allowed: str) -> None:
    if not fine:
        raise ValueError(f"{name}: got {value}, must be {allowed}")


def train(
    policy: GPT,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    reward: Reward,
    config: PPOConfig,
    *,
    critic: nn.Module,
    generator: torch.Generator,
    scale: Callable[[Tensor, Tensor], Tensor] = whiten,
    next_beta: Callable[[float, float], float] = same_beta,
    mix: PretrainingMix | None = None,
    reference: GPT | None = None,
    state: dict | None = None,
) -> Iterator[dict[str, float]]:
    """Train policy and critic in place; one dict of metrics per update (a draw).

    Update u asks problems[u * prompts : (u + 1) * prompts], from the start again when
    they run out. `generator` samples the answers. A `state` dict is complete at every
    yield and continues a run when it is handed in again.

    `critic`: a Critic, or any module (inputs, hidden) -> (B, S). `scale`: what becomes
    of the advantages. `next_beta(beta, kl)`: the next price of KL, such as a partial of
    `adapt_beta`. `mix`: texts to imitate in every step beside.

    Metrics: those of `answer_metrics`, of the draw before it is learnt from; those of
    `Learner.report`; and

        update                updates so far
        completions           answers drawn so far
        explained_variance    by the values before the update, of what then was earned
        epochs_done           passes over the answers; fewer where kl_stop ended them
        stopped_early         1 if kl_stop did
        ratio_first           largest |ρ − 1| in the first step: 0, or answers are
                              scored in another way than they are learnt from
        beta                  of the next update
        kl                    nats per answer, mean k1; only with a reference
        mix_nats              −log π of an example of the mix, mean over those of the
                              update, each before its step; only with a mix

    of the last minibatch that was looked at, before its step:

        loss                  of the policy
        value_loss            of the critic
        approx_kl             KL(π_old ‖ π), nats per token
        clip_fraction         share of live tokens where the clip binds

    Raises: as `check_settings`; ValueError for no problems, more minibatches than
    answers, beta > 0 without a reference, models that share weights, a gradient that is
    not finite.
    """
    check_settings(config)
    check_problems(problems)
    needed = f"beta is {config.beta}" if config.beta > 0 else ""
    check_reference(policy, reference, needed)
    check_apart(policy=policy, critic=critic, reference=reference)
    answers = config.prompts * config.samples
    _require(
        config.minibatches <= answers,
        "minibatches",
        config.minibatches,
        f"at most the {answers} answers",
    )
    learner = Learner(
        config,
        config.updates,
        generator,
        state,
        policy=(policy, config.lr),
        critic=(critic, config.critic_lr),
    )
    beta = learner.state.get("beta", config.beta)
    mixed = learner.state.get("mixed", 0)  # examples of the mix, so far

    for update in learner.remaining():
        # 1. draw
        asked, rollout = draw(policy, tokenizer, problems, update, config, generator)
        mask = rollout.mask  # (B, S)
        # For each of epochs * minibatches steps, the rows of each of its micro-batches.
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
        parts = list(chain.from_iterable(first_epoch))  # together every row once
        old_logprobs, old_values = score_answers(policy, critic, rollout, parts)
        ref_logprobs = old_logprobs  # (B, S): no reference, no KL to it
        if reference is not None:
            ref_logprobs = rescore(reference, rollout, parts)  # (B, S)
        token_rewards = shape_token_rewards(
            rewards, old_logprobs, ref_logprobs, mask, beta
        )  # (B, S)
        kl = sampled_kl(old_logprobs, ref_logprobs, mask).mean().item()

        # 3. compare
        advantages = gae(token_rewards, old_values, mask, config.gamma, config.lam)
        returns = advantages + old_values  # (B, S), the critic's targets for this draw
        scaled = scale(advantages, mask)  # (B, S), for the policy alone

        # 4. update
        ratio_first = torch.zeros((), device=mask.device)  # the largest |ρ − 1|
        steps_done = 0
        mix_nats = Sums()
        for minibatch in steps:
            step_rows = torch.cat(minibatch)  # (M,)
            live_tokens = int(mask[step_rows].sum())
            sums = Sums()
            for rows in minibatch:
                part = rollout.select(rows)
                width = part.mask.shape[1]  # these answers need no more columns
                old = old_logprobs[rows, :width]  # (b, s)
                A = scaled[rows, :width]  # (b, s)
                logprobs, values, entropies = score_tokens(
                    policy, critic, part.tokens, part.mask, config.temperature
                )  # (b, s) each
                actor_loss = policy_loss(
                    logprobs,
                    old,
                    A,
                    part.mask,
                    config.eps_low,
                    config.eps_high,
                    count=len(step_rows),  # per answer
                )
                critic_loss = value_loss(
                    values,
                    old_values[rows, :width],
                    returns[rows, :width],
                    part.mask,
                    config.value_clip,
                    count=live_tokens,  # per token
                )
                entropy = token_mean(entropies, part.mask, count=live_tokens)
                loss = actor_loss + config.value_coef * critic_loss
                loss = loss - config.entropy_coef * entropy
                learner.backward(loss, part.mask.sum())

                # For the report: how far has the policy moved since it drew?
                log_ratio = torch.where(part.mask, logprobs.detach() - old, 0.0)
                ratio = log_ratio.exp()  # (b, s), ρ; 1 at masked slots
                k3 = torch.expm1(log_ratio) - log_ratio  # (b, s), of KL(π_old ‖ π)
                clipped = ratio.clamp(1 - config.eps_low, 1 + config.eps_high)
                flat = A * (ratio - clipped) > 0  # (b, s), where the clip holds
                sums.add(
                    loss=actor_loss,
                    value_loss=critic_loss,
                    approx_kl=k3.sum() / live_tokens,
                    clip_fraction=flat.sum() / live_tokens,
                )
                if steps_done == 0:  # no weight has moved yet
                    ratio_first = torch.maximum(ratio_first, (ratio - 1).abs().max())
            seen = sums.read()  # of this minibatch, before its step
            if config.kl_stop is not None and seen["approx_kl"] > config.kl_stop:
                break  # the step is not taken: the next update forgets its gradient
            if mix is not None:
                examples = mix.take(mixed)
                mixed += mix.batch
                for first in range(0, mix.batch, config.micro_batch):
                    few = examples[first : first + config.micro_batch]
                    texts, live = collate(few, tokenizer.pad_id)  # (n, T), (n, S)
                    texts = texts.to(mask.device)
                    live = live.to(mask.device)
                    known = token_logprobs(
                        policy, texts, live
                    )  # (n, S), as at temperature 1
                    loss = pretraining_loss(known, live, mix.weight, count=mix.batch)
                    learner.backward(loss, live.sum())
                    mix_nats.add(nats=-known.sum(), examples=live.any(1).sum())
            learner.step()
            steps_done += 1

        # 5. report
        beta = next_beta(beta, kl)
        learner.keep(beta=beta, mixed=mixed)
        no_critic = torch.zeros_like(old_values)  # (B, S)
        earned = gae(token_rewards, no_critic, mask, config.gamma, lam=1.0)  # (B, S)
        metrics = {
            "update": update + 1,
            "completions": (update + 1) * answers,
            **answer_metrics(asked, rollout, rewards, tokenizer),
            "explained_variance": explained_variance(old_values, earned, mask),
            "ratio_first": ratio_first.item(),
            **seen,
            **learner.report(),
            "epochs_done": steps_done * config.epochs / len(steps),
            "stopped_early": float(steps_done < len(steps)),
            "beta": beta,
        }
        if reference is not None:
            metrics["kl"] = kl
        if mix is not None:
            imitated = mix_nats.read()
            metrics["mix_nats"] = imitated["nats"] / imitated["examples"]
        yield metrics
