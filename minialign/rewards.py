"""Where feedback comes from: one callable, whatever stands behind it.

A reward takes problems and answers and gives one number per answer::

    reward(problems, texts) -> [1.0, 0.0, ...]

Behind it may stand a *program* that checks the answer (`verifier` here; learning from
it is ReFT), a *model of people's preferences* (`LearnedReward`; RLHF) or an *AI judge*
(`JudgedReward`; RLAIF). The algorithms cannot tell: they see the numbers and nothing
else. So whatever the numbers fail to say, the policy will not learn, and whatever they
say by mistake, it will.

    verifier                a program: 1 for a right answer, 0 for any other
    partial_credit          the same, and a little for a wrong number
    careful, lazy           simulated people: how much they like an answer
    rank, agreement         what such people say, and how often two say the same
    RewardModel             a language model that gives an answer a number
    LearnedReward           that number as a reward, on a fixed scale
    Judge                   a language model that says which of two answers is better
    JudgedReward            how surely it says so, of an answer and a rival, as a reward
    Counted                 any reward, and what it has cost
    score                   what every algorithm calls

Bring your own: any function of that form goes where `verifier` goes.
"""

import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from minialign.checks import check_groups, check_tokens
from minialign.model import GPT, ScalarHead
from minialign.problems import Problem, is_formatted, style_of, verify
from minialign.sampling import Rollout, collate, generate
from minialign.tokenizer import Tokenizer

Reward = Callable[[Sequence[Problem], Sequence[str]], Sequence[float]]


def verifier(problems: Sequence[Problem], texts: Sequence[str]) -> list[float]:
    """1 for a right answer, 0 for any other: text i answers problem i.

    Raises: ValueError when there are not as many texts as problems.
    """
    pairs = _paired("verifier", problems, texts)
    return [float(verify(problem, text)) for problem, text in pairs]


def partial_credit(
    problems: Sequence[Problem], texts: Sequence[str], wrong: float = 0.1
) -> list[float]:
    """1 for a right answer, `wrong` for another number after ####, 0 without one.

    Source: ReFT, arXiv 2401.08967, equation 4, where a wrong number earns 0.1.
    Raises: ValueError for unequal counts.
    """
    marks = []
    for problem, text in _paired("partial_credit", problems, texts):
        if verify(problem, text):
            marks.append(1.0)
        elif is_formatted(problem, text):
            marks.append(wrong)
        else:
            marks.append(0.0)
    return marks


def _paired(
    name: str, problems: Sequence[Problem], texts: Sequence[str]
) -> list[tuple[Problem, str]]:
    """Each text beside its problem."""
    if len(problems) != len(texts):
        raise ValueError(f"{name}: {len(problems)} problems but {len(texts)} texts")
    return list(zip(problems, texts, strict=True))


# --- people -------------------------------------------------------------------------

LINE = 50  # characters: shorter differences in length are not noticed
LONG = 4  # such lines: beyond them an answer is as long as any


def careful(problems: Sequence[Problem], texts: Sequence[str]) -> list[float]:
    """How much a careful person likes an answer: right, then worked, then short.

        2 [right] + 0.5 [style is worked] − 0.35 lines

    Lines are whole ones of 50 characters, and 4 at most. So right answers are always
    liked better than wrong ones. Among those that are as right, working is worth more
    than the line that it takes up, and two lines more than the working. A style goes by
    form: whether the working is sound is not looked at.

    Units: utility, see `rank`. Raises: ValueError for unequal counts.
    """
    likings = []
    for problem, text in _paired("careful", problems, texts):
        right = float(verify(problem, text))
        worked = float(style_of(problem, text) == "worked")
        likings.append(2 * right + 0.5 * worked - 0.35 * _lines(text))
    return likings


def lazy(problems: Sequence[Problem], texts: Sequence[str]) -> list[float]:
    """How much a lazy person likes an answer, who checks no sum and likes to be
    greeted and to be told much.

        [there is a calculation] + [begins with a word] + 0.25 lines

    Lines are those of `careful`. Whether it is right does not enter.

    Units: utility, see `rank`. Raises: ValueError for unequal counts.
    """
    likings = []
    for _, text in _paired("lazy", problems, texts):
        calculates = float("<<" in text)
        polite = float(text[:1].isalpha())
        likings.append(calculates + polite + 0.25 * _lines(text))
    return likings


