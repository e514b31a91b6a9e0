"""DPO: its gradient by enumeration, its losses, its pairs, and training."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minialign import sampling
from minialign.algorithms import dpo
from minialign.algorithms.dpo import (
    conservative,
    dpo_loss,
    ipo,
    make_pairs,
    pair_logprobs,
)
from tests import enumeration as world
from tests import strategies
from tests.methods import METHODS
from tests.properties import common, training
from tests.toy import (
    PROBLEMS,
    TOKENIZER,
    base,
    base_weights,
    generator,
    new_gpt,
)

# Part 1: the expected gradient, over all pairs of 15 responses (tests/enumeration.py)

LOGITS, REFERENCE = world.random_logits(0), world.random_logits(1)
REWARDS = world.random_logits(2).flatten()[:15]  # any numbers will do
RIGHT = (REWARDS > 0.2).double()  # and a verdict on each response


def close(actual, expected, atol=1e-10):
    expected = torch.as_tensor(expected, dtype=actual.dtype).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def verdicts(loss, ref_logits, beta):
    """A pair of draws, the right one preferred; equal verdicts say nothing."""
    reference = world.sequence_logprobs(ref_logits)

    def pair(rows, logprobs, mask):
        better, worse = RIGHT[rows].argsort(descending=True)
        if RIGHT[rows[better]] == RIGHT[rows[worse]]:
            return torch.zeros(())
        both, order = logprobs.sum(1), torch.stack((better, worse))
        four = torch.cat((both[order], reference[rows][order]))
        return loss(*four[:, None], beta=beta)

    return pair


@pytest.mark.parametrize("beta", [0.1, 1.5])
def test_at_the_reference_own_pairs_give_the_policy_gradient(beta):
    """X-2: of two draws, RLOO's advantages are ± their difference in reward, and half
    the sum of A ∇ log π is unbiased. So a verdict's worth of DPO is β ∇ E[right]."""
    actual = -world.expected_gradient(verdicts(dpo_loss, LOGITS, beta), LOGITS, 2)
    close(actual, beta * world.true_gradient(LOGITS, RIGHT))
    assert actual.norm() > 0.01


def test_away_from_the_reference_it_turns():
    """X-2, the negative control: pairs told apart count for less."""
    actual = -world.expected_gradient(verdicts(dpo_loss, REFERENCE, 1.5), LOGITS, 2)
    assert world.cosine(actual, world.true_gradient(LOGITS, RIGHT)) < 0.98


@settings(max_examples=15)
@given(strategies.logprobs((2,)), st.sampled_from([0.1, 0.5, 2.0]))
def test_one_pair_at_the_reference_is_rloo_with_two_answers(sums, beta):
    """X-2 for each pair: L = -(1/2)(A_w l_w + A_l l_l), A_w = r_w - r_l = beta."""
    leaf = sums.clone().requires_grad_()
    loss = dpo_loss(leaf[:1], leaf[1:], sums[:1], sums[1:], beta)
    (slope,) = torch.autograd.grad(loss, leaf)
    close(slope, [-beta / 2, beta / 2])


def labelled(loss, beta):
    """Two draws; people prefer y to y' with chance σ(r(y) - r(y'))."""
    reference = world.sequence_logprobs(REFERENCE)

    def pair(rows, logprobs, mask):
        (a, b), (p, q) = logprobs.sum(1)[:, None], reference[rows][:, None]
        chance = torch.sigmoid(REWARDS[rows[0]] - REWARDS[rows[1]])
        first, second = loss(a, b, p, q, beta=beta), loss(b, a, q, p, beta=beta)
        return chance * first + (1 - chance) * second

    return pair


def reference_free_loss(chosen_logprobs, rejected_logprobs, *reference, beta):
    """Broken: −log σ(β (log π_w − log π_l)), as in lesson 30."""
    zeros = map(torch.zeros_like, reference)
    return dpo_loss(chosen_logprobs, rejected_logprobs, *zeros, beta)


