"""What every public function refuses, what it must not, and what a mask hides.

Four tables, and the last tests say that nothing is missing from them:

    REFUSED     a nonsense call, the exact type of its error, and a pattern of its
                message, in which the argument must be named
    LEGAL       calls at the edge of sense, each with its answer worked out by hand
    CALLS       legal calls with a mask, from tests/entries.py
    UNCHECKED   public functions that refuse nothing, and why they need not

Most rows of REFUSED are a legal call with one argument spoiled, in every way there is.
"""

import copy
import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import minialign
from minialign import (
    checkpoint,
    checks,
    course,
    evaluation,
    exact_world,
    exam,
    families,
    intervals,
    model,
    plotting,
    problems,
    rewards,
    sampling,
)
from minialign import logprobs as lp
from minialign import training as room
from minialign.algorithms import (
    dpo,
    grpo,
    ppo,
    reinforce,
    rejection_sampling,
    remax,
    reward_model,
    rloo,
    rrhf,
    sft,
    trpo,
)
from minialign.checkpoint import CheckpointError
from minialign.model import GPT, GPTConfig, KVCache
from minialign.rewards import RewardModel
from minialign.sampling import Rollout, collate
from minialign.tokenizer import Tokenizer, train_bpe
from tests.entries import (
    BAND,
    ENTRIES,
    FULL,
    MASK,
    PAIR,
    SHARE,
    TRIPLES,
    Entry,
    called,
    table,
)
from tests.properties import common
from tests.toy import PROBLEMS, TOKENIZER, base, generator, never, yes

inf, nan = math.inf, math.nan


def rand(*shape: int) -> Tensor:
    """The same numbers for the same shape, whatever other rows there are."""
    return table("rand", *shape, low=0.0, high=1.0)