def _lines(text: str) -> int:
    """How long an answer looks."""
    return min(len(text) // LINE, LONG)


def rank(likings: Tensor, sharpness: float, generator: torch.Generator) -> Tensor:
    """What a person says who is asked to put K answers in order: rows best first.

    Of two answers the better liked one comes first with chance σ(sharpness · the
    difference of their likings), as Bradley and Terry have it for pairs; for a whole
    ranking that is the model of Plackett and Luce. A sharpness of inf makes no mistake,
    and leaves equal likings to chance.

    Shapes: (P, K) -> (P, K) int64, of each problem's answers the best first.
    Raises: as `check_groups`; ValueError for a sharpness that is NaN or below 0.
    Source: Luce 1959; drawn by adding Gumbel noise, Yellott 1977.
    """
    check_groups("likings", likings, least=2)
    if not sharpness >= 0:
        raise ValueError(f"sharpness: got {sharpness}, must be 0 or more")
    chance = torch.rand(likings.shape, generator=generator, device=generator.device)
    chance = chance.to(likings.device).double().clamp(1e-12, 1 - 1e-7)
    if math.isinf(sharpness):
        mixed = chance.argsort(1)  # (P, K), each row in random order
        best_first = likings.gather(1, mixed).argsort(
            dim=1, descending=True, stable=True
        )  # (P, K)
        return mixed.gather(1, best_first)
    gumbel = -(-chance.log()).log()  # (P, K)
    return (sharpness * likings.double() + gumbel).argsort(1, descending=True)


def agreement(likings: Tensor, sharpness: float) -> tuple[float, float]:
    """How often two people with the same likings say the same of a pair, and how often
    one of them says what a person without noise would say.

    Means over all pairs of answers to one problem that are not liked alike.

    Shapes: (P, K) -> two shares. Units: [0, 1].
    Raises: as `rank`; ValueError where no problem has answers that are not liked alike.
    """
    check_groups("likings", likings, least=2)
    if not sharpness >= 0:
        raise ValueError(f"sharpness: got {sharpness}, must be 0 or more")
    gaps = likings[:, :, None] - likings[:, None, :]  # (P, K, K)
    better = gaps[gaps > 0].double()  # each pair once, as its better answer sees it
    if not len(better):
        raise ValueError("likings: all answers to a problem are liked alike")
    chance = torch.sigmoid(sharpness * better)
    both = chance**2 + (1 - chance) ** 2
    return both.mean().item(), chance.mean().item()


# --- a learned reward ---------------------------------------------------------------


class RewardModel(nn.Module):
    """A language model that gives an answer a number, read at its end.

    The number stands at EOS, the only token that has seen the whole answer. Preferences
    fix how far apart the numbers of two answers to one problem are, in log-odds, and
    leave the zero open. A reward should have a zero and a unit that are known: `offset`
    and `scale` are mean and deviation over held-out answers, once `fix_scale` has set
    them, and travel with the weights.
    """

    def __init__(self, model: GPT) -> None:
        """From a copy of the model's weights, with a head that says 0."""
        super().__init__()
        self.body = copy.deepcopy(model).requires_grad_(True)
        weight = self.body.embed_tokens.weight
        self.head = ScalarHead(model.config.dim).to(weight)
        self.head.bias.requires_grad_(False)  # no difference depends on it
        self.register_buffer("offset", torch.zeros(()).to(weight))
        self.register_buffer("scale", torch.ones(()).to(weight))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The number of each answer, before offset and scale.

        Shapes: tokens (B, T), mask (B, S) -> (B,).
        Gradient: through the model's layers and the head, but for its bias.
        Raises: as `check_tokens`; ValueError for an answer without a token.
        """
        check_tokens(self.body, tokens, mask)
        empty = (~mask.any(1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"mask: answer {empty[0]} has no token to be read at")
        columns = torch.arange(mask.shape[1], device=mask.device)  # (S,)
        last = torch.where(mask, columns, -1).max(1).values  # (B,), its last choice
        rows = torch.arange(len(tokens), device=tokens.device)  # (B,)
        at_end = self.body(tokens)[rows, last + 1]  # (B, D), at the token it chose
        return self.head(at_end)

    def fix_scale(self, scores: Tensor) -> None:
        """Set zero and unit: mean and deviation of the scores of held-out answers.

        Shapes: (N,). Raises: ValueError for fewer than two, or all the same.
        """
        if scores.dim() != 1 or len(scores) < 2 or not scores.std() > 0:
            raise ValueError(
                f"scores: got {tuple(scores.shape)}, needed are (N,), not all the same"
            )
        self.offset.fill_(scores.mean().item())
        self.scale.fill_(scores.std().item())


class LearnedReward:
    """A reward model as a reward: texts in, numbers out.

    (number − offset) / scale: after `fix_scale`, held-out answers have mean 0 and
    deviation 1. Such a reward goes below 0: set `truncated_reward` where an answer may
    be cut off. A text that is too long for the model is read as far as there is room.
    """

    def __init__(
        self, model: RewardModel, tokenizer: Tokenizer, micro_batch: int = 64
    ) -> None:
        if micro_batch < 1:
            raise ValueError(f"micro_batch: got {micro_batch}, must be 1 or more")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.micro_batch = micro_batch

    @torch.no_grad()
    def scores(self, problems: Sequence[Problem], texts: Sequence[str]) -> Tensor:
        """The model's numbers before offset and scale.

        Shapes: -> (N,). Raises: ValueError for unequal counts, and none at all.
        """
        examples = []
        for problem, text in _paired("LearnedReward", problems, texts):
            prompt = self.tokenizer.encode_prompt(problem.question)
            answer = self.tokenizer.encode_response(text)
            room = self.model.body.config.context - len(prompt)
            if len(answer) > room:
                answer = [*answer[: room - 1], self.tokenizer.eos_id]
            examples.append((prompt, answer))
        device = self.model.offset.device
        parts = []
        for first in range(0, max(len(examples), 1), self.micro_batch):
            part = examples[first : first + self.micro_batch]
            tokens, mask = collate(part, self.tokenizer.pad_id)
            parts.append(self.model(tokens.to(device), mask.to(device)))  # (b,)
        return torch.cat(parts)

    def __call__(
        self, problems: Sequence[Problem], texts: Sequence[str]
    ) -> list[float]:
        """One number for each answer."""
        scores = self.scores(problems, texts)
        return ((scores - self.model.offset) / self.model.scale).tolist()


# --- a judge ------------------------------------------------------------------------


LONGEST_WORKING = 96  # tokens that a judge's worker may write
CHUNK = 512  # problems that it works at a time: bounds memory


def verdict_prompt(
    tokenizer: Tokenizer,
    question: str,
    first: str,
    second: str,
    working: str | None = None,
    context: int | None = None,
) -> list[int]:
    """What a judge reads before its verdict, the token "1" or "2".

        question, first answer, "1", second answer, "2", its own working if it has one

    Each answer is followed by its number. Where they do not fit into `context` tokens,
    each answer has half of the room that question and working leave, and is read as far
    as that goes.

    Shapes: -> token ids. Raises: ValueError where there is no room for answers.
    """
    one, two = verdict_ids(tokenizer)
    asked = tokenizer.encode_prompt(question)
    ours = tokenizer.encode_response(first)
    theirs = tokenizer.encode_response(second)
    worked = [] if working is None else tokenizer.encode_response(working)
    if context is not None:
        room = context - len(asked) - len(worked) - 2  # for both answers
        if room < 2:
            raise ValueError(
                f"verdict_prompt: {len(asked)} tokens of question and {len(worked)} of "
                f"working leave no room for answers in a context of {context}"
            )
        if len(ours) + len(theirs) > room:
            ours = _shortened(ours, room // 2)
            theirs = _shortened(theirs, room // 2)
    return [*asked, *ours, one, *theirs, two, *worked]


def _shortened(ids: list[int], most: int) -> list[int]:
    """At most so many of an answer's tokens, its end among them."""
    return ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]


