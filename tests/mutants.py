"""Plausible wrong versions, most of them once shipped. The tests must find them all.

Section by section as the modules they imitate; each docstring says what is wrong.
"""

import torch

from minialign.logprobs import check_mask

# logprobs: which token does slot s score?


def _score(model, tokens, mask, positions, targets):
    every = torch.log_softmax(model.logits(model(tokens)), dim=-1)  # (B, T, V)
    logprobs = every[:, positions].gather(-1, tokens[:, targets, None])[..., 0]
    return torch.where(mask, logprobs, 0.0)


def token_logprobs_without_shift(model, tokens, mask):
    """Scores each token with the logits made *after* reading it."""
    return _score(model, tokens, mask, slice(1, None), slice(1, None))


def token_logprobs_of_the_input(model, tokens, mask):
    """Gathers the token that was read, not the one that was chosen."""
    return _score(model, tokens, mask, slice(0, -1), slice(0, -1))


def token_logprobs_one_early(model, tokens, mask):
    """Starts at the prompt's last token and misses the response's last."""
    early = torch.cat((mask[:, 1:], torch.zeros_like(mask[:, :1])), dim=1)
    return _score(model, tokens, early, slice(0, -1), slice(1, None))


def token_logprobs_without_eos(model, tokens, mask):
    """Leaves out the last live token: nobody learns to stop."""
    later = mask.flip(1).cumsum(1).flip(1)  # live tokens from here on
    return _score(model, tokens, mask & (later > 1), slice(0, -1), slice(1, None))


def token_logprobs_without_mask(model, tokens, mask):
    """Scores prompt and padding too."""
    everything = torch.ones_like(mask)
    return _score(model, tokens, everything, slice(0, -1), slice(1, None))


def token_logprobs_without_temperature(model, tokens, mask, temperature=1.0):
    """Samples at one temperature, scores at another."""
    return _score(model, tokens, mask, slice(0, -1), slice(1, None))


# logprobs: reductions


def token_mean_of_product(x, mask, count=None):
    """Divides by all slots, dead ones too."""
    return torch.where(mask, x, 0.0).mean()


def token_mean_by_multiplication(x, mask, count=None):
    """nan * 0 is nan."""
    return (x * mask).sum() / (mask.sum() if count is None else count)


def token_mean_of_this_part(x, mask, count=None):
    """Forgets the global normaliser: the mean of means of gradient accumulation."""
    return torch.where(mask, x, 0.0).sum() / mask.sum()


def token_mean_of_row_means(x, mask, count=None):
    """The sequence mean under the wrong name."""
    means = torch.where(mask, x, 0.0).sum(1) / mask.sum(1).clamp(min=1)
    return means.sum() / mask.any(1).sum()


def masked_sum_in_place(x, mask):
    """Writes into the caller's tensor."""
    return x.data.masked_fill_(~mask, 0.0).sum(1)


def masked_sum_that_broadcasts(x, mask):
    """Looks at the mask, but takes (B, 1) for (B, S)."""
    check_mask(mask)
    return torch.where(mask, x, 0.0).sum(1)


# logprobs: KL(policy || reference)


def kl_k1_swapped(logprobs, ref_logprobs, mask):
    """The sign of KL(reference || policy): as a penalty it rewards drifting away."""
    return torch.where(mask, ref_logprobs.detach() - logprobs, 0.0)


def kl_k1_into_the_reference(logprobs, ref_logprobs, mask):
    """Trains the reference too."""
    return torch.where(mask, logprobs - ref_logprobs, 0.0)


def kl_k2_without_half(logprobs, ref_logprobs, mask):
    """Twice the gradient."""
    return torch.where(mask, logprobs - ref_logprobs.detach(), 0.0) ** 2


def kl_k3_inverted(logprobs, ref_logprobs, mask):
    """policy / reference in place of reference / policy: chi^2 - KL."""
    d = torch.where(mask, logprobs - ref_logprobs.detach(), 0.0)
    return torch.exp(d) - 1 - d


def kl_k3_without_minus_1(logprobs, ref_logprobs, mask):
    """Not 0 where policy and reference agree."""
    d = torch.where(mask, ref_logprobs.detach() - logprobs, 0.0)
    return torch.where(mask, torch.exp(d) - d, 0.0)


def kl_k3_masked_after(logprobs, ref_logprobs, mask):
    """The right value, and a gradient of nan."""
    d = ref_logprobs.detach() - logprobs
    return torch.where(mask, torch.exp(d) - 1 - d, 0.0)


def kl_k3_rounded(logprobs, ref_logprobs, mask):
    """exp(d) - 1 loses the digits that matter, and falls below d."""
    d = torch.where(mask, ref_logprobs.detach() - logprobs, 0.0)
    return torch.exp(d) - 1 - d


def kl_ratio_k3_detached(logprobs, old_logprobs, ref_logprobs, mask):
    """ "The ratio is 1, so its gradient cannot matter." """
    d = torch.where(mask, ref_logprobs.detach() - logprobs, 0.0)
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp().detach()
    return ratio * (torch.expm1(d) - d)


def exact_kl_swapped(logits, ref_logits):
    """KL(reference || policy)."""
    policy = torch.log_softmax(logits, dim=-1)
    reference = torch.log_softmax(ref_logits.detach(), dim=-1)
    return (reference.exp() * (reference - policy)).sum(-1)


def exact_kl_with_fixed_weights(logits, ref_logits):
    """Detaches the probabilities: the right value, a gradient of 0."""
    policy = torch.log_softmax(logits, dim=-1)
    reference = torch.log_softmax(ref_logits.detach(), dim=-1)
    return (policy.exp().detach() * (policy - reference)).sum(-1)


def exact_kl_averaged(logits, ref_logits):
    """Divides by the vocabulary, as a mean-reduced library call does."""
    policy = torch.log_softmax(logits, dim=-1)
    reference = torch.log_softmax(ref_logits.detach(), dim=-1)
    return (policy.exp() * (policy - reference)).mean(-1)