def f64(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


still = cache(base)  # one model for all who only read it


def fresh() -> GPT:
    return copy.deepcopy(still())


@pytest.fixture(autouse=True, scope="module")
def elsewhere(tmp_path_factory):
    """Files are written where nobody looks."""
    folder = tmp_path_factory.mktemp("refusals")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(plotting, "LOCAL", folder)
        yield


# Legal calls of every function with a mask: the raw material of two tables

NEW, OLD, REF = -rand(3, 4, 4)  # (B, S) log-probabilities
X, Y, Z = rand(3, 4, 4) - 0.5  # (B, S)
EARNED = f64(1.0, 0.0, -0.5, 0.1)  # (B,)
PAIRED = f64([1.0, 0.0], [0.5, 0.5])  # (P, K), P x K = B

ONE = {"x": X, "mask": MASK}
NATS = {"logprobs": NEW, "mask": MASK}
RANKED = {**NATS, "rewards": PAIRED, "mask": FULL}


def call_of(entry: Entry) -> dict:
    return {**entry.call, **entry.set_options}


CALLS = {
    entry.function: call_of(entry)
    for entry in ENTRIES
    if entry.cases is not None and "mask" in entry.call and len(entry.call) > 1
}
CALLS |= {rrhf.sft_loss: RANKED, rrhf.rrhf_loss: RANKED}  # problem by problem


# REFUSED: how rows are made


@dataclass(frozen=True)
class Row:
    function: Callable
    argument: str  # a pattern of what the message must name
    case: str
    error: type[Exception]
    arguments: dict | Callable[[], dict]  # a function where they take some making
    detail: str = ""  # a pattern of what else the message says

    def __str__(self) -> str:
        return f"{called(self.function)}: {self.argument}, {self.case}"

    @property
    def pattern(self) -> str:
        return rf"(?s)(?=.*\b(?:{self.argument})\b).*{self.detail}"


REFUSED: list[Row] = []


def made(arguments: dict | Callable[[], dict]) -> dict:
    return arguments() if callable(arguments) else arguments


def changed(call: dict | Callable[[], dict], name: str, value: object) -> dict:
    return {**made(call), name: value}


def add(function, argument: str, case: str, arguments, error=ValueError, detail=""):
    REFUSED.append(Row(function, argument, case, error, arguments, detail))


def refuse(function, call, error=ValueError, *, names="", detail="", **wrong) -> None:
    """A row for each wrong value of each argument, the rest being a legal call.

    Values come as {case: value} where their text is no name for them. `names` is what
    the message names where that is not the argument as a whole.
    """
    for name, values in wrong.items():
        cases = values if isinstance(values, Mapping) else {str(x): x for x in values}
        for case, bad in cases.items():
            arguments = partial(changed, call, name, bad)
            add(function, names or name, case, arguments, error, detail)


def spoiled(x: Tensor, value: float) -> Tensor:
    """With the value in its second place, which is live: [0, 1], or [1]."""
    x = x.clone()
    x.view(-1)[1] = value
    return x


def refuse_content(function, call, *names: str, half: bool = True, own="") -> None:
    """What floats of any shape may not hold, and what is not floats.

    `half`: half precision is refused too. `own`: the message's name for the argument.
    """
    for name in names:
        x, wrong = call[name], partial(refuse, function, call, names=own)
        place = re.escape("[0, 1]" if x.dim() == 2 else "[1]")
        bad = {str(value): spoiled(x, value) for value in (nan, inf, -inf)}
        # A ranking takes what it is given to rank by, whatever its sign.
        if (own or name).endswith("logprobs") and name != "mean_logprobs":
            bad["above 0"] = spoiled(x, 0.01)
        wrong(detail=place, **{name: bad})
        for dtype in [torch.int64, torch.complex128] + [torch.bfloat16] * half:
            bad = {str(dtype): x.to(dtype)}
            wrong(TypeError, detail=str(dtype), **{name: bad})
        wrong(TypeError, **{name: {"list": x.tolist()}})


def refuse_slots(function, call, *names: str, own: str = "") -> None:
    """Floats that go with a mask, or with other floats of their shape."""
    for name in names:
        x, wrong = call[name], partial(refuse, function, call, names=own)
        shapes = {"deeper": x[..., None], "row 0": x[0], "one row": x[:1]}
        shapes["empty"] = x[:0]
        if x.dim() == 2:
            shapes |= {"one column": x[:, :1], "a column less": x[:, :-1]}
        wrong(**{name: shapes})
        wrong(detail="meta", **{name: {"elsewhere": x.to("meta")}})
        refuse_content(function, call, name, own=own)


def refuse_groups(function, call, name: str = "rewards") -> None:
    """(P, K) floats that need go with nothing else."""
    x = call[name]
    shapes = {"row 0": x[0], "deeper": x[..., None], "empty": x[:0]}
    refuse(function, call, **{name: shapes})
    refuse_content(function, call, name)


def refuse_mask(
    function, call, mask: Tensor, alone: bool = False, dead: bool = False
) -> None:
    """`dead`: a mask without a live token is refused too."""
    # A mask on another device is found out by the floats that are compared with it.
    shapes = {"deeper": mask[..., None], "row 0": mask[0], "empty": mask[:0]}
    if not alone:
        shapes |= {"a row less": mask[:-1], "a column less": mask[:, :-1]}
    refuse(function, call, mask=shapes)
    if dead:
        refuse(function, call, mask={"all dead": mask & False})
    refuse(function, call, TypeError, detail="int64", mask={"int64": mask.long()})
    refuse(function, call, TypeError, mask={"list": mask.tolist()})


def refuse_count(function, call) -> None:
    refuse(function, call, count=(0, -1, nan, inf))
    refuse(function, call, TypeError, count=(True, "8"))
    odd = {"a row": torch.tensor([8.0]), "a bool": torch.tensor(True)}
    refuse(function, call, TypeError, count=odd)
    tensors = {"0, a tensor": torch.tensor(0), "nan, a tensor": torch.tensor(nan)}
    refuse(function, call, count=tensors)


# What would divide by their number, if there is no live token at all.
DIVIDING = [
    remax.code_weights,
    ppo.shape_token_rewards,
    ppo.whiten,
    ppo.explained_variance,
    rrhf.summed_logprobs,
    rrhf.mean_logprobs,
    rrhf.rrhf_loss,
]
COUNTED = [each for each in CALLS if "count" in inspect.signature(each).parameters]

for function, call in CALLS.items():
    dead = function in COUNTED or function in DIVIDING
    floats = {name for name, x in call.items() if isinstance(x, Tensor)} - {"mask"}
    if "ref" in call:  # a term of GRPO: it hands `ref` on, and does not look at `old`
        refuse_slots(function, call, "ref", own="ref_logprobs")
    refuse_slots(function, call, *sorted(floats - {"ref", "old"}))
    refuse_mask(function, call, call["mask"], dead=dead)
    if "count" in inspect.signature(function).parameters:
        refuse_count(function, call)

for entry in ENTRIES:
    if entry.refuses:
        refuse(entry.function, call_of(entry), **entry.refuses)

# REFUSED: logprobs

FAR = NEW - 100  # nats; no float32 holds exp(100)
HEATS = (0.0, -1.0, nan, inf)
call = {**NATS, "logprobs": FAR}
refuse(lp.kl_k3, call, detail="80", ref_logprobs={"far above": NEW})
call = {**call, "old_logprobs": FAR}
refuse(lp.kl_ratio_k3, call, detail="80", ref_logprobs={"far above": NEW})
RATIOS = [lp.kl_ratio_k3, lp.probability_ratio]
RATIOS += [grpo.clipped_loss, grpo.grpo_loss, ppo.policy_loss, trpo.surrogate_loss]
for function in RATIOS:
    call = CALLS[function]
    far = {"far below": call["logprobs"] - 100}
    refuse(function, call, detail="80", old_logprobs=far)

TARGETS = torch.tensor([1, 4])
call = {"logits": rand(2, 5), "targets": TARGETS}
refuse_content(lp.logprobs_from_logits, call, "logits", half=False)
refuse(lp.logprobs_from_logits, call, logits={"empty": rand(2, 0)})
refuse(lp.logprobs_from_logits, call, temperature=HEATS)
bad = {"deeper": TARGETS[:, None], "a row less": TARGETS[:1]}
refuse(lp.logprobs_from_logits, call, targets=bad)
bad = {"-1": torch.tensor([1, -1]), "V": torch.tensor([1, 5])}
refuse(lp.logprobs_from_logits, call, detail=r"\[1\]", targets=bad)
refuse(lp.logprobs_from_logits, call, targets={"elsewhere": TARGETS.to("meta")})
bad = {"int32": TARGETS.int(), "list": TARGETS.tolist()}
refuse(lp.logprobs_from_logits, call, TypeError, targets=bad)

call = {"logits": rand(2, 5), "ref_logits": rand(2, 5)}
refuse_content(lp.exact_kl, call, "logits", "ref_logits", half=False)
bad = {"a column less": rand(2, 4), "one row": rand(1, 5), "empty": rand(0, 5)}
refuse(lp.exact_kl, call, ref_logits=bad)

PAD, BOS, EOS, ANSWER, V = *range(256, 260), TOKENIZER.n_vocab
EXAMPLES = [([BOS, 97, ANSWER], [121, EOS]), ([BOS, 98, ANSWER], [110, 111, EOS])]
TOKENS, CHOSEN = collate(EXAMPLES, PAD)  # (2, 6), (2, 5)


def with_id(token: int, column: int) -> Tensor:
    tokens = TOKENS.clone()
    tokens[1, column] = token
    return tokens


def refuse_scoring(function, call) -> None:
    """Tokens and their mask, as a policy scores them."""
    shapes = {"row 0": TOKENS[0], "deeper": TOKENS[..., None], "empty": TOKENS[:0]}
    shapes |= {"a row less": TOKENS[:1], "a column less": TOKENS[:, :-1]}
    shapes |= {"one column": TOKENS[:, :1], "elsewhere": TOKENS.to("meta")}
    ids = {"V, read": with_id(V, 1), "V, chosen last": with_id(V, 5)}
    refuse(function, call, tokens={**shapes, **ids, "-1": with_id(-1, 1)})
    bad = {"int32": TOKENS.int(), "floats": TOKENS.double(), "list": TOKENS.tolist()}
    refuse(function, call, TypeError, tokens=bad)
    refuse_mask(function, call, CHOSEN)


class Table:
    """A policy whose next-token logits depend on the token before alone: (V, V)."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]  # (B, T, V)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def parameters(self) -> list[Tensor]:
        return [self.table]


def scoring() -> dict:
    return {"model": still(), "tokens": TOKENS, "mask": CHOSEN}


for function in (lp.token_logprobs, checks.check_tokens):
    refuse_scoring(function, scoring)
refuse(lp.token_logprobs, scoring, temperature=HEATS)


def broken_model() -> GPT:
    model = fresh()
    with torch.no_grad():
        model.norm.weight.fill_(nan)
    return model


def scoring_badly() -> dict:
    return {**scoring(), "model": broken_model()}


add(lp.token_logprobs, "logits", "a model of nan", scoring_badly)


def unknown_word() -> dict:
    """Chosen last, and so never read: the model does not say how many it knows."""
    tokens = torch.tensor([[1, 2, 5]])
    mask = torch.tensor([[False, True]])
    return {"model": Table(torch.zeros(5, 5)), "tokens": tokens, "mask": mask}


add(lp.token_logprobs, "tokens", "beyond the logits", unknown_word, detail=r"0\.\.4")

refuse_slots(checks.check_live, {"name": "x", **ONE}, "x")
call = {"name": "x", "x": NEW, "mask": MASK}
refuse_slots(checks.check_logprobs, call, "x")
above = {"above 0": spoiled(NEW, 0.01), "and not by rounding": spoiled(NEW, 1e-5)}
refuse(checks.check_logprobs, call, detail=r"\[0, 1\]", x=above)
call = {"name": "x", "x": rand(4, 4), "mask": MASK}
refuse_slots(checks.check_weights, call, "x")
negative = {"below 0": spoiled(call["x"], -0.01)}
refuse(checks.check_weights, call, detail=r"\[0, 1\]", x=negative)
refuse_slots(checks.check_rows, {"name": "x", "x": EARNED, "mask": MASK}, "x")
refuse_mask(checks.check_mask, {}, MASK, alone=True)
refuse_mask(checks.check_some_live, {}, MASK, alone=True, dead=True)
call = {"first": X, "x": Y}
bad = {"one column": X[:, :1], "one row": X[:1], "elsewhere": X.to("meta")}
refuse(checks.check_shapes, call, x=bad)
refuse(checks.check_shapes, call, first={"empty": X[:0]})
refuse(checks.check_shapes, call, TypeError, x={"list": X.tolist(), "None": None})
refuse(checks.check_temperature, {}, temperature=HEATS)
call = {"name": "log_ratio", "exponent": X}
far = {"far above": spoiled(X, 81.0), "inf": spoiled(X, inf)}
refuse(checks.check_exponent, call, names="log_ratio", detail=r"\[0, 1\]", exponent=far)
call = {"name": "logits", "logits": X}
refuse_content(checks.check_logits, call, "logits", half=False)
refuse(checks.check_logits, call, logits={"no words": X[:, :0]})
call = {"name": "ids", "ids": TARGETS, "known": 5}
bad = {"-1": torch.tensor([1, -1]), "V": torch.tensor([1, 5])}
refuse(checks.check_ids, call, detail=r"\[1\]", ids=bad)
refuse(checks.check_ids, call, TypeError, ids={"int32": TARGETS.int()})
refuse_count(lp.normaliser, {"live": 8})
call = {"name": "x", "x": PAIRED, "least": 2}
shapes = {"row 0": PAIRED[0], "deeper": PAIRED[..., None], "K = 1": PAIRED[:, :1]}
refuse(checks.check_groups, call, x={**shapes, "empty": PAIRED[:0]})
refuse_content(checks.check_groups, call, "x")


@dataclass(frozen=True)
class Settings:
    """Every kind of number, at the edge of what is legal."""

    updates: int = 1
    warmup: int = 0
    seed: int = -1
    lr: float = 0.0
    beta: float = 0.1
    gamma: float = 0.5
    entropy_coef: float = -0.1
    max_grad_norm: float = inf
    kl_stop: float | None = None
    muon: bool = False


def setting(name: str, value: float) -> dict:
    return {"config": replace(Settings(), **{name: value})}


bad = {"updates": (0, -1), "warmup": (-1,), "lr": (-0.1, nan, inf)}
bad |= {"entropy_coef": (nan, inf, -inf), "max_grad_norm": (0.0, -1.0, nan)}
for name, values in {**bad, "kl_stop": (-0.1, nan)}.items():
    for x in values:
        add(
            checks.check_settings, name, str(x), partial(setting, name, x), detail="got"
        )


def gpt(**sizes) -> GPT:
    least = {"vocab_size": V, "context": 16, "dim": 8, "layers": 1, "hidden": 8}
    return GPT(GPTConfig(**least | {"heads": 2, "kv_heads": 2} | sizes), generator())


def one_shared_weight() -> dict:
    policy, reference = fresh(), fresh()
    reference.embed_tokens.weight = policy.embed_tokens.weight
    return {"policy": policy, "reference": reference}


def no_reference() -> dict:
    return {"policy": still(), "reference": None, "needed": "beta is 0.1"}


def another_vocabulary() -> dict:
    return {"policy": still(), "reference": gpt(vocab_size=V + 1)}


add(checks.check_reference, "reference", "one shared weight", one_shared_weight)
add(checks.check_reference, "reference", "none", no_reference)
add(checks.check_reference, "reference", "another vocabulary", another_vocabulary)

refuse(checks.check_problems, {}, problems=([],))
shared = {"policy": still(), "critic": still(), "reference": None}
add(checks.check_apart, "critic.*policy", "one model twice", shared)

# REFUSED: course

runs = {"0": {"kl": [1.0, 0.9, 1.1]}}
refuse(course.number, {"runs": runs}, names="kl|kll", key=("kl, seed 1", "kll"))

# REFUSED: training

refuse_slots(room.sampled_kl, {**NATS, "ref_logprobs": REF}, "logprobs", "ref_logprobs")


def drawing(**changes) -> dict:
    config = SimpleNamespace(prompts=2, samples=2, max_new_tokens=3, temperature=1.0)
    vars(config).update(changes)
    return {
        "policy": still(),
        "tokenizer": TOKENIZER,
        "problems": PROBLEMS,
        "number": 0,
        "config": config,
        "generator": generator(),
    }


for value in HEATS:
    add(room.draw, "temperature", str(value), partial(drawing, temperature=value))
add(room.draw, "max_new_tokens", "99", partial(drawing, max_new_tokens=99))


def stepping(value: float) -> dict:
    policy = fresh()
    config = reinforce.ReinforceConfig()
    learner = room.Learner(config, 4, generator(), policy=(policy, 1e-3))
    policy.norm.weight.grad = torch.full_like(policy.norm.weight, value)
    return {"self": learner}


for value in (nan, inf):
    add(room.Learner.step, "gradient", str(value), partial(stepping, value))

# REFUSED: model

SIZES = {"vocab_size": 9, "context": 8, "dim": 8, "layers": 1, "heads": 2}
SIZES |= {"kv_heads": 1, "hidden": 8}
refuse(GPTConfig, SIZES, **{name: (0, -1) for name in SIZES})
refuse(GPTConfig, SIZES, dim=(9, 10), kv_heads=(3,))


def reading() -> dict:
    return {"self": still(), "tokens": TOKENS}


def with_cache(columns: int = 8, used: int = 0, **more) -> dict:
    store = KVCache(still(), len(TOKENS), columns)
    store.used = used
    return {"self": still(), "tokens": TOKENS, "cache": store, **more}


frozen, pads = torch.no_grad()(GPT.forward), torch.zeros(2).long()
refuse(GPT.forward, reading, tokens={"row 0": TOKENS[0], "deeper": TOKENS[..., None]})
refuse(GPT.forward, reading, tokens={"17 columns": TOKENS[:, [0] * 17]})
refuse(GPT.forward, reading, TypeError, tokens={"floats": TOKENS.double()})
refuse(GPT.forward, reading, padding={"(B, 1)": pads[:, None], "a row less": pads[:1]})
add(GPT.forward, "cache", "with a gradient", with_cache)
add(frozen, "tokens", "more than the cache holds", partial(with_cache, 4))
late = partial(with_cache, 12, used=1, padding=pads)
add(frozen, "padding", "after the first call", late)

# REFUSED: tokenizer

WORDS = {"texts": ["abc", "abd"], "vocab_size": 261}
refuse(train_bpe, WORDS, vocab_size=(259, 0, 10_000))
refuse(train_bpe, WORDS, TypeError, vocab_size=("261", 261.0, True))
refuse(train_bpe, WORDS, TypeError, texts=("abc", b"abc"))
refuse(train_bpe, WORDS, TypeError, names="text 1", texts=(["a", b"b"], ["a", 3]))
refuse(train_bpe, WORDS, names="text 1", texts={"lone surrogate": ["a", "b\ud800"]})
BYTES = [bytes([value]) for value in range(256)]
bad = {"few": BYTES[:-1], "a repeat": [*BYTES, b"a"], "an empty one": [*BYTES, b""]}
bad |= {"a text": [*BYTES, "ab"], "in another order": BYTES[::-1]}
refuse(Tokenizer, {}, names="token", tokens=bad)
OWN = {"self": TOKENIZER}
refuse(Tokenizer.encode, OWN, TypeError, text=(3, b"a", None))
refuse(Tokenizer.encode, OWN, detail="position 1", text={"surrogate": "a\udc00"})
for function in (Tokenizer.decode, Tokenizer.decode_response):
    refuse(function, OWN, names="id", detail="position 1", ids=([97, -1], [97, V]))
    bad = ([97, 98.0], [97, "a"], [97, True])
    refuse(function, OWN, TypeError, names="id", detail="position 1", ids=bad)
refuse(Tokenizer.decode, OWN, names="id", detail="position 1", ids=([97, EOS],))


def damaged(file: Callable[[], Path], change: Callable[[bytes], bytes]) -> dict:
    path = file()
    path.write_bytes(change(path.read_bytes()))
    return {"path": path}


def vocabulary() -> Path:
    TOKENIZER.save("vocabulary.txt")
    return Path("vocabulary.txt")


for case, damage in {
    "another file": lambda data: b"hello",
    "another version": lambda data: data.replace(b"version=1", b"version=2"),
    "cut short": lambda data: data[:-9],
    "another token": lambda data: data.replace(b"YQ== 97", b"YWE= 97"),
}.items():
    arguments = partial(damaged, vocabulary, damage)
    add(Tokenizer.load, "vocabulary.txt", case, arguments, detail="line")
refuse(Tokenizer.load, {}, FileNotFoundError, names="none.txt", path=("none.txt",))

# REFUSED: sampling


def asking() -> dict:
    ids = {"eos_id": EOS, "pad_id": PAD}
    return {"model": still(), "prompts": [[97], [98]], **ids, "max_new_tokens": 2}


def drawing() -> dict:
    return {**asking(), "generator": generator()}


def checking() -> dict:
    return {**asking(), "samples": 1}


def broken(call: Callable[..., dict], *args) -> dict:
    """The same call by a policy with a weight of nan."""
    call = {**call(*args), "model": fresh()}
    call["model"].norm.weight.data[0] = nan
    return call


bad = {"none": [], "an empty one": [[97], []], "too long": [[97] * 15]}
bad |= {"-1": [[97], [-1]], "V": [[97], [V]]}
for function, call in (sampling.generate, drawing), (sampling.check, checking):
    refuse(function, call, max_new_tokens=(0, -1, 1.5), samples=(0, -1))
    refuse(function, call, eos_id=(-1, V, PAD), pad_id=(-1, V), prompts=bad)
    refuse(function, call, TypeError, prompts={"floats": [[97.0]]})
choice = {"temperature": 1.0, "greedy": False, "generator": generator()}
for function, call in (sampling.generate, drawing), (sampling.check_choice, choice):
    refuse(function, call, temperature=HEATS, generator=(None,))
    refuse(function, partial(changed, call, "temperature", 2.0), greedy=(True,))
refuse(sampling.generate, drawing, chunk=(0, -1))
add(sampling.generate, "model", "a weight of nan", partial(broken, drawing))

bad = {"none": [], "no prompt": [([], [97])], "no response": [([97], [])]}
refuse(collate, {"pad_id": PAD}, examples=bad)
refuse(collate, {"pad_id": PAD}, TypeError, examples={"floats": [([97.5], [98])]})

NEVER = torch.zeros(2, dtype=torch.bool)
ROLLOUT = Rollout(TOKENS, CHOSEN, 0.0 * CHOSEN, torch.tensor([3, 3]), NEVER, 1.0, 1)
refuse(Rollout.micro_batches, {"self": ROLLOUT}, size=(0, -1))


def rescoring() -> dict:
    return {"model": still(), "rollout": ROLLOUT, "parts": [torch.tensor([0, 1])]}


refuse(sampling.rescore, rescoring, parts={"a row missing": [torch.tensor([1])]})

# REFUSED: problems

refuse(families.calculate, {"a": 2, "op": "-", "b": 2}, names="step", b={"below 0": 3})
refuse(families.calculate, {"a": 2, "op": "/", "b": 2}, names="step", a={"half": 3})
for function in (problems.make_problem, problems.demonstration, problems.workings):
    call = {"seed": 0, "split": "train", "index": 0}
    refuse(function, call, split=("nowhere",), index=(-1,))
refuse(problems.workings, call, names="split", split=("second_skill",))
call = {"answer": "#### 2", "rng": Random(0), "mistake": "result"}
odd = {"no result": "2", "below 0": "#### -2", "a wrong sum": "<<1+1=3>>\n#### 3"}
refuse(problems.spoiled, call, answer=odd, mistake=("luck", "slip"))
refuse(problems.load_split, {}, names="split", name=("train", "nowhere"))
refuse(problems.load_split, {"name": "test"}, count=(-1, 10_000))


def rows() -> Path:
    Path("rows.jsonl").write_text('{"question": "1?", "answer": "#### 1"}\n')
    return Path("rows.jsonl")


for case, line in {
    "no JSON": b"{",
    "no object": b"[1]",
    "no UTF-8": b"\xff",
    "no question": b'{"answer": "#### 1"}',
    "no number": b'{"question": "1?", "answer": "one"}',
    "a key twice": b'{"question": "1?", "question": "2?", "answer": "#### 1"}',
    "steps below 0": b'{"question": "1?", "answer": "#### 1", "steps": -1}',
}.items():
    arguments = partial(damaged, rows, lambda data, line=line: data + line)
    add(problems.read_problems, "rows.jsonl", case, arguments, detail="line 2")
refuse(problems.read_problems, {}, FileNotFoundError, names="none", path=("none",))

# REFUSED: rewards

SAID = {"problems": PROBLEMS[:2], "texts": ["y", "no"]}
JUDGED = {"problems": PROBLEMS[:2], "rollout": ROLLOUT, "tokenizer": TOKENIZER}
judges = (rewards.verifier, rewards.partial_credit, rewards.careful, rewards.lazy)
for function in judges:
    refuse(function, SAID, problems={"one": PROBLEMS[:1]}, texts=(["y"],))
LIKED = {"likings": TRIPLES, "sharpness": 1.0}
alone = {"K = 1": TRIPLES[:, :1]}
for function in (rewards.rank, rewards.agreement):
    lots = {"generator": generator()} if function is rewards.rank else {}
    refuse_groups(function, LIKED | lots, "likings")
    refuse(function, LIKED | lots, likings=alone, sharpness=(-0.1, nan))
refuse(rewards.agreement, LIKED, likings={"all alike": torch.ones(2, 3)})


def rated() -> dict:
    return {"self": RewardModel(fresh()), "tokens": TOKENS, "mask": CHOSEN}


def heard() -> dict:
    learned = rewards.LearnedReward(RewardModel(fresh()), TOKENIZER)
    return {"self": learned} | SAID


unread = CHOSEN & torch.tensor([[True]] + [[False]] * (len(CHOSEN) - 1))
refuse(RewardModel.forward, rated, mask={"an empty answer": unread})
refuse(RewardModel.forward, rated, TypeError, mask={"numbers": CHOSEN.long()})
odd = {"all alike": torch.ones(3), "one": torch.ones(1), "(N, 1)": torch.ones(3, 1)}
refuse(RewardModel.fix_scale, lambda: {"self": rated()["self"]}, scores=odd)
short = {"one": PROBLEMS[:1]}
refuse(rewards.LearnedReward.scores, heard, problems=short, texts=(["y"],))
silent = {"self": heard()["self"], "problems": [], "texts": []}
add(rewards.LearnedReward.scores, "examples", "nobody", silent)


READ = {"tokenizer": TOKENIZER, "question": "a", "first": "y", "second": "n"}
refuse(rewards.verdict_prompt, READ, names="verdict_prompt", context=(5,))
COMPARED = {"problems": PROBLEMS[:2], "first": ["y", "no"], "second": ["no", "y"]}


def new_judge() -> rewards.Judge:
    return rewards.Judge(fresh(), TOKENIZER)


def deciding() -> dict:
    return {"self": new_judge()} | COMPARED


def preferring() -> dict:
    answers = {"ours": COMPARED["first"], "theirs": COMPARED["second"]}
    return {"self": new_judge(), "problems": PROBLEMS[:2]} | answers


def paying() -> dict:
    reward = rewards.JudgedReward(new_judge(), lambda asked: ["n"] * len(asked))
    return {"self": reward} | SAID


def with_one_rival() -> dict:
    return {"self": rewards.JudgedReward(new_judge(), lambda asked: ["n"])} | SAID


few = {"one": PROBLEMS[:1], "none": []}
refuse(rewards.Judge.says_first, deciding, names="Judge", problems=few, first=(["y"],))
refuse(rewards.Judge.prefers, preferring, names="Judge", problems=few, ours=(["y"],))
refuse(rewards.JudgedReward.__call__, paying, problems=short, texts=(["y"],))
add(rewards.JudgedReward.__call__, "rival", "one for two problems", with_one_rival)


def giving(answers: Mapping[str, object]) -> dict[str, rewards.Reward]:
    return {k: lambda problems, texts, x=x: x for k, x in answers.items()}


call = {**JUDGED, "reward": yes}
bad = {"one": [1.0], "a column": torch.ones(2, 1), "nan": [0, nan], "inf": [0, inf]}
bad |= {"beyond float32": [0, 1e39]}
refuse(rewards.score, call, problems={"one": PROBLEMS[:1], "none": []})
refuse(rewards.score, call, reward=giving(bad))
bad = {"words": ["a", "b"], "None": None, "ragged": [[1], [1, 2]]}
refuse(rewards.score, call, TypeError, reward=giving(bad))

# REFUSED: intervals

MANY, ALL = [0.0, 1.0, 1.0], [1.0, 1.0, 1.0]
ODD = ([], 1.0, [[1.0], [0.0], [1.0]], [0.0, nan, 1.0], [0.0, 1.0, -inf])
refuse(intervals.bootstrap, {"values": MANY}, values=(*ODD, [1.0]), resamples=(0,))
refuse(intervals.over_seeds, {}, values=(*ODD, [1.0], [1.0] * 11))
ODD = (*ODD, [0.0, 1.0])
refuse(intervals.difference, {"a": MANY, "b": MANY}, a=ODD, b=ODD)
call = {"before": MANY, "after": MANY, "ceiling": ALL}
refuse(intervals.gap_closed, call, before=ODD, after=ODD, ceiling=(*ODD, MANY))
ELEVEN = [[0.1, 0.2]] * 11
bad = (
    [],
    1.0,
    [0.0, 1.0],
    [[]],
    [[nan, 1.0]],
    [[0.0, 1.0], [0.0, inf]],
    [[1.0]],
    ELEVEN,
)
refuse(intervals.verdict, {}, differences=bad)
refuse(intervals.check_numbers, {"name": "x", "rank": 1}, x=ODD[:-1])
bad = {"words": ["a", "b"], "objects": [object()], "ragged": [[1], [1, 2]]}
refuse(intervals.check_numbers, {"name": "x", "rank": 2}, TypeError, x=bad)
refuse(intervals.verdict, {}, TypeError, differences=bad)

# REFUSED: evaluation

COIN = np.array([[True, False], [False, False]])
KINDS = {"floats": COIN.astype(float), "integers": COIN.astype(int)}
for function, call in {
    evaluation.pass_at_k: {"correct": COIN, "k": 1},
    evaluation.dead_share: {"correct": COIN},
    evaluation.smoothed_success: {"correct": COIN},
}.items():
    refuse(function, call, correct={"row 0": COIN[0], "empty": COIN[:, :0]})
    refuse(function, call, TypeError, correct=KINDS)
    if function is not evaluation.smoothed_success:
        refuse(function, call, k=(0, -1, 3))
call = {"votes": [[1, 2], [1, 1]], "gold": [1, 1], "k": 1}
refuse(evaluation.maj_at_k, call, votes=([], [[1, 2], [1]]), gold=([1],), k=(0, 3))
TABLE = [[1.0, 0.0], [0.5, 0.5]]
call = {"scores": TABLE, "values": TABLE, "n": 2}
bad = ([], [1.0, 0.0], [[1.0, 0.0]], [[nan, 0], [0, 0]], [[0, inf], [0, 0]])
refuse(evaluation.best_of_n, call, scores=bad, values=bad, n=(0, -1, 3))

bad = ([], [1.0, 0.0], [[1.0], [0.0]], [[1.0, 0.0]], [[nan, 0], [0, 0]])
refuse(evaluation.reward_variance_share, {}, rewards=bad)

grid = np.zeros((1, 1), dtype=bool)
lone = evaluation.Answers(
    PROBLEMS[:1], [["y"]], grid, grid, grid, grid.astype(int), [["terse"]], [[None]]
)
refuse(evaluation.summary, {}, names="problems", answers={"to one problem": lone})
refuse(evaluation.style_shares, SAID, texts=([], ["y"]))
call = {**JUDGED, "rewards": f64(1.0, 0.0)}
refuse(evaluation.answer_metrics, call, problems={"one": PROBLEMS[:1]})
refuse(evaluation.answer_metrics, call, rewards={"three": f64(1.0, 0.0, 1.0)})


def weighing() -> dict:
    return {"policy": still(), "rollout": ROLLOUT, "weights": torch.tensor([1.0, -1.0])}


bad = {"(B, 1)": torch.ones(2, 1), "three": torch.ones(3), "nan": f64(nan, 1.0)}
refuse(evaluation.policy_gradient, weighing, weights=bad)
call = {"gradients": rand(2, 3), "answers": 4}
bad = {"row 0": rand(3), "one batch": rand(1, 3), "nan": spoiled(rand(2, 3), nan)}
refuse(evaluation.signal_to_noise, call, gradients=bad, answers=(0, -1))

bad = (-0.1, 1.5, nan, [0.5, 2.0])
refuse(evaluation.binary_kl, {"a": 0.5, "p": 0.5}, a=bad, p=bad)
refuse(evaluation.binary_kl, {"a": [0.5, 0.5]}, p=([0.5], [[0.5], [0.5]]))
call = {"success": [0.5, 0.2]}
bad = ([], 0.5, [[0.5]], [0.5, nan], [0.5, -0.1], [0.5, 1.1])
refuse(evaluation.frontier, call, success=bad, points=(1, 0))
refuse(evaluation.frontier_at, {**call, "kl": 0.1}, success=bad, kl=(-0.1, nan))


def comparing() -> dict:
    return {"model": still(), "reference": still(), "rollout": ROLLOUT}


bad = {"greedy": replace(ROLLOUT, greedy=True)}
refuse(evaluation.measured_kl, comparing, names="greedy", rollout=bad)
refuse(evaluation.measured_kl, comparing, rows=(0, -1))


def answering() -> dict:
    call = {"model": still(), "tokenizer": TOKENIZER, "problems": PROBLEMS}
    return {**call, "samples": 2, "max_new_tokens": 2, "generator": generator()}


refuse(evaluation.sample_answers, answering, samples=(0,), batch_rows=(0,))
refuse(evaluation.sample_answers, answering, problems=([],), greedy=(True,))
refuse(evaluation.sample_answers, answering, first_token=("", "no"), temperature=HEATS)
refuse(evaluation.sample_answers, answering, generator=(None,), max_new_tokens=(0, 16))

# REFUSED: checkpoint, plotting

nowhere, here = "no/folder/here", {"path": "here.ckpt"}
refuse(checkpoint.save, here, TypeError, state=([1], None))
bad = {"numpy": {"a": np.ones(2)}, "a set": {"a": [{1}]}, "a tuple key": {(1,): 2}}
refuse(checkpoint.save, here, TypeError, state=bad)
call = {"state": {}}
refuse(checkpoint.save, call, CheckpointError, names=nowhere, path=(nowhere,))
refuse(checkpoint.load, {}, CheckpointError, names=nowhere, path=(nowhere,))


def saved() -> Path:
    checkpoint.save("saved.ckpt", {"a": 1})
    return Path("saved.ckpt")


for case, damage in {
    "empty": lambda data: b"",
    "another file": lambda data: b"hello",
    "another version": lambda data: data.replace(b"version=1", b"version=9"),
    "cut short": lambda data: data[:-1],
    "a flipped bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
}.items():
    arguments = partial(damaged, saved, damage)
    add(checkpoint.load, "saved.ckpt", case, arguments, CheckpointError)

OTHER = Tokenizer(train_bpe(**WORDS))


def keeping() -> dict:
    return {"path": "model.ckpt", "model": still(), "tokenizer": TOKENIZER}


def kept(**wrong) -> dict:
    checkpoint.save_model(**keeping())
    if wrong:
        checkpoint.save("model.ckpt", {**checkpoint.load("model.ckpt"), **wrong})
    return {"path": "model.ckpt", "tokenizer": TOKENIZER}


arguments = partial(broken, keeping)
add(checkpoint.save_model, "norm.weight", "of nan", arguments, CheckpointError)
refuse(checkpoint.save_model, keeping, CheckpointError, tokenizer={"another": OTHER})
refuse(checkpoint.save_model, keeping, TypeError, extra={"a set": {"a": {1}}})
refuse(checkpoint.load_model, kept, CheckpointError, tokenizer={"another": OTHER})
for name, value in {"config": {"dim": 8}, "vocabulary": "other"}.items():
    arguments = partial(kept, **{name: value})
    add(checkpoint.load_model, name, "another", arguments, CheckpointError)
bad = {"of nan": torch.full((32,), nan), "too short": torch.zeros(3)}
for case, value in bad.items():
    arguments = partial(kept, weights={**still().state_dict(), "norm.weight": value})
    add(checkpoint.load_model, "norm.weight", case, arguments, CheckpointError)
add(checkpoint.load_model, "weight", "none", partial(kept, weights={}), CheckpointError)


def rating() -> dict:
    return {**keeping(), "model": RewardModel(still())}


function = checkpoint.save_reward_model
refuse(function, rating, CheckpointError, tokenizer={"another": OTHER})
add(checkpoint.load_reward_model, "head", "none", kept, CheckpointError)
call = {"saved": {"lr": 1.0}, "current": {"lr": 1.0}}
bad = {"lr": ({"lr": 2.0}, {}), "beta": ({"lr": 1.0, "beta": 0.1},)}
for key, configs in bad.items():
    refuse(checkpoint.check_config, call, CheckpointError, names=key, current=configs)
call = {"lesson": "x", "seed": 0, "local": True}
bad = {"nan": {"loss": nan}, "inf": {"series": {"loss": [1.0, inf]}}}
refuse(plotting.save_run, call, names="run|loss", run=bad)
variant = {"accuracy": [0.5, 0.4, 0.6], "tuning": False}
bad = {"none at all": {}, "a variant alone": {"broken": variant}}
refuse(exam.choose, {"trials": bad}, trials=bad)

# REFUSED: the exact world

TABLE = {"logits": torch.zeros(7, 3, dtype=torch.float64)}
turned = {"turned": TABLE["logits"].T, "a row less": TABLE["logits"][:6]}
refuse(exact_world.token_logprobs, TABLE, logits=turned)
call = {"reference": TABLE["logits"], "rewards": exact_world.RIGHT, "beta": 0.3}
for function in (exact_world.best_policy, exact_world.best_value):
    refuse(function, call, beta=(0.0, -1.0, nan))
    refuse(function, call, rewards={"one less": exact_world.RIGHT[:14]})
call = {"loss": torch.sum, "chance": exact_world.chances(TABLE["logits"]), **TABLE}
refuse(exact_world.expected_gradient, call, chance={"one less": call["chance"][:14]})

# REFUSED: the functions of the algorithms

GROUP = {"rewards": TRIPLES}
single = {"K = 1": TRIPLES[:, :1]}
GROUPED = [grpo.centred_advantages, grpo.group_advantages]
GROUPED += [rloo.leave_one_out, trpo.leave_one_out]
for function in GROUPED:
    refuse_groups(function, GROUP)
    refuse(function, GROUP, rewards=single)
call = CALLS[grpo.grpo_loss]
refuse(grpo.grpo_loss, call, detail="beta is 0.7", ref_logprobs={"none": None})
deep = call["logprobs"] - 100
deep = {**call, "logprobs": deep, "old_logprobs": deep}
refuse(grpo.grpo_loss, deep, detail="80", ref_logprobs={"far above": call["logprobs"]})
free = {**call, "beta": 0.0}
bad = {"nan, for nothing": spoiled(call["ref_logprobs"], nan)}
refuse(grpo.grpo_loss, free, detail=r"\[0, 1\]", ref_logprobs=bad)
below = {"below 0": spoiled(call["weights"], -0.1)}
refuse(grpo.grpo_loss, call, detail="-0.1", weights=below)
dead = {"all dead, no weights": call["mask"] & False}
refuse(grpo.grpo_loss, {**call, "weights": None}, detail="slots", mask=dead)
call = {**GROUP, "greedy_rewards": f64(1.0, 0.0)}
refuse_groups(remax.remax_advantages, call)
refuse_slots(remax.remax_advantages, call, "greedy_rewards")
call = {**GROUP, "mean_logprobs": -rand(2, 3)}
refuse_slots(rrhf.ranking_loss, call, "rewards", "mean_logprobs")
refuse_count(rrhf.ranking_loss, call)
bad = (-0.1, nan, inf)
refuse(rrhf.rrhf_loss, RANKED, sft_weight=bad, margin=bad)
for function in (rrhf.mean_logprobs, rrhf.summed_logprobs):
    refuse(function, CALLS[function], detail="row 2", mask={"a dead row": MASK})
for function in (rrhf.rrhf_loss, ppo.shape_token_rewards):
    refuse(function, CALLS[function], mask={"a dead row": MASK})
whole = {"with a count": FULL.long()}
refuse(rrhf.sft_loss, {**RANKED, "count": 8}, TypeError, mask=whole)
for function in (rrhf.sft_loss, rrhf.rrhf_loss):
    refuse(function, RANKED, rewards={"without problems": PAIRED.flatten()})

columns = {name: x[:, None] for name, x in PAIR.items()}
call = {**PAIR, "beta": 0.5}
refuse_slots(dpo.dpo_loss, call, *PAIR)
refuse_count(dpo.dpo_loss, call)
add(dpo.dpo_loss, "chosen_logprobs", "all (B, 1)", {**columns, "beta": 0.5})

call = {"chosen": f64(0.5, -1.0, 2.0), "rejected": f64(0.2, 0.4, -0.3)}
refuse_slots(reward_model.pairwise_loss, call, "chosen", "rejected")
refuse_count(reward_model.pairwise_loss, call)
columns = {name: x[:, None] for name, x in call.items()}
add(reward_model.pairwise_loss, "chosen", "both (N, 1)", columns)
ones = torch.ones(3).double()
odd = {"below 0": -ones, "nan": nan * ones, "one row": ones[:1], "deeper": ones[None]}
refuse(reward_model.pairwise_loss, call, weights=odd)
labels = {f"each {case}": x for case, x in odd.items()}
refuse(reward_model.pairwise_loss, call, label=labels | {"each above 1": 2 * ones})

numbers = {str(x): spoiled(TRIPLES, x) for x in (nan, inf, -inf)}
numbers |= {"row 0": TRIPLES[0], "deeper": TRIPLES[..., None]}
call = {**GROUP, "most": 1, "generator": generator()}
refuse(dpo.make_pairs, call, rewards={**numbers, **single}, most=(0, -1))
LENGTHS = torch.tensor([[2, 3, 1], [4, 4, 2]])
call = {**GROUP, "lengths": LENGTHS, "generator": generator()}
bad = {"a column less": LENGTHS[:, :2], "elsewhere": LENGTHS.to("meta")}
for name in ("right", "best", "top", "random"):
    function = getattr(rejection_sampling, f"select_{name}")
    refuse(function, call, rewards=numbers, lengths=bad)
    refuse(function, call, TypeError, lengths={"list": LENGTHS.tolist()})
    both = {**call, "rewards": TRIPLES[0], "lengths": LENGTHS[0]}
    add(function, "rewards", "both of row 0", both)
    none = {**call, "rewards": TRIPLES[:0], "lengths": LENGTHS[:0]}
    add(function, "rewards", "no problems", none)
for name in ("accuracy", "kl"):
    function = getattr(rejection_sampling, f"best_of_n_{name}")
    refuse(function, {"p": 0.5, "n": 2}, n=(0, -1), p=(-0.1, 1.5, nan, [0.5, 1.5]))

call = {"beta": 0.1, "kl": 6.0, "target": 6.0, "horizon": 100.0, "completions": 10}
refuse(ppo.adapt_beta, call, target=(0.0, -1.0, nan, inf), completions=(0, 101))
refuse(ppo.adapt_beta, call, kl=(nan, inf, -inf))


def judging(dtype: torch.dtype = torch.float32) -> dict:
    policy = fresh().to(dtype)
    call = {"policy": policy, "critic": ppo.Critic(policy), "temperature": 1.0}
    return {**call, "tokens": TOKENS, "mask": CHOSEN}


refuse_scoring(ppo.score_tokens, judging)
refuse(ppo.score_tokens, judging, temperature=HEATS)


def judging_badly() -> dict:
    return {**judging(), "policy": broken_model()}


add(ppo.score_tokens, "logits", "a policy of nan", judging_badly)


def choosing(dtype: torch.dtype = torch.float32) -> dict:
    return {"policy": fresh().to(dtype), "tokens": TOKENS, "mask": CHOSEN}


def choosing_badly() -> dict:
    return {**choosing(), "policy": broken_model()}


def sloping_parts(value: float) -> dict:
    """Of a slope that comes out as this number."""
    policy = fresh()
    never = torch.zeros(len(TOKENS), dtype=torch.bool)
    lengths = torch.full((len(TOKENS),), 3)
    rollout = Rollout(TOKENS, CHOSEN, CHOSEN.float(), lengths, never, 1.0, 1)
    parts = trpo.scored_parts(policy, rollout, torch.ones(len(TOKENS)), 2)
    policy.norm.weight.register_hook(lambda slope: slope * value)
    return {"policy": policy, "parts": parts, "temperature": 1.0}


for value in (nan, inf):
    arguments = partial(sloping_parts, value)
    add(trpo.surrogate_slope, "gradient", str(value), arguments)
refuse_scoring(trpo.score_choices, choosing)
refuse(trpo.score_choices, choosing, temperature=HEATS)
add(trpo.score_choices, "logits", "a policy of nan", choosing_badly)
call = {"old": -rand(2, 5), "new": -rand(2, 5)}
refuse_content(trpo.choice_kl, call, "old", "new", half=False)
bad = {"a column less": -rand(2, 4), "one row": -rand(1, 5), "empty": rand(0, 5)}
refuse(trpo.choice_kl, call, new=bad)
along_x = f64(1.0, -2.0)
for case, curved in {
    "below 0": -along_x,
    "none": 0 * along_x,
    "nan": nan * along_x,
}.items():
    call = {"direction": along_x, "bent": curved, "delta": 0.01}
    add(trpo.step_within, "curvature", case, call)
    call = {"product": lambda v, H=curved: H * v, "target": along_x, "iterations": 2}
    add(trpo.conjugate_gradients, "curvature", case, call)

# REFUSED: training

SMALL = {"prompts": 2, "samples": 2, "max_new_tokens": 2, "updates": 1}
RUNS = {
    rejection_sampling.train: rejection_sampling.RejectionSamplingConfig(
        **SMALL, batch_tokens=9
    ),
    reinforce.train: reinforce.ReinforceConfig(**SMALL),
    remax.train: remax.RemaxConfig(**SMALL),
    rloo.train: rloo.RlooConfig(**SMALL),
    grpo.train: grpo.GRPOConfig(**SMALL),
    trpo.train: trpo.TRPOConfig(**SMALL | {"max_new_tokens": 3}),
    ppo.train: ppo.PPOConfig(**SMALL),
    dpo.train: dpo.DPOConfig(**SMALL),
    rrhf.train: rrhf.RRHFConfig(**SMALL, batch=2),
    sft.train: sft.SFTConfig(updates=1),
    reward_model.train: reward_model.RewardModelConfig(updates=1, batch=2),
}
DRAWING = [train for train in RUNS if train not in (sft.train, reward_model.train)]
RANKINGS = [
    reward_model.Ranking([BOS, 97, ANSWER], [[121, EOS], [110, EOS]]),
    reward_model.Ranking([BOS, 98, ANSWER], [[121, EOS], [110, 111, EOS]]),
]


def by_turns(problems, texts) -> list[float]:
    """1, 0, 1, 0, ...: every group has both."""
    return [float(i % 2 == 0) for i in range(len(texts))]


def training(train: Callable, **changes) -> dict:
    """A legal run but for these settings and arguments."""
    policy = fresh()
    if train is sft.train:
        call = {"model": policy, "examples": EXAMPLES, "pad_id": PAD}
    elif train is reward_model.train:
        policy = RewardModel(policy)
        call = {"model": policy, "tokenizer": TOKENIZER, "rankings": RANKINGS}
        call["generator"] = generator()
    else:
        call = {"policy": policy, "tokenizer": TOKENIZER, "problems": PROBLEMS}
        call |= {"reward": by_turns, "generator": generator()}
    if train is ppo.train:
        call["critic"] = ppo.Critic(policy)
    settings = {k: x for k, x in changes.items() if hasattr(RUNS[train], k)}
    call["config"] = replace(RUNS[train], **settings)
    return {**call, **{k: x for k, x in changes.items() if k not in settings}}


def refuse_run(train: Callable, *, names: str = "", **wrong) -> None:
    """As `refuse`, for settings and arguments of a run."""
    for name, values in wrong.items():
        cases = values if isinstance(values, Mapping) else {str(x): x for x in values}
        for case, bad in cases.items():
            add(train, names or name, case, partial(training, train, **{name: bad}))


def aliased(train: Callable) -> dict:
    return training(train, **one_shared_weight())


def critic_in_common() -> dict:
    call = training(ppo.train)
    call["critic"].trunk.norm.weight = call["policy"].norm.weight
    return call


def critic_on_the_reference() -> dict:
    call = training(ppo.train, reference=fresh())
    call["critic"].trunk = call["reference"]
    return call


def sloping_critic(value: float) -> dict:
    call = training(ppo.train)
    call["critic"].head.bias.register_hook(lambda slope: slope * value)
    return call


def sloping(train: Callable, value: float) -> dict:
    call = training(train)
    policy = call["policy"] if train in DRAWING else call["model"]
    weight = policy.head.weight if train is reward_model.train else policy.norm.weight
    weight.register_hook(lambda slope: slope * value)
    return call


for train in RUNS:
    refuse_run(train, updates=(0, -1))
    if train is not trpo.train:  # it has no optimiser
        refuse_run(train, lr=(-1.0, nan, inf), warmup=(-1,))
        refuse_run(train, max_grad_norm=(-1.0, 0.0, nan))
    for value in (nan, inf):
        add(train, "gradient", str(value), partial(sloping, train, value))
for train in DRAWING:
    refuse_run(train, problems=([],), temperature=HEATS, max_new_tokens=(0, -1))
    refuse_run(train, prompts=(0,), samples=(0,), micro_batch=(0, -1))
    refuse_run(train, reward=giving({"nan": [nan] * 4, "one for all": [1.0]}))
    add(train, "reference", "one shared weight", partial(aliased, train))
for train in (reinforce.train, remax.train, rloo.train, grpo.train, ppo.train):
    refuse_run(train, beta=(-0.1, nan, inf))
    refuse_run(train, names="reference", beta=(0.1,))
for train in (rloo.train, trpo.train, grpo.train, rrhf.train, dpo.train):
    refuse_run(train, samples=(1,))
refuse_run(trpo.train, delta=(0.0, -0.1, nan, inf), damping=(-0.1, nan, inf))
refuse_run(trpo.train, shrink=(0.0, 1.0, nan), tries=(0,), iterations=(0,))
refuse_run(trpo.train, fisher_answers=(0, -1))
call = {"model": still(), "pad_id": PAD, "temperature": 1.0}
silent = {"no answer": [([BOS, 97, ANSWER], [121, EOS], [])]}
refuse(dpo.pair_logprobs, call, names="response", pairs=silent)
refuse(dpo.mean_pair_logprobs, call, names="response", pairs=silent)
call = {"reference": still(), "pad_id": PAD, "config": dpo.DPOConfig()}
refuse(dpo.reference_of_pairs, call, names="response", pairs=silent)
refuse_run(dpo.train, beta=(0.0, -0.1, nan, inf), batch=(0, -1))
refuse_run(dpo.train, names="reference", reset_reference=(False,))
refuse_run(rejection_sampling.train, rounds=(0,), batch_tokens=(0,))
odd = {"floats": lambda r, *more: r, "of row 0": lambda r, *more: r[0] > 0}
odd |= {"(B,)": lambda r, *more: (r > 0).flatten()}
refuse_run(rejection_sampling.train, select=odd)
refuse_run(rrhf.train, batch=(3,), margin=(-0.1, nan), sft_weight=(-0.1, nan))
for train in (grpo.train, ppo.train):
    refuse_run(train, epochs=(0,), minibatches=(0, 5), **BAND)
refuse_run(ppo.train, gamma=SHARE, lam=SHARE)
refuse_run(ppo.train, names="value_clip|clip", value_clip=(0.0, -0.1, nan))
add(ppo.train, "critic", "one shared weight", critic_in_common)
add(ppo.train, "reference", "the trunk of the critic", critic_on_the_reference)
for value in (nan, inf):
    add(ppo.train, "gradient", f"{value}, critic", partial(sloping_critic, value))
# Nothing broadcasts: (B,) - (B, 1) would judge every answer by every other.
odd = {"(B, 1)": lambda r, memory: r[:, None], "(1, B)": lambda r, memory: r[None]}
odd |= {"(P, K)": lambda r, memory: r.view(2, 2)}
refuse_run(reinforce.train, baseline=odd)
floats = {"a float": lambda r, memory: 0.5}
for value in floats.values():
    arguments = partial(training, reinforce.train, baseline=value)
    add(reinforce.train, "baseline", "a float", arguments, TypeError)
odd = {"(P,)": lambda r, g: r[:, 0], "(B, P)": lambda r, g: r.view(-1, 1) - g}
odd |= {"(B,)": lambda r, g: (r - g[:, None]).flatten()}
refuse_run(remax.train, names="advantages", compare=odd)
odd = {"(B, 1)": lambda advantages, k1, mask, beta: advantages[:, None]}
odd |= {"a column more": lambda advantages, k1, mask, beta: F.pad(k1, (0, 1))}
refuse_run(remax.train, names="weights", weigh=odd)
odd = {"(P,)": lambda r: r[:, 0], "(P, 1)": lambda r: r[:, :1], "(B,)": torch.flatten}
refuse_run(rloo.train, names="advantages", compare=odd)
refuse_run(grpo.train, names="advantages", advantage={"(P,)": lambda r: r[:, 0]})
for function in (grpo.per_sequence, grpo.by_constant, grpo.per_token):
    call = {"mask": MASK, "max_new_tokens": 8}
    refuse_mask(function, call, MASK, alone=True, dead=True)
refuse_groups(rrhf.best_answers, {"rewards": PAIRED})


def given_answers(**changes) -> dict:
    """Two answers to each of two problems, with a reward each."""
    tokens, mask = collate([EXAMPLES[0]] * 2 + [EXAMPLES[1]] * 2, PAD)
    rollout = Rollout(
        tokens=tokens,
        mask=mask,
        logprobs=torch.zeros(mask.shape),
        prompt_lengths=torch.full((4,), 3),
        truncated=torch.zeros(4, dtype=torch.bool),
        temperature=changes.get("temperature", 1.0),
        samples=changes.get("samples", 2),
    )
    rewards = changes.get("rewards", torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    return training(rrhf.train, problems=[], given=(rollout, rewards))


for case, earned in {
    "(B,)": torch.tensor([1.0, 0.0, 0.0, 1.0]),
    "(1, 4)": torch.tensor([[1.0, 0.0, 0.0, 1.0]]),
    "bool": torch.tensor([[True, False], [False, True]]),
}.items():
    error = TypeError if case == "bool" else ValueError
    add(rrhf.train, "given", case, partial(given_answers, rewards=earned), error)
alone = {"samples": 1, "rewards": torch.ones(4, 1)}
add(rrhf.train, "given", "K = 1", partial(given_answers, **alone))
add(rrhf.train, "given", "colder", partial(given_answers, temperature=0.7))
refuse_run(sft.train, examples={"none": [], "too long": [([97] * 16, [98])]})
refuse_run(sft.train, batch_size=(0,), window=(0,))
alone = reward_model.Ranking([BOS, 97, ANSWER], [[121, EOS]])
twins = reward_model.Ranking([BOS, 97, ANSWER], [[121, EOS], [121, EOS]])
odd = {"none": [], "one answer": [*RANKINGS, alone], "nothing to tell apart": [twins]}
refuse_run(reward_model.train, rankings=odd, batch=(0,), micro_batch=(0, -1))
refuse(reward_model.pairs_of, {"rankings": RANKINGS}, rankings={"alone": [alone]})
call = {"problems": PROBLEMS[:2], "texts": [("y", "n")] * 2, "tokenizer": TOKENIZER}
call["orders"] = torch.tensor([[0, 1], [1, 0]])
more = {"one row": call["orders"][:1], "three answers": torch.zeros(2, 3).long()}
refuse(reward_model.rankings_of, call, orders=more)
uneven = {"uneven": [("y", "n"), ("y",)], "one problem": [("y", "n")]}
refuse(reward_model.rankings_of, call, names="orders", texts=uneven)


def ranked() -> dict:
    return {"model": RewardModel(fresh()), "rankings": RANKINGS, "pad_id": PAD}


silent = {"no answer": [reward_model.Ranking([BOS, 97, ANSWER], [[121, EOS], []])]}
refuse(reward_model.read_rankings, ranked, names="response", rankings=silent)
add(sft.train, "logits", "a weight of nan", partial(broken, training, sft.train))

# REFUSED: the test


def weights_in(arguments: dict) -> dict:
    """A copy of the weights of every model among them."""
    models = {k: x for k, x in arguments.items() if isinstance(x, torch.nn.Module)}
    return {name: copy.deepcopy(each.state_dict()) for name, each in models.items()}


@pytest.mark.parametrize("row", REFUSED, ids=str)
def test_refused(row):
    """By the right error, which says what it is about, and before a weight changes."""
    arguments = made(row.arguments)
    before = weights_in(arguments)
    with pytest.raises(Exception, match=row.pattern) as caught:
        result = row.function(**arguments)
        if isinstance(result, Iterator):
            next(result)
    assert caught.type is row.error
    exact = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(weights_in(arguments), before, **exact)


def test_every_row_is_a_row_of_its_own():
    names = [str(row) for row in REFUSED]
    assert len(set(names)) == len(names)


# LEGAL


def one(value: float) -> Tensor:
    """(1, 1)."""
    return f64([value])


def slope(function: Callable, x: Tensor, *args, **kwargs) -> Tensor:
    """The gradient to the first argument."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x, *args, **kwargs).sum(), x)[0]


def double() -> GPT:
    return fresh().double()


def next_chances(token: int) -> Tensor:
    """(V,): what the base thinks may follow this token alone."""
    policy = double()
    with torch.no_grad():
        return policy.logits(policy(torch.tensor([[token]])))[0, 0].softmax(0)


class Asked(list):
    """They remember which of them were read."""

    def __init__(self, items: list) -> None:
        super().__init__(items)
        self.rows = []

    def __getitem__(self, row: int) -> object:
        self.rows.append(row)
        return super().__getitem__(row)


def in_pairs(batches: Callable) -> list[tuple[Tensor, Tensor, float]]:
    return list(batches(TEXTS, sft.SFTConfig(updates=4, batch_size=2), PAD))


def sizes_in_pairs(batches: Callable) -> list[list[int]]:
    return sorted(sorted((x != PAD).sum(1).tolist()) for x, *_ in in_pairs(batches))


def read_from(start: int, batches: Callable) -> list[int]:
    texts, config = Asked(TEXTS), sft.SFTConfig(updates=8, batch_size=1, window=2)
    list(batches(texts, config, PAD, start))
    return texts.rows


def rows_of_seed_5(batches: Callable) -> list[int]:
    texts, config = Asked(TEXTS), sft.SFTConfig(16, batch_size=1, window=1, seed=5)
    list(batches(texts, config, PAD))
    return texts.rows


def rows_by_lot(seed: int) -> list[int]:
    lots = torch.Generator().manual_seed(seed)
    return torch.randperm(len(TEXTS), generator=lots).tolist()


def schedule(learning_rate: Callable, **settings) -> Tensor:
    config = sft.SFTConfig(**settings)
    shares = [learning_rate(step, config) for step in range(config.updates)]
    return f64(*shares)


def optimised(optimizers: Callable, **settings) -> list[tuple]:
    """(weights, learning rate, weight decay, betas and fused, or scale) of groups."""
    groups = []
    for optimizer in optimizers(gpt(), sft.SFTConfig(lr=0.03, **settings)):
        for group in optimizer.param_groups:
            wanted = ("lr", "weight_decay", "betas", "fused", "adjust_lr_fn")
            numbers = [group[name] for name in wanted if name in group]
            groups.append((len(group["params"]), *numbers))
    return groups


def answers(**changes) -> Rollout:
    return sampling.generate(**drawing() | changes)


LONE = MASK & False
LONE[1, 2] = True  # the only live token of the batch
LIVE, ONES = torch.tensor([[True]]), torch.ones(4, 4)
ZERO, DEEP = one(0.0), one(-1e4)  # certain, and as good as impossible
ALIKE = torch.full((2, 7), 0.1)  # float32: seven times 0.1, over seven, is not 0.1
RIGHT = (f64(0.0), f64(-1e4), f64(-1e4), f64(0.0))  # told well apart: h = 2e4
WRONG = (f64(-1e4), f64(0.0), f64(0.0), f64(-1e4))
NO_LOTS = {"lengths": torch.tensor([[1, 1, 1]]), "generator": generator()}
EVEN = f64([1, 1, 0, 0]).expand(16, -1)  # by lot, 4 pairs are possible in each group
UNIT = torch.ones(16, 4, dtype=torch.int64)
# Prompts and responses of 2 to 9 tokens together, and sorted by neither of the two.
SIZES_OF_TEXT = (6, 3), (1, 1), (4, 1), (2, 6), (2, 1), (5, 2), (1, 3), (1, 5)
TEXTS = [([97] * asked, [98] * said) for asked, said in SIZES_OF_TEXT]
half, root, two = math.log(0.5), 2**-0.5, math.log(2)
LEGAL = {
    # T = 2, one live token, rows without any
    "one choice": (
        lambda: lp.token_logprobs(double(), torch.tensor([[97, 98]]), LIVE).exp(),
        lambda: next_chances(97)[98],
    ),
    "one word": (
        lambda: lp.token_logprobs(gpt(vocab_size=1), torch.tensor([[0, 0]]), LIVE),
        0,
    ),
    "a sum of one": (lambda: lp.masked_sum(X, LONE), [0, X[1, 2], 0, 0]),
    "a mean of one": (lambda: lp.masked_mean(X, LONE), [0, X[1, 2], 0, 0]),
    "a token mean of one": (lambda: lp.token_mean(X, LONE), X[1, 2]),
    "a sequence mean of one": (lambda: lp.sequence_mean(X, LONE), X[1, 2]),
    "a sequence sum of one": (lambda: lp.sequence_sum(X, LONE), X[1, 2]),
    "a sum over a dead row": (lambda: lp.sequence_sum(ONES, MASK), 8 / 3),
    "a mean over a dead row": (lambda: lp.sequence_mean(ONES, MASK), 1),
    "half a token": (lambda: lp.token_mean(X, LONE, 0.5), 2 * X[1, 2]),
    "GAE of one": (
        lambda: ppo.gae(X, Y, LONE, 0.9, 0.8),
        torch.where(LONE, X - Y, 0.0),
    ),
    "whitening one": (lambda: ppo.whiten(X, LONE), 0),
    "whitening equals": (lambda: ppo.whiten(0.1 * ONES, MASK), 0),
    "nothing to explain": (lambda: ppo.explained_variance(X, Y, LONE), 0),
    "all explained": (lambda: ppo.explained_variance(X, X, MASK), 1),
    "weights of one": (lambda: grpo.per_sequence(LONE, 9), LONE.double()),
    # log-probabilities of 0 and of -1e4, temperatures near 0
    "a slope at 0": (
        lambda: slope(reinforce.reinforce_loss, 0 * NEW, EARNED, MASK),
        torch.where(MASK, -EARNED[:, None] / 3, 0.0),
    ),
    "-1e4 to imitate": (lambda: sft.sft_loss(DEEP, LIVE), 1e4),
    "rounded above 0": (lambda: sft.sft_loss(one(1e-7), LIVE), -1e-7),
    "k1 of 1e4": (lambda: lp.kl_k1(ZERO, DEEP, LIVE), 1e4),
    "k2 of 1e4": (lambda: lp.kl_k2(DEEP, ZERO, LIVE), 5e7),
    "k3 of 1e4": (lambda: lp.kl_k3(ZERO, DEEP, LIVE), 1e4 - 1),
    "k3 at its limit": (lambda: lp.kl_k3(one(-80), ZERO, LIVE), math.exp(80) - 81),
    "a ratio of 0": (lambda: lp.probability_ratio(DEEP, ZERO, LIVE), 0),
    "a ratio of 0 and praise": (
        lambda: ppo.policy_loss(DEEP, ZERO, one(1), LIVE, 0.2, 0.2),
        0,
    ),
    "a ratio of 0 and blame": (
        lambda: ppo.policy_loss(DEEP, ZERO, one(-1), LIVE, 0.2, 0.2),
        0.8,
    ),
    "no clip below": (lambda: ppo.policy_loss(DEEP, ZERO, one(-1), LIVE, 1.0, 0.2), 0),
    "a pair told apart": (lambda: dpo.dpo_loss(*RIGHT, beta=1.0), 0),
    "a pair mistaken": (lambda: dpo.dpo_loss(*WRONG, beta=1.0), 2e4),
    "as good as sure": (lambda: lp.exact_kl(f64(0, -1e4), f64(0, 0)), two),
    "never both": (lambda: lp.exact_kl(f64(0, -1e4), f64(-1e4, 0)), 1e4),
    "hardly any heat": (
        lambda: lp.logprobs_from_logits(
            f64([0, 1], [0, 1]), torch.tensor([1, 0]), 1e-3
        ),
        [0, -1000],
    ),
    "much heat": (
        lambda: lp.logprobs_from_logits(f64(0, 1), torch.tensor(0), 1e9),
        half,
    ),
    "logits with an infinite sum": (
        lambda: lp.logprobs_from_logits(f64(1e308, 1e308), torch.tensor(0)),
        half,
    ),
    # drawing
    "answers of one token": (lambda: answers(max_new_tokens=1).lengths(), [1, 1]),
    "hardly any chance": (
        lambda: answers(max_new_tokens=1, temperature=1e-3).tokens[:, 1],
        lambda: [next_chances(token).argmax() for token in (97, 98)],
    ),
    "the same prompt twice": (
        lambda: answers(prompts=[[97], [97]], greedy=True).logprobs.diff(dim=0),
        0,
    ),
    "a prompt that fills the context": (
        lambda: answers(prompts=[[97] * 14]).prompt_lengths,
        [14],
    ),
    "a chunk too large": (lambda: answers(chunk=9).tokens, lambda: answers().tokens),
    "EOS at once": (lambda: collate([([97], [EOS])], PAD)[1], [[True]]),
    "a full context": (
        lambda: still()(TOKENS[:, [0] * 16]).shape,
        torch.Size((2, 16, 32)),
    ),
    # rewards and groups
    "rewards that are bools": (
        lambda: rewards.score(lambda p, t: [True, False], **JUDGED),
        [1, 0],
    ),
    "nobody to judge": (lambda: rewards.verifier([], []), []),
    "RLOO of two": (lambda: rloo.leave_one_out(f64([1, 0.25])), [[0.75, -0.75]]),
    "Dr. GRPO of two": (
        lambda: grpo.centred_advantages(f64([1, 0.25])),
        [[0.375, -0.375]],
    ),
    "GRPO of two": (
        lambda: grpo.group_advantages(f64([1, 0.25]), 0.0),
        [[root, -root]],
    ),
    "GRPO of two, with its epsilon": (
        lambda: grpo.group_advantages(f64([1, 0])),
        [[0.5 / (root + 1e-4), -0.5 / (root + 1e-4)]],
    ),
    "GRPO's own clip": (
        lambda: grpo.clipped_loss(
            f64([-1], [-2]), f64([-2], [-1]), f64(1, -1), LIVE.expand(2, 1)
        ),
        [[-1.2], [0.8]],
    ),
    "GRPO's weights, of a reduction, in float64": (
        lambda: (
            grpo.grpo_loss(
                NEW.float(), OLD.float(), EARNED.float(), MASK, grpo.per_token(MASK, 9)
            ).dtype
        ),
        torch.float32,
    ),
    "RLOO of equals": (lambda: rloo.leave_one_out(ALIKE), 0),
    "Dr. GRPO of equals": (lambda: grpo.centred_advantages(ALIKE), 0),
    "GRPO of equals": (lambda: grpo.group_advantages(ALIKE, 0.0), 0),
    "ReMax of one": (
        lambda: remax.remax_advantages(f64([1], [0]), f64(1, 1)),
        [[0], [-1]],
    ),
    "KL for nothing": (lambda: rloo.shape_rewards(EARNED, NEW, REF, FULL, 0), EARNED),
    "no KL at any price": (
        lambda: reinforce.shape_rewards(EARNED, NEW, NEW, FULL, 1e9),
        EARNED,
    ),
    "the last token is paid": (
        lambda: ppo.shape_token_rewards(EARNED, NEW, NEW, FULL, 0).sum(1),
        EARNED,
    ),
    "no advantage, REINFORCE": (
        lambda: slope(reinforce.reinforce_loss, NEW, 0 * EARNED, MASK),
        0,
    ),
    "no advantage, PPO": (
        lambda: slope(ppo.policy_loss, NEW, OLD, 0 * X, MASK, 0.2, 0.2),
        0,
    ),
    "no advantage, GRPO": (
        lambda: slope(grpo.clipped_loss, NEW, OLD, 0 * EARNED, MASK),
        0,
    ),
    "a mean over answers, RLOO": (
        lambda: rloo.rloo_loss(-ONES, torch.ones(4), MASK),
        8 / 3,
    ),
    "a mean over answers, ReMax": (lambda: remax.remax_loss(-ONES, ONES, MASK), 8 / 3),
    "a mean over answers, kept or not": (
        lambda: rejection_sampling.likelihood_loss(-ONES, torch.ones(4), MASK),
        8 / 3,
    ),
    "nothing kept": (
        lambda: slope(rejection_sampling.likelihood_loss, NEW, 0 * EARNED, MASK),
        0,
    ),
    "nobody was right, RRHF": (lambda: slope(rrhf.rrhf_loss, NEW, 0 * PAIRED, FULL), 0),
    "RRHF's own weights": (
        lambda: rrhf.rrhf_loss(f64([-1], [-3]), f64([0, 1]), LIVE.expand(2, 1)),
        2 + 3,
    ),
    "a group of one": (lambda: rrhf.ranking_loss(f64([-1], [0]), f64([0], [1])), 0),
    "ranked equals": (lambda: rrhf.ranking_loss(-rand(2, 7), ALIKE.double()), 0),
    # discounts, clips, strengths at their ends
    "GAE without discount": (
        lambda: ppo.gae(f64([1, 2]), f64([3, 5]), LIVE.expand(1, 2), 1, 1),
        [[0, -3]],
    ),
    "GAE of one step": (
        lambda: ppo.gae(f64([1, 2]), f64([3, 5]), LIVE.expand(1, 2), 1, 0),
        [[3, -3]],
    ),
    "GAE without a future": (
        lambda: ppo.gae(f64([1, 2]), f64([3, 5]), LIVE.expand(1, 2), 0, 1),
        [[-2, -3]],
    ),
    "values without a clip": (
        lambda: ppo.value_loss(one(3), one(0), one(1), LIVE, None),
        2,
    ),
    "returns far from 0": (
        lambda: ppo.explained_variance(
            torch.tensor([[0.25, 0.5]]),
            torch.tensor([[2.0**24, 2.0**24 + 2]]),
            LIVE.expand(1, 2),
        ),
        1 - 0.875**2,
    ),
    "a policy in half precision": (
        lambda: [x.dtype for x in ppo.score_tokens(**judging(torch.bfloat16))],
        [torch.float32] * 3,
    ),
    "values that are right": (lambda: ppo.value_loss(X, Y, X, MASK, inf), 0),
    "KL on target": (lambda: ppo.adapt_beta(0.1, 6, 6, 10, 10), 0.1),
    "no KL at all": (lambda: ppo.adapt_beta(0.1, 0, 6, 10, 10), 0.08),
    "one answer twice": (lambda: dpo.dpo_loss(*[f64(-2.0)] * 4, beta=0.5), two),
    "no smoothing": (lambda: dpo.conservative(f64(0, 1e4), 1, 0.0), [two, 0]),
    "no flips": (lambda: dpo.robust(f64(0, 1e4), 1, 0.0), [two, 0]),
    "at its one optimum": (lambda: dpo.ipo(f64(1.0), 0.5), 0),
    "pairs of equals": (lambda: dpo.make_pairs(ALIKE, 9, generator()).shape, (0, 2)),
    "a pair of two": (lambda: dpo.make_pairs(f64([0, 1]), 9, generator()), [[1, 0]]),
    "a pair of three": (
        lambda: dpo.make_pairs(f64([0, 1, 0.5]), 9, generator()),
        [[1, 0]],
    ),
    "pairs by one generator": (
        lambda: dpo.make_pairs(EVEN, 1, generator(3)),
        lambda: dpo.make_pairs(EVEN, 1, generator(3)),
    ),
    "the best by one generator": (
        lambda: rejection_sampling.select_best(EVEN, UNIT, generator(3)),
        lambda: rejection_sampling.select_best(EVEN, UNIT, generator(3)),
    ),
    "by lot, whoever is right": (
        lambda: rejection_sampling.select_random(EVEN, UNIT, generator(3)),
        lambda: rejection_sampling.select_random(EVEN.flip(1), UNIT, generator(3)),
    ),
    "nobody right": (
        lambda: rejection_sampling.select_best(f64([0, 0, 0]), **NO_LOTS),
        0,
    ),
    "nobody right, none by lot": (
        lambda: rejection_sampling.select_random(f64([0, 0, 0]), **NO_LOTS),
        0,
    ),
    "all right": (
        lambda: rejection_sampling.select_right(f64([1, 1, 1]), **NO_LOTS),
        1,
    ),
    "the best of sure ones": (
        lambda: rejection_sampling.best_of_n_accuracy([0, 1], 3),
        [0, 1],
    ),
    "no price of sure ones": (
        lambda: rejection_sampling.best_of_n_kl([0, 1], 3),
        [0, 0],
    ),
    "a small chance in float32": (
        lambda: rejection_sampling.best_of_n_accuracy(np.float32([1e-6]), 1),
        [1e-6],
    ),
    "the best of one": (lambda: rejection_sampling.best_of_n_kl(0.3, 1), 0),
    # the optimisers of SFT, and its batches
    "up, flat, down": (
        lambda: schedule(sft.learning_rate, updates=10, warmup=3, cooldown=0.5),
        [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 3 / 3.5, 2 / 3.5, 1 / 3.5],
    ),
    "not up, down at once": (
        lambda: schedule(sft.learning_rate, updates=3, warmup=0),
        [1, 2 / 3, 1 / 3],
    ),
    "up at once, not down": (
        lambda: schedule(sft.learning_rate, updates=2, warmup=1, cooldown=0.0),
        [1, 1],
    ),
    "AdamW alone": (
        lambda: optimised(sft.optimizers, muon=False),
        [(9, 0.03, 0.1, (0.9, 0.95), True), (3, 0.03, 0.0, (0.9, 0.95), True)],
    ),
    "AdamW, and Muon for the blocks": (
        lambda: optimised(sft.optimizers, weight_decay=0.2),
        [
            (2, 0.03, 0.2, (0.9, 0.95), True),
            (3, 0.03, 0.0, (0.9, 0.95), True),
            (7, 0.03, 0.2, "match_rms_adamw"),
        ],
    ),
    "texts of one size together": (
        lambda: sizes_in_pairs(sft.batches),
        [[2, 3], [4, 5], [6, 7], [8, 9]],
    ),
    "a count common to all batches": (
        lambda: [count for *_, count in in_pairs(sft.batches)],
        [22 / 4] * 4,
    ),
    "what is past is not read": (lambda: len(read_from(6, sft.batches)), 2),
    "half a window is read as a whole": (lambda: len(read_from(3, sft.batches)), 6),
    "the order in which the base was trained": (
        lambda: rows_of_seed_5(sft.batches),
        lambda: rows_by_lot(5 * 1_000_003) + rows_by_lot(5 * 1_000_003 + 1),
    ),
    # measures
    "pass@n of n": (lambda: evaluation.pass_at_k(COIN, 2), [1, 0]),
    "all abstain": (lambda: evaluation.maj_at_k([[None, None]], [7], 2), [0]),
    "scores that tie": (lambda: evaluation.best_of_n([[1, 1]], [[0, 1]], 2), [0.5]),
    "groups of one are dead": (lambda: evaluation.dead_share(COIN[:, :1]).value, 1),
    "no variance": (lambda: intervals.bootstrap([0.1] * 3).high, 0.1),
    "no variance to share": (
        lambda: evaluation.reward_variance_share([[0.1, 0.1]] * 2).value,
        0,
    ),
    "two seeds apart": (lambda: intervals.verdict([[0.2], [0.2]]).word, "apart"),
    "one seed of two": (lambda: intervals.verdict([[0.2, 0.2]]).word, "undecided"),
    "two seeds alike": (lambda: intervals.over_seeds([0.5, 0.5]).low, 0.5),
    "a policy beside itself": (lambda: intervals.difference(MANY, MANY).low, 0),
    "no way gone": (lambda: intervals.gap_closed(MANY, MANY, ALL).value, 0),
    "chances of 0 and 1": (
        lambda: evaluation.binary_kl([0, 1, 0, 1], [0, 1, 0.5, 0]),
        [0, 0, two, inf],
    ),
    "nothing to gain": (lambda: evaluation.frontier([0, 1], 2)[1], [0.5, 0.5]),
    "all that can be bought": (lambda: evaluation.frontier_at([0.25, 0], inf), 0.5),
    "one right of one": (lambda: evaluation.smoothed_success(COIN[:1, :1]), [0.75]),
    "no distance": (lambda: evaluation.measured_kl(**comparing()), [0, 0]),
    "no weight": (
        lambda: evaluation.policy_gradient(still(), ROLLOUT, torch.zeros(2)),
        0,
    ),
    # texts and files
    "no text": (lambda: TOKENIZER.encode(""), []),
    "no ids": (lambda: TOKENIZER.decode([]), ""),
    "EOS and more": (lambda: TOKENIZER.decode_response([EOS, 97]), ""),
    "a special's name": (lambda: TOKENIZER.encode("<|eos|>"), list(b"<|eos|>")),
    "no merges": (lambda: train_bpe([], 260), BYTES),
    "no answer": (lambda: problems.extract_answer(""), None),
    "a marker alone": (lambda: problems.extract_answer("####"), None),
    "minus nothing": (lambda: problems.extract_answer("#### -0"), Fraction(0)),
    "no problems": (lambda: problems.load_split("test", 0), []),
    "no rows": (lambda: problems.read_problems(**damaged(rows, lambda data: b"")), []),
    "an empty state": (
        lambda: checkpoint.save("empty.ckpt", {}) or checkpoint.load("empty.ckpt"),
        {},
    ),
    "no config": (lambda: checkpoint.check_config({}, {}), None),
    "no reference": (lambda: checks.check_reference(still(), None), None),
    "settings at their ends": (lambda: checks.check_settings(Settings()), None),
}


def same(actual: object, expected: object) -> None:
    if isinstance(actual, Tensor | np.ndarray | float):
        actual, expected = (torch.as_tensor(x).double() for x in (actual, expected))
        assert expected.dim() == 0 or expected.shape == actual.shape
        expected = expected.expand_as(actual)
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-12)
    else:
        assert actual == expected


