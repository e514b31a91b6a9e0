"""Plausible wrong versions, most of them once shipped. The tests must find them all.

Section by section as the modules they imitate. The docstring says what is wrong (T and
a number: a bug that was met in public code); all that matters beside it is right, so it
must be caught for that. A mutant meets the properties of the function that it imitates,
those of its entry in tests/entries.py, and no others. Which of them kill it is pinned.

    python tests/mutants.py                 who is caught by what; who once survived
    python tests/mutants.py my_losses.py    which properties your functions break
    python tests/mutants.py --source        every slip that the source allows, in turn
    python tests/mutants.py --checks        every check of the source, left out in turn

The last takes seconds, the one before minutes; both take a module or a function.
"""

import argparse
import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, islice
from math import ceil, comb
from pathlib import Path
from time import process_time
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F

from minialign import sampling
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
from minialign.checks import check_mask
from minialign.evaluation import best_of_n, measured_kl, pass_at_k
from minialign.logprobs import (
    exact_kl,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_ratio_k3,
    logprobs_from_logits,
    masked_sum,
    normaliser,
    probability_ratio,
    sequence_mean,
    sequence_sum,
    token_logprobs,
    token_mean,
)
from minialign.model import GPT
from minialign.rewards import partial_credit, score, verifier
from minialign.sampling import collate, generate

MUTANTS: dict[Callable, Callable] = {}  # wrong version -> what it imitates
KILLS: dict[Callable, list[str]] = {}  # wrong version -> the properties that kill it
# Whoever does not look at its inputs fails these, whatever else is wrong with it.
BLIND = ("check_shapes_refused", "check_types_refused")


def imitates(right: Callable, kills: str) -> Callable:
    """What follows is a wrong version of this function.

    `kills`, a word each: the properties of the function, without their "check_", that
    find it wrong, each of them alone; the first is about its very bug. Its golden
    vectors, which see most, are not among them.
    """

    def register(wrong: Callable) -> Callable:
        MUTANTS[wrong] = right
        KILLS[wrong] = [f"check_{word}" for word in kills.split()]
        return wrong

    return register


# logprobs: which token does slot s score?


def _score(model, tokens, mask, temperature, positions, targets):
    logits = model.logits(model(tokens)) / temperature
    every = torch.log_softmax(logits, dim=-1)  # (B, T, V)
    logprobs = every[:, positions].gather(-1, tokens[:, targets, None])[..., 0]
    return torch.where(mask, logprobs, 0.0)


@imitates(token_logprobs, "sums_to_one scores_one_by_one")
def token_logprobs_without_shift(model, tokens, mask, temperature=1.0):
    """Scores each token with the logits made *after* reading it."""
    return _score(model, tokens, mask, temperature, slice(1, None), slice(1, None))


@imitates(token_logprobs, "sums_to_one scores_one_by_one")
def token_logprobs_of_the_input(model, tokens, mask, temperature=1.0):
    """Gathers the token that was read, not the one that was chosen."""
    return _score(model, tokens, mask, temperature, slice(0, -1), slice(0, -1))


@imitates(token_logprobs, "sums_to_one scores_one_by_one")
def token_logprobs_one_early(model, tokens, mask, temperature=1.0):
    """Starts at the prompt's last token and misses the response's last."""
    early = torch.cat((mask[:, 1:], torch.zeros_like(mask[:, :1])), dim=1)
    return _score(model, tokens, early, temperature, slice(0, -1), slice(1, None))


@imitates(token_logprobs, "sums_to_one scores_one_by_one")
def token_logprobs_without_eos(model, tokens, mask, temperature=1.0):
    """Leaves out the last live token: nobody learns to stop."""
    later = mask.flip(1).cumsum(1).flip(1)  # live tokens from here on
    return _score(
        model, tokens, mask & (later > 1), temperature, slice(0, -1), slice(1, None)
    )


@imitates(token_logprobs, "sums_to_one scores_one_by_one")
def token_logprobs_without_mask(model, tokens, mask, temperature=1.0):
    """Scores prompt and padding too."""
    everything = torch.ones_like(mask)
    return _score(model, tokens, everything, temperature, slice(0, -1), slice(1, None))


@imitates(token_logprobs, "scores_at_temperature")
def token_logprobs_without_temperature(model, tokens, mask, temperature=1.0):
    """Samples at one temperature, scores at another."""
    return _score(model, tokens, mask, 1.0, slice(0, -1), slice(1, None))


@imitates(logprobs_from_logits, "all_but_impossible half_is_lifted_first")
def logprobs_from_logits_by_two_steps(logits, targets, temperature=1.0):
    """log(softmax(x)): what is all but impossible becomes -inf, and trains on nan."""
    odds = torch.softmax(logits / temperature, dim=-1)
    return odds.log().gather(-1, targets[..., None])[..., 0]


@imitates(logprobs_from_logits, "half_is_lifted_first")
def logprobs_from_logits_cooled_in_half(logits, targets, temperature=1.0):
    """Lifts to float32 only after the temperature has divided in bfloat16."""
    return logprobs_from_logits(logits / temperature, targets)


# logprobs: reductions


@imitates(
    token_mean,
    "mask_is_inert microbatches options_matter by_loops mean_of_a_constant "
    "where_reductions_part",
)
def token_mean_of_product(x, mask, count=None):
    """Divides by all slots, dead ones too."""
    return torch.where(mask, x, 0.0).mean()


@imitates(token_mean, "mask_is_inert")
def token_mean_by_multiplication(x, mask, count=None):
    """nan * 0 is nan."""
    return (x * mask).sum() / (mask.sum() if count is None else count)


@imitates(token_mean, "microbatches options_matter")
def token_mean_of_this_part(x, mask, count=None):
    """Forgets the global normaliser: a mean of means of micro-batches."""
    return torch.where(mask, x, 0.0).sum() / mask.sum()


@imitates(token_mean, "microbatches options_matter by_loops where_reductions_part")
def token_mean_of_row_means(x, mask, count=None):
    """The sequence mean under the wrong name."""
    means = torch.where(mask, x, 0.0).sum(1) / mask.sum(1).clamp(min=1)
    return means.sum() / mask.any(1).sum()


@imitates(sequence_mean, "by_loops microbatches mean_of_a_constant")
def sequence_mean_over_dead_rows(x, mask, count=None):
    """Rows without a live token count in the denominator, as zeros."""
    return sequence_mean(x, mask, len(mask) if count is None else count)


@imitates(sequence_sum, "microbatches by_loops sum_of_a_constant")
def sequence_sum_over_dead_rows(x, mask, count=None):
    """Rows without a live token still count in the denominator."""
    return sequence_sum(x, mask, len(mask) if count is None else count)


@imitates(masked_sum, "pure")
def masked_sum_in_place(x, mask):
    """Writes into the caller's tensor."""
    return x.data.masked_fill_(~mask, 0.0).sum(1)


@imitates(masked_sum, "shapes_refused")
def masked_sum_that_broadcasts(x, mask):
    """Looks at the mask, but takes (B, 1) for (B, S)."""
    check_mask(mask)
    return torch.where(mask, x, 0.0).sum(1)


@imitates(masked_sum, "by_loops")
def masked_sum_in_half(x, mask):
    """Adds up in bfloat16: three digits, whatever the length."""
    masked_sum(x, mask)
    return torch.where(mask, x, 0.0).bfloat16().sum(1).to(x.dtype)


# logprobs: KL(policy || reference), and the ratio


@imitates(kl_k1, "one_token expects_kl")
def kl_k1_swapped(logprobs, ref_logprobs, mask):
    """KL(reference || policy): as a penalty it rewards drifting away."""
    return torch.where(mask, ref_logprobs.detach() - logprobs, 0.0)


@imitates(kl_k1, "no_gradient_to")
def kl_k1_into_the_reference(logprobs, ref_logprobs, mask):
    """Trains the reference too."""
    return torch.where(mask, logprobs - ref_logprobs, 0.0)


@imitates(kl_k2, "one_token gradient_whole")
def kl_k2_without_half(logprobs, ref_logprobs, mask):
    """Twice the gradient."""
    return torch.where(mask, logprobs - ref_logprobs.detach(), 0.0) ** 2


@imitates(kl_k3, "one_token expects_kl gradient_whole never_negative_in_float32")
def kl_k3_inverted(logprobs, ref_logprobs, mask):
    """policy / reference in place of reference / policy: chi^2 - KL."""
    d = torch.where(mask, logprobs - ref_logprobs.detach(), 0.0)
    return torch.exp(d) - 1 - d


@imitates(kl_k3, "one_token expects_kl")
def kl_k3_without_minus_1(logprobs, ref_logprobs, mask):
    """Not 0 where policy and reference agree."""
    d = torch.where(mask, ref_logprobs.detach() - logprobs, 0.0)
    return torch.where(mask, torch.exp(d) - d, 0.0)


@imitates(kl_k3, "mask_is_inert")
def kl_k3_masked_after(logprobs, ref_logprobs, mask):
    """The right value, and a gradient of nan."""
    d = ref_logprobs.detach() - logprobs
    return torch.where(mask, torch.expm1(d) - d, 0.0)


@imitates(kl_k3, "never_negative_in_float32")
def kl_k3_rounded(logprobs, ref_logprobs, mask):
    """exp(d) - 1 loses the digits that matter, and falls below d."""
    d = torch.where(mask, ref_logprobs.detach() - logprobs, 0.0)
    return torch.exp(d) - 1 - d


@imitates(kl_ratio_k3, "on_policy")
def kl_ratio_k3_detached(logprobs, old_logprobs, ref_logprobs, mask):
    """The ratio is 1, so its gradient cannot matter."""
    d = torch.where(mask, ref_logprobs.detach() - logprobs, 0.0)
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp().detach()
    return ratio * (torch.expm1(d) - d)


@imitates(kl_ratio_k3, "no_gradient_to")
def kl_ratio_k3_into_the_old(logprobs, old_logprobs, ref_logprobs, mask):
    """The policy that sampled is trained too."""
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()
    return ratio * kl_k3(logprobs, ref_logprobs, mask)


@imitates(exact_kl, "exact_kl sure_choices")
def exact_kl_swapped(logits, ref_logits):
    """KL(reference || policy)."""
    policy = torch.log_softmax(logits, dim=-1)
    reference = torch.log_softmax(ref_logits.detach(), dim=-1)
    return (reference.exp() * (reference - policy)).sum(-1)


@imitates(exact_kl, "gradient_reaches exact_kl")
def exact_kl_with_fixed_weights(logits, ref_logits):
    """Detaches the probabilities: the right value, a gradient of 0."""
    policy = torch.log_softmax(logits, dim=-1)
    reference = torch.log_softmax(ref_logits.detach(), dim=-1)
    return (policy.exp().detach() * (policy - reference)).sum(-1)


@imitates(exact_kl, "exact_kl sure_choices")
def exact_kl_averaged(logits, ref_logits):
    """Divides by the vocabulary, as a mean-reduced library call does."""
    policy = torch.log_softmax(logits, dim=-1)
    reference = torch.log_softmax(ref_logits.detach(), dim=-1)
    return (policy.exp() * (policy - reference)).mean(-1)


@imitates(exact_kl, "no_gradient_to")
def exact_kl_into_the_reference(logits, ref_logits):
    """The reference comes to meet the policy."""
    policy, reference = (x.log_softmax(dim=-1) for x in (logits, ref_logits))
    return (policy.exp() * (policy - reference)).sum(-1)


@imitates(exact_kl, "sure_choices")
def exact_kl_by_two_steps(logits, ref_logits):
    """Probabilities first: 0 times log 0 is nan."""
    policy, reference = logits.softmax(-1), ref_logits.detach().softmax(-1)
    return (policy * (policy / reference).log()).sum(-1)


@imitates(probability_ratio, "ratio_slot_by_slot")
def probability_ratio_always_1(logprobs, old_logprobs, mask):
    """The old log-probs come from the same forward: nothing is ever clipped."""
    return probability_ratio(logprobs, logprobs, mask)


