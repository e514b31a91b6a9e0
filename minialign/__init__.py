"""minialign: the alignment of language models, by hand, one idea a file.

The picture: problem -> tokens -> Rollout(tokens, mask, logprobs) -> rewards
-> advantages or pairs -> loss -> optimizer step -> metrics -> figure.

The words, each with one meaning everywhere. B sequences, T tokens, S = T - 1 choices,
V vocabulary, K samples per prompt; index s scores the choice of tokens[:, s + 1]. Small
letters, as in (b, s), are the part of it in one micro-batch.

    tokens           (B, T) int64  prompt + response + right padding
    mask             (B, S) bool   True where the policy chose; EOS included
    logprobs         (B, S)        nats, <= 0, of the current policy
    old_logprobs     (B, S)        of the policy that sampled
    ref_logprobs     (B, S)        of the frozen reference
    rewards          (B,)          raw scores of whole answers
    advantages       (B,)          how much better than the baseline (or (B, S))
    mean_logprobs    (B,)          log-probability of an answer, per token of it
    kl               (B, S)        estimate of KL(policy ‖ reference) from its samples
    beta             scalar        price of a nat of KL, in reward

*_loss is minimised. The log-probability of a response is the sum over its tokens, EOS
included. The rooms, in the order in which they import each other: families, problems,
tokenizer, checks, model, logprobs, sampling, rewards, intervals, evaluation,
training, checkpoint, plotting, algorithms, course, exam.
"""
