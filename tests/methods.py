"""Every `train`, said once: one entry says what its checks need to know of it.

The checks are in tests/properties/training.py, and tests/test_training.py makes each of
them of every entry; all runs are in the world of tests/toy.py. A run is described by
*changes*, dicts by name: a setting changes the config, and anything else is an argument
of `train`. A new algorithm adds its entry to METHODS.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType

import torch
from torch import nn

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
from minialign.rewards import RewardModel
from tests.properties.training import GAPS, Metrics, reward_rises
from tests.toy import PROBLEMS, TOKENIZER, base, generator, never, new_gpt, yes

SEED = 7  # of the models that a resumed run finds, and of its generator
AS_IT_IS = {"as it is": {}}


@dataclass(frozen=True, eq=False)
class Method:
    """One `train`, where it lies, and what is particular about it."""

    module: ModuleType
    config: object  # of a small run
    long: dict  # changes: a run that learns to say "y"
    everything: dict  # changes: all there is, and draws that are draws to the end

    # Forms of the method: changes by name. Each form learns, and no two are the same.
    variants: dict[str, dict] = field(default_factory=AS_IT_IS.copy)
    # A loss of the module: changes with which it alone decides which way things go.
    flips: dict[str, dict] = field(default_factory=dict)
    # Changes by name with which nothing is to be learnt.
    misleading: dict[str, dict] = field(default_factory=dict)
    # Situations by name in which there is no gradient but for rounding: changes.
    idle: dict[str, dict] = field(default_factory=dict)
    # Changes with which the rewards of other answers teach nothing.
    shuffled: dict = field(default_factory=dict)
    # Changes with which a price on the KL holds back; None: a reference only watches.
    price: dict | None = None
    # What a setting is changed to, where `another` value would do nothing.
    changed: dict = field(default_factory=dict)

    # Changes of how a draw's answers are dealt to the steps, and of nothing else.
    dealt: dict = field(default_factory=dict)

    # What the state holds, and something else in the place of each entry.
    gaps: dict[str, Callable] = field(default_factory=GAPS.copy)
    # The models whose weights it holds; the first is the policy.
    models: tuple[str, ...] = ("policy",)
    # Changes by name with which it holds something else.
    states: dict[str, dict] = field(default_factory=AS_IT_IS.copy)
    # The updates after which a run is stopped and resumed.
    stops: tuple[int, ...] = (1, 2)

    draws: bool = True  # answers, which a reward judges; a reference may watch
    greedy: bool = False  # one greedy answer to each problem is judged besides
    scores: str = "token_logprobs"  # the function of the module that scores answers
    answers_per_item: int = 1  # of what `micro_batch` counts
    rates: tuple[str, ...] = ("lr",)  # the setting of each group of parameters
    still: dict = field(default_factory=lambda: {"lr": 0.0})  # so that no weight moves
    sure: float = 0.95  # the least chance of "y" after a long run
    shows: Callable[[list[Metrics]], bool] = reward_rises  # learning, in the metrics
    rounding: dict = field(default_factory=dict)  # of metrics, if more than the usual
    needed: dict = field(default_factory=dict)  # arguments that every run has
    train: Callable | None = None  # called as the others are; None: module.train
    # What a policy becomes before it is trained; None: itself.
    begins_as: Callable[[nn.Module], nn.Module] | None = None

    @property
    def in_rounds(self) -> bool:
        """Whether a draw serves several updates."""
        return hasattr(self.config, "rounds")

    def run(
        self, policy, config=None, reward=yes, *, problems=PROBLEMS, **changes
    ) -> Iterator[Metrics]:
        """Call `train`; all but the policy, or what it begins as, has a default.

        A `critic` is one, or what makes one from the policy.
        """
        config = config or self.config
        settings = {name: x for name, x in changes.items() if name in vars(config)}
        config = replace(config, **settings)
        arguments = {name: x for name, x in changes.items() if name not in settings}
        arguments = {"generator": generator(), **self.needed, **arguments}
        if "critic" in arguments and not isinstance(arguments["critic"], nn.Module):
            arguments["critic"] = arguments["critic"](policy)
        if callable(arguments.get("given")):
            arguments["given"] = arguments["given"](policy)
        train = self.train or self.module.train
        return train(policy, TOKENIZER, problems, reward, config, **arguments)


def start(
    method: Method,
    state: dict,
    device: str | torch.device = "cpu",
    draws: str | torch.device | None = None,
    **changes,
) -> tuple[dict[str, nn.Module], Iterator[Metrics]]:
    """A run with everything switched on, on this device: (models by name, metrics).

    All models are new, and the generator too, which lies where it `draws`; None: on the
    device. A state that brings the weights finds models with *other* weights, so that
    what it does not bring is missed. A reference of None is none.
    """
    policy = new_gpt(SEED) if state else base()
    if method.begins_as is not None:
        policy = method.begins_as(policy)
    models = {method.models[0]: policy.to(device)}
    changes = {**method.everything, **changes}
    if "critic" in method.models:
        models["critic"] = changes["critic"](policy)
        changes["critic"] = models["critic"]
    reference = changes.get("reference", base() if method.draws else None)
    if reference is not None:
        models["reference"] = reference.to(device)
        changes["reference"] = models["reference"]
    draw = generator(SEED if state else 0, draws or device)
    return models, method.run(policy, generator=draw, state=state, **changes)


def another(value: float) -> float:
    """What a setting is changed to, to see that it does something."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if value == 0:
        return 0.5
    return value / 2


