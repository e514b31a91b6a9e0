"""PPO: several careful steps on the same answers, judged token by token by a critic.

Objective: J(π) = E_x E_{y ~ π(·|x)} [ r(x, y) ] − β KL(π ‖ reference), approached from
the π_old that drew the answers by ascending E[ min( ρ A, clip(ρ, 1 ± ε) A ) ] with
ρ = π / π_old per token. The *critic* guesses before each token what the answer will
earn; the advantage A compares what came after with that guess. The *clip* lets go of a
token whose ρ left 1 ± ε as A wished: so answers can be used more than once.

Source: Schulman et al. 2017, arXiv 1707.06347, equation 7. What changes from REINFORCE:
a baseline for every token, and several steps a draw. With one step, V = β = 0,
γ = λ = 1 and no whitening it is REINFORCE, exactly. Whitening and value clip are in no
equation: they follow "The N+ Implementation Details of RLHF with PPO" (N-details: arXiv
2403.17031), token means there, sequence sum / B here. Lesson: lessons/15_ppo.py
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from minialign.checks import (
    check_live,
    check_mask,
    check_reference,
    check_rows,
    check_settings,
    check_tokens,
)
from minialign.evaluation import answer_metrics
from minialign.logprobs import (
    kl_k1,
    kl_k3,
    logprobs_from_logits,
    probability_ratio,
    sequence_sum,
    token_mean,
)
from minialign.model import GPT, ScalarHead
from minialign.problems import Problem
from minialign.rewards import Reward, score
from minialign.sampling import generate, rescore
from minialign.tokenizer import Tokenizer


@dataclass(frozen=True)
class PPOConfig:
    """Defaults: a headline run of 16,384 answers; lr: lesson 15. [N-details' values]"""

    updates: int = 64  # batches drawn
    prompts: int = 32  # problems per update
    samples: int = 8  # answers per problem
    max_new_tokens: int = 128  # longer answers are cut, earn 0 and are counted
    temperature: float = 1.0  # of sampling and of scoring: one number [0.7]
    beta: float = 0.0  # reward paid per nat of KL; 0: no reference needed [0.05]
    epochs: int = 2  # times each answer is used [4]
    minibatches: int = 2  # optimiser steps per epoch [1]
    eps_low: float = 0.2  # clip below 1 - eps_low; 1: never, for ratios are > 0 [0.2]
    eps_high: float = 0.2  # clip above 1 + eps_high; 1e9: never [0.2]
    value_clip: float | None = 0.2  # reward units from the old value; None: off [0.2]
    kl_stop: float | None = 0.05  # nats per token since the draw; None: never [None]
    gamma: float = 1.0  # discount per token [1]
    lam: float = 0.95  # 1: trust what was earned; 0: trust the critic [0.95]
    value_coef: float = 0.1  # weight of the critic's token mean beside the policy's
    #  sequence sums, for a shared trunk [0.1, beside token means: weighs more there]
    entropy_coef: float = 0.0  # bonus for the mean entropy per token, nats [0]
    lr: float = 4e-4  # AdamW's peak, policy [3e-6, for 1 billion weights]
    critic_lr: float = 1e-3  # AdamW's peak, critic [the policy's]
    warmup: int = 5  # updates of linear warm-up; then linear decay to 0
    max_grad_norm: float = 1.0  # longer gradients are scaled: policy and critic apart
    micro_batch: int = 32  # answers per backward pass: bounds memory, not the result


class Critic(nn.Module):
    """Values by a network of its own, at first a copy of the policy, or (`shared`) by a
    head on the policy's hidden states, whose loss then moves the policy. 0 at first."""

    def __init__(self, policy: GPT, shared: bool = False) -> None:
        super().__init__()
        self.trunk = None if shared else copy.deepcopy(policy).requires_grad_(True)
        if self.trunk is not None:
            self.trunk.lm_head = None  # it judges words and writes none
        self.head = ScalarHead(policy.config.dim).to(next(policy.parameters()))

    def forward(self, inputs: Tensor, hidden: Tensor) -> Tensor:
        return self.head(hidden if self.trunk is None else self.trunk(inputs))  # (B, S)


def score_tokens(
    policy: GPT, critic: nn.Module, tokens: Tensor, mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, values, entropies) of policy and critic, all read off hidden state s:
    log π of tokens[:, s+1], V *before* that choice, and its entropy over all words.
    Shapes: tokens (B, T), mask (B, T - 1) -> three (B, T - 1), 0 at masked slots.
    Half precision is lifted to float32. Gradient: through both models. Raises:
    ValueError, TypeError."""
    check_tokens(policy, tokens, mask)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]  # (B, S) each
    hidden = policy(inputs)  # (B, S, D)
    found = policy.logits(hidden[mask]), critic(inputs, hidden)[mask]  # (N, V), (N,)
    logits, values = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in found)
    logprobs = logprobs_from_logits(logits, targets[mask], temperature)  # (N,)
    every = torch.log_softmax(logits / temperature, dim=-1)  # (N, V)
    live = logprobs, values, -(every.exp() * every).sum(-1)
    return tuple(x.new_zeros(mask.shape).masked_scatter(mask, x) for x in live)


def shape_token_rewards(
    rewards: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float
) -> Tensor:
    """−β k1 on every live token, and the answer's reward on the last of them, EOS.
    Shapes: rewards (B,), the others (B, S) -> (B, S). Units: of the reward; beta in
    reward per nat. Gradient: none. Raises: ValueError, TypeError; each row must live.
    Source: InstructGPT, arXiv 2203.02155, equation 2.
    """
    _require(0 <= beta < float("inf"), "beta", beta, "finite and 0 or more")
    k1 = kl_k1(logprobs, ref_logprobs, mask).detach()  # (B, S)
    check_rows("rewards", rewards, mask)
    _require(bool(mask.any(1).all()), "mask", "an empty row", "live in every row")
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)  # (B, S)
    return torch.where(last, rewards.detach()[:, None], 0.0) - beta * k1


def gae(
    token_rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> Tensor:
    """Advantages: δ_t = r_t + γ V_{t+1} − V_t and A_t = δ_t + γ λ A_{t+1}.
    t counts live tokens; masked slots between are skipped. After the last V = A = 0, in
    truncated answers too: they have earned their 0, and no guess takes its place.
    Shapes: all (B, S) -> (B, S). Units: of the reward. Gradient: none.
    Raises: ValueError, TypeError. Source: GAE, arXiv 1506.02438, equation 16.
    """
    _require(0 <= gamma <= 1 and 0 <= lam <= 1, "gamma, lam", (gamma, lam), "in [0, 1]")
    live = _masked(mask, token_rewards=token_rewards, values=values)
    r, v = (x.detach() for x in live)  # (B, S) each
    advantages = torch.zeros_like(r)  # (B, S)
    value = advantage = torch.zeros_like(r[:, 0])  # (B,) at the next live token
    for s in reversed(range(mask.shape[1])):
        new = r[:, s] + gamma * value - v[:, s] + gamma * lam * advantage  # (B,)
        advantages[:, s] = torch.where(mask[:, s], new, 0.0)
        advantage = torch.where(mask[:, s], new, advantage)
        value = torch.where(mask[:, s], v[:, s], value)
    return advantages


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x − mean) / √(population variance + 1e-8) over live slots; 0 if all are equal.
    Shapes: (B, S) -> (B, S). Gradient: none. Source: N-details, 1e-8 included.
    """
    (unmasked,) = _masked(mask, x=x)  # (B, S)
    live = unmasked.detach()[mask]  # (N,)
    centred = (live - live.mean()) * (live.min() < live.max())  # no rounding error
    scaled = centred / (centred.square().mean() + 1e-8).sqrt()
    return torch.zeros_like(x).masked_scatter(mask, scaled)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
    eps_low: float, eps_high: float, count: int | None = None,
) -> Tensor:  # fmt: skip
    """−(1/B) Σ_b Σ_s min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A), ρ = π / π_old.
    Flat where A > 0 and ρ > 1 + ε_high, or A < 0 and ρ < 1 − ε_low, and only there.
    Shapes: all (B, S) -> (). Reduction: sequence sum / B; `count` replaces B. Gradient:
    through logprobs. Raises: ValueError, TypeError; log ρ > 80 nats is refused.
    Source: Schulman et al. 2017, arXiv 1707.06347, equation 7.
    """
    _require(0 < eps_low <= 1, "eps_low", eps_low, "in (0, 1]")
    _require(eps_high > 0, "eps_high", eps_high, "above 0")
    (live,) = _masked(mask, advantages=advantages)
    A = live.detach()  # (B, S)
    ratio = probability_ratio(logprobs, old_logprobs, mask)  # (B, S)
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)  # (B, S)
    return -sequence_sum(torch.minimum(ratio * A, clipped * A), mask, count)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor,
    clip: float | None = None, count: int | None = None,
) -> Tensor:  # fmt: skip
    """½ mean of max((V − R)², (V_old + clip(V − V_old, ±c) − R)²); None: no clip.
    Flat once V has moved by more than c towards R (and has not overshot it by more).
    Shapes: all (B, S) -> (). Reduction: token mean; `count` replaces their number.
    Gradient: through values. Raises: ValueError, TypeError. Source: N-details.
    """
    limit = float("inf") if clip is None else clip
    _require(limit > 0, "clip", clip, "above 0")
    v, *fixed = _masked(mask, values=values, old_values=old_values, returns=returns)
    old, R = (x.detach() for x in fixed)  # (B, S) each
    near = old + (v - old).clamp(-limit, limit)  # (B, S)
    return 0.5 * token_mean(torch.maximum((v - R) ** 2, (near - R) ** 2), mask, count)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 − Var(R − V) / Var(R) at live tokens: 1 at best, 0 for a constant guess."""
    v, R = (x[mask].double() for x in _masked(mask, values=values, returns=returns))
    if R.min() == R.max():
        return 0.0  # nothing to explain
    return 1 - ((R - v).var(correction=0) / R.var(correction=0)).item()


def adapt_beta(
    beta: float, kl: float, target: float, horizon: float, completions: int
) -> float:
    """The next β = β (1 + clip(KL / target − 1, ±0.2) · completions / horizon).
    Units: nats per answer. Source: arXiv 1909.08593, 2.2; the last factor: its code."""
    _require(0 < target < float("inf"), "target", target, "finite and above 0")
    _require(abs(kl) < float("inf"), "kl", kl, "finite")
    _require(0 < completions <= horizon, "completions", completions, "in 1..horizon")
    return beta * (1 + min(max(kl / target - 1, -0.2), 0.2) * completions / horizon)


def _masked(mask: Tensor, **named: Tensor) -> list[Tensor]:
    check_mask(mask)
    for name, x in named.items():
        check_live(name, x, mask)
    return [torch.where(mask, x, 0.0) for x in named.values()]


def _require(fine: bool | Tensor, name: str, value: object, allowed: str) -> None:
    if not fine:
        raise ValueError(f"{name}: got {value}, must be {allowed}")


def train(
    policy: GPT, tokenizer: Tokenizer, problems: Sequence[Problem], reward: Reward,
    config: PPOConfig, *, critic: nn.Module, generator: torch.Generator,
    scale: Callable[[Tensor, Tensor], Tensor] = whiten,
    next_beta: Callable[[float, float], float] = lambda beta, kl: beta,
    reference: GPT | None = None, state: dict | None = None,
) -> Iterator[dict[str, float]]:  # fmt: skip
    """Train policy and critic in place, as REINFORCE does; one dict of metrics a draw.

    `critic`: a Critic, or any module (inputs, hidden) -> (B, S). `next_beta(beta, kl)`:
    the next price of KL, such as a partial of `adapt_beta`.
    Metrics beside REINFORCE's: ratio_first (max |ρ − 1| before a step: 0), epochs_done,
    explained_variance (by V before the update, of what then was earned), stopped_early,
    beta (of the next update); of the last minibatch looked at: loss, value_loss,
    entropy, approx_kl (of π_old from π, nats per token), clip_fraction (without slope).
    """
    check_settings(config)
    needed = f"beta is {config.beta}" if config.beta > 0 else ""
    check_reference(policy, reference, needed)
    models = policy, critic, reference or nn.Module()
    held = [weight.data_ptr() for model in models for weight in model.parameters()]
    _require(len({*held}) == len(held), "critic, reference", "shared weights", "copies")
    _require(len(problems) > 0, "problems", "none", "one or more")
    for name, most in ("epochs", 99), ("minibatches", config.prompts * config.samples):
        _require(1 <= (n := getattr(config, name)) <= most, name, n, f"1 to {most}")
    state = {} if state is None else state
    groups = [{"params": list(model.parameters())} for model in models[:2]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    parts = {"policy": policy, "critic": critic, "optimizer": optimizer}
    if state:
        generator.set_state(state["generator"])
        for name, part in parts.items():
            part.load_state_dict(state[name])
    beta, heat = state.get("beta", config.beta), config.temperature
    band, groups = (config.eps_low, config.eps_high), optimizer.param_groups

    for update in range(state.get("update", 0), config.updates):
        # 1. draw
        first = update * config.prompts
        asked = [problems[(first + i) % len(problems)] for i in range(config.prompts)]
        rollout = generate(
            policy, [tokenizer.encode_prompt(problem.question) for problem in asked],
            eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, samples=config.samples,
            max_new_tokens=config.max_new_tokens, temperature=heat, generator=generator,
        )  # fmt: skip
        mask, passes = rollout.mask, (config.epochs, config.minibatches)  # (B, S)
        batches = rollout.deal(*passes, config.micro_batch, generator)

        # 2. score
        rewards = score(reward, asked, rollout, tokenizer).to(mask.device)  # (B,)
        old_logprobs, old_values = torch.zeros(2, *mask.shape).to(rollout.logprobs)
        ref_logprobs = old_logprobs  # (B, S)
        with torch.no_grad():  # in the shapes of the update, so the first ratio is 1
            for rows in chain(*batches[: config.minibatches]):
                part = rollout.select(rows)
                now = score_tokens(policy, critic, part.tokens, part.mask, heat)
                old_logprobs[rows, : part.mask.shape[1]] = now[0]
                old_values[rows, : part.mask.shape[1]] = now[1]
            if reference is not None:
                all_rows = chain(*batches[: config.minibatches])
                ref_logprobs = rescore(reference, rollout, all_rows)  # (B, S)
        paid = rewards, old_logprobs, ref_logprobs, mask
        token_rewards = shape_token_rewards(*paid, beta)  # (B, S)
        kl = kl_k1(*paid[1:]).sum(1).mean().item()

        # 3. compare
        advantages = gae(token_rewards, old_values, mask, config.gamma, config.lam)
        returns = advantages + old_values  # (B, S), before anything is whitened
        fixed = old_logprobs, scale(advantages, mask), old_values, returns
        earned = gae(token_rewards, old_values * 0, mask, config.gamma, 1.0)  # (B, S)

        # 4. update
        up = (update + 1) / max(config.warmup, 1)
        down = (config.updates - update) / max(config.updates - config.warmup, 1)
        for group, peak in zip(groups, (config.lr, config.critic_lr), strict=True):
            group["lr"] = peak * min(up, down, 1.0)
        ratio_first, steps, norms = 0.0, 0, [torch.zeros(())]
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            answers, live = sum(map(len, batch)), int(mask[torch.cat(batch)].sum())
            seen = Counter()
            for rows in batch:
                part = rollout.select(rows)
                now = score_tokens(policy, critic, part.tokens, part.mask, heat)
                old, A, guess, R = (x[rows, : part.mask.shape[1]] for x in fixed)
                loss = policy_loss(now[0], old, A, part.mask, *band, answers)
                wrong = value_loss(now[1], guess, R, part.mask, config.value_clip, live)
                entropy = token_mean(now[2], part.mask, live)
                total = loss + config.value_coef * wrong - config.entropy_coef * entropy
                total.backward()
                ratio = probability_ratio(now[0].detach(), old, part.mask)  # (b, s)
                flat = A * (ratio - ratio.clamp(1 - band[0], 1 + band[1])) > 0
                moved = kl_k3(old, now[0].detach(), part.mask).sum() / live
                seen.update(loss=loss.item(), value_loss=wrong.item())
                seen.update(entropy=entropy.item(), approx_kl=moved.item())
                seen["clip_fraction"] += flat.sum().item() / live
                if steps == 0:
                    ratio_first = max(ratio_first, (ratio - 1).abs().max().item())
            if config.kl_stop is not None and seen["approx_kl"] > config.kl_stop:
                break
            clip = torch.nn.utils.clip_grad_norm_
            norms = [clip(group["params"], config.max_grad_norm) for group in groups]
            if not all(map(torch.isfinite, norms)):
                raise ValueError(f"update {update}: gradient norms {norms}, {seen}")
            optimizer.step()
            steps += 1

        # 5. report
        beta = next_beta(beta, kl)
        state |= {name: part.state_dict() for name, part in parts.items()}
        state |= {"generator": generator.get_state(), "beta": beta}
        state["update"] = update + 1
        yield {
            "update": update + 1, "completions": (update + 1) * len(rewards),
            **answer_metrics(asked, rollout, rewards, tokenizer),
            "explained_variance": explained_variance(old_values, earned, mask),
            "ratio_first": ratio_first, **seen, "grad_norm": norms[0].item(),
            "epochs_done": steps * config.epochs / len(batches),
            "stopped_early": float(steps < len(batches)),
            "beta": beta, **({} if reference is None else {"kl": kl}),
        }  # fmt: skip