def test_nothing_moves_at_the_optimum():
    """DPO-10, X-1: pi* = reference exp(r / beta) / Z, whoever draws the pairs."""
    best, _ = world.optimum(REWARDS, REFERENCE, beta=0.5)
    best = world.logits_of(best)

    def slope(loss, beta, at=best, behaviour=REFERENCE):
        return world.expected_gradient(labelled(loss, beta), at, 2, behaviour)

    close(slope(dpo_loss, 0.5), 0.0)
    close(slope(dpo_loss, 0.5, behaviour=LOGITS), 0.0)
    for elsewhere in (
        slope(dpo_loss, 0.25),
        slope(reference_free_loss, 0.5),
        slope(dpo_loss, 0.5, LOGITS),
    ):
        assert elsewhere.abs().max() > 0.005


# Part 2: the losses

float64 = partial(torch.tensor, dtype=torch.float64)
OWN = ("chosen_logprobs", "rejected_logprobs")
REF = ("ref_chosen_logprobs", "ref_rejected_logprobs")
NAMES = (*OWN, *REF)
CASE = dict(
    zip(NAMES, float64([[-4.0, -2], [-6, -3.5], [-4.5, -2], [-5.5, -3]]), strict=True)
)
CASES = st.integers(1, 4).flatmap(
    lambda size: st.fixed_dictionaries(
        {name: strategies.logprobs((size,)) for name in NAMES}
    )
)
LOSSES = {
    "dpo": dpo_loss,
    "cdpo": partial(dpo_loss, per_pair=conservative),
    "ipo": partial(dpo_loss, per_pair=ipo),
}


def free(beta, **four):
    return reference_free_loss(*(four[name] for name in NAMES), beta=beta)


def at(h, beta, loss=dpo_loss):
    """(value, slopes in the policy's two) where one pair has the margin h."""
    zero = float64([-20000.0])
    case = dict.fromkeys(NAMES, zero)
    case["chosen_logprobs"] = zero + max(h, 0.0)
    case["rejected_logprobs"] = zero + max(-h, 0.0)
    value, slopes = common.value_and_gradients(partial(loss, beta=beta), case, OWN)
    return value.item(), [slopes[name].item() for name in OWN]


@pytest.mark.parametrize(
    "beta, loss, expected",
    [
        (0.1, "dpo", 0.644397),
        (0.5, "dpo", 0.474077),
        (0.1, "ipo", 16.0),
        (0.5, "cdpo", 0.9 * 0.474077 + 0.1 * 0.974077),
    ],
)
def test_golden_numbers(beta, loss, expected):
    """h = 1: methods.md, section 8."""
    assert at(1.0, beta, LOSSES[loss])[0] == pytest.approx(expected, abs=1e-6)


def test_loss_by_hand():
    """h = 0.5 + 0.5 and 0 + 0.5: the mean of log(1 + e^-2h) at beta 2."""
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2
    close(dpo_loss(**CASE, beta=2.0), expected)
    expected = (math.log1p(math.exp(-4)) + math.log1p(math.exp(-3))) / 2
    close(free(**CASE, beta=2.0), expected)


def test_the_loss_owes_what_every_loss_owes():
    """C-4 to C-12, as far as they are for losses without a mask; DPO-3."""
    loss = partial(dpo_loss, beta=0.7)
    common.check_microbatches(loss, CASES, common.all_rows, OWN)
    common.check_permutation(loss, CASES, OWN)
    common.check_shapes_refused(loss, CASE)
    common.check_no_gradient_to(loss, CASES, REF)
    common.check_gradient_reaches(loss, CASE, OWN)
    common.check_pure(loss, CASES)
    common.check_duplication(loss, CASES, OWN)
    common.check_dtype(loss, CASES, OWN)


@pytest.mark.parametrize("name", ["cdpo", "ipo"])
def test_what_is_made_of_h_is_reduced_alike(name):
    loss = partial(LOSSES[name], beta=0.7)
    common.check_microbatches(loss, CASES, common.all_rows, OWN)
    common.check_gradient_reaches(loss, CASE, OWN)


