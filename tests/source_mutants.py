"""Every small slip that the source allows, one at a time: does a test see it?

tests/mutants.py holds wrong versions that somebody thought of. Here nobody thinks: each
comparison, sign, constant, term, argument, default and statement of the functions of
every algorithm, and of minialign/logprobs.py, is changed in turn, and the tests run.

    python tests/mutants.py --source            all of them: some minutes
    python tests/mutants.py --source ppo.gae    those of a function, or of a module
    python tests/mutants.py --checks            each check deleted, those of `train` too

A mutant is the function's syntax tree with one node changed. It is compiled, and its
code is put *into the function object that everybody holds*: so every table of tests
meets the mutant and does not know it. What it meets is said by `evidence`, and the
first that fails has killed it. A deleted check meets the table REFUSED alone. Mutants
that survive are explained in `EXPLAINED`, or the run fails.
"""

import ast
import inspect
import os
import re
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from time import process_time
from types import FunctionType, ModuleType

import pytest
from hypothesis import HealthCheck, settings

from minialign import logprobs
from tests import golden, test_refusals
from tests.entries import ENTRIES, called
from tests.properties import common, vectors

ALGORITHMS = Path(logprobs.__file__).parent / "algorithms"
MODULES = ("logprobs", *sorted(path.stem for path in ALGORITHMS.glob("[a-z]*.py")))
PATIENCE = 10  # seconds of work, after which a test has not passed
PARTS_OF_A_FUNCTION = ("__code__", "__defaults__", "__kwdefaults__")

# A failure is not made smaller, and a slow machine is no failure.
settings.register_profile(
    "mutants",
    settings.get_profile("first failure"),
    suppress_health_check=list(HealthCheck),
)

# Why a survivor is no other function: what several have in common.
REFUSED_NEXT = "the calls after it look at the mask too, and refuse in the same words"
SHAPE_ALONE = "only the shape is read, and all rows and columns have the same"
ONE_ALONE = "there is one, which is the first and the last"
AS_MANY = "there are as many weights as copies of them"
LAST_IS_1 = "of two dimensions the last is dimension 1"
SQUARED = "a square has no sign"
BY_LOT = "equals lie in the order of their lots before: any order of them is by lot"
UNSEEN = "masked slots are left out of all that follows: any number will do"
ALSO_AN_INDEX = (
    "a tensor of whole numbers can be read and cut as a list can, but slowly"
)

