"""The smallest world in which a policy can be trained: answers are "y" and "no".

Five one-letter questions, a GPT of some thousand weights on bytes, and a base that says
"y" to a third of them. Rewarding "y" must make it say so more often: `chance_of_yes` is
exact, so a test of learning needs no luck. `judged` and `row_nats` are the reward and
the log-probabilities of a rollout by code of their own.
"""

import copy
from collections.abc import Sequence
from fractions import Fraction
from functools import cache

import torch
import torch.nn.functional as F

from minialign.model import GPT, GPTConfig
from minialign.problems import Problem
from minialign.tokenizer import Tokenizer

TOKENIZER = Tokenizer([bytes([value]) for value in range(256)])

PROBLEMS = [Problem(q, Fraction(1), "toy", 1, q) for q in "abcde"]


def yes(problems: Sequence[Problem], texts: Sequence[str]) -> list[float]:
    return [float(text == "y") for text in texts]


def never(problems: Sequence[Problem], texts: Sequence[str]) -> list[float]:
    return [0.0] * len(texts)


def always(problems: Sequence[Problem], texts: Sequence[str]) -> list[float]:
    return [1.0] * len(texts)


def new_gpt(seed):
    sizes = {"dim": 32, "layers": 2, "heads": 2, "kv_heads": 2, "hidden": 48}
    config = GPTConfig(vocab_size=TOKENIZER.n_vocab, context=16, **sizes)
    return GPT(config, torch.Generator().manual_seed(seed))


@cache
def trained():
    """Imitates one teacher who says "y" and two who say "no"."""
    model = new_gpt(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    asked = [TOKENIZER.encode_prompt(problem.question) for problem in PROBLEMS]
    answers = [(2, TOKENIZER.encode("no")), (1, TOKENIZER.encode("y"))]
    for _ in range(25):
        loss = torch.zeros(())
        for times, answer in answers:
            said = [*answer, TOKENIZER.eos_id]
            ids = torch.tensor([prompt + said for prompt in asked])
            logits = model.logits(model(ids[:, :-1]))[:, -len(said) :]
            nats = F.cross_entropy(logits.flatten(0, 1), ids[:, -len(said) :].flatten())
            loss = loss + times * nats
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.zero_grad()
    return model


def base_weights():
    return trained().state_dict()


def base():
    return copy.deepcopy(trained())


def stretched():
    """The base with weights 1.2 times as large: a policy with some KL to the base."""
    model = base()
    model.load_state_dict({name: 1.2 * x for name, x in base_weights().items()})
    return model


def generator(seed=0, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def judged(rollout):
    """(B,): 1 for every "y" that ended, else 0."""
    texts = [TOKENIZER.decode_response(ids) for ids in rollout.responses()]
    both = zip(texts, rollout.truncated.tolist(), strict=True)
    return torch.tensor([float(text == "y" and not cut) for text, cut in both])


def token_nats(model, rollout, temperature=1.0):
    """log π of each token of each answer: alone, without padding, by cross-entropy."""
    rows = []
    for row, response in enumerate(rollout.responses()):
        start = rollout.prompt_lengths[row].item()
        ids = rollout.tokens[row, : start + len(response)]
        logits = model.logits(model(ids[None, :-1]))[0, start - 1 :] / temperature
        rows.append(-F.cross_entropy(logits, ids[start:], reduction="none"))
    return rows


def row_nats(model, rollout, temperature=1.0):
    """log π(answer | prompt) of each answer."""
    return torch.stack([nats.sum() for nats in token_nats(model, rollout, temperature)])


@torch.no_grad()
def chance_of_yes(policy):
    """Exactly, over the problems: π(y | prompt) π(EOS | prompt, y)."""
    said = torch.tensor([*TOKENIZER.encode("y"), TOKENIZER.eos_id])
    chances = []
    for problem in PROBLEMS:
        prompt = torch.tensor(TOKENIZER.encode_prompt(problem.question))
        logits = policy.logits(policy(torch.cat((prompt, said[:1]))[None]))[0, -2:]
        logprobs = logits.log_softmax(-1)
        chances.append(logprobs.gather(1, said[:, None]).sum().exp().item())
    return sum(chances) / len(chances)
