"""What each function owes: the properties that its mutants meet, in this order.

A property is a function of the implementation; a true function passes all of its own,
and a wrong version (tests/mutants.py) is caught by the first that it fails.
"""

from collections.abc import Callable
from functools import partial

from minialign.algorithms import (
    dpo,
    grpo,
    ppo,
    reinforce,
    rejection_sampling,
    remax,
    rloo,
    rrhf,
    sft,
)
from minialign.evaluation import best_of_n, measured_kl, pass_at_k
from minialign.logprobs import (
    exact_kl,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_ratio_k3,
    logprobs_from_logits,
    masked_sum,
    probability_ratio,
    sequence_sum,
    token_logprobs,
    token_mean,
)
from minialign.model import GPT
from minialign.rewards import score
from minialign.sampling import collate, generate
from tests import (
    strategies,
    test_dpo,
    test_grpo,
    test_logprobs,
    test_ppo,
    test_reinforce,
    test_rloo,
    test_rrhf,
    test_sft,
)
from tests.properties import (
    common,
    evaluation,
    logprobs,
    policy_gradients,
    preferences,
    sampling,
)

Property = Callable[[Callable], None]


def owed_by_all(
    module, trainable=common.LOGPROBS, fixed=(), count=None, *, cases=None, case=None,
    **options,
) -> list[Property]:  # fmt: skip
    """C-1, C-4, C-5, C-6, C-7, C-9: what every function of a batch owes.

    `fixed` arguments get no gradient; `count` is the normaliser of a reduction.
    """
    cases = module.CASES if cases is None else cases
    case = module.CASE if case is None else case
    checks = []
    if "mask" in case:
        checks += [partial(common.check_mask_is_inert, trainable=trainable)]
    if count:
        parts = partial(common.check_microbatches, count=count, trainable=trainable)
        checks += [parts]
    if fixed:
        checks += [partial(common.check_no_gradient_to, names=fixed)]
    checks += [
        common.check_pure,
        partial(common.check_permutation, trainable=trainable),
    ]
    checks = [partial(check, cases=cases) for check in checks]
    checks += [partial(common.check_shapes_refused, case=case)]
    return [with_options(check, options) for check in checks]


def with_options(check: Property, options: dict) -> Property:
    """The property of the function with these options set."""

    def checked(function):
        check(partial(function, **options))

    checked.__name__ = name_of(check)
    return checked


def name_of(check: Property) -> str:
    while isinstance(check, partial):
        check = check.func
    return check.__name__


reduction = partial(
    owed_by_all, test_logprobs, test_logprobs.X,
    cases=test_logprobs.X_CASES, case=test_logprobs.X_CASE,
)  # fmt: skip
estimate = partial(owed_by_all, test_logprobs, case=test_logprobs.KL_CASE)
LOGITS = test_logprobs.LOGITS_PAIRS.map(
    lambda pair: dict(zip(("logits", "ref_logits"), pair, strict=True))
)
GROUPS = strategies.groups().map(lambda rewards: {"rewards": rewards})