@imitates(probability_ratio, "ratio_is_bounded")
def probability_ratio_without_bound(logprobs, old_logprobs, mask):
    """inf, and inf times an advantage of 0 is nan."""
    return torch.where(mask, logprobs - old_logprobs.detach(), 0.0).exp()


# model and sampling: which column, which token, which temperature?


@imitates(GPT.forward, "cached_columns")
def forward_at_position_0(model, tokens, cache=None, padding=None):
    """Every cached step believes that it stands in the first column."""
    tables = model.cos, model.sin
    start = 0 if cache is None else cache.used
    model.cos, model.sin = (table.roll(start, 0) for table in tables)
    hidden = GPT.forward(model, tokens, cache, padding)
    model.cos, model.sin = tables
    return hidden


@imitates(GPT.forward, "padding_is_unseen")
def forward_seeing_the_padding(model, tokens, cache=None, padding=None):
    """Left padding is read as if it were text."""
    return GPT.forward(model, tokens, cache)


@imitates(generate, "teacher_forcing")
def generate_scored_without_temperature(model, prompts, **options):
    """Samples at the temperature and records the log-probs of temperature 1."""
    rollout = generate(model, prompts, **options)
    at_1 = token_logprobs(model, rollout.tokens, rollout.mask).detach()
    return replace(rollout, logprobs=at_1)


@imitates(generate, "rollout teacher_forcing")
def generate_without_eos(model, prompts, *, eos_id, **options):
    """The sampled end is no choice of the policy's, so nobody learns to stop."""
    rollout = generate(model, prompts, eos_id=eos_id, **options)
    ends = rollout.tokens[:, 1:] == eos_id
    return replace(rollout, mask=rollout.mask & ~ends)


@imitates(generate, "rollout control_tokens_are_told_by_place teacher_forcing")
def generate_masked_by_id(model, prompts, *, pad_id, **options):
    """Whatever looks like padding is padding, sampled or not."""
    rollout = generate(model, prompts, pad_id=pad_id, **options)
    return replace(rollout, mask=rollout.mask & (rollout.tokens[:, 1:] != pad_id))


@imitates(generate, "model_left_alone")
def generate_leaving_eval_mode(model, prompts, **options):
    """What is trained next is trained in eval mode."""
    model.eval()
    return generate(model, prompts, **options)


@imitates(generate, "model_left_alone")
def generate_rolling_torch_s_dice(model, prompts, **options):
    """Draws from the global generator too, and moves what others draw from it."""
    torch.rand(())
    return generate(model, prompts, **options)


@imitates(generate, "chunks_are_new_draws")
def generate_alike_in_every_chunk(model, prompts, **options):
    """Each chunk begins with the same luck: its answers are no new draws."""
    right, generator = generate, options.get("generator")
    start = None if generator is None else generator.get_state()

    def of_a_chunk(*args, **more):
        if generator is not None:
            generator.set_state(start)
        return right(*args, **more)

    with mock.patch.object(sampling, "generate", of_a_chunk):
        return right(model, prompts, **options)


@imitates(collate, "eos_is_learnt_where_it_is_the_pad collated")
def collate_with_pad_as_eos(examples, pad_id, learn_prompt=False):
    """Every label that equals the pad is masked, the end of the answer too."""
    tokens, mask = collate(examples, pad_id, learn_prompt)
    return tokens, mask & (tokens[:, 1:] != pad_id)


@imitates(collate, "eos_is_learnt_where_it_is_the_pad collated")
def collate_learning_the_padding(examples, pad_id, learn_prompt=False):
    """Labels are a copy of the inputs, padding and all."""
    tokens, mask = collate(examples, pad_id, learn_prompt)
    return tokens, mask.cumsum(1) > 0


# rewards and evaluation


@imitates(score, "cut_answers_earn_nothing")
def score_of_cut_answers(reward, problems, rollout, tokenizer):
    """Pays for answers that never end, if the right one stands in them."""
    ended = replace(rollout, truncated=torch.zeros_like(rollout.truncated))
    return score(reward, problems, ended, tokenizer)


@imitates(pass_at_k, "pass_is_the_average_over_subsets")
def pass_at_k_plug_in(correct, k):
    """1 - (1 - c/n)^k, which is right for k = 1 only."""
    pass_at_k(correct, k)
    return 1 - (1 - np.asarray(correct).mean(1)) ** k


@imitates(best_of_n, "best_is_the_average_over_subsets")
def best_of_n_with_lucky_ties(scores, values, n):
    """Of equal scores the most valuable answer is taken: the scorer cannot know."""
    best = [
        [max(np.extract(row == one, worth)) for one in row]
        for row, worth in zip(np.asarray(scores), np.asarray(values), strict=True)
    ]
    return best_of_n(scores, best, n)


@imitates(best_of_n, "best_is_the_average_over_subsets")
def best_of_n_with_the_last_of_equals(scores, values, n):
    """Equal scores: whoever comes last wins, and so it matters who comes last."""
    order = np.argsort(scores, 1, kind="stable")
    K = order.shape[1]
    weights = np.array([comb(i, n - 1) for i in range(K)]) / comb(K, n)
    return np.take_along_axis(np.asarray(values), order, 1) @ weights


@imitates(measured_kl, "expected_kl")
def measured_kl_at_temperature_1(model, reference, rollout, rows=128):
    """The KL that is reported is not the one that is trained."""
    return measured_kl(model, reference, replace(rollout, temperature=1.0), rows)


# sft


@imitates(
    sft.sft_loss,
    "mask_is_inert microbatches mean_of_a_constant every_token_counts_alike",
)
def sft_loss_over_padding(logprobs, mask, count=None):
    """Prompt and padding are in the mean, as zeros."""
    return sft.sft_loss(logprobs, mask, mask.numel() if count is None else count)


@imitates(sft.sft_loss, "microbatches options_matter")
def sft_loss_of_this_part(logprobs, mask, count=None):
    """Each micro-batch divides by its own tokens."""
    return sft.sft_loss(logprobs, mask)


@imitates(
    sft.sft_loss,
    "microbatches duplication mean_of_a_constant every_token_counts_alike",
)
def sft_loss_summed(logprobs, mask, count=None):
    """A sum for the mean: who says more takes a larger step."""
    return sft.sft_loss(logprobs, mask, 1 if count is None else count)


@imitates(sft.sft_loss, "every_token_counts_alike microbatches")
def sft_loss_by_answers(logprobs, mask, count=None):
    """The mean of each answer's mean: what is said in short counts for more."""
    sft.sft_loss(logprobs, mask, count)
    return -sequence_mean(logprobs, mask, count)


@imitates(sft.batches, "orders")
def batches_in_one_order(examples, config, pad_id, start=0):
    """Every epoch has the first one's order."""
    per_epoch = ceil(len(examples) / config.batch_size)
    end = per_epoch * ceil(config.updates / per_epoch)
    first = sft.batches(examples, replace(config, updates=per_epoch), pad_id)
    yield from islice(cycle(first), start, end)


@imitates(sft.batches, "epochs")
def batches_without_the_rest(examples, config, pad_id, start=0):
    """What is left over when the examples are cut into batches is never seen."""
    rest = len(examples) % config.batch_size
    kept = examples[: len(examples) - rest] or examples
    return sft.batches(kept, config, pad_id, start)


@imitates(sft.batches, "windows_are_token_means")
def batches_with_counts_of_their_own(examples, config, pad_id, start=0):
    """Each batch is divided by its own tokens: short answers count for more."""
    for tokens, mask, _ in sft.batches(examples, config, pad_id, start):
        yield tokens, mask, int(mask.sum())


@imitates(sft.batches, "windows_save_padding windows_are_token_means")
def batches_by_lot(examples, config, pad_id, start=0):
    """No windows: long and short answers share a batch, a third of which is padding."""
    return sft.batches(examples, replace(config, window=1), pad_id, start)