@pytest.mark.parametrize("call, expected", LEGAL.values(), ids=LEGAL)
def test_legal(call, expected):
    same(call(), expected() if callable(expected) else expected)


MODEST = [
    {"problems": PROBLEMS[:1]},
    {"max_new_tokens": 1},
    {"temperature": 1e-3},
    {"max_grad_norm": inf},
    {"lr": 0.0, "warmup": 0},
    {"prompts": 1},
]


@pytest.mark.parametrize("changes", MODEST, ids=str)
@pytest.mark.parametrize("train", DRAWING, ids=called)
def test_legal_runs(train, changes):
    """One problem, answers of one token, no chance, no limit, no step, one group."""
    if "prompts" in changes and train is rrhf.train:
        changes = {**changes, "batch": 1}
    if train is trpo.train and changes.keys() & {"lr", "max_grad_norm"}:
        changes = {"damping": 0.0}  # it has no optimiser to be told
    metrics = next(train(**training(train, **changes)))
    assert all(map(math.isfinite, metrics.values())), metrics


@pytest.mark.parametrize("train", DRAWING, ids=called)
def test_rewards_of_zero_are_legal_and_teach_nothing(train):
    for reward, teaches in (by_turns, True), (never, False):
        call = training(train, reward=reward)
        before = copy.deepcopy(call["policy"].state_dict())
        next(train(**call))
        after = call["policy"].state_dict()
        moved = any(not torch.equal(after[name], x) for name, x in before.items())
        assert moved == teaches


