"""PPO: whom its expected gradient believes, and training."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from minialign.algorithms import ppo, reinforce
from minialign.algorithms.ppo import (
    Critic,
    adapt_beta,
    gae,
    policy_loss,
    score_tokens,
)
from tests import enumeration as world
from tests.methods import CRITICS, METHODS, NoCritic, opinionated
from tests.properties import training
from tests.properties.common import close
from tests.properties.policy_gradients import (
    GUESSES,
    LOGITS,
    REF_LOGPROBS,
    REFERENCE,
    REWARDS,
    ascent,
    ascent_by_critic,
    explicit,
)
from tests.toy import (
    TOKENIZER,
    base,
    base_weights,
    judged,
    stretched,
)

# Part 1: the expected gradient, over 15 responses (tests/enumeration.py). The parts of
# the method are single functions: tests/entries.py says all that they owe.


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95])
def test_a_smaller_lambda_believes_the_critic(lam):
    """Of a critic that is wrong, with λ < 1, bias."""
    expected = world.true_gradient(LOGITS, REWARDS)
    actual = ascent_by_critic(gae, GUESSES, lam)
    assert (actual - expected).abs().max() > 0.003


def test_a_token_that_pays_only_for_itself_is_biased():
    """ReMax's code: what a token does to the KL of later ones is missing."""
    expected = world.true_gradient(LOGITS, REWARDS, REFERENCE, 2.0)

    def loss(rows, logprobs, mask):
        k1 = (logprobs - REF_LOGPROBS[rows]).detach()
        A = torch.where(mask, REWARDS[rows][:, None] - 2.0 * k1, 0.0)
        return policy_loss(logprobs, logprobs.detach(), A, mask, 0.2, 0.3)

    assert (ascent(loss) - expected).abs().max() > 0.05


# Training, in a world where the answers are "y" and "no"

METHOD = METHODS["ppo"]
CONFIG = METHOD.config
run = METHOD.run


def test_a_critic_holds_no_weight_of_the_policy():
    """One of its own begins as a copy; a shared one keeps its head alone."""
    policy = base()
    own = {weight.data_ptr() for weight in Critic(policy).parameters()}
    assert own.isdisjoint(weight.data_ptr() for weight in policy.parameters())
    assert [*Critic(policy, shared=True).state_dict()] == ["head.weight", "head.bias"]