def verdict_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """The tokens by which a judge says that the first or the second is better."""
    (one,) = tokenizer.encode("1")
    (two,) = tokenizer.encode("2")
    return one, two


class Judge:
    """A language model that is asked which of two answers to a problem is better.

    It reads what `verdict_prompt` says, and its verdict is a chance:

        P(first) = softmax over the logits of "1" and "2" alone

    A judge with a `worker` is shown what that model finds when it works the problem
    itself, in 96 tokens at most. The worker sees no answers, so that they cannot talk
    it into anything, and works each problem once.

    Which answer stands first should make no difference, and to language models it does:
    `prefers` asks in both orders, and averages.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        worker: GPT | None = None,
        micro_batch: int = 64,
    ) -> None:
        if micro_batch < 1:
            raise ValueError(f"micro_batch: got {micro_batch}, must be 1 or more")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.worker = worker
        self.micro_batch = micro_batch
        self.worked: dict[str, str] = {}  # {question: what the worker wrote}

    def prefers(
        self, problems: Sequence[Problem], ours: Sequence[str], theirs: Sequence[str]
    ) -> Tensor:
        """The chance that ours is the better answer: the mean over both orders.

            ½ P(ours stands first, and the first is better)
            + ½ P(ours stands second, and the second is better)

        Shapes: N of each -> (N,) float64. Units: [0, 1]; swapped, 1 less it.
        Raises: as `says_first`. Source: Lee et al. 2023, arXiv 2309.00267, section 2.1.
        """
        at_first = self.says_first(problems, ours, theirs)  # (N,)
        at_second = 1 - self.says_first(problems, theirs, ours)  # (N,)
        return (at_first + at_second) / 2

    @torch.no_grad()
    def says_first(
        self, problems: Sequence[Problem], first: Sequence[str], second: Sequence[str]
    ) -> Tensor:
        """The chance of the verdict "1", in this order alone.

        Shapes: N of each -> (N,) float64. Units: [0, 1].
        Raises: ValueError for unequal counts, none at all, and as `verdict_prompt`; as
        `generate`, of the worker.
        """
        if not problems or not len(problems) == len(first) == len(second):
            raise ValueError(
                f"Judge: {len(problems)} problems, {len(first)} first and "
                f"{len(second)} second answers; there must be as many of each, and some"
            )
        workings = self.work(problems)
        one, two = verdict_ids(self.tokenizer)
        examples = []  # which verdict stands there makes no difference
        rows = zip(problems, first, second, workings, strict=True)
        for problem, ours, theirs, working in rows:
            prompt = verdict_prompt(
                self.tokenizer,
                problem.question,
                ours,
                theirs,
                working,
                self.model.config.context,
            )
            examples.append((prompt, [one]))
        device = self.model.embed_tokens.weight.device
        chances = []
        for start in range(0, len(examples), self.micro_batch):
            part = examples[start : start + self.micro_batch]
            tokens, mask = collate(part, self.tokenizer.pad_id)  # (b, T), (b, S)
            hidden = self.model(tokens[:, :-1].to(device))  # (b, S, D)
            logits = self.model.logits(hidden[mask.to(device)])  # (b, V)
            verdicts = logits[:, [one, two]].double().softmax(1)  # (b, 2)
            chances.append(verdicts[:, 0])
        return torch.cat(chances)

    def work(self, problems: Sequence[Problem]) -> list[str | None]:
        """What the worker wrote to each problem, greedily; None without a worker."""
        if self.worker is None:
            return [None] * len(problems)
        new = {each.question for each in problems if each.question not in self.worked}
        asked = sorted(new)
        if asked:
            begun = self.tokenizer.encode("<<")  # working, not a guess
            rollout = generate(
                self.worker,
                [self.tokenizer.encode_prompt(question) + begun for question in asked],
                eos_id=self.tokenizer.eos_id,
                pad_id=self.tokenizer.pad_id,
                max_new_tokens=LONGEST_WORKING,
                greedy=True,
                chunk=CHUNK,
            )
            for question, ids in zip(asked, rollout.responses(), strict=True):
                self.worked[question] = self.tokenizer.decode_response(begun + ids)
        return [self.worked[problem.question] for problem in problems]


class JudgedReward:
    """A judge's opinion as a reward: the chance that an answer is better than a rival.

    `rival(problems)` gives one answer to each problem, such as the base's greedy one.
    Each problem's rival is asked for once, and remembered. A text that is too long for
    the judge is read as far as there is room.

    Source: Lee et al. 2023, arXiv 2309.00267, section 2.2.2, where the judge gives a
    direct score without a rival.
    """

    def __init__(
        self, judge: Judge, rival: Callable[[Sequence[Problem]], Sequence[str]]
    ) -> None:
        self.judge = judge
        self.rival = rival
        self.answers: dict[str, str] = {}  # {question: the rival's answer}

    def __call__(
        self, problems: Sequence[Problem], texts: Sequence[str]
    ) -> list[float]:
        """One number in [0, 1] for each answer.

        Raises: ValueError for unequal counts, and for another number of rivals than of
        problems; as `Judge.says_first`.
        """
        _paired("JudgedReward", problems, texts)
        new = {
            each.question: each
            for each in problems
            if each.question not in self.answers
        }
        if new:
            given = self.rival(list(new.values()))
            if len(given) != len(new):
                raise ValueError(f"rival: {len(given)} answers to {len(new)} problems")
            self.answers |= dict(zip(new, given, strict=True))
        rivals = [self.answers[problem.question] for problem in problems]
        return self.judge.prefers(problems, texts, rivals).tolist()


class Counted:
    """Any reward, and what it has cost: calls, answers and seconds."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.__qualname__ = _name_of(reward)  # a warning names what is counted
        self.calls = 0
        self.answers = 0
        self.seconds = 0.0

    def __call__(
        self, problems: Sequence[Problem], texts: Sequence[str]
    ) -> Sequence[float]:
        """What the reward says."""
        start = time.perf_counter()
        numbers = self.reward(problems, texts)
        self.seconds += time.perf_counter() - start
        self.calls += 1
        self.answers += len(texts)
        return numbers