# Of SFT, which draws no answers and is called in another way

DEMONSTRATIONS = [
    (TOKENIZER.encode_prompt(question), TOKENIZER.encode_response(answer))
    for question, answer in [
        *((problem.question, "y") for problem in PROBLEMS),
        ("ab", "no"),
        ("abcd", "nono"),
        ("edc", "n"),
    ]
]


def imitate(policy, tokenizer, problems, reward, config, *, generator, state=None):
    """SFT, called as the others are. Nobody judges, and nothing is drawn."""
    examples = DEMONSTRATIONS if problems else []
    return sft.train(policy, examples, config, pad_id=tokenizer.pad_id, state=state)


OPTIMISERS = {"Muon": {}, "AdamW": {"muon": False}}

# What PPO may be told to imitate beside

MIXED = [
    (TOKENIZER.encode_prompt(problem.question), TOKENIZER.encode_response(text))
    for problem, text in zip(PROBLEMS[:3], ("no", "yn", "y"), strict=True)
]

# Of reward models, which are no policies and learn from rankings

RANKINGS = [
    reward_model.Ranking(
        TOKENIZER.encode_prompt(problem.question),
        [TOKENIZER.encode_response(text) for text in texts],
    )
    for problem, texts in zip(
        PROBLEMS,
        [("y", "no", "yn"), ("y", "no"), ("y", "no"), ("y", "no", "yn"), ("y", "no")],
        strict=True,
    )
]


def rate(policy, tokenizer, problems, reward, config, **more):
    """A reward model's training, called as the others are: "y" is better than "no"."""
    model = policy if isinstance(policy, RewardModel) else RewardModel(policy)
    rankings = RANKINGS if problems else []
    return reward_model.train(model, tokenizer, rankings, config, **more)


def doubtful(chosen, rejected, **more):
    """The loss of a pair of which one cannot be sure."""
    unsure = torch.full_like(chosen, 0.9)
    return reward_model.pairwise_loss(chosen, rejected, **more | {"label": unsure})


def better_answers_lead(metrics: list[Metrics]) -> bool:
    return metrics[-1]["preferred"] > 0.95 and metrics[-1]["gap"] > 1


def loss_falls(metrics: list[Metrics]) -> bool:
    return metrics[-1]["loss"] < metrics[0]["loss"] / 10


def twins(policy) -> list[dpo.Pair]:
    """Pairs whose two answers are the same."""
    answer = TOKENIZER.encode_response("y")
    asked = [TOKENIZER.encode_prompt(problem.question) for problem in PROBLEMS]
    return [(prompt, answer, answer) for prompt in asked]


# Of PPO, which has a critic


