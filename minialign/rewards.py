"""Where feedback comes from: one callable, whatever stands behind it.

A reward takes problems and answers and gives one number per answer::

    reward(problems, texts) -> [1.0, 0.0, ...]

Behind it may stand a *program* that checks the answer (`verifier` here; learning from
it is ReFT), a *model of people's preferences* (RLHF) or an *AI judge* (RLAIF). The
algorithms cannot tell: they see the numbers and nothing else. So whatever the numbers
fail to say, the policy will not learn, and whatever they say by mistake, it will.

Bring your own: any function of that form goes where `verifier` goes.
"""

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minialign.problems import Problem, verify
from minialign.sampling import Rollout
from minialign.tokenizer import Tokenizer

Reward = Callable[[Sequence[Problem], Sequence[str]], Sequence[float]]


def verifier(problems: Sequence[Problem], texts: Sequence[str]) -> list[float]:
    """1 for a right answer, 0 for any other: text i answers problem i.

    Raises: ValueError when there are not as many texts as problems.
    """
    if len(problems) != len(texts):
        raise ValueError(f"verifier: {len(problems)} problems but {len(texts)} texts")
    pairs = zip(problems, texts, strict=True)
    return [float(verify(problem, text)) for problem, text in pairs]


def score(
    reward: Reward,
    problems: Sequence[Problem],
    rollout: Rollout,
    tokenizer: Tokenizer,
    truncated_reward: float = 0.0,
) -> Tensor:
    """The reward of every answer in a rollout.

    The reward is called once, on all answers, with each problem repeated for its K
    samples; texts stop before the first EOS. An answer that did not end earns
    `truncated_reward`, whatever the reward says of it. If an answer that ended earns
    less, then not to end pays, and the policy will find out: a warning says of how many
    that is true, once for each reward.

    Shapes: problems has B / K entries for a rollout of B = prompts x K -> (B,) float32.
    Units: the reward's own. Gradient: none.
    Raises: ValueError when problems and rollout disagree, when the reward gives another
        count than one finite number per answer, or for a truncated_reward that is not
        finite; TypeError when the reward gives something that is not numbers.
    """
    if not math.isfinite(truncated_reward):
        raise ValueError(f"truncated_reward: got {truncated_reward}, must be finite")
    responses = rollout.responses()
    if len(problems) * rollout.samples != len(responses):
        raise ValueError(
            f"score: {len(problems)} problems x {rollout.samples} samples but the "
            f"rollout has {len(responses)} answers"
        )
    asked = rollout.repeated(problems)
    texts = [tokenizer.decode_response(ids) for ids in responses]
    given = reward(asked, texts)
    try:
        # By way of float64: float32 alone would stumble over 1e39 with another error.
        rewards = torch.as_tensor(given, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"score: the reward must give a sequence of numbers, one per answer; got "
            f"{type(given).__name__} ({error})"
        ) from None
    if rewards.shape != (len(texts),):
        raise ValueError(
            f"score: the reward gave shape {tuple(rewards.shape)} for {len(texts)} "
            f"answers; it must give one number per answer, ({len(texts)},)"
        )
    rewards = rewards.detach().float()  # (B,)
    unusable = (~rewards.isfinite()).nonzero().flatten().tolist()
    if unusable:
        first = unusable[0]
        raise ValueError(
            f"score: the reward of answer {first} is {rewards[first].item()}, which is "
            f"not finite: {texts[first][:60]!r}"
        )
    truncated = rollout.truncated.cpu()  # (B,)
    _warn_if_not_ending_pays(reward, rewards[~truncated], truncated_reward)
    rewards = rewards.masked_fill(truncated, truncated_reward)
    return rewards.to(rollout.truncated.device)


_SAID: list[tuple[Reward, float]] = []  # of which reward, and which truncated_reward


def _warn_if_not_ending_pays(
    reward: Reward, ended: Tensor, truncated_reward: float
) -> None:
    """Say once that answers which ended earned less than those which did not."""
    below = int((ended < truncated_reward).sum())
    known = any(other is reward and worth == truncated_reward for other, worth in _SAID)
    if below == 0 or known:
        return
    _SAID.append((reward, truncated_reward))
    name = getattr(reward, "__qualname__", repr(reward))
    warnings.warn(
        f"{name}: {below} of {len(ended)} answers that ended earned less than "
        f"truncated_reward, {truncated_reward:g}: not to end pays. Set "
        f"truncated_reward to the least that an answer can earn",
        RuntimeWarning,
        stacklevel=3,
    )