@imitates(sft.batches, "resumed_batches")
def batches_from_the_start_of_the_epoch(examples, config, pad_id, start=0):
    """A run that goes on begins its epoch anew, and sees some examples twice."""
    per_epoch = ceil(len(examples) / config.batch_size)
    return sft.batches(examples, config, pad_id, start // per_epoch * per_epoch)


@imitates(sft.batches, "examples_on_demand")
def batches_after_a_look(examples, config, pad_id, start=0):
    """Reads all examples before it begins: those made on demand are made twice."""
    for i in range(len(examples)):
        _ = examples[i]
    return sft.batches(examples, config, pad_id, start)


@imitates(sft.train, "resumed_training")
def sft_train_forgetting_the_moments(model, examples, config, *, pad_id, state=None):
    """The optimiser begins anew where the run goes on."""
    if state:
        state["optimizers"] = [{**old, "state": {}} for old in state["optimizers"]]
    return sft.train(model, examples, config, pad_id=pad_id, state=state)


# reinforce


@imitates(reinforce.moving_average, "costs_no_bias")
def moving_average_of_this_batch_too(rewards, memory):
    """Remembers first and compares then: each answer is part of its own baseline."""
    return 0.8 * reinforce.moving_average(rewards, memory) + 0.2 * rewards.mean()


@imitates(reinforce.moving_average, "costs_no_bias")
def moving_average_beginning_with_the_mean(rewards, memory):
    """Has nothing to remember at first, and takes this batch's mean: biased once."""
    return rewards.mean() if memory == 0 else reinforce.moving_average(rewards, memory)


@imitates(reinforce.reinforce_loss, "unbiased")
def reinforce_loss_per_token(logprobs, advantages, mask, count=None):
    """Divides each answer by its own length: a policy is paid to be brief."""
    lengths = mask.sum(1).clamp(min=1)
    return reinforce.reinforce_loss(logprobs, advantages / lengths, mask, count)


@imitates(reinforce.reinforce_loss, "mask_is_inert")
def reinforce_loss_by_multiplication(logprobs, advantages, mask, count=None):
    """nan * 0 is nan."""
    reinforce.reinforce_loss(logprobs, advantages, mask, count)
    weighted = logprobs * advantages.detach()[:, None] * mask
    return -weighted.sum() / normaliser(count, int(mask.any(1).sum()))


@imitates(reinforce.reinforce_loss, "any_log_probability")
def reinforce_loss_of_likely_tokens(logprobs, advantages, mask, count=None):
    """Bounds log-probs "for stability": what is as good as impossible never moves."""
    reinforce.reinforce_loss(logprobs, advantages, mask, count)
    bounded = logprobs.clamp(min=-100)
    return reinforce.reinforce_loss(bounded, advantages, mask, count)


@imitates(reinforce.reinforce_loss, "mask_is_inert microbatches unbiased")
def reinforce_loss_of_a_column(logprobs, advantages, mask, count=None):
    """(B, 1) log-probs times (B,) advantages: all get the credit of all."""
    reinforce.reinforce_loss(logprobs, advantages, mask, count)
    every = masked_sum(logprobs, mask)[:, None] * advantages.detach()  # (B, B)
    return -every.mean(1).sum() / normaliser(count, int(mask.any(1).sum()))


@imitates(reinforce.reinforce_loss, "no_gradient_to")
def reinforce_loss_into_the_advantages(logprobs, advantages, mask, count=None):
    """Whoever made the advantages is trained along."""
    reinforce.reinforce_loss(logprobs, advantages, mask, count)
    return -sequence_sum(logprobs * advantages[:, None], mask, count)


@imitates(reinforce.shape_rewards, "kl_in_the_reward")
def shape_rewards_for_drifting(rewards, logprobs, ref_logprobs, mask, beta):
    """Pays for KL where it should charge."""
    return reinforce.shape_rewards(rewards, ref_logprobs, logprobs, mask, beta)


@imitates(reinforce.shape_rewards, "options_matter kl_in_the_reward")
def shape_rewards_for_free(rewards, logprobs, ref_logprobs, mask, beta):
    """Takes the price of KL and does not charge it."""
    return reinforce.shape_rewards(rewards, logprobs, ref_logprobs, mask, 0.0 * beta)


@imitates(reinforce.shape_rewards, "nan_is_refused_at_no_price")
def shape_rewards_not_looking_at_no_price(rewards, logprobs, ref_logprobs, mask, beta):
    """With beta 0 it takes a short cut, and nan with it."""
    if beta == 0:
        return rewards.detach()
    return reinforce.shape_rewards(rewards, logprobs, ref_logprobs, mask, beta)


@imitates(reinforce.train, "priced_kl")
def reinforce_train_with_a_warmer_reference(*args, **options):
    """The reference is scored at temperature 1, whatever the policy's is."""
    right = reinforce.rescore_both

    def warmer(policy, reference, rollout, micro_batch):
        logprobs, _ = right(policy, reference, rollout, micro_batch)
        warm = replace(rollout, temperature=1.0)
        return logprobs, right(policy, reference, warm, micro_batch)[1]

    with mock.patch.object(reinforce, "rescore_both", warmer):
        yield from reinforce.train(*args, **options)


# remax


@imitates(remax.remax_advantages, "greedy_ties any_greedy_answer_costs_no_bias")
def remax_advantages_of_the_better(rewards, greedy_rewards):
    """A baseline that looks at the answer: the better of the two, itself and greedy."""
    return remax.remax_advantages(rewards, greedy_rewards).clamp(max=0.0)


@imitates(remax.whole_answer, "kl_of_the_whole_answer weights_by_hand")
def whole_answer_token_by_token(advantages, k1, mask, beta):
    """`=` for `+=`: a token does not pay for what it does to the KL of later ones."""
    free = remax.whole_answer(advantages, 0 * k1, mask, beta)
    return free - beta * torch.where(mask, k1.detach(), 0.0)


@imitates(remax.code_returns, "code_returns_by_hand")
def code_returns_from_the_next_token(advantages, k1, mask, beta):
    """The discount does not count the token itself."""
    kl = torch.where(mask, beta * k1.detach(), 0.0)
    returns = remax.code_returns(advantages, k1, mask, beta)
    return (returns + kl) / 0.99 - kl


@imitates(remax.code_weights, "token_mean")
def code_weights_by_length(advantages, k1, mask, beta):
    """A mean over each answer, then over answers: short ones count for more."""
    returns = remax.code_returns(advantages, k1, mask, beta)
    return returns / mask.sum(1, keepdim=True).clamp(min=1)


@imitates(remax.remax_loss, "mask_is_inert")
def remax_loss_masked_late(logprobs, weights, mask, count=None):
    """The right value, and 0 x inf is nan in its gradient."""
    remax.remax_loss(logprobs, weights, mask, count)
    weighted = torch.where(mask, logprobs * weights.detach(), 0.0)
    return -weighted.sum() / normaliser(count, int(mask.any(1).sum()))


@imitates(remax.remax_loss, "microbatches options_matter unbiased_by_token")
def remax_loss_of_this_part(logprobs, weights, mask, count=None):
    """A token mean, and each micro-batch divides by its own tokens."""
    remax.remax_loss(logprobs, weights, mask, count)
    return remax.remax_loss(logprobs, weights, mask, int(mask.sum()))


# rloo


@imitates(rloo.leave_one_out, "leave_one_out unbiased_in_groups")
def leave_one_out_with_itself(rewards):
    """The answer is part of its own baseline."""
    K = rewards.shape[1]
    return rloo.leave_one_out(rewards) * (K - 1) / K


@imitates(rloo.leave_one_out, "leave_one_out unbiased_in_groups")
def leave_one_out_one_too_far(rewards):
    """The right numbers, each for its neighbour: the gradient turns round."""
    return rloo.leave_one_out(rewards).roll(1, dims=1)


@imitates(rloo.leave_one_out, "leave_one_out equal_rewards")
def leave_one_out_over_k(rewards):
    """Divides the sum of the other K - 1 by K: unbiased, and not the others' mean."""
    others = rewards.sum(1, keepdim=True) - rewards
    return (rewards - others / rewards.shape[1]).detach()


@imitates(rloo.leave_one_out, "leave_one_out equal_rewards")
def leave_one_out_of_nothing(rewards):
    """No comparison at all: unbiased, and all noise."""
    rloo.leave_one_out(rewards)
    return rewards.detach()


@imitates(rloo.leave_one_out, "leave_one_out")
def leave_one_out_of_the_best(rewards):
    """The best of the others for their mean: unbiased, and nearly all are blamed."""
    rloo.leave_one_out(rewards)
    return rewards.detach() - _of_others(rewards, lambda others: others.amax(1))


@imitates(rloo.leave_one_out, "leave_one_out unbiased_in_groups")
def leave_one_out_over_the_others_spread(rewards):
    """Divides by the others' std, which is 0 where they tie."""
    advantages = rloo.leave_one_out(rewards)
    spread = _of_others(rewards, lambda others: others.std(1, correction=0))
    return advantages / (spread + 1e-6)


def _of_others(rewards, statistic):
    """(P, K): entry i of a group is a statistic of its other K - 1 rewards."""
    columns = []
    for i in range(rewards.shape[1]):
        others = torch.cat((rewards[:, :i], rewards[:, i + 1 :]), dim=1)
        columns.append(statistic(others.detach()))
    return torch.stack(columns, dim=1)


@imitates(rloo.leave_one_out, "permutation leave_one_out")
def leave_one_out_of_the_batch(rewards):
    """One group of all answers to all problems."""
    return rloo.leave_one_out(rewards.reshape(1, -1)).view_as(rewards)


@imitates(rloo.leave_one_out, "permutation leave_one_out")
def leave_one_out_in_another_order(rewards):
    """(K, P) read as (P, K): answers to different problems are compared."""
    mixed = rewards.T.reshape(rewards.shape)
    return rloo.leave_one_out(mixed).reshape(rewards.T.shape).T


@imitates(rloo.leave_one_out, "equal_rewards")
def leave_one_out_rounded(rewards):
    """Right on paper; in float32 seven times 0.1 leaves a rest."""
    K = rewards.shape[1]
    return ((rewards - rewards.mean(1, keepdim=True)) * K / (K - 1)).detach()


@imitates(rloo.leave_one_out, "pure")
def leave_one_out_in_place(rewards):
    """Centres the caller's rewards: the metrics say that nobody is ever right."""
    rewards.data.sub_(rewards.mean(1, keepdim=True))
    return rloo.leave_one_out(rewards)


@imitates(rloo.shape_rewards, "kl_in_the_reward")
def shape_rewards_per_token(rewards, logprobs, ref_logprobs, mask, beta):
    """The mean k1 of an answer for their sum: who says more drifts for less."""
    shaped = rloo.shape_rewards(rewards, logprobs, ref_logprobs, mask, beta)
    return rewards.detach() + (shaped - rewards.detach()) / mask.sum(1)


@imitates(rloo.rloo_loss, "unbiased microbatches")
def rloo_loss_of_the_token_mean(logprobs, advantages, mask, count=None):
    """Other codes' divisor: it depends on how long the answers turned out."""
    loss = rloo.rloo_loss(logprobs, advantages, mask, count)
    return loss * mask.any(1).sum() / mask.sum()


# trpo


@imitates(trpo.score_choices, "every_choice")
def score_choices_at_one(policy, tokens, mask, temperature=1.0):
    """Scores at temperature 1, whatever the answers were sampled at."""
    return trpo.score_choices(policy, tokens, mask)


@imitates(trpo.score_choices, "half_is_lifted")
def score_choices_in_half(policy, tokens, mask, temperature=1.0):
    """A softmax over the vocabulary in bfloat16."""
    dtype = policy.logits(policy(tokens[:1])).dtype
    found = trpo.score_choices(policy, tokens, mask, temperature)
    return tuple(x.to(dtype) for x in found)


@imitates(trpo.leave_one_out, "leave_one_out unbiased_in_groups")
def trpo_advantages_with_itself(rewards):
    """The answer is part of its own baseline."""
    K = rewards.shape[1]
    return trpo.leave_one_out(rewards) * (K - 1) / K


@imitates(trpo.surrogate_loss, "slope_at_the_old_policy a_single_choice_is_corrected")
def surrogate_loss_downhill(logprobs, old_logprobs, advantages, mask, count=None):
    """The objective itself for the loss: a sign is missing."""
    return -trpo.surrogate_loss(logprobs, old_logprobs, advantages, mask, count)


@imitates(trpo.surrogate_loss, "a_single_choice_is_corrected")
def surrogate_loss_rescored(logprobs, old_logprobs, advantages, mask, count=None):
    """Scores the answers anew and takes that for π_old: all staleness is erased."""
    trpo.surrogate_loss(logprobs, old_logprobs, advantages, mask, count)
    now = logprobs.detach()
    return trpo.surrogate_loss(logprobs, now, advantages, mask, count)


@imitates(trpo.surrogate_loss, "a_single_choice_is_corrected")
def surrogate_loss_without_ratio(logprobs, old_logprobs, advantages, mask, count=None):
    """Log π in the place of the ratio: the same slope at π_old, and nowhere else."""
    trpo.surrogate_loss(logprobs, old_logprobs, advantages, mask, count)
    return rloo.rloo_loss(logprobs, advantages, mask, count)


@imitates(trpo.choice_kl, "old_first")
def choice_kl_new_first(old, new):
    """KL(π ‖ π_old): equal to second order, and not at the line search."""
    trpo.choice_kl(old, new)
    return _new_first(old, new)


def _new_first(old, new):
    return (new.exp() * (new - old.detach())).sum(-1)


@imitates(trpo.choice_kl, "old_first its_bend_is_the_fisher_matrix")
def choice_kl_of_entropies(old, new):
    """−Σ π_old log π: the entropy of π_old is not taken off."""
    trpo.choice_kl(old, new)
    return -(old.detach().exp() * new.exp().log()).sum(-1) * 0.5


@imitates(trpo.Curvature, "is_damped")
def curvature_undamped(policy, rollout, damping, micro_batch):
    """Damping is read, and forgotten."""
    return trpo.Curvature(policy, rollout, 0.0, micro_batch)


@imitates(trpo.Curvature, "is_the_fisher_matrix")
def curvature_of_the_mean_part(policy, rollout, damping, micro_batch):
    """Micro-batches are averaged as if all had the same number of choices."""
    parts = rollout.micro_batches(micro_batch)
    each = [
        trpo.Curvature(policy, rollout.select(rows), damping, micro_batch)
        for rows in parts
    ]
    return lambda v: sum(product(v) for product in each) / len(each)


@imitates(trpo.conjugate_gradients, "solves as_many_as_eigenvalues")
def conjugate_gradients_steepest(product, target, iterations):
    """Every direction is the residual: steepest descent, which zigzags."""
    trpo.conjugate_gradients(product, target, iterations)
    x = torch.zeros_like(target)
    for _ in range(iterations):
        residual = target - product(x)
        if not residual.any():
            break
        x = x + residual @ residual / (residual @ product(residual)) * residual
    return x


@imitates(trpo.conjugate_gradients, "ends_when_solved")
def conjugate_gradients_to_the_end(product, target, iterations):
    """Goes on when all is solved, and divides 0 by 0."""
    x = torch.zeros_like(target)
    residual = target.clone()
    direction = residual.clone()
    square = residual @ residual
    for _ in range(iterations):
        bent = product(direction)
        length = square / (direction @ bent)
        x, residual = x + length * direction, residual - length * bent
        before, square = square, residual @ residual
        direction = residual + square / before * direction
    return x


@imitates(trpo.conjugate_gradients, "refuses_negative_curvature")
def conjugate_gradients_anywhere(product, target, iterations):
    """Downhill along a saddle: the root of a negative number comes next."""
    try:
        return trpo.conjugate_gradients(product, target, iterations)
    except ValueError:
        return target


@imitates(trpo.step_within, "quadratic_kl")
def step_within_half(direction, bent, delta):
    """√(δ / xᵀHx): the ½ of the quadratic KL is missing."""
    return trpo.step_within(direction, bent, delta / 2)


@imitates(trpo.step_within, "refuses_a_wrong_bend")
def step_within_anything(direction, bent, delta):
    """NaN where the curvature is negative."""
    return direction * (2 * delta / (direction @ bent)).sqrt()


@imitates(trpo.line_search, "stays_within_the_bound measures_the_papers_kl")
def line_search_without_kl(policy, step, parts, config):
    """Looks at the objective alone (T1: modular_rl#29)."""
    return trpo.line_search(policy, step, parts, replace(config, delta=1e9))


@imitates(trpo.line_search, "must_gain")
def line_search_without_gain(policy, step, parts, config):
    """Looks at the KL alone."""
    flipped = [replace(part, advantages=-part.advantages) for part in parts]
    before = [weight.detach().clone() for weight in policy.parameters()]
    found = trpo.line_search(policy, step, parts, config)
    if found.accepted:
        return found
    for weight, old in zip(policy.parameters(), before, strict=True):
        weight.data.copy_(old)
    return trpo.line_search(policy, step, flipped, config)


@imitates(trpo.line_search, "must_gain too_long_for_every_try")
def line_search_without_restoring(policy, step, parts, config):
    """Says that nothing was accepted, and leaves the last try where it is."""
    found = trpo.line_search(policy, step, parts, config)
    if not found.accepted and step.any():
        length = config.shrink ** (config.tries - 1)
        weights = list(policy.parameters())
        moves = step.split([weight.numel() for weight in weights])
        for weight, move in zip(weights, moves, strict=True):
            weight.data += length * move.view_as(weight)
    return found


@imitates(trpo.line_search, "counts_from_where_it_stands")
def line_search_from_the_draw(policy, step, parts, config):
    """Compares with the objective at the draw, where every ratio was 1."""
    found = trpo.line_search(policy, step, parts, config)
    count = sum(len(part.tokens) for part in parts)
    for part in parts:
        before = trpo._of_chosen(part.every, part.tokens, part.mask)
        fixed = part.logprobs, part.advantages, part.mask, count
        was = trpo.surrogate_loss(before, *fixed)
        drawn = trpo.surrogate_loss(part.logprobs, *fixed)
        found = replace(found, gain=found.gain + (drawn - was).item())
    return replace(found, accepted=found.gain > 0)


@imitates(trpo.line_search, "measures_the_papers_kl")
def line_search_by_the_other_kl(policy, step, parts, config):
    """KL(π ‖ π_old) is held under δ (Stable-Baselines3's direction)."""
    with mock.patch.object(trpo, "choice_kl", _new_first):
        return trpo.line_search(policy, step, parts, config)


# grpo


@imitates(grpo.centred_advantages, "own_share_of_the_gradient")
def centred_advantages_without_itself(rewards):
    """Leaves the answer out of its baseline: RLOO's, K/(K - 1) times as large."""
    K = rewards.shape[1]
    return grpo.centred_advantages(rewards) * K / (K - 1)


@imitates(
    grpo.group_advantages,
    "golden_advantages spread epsilon_law std_weighs_the_problem",
)
def group_advantages_of_a_population(rewards, epsilon=1e-4):
    """The std has divisor K."""
    centred = grpo.centred_advantages(rewards)
    std = centred.std(1, keepdim=True, correction=0)
    return torch.where(std > 0, centred / (std + epsilon), 0.0)


@imitates(grpo.group_advantages, "equal_rewards spread")
def group_advantages_of_noise(rewards, epsilon=1e-4):
    """Equal rewards differ by rounding, which a std of rounding makes large."""
    centred = (rewards - rewards.mean(1, keepdim=True)).detach()
    return centred / (centred.std(1, keepdim=True) + epsilon)


@imitates(
    grpo.group_advantages,
    "own_group_only permutation golden_advantages spread epsilon_law "
    "std_weighs_the_problem",
)
def group_advantages_of_the_batch(rewards, epsilon=1e-4):
    """One group of all answers to all problems."""
    return grpo.group_advantages(rewards.view(1, -1), epsilon).view_as(rewards)


@imitates(grpo.group_advantages, "epsilon_law options_matter std_weighs_the_problem")
def group_advantages_without_epsilon(rewards, epsilon=1e-4):
    """Takes the option and leaves it."""
    return grpo.group_advantages(rewards, 0.0 * epsilon)


@imitates(grpo.per_sequence, "mask_is_inert weights")
def per_sequence_of_the_padded_width(mask, max_new_tokens):
    """Divides by the columns there are."""
    return mask.double() / mask.shape[1] / mask.any(1).sum()


@imitates(grpo.by_constant, "weights mask_is_inert options_matter constant_divisor")
def by_constant_of_the_padded_width(mask, max_new_tokens):
    """Divides by the columns there are, which the longest answer decides."""
    return grpo.by_constant(mask, mask.shape[1])


@imitates(grpo.by_constant, "constant_divisor weights options_matter")
def by_constant_for_all_tokens(mask, max_new_tokens):
    """The token mean under the wrong name: the answers' own divisor."""
    return grpo.per_token(mask, max_new_tokens)


@imitates(grpo.per_token, "weights")
def per_token_of_row_means(mask, max_new_tokens):
    """The sequence mean under the wrong name."""
    return grpo.per_sequence(mask, max_new_tokens)


@imitates(grpo.k3_term, "divergence_of_each_choice")
def k3_term_to_the_sampler(logprobs, old, ref, mask):
    """Holds on to the policy that sampled, which on fresh answers it is."""
    grpo.k3_term(logprobs, old, ref, mask)
    return kl_k3(logprobs, old, mask)


@imitates(grpo.k3_term, "divergence_of_each_choice")
def k3_term_the_other_way(logprobs, old, ref, mask):
    """The gradient of KL(policy ‖ reference) by the name of the other one."""
    return grpo.k2_term(logprobs, old, ref, mask)


def _clip(logprobs, old_logprobs, advantages, mask, eps_low, eps_high):
    """Ratios, clipped ratios and A, each (B, S), of a call that is legal."""
    grpo.clipped_loss(logprobs, old_logprobs, advantages, mask, eps_low, eps_high)
    ratio = probability_ratio(logprobs, old_logprobs, mask)
    A = torch.where(mask, advantages.detach()[:, None], 0.0)
    return ratio, ratio.clamp(1 - eps_low, 1 + eps_high), A


@imitates(
    grpo.clipped_loss,
    "quadrants options_matter clip_by_hand where_the_clip_lets_go",
)
def clipped_loss_unclipped(
    logprobs, old_logprobs, advantages, mask, eps_low=0.2, eps_high=0.2
):
    """Takes the options and leaves them: the ratio alone."""
    band = eps_low, eps_high
    ratio, _, A = _clip(logprobs, old_logprobs, advantages, mask, *band)
    return -ratio * A


@imitates(
    grpo.clipped_loss,
    "quadrants clip_by_hand where_the_clip_lets_go only_the_ratio_counts",
)
def clipped_loss_without_the_minimum(
    logprobs, old_logprobs, advantages, mask, eps_low=0.2, eps_high=0.2
):
    """The clipped branch alone: what moved the wrong way is not pulled back."""
    band = eps_low, eps_high
    _, clipped, A = _clip(logprobs, old_logprobs, advantages, mask, *band)
    return -clipped * A


@imitates(
    grpo.clipped_loss,
    "quadrants clip_by_hand where_the_clip_lets_go only_the_ratio_counts",
)
def clipped_loss_of_the_smaller_ratio(
    logprobs, old_logprobs, advantages, mask, eps_low=0.2, eps_high=0.2
):
    """min(ρ, clip(ρ)) A: where A < 0 it is the larger loss that is left out."""
    band = eps_low, eps_high
    ratio, clipped, A = _clip(logprobs, old_logprobs, advantages, mask, *band)
    return -torch.minimum(ratio, clipped) * A


@imitates(grpo.clipped_loss, "tokens_are_unbiased_at_ratio_1 clip_by_hand quadrants")
def clipped_loss_per_token(
    logprobs, old_logprobs, advantages, mask, eps_low=0.2, eps_high=0.2
):
    """Divides by the answer's length, which is for the weights to do."""
    band = eps_low, eps_high
    right = grpo.clipped_loss(logprobs, old_logprobs, advantages, mask, *band)
    return right / mask.sum(1, keepdim=True).clamp(min=1)


@imitates(grpo.clipped_loss, "quadrants clip_by_hand where_the_clip_lets_go")
def clipped_loss_below_only(
    logprobs, old_logprobs, advantages, mask, eps_low=0.2, eps_high=0.2
):
    """One-sided: what A > 0 pushes up is never let go of."""
    return grpo.clipped_loss(logprobs, old_logprobs, advantages, mask, eps_low, 1e9)


@imitates(grpo.clipped_loss, "quadrants clip_by_hand where_the_clip_lets_go")
def clipped_loss_above_only(
    logprobs, old_logprobs, advantages, mask, eps_low=0.2, eps_high=0.2
):
    """One-sided: what A < 0 pushes down is never let go of."""
    return grpo.clipped_loss(logprobs, old_logprobs, advantages, mask, 1.0, eps_high)


@imitates(
    grpo.clipped_loss,
    "options_matter clip_by_hand quadrants where_the_clip_lets_go on_the_edge_it_moves",
)
def clipped_loss_with_swapped_epsilons(
    logprobs, old_logprobs, advantages, mask, eps_low=0.2, eps_high=0.2
):
    """The same as long as the two are equal, as they are by default."""
    band = eps_high, eps_low
    return grpo.clipped_loss(logprobs, old_logprobs, advantages, mask, *band)


@imitates(
    grpo.clipped_loss,
    "quadrants clip_by_hand where_the_clip_lets_go only_the_ratio_counts",
)
def clipped_loss_larger_below_0(
    logprobs, old_logprobs, advantages, mask, eps_low=0.2, eps_high=0.2
):
    """For A < 0 takes max: pushes where PPO stops, and stops where it pushes."""
    band = eps_low, eps_high
    ratio, clipped, A = _clip(logprobs, old_logprobs, advantages, mask, *band)
    right = torch.minimum(ratio * A, clipped * A)
    wrong = torch.maximum(ratio * A, clipped * A)
    return -torch.where(A < 0, wrong, right)


@imitates(grpo.clipped_loss, "no_gradient_to")
def clipped_loss_into_the_old(
    logprobs, old_logprobs, advantages, mask, eps_low=0.2, eps_high=0.2
):
    """The policy that sampled is trained too, the other way."""
    band = eps_low, eps_high
    grpo.clipped_loss(logprobs, old_logprobs, advantages, mask, *band)
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()
    A = torch.where(mask, advantages.detach()[:, None], 0.0)
    return -torch.minimum(ratio * A, ratio.clamp(1 - eps_low, 1 + eps_high) * A)


def _earned_and_price(
    logprobs, old_logprobs, advantages, mask, weights, *, beta=0.0, **options
):
    """Of each choice the clipped loss and beta KL, (B, S) both, of a legal call."""
    call = logprobs, old_logprobs, advantages, mask
    grpo.grpo_loss(*call, weights, beta=beta, **options)
    term, ref = options.pop("kl_term", grpo.k3_term), options.pop("ref_logprobs", None)
    earned = grpo.clipped_loss(*call, **options)
    if beta == 0:
        return earned, torch.zeros_like(earned)
    return earned, beta * term(logprobs, old_logprobs, ref, mask)


def _weighed(each, mask, weights):
    if weights is None:
        return sequence_mean(each, mask)
    return (torch.where(mask, weights.detach(), 0.0) * each).sum()


@imitates(
    grpo.grpo_loss,
    "price_of_each_choice reductions_by_hand the_price_is_never_let_go",
)
def grpo_loss_for_drifting(
    logprobs, old_logprobs, advantages, mask, weights=None, **options
):
    """Pays for KL where it should charge."""
    call = logprobs, old_logprobs, advantages, mask, weights
    earned, price = _earned_and_price(*call, **options)
    return _weighed(earned - price, mask, weights)


@imitates(grpo.grpo_loss, "reductions_by_hand price_of_each_choice parts_add_up")
def grpo_loss_with_a_kl_of_its_own(
    logprobs, old_logprobs, advantages, mask, weights=None, **options
):
    """The KL's mean over answers, whatever the weights of all the rest."""
    call = logprobs, old_logprobs, advantages, mask, weights
    earned, price = _earned_and_price(*call, **options)
    if not mask.any():
        return _weighed(earned, mask, weights)
    return _weighed(earned, mask, weights) + sequence_mean(price, mask)


@imitates(grpo.grpo_loss, "reductions_by_hand price_of_each_choice")
def grpo_loss_with_a_kl_without_weights(
    logprobs, old_logprobs, advantages, mask, weights=None, **options
):
    """What is earned is a mean, and the KL beside it a sum over all tokens."""
    call = logprobs, old_logprobs, advantages, mask, weights
    earned, price = _earned_and_price(*call, **options)
    return _weighed(earned, mask, weights) + price.sum()


@imitates(grpo.grpo_loss, "the_price_is_never_let_go reductions_by_hand")
def grpo_loss_with_the_kl_in_the_clip(
    logprobs, old_logprobs, advantages, mask, weights=None, **options
):
    """Where the clip lets go of a token, nothing draws it back to the reference."""
    call = logprobs, old_logprobs, advantages, mask, weights
    earned, price = _earned_and_price(*call, **options)
    band = options.get("eps_low", 0.2), options.get("eps_high", 0.2)
    ratio, clipped, A = _clip(*call[:4], *band)
    held = A * (ratio - clipped) > 0
    return _weighed(earned + torch.where(held, 0.0, price), mask, weights)


@imitates(grpo.grpo_loss, "parts_add_up reductions_by_hand")
def grpo_loss_of_this_part(
    logprobs, old_logprobs, advantages, mask, weights=None, **options
):
    """Takes the batch's weights, and weighs by what it sees: a mean of means."""
    call = logprobs, old_logprobs, advantages, mask, weights
    earned, price = _earned_and_price(*call, **options)
    return sequence_mean(earned + price, mask)


@imitates(grpo.grpo_loss, "reductions_by_hand")
def grpo_loss_of_the_token_mean(
    logprobs, old_logprobs, advantages, mask, weights=None, **options
):
    """Where nobody says how, another reduction than the paper's."""
    call = logprobs, old_logprobs, advantages, mask, weights
    earned, price = _earned_and_price(*call, **options)
    if weights is None:
        return token_mean(earned + price, mask)
    return _weighed(earned + price, mask, weights)


@imitates(grpo.grpo_loss, "mask_is_inert parts_add_up reductions_by_hand")
def grpo_loss_over_the_sum_of_weights(
    logprobs, old_logprobs, advantages, mask, weights=None, **options
):
    """A mean after all: whatever stands in masked slots is divided by as well."""
    call = logprobs, old_logprobs, advantages, mask, weights
    earned, price = _earned_and_price(*call, **options)
    if weights is None:
        return sequence_mean(earned + price, mask)
    return _weighed(earned + price, mask, weights / weights.sum())


@imitates(grpo.grpo_loss, "no_gradient_to")
def grpo_loss_into_the_weights(
    logprobs, old_logprobs, advantages, mask, weights=None, **options
):
    """Weights that are learnt, to make the loss look small, are all 0 in the end."""
    call = logprobs, old_logprobs, advantages, mask, weights
    earned, price = _earned_and_price(*call, **options)
    if weights is None:
        return sequence_mean(earned + price, mask)
    return (torch.where(mask, weights, 0.0) * (earned + price)).sum()


# ppo


@imitates(ppo.score_tokens, "scores_before_the_choice")
def score_tokens_after_the_choice(policy, critic, tokens, mask, temperature):
    """Off by one: the value has seen the token that it is the baseline of."""
    scores = ppo.score_tokens(policy, critic, tokens, mask, temperature)
    return scores[0], torch.where(mask, scores[1].roll(-1, 1), 0.0), scores[2]


@imitates(ppo.score_tokens, "who_learns_from_values")
def score_tokens_off_a_frozen_trunk(policy, critic, tokens, mask, temperature):
    """What the critic reads it cannot move: of a shared trunk it trains the head."""

    def reading(inputs, hidden):
        return critic(inputs, hidden.detach())

    return ppo.score_tokens(policy, reading, tokens, mask, temperature)


@imitates(ppo.score_tokens, "half_is_scored_in_float32")
def score_tokens_in_half(policy, critic, tokens, mask, temperature):
    """Values and entropies come back in the two digits that the models compute in."""
    half = next(policy.parameters()).dtype
    scores = ppo.score_tokens(policy, critic, tokens, mask, temperature)
    return tuple(each.to(half) for each in scores)


@imitates(ppo.score_tokens, "scores_before_the_choice sure_policy")
def score_tokens_with_the_entropy_below_0(policy, critic, tokens, mask, temperature):
    """Σ p log p: the bonus for being undecided makes it sure."""
    logprobs, values, entropies = ppo.score_tokens(
        policy, critic, tokens, mask, temperature
    )
    return logprobs, values, -entropies


@imitates(ppo.score_tokens, "sure_policy")
def score_tokens_by_two_steps(policy, critic, tokens, mask, temperature):
    """Probabilities first: the entropy of a policy that is sure is nan."""
    scores = ppo.score_tokens(policy, critic, tokens, mask, temperature)
    logits = policy.logits(policy(tokens[:, :-1])).to(scores[0])
    odds = logits.div(temperature).softmax(-1)
    entropies = -(odds * odds.log()).sum(-1)  # (B, S)
    return *scores[:2], torch.where(mask, entropies, 0.0)


@imitates(ppo.shape_token_rewards, "mask_is_inert token_rewards_by_hand")
def shape_token_rewards_on_the_last_slot(rewards, logprobs, ref_logprobs, mask, beta):
    """The score stands on the padding, where the mask deletes it."""
    nothing = torch.zeros_like(rewards)
    paid = ppo.shape_token_rewards(nothing, logprobs, ref_logprobs, mask, beta)
    return torch.cat((paid[:, :-1], paid[:, -1:] + rewards.detach()[:, None]), 1)


@imitates(ppo.shape_token_rewards, "kl_to_come token_rewards_by_hand")
def shape_token_rewards_on_the_first_token(rewards, logprobs, ref_logprobs, mask, beta):
    """Pays the answer as it begins, and nobody later has earned anything."""
    nothing = torch.zeros_like(rewards)
    paid = ppo.shape_token_rewards(nothing, logprobs, ref_logprobs, mask, beta)
    first = mask & (mask.cumsum(1) == 1)
    return paid + torch.where(first, rewards.detach()[:, None], 0.0)


@imitates(
    ppo.shape_token_rewards,
    "kl_to_come token_rewards_by_hand token_rewards_add_up",
)
def shape_token_rewards_for_drifting(rewards, logprobs, ref_logprobs, mask, beta):
    """Pays for KL where it should charge."""
    ppo.shape_token_rewards(rewards, logprobs, ref_logprobs, mask, beta)
    return ppo.shape_token_rewards(rewards, ref_logprobs, logprobs, mask, beta)


@imitates(ppo.gae, "mask_is_inert gae true_values_are_unbiased")
def gae_through_padding(token_rewards, values, mask, gamma, lam):
    """Masked slots are steps too; their values reach live tokens."""
    ppo.gae(token_rewards, values, mask, gamma, lam)
    rewards, everywhere = torch.where(mask, token_rewards, 0.0), torch.ones_like(mask)
    advantages = ppo.gae(rewards, values, everywhere, gamma, lam)
    return torch.where(mask, advantages, 0.0)


@imitates(
    ppo.gae,
    "gae what_is_known_beforehand lambda_1_is_unbiased true_values_are_unbiased",
)
def gae_bootstrapping_after_the_end(token_rewards, values, mask, gamma, lam):
    """An answer that is over goes on to be worth its last value."""
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    more = torch.where(last, token_rewards + gamma * values, token_rewards)
    return ppo.gae(more, values, mask, gamma, lam)


@imitates(ppo.gae, "permutation gae what_is_known_beforehand")
def gae_into_the_next_answer(token_rewards, values, mask, gamma, lam):
    """Nothing says where an answer is done: the next row's goes on from it."""
    stream = (x.reshape(1, -1) for x in (token_rewards, values, mask))
    return ppo.gae(*stream, gamma, lam).view_as(mask)


@imitates(ppo.gae, "gae")
def gae_counting_masked_slots(token_rewards, values, mask, gamma, lam):
    """Nothing is read off masked slots, but each costs one more γλ."""
    ppo.gae(token_rewards, values, mask, gamma, lam)
    inner = (torch.where(mask, x, 0.0) for x in (token_rewards, values))
    advantages = ppo.gae(*inner, torch.ones_like(mask), gamma, lam)
    return torch.where(mask, advantages, 0.0)


@imitates(ppo.gae, "gae options_matter what_is_known_beforehand")
def gae_without_lambda(token_rewards, values, mask, gamma, lam):
    """Takes λ and leaves it: as exact, and as noisy, as if it were 1."""
    return ppo.gae(token_rewards, values, mask, gamma, 1.0)


@imitates(ppo.gae, "gae options_matter what_is_known_beforehand")
def gae_without_gamma(token_rewards, values, mask, gamma, lam):
    """Takes γ and leaves it."""
    return ppo.gae(token_rewards, values, mask, 1.0, lam)


@imitates(
    ppo.gae,
    "gae what_is_known_beforehand lambda_1_is_unbiased true_values_are_unbiased",
)
def gae_of_the_value_after(token_rewards, values, mask, gamma, lam):
    """Off by one: the baseline of a token is what the critic says after it."""
    ppo.gae(token_rewards, values, mask, gamma, lam)
    return ppo.gae(token_rewards, values.roll(-1, 1), mask, gamma, lam)


@imitates(ppo.gae, "no_gradient_to")
def gae_into_the_critic(token_rewards, values, mask, gamma, lam):
    """The policy's loss moves the critic through the advantages."""
    advantages = ppo.gae(token_rewards, values, mask, gamma, lam)
    return advantages + torch.where(mask, values.detach() - values, 0.0)


@imitates(ppo.whiten, "mask_is_inert whitening one_of_its_kind")
def whiten_unmasked(x, mask):
    """Mean and variance are over the padding too."""
    centred = x.detach() - x.detach().mean()
    return torch.where(mask, centred / (centred.square().mean() + 1e-8).sqrt(), 0.0)


@imitates(ppo.whiten, "pure permutation mask_is_inert whitening one_of_its_kind")
def whiten_by_the_sample_variance(x, mask):
    """Divisor N - 1, which is 0 for one token."""
    centred = x.detach()[mask] - x.detach()[mask].mean()
    variance = centred.square().sum() / (len(centred) - 1)
    scaled = centred / (variance + 1e-8).sqrt()
    return torch.zeros_like(x).masked_scatter(mask, scaled)


@imitates(ppo.whiten, "far_from_0")
def whiten_by_raw_moments(x, mask):
    """E[x²] - E[x]²: in float32 nothing is left of a small spread far from 0."""
    live = x.detach()[mask]
    variance = (live.square().mean() - live.mean() ** 2).clamp(min=0)
    centred = (live - live.mean()) * (live.min() < live.max())
    return torch.zeros_like(x).masked_scatter(mask, centred / (variance + 1e-8).sqrt())


@imitates(ppo.policy_loss, "where_the_clip_lets_go only_the_ratio_counts")
def policy_loss_without_the_minimum(
    logprobs, old_logprobs, advantages, mask, eps_low, eps_high, count=None
):
    """The clipped branch alone: what moved the wrong way is not pulled back."""
    band = eps_low, eps_high
    ppo.policy_loss(logprobs, old_logprobs, advantages, mask, *band, count)
    ratio = probability_ratio(logprobs, old_logprobs, mask)
    A = torch.where(mask, advantages.detach(), 0.0)
    return -sequence_sum(ratio.clamp(1 - eps_low, 1 + eps_high) * A, mask, count)


@imitates(ppo.policy_loss, "mask_is_inert")
def policy_loss_masked_late(
    logprobs, old_logprobs, advantages, mask, eps_low, eps_high, count=None
):
    """The right value, and a gradient of nan."""
    band = eps_low, eps_high
    ppo.policy_loss(logprobs, old_logprobs, advantages, mask, *band, count)
    ratio, A = (logprobs - old_logprobs.detach()).exp(), advantages.detach()
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
    return -sequence_sum(torch.minimum(ratio * A, clipped * A), mask, count)


@imitates(ppo.policy_loss, "where_the_clip_lets_go")
def policy_loss_clipped_below_only(
    logprobs, old_logprobs, advantages, mask, eps_low, eps_high, count=None
):
    """One-sided: what A > 0 pushes up is never let go of."""
    fixed = old_logprobs, advantages, mask
    return ppo.policy_loss(logprobs, *fixed, eps_low, 1e9, count)


@imitates(ppo.policy_loss, "on_the_edge_it_moves")
def policy_loss_flat_on_the_edge(
    logprobs, old_logprobs, advantages, mask, eps_low, eps_high, count=None
):
    """>= for >: a ratio that stands on the edge of the band is let go already."""
    band = eps_low, eps_high
    ppo.policy_loss(logprobs, old_logprobs, advantages, mask, *band, count)
    ratio = probability_ratio(logprobs, old_logprobs, mask)
    A = torch.where(mask, advantages.detach(), 0.0)
    clipped = ratio.detach().clamp(1 - eps_low, 1 + eps_high)
    over = (A > 0) & (ratio >= 1 + eps_high)
    under = (A < 0) & (ratio <= 1 - eps_low)
    return -sequence_sum(torch.where(over | under, clipped, ratio) * A, mask, count)


@imitates(
    ppo.policy_loss,
    "where_the_clip_lets_go on_the_edge_it_moves unbiased_at_ratio_1",
)
def policy_loss_of_the_inverse(
    logprobs, old_logprobs, advantages, mask, eps_low, eps_high, count=None
):
    """Old over new: right at ratio 1 in value, and the gradient turned round."""
    band = eps_low, eps_high
    ppo.policy_loss(logprobs, old_logprobs, advantages, mask, *band, count)
    ratio = 1 / probability_ratio(logprobs, old_logprobs, mask)
    A = torch.where(mask, advantages.detach(), 0.0)
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
    return -sequence_sum(torch.minimum(ratio * A, clipped * A), mask, count)


def _value_loss(errors, values, old_values, returns, mask, count):
    ppo.value_loss(values, old_values, returns, mask)
    v, old, R = (
        torch.where(mask, x, 0.0)
        for x in (values, old_values.detach(), returns.detach())
    )
    return 0.5 * token_mean(errors(v, old, R), mask, count)


@imitates(ppo.value_loss, "values_move_towards_returns")
def value_loss_of_the_smaller(values, old_values, returns, mask, clip=None, count=None):
    """min for max: a critic that moved too far is praised for it."""
    limit = float("inf") if clip is None else clip

    def errors(v, old, R):
        near = old + (v - old).clamp(-limit, limit)
        return torch.minimum((v - R) ** 2, (near - R) ** 2)

    return _value_loss(errors, values, old_values, returns, mask, count)


@imitates(ppo.value_loss, "values_move_towards_returns")
def value_loss_around_the_return(
    values, old_values, returns, mask, clip=None, count=None
):
    """Clips the error, not the step: what is far off does not learn."""
    limit = float("inf") if clip is None else clip

    def errors(v, old, R):
        return (v - R).clamp(-limit, limit) ** 2

    return _value_loss(errors, values, old_values, returns, mask, count)


@imitates(ppo.value_loss, "no_gradient_to")
def value_loss_into_the_returns(
    values, old_values, returns, mask, clip=None, count=None
):
    """The target comes to meet the guess."""
    right = ppo.value_loss(values, old_values, returns, mask, clip, count)
    meet = ppo.value_loss(returns, old_values, values, mask, None, count)
    return right + meet - meet.detach()


@imitates(ppo.explained_variance, "share_explained")
def explained_variance_of_squared_errors(values, returns, mask):
    """A critic that is right but for a constant is said to know less than nothing."""
    ppo.explained_variance(values, returns, mask)
    v, R = values[mask].double(), returns[mask].double()
    if R.min() == R.max():
        return 0.0
    return 1 - ((R - v).square().mean() / R.var(correction=0)).item()


@imitates(ppo.train, "returns_are_what_was_earned micro_batches")
def train_with_whitened_returns(*args, **options):
    """Whitens before the returns are built: the critic learns no rewards."""
    right = ppo.value_loss

    def late(values, old_values, returns, mask, *more, **options):
        returns = ppo.whiten(returns - old_values, mask) + old_values
        return right(values, old_values, returns, mask, *more, **options)

    with mock.patch.object(ppo, "value_loss", late):
        yield from ppo.train(*args, **options)


@imitates(ppo.train, "micro_batches")
def train_whitening_each_part(*args, **options):
    """The statistics of a micro-batch, not of all answers."""
    right = ppo.policy_loss

    def late(logprobs, old_logprobs, advantages, mask, *more, **options):
        whitened = ppo.whiten(advantages, mask)
        return right(logprobs, old_logprobs, whitened, mask, *more, **options)

    with mock.patch.object(ppo, "policy_loss", late):
        yield from ppo.train(*args, **options | {"scale": lambda A, mask: A})


@imitates(ppo.train, "first_ratio")
def train_with_old_logprobs_in_half(*args, **options):
    """Another engine's old log-probs: the first ratio is only nearly 1."""
    right = ppo.score_tokens

    def engine(*scored):
        logprobs, *rest = right(*scored)
        if torch.is_grad_enabled():
            return logprobs, *rest
        return logprobs.bfloat16().to(logprobs.dtype), *rest

    with mock.patch.object(ppo, "score_tokens", engine):
        yield from ppo.train(*args, **options)


@imitates(ppo.train, "entropy_bonus")
def train_against_entropy(policy, tokenizer, problems, reward, config, **options):
    """The bonus is added to the loss, not taken from it."""
    config = replace(config, entropy_coef=-config.entropy_coef)
    return ppo.train(policy, tokenizer, problems, reward, config, **options)


@imitates(ppo.pretraining_loss, "pull_of_the_mix")
def pretraining_loss_downhill(logprobs, mask, weight, count=None):
    """What the policy knew is unlearnt."""
    return -ppo.pretraining_loss(logprobs, mask, weight, count)


@imitates(ppo.pretraining_loss, "pull_of_the_mix options_matter")
def pretraining_loss_of_weight_1(logprobs, mask, weight, count=None):
    """The weight is asked for and not used."""
    ppo.pretraining_loss(logprobs, mask, weight, count)
    return ppo.pretraining_loss(logprobs, mask, 1.0, count)


@imitates(ppo.pretraining_loss, "pull_of_the_mix")
def pretraining_loss_per_token(logprobs, mask, weight, count=None):
    """Long examples count as little as short ones."""
    ppo.pretraining_loss(logprobs, mask, weight, count)
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    return ppo.pretraining_loss(logprobs / lengths, mask, weight, count)


@imitates(ppo.train, "the_mix_is_imitated")
def train_away_from_the_mix(*args, **options):
    """The gradient of the mix has the wrong sign."""
    right = ppo.pretraining_loss

    def wrong(*scored, **more):
        return -right(*scored, **more)

    with mock.patch.object(ppo, "pretraining_loss", wrong):
        yield from ppo.train(*args, **options)


@imitates(ppo.train, "the_mix_is_imitated")
def train_on_the_first_of_the_mix(*args, **options):
    """Every step takes the same examples: the others are never imitated."""
    right = ppo.PretrainingMix.take

    def first(mix, start):
        return right(mix, 0)

    with mock.patch.object(ppo.PretrainingMix, "take", first):
        yield from ppo.train(*args, **options)


# dpo

FOUR = [f"{x}_logprobs" for x in ("chosen", "rejected", "ref_chosen", "ref_rejected")]


@imitates(
    dpo.dpo_loss,
    "at_the_reference starts_as_a_policy_gradient only_the_margin_counts "
    "a_swap_adds_beta_h",
)
def dpo_loss_without_reference(**call):
    """Another method: it has no place to come back to."""
    zeros = {name: torch.zeros_like(call[name]) for name in FOUR[2:]}
    return dpo.dpo_loss(**call | zeros)


@imitates(
    dpo.dpo_loss,
    "at_the_reference starts_as_a_policy_gradient slope_anywhere "
    "only_the_margin_counts a_swap_adds_beta_h",
)
def dpo_loss_of_the_swapped_pair(**call):
    """Prefers the rejected answer; still log 2 at the reference."""
    chosen, rejected, ref_chosen, ref_rejected = (call.pop(name) for name in FOUR)
    return dpo.dpo_loss(rejected, chosen, ref_rejected, ref_chosen, **call)


@imitates(dpo.dpo_loss, "no_gradient_to")
def dpo_loss_into_the_reference(beta, count=None, **four):
    """The reference is trained the other way."""
    dpo.dpo_loss(**four, beta=beta, count=count)
    chosen, rejected, ref_chosen, ref_rejected = (four[name] for name in FOUR)
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    return dpo.logistic(h, beta).sum() / normaliser(count, len(h))


@imitates(dpo.dpo_loss, "microbatches")
def dpo_loss_of_this_part(count=None, **call):
    """Each micro-batch divides by its own pairs."""
    return dpo.dpo_loss(**call)


@imitates(dpo.dpo_loss, "microbatches only_the_margin_counts")
def dpo_loss_of_all_with_all(beta, count=None, per_pair=dpo.logistic, **four):
    """(B, 1) against (B,): each chosen answer meets each rejected one."""
    dpo.dpo_loss(**four, beta=beta, count=count)
    chosen, rejected, ref_chosen, ref_rejected = (four[name] for name in FOUR)
    own = chosen[:, None] - rejected  # (B, B)
    h = own - (ref_chosen[:, None] - ref_rejected).detach()
    return per_pair(h, beta).mean(1).sum() / normaliser(count, len(h))


@imitates(
    dpo.dpo_loss,
    "at_the_reference starts_as_a_policy_gradient slope_anywhere "
    "beta_scales_the_margin a_swap_adds_beta_h",
)
def dpo_loss_over_beta(beta, **call):
    """Divided by beta, so that all betas make steps alike: no leash is long."""
    return dpo.dpo_loss(**call, beta=beta) / beta


@imitates(dpo.dpo_loss, "margins_of_any_size")
def dpo_loss_by_two_steps(per_pair=dpo.logistic, **call):
    """-log(sigmoid(x)) is inf where the loss is 1000."""

    def by_two_steps(h, beta):
        return -torch.log(torch.sigmoid(beta * h))

    plain = by_two_steps if per_pair is dpo.logistic else per_pair
    return dpo.dpo_loss(**call, per_pair=plain)


@imitates(dpo.logistic, "any_margin")
def logistic_by_two_steps(h, beta):
    """-log(sigmoid(x)) is inf where the loss is 1000."""
    return -torch.log(torch.sigmoid(beta * h))


@imitates(dpo.conservative, "smoothing_adds_a_line lowest_point")
def conservative_with_the_other_sign(h, beta, smoothing=0.1):
    """Doubts about the labels make it surer of them."""
    return 2 * dpo.logistic(h, beta) - dpo.conservative(h, beta, smoothing)


@imitates(dpo.robust, "flips_cancel never_content")
def robust_as_conservative(h, beta, flipped=0.1):
    """A plus where the minus belongs, as once in oxRL, whose tests pinned it."""
    return dpo.conservative(h, beta, flipped) / (1 - 2 * flipped)


@imitates(dpo.robust, "flips_cancel never_content")
def robust_without_its_scale(h, beta, flipped=0.1):
    """Not divided by 1 - 2e: no estimate of DPO's loss any more."""
    return dpo.robust(h, beta, flipped) * (1 - 2 * flipped)


@imitates(dpo.robust, "flips_cancel never_content")
def robust_from_below(h, beta, flipped=0.1):
    """Clamped at 0, since a loss below 0 looks like a bug."""
    return dpo.robust(h, beta, flipped).clamp(min=0)


@imitates(dpo.mean_pair_logprobs, "means_over_answers")
def mean_pair_logprobs_without_the_end(model, pairs, pad_id, temperature):
    """The answer's end is in the sum and not in the count."""
    sums = dpo.pair_logprobs(model, pairs, pad_id, temperature)
    tokens = [[max(len(w) - 1, 1), max(len(v) - 1, 1)] for _, w, v in pairs]
    return sums / torch.tensor(tokens)


@imitates(dpo.mean_pair_logprobs, "means_over_answers")
def mean_pair_logprobs_by_the_longer(model, pairs, pad_id, temperature):
    """Divided by the padded width, as once in RRHF's code: one number for all."""
    sums = dpo.pair_logprobs(model, pairs, pad_id, temperature)
    return sums / max(len(x) for _, *both in pairs for x in both)


@imitates(dpo.ipo, "finite_goal")
def ipo_twice_as_far(h, beta):
    """The goal is 1 / beta."""
    return dpo.ipo(h / 2, beta) * 4


@imitates(dpo.ipo, "finite_goal")
def ipo_as_a_hinge(h, beta):
    """Asks for the goal, and lets go of what is beyond it."""
    return (1 / (2 * beta) - h).relu() ** 2


@imitates(dpo.pair_logprobs, "sums_over_answers")
def pair_logprobs_per_token(model, pairs, pad_id, temperature):
    """Means for sums: another loss, and another beta."""
    sums = dpo.pair_logprobs(model, pairs, pad_id, temperature)
    return sums / torch.tensor([[len(w), len(v)] for _, w, v in pairs])


@imitates(dpo.pair_logprobs, "sums_over_answers")
def pair_logprobs_with_the_prompt(model, pairs, pad_id, temperature):
    """Scores the question too: no loss of differences ever shows it."""
    answers = [(prompt, answer) for prompt, *both in pairs for answer in both]
    tokens, mask = collate(answers, pad_id, learn_prompt=True)
    return token_logprobs(model, tokens, mask, temperature).sum(1).view(-1, 2)


@imitates(dpo.make_pairs, "pairs_are_told_apart pairs_by_lot")
def make_pairs_of_equals(rewards, most, generator):
    """Equal rewards make pairs, told apart by lot."""
    nudged = rewards + 1e-6 * torch.rand(rewards.shape, generator=generator)
    return dpo.make_pairs(nudged, most, generator)


@imitates(dpo.make_pairs, "pairs_by_lot")
def make_pairs_without_lots(rewards, most, generator):
    """The first right answer always meets the same wrong one."""
    return dpo.make_pairs(rewards, most, torch.Generator().manual_seed(0))


@imitates(dpo.make_pairs, "pairs_by_lot")
def make_pairs_by_torch_s_dice(rewards, most, generator):
    """The lots are torch's own: no seed of ours gives the same pairs again."""
    seed = int(torch.randint(1 << 30, ()))
    return dpo.make_pairs(rewards, most, generator.manual_seed(seed))


@imitates(dpo.make_pairs, "pairs_are_told_apart pairs_by_lot")
def make_pairs_of_neighbours(rewards, most, generator):
    """The best with the second best, the third with the fourth: all but equals."""
    dpo.make_pairs(rewards, most, generator)
    pairs = []
    for p, row in enumerate(rewards.tolist()):
        order = sorted(range(len(row)), key=row.__getitem__, reverse=True)
        both = list(zip(order[::2], order[1::2], strict=False))[:most]
        told = [(w, v) for w, v in both if row[w] > row[v]]
        pairs += [[p * len(row) + w, p * len(row) + v] for w, v in told]
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)