# Survivors that compute the same, by their `key`. It names no line and outlives changes
# elsewhere in the file; where its own text changes, somebody has to look again.
EXPLAINED: dict[str, str] = {
    "logprobs.token_logprobs: logits.shape[-1] -> logits.shape[1]": LAST_IS_1,
    "logprobs.logprobs_from_logits: logits[..., 0] -> logits[..., -1]": SHAPE_ALONE,
    "dpo.ipo: h - 1 / (2 * beta) -> 1 / (2 * beta) - h": SQUARED,
    "dpo.make_pairs: in_random_order.argsort(dim=1, descending=True, stable=True ... "
    "-> in_random_order.argsort(descending=True, stable=True ...": LAST_IS_1,
    "dpo.make_pairs: ... dim=1, descending=True, stable=True) -> "
    "... dim=1, descending=True)": BY_LOT,
    "dpo.make_pairs: torch.arange(P).to(mixed) -> torch.arange(P)": (
        "it moves to the device of the rewards: there is one"
    ),
    "dpo.make_pairs: K // 2 -> K // 1": (
        "the rest are the same pairs, worse before better: the last line drops them"
    ),
    "grpo.grpo_loss: torch.where(mask, weights.detach(), 0.0) -> "
    "torch.where(mask, weights.detach(), 1.0)": UNSEEN,
    "ppo.score_tokens: torch.log_softmax(logits / temperature, dim=-1) -> "
    "torch.log_softmax(logits / temperature, dim=1)": LAST_IS_1,
    "ppo.score_tokens: every.gather(1, targets[:, None])[:, 0] -> "
    "every.gather(1, targets[:, None])[:, -1]": ONE_ALONE,
    "ppo.gae: r[:, 0] -> r[:, -1]": SHAPE_ALONE,
    "ppo.gae: r[:, 0] -> r[:, -1] (#2)": SHAPE_ALONE,
    "ppo.explained_variance: _live('values', values, mask)[mask].double() -> "
    "_live('values', values, mask)[mask]": "R is in float64, and so is R - V",
    "ppo.value_loss: V - R -> R - V": SQUARED,
    "ppo.value_loss: near - R -> R - near": SQUARED,
    "ppo.explained_variance: R - V -> V - R": "a variance has no sign",
    "ppo._live: torch.where(mask, x, 0.0) -> torch.where(mask, x, 1.0)": UNSEEN,
    "reinforce.no_baseline: return torch.zeros_like(rewards[0]) -> "
    "return -torch.zeros_like(rewards[0])": "minus nothing is nothing",
    "reinforce.no_baseline: rewards[0] -> rewards[-1]": SHAPE_ALONE,
    "reinforce.moving_average: rewards[0] -> rewards[-1]": SHAPE_ALONE,
    "reinforce.reinforce_loss: check_mask(mask) -> pass": REFUSED_NEXT,
    "rejection_sampling.select_random: size.cumsum(0) -> size.cumsum(-1)": ONE_ALONE,
    "rejection_sampling._ranks: earned.argsort(descending=True, stable=True) -> "
    "earned.argsort(descending=True)": BY_LOT,
    "rejection_sampling.likelihood_loss: check_mask(mask) -> pass": REFUSED_NEXT,
    "remax.remax_advantages: rewards[:, 0] -> rewards[:, -1]": SHAPE_ALONE,
    "remax.remax_loss: torch.where(mask, weights.detach(), 0.0) -> "
    "torch.where(mask, weights.detach(), 1.0)": UNSEEN,
    "rloo.rloo_loss: check_mask(mask) -> pass": REFUSED_NEXT,
    "rrhf.summed_logprobs: check_mask(mask) -> pass": REFUSED_NEXT,
    "rrhf.sft_loss: mask[:, 0] -> mask[:, -1]": SHAPE_ALONE,
    "sft.sft_loss: check_mask(mask) -> pass": REFUSED_NEXT,
    "trpo.score_choices: ... / temperature, dim=-1) -> ... / temperature, dim=1)": (
        LAST_IS_1
    ),
    "trpo.choice_kl: (old.exp() * (old - new)).sum(-1) -> "
    "(old.exp() * (old - new)).sum(1)": LAST_IS_1,
    "trpo.conjugate_gradients: 1e-20 * residual_square -> 2e-20 * residual_square": (
        "how small is small enough is a choice"
    ),
    "trpo.step_within: return torch.zeros_like(direction) -> "
    "return -torch.zeros_like(direction)": "minus nothing is nothing",
    "trpo.line_search: zip(weights, before, moves, strict=True) -> "
    "zip(weights, before, moves)": AS_MANY,
    "trpo.line_search: zip(weights, before, strict=True) -> zip(weights, before)": (
        AS_MANY
    ),
    "trpo.line_search: kl <= config.delta -> kl < config.delta": (
        "a KL that is measured is not delta to the last bit"
    ),
    "sft.batches: torch.randperm(len(examples), generator=generator).tolist() -> "
    "torch.randperm(len(examples), generator=generator)": ALSO_AN_INDEX,
    "sft.batches: torch.randperm(last - first, generator=generator).tolist() -> "
    "torch.randperm(last - first, generator=generator)": ALSO_AN_INDEX,
}


# Training loops and parts of them: what they do is tested by hand, update by update.
LOOPS = {
    "train",
    "score_answers",
    "same_beta",
    "reference_of_pairs",
    "_shuffled",
    "_length",
    "_mean_over",
    "_check_given",
    "surrogate_slope",
    "scored_parts",
    "_measure",
    "_of_chosen",
    "_positive",
}