# A micro-batch may be empty


WEIGHED = [grpo.grpo_loss]  # by the batch's weights, where others have its count


@pytest.mark.parametrize("function", COUNTED + WEIGHED, ids=called)
def test_an_empty_micro_batch_adds_nothing(function):
    """All slots masked, and the count that of the whole batch: 0, and no slope."""
    call = dict(CALLS[function])
    if function in COUNTED:
        call["count"] = 8
    call["mask"] = call["mask"] & False
    leaves = {}
    for name, x in call.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            leaves[name] = x.clone().requires_grad_()
    value = function(**call | leaves)
    assert value == 0
    value.backward()
    assert all(x.grad is None or (x.grad == 0).all() for x in leaves.values())


REDUCED = COUNTED + WEIGHED + DIVIDING
SLOTWISE = [each for each in CALLS if each not in REDUCED]


@pytest.mark.parametrize("function", SLOTWISE, ids=called)
def test_slots_and_rows_without_a_live_token_are_as_masked_ones(function):
    call = CALLS[function]
    empty = function(**call | {"mask": call["mask"] & False})
    expected = 0.0
    if function is lp.probability_ratio:
        expected = 1.0
    if function in (reinforce.shape_rewards, rloo.shape_rewards):
        expected = call["rewards"]  # of answers without a token there is no KL
    assert (empty == expected).all()