# reward_model


@imitates(
    reward_model.pairwise_loss,
    "pull_of_a_pair only_differences_count a_tie a_margin_is_a_head_start "
    "a_swap_costs_the_gap lowest_where_people_are gaps_of_any_size",
)
def pairwise_loss_of_the_swapped_pair(chosen, rejected, *rest, **more):
    """The pair the wrong way round: the worse answer is to lead."""
    return reward_model.pairwise_loss(rejected, chosen, *rest, **more)


@imitates(reward_model.pairwise_loss, "microbatches weights_count")
def pairwise_loss_of_this_part(chosen, rejected, count=None, **more):
    """Each micro-batch divides by its own pairs."""
    return reward_model.pairwise_loss(chosen, rejected, **more)


@imitates(reward_model.pairwise_loss, "a_margin_is_a_head_start")
def pairwise_loss_with_a_margin_given_away(chosen, rejected, margin=0.0, **more):
    """The margin is added: to be behind by less than it is called enough."""
    return reward_model.pairwise_loss(chosen + margin, rejected, **more)


@imitates(reward_model.pairwise_loss, "gaps_of_any_size")
def pairwise_loss_by_two_steps(
    chosen, rejected, margin=0.0, label=1.0, weights=None, count=None
):
    """-log(sigmoid(x)) is inf where the loss is 1000."""
    reward_model.pairwise_loss(chosen, rejected, margin, label, weights, count)
    d = chosen - rejected - margin
    own = -label * torch.log(torch.sigmoid(d))
    own = own - (1 - label) * torch.log(torch.sigmoid(-d))
    own = own if weights is None else own * weights
    return own.sum() / normaliser(count, len(d))