# What a node can be mistaken for

COMPARISONS = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
OPPOSITES = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
SUMS = (ast.Add, ast.Sub)
ORDERED = (ast.Sub, ast.Div)  # operators whose operands may not change places
BOTH_SIDES = (ast.Add, ast.Mult, ast.BitAnd, ast.BitOr)  # either may stand alone
RENAMED = {
    "min": "max",
    "max": "min",
    "minimum": "maximum",
    "maximum": "minimum",
    "amin": "amax",
    "amax": "amin",
    "argmin": "argmax",
    "argmax": "argmin",
    "any": "all",
    "all": "any",
    "sum": "mean",
    "mean": "sum",
}
SYMMETRIC = ("min", "max", "minimum", "maximum", "promote_types")
PACKAGES = ("torch", "F", "np", "math")  # what has a function is no value itself


def like(node: ast.AST, **fields) -> ast.AST:
    """A copy of the node with these fields instead of its own."""
    return type(node)(**{**dict(ast.iter_fields(node)), **fields})


def with_one_changed(items: list, index: int, item: object) -> list:
    return [*items[:index], item, *items[index + 1 :]]


def is_whole_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int)


def negative(node: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.USub(), node)


def other_comparisons(node: ast.Compare) -> Iterator[ast.AST]:
    """Relaxed by the border, or turned round."""
    for index, operator in enumerate(node.ops):
        for other in COMPARISONS[type(operator)]:
            yield like(node, ops=with_one_changed(node.ops, index, other()))


def other_operations(node: ast.BinOp) -> Iterator[ast.AST]:
    """The opposite operator, a sign, the other order, or one operand alone."""
    operator = type(node.op)
    if operator in OPPOSITES:
        yield like(node, op=OPPOSITES[operator]())
    if operator in SUMS:
        yield like(node, left=negative(node.left))
    if operator in ORDERED:
        yield like(node, left=node.right, right=node.left)
    if not is_whole_number(node.right):  # it is changed by 1, which says the same
        yield node.left
    if operator in BOTH_SIDES and not is_whole_number(node.left):
        yield node.right
    if operator is ast.Sub:
        yield negative(node.right)


def other_updates(node: ast.AugAssign) -> Iterator[ast.AST]:
    """`+=` for `-=`."""
    if type(node.op) in OPPOSITES:
        yield like(node, op=OPPOSITES[type(node.op)]())


def without_sign(node: ast.UnaryOp) -> Iterator[ast.AST]:
    """Without its minus, `not` or `~`."""
    yield node.operand


def other_conjunctions(node: ast.BoolOp) -> Iterator[ast.AST]:
    """`or` for `and`, or without one of the conditions."""
    yield like(node, op=OPPOSITES[type(node.op)]())
    for index in range(len(node.values)):
        rest = [*node.values[:index], *node.values[index + 1 :]]
        yield rest[0] if len(rest) == 1 else like(node, values=rest)


def other_constants(node: ast.Constant) -> Iterator[ast.AST]:
    """The other truth; one more and one less; twice as much."""
    value = node.value
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int):
        yield ast.Constant(value + 1)
        yield ast.Constant(value - 1)
    elif isinstance(value, float):
        yield ast.Constant(2 * value if value else 1.0)


def other_defaults(node: ast.arguments) -> Iterator[ast.AST]:
    """1 where nothing was the default. (Numbers are changed as all constants are.)"""
    for field in ("defaults", "kw_defaults"):
        values = getattr(node, field)
        for index, value in enumerate(values):
            if isinstance(value, ast.Constant) and value.value is None:
                one = with_one_changed(values, index, ast.Constant(1))
                yield like(node, **{field: one})


def is_text_or_starred(node: ast.expr) -> bool:
    return isinstance(node, ast.Starred) or isinstance(getattr(node, "value", 0), str)