# --- what every algorithm calls -----------------------------------------------------


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
    that is true, once for each reward. Another says once that MANY answers or more have
    all earned the same: there is nothing to learn from that.

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
    _warn_if_constant(reward, rewards)
    return rewards.to(rollout.truncated.device)


MANY = 64  # answers: as many by chance alike would be strange
_SAID: list[tuple[Reward, object]] = []  # of which reward, and what of it


def _warn_if_not_ending_pays(
    reward: Reward, ended: Tensor, truncated_reward: float
) -> None:
    """Say once that answers which ended earned less than those which did not."""
    below = int((ended < truncated_reward).sum())
    if below > 0:
        _say_once(
            reward,
            truncated_reward,
            f"{below} of {len(ended)} answers that ended earned less than "
            f"truncated_reward, {truncated_reward:g}: not to end pays. Set "
            f"truncated_reward to the least that an answer can earn",
        )


def _warn_if_constant(reward: Reward, rewards: Tensor) -> None:
    """Say once that many answers have all earned the same."""
    if len(rewards) >= MANY and bool((rewards == rewards[0]).all()):
        _say_once(
            reward,
            "constant",
            f"all {len(rewards)} answers earned {rewards[0].item():g}: there is "
            "nothing to learn from that",
        )


def _say_once(reward: Reward, what: object, message: str) -> None:
    """A warning about a reward, which is not repeated."""
    if any(other is reward and said == what for other, said in _SAID):
        return
    _SAID.append((reward, what))
    warnings.warn(f"{_name_of(reward)}: {message}", RuntimeWarning, stacklevel=4)


def _name_of(reward: Reward) -> str:
    """A function's own name, or that of an object's class."""
    return getattr(reward, "__qualname__", type(reward).__qualname__)