@imitates(reward_model.pairwise_loss, "lowest_where_people_are")
def pairwise_loss_sure_of_its_labels(chosen, rejected, margin=0.0, label=1.0, **more):
    """A label that may be wrong only counts for less."""
    return label * reward_model.pairwise_loss(chosen, rejected, margin, **more)


@imitates(reward_model.pairwise_loss, "each_pair_has_its_label")
def pairwise_loss_with_a_common_label(chosen, rejected, margin=0.0, label=1.0, **more):
    """Each pair gets the mean of the labels."""
    if isinstance(label, torch.Tensor):
        label = label.mean().item()
    return reward_model.pairwise_loss(chosen, rejected, margin, label, **more)


@imitates(reward_model.pairwise_loss, "weights_count")
def pairwise_loss_of_all_alike(chosen, rejected, *rest, weights=None, **more):
    """Every pair counts 1, however many its ranking has."""
    return reward_model.pairwise_loss(chosen, rejected, *rest, **more)


@imitates(reward_model.pairs_of, "pairs_of_rankings")
def pairs_of_worse_and_better(rankings):
    """The worse answer comes first: people are taken at the opposite of their word."""
    rows, *others = reward_model.pairs_of(rankings)
    return rows.flip(1), *others


@imitates(reward_model.pairs_of, "a_ranking_counts_once")
def pairs_of_added_up(rankings):
    """The pairs of a ranking are added up: four answers count as six pairs."""
    rows, weights, labels, identical = reward_model.pairs_of(rankings)
    return rows, torch.ones_like(weights), labels, identical


