"""What surrounds every loss: the draw of answers, and the steps of the optimiser.

A method's file holds what is its own: what it compares, its loss, and its loop. What
the loops have in common stands here.

    draw                  the next problems, and the policy's answers to them
    rescore_both          what policy and reference give to every token of the answers
    sampled_kl            from these, each answer's estimate of the KL to the reference
    deal                  the answers of one draw, dealt to several optimiser steps
    Learner               AdamW with its schedule, its guard, its state
    Sums                  metrics, added up on the device and read once

The shape of a loop::

    learner = Learner(
        config, config.updates, generator, state, policy=(policy, config.lr)
    )
    for update in learner.remaining():
        asked, rollout = draw(policy, tokenizer, problems, update, config, generator)
        ...
        for rows in rollout.micro_batches(config.micro_batch):
            ...
            learner.backward(loss, token_count)
        learner.step()
        learner.keep()
        yield {**learner.report(), ...}
"""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from minialign.logprobs import kl_k1
from minialign.model import GPT
from minialign.problems import Problem
from minialign.sampling import Rollout, generate, rescore
from minialign.tokenizer import Tokenizer


class DrawConfig(Protocol):
    """The settings of a draw, which every method that draws answers has."""

    prompts: int  # problems in a draw
    samples: int  # answers to each of them
    max_new_tokens: int
    temperature: float


class LearnerConfig(Protocol):
    """The settings of an optimiser, which every method has."""

    warmup: int  # updates of linear warm-up
    max_grad_norm: float


# The draw


def draw(
    policy: GPT,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    number: int,
    config: DrawConfig,
    generator: torch.Generator | None,
    *,
    greedy: bool = False,
    chunk: int | None = None,
) -> tuple[list[Problem], Rollout]:
    """The problems of draw `number`, and the policy's answers to them.

    Draw n asks problems[n * prompts : (n + 1) * prompts], from the start again when
    they run out. `greedy` takes one answer to each, the likeliest token at every step,
    and needs no generator. `chunk` problems are answered at a time; None: all at once.

    Shapes: -> `prompts` problems, and a Rollout of prompts * samples rows.
    Gradient: none. Raises: as `generate`.
    """
    first = number * config.prompts
    asked = [problems[(first + i) % len(problems)] for i in range(config.prompts)]
    rollout = generate(
        policy,
        [tokenizer.encode_prompt(problem.question) for problem in asked],
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        max_new_tokens=config.max_new_tokens,
        samples=1 if greedy else config.samples,
        temperature=1.0 if greedy else config.temperature,
        greedy=greedy,
        generator=generator,
        chunk=chunk,
    )
    return asked, rollout


def rescore_both(
    policy: GPT, reference: GPT | None, rollout: Rollout, micro_batch: int
) -> tuple[Tensor, Tensor]:
    """What policy and reference give to every token of the answers, computed alike.

    In the same parts and by the same code, so that a reference that is still a copy of
    the policy gives the same bits: then their KL is exactly 0. (The sampler's own
    log-probabilities differ from both by rounding, and of rounding alone Adam makes a
    whole step.) Without a reference there is nothing to compare with, and both are the
    sampler's.

    Shapes: -> two of (B, S), 0 where masked. Units: nats. Gradient: none.
    """
    if reference is None:
        return rollout.logprobs, rollout.logprobs
    parts = rollout.micro_batches(micro_batch)
    logprobs = rescore(policy, rollout, parts)  # (B, S)
    ref_logprobs = rescore(reference, rollout, parts)  # (B, S)
    return logprobs, ref_logprobs


