"""TRPO: one step a draw, as far as a bound on KL allows.

Objective: maximise E_old[ Σ_t ρ_t A ] subject to E_old[ KL(π_old ‖ π) ] ≤ δ, where
π_old drew the answers, ρ_t = π / π_old of a token, and the KL is that of one choice of
a token, averaged over all choices in the draw.

For a small step s of the weights the objective grows by g·s, g its gradient, and the
KL is ½ sᵀHs. Of all steps with the same KL the one along x, where H x = g, gains most,
and √(2δ / xᵀHx) · x is as long as δ allows. Neither is exact for larger steps. So the
step is tried, and shortened until the KL, measured, is at most δ and the objective has
grown. If no length will do, the policy stays as it is.

Source: Schulman et al. 2015, arXiv 1502.05477, equation 14 and appendix C.

What changes from RLOO: the gradient is the same, and so are the advantages. But no
optimiser decides how far to go: the policy's own distributions do. A direction in which
weights change much and distributions change little is cheap, and the step goes far
along it. Nothing here depends on a learning rate.

Details: H is the Hessian of the KL at π_old, which is the Fisher matrix. It has a row
for every weight, and is never written down: conjugate gradients need only products
H v, each made by differentiating the KL twice, on a share of the answers. H is
singular, and so `damping` · v is added to each product. That makes xᵀHx larger, and the
step a little shorter than δ allows. The paper's direction of KL is kept in the line
search too; some implementations measure KL(π ‖ π_old) there, or no KL at all. The paper
estimates what a choice is worth from what followed it; we have several answers to each
problem. `falling` is ours: the other methods of this course end with ever smaller
steps, and the paper's does not.

Lesson: lessons/14_trpo.py

Card: TRPO (1502.05477)
    data: K own answers to each problem
    policy: near, one step within a bound
    comparison: mean of the other K − 1 (paper: returns of other tries)
    credit: answer
    reference: none; KL(π_old ‖ π) ≤ δ keeps it near the sampler
    loss: −Σ_t ρ_t A s.t. mean_t KL(π_old ‖ π) ≤ δ
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minialign.checks import (
    check_groups,
    check_logits,
    check_problems,
    check_reference,
    check_rows,
    check_settings,
    check_shapes,
    check_temperature,
    check_tokens,
)
from minialign.evaluation import answer_metrics
from minialign.logprobs import (
    Count,
    at_least_float32,
    probability_ratio,
    sequence_sum,
)
from minialign.model import GPT
from minialign.problems import Problem
from minialign.rewards import Reward, score
from minialign.sampling import Rollout
from minialign.tokenizer import Tokenizer
from minialign.training import draw, rescore_both, sampled_kl


@dataclass(frozen=True)
class TRPOConfig:
    """Defaults: the headline run of 16,384 answers; delta: lesson 14. In [brackets]:
    what OpenAI's Spinning Up has."""

    updates: int = 64  # batches drawn, at most one step each
    prompts: int = 32  # P, problems per update
    samples: int = 8  # K, answers per problem, 2 or more
    max_new_tokens: int = 128  # a longer answer is truncated, and counted
    truncated_reward: float = 0.0  # what a truncated answer earns
    temperature: float = 1.0  # of sampling and of scoring: one number
    delta: float = 0.005  # the most nats per token that a step may move [0.01]
    falling: bool = False  # whether the length of steps falls along a line to 0 [False]
    damping: float = 0.1  # added to the curvature, nats per squared weight [0.1]
    iterations: int = 8  # of conjugate gradients: one product each [10]
    fisher_answers: int = 64  # answers that H is made of, at most [all]
    tries: int = 10  # lengths of a step [10]
    shrink: float = 0.8  # each length is this share of the one before [0.8]
    micro_batch: int = 64  # answers per backward pass: bounds memory, not the result


@dataclass(frozen=True)
class Part:
    """A micro-batch of a draw, with what two policies say of it.

    One drew it, and one is about to make a step. In `train` they are the same.
    """

    tokens: Tensor  # (b, T)
    mask: Tensor  # (b, S)
    advantages: Tensor  # (b,)
    logprobs: Tensor  # (b, S) of the tokens that were chosen, by the one that drew
    every: Tensor  # (L, V) of every token that could have been, before the step