def moves_between_devices(node: ast.Call) -> bool:
    """`x.to(device)`: where there is one device, it does nothing."""
    is_move = isinstance(node.func, ast.Attribute) and node.func.attr == "to"
    return is_move and ast.unparse(node).endswith("device)")


def other_calls(node: ast.Call) -> Iterator[ast.AST]:
    """Arguments swapped or forgotten, another function, or no call of this method."""
    called = node.func
    is_method = isinstance(called, ast.Attribute)
    name = called.attr if is_method else getattr(called, "id", "")
    for index in range(len(node.args) - 1):
        first, second = node.args[index : index + 2]
        if name not in SYMMETRIC and not any(map(is_text_or_starred, (first, second))):
            swapped = [*node.args[:index], second, first, *node.args[index + 2 :]]
            yield like(node, args=swapped)
    for index, keyword in enumerate(node.keywords):
        if keyword.arg not in (None, "device"):
            rest = [*node.keywords[:index], *node.keywords[index + 1 :]]
            yield like(node, keywords=rest)
    if name in RENAMED:
        field = "attr" if is_method else "id"
        yield like(node, func=like(called, **{field: RENAMED[name]}))
    of_a_value = is_method and getattr(called.value, "id", "") not in PACKAGES
    if of_a_value and not moves_between_devices(node):
        yield called.value  # without .detach(), .exp(), .sum(1), ...


def one_branch(node: ast.IfExp) -> Iterator[ast.AST]:
    """One value, whatever the condition."""
    yield node.body
    yield node.orelse


def other_sign(node: ast.Return) -> Iterator[ast.AST]:
    """A minus before what is returned, where that can be a number."""
    if isinstance(node.value, ast.BinOp | ast.Call | ast.Name):
        yield like(node, value=negative(node.value))


OPERATORS: dict[type[ast.AST], Callable[[ast.AST], Iterator[ast.AST]]] = {
    ast.Compare: other_comparisons,
    ast.BinOp: other_operations,
    ast.AugAssign: other_updates,
    ast.UnaryOp: without_sign,
    ast.BoolOp: other_conjunctions,
    ast.Constant: other_constants,
    ast.arguments: other_defaults,
    ast.Call: other_calls,
    ast.IfExp: one_branch,
    ast.Return: other_sign,
}


# Which statements can be left out


def names(node: ast.AST, context: type[ast.expr_context]) -> Counter[str]:
    """How often each name is stored, or loaded, in this part of a tree."""
    found = (x for x in ast.walk(node) if isinstance(x, ast.Name))
    return Counter(x.id for x in found if isinstance(x.ctx, context))


def can_be_left_out(statement: ast.stmt, function: ast.FunctionDef) -> bool:
    """Nothing later asks for a name that this statement alone gives."""
    kinds = ast.Expr | ast.Assign | ast.AugAssign | ast.If | ast.For | ast.Continue
    is_text = isinstance(getattr(statement, "value", None), ast.Constant | ast.Yield)
    if not isinstance(statement, kinds) or is_text:
        return False
    known = {node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)}
    for node in ast.walk(function):
        if isinstance(node, ast.stmt) and node.end_lineno < statement.lineno:
            known |= names(node, ast.Store).keys()
    own = names(statement, ast.Store).keys() - known
    elsewhere = names(function, ast.Load) - names(statement, ast.Load)
    return not own & elsewhere.keys()


def is_check(statement: ast.stmt) -> bool:
    """Its only effect is to refuse: `check_mask(mask)`, or `if ...: raise ...`."""
    if isinstance(statement, ast.If):
        return isinstance(statement.body[-1], ast.Raise) and not statement.orelse
    call = getattr(statement, "value", None)
    if not (isinstance(statement, ast.Expr) and isinstance(call, ast.Call)):
        return False
    name = getattr(call.func, "id", "").lstrip("_")
    return name.startswith(("check", "require"))


# Mutants of a function

