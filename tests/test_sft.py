"""SFT: what is learnt, the schedule, the optimisers, and training.

What the loss and the batches owe: entries.py.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minialign.algorithms import sft
from minialign.logprobs import token_logprobs
from minialign.model import GPT, GPTConfig
from tests.properties import training
from tests.properties.imitation import BOS, CONFIG, EOS, EXAMPLES, PAD, tiny_gpt
from tests.properties.vectors import Table


def run(model, examples=EXAMPLES, config=CONFIG):
    return sft.train(model, examples, config, pad_id=PAD)


def nats(model, examples):
    """-log π(response | prompt) of each example, alone and in plain Python."""
    total = []
    for prompt, response in examples:
        ids, nll = [*prompt, *response], 0.0
        logits = model.logits(model(torch.tensor([ids[:-1]])))[0].tolist()
        for position in range(len(prompt), len(ids)):
            row = logits[position - 1]
            largest = max(row)
            partition = sum(math.exp(x - largest) for x in row)
            nll -= row[ids[position]] - largest - math.log(partition)
        total.append(nll)
    return total


# What is learnt


def test_prompt_tokens_are_read_but_not_learnt():
    """As labels they change nothing, as inputs they do. In the broken variant
    (`learn_prompt`) they are labels too."""
    given = Table(torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0)))
    asked = [([3, 4, 5], [8, EOS]), ([3, 4, 6], [8, EOS]), ([7, 4, 5], [8, EOS])]

    def losses(model, **options):
        found = set()
        for example in asked:
            tokens, mask = sft.collate([example], PAD, **options)
            logprobs = token_logprobs(model, tokens, mask)
            found.add(sft.sft_loss(logprobs, mask).item())
        return found

    assert len(losses(given)) == 1
    assert len(losses(tiny_gpt())) == 3
    assert len(losses(given, learn_prompt=True)) == 2  # the first is never a label


# Schedule and optimisers


def test_learning_rate_climbs_then_falls_to_zero():
    config = sft.SFTConfig(updates=100, warmup=10)
    shares = [sft.learning_rate(step, config) for step in range(101)]
    assert shares[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert shares[10] == 1.0 and shares[55] == pytest.approx(0.5)
    assert shares[99] == pytest.approx(1 / 90) and shares[100] == 0.0
    for config in (sft.SFTConfig(updates=5, warmup=0), sft.SFTConfig(1, warmup=1)):
        shares = [sft.learning_rate(s, config) for s in range(config.updates)]
        assert shares[0] == 1.0 and all(0 < share <= 1 for share in shares)


def test_a_cooldown_may_begin_late():
    """With a share of 1/2 the peak lasts for half of what follows the warm-up."""
    config = sft.SFTConfig(updates=100, warmup=10, cooldown=0.5)
    shares = [sft.learning_rate(step, config) for step in range(101)]
    assert shares[9:56] == [1.0] * 47
    assert shares[56] == pytest.approx(44 / 45) and shares[100] == 0.0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("muon", [False, True])
def test_every_parameter_is_in_one_group(muon, tied):
    sizes = {"dim": 8, "layers": 2, "heads": 2, "kv_heads": 1, "hidden": 6}
    config = GPTConfig(16, 16, **sizes, tied=tied)
    model = GPT(config, torch.Generator().manual_seed(0))
    names = {id(p): name for name, p in model.named_parameters()}
    steppers = sft.optimizers(model, sft.SFTConfig(muon=muon))
    groups = [(s, group) for s in steppers for group in s.param_groups]
    seen = [names[id(p)] for _, group in groups for p in group["params"]]
    assert sorted(seen) == sorted(names.values())
    assert [type(s).__name__ for s in steppers] == ["AdamW"] + ["Muon"] * muon
    for stepper, group in groups:
        for p in group["params"]:
            name = names[id(p)]
            projection = name.startswith("layers.") and "_proj" in name
            assert isinstance(stepper, torch.optim.Muon) == (muon and projection)
            assert group["weight_decay"] == (0.0 if "norm" in name else 0.1)


# Training


def memorises():
    """After 40 updates, is every demonstration the likeliest answer, and cheap?"""
    model = tiny_gpt()
    before = sum(nats(model, EXAMPLES))
    config = replace(CONFIG, updates=40, batch_size=8)
    metrics = list(run(model, config=config))
    tokens, mask = sft.collate(EXAMPLES, PAD)
    likeliest = model.logits(model(tokens[:, :-1])).argmax(-1)
    right = (likeliest == tokens[:, 1:])[mask].all().item()
    cheap = sum(nats(model, EXAMPLES)) < before / 10
    return right and cheap and metrics[-1]["loss"] < metrics[0]["loss"] / 10


def test_it_learns_its_demonstrations():
    assert memorises()


def test_one_update_by_hand():
    """Every metric against plain Python and an autograd of its own."""
    model = tiny_gpt()
    config = replace(CONFIG, batch_size=8, warmup=4)
    twin = copy.deepcopy(model)
    metrics = next(run(model, config=config))

    lengths = [len(prompt) + len(response) for prompt, response in EXAMPLES]
    live = sum(len(response) for _, response in EXAMPLES)
    loss = torch.zeros(())
    for prompt, response in EXAMPLES:
        logits = twin.logits(twin(torch.tensor([prompt + response])))[0]
        answer = logits[len(prompt) - 1 : -1]
        loss = loss + F.cross_entropy(answer, torch.tensor(response), reduction="sum")
    expected = {
        "update": 1,
        "loss": sum(nats(twin, EXAMPLES)) / live,
        "lr": 0.25,
        "grad_norm": training.gradient_norm(loss / live, twin),
        "tokens": sum(lengths),
        "steps": 1,
        "tokens_trained": live,
        "padding": 1 - sum(lengths) / (8 * max(lengths)),
    }
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert all(isinstance(value, int | float) for value in metrics.values())


def test_losses_of_an_epoch_add_up():
    """A batch reports its own mean, whatever count its gradient was divided by."""
    config = replace(CONFIG, lr=0.0, updates=3)
    metrics = list(run(tiny_gpt(), config=config))
    total = sum(row["loss"] * row["tokens_trained"] for row in metrics)
    assert total == pytest.approx(sum(nats(tiny_gpt(), EXAMPLES)), rel=1e-5)
    assert [row["update"] for row in metrics] == [1, 2, 3]


def test_examples_that_do_not_fit_are_refused():
    fits = [([BOS, *[3] * 9], [4] * 5 + [EOS])]
    list(run(tiny_gpt(), fits, replace(CONFIG, updates=1)))
    longer = [([BOS, *[3] * 10], [4] * 5 + [EOS])]
    with pytest.raises(ValueError, match="one has 17 tokens, .* context of 16"):
        list(run(tiny_gpt(), longer))