@imitates(reward_model.pairs_of, "pairs_of_rankings")
def pairs_of_twins_too(rankings):
    """Two answers with the same tokens are a pair, and pull at rounding errors."""
    rows, weights, first = [], [], 0
    for ranking in rankings:
        K = len(ranking.answers)
        own = [[first + i, first + j] for i in range(K) for j in range(i + 1, K)]
        rows += own
        weights += [1 / len(own)] * len(own)
        first += K
    return torch.tensor(rows), torch.tensor(weights), torch.ones(len(rows)), 0


@imitates(reward_model.pairs_of, "pairs_of_rankings")
def pairs_of_neighbours(rankings):
    """Only neighbours are pairs: what is farther apart is never compared."""
    rows, weights, labels, identical = reward_model.pairs_of(rankings)
    near = rows[:, 1] - rows[:, 0] == 1
    return rows[near], weights[near], labels[near], identical


@imitates(reward_model.pairs_of, "a_label_is_of_its_ranking")
def pairs_of_the_certain(rankings):
    """Forgets what the judge was unsure of: every label is 1."""
    rows, weights, labels, identical = reward_model.pairs_of(rankings)
    return rows, weights, torch.ones_like(labels), identical


@imitates(reward_model.rankings_of, "best_first")
def rankings_of_places(problems, texts, orders, tokenizer):
    """Takes the place of an answer for its number, which is wrong for three answers."""
    return reward_model.rankings_of(problems, texts, orders.argsort(1), tokenizer)


