"""Sampling: prompts in, a `Rollout` out, with everything a training step needs.

The K samples of a prompt share one prefill. Prompts are padded at the left while
sampling, so that every row writes the same column of the cache, and at the right in
the rollout, where causal attention needs no mask. Rows that have ended leave the batch.

There is no top-k and no top-p, so the sampler's log-probs are the policy's own at the
rollout's temperature, and scoring the rollout at that temperature repeats them.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from minialign.logprobs import Model, token_logprobs
from minialign.model import GPT, KVCache

LOOK_EVERY = 4  # steps between looks at which rows have ended: each makes a GPU wait
DROP_SHARE = 0.25  # a smaller share of ended rows stays: copying the cache is not free


Example = tuple[list[int], list[int]]  # ids: prompt, response ending in EOS
Item = TypeVar("Item")


@dataclass(frozen=True)
class Rollout:
    """Sampled answers: row b answers prompt b // samples.

    A row of `tokens` is prompt + response + padding. Index s of `mask` and `logprobs`
    is about the choice of `tokens[:, s + 1]`. EOS is a choice, what follows it is not.
    """

    tokens: Tensor  # (B, T) int64
    mask: Tensor  # (B, S) bool, S = T - 1: True where the policy chose
    logprobs: Tensor  # (B, S) nats at `temperature`, 0 where the policy did not choose
    prompt_lengths: Tensor  # (B,) int64
    truncated: Tensor  # (B,) bool: no EOS within the budget
    temperature: float  # 1.0 for greedy answers
    samples: int  # K, rows per prompt
    greedy: bool = False

    def lengths(self) -> Tensor:
        """Response tokens per row, EOS included. Shapes: -> (B,) int64."""
        return self.mask.sum(dim=1)

    def responses(self) -> list[list[int]]:
        """The ids that each row chose, EOS included."""
        starts = self.prompt_lengths.tolist()
        ends = (self.prompt_lengths + self.lengths()).tolist()
        rows = self.tokens.tolist()
        return [
            row[start:end] for row, start, end in zip(rows, starts, ends, strict=True)
        ]

    def repeated(self, problems: Sequence[Item]) -> list[Item]:
        """The problem that each row answers: every one K times, side by side."""
        asked = []
        for problem in problems:
            asked += [problem] * self.samples
        return asked

    def select(self, rows: Tensor) -> "Rollout":
        """These rows alone, without the columns that none of them uses."""
        last = int((self.prompt_lengths + self.lengths())[rows].max())
        return replace(
            self,
            tokens=self.tokens[rows, :last],
            mask=self.mask[rows, : last - 1],
            logprobs=self.logprobs[rows, : last - 1],
            prompt_lengths=self.prompt_lengths[rows],
            truncated=self.truncated[rows],
            samples=1,
        )

    def micro_batches(self, size: int) -> list[Tensor]:
        """Rows in parts of `size`, alike in length, so that little is padding.

        A loss that divides each part by the whole count gets the whole's gradient.
        """
        if size < 1:
            raise ValueError(f"size must be >= 1, got {size}")
        order = (self.prompt_lengths + self.lengths()).argsort(stable=True)
        return list(order.split(size))

    def to(self, device: torch.device) -> "Rollout":
        """The same rollout there."""
        moved = {}
        for name, x in vars(self).items():
            if isinstance(x, Tensor):
                moved[name] = x.to(device)
        return replace(self, **moved)


@torch.no_grad()
def rescore(model: Model, rollout: Rollout, parts: Iterable[Tensor]) -> Tensor:
    """Log-probs as training computes them, in its own parts: the same bits.

    Shapes: parts: rows, together all B -> (B, S), 0 where masked. Gradient: none.
    Raises: ValueError for parts that leave a row out, or hold it twice.
    """
    parts = list(parts)
    held = sorted(row for rows in parts for row in rows.tolist())
    if held != list(range(len(rollout.tokens))):
        rows = f"each of the {len(rollout.tokens)} rows once"
        raise ValueError(f"parts must hold {rows}, got {held}")
    logprobs = torch.zeros_like(rollout.logprobs)  # (B, S)
    for rows in parts:
        part = rollout.select(rows)
        width = part.mask.shape[1]  # these answers need no more columns
        found = token_logprobs(model, part.tokens, part.mask, rollout.temperature)
        logprobs[rows, :width] = found.to(logprobs)
    return logprobs


def collate(
    examples: Sequence[Example], pad_id: int, learn_prompt: bool = False
) -> tuple[Tensor, Tensor]:
    """Given answers in a rollout's shape: right-padded tokens (B, T), mask (B, S).

    The mask is True where the *predicted* token belongs to the response, EOS included;
    with `learn_prompt` also where it belongs to the prompt.

    Raises: ValueError for no examples, an empty prompt or an empty response; TypeError
    for ids that are not integers.
    """
    if not examples:
        raise ValueError("examples: got none, need at least one")
    for row, (prompt, response) in enumerate(examples):
        if not prompt or not response:
            empty = "response" if prompt else "prompt"
            raise ValueError(f"examples[{row}]: the {empty} is empty")
    longest = max(len(prompt) + len(response) for prompt, response in examples)
    tokens = torch.full((len(examples), longest), pad_id)  # (B, T)
    mask = torch.zeros(len(examples), longest - 1, dtype=torch.bool)  # (B, S)
    for row, (prompt, response) in enumerate(examples):
        ids = torch.tensor(prompt + response)
        end = len(ids)
        if ids.dtype != torch.int64:
            raise TypeError(f"examples[{row}]: ids must be integers, got {ids.dtype}")
        tokens[row, :end] = ids
        first = 0 if learn_prompt else len(prompt) - 1
        mask[row, first : end - 1] = True
    return tokens, mask


@torch.no_grad()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    eos_id: int,
    pad_id: int,
    max_new_tokens: int,
    samples: int = 1,
    temperature: float = 1.0,
    greedy: bool = False,
    generator: torch.Generator | None = None,
    chunk: int | None = None,
) -> Rollout:
    """Answer every prompt `samples` times: y_t ~ softmax(logits_t / temperature).

    `greedy` takes the likeliest token and records its log-prob at temperature 1. A row
    stops at its first EOS or after `max_new_tokens`. Every row owns max_new_tokens of
    the generator's numbers, used or not: what it draws depends on how many rows there
    are, never on what they say. `chunk` prompts are answered at a time, which bounds
    memory and changes the draws; None: all at once.

    Shapes: N prompts -> a Rollout of B = N * samples rows.
    Gradient: none. Leaves torch's global generator and the model's mode alone.
    Raises: ValueError for prompts that are empty, hold ids outside the vocabulary or
    leave no room for max_new_tokens, and for sampling without a generator.
    """
    check(model, prompts, eos_id, pad_id, max_new_tokens, samples)
    check_choice(temperature, greedy, generator)
    if chunk is not None and chunk < len(prompts):
        if chunk < 1:
            raise ValueError(f"chunk must be >= 1 or None, got {chunk}")
        parts = []
        for first in range(0, len(prompts), chunk):
            part = generate(
                model,
                prompts[first : first + chunk],
                eos_id=eos_id,
                pad_id=pad_id,
                max_new_tokens=max_new_tokens,
                samples=samples,
                temperature=temperature,
                greedy=greedy,
                generator=generator,
            )
            parts.append(part)
        return _joined(parts, pad_id)
    device = model.embed_tokens.weight.device
    B = len(prompts) * samples
    sizes = [len(prompt) for prompt in prompts]
    longest = max(sizes)

    left = [[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    padding = torch.tensor([longest - size for size in sizes], device=device)  # (N,)
    # The last choice is never read, hence one column fewer than there are tokens.
    cache = KVCache(model, len(prompts), longest + max_new_tokens - 1)
    tokens = torch.tensor(left, device=device)  # (N, longest)
    hidden = model(tokens, cache, padding if min(sizes) < longest else None)[:, -1]
    hidden = hidden.repeat_interleave(samples, dim=0)  # (B, D)
    cache.repeat(samples)

    uniforms = None
    if not greedy:
        uniforms = torch.rand(
            (max_new_tokens, B),
            generator=generator,
            device=generator.device,
            dtype=torch.float64,
        ).to(device)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    response = torch.full((B, max_new_tokens), pad_id, device=device)
    logprobs = torch.zeros(response.shape, dtype=dtype, device=device)
    rows = torch.arange(B, device=device)  # (live,) the rows still in the batch
    ended = torch.zeros(B, dtype=torch.bool, device=device)  # (live,)

    for step in range(max_new_tokens):
        scores = (model.logits(hidden).to(dtype) / temperature).log_softmax(dim=-1)
        if greedy:
            choice = scores.argmax(dim=-1)  # (live,)
        else:
            choice = invert(scores.exp(), uniforms[step, rows])  # (live,)
        response[rows, step] = choice
        logprobs[rows, step] = scores.gather(1, choice[:, None])[:, 0]
        if step + 1 == max_new_tokens:
            break
        ended |= choice == eos_id
        if step % LOOK_EVERY == 0:
            live = (~ended).nonzero()[:, 0]
            if len(live) == 0:
                break
            if len(live) <= (1 - DROP_SHARE) * len(rows):
                cache.keep(live)
                rows = rows[live]
                ended = ended[live]
                choice = choice[live]
        hidden = model(choice[:, None], cache)[:, -1]  # (live, D)

    # Between looks, a row that has ended goes on writing: what it wrote goes now.
    eos = (response == eos_id).long()
    chosen = eos.cumsum(dim=1) == eos  # (B, max_new_tokens) up to the first EOS
    if not logprobs[chosen].isfinite().all():
        raise ValueError("the model's log-probs are not finite: its weights are broken")

    prompt_lengths = torch.tensor(sizes, device=device).repeat_interleave(samples)
    columns = prompt_lengths[:, None] + torch.arange(max_new_tokens, device=device)
    right = [list(prompt) + [pad_id] * (longest - len(prompt)) for prompt in prompts]
    tokens = torch.full((B, longest + max_new_tokens), pad_id, device=device)
    starts = torch.tensor(right, device=device)  # (N, longest)
    tokens[:, :longest] = starts.repeat_interleave(samples, dim=0)
    tokens.scatter_(1, columns, response.masked_fill(~chosen, pad_id))
    mask = torch.zeros_like(tokens, dtype=torch.bool).scatter_(1, columns, chosen)
    nats = torch.zeros_like(tokens, dtype=dtype)
    nats.scatter_(1, columns, logprobs.masked_fill(~chosen, 0.0))
    T = int((prompt_lengths + chosen.sum(dim=1)).max())
    return Rollout(
        tokens=tokens[:, :T].contiguous(),
        mask=mask[:, 1:T].contiguous(),
        logprobs=nats[:, 1:T].contiguous(),
        prompt_lengths=prompt_lengths,
        truncated=~eos.any(dim=1),
        temperature=float(temperature),
        samples=samples,
        greedy=greedy,
    )


def _joined(parts: list[Rollout], pad_id: int) -> Rollout:
    """One rollout, as wide as the widest part."""
    T = max(part.tokens.shape[1] for part in parts)
    fills = {"tokens": pad_id, "mask": False, "logprobs": 0.0}
    whole = {}
    for name in (*fills, "prompt_lengths", "truncated"):
        tensors = []
        for part in parts:
            x = getattr(part, name)
            if name in fills:
                missing = T - part.tokens.shape[1]  # columns
                x = pad(x, (0, missing), value=fills[name])
            tensors.append(x)
        whole[name] = torch.cat(tensors)
    return replace(parts[0], **whole)


def invert(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse transform: the first id whose cumulative probability exceeds u.

    A row costs one random number, not V. Sums are float64: a token of probability 0
    is then never the first to exceed anything. (On CUDA such sums may differ in their
    last bits from run to run, and a rare draw with them.)

    Shapes: probs (B, V), uniforms (B,) in [0, 1) -> (B,) int64.
    """
    total = probs.cumsum(dim=-1, dtype=torch.float64)  # (B, V)
    target = uniforms[:, None] * total[:, -1:]  # the last sum is not exactly 1
    ids = torch.searchsorted(total, target, right=True)[:, 0]
    return ids.clamp(max=probs.shape[1] - 1)  # for NaN, which `generate` refuses later


