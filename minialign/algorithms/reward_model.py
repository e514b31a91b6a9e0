"""A reward model: a number for every answer, learnt from which of two was better.

Objective: people prefer y_w to y_l with chance σ(r(y_w) − r(y_l)) (Bradley and Terry),
so find the r under which what they said is likeliest,

    L = −log σ(r(y_w) − r(y_l)),

averaged over the pairs of one ranking first, and then over rankings.

Source: Christiano et al. 2017, arXiv 1706.03741; as it is used here Ouyang et al. 2022
(InstructGPT), arXiv 2203.02155, equation 1. The margin: Touvron et al. 2023 (Llama 2),
arXiv 2307.09288, equation 2, where each pair has its own, by how much better people
said that one answer was. Labels that are chances: Lee et al. 2023 (RLAIF), arXiv
2309.00267, where a judge states one for each pair.

What changes from RLOO: nothing is drawn, and no program judges. People have put K
answers to a problem in order. The model is a copy of the policy, with a number at EOS
in the place of the next token's chances.

Details: all K (K − 1)/2 pairs of a ranking stay together in one batch element, divided
by their number. So each answer is read once for all its pairs, and a long ranking
counts as much as a short one. (InstructGPT's authors found that the same pairs,
shuffled, were learnt by heart within an epoch. To see it, hand in each pair as a
ranking of two.) Two answers with the same tokens say nothing about each other: their
pair is left out and counted. Only differences are learnt: `RewardModel.fix_scale` sets
zero and unit afterwards, on answers that the model was not trained on.

Lesson: lessons/20_reward_model.py

Card: Reward model (2203.02155)
    data: rankings by people
    policy: –
    comparison: the other answers of a ranking
    credit: answer, read at its end
    reference: –
    loss: −log σ(r_w − r_l), mean over the pairs of a ranking
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from minialign.checks import (
    check_live,
    check_settings,
    check_shapes,
    check_weights,
)
from minialign.logprobs import Count, sequence_sum
from minialign.problems import Problem
from minialign.rewards import RewardModel
from minialign.sampling import collate
from minialign.tokenizer import Tokenizer
from minialign.training import Learner, Sums


@dataclass(frozen=True)
class Ranking:
    """What one person said: the answers to a prompt as token ids, the best first."""

    prompt: list[int]
    answers: list[list[int]]  # K of them, 2 or more, each with its EOS
    label: float = 1.0  # the chance that each of its pairs is in the right order


def rankings_of(
    problems: Sequence[Problem],
    texts: Sequence[Sequence[str]],
    orders: Tensor,
    tokenizer: Tokenizer,
) -> list[Ranking]:
    """Answers to each problem, in the order that somebody has put them in.

    Shapes: K texts to each of P problems; orders (P, K), whose row names the best first
    (as `rewards.rank` does). Raises: ValueError for other shapes than these.
    """
    shapes = {(len(problems), len(answers)) for answers in texts}
    if len(texts) != len(problems) or shapes != {tuple(orders.shape)}:
        raise ValueError(
            f"orders: got {tuple(orders.shape)}, must be (P, K) for {len(problems)} "
            f"problems and K texts to each"
        )
    found = []
    for problem, answers, order in zip(problems, texts, orders.tolist(), strict=True):
        best_first = [tokenizer.encode_response(answers[i]) for i in order]
        found.append(Ranking(tokenizer.encode_prompt(problem.question), best_first))
    return found


@dataclass(frozen=True)
class RewardModelConfig:
    """Defaults: the model of lesson 20."""

    updates: int = 125  # optimiser steps: once through 4,000 rankings
    batch: int = 32  # rankings per step
    lr: float = 5e-4  # AdamW's peak
    warmup: int = 5  # updates of linear warm-up; then linear decay to 0
    max_grad_norm: float = 5.0  # a guard (see `Learner`)
    micro_batch: int = 32  # rankings per backward pass: bounds memory, not the result


def pairwise_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: float = 0.0,
    label: float | Tensor = 1.0,
    weights: Tensor | None = None,
    count: Count | None = None,
) -> Tensor:
    """The better answer's number should lead: the farther, the less is left to learn.

        L = −(1/N) Σ_n w_n [p_n log σ(d_n) + (1 − p_n) log σ(−d_n)]
        d_n = chosen_n − rejected_n − margin

    p (`label`) is the chance that the label is right, of all pairs or of each. Below 1
    the loss is lowest at a finite d, where σ(d) = p. `weights` says what each pair
    counts, 1 where it is None.

    Shapes: (N,) each, or one number as label -> ().
    Units: nats per pair; margin: that of the numbers.
    Reduction: Σ over pairs / N; `count` replaces N, so that micro-batches add up.
    Gradient: through both. With p = 1, −w σ(−d)/N to chosen, its opposite to rejected.
    Raises: ValueError for shapes that disagree or are not (N,), numbers not finite, a
    margin below 0 or not finite, a label outside [0, 1], weights below 0; TypeError for
    what is not float32 or float64.
    Source: Ouyang et al. 2022, arXiv 2203.02155, equation 1.
    """
    check_shapes(chosen=chosen, rejected=rejected)
    if chosen.dim() != 1:
        raise ValueError(f"chosen: must be (N,), got shape {tuple(chosen.shape)}")
    live = torch.ones_like(chosen, dtype=torch.bool)  # (N,)
    check_live("chosen", chosen, live)
    check_live("rejected", rejected, live)
    if not 0 <= margin < float("inf"):
        raise ValueError(f"margin: got {margin}, must be finite and 0 or more")
    if isinstance(label, Tensor):
        check_weights("label", label, live)
        check_weights("1 - label", 1 - label, live)
        label = label.detach()
    elif not 0 <= label <= 1:
        raise ValueError(f"label: got {label}, must be in [0, 1]")
    d = chosen - rejected - margin  # (N,)
    losses = -label * logsigmoid(d) - (1 - label) * logsigmoid(-d)  # (N,)
    if weights is not None:
        check_shapes(chosen=chosen, weights=weights)
        check_weights("weights", weights, live)
        losses = losses * weights.detach()
    return sequence_sum(losses[:, None], live[:, None], count)


def pairs_of(rankings: Sequence[Ranking]) -> tuple[Tensor, Tensor, Tensor, int]:
    """All pairs of each ranking, the better answer first, what each pair counts, and
    how sure its order is.

    Rows number the answers of all rankings, one after the other. The pairs of a ranking
    count 1 together, and have its label. A pair of answers with the same tokens is left
    out.

    Shapes: -> rows (N, 2) int64, weights and labels (N,) float32 each, and how many
    were left out. Raises: ValueError for a ranking of fewer than two answers.
    """
    rows = []
    weights = []
    labels = []
    identical = 0
    first = 0  # row of the ranking's best answer
    for number, ranking in enumerate(rankings):
        answers = ranking.answers
        if len(answers) < 2:
            raise ValueError(f"rankings[{number}]: a ranking needs 2 answers or more")
        told_apart = []
        for better in range(len(answers)):
            for worse in range(better + 1, len(answers)):
                if answers[better] == answers[worse]:
                    identical += 1
                else:
                    told_apart.append([first + better, first + worse])
        for pair in told_apart:
            rows.append(pair)
            weights.append(1 / len(told_apart))
            labels.append(ranking.label)
        first += len(answers)
    return (
        torch.tensor(rows, dtype=torch.int64).view(-1, 2),
        torch.tensor(weights, dtype=torch.float32),
        torch.tensor(labels, dtype=torch.float32),
        identical,
    )


def read_rankings(
    model: RewardModel, rankings: Sequence[Ranking], pad_id: int
) -> Tensor:
    """The model's number for every answer of the rankings, one after the other.

    Shapes: -> (number of answers,). Gradient: through the model.
    Raises: as `collate`, `RewardModel`.
    """
    examples = []
    for ranking in rankings:
        for answer in ranking.answers:
            examples.append((ranking.prompt, answer))
    tokens, mask = collate(examples, pad_id)  # (A, T), (A, S), of A answers
    device = model.offset.device
    return model(tokens.to(device), mask.to(device))  # (A,)


def train(
    model: RewardModel,
    tokenizer: Tokenizer,
    rankings: Sequence[Ranking],
    config: RewardModelConfig,
    *,
    generator: torch.Generator,
    loss: Callable[..., Tensor] = pairwise_loss,
    state: dict | None = None,
) -> Iterator[dict[str, float]]:
    """Train the model in place; one dict of metrics per optimiser step.

    Steps take the rankings in random order, anew when they are used up. `generator`
    seeds that order. A `state` dict is complete at every yield and continues a run when
    it is handed in again. `loss` is called with chosen and rejected and, by name, with
    label, weights and count: the labels are those of the rankings, and take the place
    of one that was bound before.

    Metrics: those of `Learner.report`, and, of the step's rankings before it,

        update       steps so far
        rankings     seen so far
        pairs        that can be told apart
        identical    pairs left out, for their two answers have the same tokens
        loss         nats
        preferred    share of the pairs whose first answer in the ranking leads
        gap          mean of the first one's number less the other's

    Raises: as `check_settings`, `pairs_of`, `loss`; ValueError for no rankings, for
    none with two answers that differ, and for a gradient that is not finite.
    """
    check_settings(config)
    if not rankings:
        raise ValueError("rankings: got none, need at least one")
    if not len(pairs_of(rankings)[0]):
        raise ValueError("rankings: in none of them are there two different answers")
    learner = Learner(
        config, config.updates, generator, state, model=(model, config.lr)
    )
    order = learner.state.get("order", [])  # of the rankings still to be met

    for update in learner.remaining():
        # 1. draw
        while len(order) < config.batch:
            more = torch.randperm(len(rankings), generator=learner.data_order)
            order = order + more.tolist()
        batch = [rankings[i] for i in order[: config.batch]]
        order = order[config.batch :]

        sums = Sums()
        pairs_met = 0
        identical_met = 0
        for first in range(0, len(batch), config.micro_batch):
            part = batch[first : first + config.micro_batch]

            # 2. score
            numbers = read_rankings(model, part, tokenizer.pad_id)  # (A,)

            # 3. compare
            pairs, weights, labels, identical = pairs_of(part)  # (n, 2), (n,), (n,)
            pairs_met += len(pairs)
            identical_met += identical
            if not len(pairs):
                continue  # nothing but twins: there is nothing to learn from these
            chosen = numbers[pairs[:, 0]]  # (n,)
            rejected = numbers[pairs[:, 1]]  # (n,)

            # 4. update
            piece = loss(
                chosen,
                rejected,
                label=labels.to(numbers),
                weights=weights.to(numbers),
                count=len(batch),
            )
            token_count = 0
            for ranking in part:
                token_count += sum(len(answer) for answer in ranking.answers)
            learner.backward(piece, token_count)
            gaps = (chosen - rejected).detach()  # (n,)
            sums.add(
                loss=piece,
                gap=gaps.sum(),
                preferred=(gaps > 0).sum(),
            )
        learner.step()

        # 5. report
        learner.keep(order=order)
        found = sums.read()
        yield {
            "update": update + 1,
            "rankings": (update + 1) * config.batch,
            "pairs": pairs_met,
            "identical": identical_met,
            **learner.report(),
            "loss": found.get("loss", 0.0),
            "preferred": found.get("preferred", 0.0) / max(pairs_met, 1),
            "gap": found.get("gap", 0.0) / max(pairs_met, 1),
        }