def test_an_empty_micro_batch_can_be_scored():
    policy = fresh()
    logprobs = lp.token_logprobs(policy, TOKENS, CHOSEN & False)
    assert logprobs.shape == CHOSEN.shape and (logprobs == 0).all()
    logprobs.sum().backward()
    slopes = [weight.grad for weight in policy.parameters()]
    assert all(slope is None or (slope == 0).all() for slope in slopes)


@pytest.mark.parametrize("function", COUNTED, ids=called)
@pytest.mark.parametrize(
    "count", [np.int64(8), np.float32(8), torch.tensor(8), torch.tensor(8.0)], ids=repr
)
def test_a_count_is_a_number_of_any_kind(function, count):
    call = CALLS[function]
    assert torch.equal(function(**call, count=count), function(**call, count=8))


# What a mask hides


PASSING = [checks.check_live, checks.check_logprobs, checks.check_weights]


@pytest.mark.parametrize("function", PASSING, ids=called)
def test_junk_in_masked_slots_is_not_refused(function):
    legal = -NEW if function is checks.check_weights else NEW
    for junk in common.JUNK:
        function("x", legal.masked_fill(~MASK, junk), MASK)


# Ids 0 (padding), 1 (a prompt's first) and 4 (EOS) are never read at a live slot.
UNREAD = torch.tensor([0, 1, 4])
SAYINGS, SAID_MASK = collate([([1, 2], [3, 2, 4]), ([1, 1, 3], [4])], 0)
STARTS = torch.tensor([2, 3])
SAYING = Rollout(SAYINGS, SAID_MASK, -rand(2, 4), STARTS, NEVER, 0.7, 1)