def test_the_critic_comes_to_know_which_token_decides():
    """After "n" nothing can be earned any more, and after "y" nearly all."""
    policy = base()
    critic = Critic(policy)
    config = replace(CONFIG, updates=8, prompts=5, lr=0.0, critic_lr=2e-2)
    config = replace(config, value_clip=None, micro_batch=30)
    metrics = list(run(policy, config, critic=critic))
    assert metrics[0]["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert metrics[-1]["explained_variance"] > 0.3
    values = {}
    for text in ("y", "no"):
        said = [*TOKENIZER.encode_prompt("a"), *TOKENIZER.encode(text)]
        ids = torch.tensor([[*said, TOKENIZER.eos_id]])
        mask = torch.ones(1, ids.shape[1] - 1, dtype=torch.bool)
        values[text] = score_tokens(policy, critic, ids, mask, 1.0)[1][0]
    start = len(TOKENIZER.encode_prompt("a")) - 1
    close(values["y"][start], values["no"][start].item(), atol=1e-5)
    assert values["y"][start + 1] > values["y"][start] > values["no"][start + 1]


def row_scores(policy, critic, rollout, temperature):
    """[(logprobs, values, entropies)] of each answer: alone, without padding."""
    scores = []
    for row, response in enumerate(rollout.responses()):
        start = rollout.prompt_lengths[row].item()
        ids = rollout.tokens[row, : start + len(response)]
        hidden = policy(ids[None, :-1])
        every = policy.logits(hidden)[0, start - 1 :].div(temperature).log_softmax(-1)
        values = critic.head(critic.trunk(ids[None, :-1]))[0, start - 1 :]
        logprobs = -F.nll_loss(every, ids[start:], reduction="none")
        scores.append((logprobs, values, -(every.exp() * every).sum(-1)))
    return scores


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_update_by_hand(monkeypatch, temperature):
    """Every metric from the rollout, answer by answer, against code of its own."""
    rollouts = training.spied_draws(monkeypatch)
    config = replace(CONFIG, beta=0.5, temperature=temperature, epochs=1, lam=0.8)
    policy, reference = stretched(), base()
    critic = opinionated(policy)
    twins = copy.deepcopy((policy, critic))
    metrics = next(run(policy, config, reference=reference, critic=critic))

    ((_, rollout),) = rollouts
    scores = row_scores(*twins, rollout, temperature)
    k1s, advantages, earned, values = [], [], [], []
    others = row_scores(reference, twins[1], rollout, temperature)
    for reward, (nats, guess, _), (ref, _, _) in zip(
        judged(rollout).tolist(), scores, others, strict=True
    ):
        k1 = (nats - ref).tolist()
        paid = [-0.5 * x for x in k1]
        paid[-1] += reward
        k1s.append(sum(k1))
        advantages += explicit(paid, guess.tolist(), 1.0, 0.8)
        earned += [sum(paid[t:]) for t in range(len(paid))]
        values += guess.tolist()
    A, R, V = map(torch.tensor, (advantages, earned, values))
    white = (A - A.mean()) / A.std(correction=0)
    nats = torch.cat([x[0] for x in scores])
    expected = {
        "completions": 12,
        "loss": 0.0,  # whitened, at ratio 1
        "value_loss": 0.5 * A.square().mean().item(),  # V - R is -A, before whitening
        "explained_variance": 1 - ((R - V).var() / R.var()).item(),
        "grad_norm": training.gradient_norm(-(white * nats).sum() / 12, twins[0]),
        "kl": sum(k1s) / 12,
        "ratio_first": 0.0,
        "approx_kl": 0.0,
        "clip_fraction": 0.0,
        "epochs_done": 1.0,
        "stopped_early": 0.0,
        "beta": 0.5,
    }
    training.assert_metrics(metrics, rollout, expected, rel=2e-4, floor=2e-5)


@pytest.mark.parametrize("layout", CRITICS)
def test_the_first_ratio_is_exactly_1(layout):
    """Bit by bit, whatever the minibatches; and then no more."""
    config = replace(CONFIG, updates=2, minibatches=3, micro_batch=3, temperature=0.8)
    metrics = list(run(base(), config, critic=CRITICS[layout]))
    assert [row["ratio_first"] for row in metrics] == [0.0] * 2
    assert all(row["approx_kl"] > 0 for row in metrics)


def test_without_steps_the_ratio_stays_1():
    """Lr 0, all epochs."""
    policy = base()
    critic = Critic(policy)
    config = replace(CONFIG, lr=0.0, epochs=3, updates=2)
    metrics = list(run(policy, config, critic=critic))
    for row in metrics:
        assert row["approx_kl"] == row["clip_fraction"] == 0.0
        assert row["epochs_done"] == 3
    training.assert_same_bits(dict(policy.state_dict()), dict(base_weights()))
    assert (critic.head.weight != 0).any()  # the critic has a rate of its own


def test_it_stops_an_update_that_has_moved_too_far():
    """The weights are those of a run that planned one epoch; the step is not taken."""
    ends = []
    for epochs, stop in ((1, None), (3, 1e-9), (3, 1e9), (3, None)):
        state = {}
        config = replace(CONFIG, epochs=epochs, kl_stop=stop, updates=2)
        metrics = list(run(base(), config, state=state))
        ends.append((training.weights_of(state), metrics[-1]))
    (one, _), (stopped, last), (on, _), (never, untouched) = ends
    assert torch.equal(one, stopped) and torch.equal(on, never)
    assert not torch.equal(one, never)
    assert last["stopped_early"] == 1 and last["epochs_done"] == 1
    assert last["approx_kl"] > 1e-9
    assert untouched["stopped_early"] == 0 and untouched["epochs_done"] == 3


def test_after_it_has_stopped_it_looks_at_no_answer_again(monkeypatch):
    """Three steps are planned; the second looks, and is not taken."""
    looks = training.spied(monkeypatch, ppo, "policy_loss")
    config = replace(CONFIG, epochs=3, kl_stop=1e-9, updates=1, micro_batch=99)
    list(run(base(), config))
    assert len(looks) == 2


def test_what_was_earned_is_discounted():
    """The critic is judged by what it should have guessed."""
    explained = []
    for gamma in (1.0, 0.5):
        config = replace(CONFIG, gamma=gamma, updates=1)
        explained.append(next(run(base(), config, critic=opinionated)))
    assert explained[0]["explained_variance"] != explained[1]["explained_variance"]


def test_each_epoch_uses_each_answer_once(monkeypatch):
    """In another order each time; divided by the minibatch, not its parts."""
    drawn = training.spied_draws(monkeypatch)
    calls = training.spied(monkeypatch, ppo, "policy_loss")
    config = replace(
        CONFIG, epochs=2, minibatches=2, micro_batch=4, prompts=5, updates=1
    )
    metrics = next(run(base(), config))
    assert metrics["epochs_done"] == 2
    sizes = [(len(args[0]), args[-1]) for args, _ in calls]
    assert [n for n, _ in sizes] == [4, 4, 4, 3] * 4
    assert {count for _, count in sizes} == {15}
    ((_, rollout),) = drawn
    lengths = rollout.lengths().tolist()
    epochs = [calls[:8], calls[8:]]
    for epoch in epochs:
        seen = [n for args, _ in epoch for n in args[3].sum(1).tolist()]
        assert sorted(seen) == sorted(lengths)
    halves = [
        torch.cat([F.pad(args[1], (0, 20))[:, :20] for args, _ in half]).sum()
        for half in (calls[:4], calls[8:12])
    ]
    assert halves[0] != halves[1]


def test_one_step_without_a_critic_is_reinforce():
    """For the whole run: the same weights, bit by bit, after every update."""
    bare = {"epochs": 1, "lam": 1.0, "gamma": 1.0, "beta": 0.0}
    ours, theirs = base(), base()
    config = replace(CONFIG, **bare)
    fields = {"updates", "prompts", "samples", "max_new_tokens", "lr", "warmup"}
    fields |= {"max_grad_norm", "micro_batch"}
    shared = {name: getattr(config, name) for name in fields}
    twin = METHODS["reinforce"].run(theirs, reinforce.ReinforceConfig(**shared))
    steps = run(ours, config, critic=NoCritic(), scale=lambda x, mask: x)
    for row, expected in zip(steps, twin, strict=True):
        training.assert_same_bits(dict(ours.state_dict()), dict(theirs.state_dict()))
        for name in ("reward", "length", "truncated", "grad_norm"):
            assert row[name] == expected[name]


@pytest.mark.parametrize("layout", CRITICS)
def test_half_precision_is_trained(layout):
    policy = base().bfloat16()
    critic = CRITICS[layout](policy)
    metrics = list(run(policy, replace(CONFIG, updates=2), critic=critic))
    assert metrics[0]["ratio_first"] == 0 and metrics[-1]["grad_norm"] > 0


def test_an_update_may_stop_before_its_first_step(monkeypatch):
    """As where the policy drops out units, and scores an answer differently twice."""
    score, calls = ppo.score_tokens, []

    def unsteady(*args):
        calls.append(args)
        logprobs, *others = score(*args)
        return logprobs * (1 + 0.1 * len(calls)), *others

    monkeypatch.setattr(ppo, "score_tokens", unsteady)
    policy, config = base(), replace(CONFIG, updates=1, kl_stop=1e-9)
    (metrics,) = run(policy, config)
    assert metrics["epochs_done"] == metrics["grad_norm"] == 0
    training.assert_same_bits(dict(policy.state_dict()), dict(base_weights()))


def test_the_critics_target_is_not_whitened(monkeypatch):
    """Contract 6: R = A + V first; the scaling sees the whole batch, not its parts."""
    advantages = training.spied(monkeypatch, ppo, "gae")
    white = training.spied(monkeypatch, ppo, "whiten")
    losses = training.spied(monkeypatch, ppo, "value_loss")
    config = replace(CONFIG, epochs=1, micro_batch=99, updates=1)
    more = {"critic": opinionated, "scale": lambda *args: ppo.whiten(*args)}
    next(run(base(), config, **more))
    (r, V, mask, *_), A = advantages[0]
    assert [args[0].shape for args, _ in white] == [A.shape]
    ((_, _, R, live, *_), _) = losses[0]
    order = sorted((A + V)[mask].tolist())
    assert sorted(R[live].tolist()) == pytest.approx(order)
    assert r.sum() != 0 and abs(R[live].mean()) > 0.05


def test_the_loss_of_a_separate_critic_does_not_reach_the_policy():
    """Nor does its gradient's length: the two are clipped apart."""
    for shared, same in ((False, True), (True, False)):
        ends = []
        for weight in (0.1, 3.0):
            state, critic = {}, partial(opinionated, shared=shared)
            config = replace(CONFIG, value_coef=weight, updates=1)
            list(run(base(), config, critic=critic, state=state))
            ends.append(training.weights_of(state))
        assert torch.equal(*ends) == same


def test_the_price_of_kl_adapts_and_is_remembered(monkeypatch):
    """By the KL that is reported; `beta` is the price from here on."""
    state = {}
    paid = training.spied(monkeypatch, ppo, "shape_token_rewards")
    adapt = partial(adapt_beta, target=0.05, horizon=50, completions=12)
    config = replace(CONFIG, beta=0.2, updates=4)
    steps = run(base(), config, reference=base(), next_beta=adapt, state=state)
    beta = 0.2
    for row in steps:
        assert paid[-1][0][-1] == beta
        beta = adapt(beta, row["kl"])
        assert row["beta"] == beta == state["beta"]
    assert beta != 0.2


EXAMPLES = [
    (TOKENIZER.encode_prompt(question), TOKENIZER.encode_response(text))
    for question, text in (("a", "nn"), ("bc", "yn"), ("d", "n"))
]


def test_a_mix_that_weighs_nothing_changes_no_bit():
    """PTX-1: the same answers, the same order, the same weights."""
    ends = []
    for mix in (None, ppo.PretrainingMix(EXAMPLES, weight=0.0, batch=2)):
        state = {}
        list(run(base(), replace(CONFIG, minibatches=2), mix=mix, state=state))
        ends.append(state)
    assert ends[0].pop("mixed") == 0 and ends[1].pop("mixed") > 0
    training.assert_same_bits(*ends)


def test_mix_and_rewards_do_not_know_of_each_other(monkeypatch):
    """PTX-2: the first step's gradient is the sum of both, each with its own count,
    whatever the micro-batches."""
    found = []

    def keep(learner):
        weights = learner.models["policy"].parameters()
        found.append(torch.cat([weight.grad.flatten() for weight in weights]))
        raise InterruptedError

    monkeypatch.setattr(ppo.Learner, "step", keep)
    mixes = [None]
    for weight in (1.0, 3.0):
        mixes.append(ppo.PretrainingMix(EXAMPLES, weight=weight, batch=3))
    for mix in mixes:
        for micro_batch in (2, 99):
            config = replace(CONFIG, micro_batch=micro_batch)
            with pytest.raises(InterruptedError):
                list(run(base(), config, mix=mix))
    plain, _, once, again, thrice, _ = found
    close(again, once, atol=1e-5)
    close(thrice - plain, 3 * (once - plain), atol=1e-5)
    policy = base()
    wished = torch.zeros(())
    for prompt, answer in EXAMPLES:
        ids = torch.tensor([[*prompt, *answer]])
        every = policy.logits(policy(ids[:, :-1]))[0, -len(answer) :].log_softmax(-1)
        wished = wished - F.nll_loss(every, ids[0, -len(answer) :], reduction="sum")
    (-wished / 3).backward()
    by_hand = torch.cat([weight.grad.flatten() for weight in policy.parameters()])
    close(once - plain, by_hand, atol=1e-5)


def test_examples_come_in_turn_and_from_the_start_again():
    mix = ppo.PretrainingMix(EXAMPLES, batch=2)
    assert mix.take(0) == EXAMPLES[:2]
    assert mix.take(2) == [EXAMPLES[2], EXAMPLES[0]]
    assert mix.take(7) == EXAMPLES[1:]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"examples": []}, "examples: got none"),
        ({"weight": -0.1}, "weight: got -0.1"),
        ({"weight": float("nan")}, "weight: got nan"),
        ({"weight": float("inf")}, "weight: got inf"),
        ({"batch": 0}, "batch: got 0"),
    ],
)
def test_a_mix_refuses(wrong, named):
    with pytest.raises(ValueError, match=named):
        ppo.PretrainingMix(**{"examples": EXAMPLES, **wrong})