@imitates(reward_model.read_rankings, "read_one_by_one")
def read_rankings_at_the_pad(model, rankings, pad_id):
    """The number in the last column: behind a short answer that is a pad."""
    tokens, mask = collate(
        [
            (ranking.prompt, answer)
            for ranking in rankings
            for answer in ranking.answers
        ],
        pad_id,
    )
    return model(tokens, mask | (torch.arange(mask.shape[1]) == mask.shape[1] - 1))


@imitates(reward_model.read_rankings, "read_one_by_one")
def read_rankings_before_the_end(model, rankings, pad_id):
    """The number is read at the token before EOS, which has not seen that it ends."""
    tokens, mask = collate(
        [
            (ranking.prompt, answer)
            for ranking in rankings
            for answer in ranking.answers
        ],
        pad_id,
    )
    return model.head(model.body(tokens))[
        torch.arange(len(tokens)),
        (mask * torch.arange(mask.shape[1])).argmax(1),
    ]


# rrhf


@imitates(rrhf.mean_logprobs, "mask_is_inert mean_per_token")
def mean_logprobs_by_the_padded_width(logprobs, mask):
    """What marks the padding is gone when the tokens are counted."""
    return rrhf.summed_logprobs(logprobs, mask) / mask.shape[1]


@imitates(rrhf.mean_logprobs, "pure permutation mask_is_inert mean_per_token")
def mean_logprobs_editing_the_labels(logprobs, mask):
    """How that came about: what marks the padding is overwritten, in place."""
    total = rrhf.summed_logprobs(logprobs, mask)
    mask.data.fill_(True)
    return total / mask.sum(1)


@imitates(rrhf.mean_logprobs, "mean_per_token")
def mean_logprobs_summed(logprobs, mask):
    """Sums for means: whoever says less is likelier."""
    return rrhf.summed_logprobs(logprobs, mask)


def _ranking_loss(gaps, mean_logprobs, rewards, margin, count):
    """gaps(pairs of rewards, pairs of margin + p_i - p_j) in place of the right ones"""
    rrhf.ranking_loss(mean_logprobs, rewards, margin, count)
    earned = rewards[:, :, None], rewards[:, None, :]  # r_i, r_j
    lead = margin + mean_logprobs[:, :, None] - mean_logprobs[:, None, :]
    return gaps(*earned, lead).sum() / normaliser(count, len(mean_logprobs))


@imitates(rrhf.ranking_loss, "ranking violated_pairs ties_ask_for_nothing")
def ranking_loss_of_ties(mean_logprobs, rewards, margin=0.0, count=None):
    """Equal rewards make pairs, and both answers are pushed together."""

    def gaps(r, s, lead):
        same = torch.eye(lead.shape[1], dtype=torch.bool)
        return torch.where((r <= s) & ~same, lead, 0.0).relu()

    return _ranking_loss(gaps, mean_logprobs, rewards, margin, count)


@imitates(rrhf.ranking_loss, "ranking violated_pairs")
def ranking_loss_flipped(mean_logprobs, rewards, margin=0.0, count=None):
    """Who earned less shall be likelier."""
    return rrhf.ranking_loss(mean_logprobs, -rewards, margin, count)


@imitates(rrhf.ranking_loss, "violated_pairs")
def ranking_loss_pushing_at_the_kink(mean_logprobs, rewards, margin=0.0, count=None):
    """A slope where the order is already right: clamp has 1 at its corner."""

    def gaps(r, s, lead):
        return torch.where(r < s, lead, -1.0).clamp(min=0)

    return _ranking_loss(gaps, mean_logprobs, rewards, margin, count)


@imitates(rrhf.ranking_loss, "permutation microbatches ranking violated_pairs")
def ranking_loss_of_the_first_problem(mean_logprobs, rewards, margin=0.0, count=None):
    """A mask indexed with [0]."""

    def gaps(r, s, lead):
        return torch.where((r < s)[0], lead, 0.0).relu()

    return _ranking_loss(gaps, mean_logprobs, rewards, margin, count)


@imitates(rrhf.ranking_loss, "microbatches")
def ranking_loss_of_this_part(mean_logprobs, rewards, margin=0.0, count=None):
    """Each micro-batch divides by its own problems."""
    return rrhf.ranking_loss(mean_logprobs, rewards, margin)