def by_table(tokens: Tensor, hidden: Tensor) -> Tensor:
    """A critic: some function of the token that was read."""
    return hidden[..., 0]


SCORERS = {
    lp.token_logprobs: lambda p: lp.token_logprobs(p, SAYINGS, SAID_MASK, 0.7),
    sampling.rescore: lambda p: sampling.rescore(p, SAYING, [torch.tensor([0, 1])]),
    evaluation.measured_kl: lambda p: evaluation.measured_kl(
        p, Table(p.table.detach().flip(1)), SAYING
    ),
    evaluation.policy_gradient: lambda p: evaluation.policy_gradient(
        p, SAYING, f64(1.0, -0.5)
    ),
    ppo.score_tokens: lambda p: torch.cat(
        ppo.score_tokens(p, by_table, SAYINGS, SAID_MASK, 0.7), 1
    ),
    trpo.score_choices: lambda p: torch.cat(
        [x.flatten() for x in trpo.score_choices(p, SAYINGS, SAID_MASK, 0.7)]
    ),
}


def check_unread_rows_are_inert(score: Callable[[Table], Tensor]) -> None:
    """A policy that says nan where nobody asks: the same numbers and slopes."""
    table = torch.sin(torch.arange(25.0, dtype=torch.float64)).view(5, 5)

    def scored(table):
        return score(Table(table.requires_grad_()))

    expected = common.value_and_gradients(scored, {"table": table}, ["table"])
    assert expected[0].abs().sum() > 0
    assert (expected[1]["table"][UNREAD] == 0).all()
    for junk in common.JUNK:
        case = {"table": table.index_fill(0, UNREAD, junk)}
        actual = common.value_and_gradients(scored, case, ["table"])
        common.assert_same(actual, expected, f"{junk} where nobody asks")