class NoCritic(nn.Module):
    """V = 0, and nothing to learn."""

    def forward(self, inputs, hidden):
        return torch.zeros_like(hidden[..., 0])


def no_critic(policy) -> NoCritic:
    return NoCritic()


def as_it_stands(advantages, mask):
    return advantages


def opinionated(policy, shared: bool = False, seed: int = 5) -> ppo.Critic:
    """A critic that has an opinion: the head starts at 0 only in real runs."""
    critic = ppo.Critic(policy, shared)
    weight = critic.head.weight
    noise = torch.randn(weight.shape, generator=generator(seed)).to(weight)
    with torch.no_grad():
        critic.head.weight += 0.05 * noise
        critic.head.bias += 0.3
    return critic


CRITICS = {
    "a critic apart": ppo.Critic,
    "a shared trunk": partial(ppo.Critic, shared=True),
    "no critic": no_critic,
}

# Of the others


def a_tenth(problems, texts):
    """Everyone earns the same, a number that float32 does not hold exactly."""
    return [0.1] * len(texts)


def against_the_mean(rewards, greedy_rewards):
    """If only "y" earns and greedy says "no", all answers would be pulled up."""
    return rewards - rewards.mean()


def pairs_told_apart(metrics: list[Metrics]) -> bool:
    """At the end of the first round, before the reference moves."""
    return metrics[3]["preferred"] > 0.8 and metrics[3]["margin"] > 0.05


# The guard stays out of the way, where it is not what is tested.
SMALL = {"max_new_tokens": 3, "lr": 1e-2, "warmup": 3, "micro_batch": 8}
SMALL |= {"max_grad_norm": 100.0}
AMPLE = {"updates": 10, "prompts": 10, "lr": 5e-3, "micro_batch": 60}
RANKING = {"sft_weight": 0.0, "margin": 2.0}