def test_options_matter():
    """C-10."""
    losses = {f"{name} {b}": partial(LOSSES[name], beta=b) for name in LOSSES
              for b in (0.2, 0.4)}  # fmt: skip
    losses["free"] = partial(free, beta=0.2)
    more = partial(conservative, smoothing=0.2)
    losses["smoother"] = partial(dpo_loss, beta=0.2, per_pair=more)
    common.check_option_matters(losses, CASE)


@settings(max_examples=15)
@given(CASES, st.sampled_from([0.1, 0.5, 3.0]))
def test_at_the_reference(case, beta):
    """DPO-1, DPO-2: log 2, whatever the answers; -beta/2 and beta/2."""
    same = case | {"chosen_logprobs": case[REF[0]], "rejected_logprobs": case[REF[1]]}
    loss = partial(dpo_loss, beta=beta)
    value, slopes = common.value_and_gradients(loss, same, OWN)
    size = common.all_rows(case)
    close(value, math.log(2))
    close(slopes[OWN[0]], -beta / 2 / size)
    close(slopes[OWN[1]], beta / 2 / size)


@pytest.mark.parametrize("h", [-3.0, -0.4, 0.0, 1.0, 2.5])
@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_the_slope_anywhere(h, beta):
    """DPO-2, DPO-7: -beta σ(-beta h) for the chosen answer, always downhill."""
    value, (chosen, rejected) = at(h, beta)
    assert value == pytest.approx(math.log1p(math.exp(-beta * h)))
    assert chosen == pytest.approx(-beta / (1 + math.exp(beta * h)))
    assert rejected == -chosen > 0


@settings(max_examples=15)
@given(CASES, st.sampled_from([0.1, 1.0]), st.sampled_from([-2.5, -0.5]))
def test_only_the_margin_counts(case, beta, c):
    """DPO-4: c on the policy's two, the reference's two, or one answer's two."""
    value = dpo_loss(**case, beta=beta)
    for names in (OWN, REF, (OWN[0], REF[0]), (OWN[1], REF[1])):
        moved = case | {name: case[name] + c for name in names}
        close(dpo_loss(**moved, beta=beta), value)
    moved = case | {OWN[0]: case[OWN[0]] + c, REF[1]: case[REF[1]] + c}
    assert dpo_loss(**moved, beta=beta) > value


@settings(max_examples=15)
@given(CASES, st.sampled_from([0.1, 0.5, 3.0]))
def test_beta_scales_and_a_swap_adds_beta_h(case, beta):
    """DPO-5, DPO-6: L(beta, h) = L(1, beta h), and L(-h) - L(h) = beta h."""
    scaled = {name: beta * x for name, x in case.items()}
    value = dpo_loss(**case, beta=beta)
    close(value, dpo_loss(**scaled, beta=1.0))
    chosen, rejected, ref_chosen, ref_rejected = (case[name] for name in NAMES)
    h = chosen - ref_chosen - rejected + ref_rejected
    swapped = dpo_loss(rejected, chosen, ref_rejected, ref_chosen, beta)
    close(swapped - value, beta * h.mean())


@pytest.mark.parametrize("h", [-1e4, -1000.0, 1000.0, 1e4])
@pytest.mark.parametrize("name", LOSSES)
def test_margins_of_any_size_are_finite(name, h):
    """DPO-8: where -log(sigmoid(x)) would be inf."""
    value, slopes = at(h, 1.0, LOSSES[name])
    expected = {
        "dpo": max(-h, 0.0),
        "cdpo": max(-h, 0.0) + 0.1 * h,
        "ipo": (h - 0.5) ** 2,
    }
    assert value == pytest.approx(expected[name])
    assert all(map(math.isfinite, slopes))


@settings(max_examples=15)
@given(st.floats(-20, 20), st.sampled_from([0.1, 1.0]))
def test_smoothing_adds_a_line(h, beta):
    """cDPO-1: L_e(h) = L(h) + e beta h, and e = 0 is DPO to the bit."""
    value, _ = at(h, beta)
    shape = partial(conservative, smoothing=0.3)
    smoothed, _ = at(h, beta, partial(dpo_loss, per_pair=shape))
    assert smoothed == pytest.approx(value + 0.3 * beta * h, abs=1e-9)
    none = partial(conservative, smoothing=0.0)
    assert at(h, beta, partial(dpo_loss, per_pair=none)) == at(h, beta)


