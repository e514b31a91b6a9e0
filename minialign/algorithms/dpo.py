"""DPO: learn from which of two answers was better, with no reward in the loss.

Of all policies, E[r] − β KL(π ‖ reference) is largest for

    π*(y|x) ∝ reference(y|x) e^(r/β).

Read backwards, every π is the best policy for *some* reward, which is
β log(π(y|x) / reference(y|x)) up to a number that depends on x alone. That number
cancels between two answers to one question. So the reward that a policy implies can be
fitted to preferences directly, y_w preferred to y_l:

    L = −log σ(β h),    h = log π(y_w)/reference(y_w) − log π(y_l)/reference(y_l).

Source: Rafailov et al. 2023, arXiv 2305.18290, equations 4 to 7.

What changes from RLOO: only which answer was better counts, and the reference is part
of the loss. Yet where the policy is the reference (h = 0), the gradient is that of RLOO
with 2 answers whose rewards are β apart. From there on, pairs that are told apart pull
ever less. A small β lets the policy go far: the same loss then takes a larger h.

Details: in the paper pairs are drawn once (`rounds` 1), by the policy that stays the
reference. In later rounds we draw from the policy as it is by then, and that policy
becomes the reference: nothing ties it to the start any more, unless `reset_reference`
is False. log π is a sum over tokens, the answer's end included; its mean would be
another loss, with another β.

Lesson: lessons/30_dpo.py

Card: DPO (2305.18290)
    data: pairs, given or of own answers
    policy: off
    comparison: the rejected answer
    credit: pair
    reference: in the loss
    loss: −log σ(β h)

Card: IPO (2310.12036)
    data: pairs, given or of own answers
    policy: off
    comparison: the rejected answer
    credit: pair
    reference: in the loss
    loss: (h − 1/(2β))²

Card: cDPO
    data: pairs whose labels are wrong with chance ε
    policy: off
    comparison: the rejected answer
    credit: pair
    reference: in the loss
    loss: −(1 − ε) log σ(β h) − ε log σ(−β h)

Card: Robust DPO (2403.00409)
    data: pairs whose labels are wrong with chance ε
    policy: off
    comparison: the rejected answer
    credit: pair
    reference: in the loss
    loss: [−(1 − ε) log σ(β h) + ε log σ(−β h)] / (1 − 2ε)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from minialign.checks import (
    check_logprobs,
    check_problems,
    check_reference,
    check_settings,
    check_shapes,
)
from minialign.evaluation import answer_metrics, measured_kl
from minialign.logprobs import (
    Count,
    sequence_sum,
    token_logprobs,
)
from minialign.model import GPT
from minialign.problems import Problem
from minialign.rewards import Reward, score
from minialign.sampling import collate
from minialign.tokenizer import Tokenizer
from minialign.training import (
    Learner,
    Sums,
    draw,
)

ROUNDING = 1e-3  # nats: what sums of float32 log-probs may make of h = 0, and more
Pair = tuple[list[int], list[int], list[int]]  # ids: prompt, chosen, rejected with EOS
Measure = Callable[[GPT, Sequence[Pair], int, float], Tensor]  # as `pair_logprobs`


@dataclass(frozen=True)
class DPOConfig:
    """Defaults: the headline run of 16,384 answers; lr and beta: lesson 30."""

    rounds: int = 4  # draws of pairs; the paper's is 1
    prompts: int = 512  # problems per round
    samples: int = 8  # K, answers per problem, 2 or more
    pairs_per_problem: int = 4  # at most; an answer is in one pair or in none
    updates: int = 128  # optimiser steps per round
    batch: int = 32  # pairs per step
    max_new_tokens: int = 128  # a longer answer is truncated, and counted
    truncated_reward: float = 0.0  # what a truncated answer earns
    temperature: float = 1.0  # of sampling and of scoring: one number
    beta: float = 1.0  # implied reward per nat; paper: 0.1, for longer answers
    reset_reference: bool = True  # every round; False: always the `reference` given
    lr: float = 4e-4  # AdamW's peak; paper: 1e-6, its code 5e-7, RMSprop
    warmup: int = 5  # updates of linear warm-up; then linear decay to 0 over the run
    max_grad_norm: float = 13.0  # a guard: 4 x the usual (see `Learner`)
    micro_batch: int = 32  # pairs per backward pass: bounds memory, not the result
    chunk: int = 128  # problems drawn at a time: bounds memory, and changes the draws


def logistic(h: Tensor, beta: float) -> Tensor:
    """DPO: −log σ(β h), which falls for ever, but ever more slowly."""
    return -logsigmoid(beta * h)


def conservative(h: Tensor, beta: float, smoothing: float = 0.1) -> Tensor:
    """cDPO: −(1 − ε) log σ(β h) − ε log σ(−β h).

    It takes a share ε of the preferences to be the wrong way round, and so is lowest at
    a finite h, where β h = log((1 − ε)/ε).

    Raises: ValueError for an ε (`smoothing`) outside [0, 0.5).
    Source: Mitchell 2023, "A note on DPO with noisy preferences".
    """
    if not 0 <= smoothing < 0.5:
        raise ValueError(f"smoothing: got {smoothing}, must be in [0, 0.5)")
    as_told = -logsigmoid(beta * h)
    the_other_way = -logsigmoid(-beta * h)
    return (1 - smoothing) * as_told + smoothing * the_other_way


def robust(h: Tensor, beta: float, flipped: float = 0.1) -> Tensor:
    """Robust DPO: [−(1 − ε) log σ(β h) + ε log σ(−β h)] / (1 − 2ε).

    Where a share ε of the labels is the wrong way round by lot, its mean over them is
    the loss that DPO would have without: an unbiased estimate. Its price is the factor
    1 / (1 − 2ε) on the noise. And for a single pair it has no bound below: as h grows
    it falls for ever, with a slope that comes to −ε β / (1 − 2ε) and not to 0.

    Raises: ValueError for an ε (`flipped`) outside [0, 0.5).
    Source: Ray Chowdhury et al. 2024, arXiv 2403.00409, section 3.
    """
    if not 0 <= flipped < 0.5:
        raise ValueError(f"flipped: got {flipped}, must be in [0, 0.5)")
    as_told = -logsigmoid(beta * h)
    the_other_way = -logsigmoid(-beta * h)
    return ((1 - flipped) * as_told - flipped * the_other_way) / (1 - 2 * flipped)


def ipo(h: Tensor, beta: float) -> Tensor:
    """IPO: (h − 1/(2β))², in nats², pulls every h to one finite value from both sides.

    Source: Azar et al. 2023, arXiv 2310.12036, equation 17, where β is called τ. Its
    log π are sums over an answer's tokens, as in `pair_logprobs`. The authors' own runs
    take means over the tokens instead, which is `mean_pair_logprobs`: then the goal
    1/(2β) is in nats a token.
    """
    return (h - 1 / (2 * beta)) ** 2


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    beta: float,
    count: Count | None = None,
    per_pair: Callable[[Tensor, float], Tensor] = logistic,
) -> Tensor:
    """L = −(1/N) Σ_n log σ(β h_n): log 2 where the policy is the reference.

    h = log π(y_w)/reference(y_w) − log π(y_l)/reference(y_l), in nats. `per_pair` is
    what becomes of each h.

    Shapes: all (N,), *sums* of log-probs over an answer -> (). Units: nats per pair.
    Reduction: mean over pairs; `count` replaces N, so that micro-batches add up.
    Gradient: through chosen_logprobs, −β σ(−β h) / N, and rejected_logprobs, its
    opposite: pairs well told apart count for little.
    Raises: ValueError for shapes that disagree, (N, 1) for (N,), values not finite or
    above 0, a beta not positive; TypeError for what is not float32 or float64.
    Source: Rafailov et al. 2023, arXiv 2305.18290, equation 7.
    """
    sums = {
        "chosen_logprobs": chosen_logprobs,
        "rejected_logprobs": rejected_logprobs,
        "ref_chosen_logprobs": ref_chosen_logprobs,
        "ref_rejected_logprobs": ref_rejected_logprobs,
    }
    check_shapes(**sums)
    if chosen_logprobs.dim() != 1:
        raise ValueError(
            f"chosen_logprobs must be (N,), got shape {tuple(chosen_logprobs.shape)}"
        )
    live = torch.ones_like(chosen_logprobs, dtype=torch.bool)  # (N,)
    for name, x in sums.items():
        check_logprobs(name, x, live)
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta: got {beta}, must be finite and above 0")
    chosen = chosen_logprobs - ref_chosen_logprobs.detach()  # (N,)
    rejected = rejected_logprobs - ref_rejected_logprobs.detach()  # (N,)
    losses = per_pair(chosen - rejected, beta)  # (N,)
    return sequence_sum(losses[:, None], live[:, None], count)


def make_pairs(rewards: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Pair the best answer to a problem with the worst, the second best with the second
    worst, and so on.

    Chance decides the order of equal rewards, and two equal rewards make no pair. With
    rewards of 0 and 1 a problem so gets as many random pairs as it has right answers,
    or wrong ones if these are fewer. At most `most` of them are kept.

    Shapes: rewards (P, K) -> (N, 2): rows of the P * K answers, chosen and rejected.
    Raises: ValueError for another rank, K < 2, rewards not finite, most < 1.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2 or not rewards.isfinite().all():
        raise ValueError(f"rewards must be (P, K >= 2) and finite, got {rewards}")
    if most < 1:
        raise ValueError(f"most: got {most}, must be 1 or more")
    P, K = rewards.shape
    chance = torch.rand(P, K, generator=generator, device=generator.device)  # (P, K)
    mixed = chance.to(rewards.device).argsort(1)  # (P, K), each row in random order
    in_random_order = rewards.gather(1, mixed)  # (P, K)
    best_first = in_random_order.argsort(dim=1, descending=True, stable=True)  # (P, K)
    first_rows = K * torch.arange(P).to(mixed)[:, None]  # (P, 1)
    rows = first_rows + mixed.gather(1, best_first)  # (P, K), best first
    from_both_ends = torch.stack((rows, rows.flip(1)), 2)  # (P, K, 2)
    pairs = from_both_ends[:, : min(K // 2, most)]  # (P, min(K // 2, most), 2)
    earned = rewards.flatten()[pairs]  # (P, min(K // 2, most), 2)
    return pairs[earned[..., 0] > earned[..., 1]]  # (N, 2)


def pair_logprobs(
    model: GPT, pairs: Sequence[Pair], pad_id: int, temperature: float
) -> Tensor:
    """log π of both answers of each pair, summed over tokens.

    Shapes: N pairs -> (N, 2), chosen and rejected. Units: nats, <= 0.
    Gradient: through the model. Raises: as `collate` and `token_logprobs`.
    """
    answers = []
    for prompt, chosen, rejected in pairs:
        answers.append((prompt, chosen))
        answers.append((prompt, rejected))
    device = next(model.parameters()).device
    tokens, mask = collate(answers, pad_id)  # (2N, T), (2N, S)
    logprobs = token_logprobs(model, tokens.to(device), mask.to(device), temperature)
    return logprobs.sum(1).view(-1, 2)  # (N, 2)


def mean_pair_logprobs(
    model: GPT, pairs: Sequence[Pair], pad_id: int, temperature: float
) -> Tensor:
    """log π of both answers of each pair, as means over their tokens: for IPO as its
    authors ran it. Long answers and short ones then count alike.

    Shapes: N pairs -> (N, 2), chosen and rejected. Units: nats a token, <= 0.
    Gradient: through the model. Raises: as `pair_logprobs`.
    """
    sums = pair_logprobs(model, pairs, pad_id, temperature)  # (N, 2)
    tokens = [[len(chosen), len(rejected)] for _, chosen, rejected in pairs]
    return sums / torch.tensor(tokens).to(sums)


@torch.no_grad()
def reference_of_pairs(
    reference: GPT,
    pairs: Sequence[Pair],
    pad_id: int,
    config: DPOConfig,
    measure: Measure = pair_logprobs,
) -> Tensor | None:
    """What `measure` says of the reference, `micro_batch` pairs at a time; None if
    there is no pair.

    Shapes: N pairs -> (N, 2). Units: nats. Gradient: none.
    """
    parts = []
    for first in range(0, len(pairs), config.micro_batch):
        part = pairs[first : first + config.micro_batch]
        parts.append(measure(reference, part, pad_id, config.temperature))
    return torch.cat(parts) if parts else None


def _shuffled(count: int, generator: torch.Generator) -> list[int]:
    """0 .. count - 1 in random order."""
    return torch.randperm(count, generator=generator, device=generator.device).tolist()


def train(
    policy: GPT,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    reward: Reward,
    config: DPOConfig,
    *,
    generator: torch.Generator,
    given: Sequence[Pair] = (),
    loss: Callable[..., Tensor] = dpo_loss,
    measure: Measure = pair_logprobs,
    reference: GPT | None = None,
    state: dict | None = None,
) -> Iterator[dict[str, float]]:
    """Train the policy in place; one dict of metrics per optimiser step.

    Round r asks problems[r * prompts : (r + 1) * prompts], from the start again when
    they run out. With `given` pairs nothing is drawn or scored: every round has these,
    and the settings of a draw do nothing.
    `measure` says what is compared: sums of log-probs, or with `mean_pair_logprobs`
    means, and then all that is called log π below is a mean too.
    Steps take a round's pairs in random order, anew when used up. Without a pair, a
    step does nothing. `generator` samples the answers. A `state` dict is complete at
    every yield, inside a round too, and continues a run when it is handed in again.

    Metrics: those of `Learner.report`, and

        update             steps so far
        round              the round of this step, from 1
        completions        answers drawn so far
        pairs              of this round
        identical          pairs dropped, for their two answers are the same: there is
                           nothing to learn, and rounding would be learnt
        chosen_length      mean tokens of the chosen answers, their end included
        rejected_length    of the rejected ones

    of the draw, before it is learnt from (not with `given`): `answer_metrics`, and

        unpaired           share of problems whose answers all earned the same
        kl                 nats per answer, exact at each choice, of one answer to each
                           problem; only with a reference

    of the step's pairs, before it (0 without a pair):

        loss               nats per pair
        margin             mean β h
        preferred          share of pairs whose chosen answer leads, h above 0.001
        chosen_logprob     mean log π, nats; `rejected_logprob` likewise
        chosen_shift       by how much it rose since the round's reference, nats;
                           `rejected_shift` likewise

    Raises: as `check_settings`; ValueError for no problems, samples < 2, a reference
    that is missing, that shares the policy's weights, or that `given` pairs would leave
    unused, a gradient that is not finite.
    """
    check_settings(config, "beta")
    if not given:
        check_problems(problems)
        if config.samples < 2:
            raise ValueError(f"samples: got {config.samples}, a pair needs K >= 2")
    needed = "" if config.reset_reference else "reset_reference is False"
    check_reference(policy, reference, needed)
    if given and config.reset_reference and reference is not None:
        raise ValueError(
            "reference: with given pairs and reset_reference it would do nothing; set "
            "reset_reference to False, or pass none"
        )
    learner = Learner(
        config,
        config.rounds * config.updates,
        generator,
        state,
        policy=(policy, config.lr),
    )
    pairs = learner.state.get("pairs", [])
    ref_logprobs = learner.state.get("ref_logprobs")  # (N, 2), of chosen and rejected
    order = learner.state.get("order", [])  # of the pairs still to be met
    drawn = learner.state.get("drawn", {})  # metrics of the round's draw

    for update in learner.remaining():
        round_, step = divmod(update, config.updates)
        if step == 0 and given:
            pairs = list(given)
            drawn = {"completions": 0}
        elif step == 0:
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
            groups = rewards.view(config.prompts, config.samples)  # (P, K)
            drawn = answer_metrics(asked, rollout, rewards, tokenizer)
            if reference is not None:
                firsts = torch.arange(0, len(rewards), config.samples)  # (P,), one each
                kl = measured_kl(policy, reference, rollout.select(firsts))  # (P,)
                drawn["kl"] = kl.mean().item()

            # 3. compare
            rows = make_pairs(
                groups, config.pairs_per_problem, learner.data_order
            )  # (N, 2)
            answers = rollout.responses()
            pairs = []
            paired = set()  # the problems that have a pair
            for chosen, rejected in rows.tolist():
                problem = chosen // config.samples
                paired.add(problem)
                prompt = tokenizer.encode_prompt(asked[problem].question)
                pairs.append((prompt, answers[chosen], answers[rejected]))
            drawn["unpaired"] = 1 - len(paired) / len(asked)
            drawn["completions"] = (round_ + 1) * len(rewards)
        if step == 0:
            order = []
            distinct = [pair for pair in pairs if pair[1] != pair[2]]
            drawn["identical"] = len(pairs) - len(distinct)
            drawn["pairs"] = len(distinct)
            pairs = distinct
            chosen_tokens = sum(len(chosen) for _, chosen, _ in pairs)
            rejected_tokens = sum(len(rejected) for _, _, rejected in pairs)
            drawn["chosen_length"] = chosen_tokens / max(len(pairs), 1)
            drawn["rejected_length"] = rejected_tokens / max(len(pairs), 1)
            # Kept as numbers, so that no copy of the weights is needed.
            frozen = policy if config.reset_reference else reference
            ref_logprobs = reference_of_pairs(
                frozen, pairs, tokenizer.pad_id, config, measure
            )

        # 4. update
        while pairs and len(order) < config.batch:
            order = order + _shuffled(len(pairs), learner.data_order)
        batch = order[: config.batch]
        order = order[config.batch :]
        sums = Sums()
        seen = []
        for first in range(0, len(batch), config.micro_batch):
            part = batch[first : first + config.micro_batch]
            own = measure(
                policy, [pairs[i] for i in part], tokenizer.pad_id, config.temperature
            )  # (b, 2)
            ref = ref_logprobs[part].to(own)  # (b, 2)
            piece = loss(
                own[:, 0],
                own[:, 1],
                ref[:, 0],
                ref[:, 1],
                beta=config.beta,
                count=len(batch),
            )
            token_count = sum(len(pairs[i][1]) + len(pairs[i][2]) for i in part)
            learner.backward(piece, token_count)
            sums.add(loss=piece)
            seen.append(torch.cat((own.detach(), ref), 1))  # (b, 4)
        learner.step()

        # 5. report
        learner.keep(pairs=pairs, order=order, ref_logprobs=ref_logprobs, drawn=drawn)
        four = torch.cat(seen) if seen else torch.zeros(1, 4)  # (batch, 4)
        h = four[:, 0] - four[:, 2] - (four[:, 1] - four[:, 3])  # (batch,)
        chosen, rejected, ref_chosen, ref_rejected = four.mean(0).tolist()
        yield {
            "update": update + 1,
            "round": round_ + 1,
            **drawn,
            "loss": 0.0,
            **sums.read(),
            **learner.report(),
            "margin": config.beta * h.mean().item(),
            "preferred": (h > ROUNDING).float().mean().item(),
            "chosen_logprob": chosen,
            "chosen_shift": chosen - ref_chosen,
            "rejected_logprob": rejected,
            "rejected_shift": rejected - ref_rejected,
        }