UNTOUCHED = ("op", "ops", "ctx", "returns", "decorator_list")  # what nodes have, too
MESSAGES = (ast.Raise, ast.JoinedStr)  # what an error says is not what is tested
BITS = (ast.Constant, ast.UnaryOp, ast.Slice, ast.Tuple, ast.keyword)  # say too little
AROUND = 8  # words and signs that are shown on either side of what differs


@dataclass(frozen=True)
class Mutant:
    """A function as it stands in the source, with one node changed."""

    key: str  # such as "ppo.gae: gamma * lam -> gamma"
    line: int
    before: str  # the statement, or its first line
    after: str
    right: FunctionType  # what everybody holds
    wrong: FunctionType  # what it becomes for a while

    def __str__(self) -> str:
        return self.key.replace(":", f":{self.line}", 1)


@cache
def syntax(module: ModuleType) -> dict[str, ast.FunctionDef]:
    """The functions of a module, without what a machine does not read.

    What decorates one stays around it: its own code is what is changed.
    """
    tree = ast.parse(inspect.getsource(module))
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []
            found[node.name] = node
    return found


def places(node: ast.AST, above: tuple = ()) -> Iterator[tuple]:
    """(holder, key, nodes above) of every node below: holder[key] is the node."""
    if isinstance(node, ast.keyword) and getattr(node.value, "value", None) is True:
        return  # such as stable=True: left out, it is False
    above = (*above, node)
    for field, value in ast.iter_fields(node):
        if field in UNTOUCHED:
            continue
        if isinstance(value, list):
            hung = [(value, index) for index in range(len(value))]
        else:
            hung = [(vars(node), field)]
        for holder, key in hung:
            child = holder[key]
            if isinstance(child, ast.AST) and not isinstance(child, MESSAGES):
                yield holder, key, above
                yield from places(child, above)


def variants(node: ast.AST, function: ast.FunctionDef) -> Iterator[ast.AST]:
    """What may stand in the place of this node."""
    if type(node) in OPERATORS:
        yield from OPERATORS[type(node)](node)
    if isinstance(node, ast.stmt) and can_be_left_out(node, function):
        yield ast.Pass()


def difference(old: str, new: str) -> str:
    """old -> new; of long ones what differs, and some words around it."""
    if len(old) < 60:
        return f"{old} -> {new}"
    both = [re.findall(r"\w+|\W", text) for text in (old, new)]
    first = len(os.path.commonprefix(both))  # words that are alike
    last = len(os.path.commonprefix([words[first:][::-1] for words in both]))
    start = max(first - AROUND, 0)
    end = max(last - AROUND, 0)
    said = []
    for words in both:
        text = "".join(words[start : len(words) - end]).strip()
        said.append("... " * (start > 0) + text + " ..." * (end > 0))
    return " -> ".join(said)


def first_line(node: ast.AST) -> str:
    return ast.unparse(node).strip().splitlines()[0]


def deepest(nodes: tuple, fits: Callable[[ast.AST], bool]) -> int:
    return max(depth for depth, node in enumerate(nodes) if fits(node))


def compiled(tree: ast.FunctionDef, right: FunctionType) -> FunctionType:
    """The function of this tree, in a copy of the namespace of the right one."""
    unit = ast.fix_missing_locations(ast.Module([tree], type_ignores=[]))
    namespace = dict(right.__globals__)
    code = compile(unit, right.__code__.co_filename, "exec")
    exec(code, namespace)  # noqa: S102 - it is our own source, but for one node
    return namespace[tree.name]