OWED: dict[Callable, list[Property]] = {
    # logprobs
    token_logprobs: [
        test_logprobs.check_sums_to_one,
        test_logprobs.check_scores_one_by_one,
        logprobs.check_scores_at_temperature,
    ],
    logprobs_from_logits: [
        logprobs.check_shift_of_all_logits,
        logprobs.check_all_but_impossible,
        logprobs.check_half_is_lifted_first,
    ],
    token_mean: [
        test_logprobs.check_of_a_constant,
        test_logprobs.check_token_mean_golden,
        *reduction(count=common.live_tokens),
    ],
    sequence_sum: [
        logprobs.check_sum_of_a_constant,
        *reduction(count=common.live_rows),
    ],
    masked_sum: [*reduction(), logprobs.check_sums_row_by_row],
    kl_k1: [
        test_logprobs.golden_k1,
        test_logprobs.check_expects_kl,
        *estimate(fixed=["ref_logprobs"], cases=test_logprobs.PAIR),
    ],
    kl_k2: [
        test_logprobs.k2_gradient,
        *estimate(fixed=["ref_logprobs"], cases=test_logprobs.PAIR),
    ],
    kl_k3: [
        test_logprobs.golden_k3,
        test_logprobs.check_expects_kl,
        test_logprobs.k3_gradient,
        test_logprobs.check_never_negative_in_float32,
        *estimate(fixed=["ref_logprobs"], cases=test_logprobs.PAIR),
    ],
    kl_ratio_k3: [
        logprobs.check_on_policy_gradient,
        *owed_by_all(
            test_logprobs, fixed=["old_logprobs", "ref_logprobs"],
            cases=test_logprobs.TRIPLE, case=test_logprobs.KL_CASE_OLD,
        ),
    ],
    exact_kl: [
        test_logprobs.check_exact_kl,
        logprobs.check_sure_choices,
        partial(common.check_no_gradient_to, cases=LOGITS, names=["ref_logits"]),
    ],
    probability_ratio: [
        logprobs.check_ratio_slot_by_slot,
        logprobs.check_ratio_is_bounded,
        *owed_by_all(
            test_logprobs, fixed=["old_logprobs"],
            cases=test_logprobs.RATIOS, case=test_logprobs.RATIO_CASE,
        ),
    ],
    # model and sampling
    GPT.forward: [sampling.check_cached_columns, sampling.check_padding_is_unseen],
    generate: [
        sampling.check_rollout,
        sampling.check_control_tokens_are_told_by_place,
        sampling.check_teacher_forcing,
        sampling.check_model_left_alone,
        sampling.check_chunks_are_new_draws,
    ],
    collate: [
        sampling.check_eos_is_learnt_where_it_is_the_pad,
        sampling.check_collated,
    ],
    # rewards and evaluation
    score: [
        evaluation.check_samples_meet_their_problem,
        evaluation.check_cut_answers_earn_nothing,
    ],
    pass_at_k: [evaluation.check_pass_is_the_average_over_subsets],
    best_of_n: [evaluation.check_best_is_the_average_over_subsets],
    measured_kl: [evaluation.check_expected_kl],
    # algorithms
    sft.sft_loss: [
        policy_gradients.check_mean_of_a_constant,
        *owed_by_all(test_sft, count=common.live_tokens),
    ],
    sft.batches: [
        policy_gradients.check_epochs,
        policy_gradients.check_resumed_batches,
    ],
    sft.train: [policy_gradients.check_resumed_training],
    reinforce.reinforce_loss: [
        policy_gradients.check_unbiased,
        *owed_by_all(test_reinforce, fixed=["advantages"], count=common.live_rows),
    ],
    reinforce.shape_rewards: [policy_gradients.check_kl_in_the_reward],
    reinforce.train: [policy_gradients.check_priced_kl],
    remax.whole_answer: [
        policy_gradients.check_kl_of_the_whole_answer,
        policy_gradients.check_weights_by_hand,
    ],
    rloo.leave_one_out: [
        test_rloo.check_leave_one_out,
        test_rloo.check_equal_rewards,
        partial(common.check_pure, cases=GROUPS),
    ],
    grpo.group_advantages: [
        policy_gradients.check_golden_advantages,
        policy_gradients.check_own_group_only,
        policy_gradients.check_equal_rewards,
        policy_gradients.check_epsilon_law,
    ],
    grpo.per_sequence: [policy_gradients.check_weights],
    grpo.clipped_loss: [
        policy_gradients.check_clip_by_hand,
        test_grpo.check_quadrants,
        *owed_by_all(test_grpo, fixed=["old_logprobs", "advantages"]),
    ],
    ppo.score_tokens: [
        policy_gradients.check_scores_before_the_choice,
        policy_gradients.check_sure_policy,
    ],
    ppo.shape_token_rewards: [
        policy_gradients.check_token_rewards_by_hand,
        policy_gradients.check_token_rewards_add_up,
        *owed_by_all(
            test_ppo, fixed=["rewards", "logprobs", "ref_logprobs"],
            cases=test_ppo.PAID, case=test_ppo.PAID_CASE, beta=0.3,
        ),
    ],
    ppo.gae: [
        test_ppo.check_gae,
        *owed_by_all(
            test_ppo, ["token_rewards", "values"], ["token_rewards", "values"],
            cases=test_ppo.STEPS, case=test_ppo.STEPS_CASE, gamma=0.9, lam=0.8,
        ),
    ],
    ppo.whiten: [
        test_ppo.check_whitening,
        policy_gradients.check_one_of_its_kind,
        policy_gradients.check_far_from_0,
    ],
    ppo.policy_loss: [
        policy_gradients.check_where_the_clip_lets_go,
        *owed_by_all(
            test_ppo, fixed=["old_logprobs", "advantages"], count=common.live_rows,
            **test_ppo.BAND,
        ),
    ],
    ppo.value_loss: [
        policy_gradients.check_values_move_towards_returns,
        *owed_by_all(
            test_ppo, ["values"], ["old_values", "returns"], common.live_tokens,
            cases=test_ppo.VALUES, case=test_ppo.VALUE_CASE, clip=0.25,
        ),
    ],
    ppo.train: [
        policy_gradients.check_returns_are_what_was_earned,
        policy_gradients.check_first_ratio,
        policy_gradients.check_micro_batches,
        policy_gradients.check_entropy_bonus,
    ],
    dpo.dpo_loss: [
        preferences.check_at_the_reference,
        preferences.check_slope_anywhere,
        *owed_by_all(test_dpo, test_dpo.OWN, test_dpo.REF, common.all_rows, beta=0.7),
    ],
    dpo.logistic: [preferences.check_any_margin],
    dpo.conservative: [preferences.check_smoothing_adds_a_line],
    dpo.ipo: [preferences.check_finite_goal],
    dpo.pair_logprobs: [preferences.check_sums_over_answers],
    dpo.make_pairs: [
        preferences.check_pairs_are_told_apart,
        preferences.check_pairs_by_lot,
    ],
    rrhf.scores: [
        partial(common.check_pure, cases=test_rrhf.ROWS),
        preferences.check_mean_per_token,
    ],
    rrhf.ranking_loss: [
        preferences.check_ranking,
        preferences.check_violated_pairs,
        preferences.check_ties_ask_for_nothing,
        *owed_by_all(
            test_rrhf, ["scores"], ["rewards"], common.all_rows,
            cases=test_rrhf.GROUPS, case=test_rrhf.GROUP,
        ),
    ],
    rrhf.sft_loss: [preferences.check_imitation],
    rejection_sampling.select_right: [preferences.check_all_above_0],
    rejection_sampling.select_best: [
        preferences.check_one_best_answer,
        preferences.check_ties_by_lot,
    ],
    rejection_sampling.select_random: [preferences.check_as_many_tokens],
    rejection_sampling.keep_all: [preferences.check_pool_of_all_rounds],
}  # fmt: skip


def first_catch(wrong: Callable, right: Callable) -> str | None:
    """The name of the first property of the true function that the wrong one fails."""
    for check in OWED[right]:
        if common.refutes(check, wrong):
            return name_of(check)
    return None