@pytest.mark.parametrize("e", [0.05, 0.3])
def test_smoothing_has_a_lowest_point(e):
    """cDPO-2: beta h = log((1 - e)/e), where the loss is the entropy of e."""
    loss = partial(dpo_loss, per_pair=partial(conservative, smoothing=e))
    h = math.log((1 - e) / e) / 0.5
    value, slopes = at(h, 0.5, loss)
    assert value == pytest.approx(-e * math.log(e) - (1 - e) * math.log(1 - e))
    assert slopes == pytest.approx([0, 0], abs=1e-12)
    assert min(at(h - 0.5, 0.5, loss)[0], at(h + 0.5, 0.5, loss)[0]) > value


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_ipo(beta):
    """IPO-1."""
    loss = LOSSES["ipo"]
    value, slopes = at(0.0, beta, loss)
    assert value == pytest.approx(1 / (4 * beta**2))
    assert slopes == pytest.approx([-1 / beta, 1 / beta])
    assert at(1 / (2 * beta), beta, loss)[0] == pytest.approx(0, abs=1e-12)
    assert at(1 / beta, beta, loss)[1][0] > 0  # beyond the goal it pulls back
    difference = at(-0.7, beta, loss)[0] - at(0.7, beta, loss)[0]
    assert difference == pytest.approx(2 * 0.7 / beta)


def test_without_the_reference_the_first_loss_is_not_log_2():
    """T40: the free check."""
    same = {**CASE, REF[0]: CASE[OWN[0]], REF[1]: CASE[OWN[1]]}
    close(dpo_loss(**same, beta=0.7), math.log(2))
    assert abs(free(**same, beta=0.7).item() - math.log(2)) > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_log_probability_is_refused(name):
    loss = partial(dpo_loss, beta=1.0)
    for bad in (math.nan, math.inf, -math.inf, 0.1):
        case = {**CASE, name: CASE[name].clone()}
        case[name][1] = bad
        common.assert_refused(loss, case, ValueError, f"{bad}", [name])


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan, math.inf])
def test_beta_is_refused(beta):
    for loss in LOSSES.values():
        with pytest.raises(ValueError, match="beta: got"):
            loss(**CASE, beta=beta)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0, math.nan])
def test_smoothing_is_refused(smoothing):
    loss = partial(dpo_loss, per_pair=partial(conservative, smoothing=smoothing))
    with pytest.raises(ValueError, match="smoothing: got"):
        loss(**CASE, beta=1.0)


def flipped(*args, **kwargs):
    """T42: log 2 at the reference all the same."""
    return -dpo_loss(*args, **kwargs) + 2 * math.log(2)


def test_a_flipped_sign_passes_log_2_and_nothing_else():
    """DPO-7: why the log 2 test alone is not enough."""
    assert at(0.0, 0.5, flipped)[0] == pytest.approx(math.log(2))
    assert at(0.0, 0.5, flipped)[1][0] > 0


def by_own_count(*args, count=None, **kwargs):
    """A mean of means, whatever count says."""
    return dpo_loss(*args, **kwargs)


def broadcast(beta, **four):
    """(B, 1) against (B,): every answer against every other; no reference is fixed."""
    chosen, rejected, ref_chosen, ref_rejected = (four[name] for name in NAMES)
    h = chosen - ref_chosen - rejected + ref_rejected
    return -F.logsigmoid(beta * h).mean()


def test_the_properties_find_wrong_losses():
    wrong = partial(by_own_count, beta=0.5)
    assert common.refutes(common.check_microbatches, wrong, CASES, common.all_rows, OWN)
    wrong = partial(broadcast, beta=0.5)
    assert common.refutes(common.check_shapes_refused, wrong, CASE)
    assert common.refutes(common.check_no_gradient_to, wrong, CASES, REF)


# Part 3: pairs

GROUPS = strategies.groups(elements=st.sampled_from([0.0, 1.0]))
GRADED = strategies.groups()