def mutants_of(
    tree: ast.FunctionDef, right: FunctionType, only: Callable = lambda node: True
) -> list[Mutant]:
    """All mutants of a function; `only` those of nodes that are asked for."""
    name = called(right)
    found = []
    known = Counter()
    for holder, key, above in list(places(tree)):
        node = holder[key]
        if not only(node):
            continue
        nodes = (*above, node)
        said = deepest(nodes, lambda each: not isinstance(each, BITS))
        stated = deepest(nodes, lambda each: isinstance(each, ast.stmt))
        old = first_line(nodes[said])
        before = first_line(nodes[stated])
        for variant in variants(node, tree):
            changed = (*above, variant)
            holder[key] = ast.copy_location(variant, node)
            new = first_line(changed[said])
            after = first_line(changed[stated])
            wrong = compiled(tree, right)
            holder[key] = node
            slip = f"{name}: {difference(old, new)}"
            known[slip] += 1
            if known[slip] > 1:
                slip += f" (#{known[slip]})"
            line = nodes[stated].lineno
            found.append(Mutant(slip, line, before, after, right, wrong))
    return found


def functions(part: str) -> Iterator[tuple[ast.FunctionDef, FunctionType]]:
    """Syntax tree and function: all, or those of a module, or one such as ppo.gae."""
    for name in MODULES:
        module = vectors.module_of(name)
        for own, tree in syntax(module).items():
            if part in ("", name, f"{name}.{own}"):
                yield tree, inspect.unwrap(getattr(module, own))


def is_pure(function: FunctionType) -> bool:
    """It is no training loop, and no part of one."""
    return function.__name__ not in LOOPS


def source_mutants(part: str = "") -> list[Mutant]:
    """Those of the pure functions."""
    found = []
    for tree, function in functions(part):
        if is_pure(function):
            found += mutants_of(tree, function)
    return found


def deleted_checks(part: str = "") -> list[Mutant]:
    """Of the algorithms, `train` included: each check left out."""
    found = []
    for tree, function in functions(part):
        if function.__module__ != logprobs.__name__:
            found += mutants_of(tree, function, only=is_check)
    return found


# What a mutant meets

Proof = tuple[str, Callable[[], None]]  # what is tested, and the test: it may raise


def belongs(function: Callable, module: str) -> bool:
    return inspect.unwrap(function).__module__.endswith(f".{module}")


def golden_vectors(module: str) -> Iterator[Proof]:
    """Its functions' values and slopes, to 13 digits."""
    for name in golden.VECTORS:
        if name.startswith(f"{module}."):
            check = partial(vectors.check_cases, vectors.ours(name), name)
            yield f"golden: {name}", check


def refused(module: str) -> Iterator[Proof]:
    """Nonsense calls of its functions."""
    for row in test_refusals.REFUSED:
        if belongs(row.function, module):
            yield f"refusals: {row}", partial(test_refusals.test_refused, row)


def legal(module: str) -> Iterator[Proof]:
    """Calls at the edge of sense that name the module."""
    known = vars(test_refusals)
    room = vectors.module_of(module)
    for name, (call, expected) in test_refusals.LEGAL.items():
        if any(known.get(each) is room for each in call.__code__.co_names):
            check = partial(test_refusals.test_legal, call, expected)
            yield f"refusals: legal, {name}", check


def properties(module: str) -> Iterator[Proof]:
    """What its functions owe, but for the golden vectors."""
    for entry in ENTRIES:
        if belongs(entry.function, module):
            for check in entry.properties:
                if common.name_of(check) != "check_golden_vectors":
                    name = f"properties: {entry.name}, {common.name_of(check)}"
                    yield name, partial(check, entry.function)


def evidence(module: str) -> Iterator[Proof]:
    """All that judges the functions of a module; what is cheap comes first."""
    yield from golden_vectors(module)
    yield from refused(module)
    yield from legal(module)
    yield from properties(module)


# Judging


class TooLong(BaseException):
    """No `Exception`: nobody who catches those shall take it for a refusal."""


def too_long(*_) -> None:
    raise TooLong


@contextmanager
def replaced(right: FunctionType, wrong: FunctionType) -> Iterator[None]:
    """Whoever calls the right function runs the wrong one's code."""
    kept = {part: getattr(right, part) for part in PARTS_OF_A_FUNCTION}
    try:
        for part in PARTS_OF_A_FUNCTION:
            setattr(right, part, getattr(wrong, part))
        yield
    finally:
        for part, value in kept.items():
            setattr(right, part, value)