def check(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    eos_id: int,
    pad_id: int,
    max_new_tokens: int,
    samples: int,
) -> None:
    """Refuse what cannot be sampled, naming the argument and the first wrong id."""
    V = model.config.vocab_size
    context = model.config.context
    counts = {"max_new_tokens": max_new_tokens, "samples": samples}
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {count!r}")
    ids = {"eos_id": eos_id, "pad_id": pad_id}
    for name, token in ids.items():
        if not 0 <= token < V:
            raise ValueError(f"{name} must be in 0..{V - 1}, got {token}")
    if eos_id == pad_id:
        raise ValueError(f"eos_id and pad_id must differ, both are {eos_id}")
    if len(prompts) == 0:
        raise ValueError("prompts is empty: at least one prompt is needed")
    for n, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompts[{n}] is empty: at least one id is needed")
        if len(prompt) + max_new_tokens > context:
            raise ValueError(
                f"prompts[{n}] has {len(prompt)} tokens, with max_new_tokens "
                f"{max_new_tokens} that exceeds the model's context of {context}"
            )
        for i, token in enumerate(prompt):
            if not isinstance(token, int):
                raise TypeError(f"prompts[{n}][{i}] must be an int, got {token!r}")
            if not 0 <= token < V:
                raise ValueError(
                    f"prompts[{n}][{i}] must be in 0..{V - 1}, got {token}"
                )


def check_choice(
    temperature: float, greedy: bool, generator: torch.Generator | None
) -> None:
    """Refuse temperatures that are none, and chance without a source of it."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(
            f"temperature must be finite and > 0, got {temperature}; "
            f"for the likeliest token use greedy=True"
        )
    if greedy and temperature != 1.0:
        raise ValueError(
            f"greedy records log-probs at temperature 1.0, got {temperature}"
        )
    if not greedy and generator is None:
        raise ValueError("sampling needs a generator: pass one, or greedy=True")
