"""What every public function owes, said once: one entry a function.

From an entry follow its calls (drawn ones, and one that is fixed), what it refuses
(tests/test_refusals.py), what all functions of its kind owe, and its golden vectors;
beside these stand the properties that are its own. tests/test_losses.py runs them all,
and tests/mutants.py shows that they have force.

What tests/golden.py says of a function is not said again here: which arguments are
log-probabilities, which of them it is differentiated by, which options there are. So a
new function needs

1. its equation in tests/golden.py: `@vectors(..., Batches(...))` where it has a mask,
   `Groups(...)` where it has rewards (P, K), cases of its own otherwise;
2. `python -m tests.golden`, which writes the cases into data/golden;
3. an entry here, such as

    Entry(ppo.policy_loss, count=live_rows, setting=1, refuses=BAND,
          owes=[check_where_the_clip_lets_go])

4. what makes it what it is, as a property in tests/properties/, and a wrong version or
   two in tests/mutants.py that the property kills.

With neither `Batches` nor `Groups`, nor calls `drawn` here, it meets its golden vectors
and its own properties alone; what it refuses is then to be said in test_refusals.py.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import inf, nan
from zlib import crc32

import torch
from hypothesis import strategies as st
from torch import Tensor

from minialign import logprobs as lp
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
from minialign.evaluation import best_of_n, measured_kl, pass_at_k
from minialign.model import GPT
from minialign.rewards import partial_credit, score
from minialign.sampling import collate, generate
from tests import golden, strategies
from tests.properties import (
    common,
    evaluation,
    imitation,
    logprobs,
    policy_gradients,
    preferences,
    sampling,
    trust_region,
    vectors,
)
from tests.properties.common import Case, Property, all_rows, live_rows, live_tokens
from tests.toy import generator

# One live slot at [0, 1] at least, a row without any, a gap.
MASK = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]]).bool()
FULL = MASK | torch.tensor([[0], [0], [1], [0]]).bool()  # a live token in every row
TRIPLES = common.float64([[1.0, 0.0, 0.5], [0.1, 0.1, 0.1]])  # (P, K) rewards


def table(name: str, *shape: int, low: float, high: float) -> Tensor:
    """The same numbers for the same name, whatever other tables there are."""
    draw = torch.Generator().manual_seed(crc32(name.encode()))
    return low + (high - low) * torch.rand(shape, generator=draw, dtype=torch.float64)


def called(function: Callable) -> str:
    """Such as rloo.leave_one_out or tokenizer.Tokenizer.encode."""
    return f"{function.__module__.split('.')[-1]}.{function.__qualname__}"


def as_it_is(function: Callable) -> Callable:
    return function


@dataclass(frozen=True)
class Entry:
    """A function and what it owes. What is None or empty follows from golden.py."""

    function: Callable
    owes: Sequence[Property] = ()  # beside what all functions of its kind owe
    count: Callable[[Case], int] | None = None  # the number that `count` replaces
    setting: int = 0  # which of its options in golden.py the properties set
    by_row: bool = True  # a row alone gives what it gives in a batch
    all_live: bool = False  # it passes on the number of a row that has no live slot
    defaults: Mapping = field(default_factory=dict)  # of its options
    refuses: Mapping = field(default_factory=dict)  # option: values out of its range
    drawn: st.SearchStrategy[Case] | None = None  # calls, where golden.py draws none
    fixed_call: Case | None = None  # one of them
    moves: Sequence[str] = ()  # arguments it is differentiated by
    options: Sequence[dict] = ()
    called_as: Callable[[Callable], Callable] = as_it_is  # by names of tensors alone
    without: Sequence[Property] = ()  # checks of common.py that are not for it

    @property
    def name(self) -> str:
        return called(self.function)

    @property
    def vectors(self) -> golden.Vectors | None:
        return golden.VECTORS.get(self.name)

    @cached_property
    def cases(self) -> st.SearchStrategy[Case] | None:
        """Calls as hypothesis draws them: tensors by argument name."""
        draw = self.vectors.draw if self.vectors else None
        if self.drawn is not None:
            return self.drawn
        if isinstance(draw, golden.Batches):
            found = batches(draw)
            return found.map(strategies.without_dead_rows) if self.all_live else found
        return groups(draw) if isinstance(draw, golden.Groups) else None

    @cached_property
    def call(self) -> Case:
        """One call, always the same: tensors by argument name."""
        draw = self.vectors.draw if self.vectors else None
        if self.fixed_call is not None:
            return self.fixed_call
        if isinstance(draw, golden.Batches):
            return one_batch(draw) | ({"mask": FULL} if self.all_live else {})
        return one_group(draw, self.name)

    @property
    def set_options(self) -> dict:
        """The setting under which its properties are looked at."""
        options = self.all_options[self.setting] if self.all_options else {}
        return {name: value for name, value in options.items() if name != "count"}

    @property
    def all_options(self) -> Sequence[dict]:
        """Settings, no two of which are alike."""
        if self.options:
            return self.options
        drawn = getattr(self.vectors.draw, "options", ()) if self.vectors else ()
        return [options for i, options in enumerate(drawn) if options not in drawn[:i]]

    @property
    def trained(self) -> Sequence[str]:
        return self.moves or (self.vectors.by if self.vectors else ())

    @property
    def constants(self) -> list[str]:
        """Arguments that get no gradient."""
        floats = [name for name, x in self.call.items() if x.is_floating_point()]
        return [name for name in floats if name not in self.trained]

    @cached_property
    def properties(self) -> list[Property]:
        """All that it owes: golden vectors, what all owe, and what is its own."""
        checks = []
        if self.vectors:
            checks.append(partial(vectors.check_golden_vectors, name=self.name))
        if self.cases is not None:
            under_its_setting = partial(common.with_options, options=self.set_options)
            generic = list(map(under_its_setting, self.of_its_kind()))
            generic += self.of_its_options()
            left_out = [common.name_of(check) for check in self.without]
            unknown = set(left_out) - {common.name_of(check) for check in generic}
            if unknown:
                raise ValueError(f"{self.name} would not meet {unknown} anyway")
            for check in generic:
                if common.name_of(check) not in left_out:
                    checks.append(self.by_tensors(check))
        return checks + list(self.owes)

    def of_its_kind(self) -> list[Property]:
        """What every function with such arguments owes, if it is for this one."""

        def on_cases(check, **more):
            return partial(check, cases=self.cases, **more)

        trained = self.trained or self.constants
        checks = [
            on_cases(common.check_pure),
            on_cases(common.check_permutation, trainable=trained, alone=self.by_row),
        ]
        if "mask" in self.call:
            checks.append(on_cases(common.check_mask_is_inert, trainable=trained))
        if self.constants:
            checks.append(on_cases(common.check_no_gradient_to, names=self.constants))
        if trained:
            checks.append(on_cases(common.check_float32, trainable=trained))
            checks.append(partial(common.check_types_refused, case=self.call))
        if self.count:
            parts = partial(common.check_microbatches, count=self.count)
            checks.append(on_cases(parts, trainable=trained))
            checks.append(on_cases(common.check_duplication, trainable=trained))
        shapes = [x.shape for x in self.call.values()]
        if len(set(shapes)) < len(shapes):  # two of them go together
            checks.append(partial(common.check_shapes_refused, case=self.call))
        return checks

    def of_its_options(self) -> list[Property]:
        """What moves in some setting, and what each option does."""

        def on_call(check, **more):
            return partial(check, case=self.call, **more)

        checks = []
        settings = self.all_options or [{}]
        if self.trained:
            reach = partial(common.check_gradient_reaches, trainable=self.trained)
            checks.append(on_call(reach, options=settings))
        if len(settings) > 1:
            checks.append(on_call(common.check_options_matter, options=settings))
        if self.defaults:
            others = self.set_options.keys() - self.defaults.keys()
            given = {name: self.set_options[name] for name in others}
            silent = partial(common.check_defaults, defaults=self.defaults)
            checks.append(on_call(silent, given=given))
        return checks

    def by_tensors(self, check: Property) -> Property:
        """The property of the function as it is called by names of tensors alone."""

        def checked(function):
            check(self.called_as(function))

        return common.named_as(check, checked)


# Calls, from what golden.py says


def batches(draw: golden.Batches) -> st.SearchStrategy[Case]:
    slots = dict.fromkeys(draw.nats.split(), partial(strategies.logprobs, low=-3.0))
    slots |= dict.fromkeys(draw.signed.split(), policy_gradients.near)
    slots |= dict.fromkeys(draw.shares.split(), policy_gradients.shares)
    shapes = strategies.shapes(max_batch=3, max_length=5)

    @st.composite
    def drawn(choose):
        shape = choose(shapes)
        rows = tuple(draw.rows.split())
        return choose(strategies.batches(shape=shape, rows=rows, **slots))

    return drawn() if draw.dead else drawn().map(strategies.without_dead_rows)


def groups(draw: golden.Groups) -> st.SearchStrategy[Case]:
    @st.composite
    def drawn(choose):
        rewards = choose(strategies.groups())
        dice = choose(st.randoms(use_true_random=False))
        return {"rewards": rewards} | beside(draw, dice, rewards)

    return drawn()


def beside(draw: golden.Groups, dice: random.Random, rewards: Tensor) -> Case:
    others = draw.beside(dice, rewards.tolist())
    return {name: common.float64(x) for name, x in others.items()}


def one_batch(draw: golden.Batches) -> Case:
    call = {"mask": MASK if draw.dead else FULL}
    B, S = MASK.shape
    for name in draw.nats.split():
        call[name] = table(name, B, S, low=-2.0, high=0.0)
    for name in draw.signed.split():
        call[name] = table(name, B, S, low=-2.0, high=2.0)
    for name in draw.shares.split():
        call[name] = table(name, B, S, low=0.1, high=0.5)
    for name in draw.rows.split():
        call[name] = table(name, B, low=-1.0, high=1.0)
    return call


def one_group(draw: golden.Groups, name: str) -> Case:
    return {"rewards": TRIPLES} | beside(draw, random.Random(name), TRIPLES)


# Ranges

BETA = {"beta": (-0.1, nan, inf)}
BAND = {"eps_low": (0.0, -0.1, 1.1, nan), "eps_high": (0.0, -0.1, nan)}
NARROW = {"eps_low": 0.1, "eps_high": 0.4}
SHARE = (-0.1, 1.1, nan)

# Functions that are called by more than tensors


def with_lots(select):
    """Lots are drawn from the same generator each time."""
    return lambda **call: select(**call, generator=generator())


SELECTED = strategies.groups().map(
    lambda rewards: {"rewards": rewards, "lengths": imitation.lengths_for(rewards)}
)
TO_SELECT = {"rewards": TRIPLES, "lengths": torch.tensor([[2, 3, 1], [4, 4, 2]])}
LOTS = {"called_as": with_lots, "drawn": SELECTED, "fixed_call": TO_SELECT}
LOTS["without"] = [  # lots go by place, and choices are bools
    common.check_permutation,
    common.check_no_gradient_to,
    common.check_float32,
    common.check_types_refused,
]
PAIR = {
    name: table(name, 3, low=-5.0, high=0.0)
    for name in (*preferences.OWN, *preferences.REF)
}
SMOOTHER = partial(dpo.conservative, smoothing=0.2)
TWO_LOGITS = {
    name: table(name, 2, 5, low=0.0, high=1.0) for name in ("logits", "ref_logits")
}
BY_PROBLEM = {"called_as": preferences.pairwise, "drawn": preferences.JUDGED}
BY_PROBLEM["fixed_call"] = preferences.ANSWERS
BY_PROBLEM["without"] = [common.check_permutation, common.check_shapes_refused]
# A std of nearly equal numbers is one of roundings in float32.
ROUNDED = [common.check_float32]
# A violated pair has two answers, and others may be in none.
SOME_MOVE = [common.check_gradient_reaches]
# A term of GRPO takes `old`, whether it reads it or not.
UNREAD = [common.check_shapes_refused, common.check_types_refused]

CLAIMS = policy_gradients  # expected gradients, by enumeration
# Of the weights of ReMax, which take k1 as it is.
NO_PRICE = partial(
    policy_gradients.check_nan_is_refused_at_no_price, case=policy_gradients.PAID
)

ENTRIES = [
    # logprobs
    Entry(
        lp.token_logprobs,
        owes=[
            logprobs.check_sums_to_one,
            logprobs.check_scores_one_by_one,
            logprobs.check_scores_at_temperature,
        ],
    ),
    Entry(
        lp.logprobs_from_logits,
        owes=[
            logprobs.check_shift_of_all_logits,
            logprobs.check_all_but_impossible,
            logprobs.check_half_is_lifted_first,
        ],
    ),
    Entry(
        lp.masked_sum,
        owes=[partial(logprobs.check_by_loops, name=lp.masked_sum)],
    ),
    Entry(
        lp.masked_mean,
        owes=[
            partial(logprobs.check_by_loops, name=lp.masked_mean),
            logprobs.check_row_means_of_a_constant,
        ],
    ),
    Entry(
        lp.token_mean,
        count=live_tokens,
        owes=[
            partial(logprobs.check_by_loops, name=lp.token_mean),
            logprobs.check_mean_of_a_constant,
            partial(logprobs.check_where_reductions_part, expected=4),
        ],
    ),
    Entry(
        lp.sequence_mean,
        count=live_rows,
        owes=[
            partial(logprobs.check_by_loops, name=lp.sequence_mean),
            logprobs.check_mean_of_a_constant,
            partial(logprobs.check_where_reductions_part, expected=6),
        ],
    ),
    Entry(
        lp.sequence_sum,
        count=live_rows,
        owes=[
            partial(logprobs.check_by_loops, name=lp.sequence_sum),
            logprobs.check_sum_of_a_constant,
            partial(logprobs.check_where_reductions_part, expected=8),
        ],
    ),
    Entry(
        lp.kl_k1,
        owes=[
            partial(logprobs.check_one_token, expected=0.5),
            partial(
                logprobs.check_three_choices,
                value=logprobs.THREE_KL,
                slope=[0.0, 0.0, 0.0],
            ),
            logprobs.check_expects_kl,
            partial(logprobs.check_gradient_whole, expected=logprobs.ZERO),
        ],
    ),
    Entry(
        lp.kl_k2,
        owes=[
            partial(logprobs.check_one_token, expected=0.125),
            partial(
                logprobs.check_three_choices,
                value=0.093614,
                slope=logprobs.THREE_GRADIENT,
            ),
            partial(logprobs.check_gradient_whole, expected=logprobs.KL_GRADIENT),
        ],
    ),
    Entry(
        lp.kl_k3,
        owes=[
            partial(logprobs.check_one_token, expected=0.106531),
            partial(
                logprobs.check_three_choices,
                value=logprobs.THREE_KL,
                slope=logprobs.THREE_FORWARD_GRADIENT,
            ),
            logprobs.check_expects_kl,
            partial(logprobs.check_gradient_whole, expected=logprobs.FORWARD_GRADIENT),
            logprobs.check_never_negative_in_float32,
        ],
    ),
    Entry(lp.kl_ratio_k3, owes=[logprobs.check_on_policy]),
    Entry(
        lp.exact_kl,
        drawn=logprobs.LOGITS,
        fixed_call=TWO_LOGITS,
        owes=[logprobs.check_exact_kl, logprobs.check_sure_choices],
        # Half precision is lifted, and there may be any number of choices.
        without=[common.check_types_refused, common.check_shapes_refused],
    ),
    Entry(
        lp.probability_ratio,
        owes=[logprobs.check_ratio_slot_by_slot, logprobs.check_ratio_is_bounded],
    ),
    # model, sampling, rewards, evaluation
    Entry(
        GPT.forward,
        owes=[sampling.check_cached_columns, sampling.check_padding_is_unseen],
    ),
    Entry(
        generate,
        owes=[
            sampling.check_rollout,
            sampling.check_control_tokens_are_told_by_place,
            sampling.check_teacher_forcing,
            sampling.check_model_left_alone,
            sampling.check_chunks_are_new_draws,
        ],
    ),
    Entry(
        collate,
        owes=[
            sampling.check_eos_is_learnt_where_it_is_the_pad,
            sampling.check_collated,
        ],
    ),
    Entry(
        score,
        owes=[
            evaluation.check_samples_meet_their_problem,
            evaluation.check_cut_answers_earn_nothing,
        ],
    ),
    Entry(partial_credit, owes=[evaluation.check_credit_is_for_numbers_alone]),
    Entry(pass_at_k, owes=[evaluation.check_pass_is_the_average_over_subsets]),
    Entry(best_of_n, owes=[evaluation.check_best_is_the_average_over_subsets]),
    Entry(measured_kl, owes=[evaluation.check_expected_kl]),
    # sft
    Entry(
        sft.sft_loss,
        count=live_tokens,
        owes=[
            imitation.check_mean_of_a_constant,
            imitation.check_every_token_counts_alike,
        ],
    ),
    Entry(
        sft.batches,
        owes=[
            imitation.check_epochs,
            imitation.check_orders,
            imitation.check_windows_are_token_means,
            imitation.check_windows_save_padding,
            imitation.check_resumed_batches,
            imitation.check_examples_on_demand,
        ],
    ),
    Entry(sft.train, owes=[imitation.check_resumed_training]),
    # rejection sampling
    Entry(rejection_sampling.best_of_n_accuracy),
    Entry(rejection_sampling.best_of_n_kl),
    Entry(
        rejection_sampling.select_right,
        owes=[
            imitation.check_ranks_alone_count,
            imitation.check_places_do_not_count,
            imitation.check_all_above_0,
        ],
        **LOTS,
    ),
    Entry(
        rejection_sampling.select_best,
        owes=[
            imitation.check_ranks_alone_count,
            imitation.check_places_do_not_count,
            imitation.check_one_best_answer,
            imitation.check_ties_by_lot,
        ],
        **LOTS,
    ),
    Entry(
        rejection_sampling.select_top,
        owes=[
            imitation.check_ranks_alone_count,
            imitation.check_places_do_not_count,
            imitation.check_best_of_all,
            imitation.check_ties_by_lot,
        ],
        **LOTS,
    ),
    Entry(
        rejection_sampling.select_random,
        owes=[
            imitation.check_ranks_alone_count,
            imitation.check_as_many_tokens,
            imitation.check_rewards_do_not_choose,
        ],
        **LOTS,
    ),
    Entry(rejection_sampling.keep_latest, owes=[imitation.check_pool_of_one_round]),
    Entry(rejection_sampling.keep_all, owes=[imitation.check_pool_of_all_rounds]),
    Entry(
        rejection_sampling.keep_latest_with,
        owes=[imitation.check_pool_beside_given],
    ),
    Entry(
        rejection_sampling.likelihood_loss,
        count=live_rows,
        owes=[CLAIMS.check_unbiased],
    ),
    # reinforce, remax, rloo
    Entry(reinforce.no_baseline, owes=[CLAIMS.check_costs_no_bias]),
    Entry(reinforce.moving_average, owes=[CLAIMS.check_costs_no_bias]),
    Entry(reinforce.batch_mean),
    Entry(
        reinforce.shape_rewards,
        all_live=True,
        refuses=BETA,
        owes=[
            CLAIMS.check_kl_in_the_reward,
            policy_gradients.check_nan_is_refused_at_no_price,
        ],
    ),
    Entry(
        reinforce.reinforce_loss,
        count=live_rows,
        owes=[CLAIMS.check_unbiased, policy_gradients.check_any_log_probability],
    ),
    Entry(reinforce.train, owes=[policy_gradients.check_priced_kl]),
    Entry(
        remax.remax_advantages,
        owes=[
            policy_gradients.check_greedy_ties,
            CLAIMS.check_any_greedy_answer_costs_no_bias,
        ],
    ),
    Entry(
        remax.whole_answer,
        refuses=BETA,
        owes=[
            CLAIMS.check_kl_of_the_whole_answer,
            policy_gradients.check_weights_by_hand,
            NO_PRICE,
        ],
    ),
    Entry(
        remax.code_returns,
        refuses=BETA,
        owes=[policy_gradients.check_code_returns_by_hand, NO_PRICE],
    ),
    Entry(
        remax.code_weights,
        refuses=BETA,
        by_row=False,
        owes=[policy_gradients.check_token_mean, NO_PRICE],
    ),
    Entry(
        remax.remax_loss,
        count=live_rows,
        owes=[
            CLAIMS.check_unbiased_by_token,
            partial(policy_gradients.check_any_log_probability, shape=(1, 1)),
        ],
    ),
    Entry(
        rloo.shape_rewards,
        all_live=True,
        refuses=BETA,
        owes=[
            CLAIMS.check_kl_in_the_reward,
            policy_gradients.check_nan_is_refused_at_no_price,
        ],
    ),
    Entry(
        rloo.leave_one_out,
        owes=[
            policy_gradients.check_leave_one_out,
            policy_gradients.check_equal_rewards,
            CLAIMS.check_unbiased_in_groups,
        ],
    ),
    Entry(
        rloo.rloo_loss,
        count=live_rows,
        owes=[CLAIMS.check_unbiased, policy_gradients.check_any_log_probability],
    ),
    # trpo
    Entry(
        trpo.score_choices,
        owes=[trust_region.check_every_choice, trust_region.check_half_is_lifted],
    ),
    Entry(
        trpo.leave_one_out,
        owes=[
            policy_gradients.check_leave_one_out,
            policy_gradients.check_equal_rewards,
            CLAIMS.check_unbiased_in_groups,
        ],
    ),
    Entry(
        trpo.surrogate_loss,
        count=live_rows,
        owes=[
            trust_region.check_slope_at_the_old_policy,
            trust_region.check_a_single_choice_is_corrected,
        ],
    ),
    Entry(
        trpo.choice_kl,
        owes=[
            trust_region.check_old_first,
            trust_region.check_its_bend_is_the_fisher_matrix,
        ],
    ),
    Entry(
        trpo.Curvature,
        owes=[
            trust_region.check_is_the_fisher_matrix,
            trust_region.check_is_damped,
        ],
    ),
    Entry(
        trpo.conjugate_gradients,
        owes=[
            trust_region.check_solves,
            trust_region.check_as_many_as_eigenvalues,
            trust_region.check_first_is_the_slope,
            trust_region.check_ends_when_solved,
            trust_region.check_refuses_negative_curvature,
        ],
    ),
    Entry(
        trpo.step_within,
        owes=[
            trust_region.check_quadratic_kl,
            trust_region.check_refuses_a_wrong_bend,
        ],
    ),
    Entry(
        trpo.line_search,
        owes=[
            trust_region.check_stays_within_the_bound,
            trust_region.check_measures_the_papers_kl,
            trust_region.check_must_gain,
            trust_region.check_too_long_for_every_try,
            trust_region.check_stays_where_it_is_told_to,
            trust_region.check_counts_from_where_it_stands,
            trust_region.check_what_cannot_be_computed_is_too_long,
            trust_region.check_an_interrupt_leaves_no_trace,
        ],
    ),
    # grpo
    Entry(
        grpo.centred_advantages,
        owes=[
            policy_gradients.check_own_group_only,
            policy_gradients.check_equal_rewards,
            CLAIMS.check_own_share_of_the_gradient,
        ],
    ),
    Entry(
        grpo.group_advantages,
        defaults={"epsilon": 1e-4},
        refuses={"epsilon": (-1e-9, nan, inf)},
        owes=[
            policy_gradients.check_golden_advantages,
            policy_gradients.check_own_group_only,
            policy_gradients.check_spread,
            policy_gradients.check_equal_rewards,
            policy_gradients.check_epsilon_law,
            CLAIMS.check_std_weighs_the_problem,
        ],
    ),
    Entry(
        grpo.per_sequence,
        by_row=False,
        options=[{"max_new_tokens": 9}],
        owes=[
            partial(
                policy_gradients.check_weights,
                of_an_answer=policy_gradients.each_answer_alike,
            )
        ],
    ),
    Entry(
        grpo.by_constant,
        by_row=False,
        owes=[
            partial(
                policy_gradients.check_weights, of_an_answer=policy_gradients.each_ninth
            ),
            CLAIMS.check_constant_divisor,
        ],
    ),
    Entry(
        grpo.per_token,
        by_row=False,
        options=[{"max_new_tokens": 9}],
        owes=[
            partial(
                policy_gradients.check_weights,
                of_an_answer=policy_gradients.each_token_alike,
            )
        ],
    ),
    Entry(
        grpo.k1_term,
        without=UNREAD,
        owes=[
            partial(CLAIMS.check_divergence_of_each_choice, divergence=CLAIMS.nothing)
        ],
    ),
    Entry(
        grpo.k2_term,
        without=UNREAD,
        owes=[
            partial(CLAIMS.check_divergence_of_each_choice, divergence=CLAIMS.reverse)
        ],
    ),
    Entry(
        grpo.k3_term,
        without=UNREAD,
        owes=[
            partial(CLAIMS.check_divergence_of_each_choice, divergence=CLAIMS.forward)
        ],
    ),
    Entry(
        grpo.clipped_loss,
        fixed_call=policy_gradients.CLIPPED,  # both edges bind
        setting=1,
        defaults={"eps_low": 0.2, "eps_high": 0.2},
        refuses=BAND,
        owes=[
            policy_gradients.check_clip_by_hand,
            policy_gradients.check_quadrants,
            partial(policy_gradients.check_where_the_clip_lets_go, shape=(1,)),
            partial(policy_gradients.check_on_the_edge_it_moves, shape=(1,)),
            partial(
                policy_gradients.check_only_the_ratio_counts,
                cases=policy_gradients.CLIP_CASES,
            ),
            CLAIMS.check_tokens_are_unbiased_at_ratio_1,
        ],
    ),
    Entry(
        grpo.grpo_loss,
        fixed_call=policy_gradients.WEIGHED,  # both edges bind
        options=[
            {**NARROW, "beta": 0.7},
            {**NARROW, "beta": 0.3},
            {**NARROW, "beta": 0.7, "kl_term": grpo.k1_term},
            {**NARROW, "beta": 0.7, "kl_term": grpo.k2_term},
            {"eps_low": 0.9, "eps_high": 0.4, "beta": 0.7},
            {"eps_low": 0.1, "eps_high": 9.0, "beta": 0.7},
        ],
        defaults={"eps_low": 0.2, "eps_high": 0.2, "kl_term": grpo.k3_term},
        refuses=BAND | BETA,
        owes=[
            policy_gradients.check_reductions_by_hand,
            policy_gradients.check_what_need_not_be_said,
            policy_gradients.check_parts_add_up,
            policy_gradients.check_rows_twice_without_weights,
            partial(policy_gradients.check_where_the_clip_lets_go, shape=(1,)),
            partial(policy_gradients.check_on_the_edge_it_moves, shape=(1,)),
            partial(
                policy_gradients.check_only_the_ratio_counts,
                cases=policy_gradients.CLIP_CASES,
            ),
            policy_gradients.check_the_price_is_never_let_go,
            CLAIMS.check_centred_by_a_constant,
            CLAIMS.check_price_of_each_choice,
        ],
    ),
    # ppo
    Entry(
        ppo.score_tokens,
        owes=[
            policy_gradients.check_scores_before_the_choice,
            policy_gradients.check_who_learns_from_values,
            policy_gradients.check_half_is_scored_in_float32,
            policy_gradients.check_sure_policy,
        ],
    ),
    Entry(
        ppo.shape_token_rewards,
        refuses=BETA,
        owes=[
            policy_gradients.check_token_rewards_by_hand,
            policy_gradients.check_token_rewards_add_up,
            CLAIMS.check_kl_to_come,
        ],
    ),
    Entry(
        ppo.gae,
        setting=1,
        refuses={"gamma": SHARE, "lam": SHARE},
        owes=[
            policy_gradients.check_gae,
            policy_gradients.check_what_is_known_beforehand,
            CLAIMS.check_lambda_1_is_unbiased,
            CLAIMS.check_true_values_are_unbiased,
        ],
    ),
    Entry(
        ppo.whiten,
        by_row=False,
        without=ROUNDED,
        owes=[
            policy_gradients.check_whitening,
            policy_gradients.check_one_of_its_kind,
            policy_gradients.check_far_from_0,
        ],
    ),
    Entry(
        ppo.policy_loss,
        count=live_rows,
        setting=1,
        refuses=BAND,
        owes=[
            policy_gradients.check_where_the_clip_lets_go,
            policy_gradients.check_on_the_edge_it_moves,
            partial(
                policy_gradients.check_only_the_ratio_counts,
                cases=policy_gradients.POLICY_CASES,
            ),
            CLAIMS.check_unbiased_at_ratio_1,
        ],
    ),
    Entry(
        ppo.value_loss,
        count=live_tokens,
        setting=1,
        defaults={"clip": None},
        refuses={"clip": (0.0, -0.1, nan)},
        owes=[policy_gradients.check_values_move_towards_returns],
    ),
    Entry(
        ppo.explained_variance,
        by_row=False,
        without=ROUNDED,
        owes=[policy_gradients.check_share_explained],
    ),
    Entry(
        ppo.pretraining_loss,
        count=live_rows,
        setting=1,
        refuses={"weight": (-0.1, nan, inf)},
        owes=[policy_gradients.check_pull_of_the_mix],
    ),
    Entry(ppo.adapt_beta),
    Entry(
        ppo.train,
        owes=[
            policy_gradients.check_the_mix_is_imitated,
            policy_gradients.check_returns_are_what_was_earned,
            policy_gradients.check_first_ratio,
            policy_gradients.check_micro_batches,
            policy_gradients.check_entropy_bonus,
        ],
    ),
    # dpo
    Entry(dpo.logistic, owes=[preferences.check_any_margin]),
    Entry(
        dpo.conservative,
        drawn=preferences.MARGINS,
        fixed_call={"h": common.float64([1.0, -0.5])},
        options=[{"beta": 0.5, "smoothing": 0.2}, {"beta": 0.7, "smoothing": 0.3}],
        defaults={"smoothing": 0.1},
        refuses={"smoothing": (-0.1, 0.5, 1.0, nan)},
        without=[common.check_types_refused],  # its caller has looked
        owes=[
            preferences.check_smoothing_adds_a_line,
            preferences.check_lowest_point,
        ],
    ),
    Entry(
        dpo.robust,
        drawn=preferences.MARGINS,
        fixed_call={"h": common.float64([1.0, -0.5])},
        options=[{"beta": 0.5, "flipped": 0.2}, {"beta": 0.7, "flipped": 0.4}],
        defaults={"flipped": 0.1},
        refuses={"flipped": (-0.1, 0.5, 1.0, nan)},
        without=[common.check_types_refused],  # its caller has looked
        owes=[preferences.check_flips_cancel, preferences.check_never_content],
    ),
    Entry(dpo.ipo, owes=[preferences.check_finite_goal]),
    Entry(
        dpo.dpo_loss,
        drawn=preferences.PAIRS,
        fixed_call=PAIR,
        count=all_rows,
        options=[
            {"beta": 0.7},
            {"beta": 0.4},
            {"beta": 0.7, "per_pair": dpo.conservative},
            {"beta": 0.7, "per_pair": SMOOTHER},
            {"beta": 0.7, "per_pair": dpo.robust},
            {"beta": 0.7, "per_pair": dpo.ipo},
        ],
        defaults={"per_pair": dpo.logistic},
        refuses={"beta": (0.0, -1.0, nan, inf)},
        owes=[
            preferences.check_starts_as_a_policy_gradient,
            preferences.check_at_the_reference,
            preferences.check_slope_anywhere,
            preferences.check_margins_of_any_size,
            preferences.check_only_the_margin_counts,
            preferences.check_beta_scales_the_margin,
            preferences.check_a_swap_adds_beta_h,
        ],
    ),
    Entry(
        dpo.make_pairs,
        owes=[preferences.check_pairs_are_told_apart, preferences.check_pairs_by_lot],
    ),
    Entry(dpo.pair_logprobs, owes=[preferences.check_sums_over_answers]),
    Entry(dpo.mean_pair_logprobs, owes=[preferences.check_means_over_answers]),
    # reward_model
    Entry(
        reward_model.pairwise_loss,
        drawn=preferences.NUMBERS,
        fixed_call={
            "chosen": common.float64([0.5, -1.0, 2.0]),
            "rejected": common.float64([0.2, 0.4, -0.3]),
        },
        count=all_rows,
        options=[{}, {"margin": 0.7}, {"label": 0.8}],
        defaults={"margin": 0.0, "label": 1.0, "weights": None},
        refuses={"margin": (-0.1, nan, inf), "label": SHARE},
        owes=[
            preferences.check_a_tie,
            preferences.check_only_differences_count,
            preferences.check_pull_of_a_pair,
            preferences.check_a_margin_is_a_head_start,
            preferences.check_a_swap_costs_the_gap,
            preferences.check_lowest_where_people_are,
            preferences.check_gaps_of_any_size,
            preferences.check_weights_count,
            preferences.check_each_pair_has_its_label,
        ],
    ),
    Entry(
        reward_model.pairs_of,
        owes=[
            preferences.check_pairs_of_rankings,
            preferences.check_a_ranking_counts_once,
            preferences.check_a_label_is_of_its_ranking,
        ],
    ),
    Entry(reward_model.read_rankings, owes=[preferences.check_read_one_by_one]),
    Entry(reward_model.rankings_of, owes=[preferences.check_best_first]),
    # rrhf
    Entry(rrhf.summed_logprobs),
    Entry(rrhf.mean_logprobs, owes=[preferences.check_mean_per_token]),
    Entry(
        rrhf.ranking_loss,
        drawn=preferences.RANKED,
        fixed_call=preferences.RANKS,
        count=all_rows,
        defaults={"margin": 0.0},
        refuses={"margin": (-0.1, nan, inf)},
        without=SOME_MOVE,
        owes=[
            preferences.check_ranking,
            preferences.check_violated_pairs,
            preferences.check_what_ranking_does_not_see,
            preferences.check_more_answers_cost_no_less,
            preferences.check_ties_ask_for_nothing,
        ],
    ),
    Entry(
        rrhf.best_answers,
        owes=[preferences.check_first_of_the_best],
        without=[common.check_float32, common.check_types_refused],
    ),
    Entry(
        rrhf.sft_loss,
        options=[{"count": None}, {"count": 10}],
        owes=[preferences.check_imitation],
        **BY_PROBLEM | {"without": [*BY_PROBLEM["without"], *SOME_MOVE]},
    ),
    Entry(
        rrhf.rrhf_loss,
        options=[
            {},
            {"sft_weight": 3.0},
            {"margin": 0.2},
            {"likelihood": rrhf.summed_logprobs},
            {"counts": (5, 5)},
        ],
        defaults={"sft_weight": 1.0, "margin": 0.0, "likelihood": rrhf.mean_logprobs},
        owes=[
            preferences.check_lifts_right_over_wrong,
            preferences.check_imitates_the_first_right_answer,
            preferences.check_parts_of_whole_problems,
        ],
        **BY_PROBLEM,
    ),
]
OF = {entry.function: entry for entry in ENTRIES}


def first_catch(wrong: Callable, right: Callable) -> str | None:
    """The name of the first property of the true function that the wrong one fails."""
    for check in OF[right].properties:
        if common.refutes(check, wrong):
            return common.name_of(check)
    return None