@contextmanager
def quick_to_judge() -> Iterator[None]:
    """The profile above, no warnings, and an end to endless loops."""
    profile = settings.get_current_profile_name()
    handler = signal.signal(signal.SIGVTALRM, too_long)
    settings.load_profile("mutants")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        settings.load_profile(profile)
        signal.signal(signal.SIGVTALRM, handler)


def failure(check: Callable[[], None]) -> str | None:
    """The type of the error by which it fails."""
    signal.setitimer(signal.ITIMER_VIRTUAL, PATIENCE)
    try:
        check()
    except (Exception, pytest.fail.Exception, TooLong) as error:  # noqa: BLE001
        return type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return None


def first_failure(proofs: Iterable[Proof]) -> tuple[str, str] | None:
    """Which test fails first, and by which error."""
    for name, check in proofs:
        error = failure(check)
        if error:
            return name, error
    return None


def killed_by(mutant: Mutant, proofs: Iterable[Proof]) -> tuple[str, str] | None:
    with replaced(mutant.right, mutant.wrong):
        return first_failure(proofs)


def assert_true_functions_pass(module: str, proofs: list[Proof]) -> None:
    failed = first_failure(proofs)
    if failed:
        raise RuntimeError(f"{module}: its functions as they are fail {failed}")


def verdicts(
    mutants: list[Mutant], prove: Callable[[str], Iterator[Proof]]
) -> dict[Mutant, tuple[str, str] | None]:
    """By what each was killed. Before and after, the true functions pass."""
    found = {}
    for module, group in groupby(mutants, lambda mutant: mutant.key.split(".")[0]):
        start = process_time()
        proofs = list(prove(module))
        assert_true_functions_pass(module, proofs)
        killers = {mutant: killed_by(mutant, proofs) for mutant in group}
        assert_true_functions_pass(module, proofs)
        alive = list(killers.values()).count(None)
        said = f"{module}: {len(killers)} mutants, {alive} alive"
        print(f"{said}; {process_time() - start:.0f} s", file=sys.stderr)
        found |= killers
    return found


def tally(items: Iterable[str]) -> str:
    return ", ".join(f"{item} {count}" for item, count in Counter(items).most_common())


def report(mutants: list[Mutant], prove: Callable[[str], Iterator[Proof]]) -> int:
    """Prints who survived and why; 1 if nobody knows why, or what was said is wrong."""
    with quick_to_judge():
        found = verdicts(mutants, prove)
    killers = {mutant: killer for mutant, killer in found.items() if killer}
    alive = [mutant for mutant in mutants if mutant not in killers]
    unexplained = [mutant for mutant in alive if mutant.key not in EXPLAINED]
    refuted = [mutant for mutant in killers if mutant.key in EXPLAINED]
    for mutant in alive:
        print(f"\n{mutant}\n    - {mutant.before}\n    + {mutant.after}")
        print(f"    {EXPLAINED.get(mutant.key, 'NOT EXPLAINED')}")
    for mutant in refuted:
        print(f"\n{mutant}\n    EXPLAINED, YET KILLED by {killers[mutant]}")
    share = len(killers) / len(mutants)
    print(f"\n{len(mutants)} mutants, {len(killers)} killed ({share:.1%}), ", end="")
    print(f"{len(alive)} alive, {len(unexplained)} of them not explained")
    print(f"killed by: {tally(name.split(':')[0] for name, _ in killers.values())}")
    print(f"by way of: {tally(error for _, error in killers.values())}")
    return int(bool(unexplained or refuted))


def main(kind: str, part: str) -> int:
    """`kind` is "source" or "checks"; `part` a module, a function, or nothing: all."""
    if kind == "checks":
        mutants = deleted_checks(part)
        prove = refused
    else:
        mutants = source_mutants(part)
        prove = evidence
    if not mutants:
        print(f"nothing is called {part}, or nothing can be changed in it")
        return 2
    return report(mutants, prove)