METHODS = {
    "sft": Method(
        sft,
        sft.SFTConfig(updates=8, batch_size=3, window=2, warmup=2, lr=1e-2),
        long={"updates": 20, "batch_size": 8, "lr": 2e-2},
        everything={},
        flips={"sft_loss": {}},
        variants=OPTIMISERS,
        gaps={
            "model": lambda saved: new_gpt(9).state_dict(),
            "optimizers": lambda saved: [{**one, "state": {}} for one in saved],
            "update": lambda saved: 0,
        },
        models=("model",),
        rates=("lr", "lr", "lr"),  # AdamW has two, and Muon has one
        states=OPTIMISERS,
        stops=(1, 2, 3, 7),  # within an epoch of 3 updates, at its border, across one
        draws=False,
        shows=loss_falls,
        train=imitate,
    ),
    "rejection_sampling": Method(
        rejection_sampling,
        rejection_sampling.RejectionSamplingConfig(
            **SMALL,
            rounds=2,
            prompts=3,
            samples=6,
            updates=3,
            batch_tokens=10,
            chunk=2,
        ),
        long={"prompts": 5, "updates": 8, "batch_tokens": 30, "micro_batch": 30},
        everything={
            "max_new_tokens": 2,
            "updates": 2,
            "lr": 2e-3,
            "batch_tokens": 8,
            "select": rejection_sampling.select_random,
            "keep": rejection_sampling.keep_all,
        },
        flips={"likelihood_loss": {}},
        variants={
            "all right answers": {
                "select": rejection_sampling.select_right,
                "keep": rejection_sampling.keep_latest,
            },
            "those of all rounds": {
                "select": rejection_sampling.select_right,
                "keep": rejection_sampling.keep_all,
            },
            "one for each problem": {"select": rejection_sampling.select_best},
            "the best of all": {"select": rejection_sampling.select_top},
        },
        # At equal tokens: imitating oneself teaches nothing.
        misleading={"by lot": {"select": rejection_sampling.select_random}},
        changed={"batch_tokens": 20, "threshold": 1.0},
        dealt={"batch_tokens": 50, "updates": 5},
        idle={"nothing is kept": {"reward": never}},
        # It may learn at another temperature: here at that of the draw.
        still={"lr": 0.0, "learning_temperature": 0.6},
        gaps={
            **GAPS,
            "pool": lambda saved: saved[::-1],
            "order": lambda saved: [],
            "drawn": lambda saved: {},
        },
        stops=(1, 2, 3),
    ),
    "reinforce": Method(
        reinforce,
        reinforce.ReinforceConfig(**SMALL, updates=5, prompts=2, samples=6),
        long={"updates": 15, "prompts": 5, "micro_batch": 30},
        everything={
            "max_new_tokens": 2,
            "updates": 3,
            "beta": 0.1,
            "lr": 2e-3,
            "baseline": reinforce.moving_average,
        },
        flips={"reinforce_loss": {}},
        variants={
            "no baseline": {"baseline": reinforce.no_baseline},
            "moving average": {"baseline": reinforce.moving_average},
            "batch mean": {"baseline": reinforce.batch_mean},
        },
        # Without a baseline, whatever is likely by chance would be pulled up.
        shuffled={"baseline": reinforce.batch_mean},
        price={"beta": 1.0, **AMPLE},
        idle={
            "nobody earned": {"reward": never},
            "all earned the same": {
                "reward": a_tenth,
                "baseline": reinforce.batch_mean,
            },
            "only the KL to itself": {"reward": never, "beta": 1.0, "reference": base},
        },
        gaps=GAPS | {"memory": lambda saved: 0.0},
    ),
    "remax": Method(
        remax,
        remax.RemaxConfig(**SMALL, updates=5, prompts=6, samples=2),
        long={"updates": 15, "prompts": 15, "micro_batch": 30},
        everything={"max_new_tokens": 2, "updates": 3, "beta": 0.1, "lr": 2e-3},
        flips={"remax_loss": {}},
        variants={
            "whole answer": {"weigh": remax.whole_answer},
            "the authors' code": {"weigh": remax.code_weights},
        },
        shuffled={"compare": against_the_mean},
        price={"beta": 1.0, **AMPLE, "updates": 15, "prompts": 15},
        idle={
            "all earned what greedy answers did": {"reward": a_tenth},
            "only the KL to itself": {"reward": never, "beta": 1.0, "reference": base},
        },
        greedy=True,
    ),
    "rloo": Method(
        rloo,
        rloo.RlooConfig(**SMALL, updates=5, prompts=2, samples=6),
        long={"updates": 15, "prompts": 5, "micro_batch": 30},
        everything={"max_new_tokens": 2, "updates": 3, "beta": 0.1, "lr": 2e-3},
        flips={"rloo_loss": {}},
        variants={"groups of 6": {}, "pairs": {"samples": 2, "prompts": 15}},
        misleading={"no comparison": {"compare": torch.zeros_like}},
        price={"beta": 1.0, **AMPLE},
        idle={
            "all earned the same": {"reward": a_tenth},
            "only the KL to itself": {"reward": never, "beta": 1.0, "reference": base},
        },
    ),
    "trpo": Method(
        trpo,
        trpo.TRPOConfig(
            updates=5,
            prompts=2,
            samples=6,
            max_new_tokens=3,
            delta=0.02,
            iterations=3,  # what rounding is worth grows with each
            fisher_answers=4,
            micro_batch=8,
        ),
        long={
            "updates": 15,
            "prompts": 5,
            "delta": 0.1,
            "fisher_answers": 30,
            "micro_batch": 30,
        },
        # Steps so long that the search has to shorten them.
        everything={"max_new_tokens": 2, "updates": 3, "prompts": 6, "delta": 0.3},
        flips={"surrogate_loss": {}},
        idle={"all earned the same": {"reward": a_tenth}},
        changed={"tries": 1, "truncated_reward": 2.0},
        gaps={name: GAPS[name] for name in ("policy", "generator", "update")},
        scores="score_choices",
        rates=(),
        still={"delta": 1e-12},
    ),
    "grpo": Method(
        grpo,
        grpo.GRPOConfig(**SMALL, updates=5, prompts=2, samples=6, epochs=1),
        long={"updates": 15, "prompts": 5, "micro_batch": 30},
        everything={
            "temperature": 2.0,
            "updates": 3,
            "beta": 0.1,
            "lr": 2e-3,
            "epochs": 2,
            "minibatches": 2,
            "micro_batch": 6,
        },
        flips={"grpo_loss": {}},
        variants={
            "paper": {},
            "Dr. GRPO": {
                "advantage": grpo.centred_advantages,
                "reduction": grpo.by_constant,
            },
            "token mean": {"reduction": grpo.per_token},
            "many steps": {"epochs": 3, "minibatches": 2, "lr": 5e-3},
        },
        price={"beta": 3.0, **AMPLE},
        idle={
            "all earned the same": {"reward": a_tenth},
            "the same, centred": {
                "reward": a_tenth,
                "advantage": grpo.centred_advantages,
            },
            "only k3 to itself": {"reward": never, "beta": 1.0, "reference": base},
            "only k2 to itself": {
                "reward": never,
                "beta": 1.0,
                "reference": base,
                "kl_term": grpo.k2_term,
            },
        },
        changed={"eps_low": 0.002, "eps_high": 0.002},
        dealt={"minibatches": 3, "epochs": 3},
        rounding={"floor": 1e-9},
    ),
    "ppo": Method(
        ppo,
        ppo.PPOConfig(
            **SMALL,
            updates=4,
            prompts=2,
            samples=6,
            critic_lr=1e-2,
            kl_stop=None,
            epochs=2,
            minibatches=1,
        ),
        # Whitening blows up the noise once all answers are right: not in a long run.
        long={
            "updates": 12,
            "prompts": 5,
            "lr": 5e-3,
            "scale": as_it_stands,
            "value_clip": 0.5,
            "micro_batch": 30,
        },
        everything={
            "max_new_tokens": 2,
            "updates": 3,
            "beta": 0.1,
            "lr": 2e-3,
            "minibatches": 2,
            "kl_stop": 1.0,
            "entropy_coef": 0.01,
            "critic": partial(opinionated, shared=True),
            "next_beta": partial(
                ppo.adapt_beta, target=0.05, horizon=50, completions=12
            ),
            "mix": ppo.PretrainingMix(MIXED, weight=0.5, batch=2),
        },
        flips={"policy_loss": {"critic": no_critic}},
        variants={
            **{name: {"critic": critic} for name, critic in CRITICS.items()},
            "whitened": {"scale": ppo.whiten, "epochs": 1, "updates": 15},
        },
        shuffled={"critic": no_critic, "scale": ppo.whiten},
        idle={
            "nobody earned": {"reward": never, "critic": ppo.Critic},
            "all earned the same, whitened": {
                "reward": a_tenth,
                "critic": no_critic,
                "lam": 1.0,
            },
            "only the KL to itself": {
                "reward": never,
                "beta": 1.0,
                "reference": base,
                "critic": no_critic,
            },
        },
        price={
            "beta": 1.0,
            "updates": 8,
            "prompts": 5,
            "lr": 3e-3,
            "scale": as_it_stands,
            "critic": no_critic,
        },
        changed={
            "kl_stop": 1e-6,
            "eps_low": 0.001,
            "eps_high": 0.001,
            "value_clip": 0.001,
        },
        dealt={"minibatches": 3, "epochs": 3},
        needed={"critic": CRITICS["a shared trunk"]},
        gaps={
            **GAPS,
            "beta": lambda saved: 0.1,
            "mixed": lambda saved: 0,
            "critic": lambda saved: opinionated(new_gpt(9), True).state_dict(),
        },
        scores="score_tokens",
        models=("policy", "critic"),
        rates=("lr", "critic_lr"),
        still={"lr": 0.0, "critic_lr": 0.0},
        states={
            name: {"critic": CRITICS[name]}
            for name in ("a critic apart", "a shared trunk")
        },
        rounding={"floor": 1e-9},
    ),
    "dpo": Method(
        dpo,
        dpo.DPOConfig(
            rounds=2,
            prompts=4,
            samples=6,
            updates=3,
            batch=7,
            max_new_tokens=3,
            lr=5e-3,
            beta=0.3,
            warmup=2,
            max_grad_norm=100.0,
            micro_batch=4,
            chunk=3,
        ),
        # With a few problems the second round may have a single pair, and steps enough
        # on that one carry both of its answers down.
        long={"updates": 4, "prompts": 20, "batch": 10, "beta": 0.1, "micro_batch": 10},
        everything={"max_new_tokens": 2, "updates": 2, "lr": 1e-3},
        flips={"logsigmoid": {}},
        variants={
            "dpo": {"loss": dpo.dpo_loss},
            "cdpo": {"loss": partial(dpo.dpo_loss, per_pair=dpo.conservative)},
            "robust": {"loss": partial(dpo.dpo_loss, per_pair=dpo.robust)},
            "ipo": {"loss": partial(dpo.dpo_loss, per_pair=dpo.ipo)},
            "ipo on means": {
                "loss": partial(dpo.dpo_loss, per_pair=dpo.ipo),
                "measure": dpo.mean_pair_logprobs,
            },
        },
        changed={"pairs_per_problem": 1, "truncated_reward": 2.0},
        dealt={"batch": 3, "updates": 5, "pairs_per_problem": 1},
        idle={
            "all earned the same": {"reward": a_tenth},
            "pairs of equal answers": {"given": twins},
        },
        gaps={
            **GAPS,
            "pairs": lambda saved: saved[::-1],
            "order": lambda saved: [0, 1],
            "ref_logprobs": lambda saved: torch.full_like(saved, -1.0),
            "drawn": lambda saved: {},
        },
        stops=(1, 2, 3),
        answers_per_item=2,
        sure=0.9,
        shows=pairs_told_apart,
        rounding={"floor": 1e-9},
    ),
    "reward_model": Method(
        reward_model,
        reward_model.RewardModelConfig(
            updates=6,
            batch=3,
            lr=5e-3,
            warmup=2,
            max_grad_norm=100.0,
            micro_batch=2,
        ),
        long={"updates": 20, "batch": 5, "micro_batch": 5},
        everything={},
        flips={"logsigmoid": {}},
        variants={
            "as it is": {},
            "with a margin": {"loss": partial(reward_model.pairwise_loss, margin=1.0)},
            "with labels in doubt": {"loss": doubtful},
        },
        gaps={
            "model": lambda saved: RewardModel(new_gpt(9)).state_dict(),
            "optimizer": GAPS["optimizer"],
            "generator": GAPS["generator"],
            "data_order": GAPS["data_order"],
            "update": GAPS["update"],
            "order": lambda saved: saved[::-1],
        },
        models=("model",),
        stops=(1, 2, 5),  # within a pass over the rankings, and in the next ones
        draws=False,
        sure=0.1,  # the policy stays as it is
        shows=better_answers_lead,
        train=rate,
        begins_as=RewardModel,
    ),
    "rrhf": Method(
        rrhf,
        rrhf.RRHFConfig(
            **SMALL,
            rounds=2,
            prompts=4,
            samples=4,
            updates=3,
            batch=2,
            sft_weight=1.0,
            chunk=3,
        ),
        long={
            "prompts": 5,
            "samples": 6,
            "updates": 7,
            "batch": 5,
            "micro_batch": 30,
        },
        everything={"max_new_tokens": 2, "lr": 2e-3, "margin": 1.0},
        flips={"ranking_loss": RANKING, "sft_loss": {}},
        variants={
            "both": {},
            "ranking alone": RANKING,
            "by sums": {"likelihood": rrhf.summed_logprobs},
        },
        shuffled=RANKING,
        changed={"prompts": 6, "batch": 1, "truncated_reward": 2.0, "threshold": 1.0},
        dealt={"updates": 9, "batch": 4},
        idle={
            "nobody earned": {"reward": never},
            "all earned the same, none imitated": {
                "reward": a_tenth,
                "sft_weight": 0.0,
            },
        },
        gaps={
            **GAPS,
            "order": lambda saved: [],
            "drawn": lambda saved: {},
            "rollout": lambda saved: {**saved, "tokens": saved["tokens"].flip(0)},
            "rewards": lambda saved: saved.flip(0),
        },
        stops=(1, 3, 4),
        sure=0.9,
        rounding={"rel": 1e-4, "floor": 1e-6},
    ),
}