@pytest.mark.parametrize("function", SCORERS, ids=called)
def test_junk_scores_of_masked_choices_change_nothing(function):
    check_unread_rows_are_inert(SCORERS[function])


def test_a_mask_after_the_scores_would_be_found():
    """Right values, and slopes of nan: the negative control."""

    def too_late(policy):
        every = policy(SAYINGS[:, :-1]).log_softmax(-1)
        logprobs = every.gather(-1, SAYINGS[:, 1:, None])[..., 0]
        return torch.where(SAID_MASK, logprobs, 0.0)

    assert common.refutes(check_unread_rows_are_inert, too_late)


# Nothing is missing

UNCHECKED = {
    "it hands on what it is given, to a function that looks": [
        room.rescore_both,
        room.deal,
        ppo.score_answers,
        trpo.scored_parts,
        trpo.line_search,
        exact_world.chances,
        exact_world.kl,
        exact_world.gradient,
    ],
    "its caller has looked": [
        model.rotate,
        sampling.invert,
        reinforce.no_baseline,
        reinforce.moving_average,
        reinforce.batch_mean,
        dpo.logistic,
        dpo.ipo,
    ],
    "it refuses nothing": [lp.at_least_float32],
    "it draws a picture": [plotting.draw_price, plotting.strip],
}
INERT = {  # junk in masked slots changes nothing: tests/test_losses.py
    entry.function
    for entry in ENTRIES
    for check in entry.properties
    if common.name_of(check) == "check_mask_is_inert"
}
UNMASKED = {
    "it hands them on, to a function that is tested": [
        room.sampled_kl,
        room.rescore_both,
        ppo.score_answers,
        trpo.scored_parts,
    ],
    "it reads no floats but (B,)": [
        checks.check_mask,
        checks.check_some_live,
        checks.check_rows,
        checks.check_tokens,
    ],
    "it reads no log-probabilities": [
        rewards.score,
        evaluation.answer_metrics,
        room.deal,
    ],
}