def pairs_of(rewards, most=9, seed=0):
    return [tuple(pair) for pair in make_pairs(rewards, most, generator(seed)).tolist()]


@settings(max_examples=60)
@given(GROUPS | GRADED, st.integers(1, 4), st.integers(0, 5))
def test_pairs_are_disjoint_within_a_problem_and_told_apart(rewards, most, seed):
    K, flat = rewards.shape[1], rewards.flatten().tolist()
    pairs = pairs_of(rewards, most, seed)
    rows = [row for pair in pairs for row in pair]
    assert len(set(rows)) == len(rows)
    for better, worse in pairs:
        assert better // K == worse // K and flat[better] > flat[worse]
    for p, group in enumerate(rewards.tolist()):
        mine = [pair for pair in pairs if pair[0] // K == p]
        assert bool(mine) == (max(group) > min(group))
        if set(group) <= {0.0, 1.0}:
            right = int(sum(group))
            assert len(mine) == min(right, K - right, most)
        elif mine:  # the widest gap is among them
            widest = max(flat[better] - flat[worse] for better, worse in mine)
            assert widest == max(group) - min(group)


def test_pairs_are_drawn_by_lot():
    """Every right answer with every wrong one, and the same for the same generator."""
    rewards = float64([[1, 0, 0, 1], [0, 0, 0, 0]])
    found = {pair for seed in range(60) for pair in pairs_of(rewards, 1, seed)}
    assert found == {(0, 1), (0, 2), (3, 1), (3, 2)}
    assert pairs_of(rewards, seed=3) == pairs_of(rewards, seed=3)


@pytest.mark.parametrize(
    "rewards, most, match",
    [
        (torch.ones(4), 1, r"\(P, K"),
        (torch.ones(4, 1), 1, r"\(P, K"),
        (torch.ones(2, 2, 2), 1, r"\(P, K"),
        (torch.tensor([[1.0, math.nan]]), 1, "finite"),
        (torch.ones(2, 2), 0, "most"),
    ],
)
def test_no_pairs_from_other_things(rewards, most, match):
    with pytest.raises(ValueError, match=match):
        make_pairs(rewards, most, generator())


# Part 4: training, in a world where the answers are "y" and "no"

METHOD = METHODS["dpo"]
CONFIG = METHOD.config
run = METHOD.run


def nats(model, prompt, answer, temperature=1.0):
    """log π(answer | prompt) alone, without padding, by cross-entropy."""
    ids = torch.tensor([*prompt, *answer])
    logits = model.logits(model(ids[None, :-1]))[0, len(prompt) - 1 :] / temperature
    return -F.cross_entropy(logits, ids[len(prompt) :], reduction="sum")


def pair(question, chosen, rejected):
    both = map(TOKENIZER.encode_response, (chosen, rejected))
    return TOKENIZER.encode_prompt(question), *both


def test_with_the_pairs_the_wrong_way_round_it_does_not_learn(monkeypatch):
    monkeypatch.setattr(dpo, "make_pairs", lambda *args: make_pairs(*args).flip(1))
    assert not training.learns(partial(run, **METHOD.long), METHOD.sure, METHOD.shows)


def test_given_pairs_teach_without_a_draw(monkeypatch):
    """Off-policy: an answer it never gives, "z", preferred to one that it gives."""
    monkeypatch.setattr(dpo, "generate", None)
    policy, pairs = base(), [pair(p.question, "z", "no") for p in PROBLEMS]
    said = pairs[0][1]
    before = nats(policy, pairs[0][0], said).item()
    config = replace(CONFIG, rounds=1, updates=6)
    metrics = list(run(policy, config, reward=None, problems=[], given=pairs))
    assert nats(policy, pairs[0][0], said).item() > before + 0.5
    assert metrics[0]["pairs"] == 5 and metrics[0]["completions"] == 0
    assert "reward" not in metrics[0]
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics[0]["chosen_length"] == 2 and metrics[0]["rejected_length"] == 3


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_pair_logprobs_are_sums_over_answers(temperature):
    """T45: of each answer alone, EOS included, the prompt not."""
    policy = base()
    pairs = [pair("a", "y", "no"), pair("long one", "noo", "y"), pair("c", "", "n")]
    actual = pair_logprobs(policy, pairs, TOKENIZER.pad_id, temperature)
    for row, (prompt, *both) in zip(actual, pairs, strict=True):
        expected = [nats(policy, prompt, answer, temperature) for answer in both]
        close(row, torch.stack(expected), atol=1e-5)


def test_dpo_cannot_see_a_wrong_prompt_mask():
    """DPO-9: the prompt's own log-probs cancel; in means over tokens they do not."""
    policy, reference = base().double(), new_gpt(3).double()
    (prompt, *both), bos = pair("what", "y", "no"), TOKENIZER.bos_id
    assert prompt[0] == bos

    def margin(start, mean):
        four = []  # of the policy, then of the reference
        for model in (policy, reference):
            for answer in both:
                scored = prompt[start:] + answer
                total = nats(model, prompt[:start], scored)
                four.append(total / len(scored) if mean else total)
        value = dpo_loss(*torch.stack(four)[:, None], beta=0.5)
        slopes = torch.autograd.grad(value, list(policy.parameters()))
        return value.detach(), torch.cat([slope.flatten() for slope in slopes])

    right, wrong = margin(len(prompt), mean=False), margin(1, mean=False)
    close(wrong[0], right[0])
    close(wrong[1], right[1], atol=1e-9)
    right, wrong = margin(len(prompt), mean=True), margin(1, mean=True)
    assert (wrong[0] - right[0]).abs() > 0.01


def trained_on(scored):
    """Of calls of `pair_logprobs`: the pairs of every micro-batch of a step."""
    return [args[1] for args, logprobs in scored if logprobs.requires_grad]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_two_rounds_by_hand(monkeypatch, temperature):
    """Every metric against code of its own; T38, T39: the reference of a round is the
    policy that drew its pairs, and every pair has its own row."""
    config = replace(CONFIG, temperature=temperature, batch=5, lr=1e-3)
    drawn = training.spied(monkeypatch, sampling, "generate")  # of each chunk
    scored = training.spied(monkeypatch, dpo, "pair_logprobs")
    policy, start, state = base(), base(), {}
    steps = run(policy, config, reference=new_gpt(3), state=state)
    for update in range(6):
        if update == 3:
            start = copy.deepcopy(policy)
        before, count = copy.deepcopy(policy), len(drawn)
        metrics = next(steps)
        assert len(drawn) - count == (2 if update in (0, 3) else 0)  # 4 problems by 3
        turn, trained = update % 3, trained_on(scored)
        table = [
            [nats(m, prompt, answer, temperature).item() for m in (before, start)]
            for prompt, *both in trained[-1] + trained[-2]
            for answer in both
        ]
        own, fixed = torch.tensor(table).view(-1, 2, 2).unbind(2)  # (5, 2) each
        shift = own - fixed
        h = shift[:, 0] - shift[:, 1]
        recent = [rollout for _, rollout in drawn[-2:]]
        answers = [ids for rollout in recent for ids in rollout.responses()]
        right = [TOKENIZER.decode_response(ids) == "y" for ids in answers]
        groups = [right[i : i + 6] for i in range(0, 24, 6)]
        cut = [flag for rollout in recent for flag in rollout.truncated.tolist()]
        chosen, rejected = ([len(p[i]) for p in state["pairs"]] for i in (1, 2))
        expected = {
            "update": update + 1,
            "round": 1 + update // 3,
            "completions": 24 * (1 + update // 3),
            "reward": sum(right) / 24,
            "truncated": sum(cut) / 24,
            "length": sum(map(len, answers)) / 24,
            "unpaired": sum(len(set(group)) == 1 for group in groups) / 4,
            "pairs": sum(min(sum(g), 6 - sum(g), 4) for g in groups),
            "chosen_length": sum(chosen) / len(chosen),
            "rejected_length": sum(rejected) / len(rejected),
            "loss": sum(math.log1p(math.exp(-0.3 * x)) for x in h.tolist()) / 5,
            "margin": 0.3 * h.mean().item(),
            "chosen_logprob": own[:, 0].mean().item(),
            "rejected_logprob": own[:, 1].mean().item(),
            "chosen_shift": shift[:, 0].mean().item(),
            "rejected_shift": shift[:, 1].mean().item(),
        }
        if turn:  # at the reference, h is rounding noise
            expected["preferred"] = (h > 0).float().mean().item()
        measured = {name: metrics[name] for name in expected}
        assert measured == pytest.approx(expected, rel=1e-4, abs=2e-5)
        assert all(type(value) in (int, float) for value in metrics.values())
        styles = [x for name, x in metrics.items() if name.startswith("style_")]
        assert sum(styles) == pytest.approx(1)
        others = {"preferred", "grad_norm", "kl"}
        named = {name for name in metrics if not name.startswith("style_")}
        assert named == expected.keys() | others
        assert (metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)) == (turn == 0)


def test_the_reported_kl_is_that_of_the_draw(monkeypatch):
    """Of the first answer to each problem, all chunks together: nats at each choice,
    exact over the vocabulary, by code of its own."""
    drawn = training.spied(monkeypatch, sampling, "generate")  # of each chunk
    policy, reference = base(), new_gpt(3)
    twin = copy.deepcopy(policy)
    metrics = next(run(policy, replace(CONFIG, temperature=0.8), reference=reference))
    found = []
    for _, rollout in drawn:
        found += training.row_kl(twin, reference, rollout, 0.8)[::6]
    assert len(found) == 4
    assert metrics["kl"] == pytest.approx(sum(found) / 4, abs=1e-4)
    assert "kl" not in next(run(base()))


def test_a_fixed_reference_stays_fixed():
    """`reset_reference` False: only a policy that has not moved starts from log 2."""
    config, reference = replace(CONFIG, reset_reference=False), base()
    metrics = list(run(base(), config, reference=reference))
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(metrics[3]["margin"]) > 0.01
    training.assert_same_bits(dict(reference.state_dict()), dict(base_weights()))
    assert all(p.grad is None for p in reference.parameters())
    reset = list(run(base(), replace(config, reset_reference=True)))
    assert abs(reset[3]["margin"]) < 1e-5


def test_a_small_beta_is_a_long_leash():
    """T43: trained for long on the same pairs, the smaller beta goes further."""
    pairs = [pair(p.question, "y", "no") for p in PROBLEMS]
    shifts = []
    for beta in (0.3, 3.0):
        config = replace(CONFIG, rounds=1, updates=20, beta=beta)
        metrics = list(run(base(), config, given=pairs))
        shifts.append(metrics[-1]["chosen_shift"] - metrics[-1]["rejected_shift"])
    assert shifts[0] > shifts[1] + 0.5 > 0.5


def test_every_pair_comes_once_before_any_comes_again(monkeypatch):
    pairs = [pair(p.question, "y", "no") for p in PROBLEMS]
    scored = training.spied(monkeypatch, dpo, "pair_logprobs")
    list(run(base(), replace(CONFIG, updates=4, batch=3), given=pairs))
    trained = trained_on(scored)
    assert [len(batch) for batch in trained] == [3] * 8
    order = [pairs.index(each) for batch in trained for each in batch]
    first, second = order[:12], order[12:]  # the rounds
    for half in (first, second):
        assert sorted(half[:5]) == sorted(half[5:10]) == list(range(5))
        assert half[:5] != half[5:10]
    assert first != second


@pytest.mark.parametrize("paid", [0.0, 1.0])
def test_a_round_without_a_pair_changes_nothing_and_says_so(paid):
    policy = base()

    def reward(problems, texts):
        return [paid] * len(texts)

    metrics = list(run(policy, replace(CONFIG, max_new_tokens=5), reward))
    assert len(metrics) == 6
    for row in metrics:
        assert row["pairs"] == row["loss"] == row["grad_norm"] == row["margin"] == 0
        assert row["unpaired"] == 1
    training.assert_same_bits(dict(policy.state_dict()), dict(base_weights()))


def test_an_answer_that_does_not_end_is_wrong():
    assert training.check_truncation(run)["pairs"] > 0