@dataclass(frozen=True)
class Search:
    """What became of a line search."""

    accepted: bool
    tries: int  # lengths that were tried
    gain: float  # of E_old[ρ A], reward x tokens per answer; 0 if nothing was accepted
    kl: float  # mean KL(π_old ‖ π), nats per token; 0 if nothing was accepted


def score_choices(
    policy: GPT, tokens: Tensor, mask: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log π of the tokens that were chosen, and of all that could have been.

    The second has a row for each of the L live choices, row by row of the mask.

    Shapes: tokens (B, T), mask (B, S) -> (B, S), 0 where masked, and (L, V).
    Units: nats. Gradient: through the policy.
    Raises: as `token_logprobs`.
    """
    check_tokens(policy, tokens, mask)
    check_temperature(temperature)
    rows, slots = mask.nonzero(as_tuple=True)  # (L,) each
    hidden = policy(tokens[:, :-1])[rows, slots]  # (L, D)
    logits = policy.logits(hidden)  # (L, V)
    check_logits("logits", logits)
    every = torch.log_softmax(at_least_float32(logits) / temperature, dim=-1)  # (L, V)
    return _of_chosen(every, tokens, mask), every


def _of_chosen(every: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """(L, V) of every token -> (B, S) of those that were chosen, 0 where masked."""
    rows, slots = mask.nonzero(as_tuple=True)  # (L,) each
    targets = tokens[rows, slots + 1]  # (L,)
    chosen = every.gather(1, targets[:, None])[:, 0]  # (L,)
    return chosen.new_zeros(mask.shape).index_put((rows, slots), chosen)  # (B, S)


def leave_one_out(rewards: Tensor) -> Tensor:
    """A_i = r_i − mean of the other K − 1 answers to the same problem.

    Equal rewards give exactly 0, in float32 too: what is averaged is the distance to
    the group's first answer.

    Shapes: (P, K) -> (P, K). Units: of the reward; each row sums to 0.
    Gradient: none, the advantages are constants.
    Raises: ValueError for another shape, K < 2, values not finite; TypeError for ints.
    Source: Kool et al. 2019. (TRPO's paper has the returns of other tries.)
    """
    check_groups("rewards", rewards, least=2)
    distance = (rewards - rewards[:, :1]).detach()  # (P, K)
    others = (distance.sum(1, keepdim=True) - distance) / (rewards.shape[1] - 1)
    return distance - others  # (P, K)


def surrogate_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    count: Count | None = None,
) -> Tensor:
    """L = −(1/B) Σ_i A_i Σ_s mask[i, s] ρ[i, s], ρ = π / π_old of each token.

    At π_old its gradient is that of RLOO's loss, and its value is −mean(A · length).
    Away from π_old it corrects each choice for how likely it was, and not for how often
    the policy now comes to the tokens before it.

    Shapes: logprobs, old_logprobs, mask (B, S); advantages (B,) -> ().
    Units: reward x tokens. Reduction: sequence sum / B; `count` replaces B, so that
    micro-batches add up to the batch.
    Gradient: through logprobs only.
    Raises: as `probability_ratio` and `sequence_sum`; ValueError for advantages of
    another shape or not finite.
    Source: Schulman et al. 2015, arXiv 1502.05477, equation 14.
    """
    ratio = probability_ratio(logprobs, old_logprobs, mask)  # (B, S)
    check_rows("advantages", advantages, mask)
    weighted = ratio * advantages.detach()[:, None]  # (B, S)
    return -sequence_sum(weighted, mask, count)


def choice_kl(old: Tensor, new: Tensor) -> Tensor:
    """KL(π_old ‖ π) = Σ_v π_old(v) (log π_old(v) − log π(v)) of each choice.

    Old first: the expectation is over what π_old would have chosen.

    Shapes: log-probabilities of every token, (L, V) each -> (L,).
    Units: nats, >= 0 but for rounding. Gradient: through `new` only. In the logits it
    is 0 where both are equal, and its derivative there is the Fisher matrix.
    Raises: ValueError for unequal shapes, values not finite; TypeError for ints.
    Source: Schulman et al. 2015, arXiv 1502.05477, equation 14.
    """
    check_logits("old", old)
    check_logits("new", new)
    check_shapes(old=old, new=new)
    old = old.detach()
    return (old.exp() * (old - new)).sum(-1)  # (L,)


def surrogate_slope(policy: GPT, parts: Sequence[Part], temperature: float) -> Tensor:
    """g: the gradient of E_old[ρ A] in all weights, at π_old.

    Shapes: -> (W,), W weights. Raises: ValueError if it is not finite.
    """
    count = sum(len(part.tokens) for part in parts)
    policy.zero_grad(set_to_none=True)
    for part in parts:
        logprobs, _ = score_choices(policy, part.tokens, part.mask, temperature)
        loss = surrogate_loss(
            logprobs, part.logprobs, part.advantages, part.mask, count
        )
        loss.backward()
    gradients = [weight.grad.flatten() for weight in policy.parameters()]
    slope = -torch.cat(gradients)  # (W,)
    policy.zero_grad(set_to_none=True)
    if not slope.isfinite().all():
        raise ValueError(f"the gradient of policy has norm {slope.norm().item()}")
    return slope


class Curvature:
    """v -> H v + damping · v, H the Hessian of the mean `choice_kl` at the policy.

    The KL of the answers' choices is differentiated once, here, and the result is kept
    with all that it was computed from: a product differentiates it once more. So memory
    grows with the number of answers. Attention's fused kernel has no second derivative;
    the plain one is used.

    Shapes: (W,) -> (W,), W weights. Units: nats per token, per squared weight.
    Source: arXiv 1502.05477, appendix C.1.
    """

    def __init__(
        self, policy: GPT, rollout: Rollout, damping: float, micro_batch: int
    ) -> None:
        self.damping = damping
        self.products = 0  # that were made
        self.weights = list(policy.parameters())
        self.slopes = []  # (W,) of each part, all 0: it is their derivative that counts
        with sdpa_kernel(SDPBackend.MATH):
            for rows in rollout.micro_batches(micro_batch):
                part = rollout.select(rows)
                _, every = score_choices(
                    policy, part.tokens, part.mask, rollout.temperature
                )  # (L, V)
                kl = choice_kl(every, every).sum() / rollout.mask.sum()
                self.slopes.append(self._flat_gradient(kl, create_graph=True))

    def __call__(self, v: Tensor) -> Tensor:
        self.products += 1
        product = self.damping * v
        for slope in self.slopes:
            product = product + self._flat_gradient(slope @ v, retain_graph=True)
        return product

    def _flat_gradient(self, value: Tensor, **options: bool) -> Tensor:
        found = torch.autograd.grad(value, self.weights, **options)
        return torch.cat([x.flatten() for x in found])


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], target: Tensor, iterations: int
) -> Tensor:
    """x with H x = target, nearly: from products H v alone, H symmetric, positive.

    x minimises ½ xᵀHx − xᵀtarget over the span of target, H target, H² target, ...;
    every iteration adds a dimension. As many iterations as H has distinct eigenvalues
    suffice, but for rounding. It ends early once the residual is 1e-10 of the target.

    Shapes: target (W,), product (W,) -> (W,), -> (W,). Gradient: none.
    Raises: ValueError where the curvature along a direction is not positive.
    Source: Hestenes and Stiefel 1952; arXiv 1502.05477, appendix C.
    """
    x = torch.zeros_like(target)
    residual = target  # less H x
    direction = residual
    residual_square = residual @ residual
    tolerance = 1e-20 * residual_square
    for _ in range(iterations):
        if residual_square <= tolerance:
            break
        bent = product(direction)
        length = residual_square / _positive(direction @ bent)
        x = x + length * direction
        residual = residual - length * bent
        before = residual_square
        residual_square = residual @ residual
        direction = residual + residual_square / before * direction
    return x


def step_within(direction: Tensor, bent: Tensor, delta: float) -> Tensor:
    """√(2δ / xᵀHx) · x: along x, until the KL by ½ sᵀHs is delta.

    Shapes: direction x (W,), bent = H x (W,) -> (W,). A direction of 0 stays 0.
    Units: delta in those of ½ sᵀHs, nats per token. Gradient: none.
    Raises: ValueError where xᵀHx is not positive, and x not 0.
    Source: appendix C of arXiv 1502.05477.
    """
    direction = direction.detach()
    if not direction.any():
        return torch.zeros_like(direction)
    curvature = _positive(direction @ bent.detach())
    return direction * (2 * delta / curvature).sqrt()


def _positive(curvature: Tensor) -> Tensor:
    if not 0 < curvature < math.inf:
        raise ValueError(
            f"curvature: got {curvature.item()} along a step, must be positive and "
            f"finite; a Fisher matrix has no negative curvature: raise damping"
        )
    return curvature


@torch.no_grad()
def line_search(
    policy: GPT,
    step: Tensor,
    parts: Sequence[Part],
    config: TRPOConfig,
) -> Search:
    """Take the longest of step, shrink · step, shrink² · step, ... that may be taken.

    A length is accepted if mean KL(π_old ‖ π), measured on these answers, is at most
    delta and the objective on them has grown. If none is, every weight is put back, to
    the bit. A step of 0 is not tried, and one that leads where nothing can be computed
    is too long.

    Shapes: step (W,). Units: as `Search`. Gradient: none.
    Source: appendix C of arXiv 1502.05477.
    """
    nothing = Search(accepted=False, tries=0, gain=0.0, kl=0.0)
    if not step.any():
        return nothing
    weights = list(policy.parameters())
    before = [weight.clone() for weight in weights]
    moves = step.split([weight.numel() for weight in weights])
    accepted = False
    try:
        for trial in range(config.tries):
            length = config.shrink**trial
            for weight, old, move in zip(weights, before, moves, strict=True):
                weight.copy_(old + length * move.view_as(old))
            try:
                gain, kl = _measure(policy, parts, config.temperature)
            except ValueError:  # a ratio or logits beyond all bounds
                continue
            accepted = kl <= config.delta and gain > 0
            if accepted:
                return Search(accepted, trial + 1, gain, kl)
    finally:
        if not accepted:
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)
    return replace(nothing, tries=config.tries)


def _measure(
    policy: GPT, parts: Sequence[Part], temperature: float
) -> tuple[float, float]:
    """By how much E_old[ρ A] has grown, and the mean KL(π_old ‖ π) of a choice."""
    count = sum(len(part.tokens) for part in parts)
    choices = sum(len(part.every) for part in parts)
    gain = 0.0
    nats = 0.0
    for part in parts:
        logprobs, every = score_choices(policy, part.tokens, part.mask, temperature)
        before = _of_chosen(part.every, part.tokens, part.mask)
        loss_before = surrogate_loss(
            before, part.logprobs, part.advantages, part.mask, count
        )
        loss_after = surrogate_loss(
            logprobs, part.logprobs, part.advantages, part.mask, count
        )
        gain += (loss_before - loss_after).item()
        nats += choice_kl(part.every, every).sum().item()
    return gain, nats / choices


@torch.no_grad()
def scored_parts(
    policy: GPT, rollout: Rollout, advantages: Tensor, micro_batch: int
) -> list[Part]:
    """The micro-batches of a draw, scored by the policy that drew it, as constants."""
    parts = []
    for own in rollout.micro_batches(micro_batch):
        part = rollout.select(own)
        logprobs, every = score_choices(
            policy, part.tokens, part.mask, rollout.temperature
        )
        parts.append(Part(part.tokens, part.mask, advantages[own], logprobs, every))
    return parts


def train(
    policy: GPT,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    reward: Reward,
    config: TRPOConfig,
    *,
    generator: torch.Generator,
    reference: GPT | None = None,
    state: dict | None = None,
) -> Iterator[dict[str, float]]:
    """Train the policy in place; one dict of metrics per update.

    Update u asks problems[u * prompts : (u + 1) * prompts], from the start again when
    they run out. `generator` samples the answers. A `reference` is only watched. A
    `state` dict is complete at every yield and continues a run when it is handed in
    again: it holds the weights, the generator and the position, for there is no
    optimiser.

    Metrics: those of `answer_metrics`, of the draw before it is learnt from; and

        update           updates so far
        completions      answers drawn so far
        dead             share of problems whose answers all earned the same reward
        advantage_std    over all answers, divisor B
        grad_norm        of the slope g
        steps            1 if a step was taken, else 0
        tokens_trained   live tokens that it learnt from
        tries            lengths that the line search tried
        kl_moved         mean KL(π_old ‖ π) of the step, nats per token, on the draw
        gain             of E_old[ρ A] by the step, on the draw
        passes           forward and backward passes through the policy that an answer
                         cost on average after it was drawn; RLOO has 2
        kl               nats per answer, mean k1; only with a reference

    Raises: as `check_settings`; ValueError for no problems, samples < 2, a reference
    that shares the policy's weights, a gradient that is not finite, a curvature that is
    not positive.
    """
    check_settings(config)
    check_problems(problems)
    if config.samples < 2:
        raise ValueError(f"samples: got {config.samples}, leave-one-out needs K >= 2")
    check_reference(policy, reference)
    state = {} if state is None else state
    done = 0
    if state:
        policy.load_state_dict(state["policy"])
        generator.set_state(state["generator"])
        done = state["update"]
    answers = config.prompts * config.samples  # B
    fisher_count = min(config.fisher_answers, answers)
    # The rows that H is made of lie as far apart as they can, for answers to the same
    # problem lie side by side.
    places = torch.arange(fisher_count, device=policy.embed_tokens.weight.device)
    fisher_rows = places * answers // fisher_count

    for update in range(done, config.updates):
        # 1. draw
        policy.train()
        asked, rollout = draw(policy, tokenizer, problems, update, config, generator)

        # 2. score
        rewards = score(
            reward, asked, rollout, tokenizer, config.truncated_reward
        )  # (B,)
        old_logprobs, ref_logprobs = rescore_both(
            policy, reference, rollout, config.micro_batch
        )  # (B, S) each

        # 3. compare
        groups = rewards.view(config.prompts, config.samples)  # (P, K)
        advantages = leave_one_out(groups).flatten()  # (B,)

        # 4. update
        share = 1 - update / config.updates if config.falling else 1.0  # of the length
        bound = config.delta * share**2  # nats per token
        parts = scored_parts(policy, rollout, advantages, config.micro_batch)
        slope = surrogate_slope(policy, parts, config.temperature)  # (W,)
        curvature = Curvature(
            policy, rollout.select(fisher_rows), config.damping, config.micro_batch
        )
        direction = conjugate_gradients(curvature, slope, config.iterations)  # (W,)
        bent = curvature(direction)  # (W,)
        step = step_within(direction, bent, bound)  # (W,)
        found = line_search(policy, step, parts, replace(config, delta=bound))

        # 5. report
        state["policy"] = policy.state_dict()
        state["generator"] = generator.get_state()
        state["update"] = update + 1
        equal = (groups == groups[:, :1]).all(1)  # (P,)
        # To score, and forward and back for the slope; one for each length. Forward
        # and back for the curvature, and back for each product, with fewer answers.
        of_all = 3 + found.tries
        of_some = 2 + curvature.products
        del curvature  # it holds all that it was computed from
        metrics = {
            "update": update + 1,
            "completions": (update + 1) * len(rewards),
            "dead": equal.float().mean().item(),
            "advantage_std": advantages.std(correction=0).item(),
            "grad_norm": slope.norm().item(),
            "steps": int(found.accepted),
            "tokens_trained": int(rollout.mask.sum()) * int(found.accepted),
            "tries": found.tries,
            "kl_moved": found.kl,
            "gain": found.gain,
            "passes": of_all + of_some * fisher_count / answers,
            **answer_metrics(asked, rollout, rewards, tokenizer),
        }
        if reference is not None:
            kl = sampled_kl(old_logprobs, ref_logprobs, rollout.mask)  # (B,)
            metrics["kl"] = kl.mean().item()
        yield metrics