@imitates(
    rrhf.ranking_loss,
    "more_answers_cost_no_less microbatches ranking violated_pairs",
)
def ranking_loss_of_the_mean_pair(mean_logprobs, rewards, margin=0.0, count=None):
    """A mean over pairs: the more answers there are, the less each pair weighs."""
    total = rrhf.ranking_loss(mean_logprobs, rewards, margin, count)
    pairs = rewards[:, :, None] < rewards[:, None, :]
    return total * len(mean_logprobs) / pairs.sum().clamp(min=1)


@imitates(rrhf.ranking_loss, "what_ranking_does_not_see ranking violated_pairs")
def ranking_loss_by_the_gain(mean_logprobs, rewards, margin=0.0, count=None):
    """Weighs a pair by how much more one earned: the scale of rewards is the step's."""

    def gaps(r, s, lead):
        return (s - r).relu().detach() * lead.relu()

    return _ranking_loss(gaps, mean_logprobs, rewards, margin, count)


@imitates(rrhf.best_answers, "first_of_the_best")
def best_answers_of_the_wrong(rewards):
    """The authors' code: where nothing is right a wrong answer is imitated."""
    return F.one_hot(rewards.argmax(1), rewards.shape[1]).bool()


@imitates(rrhf.sft_loss, "mask_is_inert imitation")
def rrhf_sft_loss_over_padding(logprobs, rewards, mask, count=None):
    """The mean has the zeros of prompt, padding and other answers in it."""
    all_slots = mask.numel() if count is None else count
    return rrhf.sft_loss(logprobs, rewards, mask, all_slots)


@imitates(rrhf.rrhf_loss, "lifts_right_over_wrong imitates_the_first_right_answer")
def rrhf_loss_weighing_the_ranking(logprobs, rewards, mask, *, sft_weight=1.0, **more):
    """The weight is on the other term."""
    ranking = rrhf.rrhf_loss(logprobs, rewards, mask, sft_weight=0.0, **more)
    both = rrhf.rrhf_loss(logprobs, rewards, mask, sft_weight=1.0, **more)
    return sft_weight * ranking + (both - ranking)


@imitates(rrhf.rrhf_loss, "parts_of_whole_problems options_matter")
def rrhf_loss_of_this_part(logprobs, rewards, mask, *, counts=None, **more):
    """Each micro-batch divides by its own problems and tokens."""
    return rrhf.rrhf_loss(logprobs, rewards, mask, **more)


# rejection sampling


@imitates(rejection_sampling.select_best, "ties_by_lot")
def select_best_first(rewards, lengths, generator):
    """Of equals the first: argmax draws no lots."""
    best = rejection_sampling.select_best(rewards, lengths, generator)
    first = F.one_hot(rewards.argmax(1), rewards.shape[1]).bool()
    return first & best.any(1, keepdim=True)


@imitates(rejection_sampling.select_right, "all_above_0")
def select_right_or_harmless(rewards, lengths, generator):
    """>= for >: where right is 1 and wrong is 0 it keeps everything."""
    lots = rejection_sampling.select_right(rewards, lengths, generator)
    return lots | (rewards == 0)


@imitates(rejection_sampling.select_right, "all_above_0 ranks_alone_count")
def select_right_above_the_mean(rewards, lengths, generator):
    """Keeps what beats its group's mean, and nothing where all are right."""
    right = rejection_sampling.select_right(rewards, lengths, generator)
    return right & (rewards > rewards.mean(1, keepdim=True))


@imitates(rejection_sampling.select_best, "one_best_answer")
def select_best_of_the_wrong(rewards, lengths, generator):
    """One of each problem, and where nothing is right a wrong one."""
    kept = rejection_sampling.select_best(rewards, lengths, generator)
    least_bad = F.one_hot(rewards.argmax(1), rewards.shape[1]).bool()
    return torch.where(kept.any(1, keepdim=True), kept, least_bad)


@imitates(rejection_sampling.select_top, "ties_by_lot")
def select_top_first(rewards, lengths, generator):
    """Of equals those of the first problems: a sort draws no lots."""
    top = rejection_sampling.select_top(rewards, lengths, generator)
    order = rewards.flatten().argsort(descending=True, stable=True)
    first = torch.zeros_like(top).flatten()
    first[order[: top.sum()]] = True
    return first.view_as(top)


@imitates(rejection_sampling.select_top, "best_of_all places_do_not_count")
def select_top_by_the_order(rewards, lengths, generator):
    """argsort for ranks: it says who has a place, not whose place is which."""
    rejection_sampling.select_top(rewards, lengths, generator)
    order = rewards.flatten().argsort(descending=True).view_as(rewards)
    return (order < len(rewards)) & (rewards > 0)


@imitates(rejection_sampling.select_random, "rewards_do_not_choose")
def select_random_of_the_right(rewards, lengths, generator):
    """The control keeps what is right, and controls nothing."""
    return rejection_sampling.select_right(rewards, lengths, generator)


@imitates(rejection_sampling.select_random, "as_many_tokens")
def select_random_by_answers(rewards, lengths, generator):
    """As many answers as are right, and not as many tokens."""
    return rejection_sampling.select_random(
        rewards, torch.ones_like(lengths), generator
    )


@imitates(rejection_sampling.likelihood_loss, "microbatches options_matter unbiased")
def likelihood_loss_of_the_kept(logprobs, weights, mask, count=None):
    """Each part is divided by what it finds kept, whatever the count is."""
    rejection_sampling.likelihood_loss(logprobs, weights, mask, count)
    kept = int(((weights > 0) & mask.any(1)).sum())
    return rejection_sampling.likelihood_loss(logprobs, weights, mask, max(kept, 1))


@imitates(rejection_sampling.keep_latest, "pool_of_one_round")
def keep_latest_first(earlier, new):
    """The first round's answers for ever: there is nothing new to learn."""
    return earlier or new


@imitates(rejection_sampling.keep_all, "pool_of_all_rounds")
def keep_all_in_place(earlier, new):
    """The pool of an earlier round grows behind its owner's back."""
    earlier += new
    return earlier


@imitates(partial_credit, "credit_is_for_numbers_alone")
def credit_for_nothing(problems, texts, wrong=0.1):
    """Every answer that is not right earns a little, one without a number too."""
    return [max(mark, wrong) for mark in verifier(problems, texts)]


@imitates(rejection_sampling.select_right, "all_above_0")
def select_right_and_wrong(rewards, lengths, generator, threshold=0.0):
    """The policy's own wrong answers stay in what it learns from."""
    return rewards >= threshold


@imitates(rejection_sampling.keep_all, "pool_of_all_rounds")
def keep_all_but_old(earlier, new):
    """Old rounds are dropped, though all were asked for."""
    return new


@imitates(rejection_sampling.keep_latest_with, "pool_beside_given")
def keep_latest_without(given):
    """The given answers are forgotten: rejection sampling as it was."""
    return lambda earlier, new: new


@imitates(rejection_sampling.keep_latest_with, "pool_beside_given")
def keep_latest_growing(given):
    """The given answers take in every round's."""

    def keep(earlier, new):
        given.extend(new)
        return given

    return keep


# History: who survived, and what it took. Three lists were written, each before any
# property was run against it. Of the first, 98 mutants, one crashed and none survived;
# of the second, 28 in search of what no property had asked, 13 survived; of the third,
# about numbers at the edge of what floats hold, all 6. Five of these, marked *, passed
# the tests of their module as well. (Some that were caught at once and resemble others
# are left out by now.)

SURVIVORS = {
    mean_logprobs_editing_the_labels: "it crashed in backward, which is no verdict: "
    "now the edit goes past autograd, as one of integer labels does; then check_pure",
    kl_ratio_k3_into_the_old: "expectations hold the old policy fixed: "
    "check_no_gradient_to",
    exact_kl_into_the_reference: "the golden slopes were the policy's: "
    "check_no_gradient_to",
    probability_ratio_without_bound: "no case came near e^80: check_ratio_is_bounded",
    generate_leaving_eval_mode: "answers do not show the model's mode: "
    "check_model_left_alone",
    generate_rolling_torch_s_dice: "answers come from the other dice: "
    "check_model_left_alone",
    generate_alike_in_every_chunk: "each chunk by itself is right: "
    "check_chunks_are_new_draws",
    leave_one_out_in_place: "shifted rewards have the same advantages: check_pure",
    group_advantages_without_epsilon: "golden numbers had epsilon 0, and no other "
    "property looked: check_epsilon_law",
    clipped_loss_into_the_old: "only the policy's slopes were looked at: "
    "check_no_gradient_to",
    value_loss_into_the_returns: "only the critic's slopes were looked at: "
    "check_no_gradient_to",
    dpo_loss_of_this_part: "a whole batch is its own part: check_microbatches",
    ranking_loss_of_this_part: "a whole batch is its own part: check_microbatches",
    make_pairs_without_lots: "every pair by itself is right: check_pairs_by_lot",
    logprobs_from_logits_by_two_steps: "* logits were never 1000 apart: "
    "check_all_but_impossible",
    logprobs_from_logits_cooled_in_half: "* half precision met temperature 1 only: "
    "check_half_is_lifted_first",
    masked_sum_in_half: "a sum was compared with itself, of other rows and columns: "
    "check_by_loops",
    exact_kl_by_two_steps: "* every word had a chance: check_sure_choices",
    score_tokens_by_two_steps: "* every word had a chance: check_sure_policy",
    whiten_by_raw_moments: "* float64, near 0: check_far_from_0",
}


def killers(wrong: Callable) -> list[str]:
    """The names of the properties that a mutant fails; who crashes has not failed."""
    found = []
    entries = importlib.import_module("tests.entries")
    common = importlib.import_module("tests.properties.common")
    for check in entries.OF[MUTANTS[wrong]].properties:
        try:
            caught = common.refutes(check, wrong)
        except (TypeError, RuntimeError):
            caught = False
        if caught:
            found.append(common.name_of(check))
    return found


def show_table() -> int:
    """Who is killed by what; 1 if any property does not do what is pinned."""
    width = max(len(wrong.__name__) for wrong in MUTANTS)
    alive = []
    for wrong in MUTANTS:
        found = killers(wrong)
        missing = [name for name in KILLS[wrong] if name not in found]
        if missing:
            alive.append(f"{wrong.__name__} survives {' '.join(missing)}")
        said = wrong.__doc__.splitlines()[0]
        words = [name.removeprefix("check_") for name in found if name not in BLIND]
        print(f"{wrong.__name__:{width}}  {said}\n{'':{width}}  {', '.join(words)}")
    print(f"\nSurvivors of a first run ({len(SURVIVORS)}), and what it took:\n")
    for wrong, story in SURVIVORS.items():
        print(f"{wrong.__name__:{width}}  {story}")
    count = f"{len(MUTANTS)} mutants of {len(set(MUTANTS.values()))} functions"
    print(f"\n{count}, {len(alive)} alive; {process_time():.0f} s")
    print(*alive, sep="\n")
    return int(bool(alive))


def main(arguments: list[str]) -> int:
    """The exit code: 1 where something is not as it should be, 2 for a wrong call."""
    parser = argparse.ArgumentParser(prog="python tests/mutants.py")
    part = {"nargs": "?", "const": "", "metavar": "PART"}  # without one: all of it
    parser.add_argument("file", nargs="?", help="your own losses, by our names")
    parser.add_argument("--source", **part, help="change the source of ppo, or ppo.gae")
    parser.add_argument("--checks", **part, help="delete each check in turn")
    asked = parser.parse_args(arguments)
    importlib.import_module("tests.conftest")  # one thread, the same examples each time
    if asked.file:
        return importlib.import_module("tests.your_losses").main(Path(asked.file))
    for kind in ("source", "checks"):
        if getattr(asked, kind) is not None:
            source_mutants = importlib.import_module("tests.source_mutants")
            return source_mutants.main(kind, getattr(asked, kind))
    return show_table()


if __name__ == "__main__":
    # Under its own name it is another module than the one that others import.
    sys.exit(importlib.import_module("tests.mutants").main(sys.argv[1:]))