def sampled_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Each answer's estimate of KL(policy ‖ reference): Σ_s k1[s].

    Its mean over the policy's own answers is unbiased; one answer's may be negative.

    Shapes: all (B, S) -> (B,). Units: nats per answer. Gradient: none.
    Raises: as `kl_k1`.
    """
    return kl_k1(logprobs, ref_logprobs, mask).detach().sum(1)


def deal(
    rollout: Rollout,
    epochs: int,
    minibatches: int,
    micro_batch: int,
    generator: torch.Generator,
) -> list[list[Tensor]]:
    """For each optimiser step of all epochs, the rows of each of its micro-batches.

    Every epoch deals all rows anew to its minibatches, one optimiser step each. A
    single minibatch holds them all: then nothing is left to chance, and the generator
    is not asked.

    Shapes: -> epochs * minibatches lists, one a step, of int64 tensors, one a
    micro-batch.
    """
    device = rollout.tokens.device
    B = len(rollout.tokens)
    rows = torch.arange(B, device=generator.device)  # (B,)
    steps = []
    for _ in range(epochs):
        if minibatches > 1:
            rows = torch.randperm(B, generator=generator, device=generator.device)
        for minibatch in rows.to(device).tensor_split(minibatches):
            parts = rollout.select(minibatch).micro_batches(micro_batch)
            steps.append([minibatch[part] for part in parts])
    return steps


# The steps


class Learner:
    """AdamW over one or more models: steps, schedule, guard and state.

    `updates` is the length of the run. Models come by name, each with the peak
    of its learning rate: `policy=(policy, config.lr)`. All follow one schedule: a
    linear rise over `config.warmup` updates, then a line that would meet 0 after the
    last.

    `config.max_grad_norm` is a guard against outliers and no part of a method: a
    model's gradient whose norm exceeds it is scaled down to it. Defaults are four times
    the median norm in the method's headline run (seed 100), rounded, so that few steps
    meet it (for GRPO, whose norms fall as its groups die, the median of the first
    quarter); `report` says how many did. The norm is in units of the loss: another
    beta, weight, reduction or size of reward may need another limit.

    `generator` samples answers, and nothing else. Whatever else is left to chance, such
    as the order in which answers are learnt from, asks `data_order`, a generator that
    is seeded from it once, at the start. So how a draw is used never changes what is
    drawn next.

    `state` is the caller's dict. Filled, it continues the run that wrote it: weights,
    moments, both generators and the position are restored at once, before anything is
    drawn. It is flat: a key for each model, "optimizer", "generator", "data_order",
    "update", and what `keep` is given besides. It holds the live weights: it is whole
    at a yield, and from then on it changes with the run. So save or copy it there; what
    an error in the middle of an update leaves is not whole.

    Raises: ValueError for a state without "data_order".
    """

    def __init__(
        self,
        config: LearnerConfig,
        updates: int,
        generator: torch.Generator,
        state: dict | None = None,
        **models: tuple[nn.Module, float],
    ) -> None:
        self.config = config
        self.updates = updates
        self.generator = generator
        self.state = {} if state is None else state
        self.models = {name: model for name, (model, _) in models.items()}
        self.peaks = [peak for _, peak in models.values()]
        parameter_groups = []
        self.weights = []  # of all models
        for model in self.models.values():
            weights = list(model.parameters())
            parameter_groups.append({"params": weights})
            self.weights += weights
        self.optimizer = torch.optim.AdamW(parameter_groups, weight_decay=0.0)
        self.data_order = torch.Generator()
        self.done = 0  # updates
        self._begin_update()
        if self.state:
            self._restore()
        else:
            seed = torch.randint(
                2**62, (), generator=generator, device=generator.device
            )
            self.data_order.manual_seed(seed.item())

    def _restore(self) -> None:
        """Put everything back as it was when the state was written."""
        if "data_order" not in self.state:
            raise ValueError(
                "state: there is no 'data_order' in it, the generator of data order; "
                "an earlier version wrote it: start the run anew"
            )
        for name, model in self.models.items():
            model.load_state_dict(self.state[name])
        # A copy, for the optimiser would go on in the moments that it is handed.
        self.optimizer.load_state_dict(copy.deepcopy(self.state["optimizer"]))
        self.generator.set_state(self.state["generator"])
        self.data_order.set_state(self.state["data_order"])
        self.done = self.state["update"]

    def _begin_update(self) -> None:
        self.token_count = 0  # of the steps that were taken
        self.pending_tokens = 0  # of the step that is being prepared
        self.norms = []  # of the first model, one a step
        self.guarded = 0  # steps

    def remaining(self) -> Iterator[int]:
        """The updates that are still to be made, each begun afresh: the learning rates
        of the schedule, no gradient left over, every model in training mode."""
        for update in range(self.done, self.updates):
            share = self.share_of_peak(update)
            parameter_groups = self.optimizer.param_groups
            for group, peak in zip(parameter_groups, self.peaks, strict=True):
                group["lr"] = peak * share
            self.optimizer.zero_grad(set_to_none=True)
            for model in self.models.values():
                model.train()
            self._begin_update()
            yield update

    def share_of_peak(self, update: int) -> float:
        """The schedule: up over `warmup` updates, then down along a line that would
        meet 0 after the last."""
        warmup = self.config.warmup
        up = (update + 1) / max(warmup, 1)
        down = (self.updates - update) / max(self.updates - warmup, 1)
        return min(up, down)

    def backward(self, loss: Tensor, token_count: Tensor | int) -> None:
        """Add the gradient of this part of the loss to that of the step.

        `token_count`: of how many choices it is made, such as `part.mask.sum()`.
        """
        loss.backward()
        self.pending_tokens = self.pending_tokens + token_count

    def step(self) -> None:
        """Take one step, and forget the gradients. Without any gradient, take none.

        The gradient of each model is scaled down to `max_grad_norm` if it is longer.

        Raises: ValueError for a gradient that is not finite, before any weight moves.
        """
        if all(weight.grad is None for weight in self.weights):
            return
        limit = self.config.max_grad_norm
        found = []
        for group in self.optimizer.param_groups:
            norm = nn.utils.clip_grad_norm_(group["params"], limit)
            found.append(norm.to(self.weights[0].device))
        norms = torch.stack(found).tolist()  # one wait for all of them
        for name, norm in zip(self.models, norms, strict=True):
            if not math.isfinite(norm):
                raise ValueError(
                    f"update {self.done}: the gradient of {name} has norm {norm}"
                )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.token_count = self.token_count + self.pending_tokens
        self.pending_tokens = 0
        self.norms.append(norms[0])
        if max(norms) > limit:
            self.guarded += 1

    def report(self) -> dict[str, float]:
        """What became of this update, for its metrics.

        steps             optimiser steps; those without anything to learn are none
        tokens_trained    live tokens that the steps learnt from; twice used, twice
                          counted
        grad_norm         mean over the steps, of the first model, before it was scaled
        guarded           share of the steps in which some gradient was scaled down
        """
        steps = len(self.norms)
        return {
            "steps": steps,
            "tokens_trained": int(self.token_count),
            "grad_norm": sum(self.norms) / max(steps, 1),
            "guarded": self.guarded / max(steps, 1),
        }

    def keep(self, **more: object) -> None:
        """Make the state complete, as of the end of this update, `more` included."""
        for name, model in self.models.items():
            self.state[name] = model.state_dict()
        self.state["optimizer"] = self.optimizer.state_dict()
        self.state["generator"] = self.generator.get_state()
        self.state["data_order"] = self.data_order.get_state()
        self.state |= more
        self.done += 1
        self.state["update"] = self.done


class Sums:
    """Numbers by name, added up where they lie and read once.

    To read a number off a GPU is to wait for it. So what a loop measures is added up on
    the device, in float64, and `read` waits once, for all of them.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, **values: Tensor) -> None:
        """Add each to the sum of its name. Shapes: all (). Gradient: none."""
        for name, value in values.items():
            term = value.detach().double()
            self.sums[name] = self.sums[name] + term if name in self.sums else term

    def read(self) -> dict[str, float]:
        """Every sum by name; {} if there was nothing to add."""
        if not self.sums:
            return {}
        numbers = torch.stack(list(self.sums.values())).tolist()
        return dict(zip(self.sums, numbers, strict=True))