def public() -> Iterator[Callable]:
    """The functions of every room and algorithm, and the methods of their classes."""
    for found in pkgutil.walk_packages(minialign.__path__, "minialign."):
        module = importlib.import_module(found.name)
        own = [x for x in vars(module).values() if hasattr(x, "__qualname__")]
        for each in (x for x in own if x.__module__ == found.name):
            if inspect.isclass(each):
                methods = [getattr(x, "__func__", x) for x in vars(each).values()]
                yield from filter(inspect.isfunction, methods)
            elif inspect.isfunction(each) and not each.__name__.startswith("_"):
                yield each


def parameters(function: Callable) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def is_method(function: Callable) -> bool:
    return "." in function.__qualname__


def test_every_function_refuses_something():
    """Those that take tensors, and those that say what they raise."""
    held = {called(row.function) for row in REFUSED}
    exempt = {called(each) for some in UNCHECKED.values() for each in some}
    assert not held & exempt
    arrays, owing = re.compile("Tensor|ndarray|Rollout"), set()
    for function in public():
        takes = any(arrays.search(str(x.annotation)) for x in parameters(function))
        says = re.search("raises:", function.__doc__ or "", re.IGNORECASE)
        if says or (takes and not is_method(function)):
            owing.add(called(function).removesuffix(".__init__"))
    assert len(owing) > 90
    assert owing - held == exempt


def test_every_mask_hides_junk():
    tested = {*INERT, *SCORERS, *PASSING}
    exempt = {each for some in UNMASKED.values() for each in some}
    assert not tested & exempt
    masked = {
        function
        for function in public()
        for x in parameters(function)
        if not is_method(function) and (x.name == "mask" or x.annotation is Rollout)
    }
    assert masked == tested | exempt
