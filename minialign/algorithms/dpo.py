"""DPO: learn from which of two answers was better, with no reward in the loss.

Of all policies, E[r] − β KL(π ‖ reference) is largest for π*(y|x) ∝ reference(y|x)
e^(r/β). Read backwards, every π is the best one for *some* reward: r̂ = β log(π(y|x) /
reference(y|x)), up to a number that depends on x alone and cancels between two answers
to one question. So r̂ can be fitted to preferences directly, y_w preferred to y_l:
L = −log σ(β h), with h = log π(y_w)/reference(y_w) − log π(y_l)/reference(y_l).

A small β is a *long* leash: the same loss then takes a larger h. Source: Rafailov et
al. 2023, arXiv 2305.18290, equations 4 to 7. What changes from RLOO: only which answer
was better counts, and the reference sits in the loss. Yet at π = reference (h = 0) the
gradient is RLOO's for 2 answers, rewards β apart; then pairs told apart pull ever less.

Details: in the paper's outline pairs are drawn once (`rounds` 1), by the policy that
stays the reference. In later rounds we draw from the policy as it is by then, which
becomes the reference: nothing ties it to the start (`reset_reference` False does). Log
π sums over tokens with EOS: the mean is another loss and β. Lesson: lessons/30_dpo.py
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from minialign.checks import (
    check_logprobs,
    check_reference,
    check_settings,
    check_shapes,
)
from minialign.evaluation import answer_metrics, measured_kl
from minialign.logprobs import (
    sequence_sum,
    token_logprobs,
)
from minialign.model import GPT
from minialign.problems import Problem
from minialign.rewards import Reward, score
from minialign.sampling import collate, generate
from minialign.tokenizer import Tokenizer

Pair = tuple[list[int], list[int], list[int]]  # ids: prompt, chosen, rejected with EOS


@dataclass(frozen=True)
class DPOConfig:
    """Defaults: a headline run of the course, 16,384 answers; lr, beta: lesson 30."""

    rounds: int = 4  # draws of pairs; the paper's is 1
    prompts: int = 512  # problems per round
    samples: int = 8  # answers per problem
    pairs_per_problem: int = 4  # at most; an answer is in one pair or in none
    updates: int = 64  # optimiser steps per round
    batch: int = 32  # pairs per step
    max_new_tokens: int = 128  # longer answers are cut, earn 0 and are counted
    temperature: float = 1.0  # of sampling and of scoring: one number
    beta: float = 1.0  # implied reward per nat; paper: 0.1, for longer answers
    reset_reference: bool = True  # every round; False: always the `reference` given
    lr: float = 2e-4  # AdamW's peak; paper: 1e-6, its code 5e-7, RMSprop
    warmup: int = 5  # updates of linear warm-up; then linear decay to 0 over the run
    max_grad_norm: float = 1.0  # gradients longer than this are scaled down
    micro_batch: int = 32  # pairs per backward pass: bounds memory, not the result
    chunk: int = 128  # problems drawn at a time: bounds memory, and changes the draws


def logistic(h: Tensor, beta: float) -> Tensor:
    """DPO: −log σ(β h), which falls for ever, but ever more slowly."""
    return -logsigmoid(beta * h)


def conservative(h: Tensor, beta: float, smoothing: float = 0.1) -> Tensor:
    """cDPO: −(1 − ε) log σ(β h) − ε log σ(−β h), as if a share ε of preferences were
    the wrong way round; lowest at β h = log((1 − ε)/ε), not ∞. Source: Mitchell 2023,
    "A note on DPO with noisy preferences". Raises: ValueError for ε not in [0, 0.5)."""
    if not 0 <= smoothing < 0.5:
        raise ValueError(f"smoothing: got {smoothing}, must be in [0, 0.5)")
    return -(1 - smoothing) * logsigmoid(beta * h) - smoothing * logsigmoid(-beta * h)


def ipo(h: Tensor, beta: float) -> Tensor:
    """IPO: (h − 1/(2β))², nats², pulls every h to one finite value, from both sides.
    Source: Azar et al. 2023, arXiv 2310.12036, equation 17; its τ is our β, its log π
    are sums (TRL: means)."""
    return (h - 1 / (2 * beta)) ** 2


def dpo_loss(
    chosen_logprobs: Tensor, rejected_logprobs: Tensor, ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor, beta: float, count: int | None = None,
    per_pair: Callable[[Tensor, float], Tensor] = logistic,
) -> Tensor:  # fmt: skip
    """L = −(1/B) Σ_b log σ(β h_b): log 2 where the policy is the reference.

    Shapes: all (B,), *sums* of log-probs over an answer -> (). Units: nats per pair.
    Reduction: mean over pairs; `count` replaces B, so that micro-batches add up.
    Gradient: through chosen_logprobs, −β σ(−β h) / B, and rejected_logprobs, its
    opposite: pairs well told apart count for little. Source: the paper's equation 7.
    Raises: ValueError for shapes that disagree, (B, 1) for (B,), values not finite or
    above 0, a beta not positive; TypeError for what is not float32 or float64.
    """
    given = {name: x for name, x in locals().items() if name.endswith("logprobs")}
    check_shapes(**given)  # all alike, and never (B, 1)
    check_shapes(chosen_logprobs=chosen_logprobs, rows=chosen_logprobs.flatten())
    live = torch.ones_like(chosen_logprobs, dtype=torch.bool)  # (B,)
    for name, x in given.items():
        check_logprobs(name, x, live)
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta: got {beta}, must be finite and above 0")
    h = chosen_logprobs - ref_chosen_logprobs.detach()  # (B,)
    h = h - (rejected_logprobs - ref_rejected_logprobs.detach())  # (B,)
    return sequence_sum(per_pair(h, beta)[:, None], live[:, None], count)


def make_pairs(rewards: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Pair the best answer to a problem with the worst, the second with the second ...

    Ties are broken by lot, and equal rewards make no pair. So rewards of 0 and 1 give
    min(#right, #wrong) disjoint random pairs a problem; at most `most` are kept.
    Shapes: rewards (P, K) -> (N, 2): rows of the P·K answers, chosen and rejected.
    Raises: ValueError for another rank, K < 2, rewards not finite, most < 1.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2 or not rewards.isfinite().all():
        raise ValueError(f"rewards must be (P, K >= 2) and finite, got {rewards}")
    if most < 1:
        raise ValueError(f"most: got {most}, must be 1 or more")
    P, K = rewards.shape
    lots = torch.rand(P, K, generator=generator, device=generator.device)
    mixed = lots.to(rewards.device).argsort(1)  # (P, K)
    ranks = rewards.gather(1, mixed).argsort(dim=1, descending=True, stable=True)
    rows = mixed.gather(1, ranks) + K * torch.arange(P).to(mixed)[:, None]  # best first
    pairs = torch.stack((rows, rows.flip(1)), 2)[:, : min(K // 2, most)]
    earned = rewards.flatten()[pairs]  # (P, K // 2 or most, 2)
    return pairs[earned[..., 0] > earned[..., 1]]


def pair_logprobs(model: GPT, pairs: Sequence[Pair], pad_id: int, temperature: float):
    """log π of both answers of each pair, summed over tokens. Shapes: -> (N, 2)."""
    device = next(model.parameters()).device
    answers = [(prompt, answer) for prompt, *both in pairs for answer in both]
    tokens, mask = (x.to(device) for x in collate(answers, pad_id))  # (2N, T), (2N, S)
    return token_logprobs(model, tokens, mask, temperature).sum(1).view(-1, 2)  # (N, 2)


def train(
    policy: GPT, tokenizer: Tokenizer, problems: Sequence[Problem], reward: Reward,
    config: DPOConfig, *, generator: torch.Generator, given: Sequence[Pair] = (),
    loss: Callable = dpo_loss, reference: GPT | None = None, state: dict | None = None,
) -> Iterator[dict[str, float]]:  # fmt: skip
    """Train the policy in place; one dict of metrics per optimiser step.

    Round r asks problems[r * prompts : (r + 1) * prompts], from the start again when
    they run out. With `given` pairs nothing is drawn or scored: every round has these.
    Steps take a round's pairs in random order, anew when used up. A `state` dict is
    complete at every yield, inside a round too, and continues a run when handed in.
    Metrics: update, round, completions (so far), pairs, chosen_length, rejected_length
    (tokens); of the draw, before learning (not with `given`): `answer_metrics` and
    unpaired (share of problems), kl (nats, exact at each choice, one answer a problem;
    with a reference); of the step, before it: loss, grad_norm, margin (mean β h),
    preferred (share of h > 0: rounding, at a round's start), chosen_logprob,
    rejected_logprob, chosen_shift, rejected_shift (nats; from the round's reference).
    Without a pair, steps do nothing and report 0. Raises: as `check_settings`;
    ValueError for no problems, a reference missing or sharing weights, inf gradients.
    """
    check_settings(config, "beta")
    if not problems and not given:
        raise ValueError("problems: got none, need at least one")
    needed = "" if config.reset_reference else "reset_reference is False"
    check_reference(policy, reference, needed)
    state = {} if state is None else state
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.0)
    if state:
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
    K, heat, size = config.samples, config.temperature, config.micro_batch
    steps, scoring = config.rounds * config.updates, (tokenizer.pad_id, heat)

    for update in range(state.get("update", 0), steps):
        turn, step = divmod(update, config.updates)
        if step == 0:
            pairs, asked, drawn = list(given), [], {}
            if not given:
                # 1. draw
                wanted = range(turn * config.prompts, (turn + 1) * config.prompts)
                asked = [problems[i % len(problems)] for i in wanted]
                prompts = [tokenizer.encode_prompt(each.question) for each in asked]
                rollout = generate(
                    policy, prompts, samples=K, temperature=heat, chunk=config.chunk,
                    eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id,
                    max_new_tokens=config.max_new_tokens, generator=generator,
                )  # fmt: skip

                # 2. score
                rewards = score(reward, asked, rollout, tokenizer).view(-1, K)  # (P, K)
                drawn = answer_metrics(asked, rollout, rewards, tokenizer)
                if reference is not None:
                    one = rollout.select(torch.arange(0, rewards.numel(), K))
                    drawn["kl"] = measured_kl(policy, reference, one).mean().item()

                # 3. compare
                answers = rollout.responses()
                rows = make_pairs(rewards, config.pairs_per_problem, generator).tolist()
                pairs = [(prompts[w // K], answers[w], answers[v]) for w, v in rows]
                drawn["unpaired"] = 1 - len({w // K for w, _ in rows}) / len(asked)
            drawn |= {"pairs": len(pairs), "completions": (turn + 1) * len(asked) * K}
            for name, i in (("chosen_length", 1), ("rejected_length", 2)):
                drawn[name] = sum(len(p[i]) for p in pairs) / max(len(pairs), 1)
            frozen = policy if config.reset_reference else reference
            with torch.no_grad():  # kept as numbers: no copy of the weights is needed
                parts = [pairs[i : i + size] for i in range(0, len(pairs), size)]
                ref = [pair_logprobs(frozen, part, *scoring) for part in parts]
            state |= {"pairs": pairs, "order": [], "drawn": drawn}
            state["ref_logprobs"] = torch.cat(ref) if ref else None  # (N, 2)

        # 4. update
        pairs, order = state["pairs"], state["order"]
        while pairs and len(order) < config.batch:
            lots = torch.rand(len(pairs), generator=generator, device=generator.device)
            order = order + lots.argsort().tolist()
        rows, state["order"] = order[: config.batch], order[config.batch :]
        up = (update + 1) / max(config.warmup, 1)
        down = (steps - update) / max(steps - config.warmup, 1)
        optimizer.param_groups[0]["lr"] = config.lr * min(up, down, 1.0)
        optimizer.zero_grad(set_to_none=True)
        policy.train()
        value, seen = 0.0, []
        for part in [rows[i : i + size] for i in range(0, len(rows), size)]:
            own = pair_logprobs(policy, [pairs[i] for i in part], *scoring)  # (b, 2)
            seen.append(torch.cat((own, state["ref_logprobs"][part].to(own)), 1))
            piece = loss(*seen[-1].unbind(1), beta=config.beta, count=len(rows))
            piece.backward()
            value += piece.item()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        if not torch.isfinite(norm):
            raise ValueError(f"update {update}: gradient norm {norm}, loss {value}")
        optimizer.step()

        # 5. report
        four = torch.cat(seen).detach() if seen else torch.zeros(1, 4)  # (pairs, 4)
        h = four[:, 0] - four[:, 2] - (four[:, 1] - four[:, 3])  # (pairs,)
        chosen, rejected, ref_chosen, ref_rejected = four.mean(0).tolist()
        state |= {"policy": policy.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"generator": generator.get_state(), "update": update + 1}
        yield {
            "update": update + 1, "round": turn + 1, **state["drawn"], "loss": value,
            "grad_norm": norm.item(), "margin": config.beta * h.mean().item(),
            "preferred": (h > 0).float().mean().item(),
            "chosen_logprob": chosen, "chosen_shift": chosen - ref_chosen,
            "rejected_logprob": rejected, "rejected_shift": rejected - ref_rejected,
        }  # fmt: skip