def test_the_last_step_is_reported(monkeypatch):
    """approx_kl: mean k3 of π_old from π; clip_fraction: the share without a slope."""
    losses = training.spied(monkeypatch, ppo, "policy_loss")
    band = {"eps_low": 0.001, "eps_high": 0.001}
    config = replace(CONFIG, **band, epochs=3, minibatches=3, updates=1, lr=1e-3)
    config = replace(config, micro_batch=99)

    def in_turns(A, mask):
        """Equal answers are wished up and down: some go against what is wished."""
        signs = 1.0 - 2.0 * (torch.arange(len(A)) % 2)
        return torch.where(mask, signs[:, None], 0.0)

    (metrics,) = run(base(), config, scale=in_turns)
    (logprobs, old, A, mask, *rest), _ = losses[-1]
    leaf = logprobs.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(policy_loss(leaf, old, A, mask, *rest), leaf)
    still = ((slope == 0) & (A != 0))[mask].double().mean().item()
    d = (leaf.detach() - old)[mask]
    assert metrics["clip_fraction"] == pytest.approx(still) and still > 0
    assert metrics["approx_kl"] == pytest.approx(
        (d.expm1() - d).mean().item(), rel=1e-3
    )


def test_it_may_stop_within_an_epoch():
    """At the second of two minibatches, the last step of all."""
    config = replace(CONFIG, epochs=1, minibatches=2, kl_stop=1e-9, updates=1)
    (metrics,) = run(base(), config)
    assert metrics["epochs_done"] == 0.5 and metrics["stopped_early"] == 1
