"""A GPU that is not there: it refuses what a real one refuses, and all of ours runs on
it: every `train`, fresh and resumed, what is used around them, and every lesson.

The first part is about the imitation, the others about the library.
"""

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minialign import checkpoint
from minialign.evaluation import measured_kl, policy_gradient, sample_answers
from minialign.rewards import score
from minialign.sampling import Rollout, collate, generate, rescore
from minialign.training import deal
from tests import toy
from tests.methods import DEMONSTRATIONS, METHODS, Method, start
from tests.other_device import HERE, THERE, lies_there, other_device
from tests.properties.training import assert_same_bits

SIDES = [HERE, THERE]


@pytest.fixture
def there() -> Iterator[torch.device]:
    with other_device() as device:
        yield device


# --- the imitation: what a real GPU refuses -----------------------------------------


def world(device: str | torch.device) -> SimpleNamespace:
    """The same things on either device, to be mixed."""
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        model.bias.copy_(torch.tensor([5.0, 6.0]))
    return SimpleNamespace(
        x=torch.arange(6.0, device=device).view(3, 2),
        square=torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device),
        one=torch.tensor(0.5, device=device),  # 0-dim
        single=torch.tensor([9.0], device=device),  # one number, yet a dimension
        ids=torch.tensor([2, 0], device=device),
        id=torch.tensor(1, device=device),
        mask=torch.tensor([True, False, True], device=device),
        column=torch.tensor([[True], [False], [True]], device=device),
        model=model.to(device),
        draw=torch.Generator(device).manual_seed(7),
    )


def names(far: str | torch.device, near: str | torch.device) -> dict:
    """What a line below may speak of: `far` lies there, `near` on the CPU."""
    modules = {"copy": copy, "np": np, "torch": torch, "nn": nn, "F": F}
    return {"far": world(far), "near": world(near), **modules}


def run(line: str, known: dict) -> None:
    """A line of the lists below, as if it stood in a program."""
    exec(line, known)  # noqa: S102


REFUSED = """
far.x + near.x
near.x * far.x
far.x - near.single
near.x + far.one
far.x == near.x
far.x.add_(near.x)
near.one.add_(far.one)
(near.one > 0).__iand__(far.one > 0)
near.mask.logical_and_(far.mask)
torch.addcmul(far.x, near.one, near.one)
far.x.clamp(min=near.one)
torch.where(far.column, far.x, near.x)
torch.where(near.column, far.x, 0.0)
torch.equal(far.x, near.x)
torch.allclose(far.x, near.x)
torch.cat((far.x, near.x))
torch.stack((far.x, near.x))
torch.stack((far.one, near.one))
far.x @ near.square
far.x.gather(0, near.ids[:, None])
near.x.gather(0, far.ids[:, None])
far.x.scatter(0, near.ids[:, None], 1.0)
far.x.scatter(0, far.ids[:, None], near.x)
far.x.masked_fill(near.column, 0.0)
far.x.masked_scatter(near.column, far.x)
far.x.masked_scatter(far.column, near.x)
far.x.masked_select(near.column)
far.x.index_select(0, near.ids)
far.x.index_add(0, far.ids, near.x[:2])
far.x.take(near.ids)
near.x.take(far.ids)
torch.searchsorted(far.single, near.single)
far.ids.repeat_interleave(near.ids)
F.embedding(near.ids, far.x)
F.cross_entropy(far.x[:2], near.mask[:2].long())
F.rms_norm(near.x, (2,), far.x[0])
F.scaled_dot_product_attention(far.x[None], near.x[None], far.x[None])
far.model(near.x)
near.model(far.x)
near.x[far.ids]
near.x[far.mask]
near.x[:, far.ids - 1]
far.x[far.ids] = near.x[:2]
far.x[near.ids] = near.x[:2]
far.x[[2, 0]] = near.x[:2]
far.x[far.mask] = near.x[:2]
far.x.index_put_((far.ids,), near.x[:2])
near.x[near.ids] = far.x[:2]
near.x[far.ids] = far.x[:2]
near.x[far.mask] = far.square
torch.rand(3, device=far.x.device, generator=near.draw)
torch.rand(3, generator=far.draw)
torch.randperm(3, device=far.x.device, generator=near.draw)
near.x.normal_(generator=far.draw)
far.x.uniform_(generator=near.draw)
far.x.abs().multinomial(1, generator=near.draw)
far.draw.set_state(near.draw.get_state())
near.draw.set_state(far.draw.get_state())
far.x.numpy()
np.asarray(far.x)
np.array([far.one])
near.model.weight.grad = far.square
""".strip().splitlines()


@pytest.mark.parametrize("line", REFUSED)
def test_what_a_real_gpu_refuses(there, line):
    run(line, names(HERE, HERE))  # it is wrong for the devices, and for nothing else
    with pytest.raises((RuntimeError, TypeError)) as refusal:
        run(line, names(there, HERE))
    words = "same device", "should be either on", "for generator", "numpy", "RNG state"
    assert any(word in str(refusal.value) for word in words)


# --- the imitation: what a real GPU permits -----------------------------------------

THERE_AFTER = """
far.x + near.one
near.one * far.x
far.one - near.one
1 - far.x
far.x > near.one
near.one == far.x
(near.one > 0) & far.mask
far.mask.clone().__iand__(near.one > 0)
far.x.pow(near.one)
near.one / far.x
far.x.add_(near.one)
far.x.lerp(far.x, near.one)
torch.where(far.column, far.x, near.one)
torch.where(far.column, near.one, near.one)
torch.where(far.column, far.x, 0.0)
far.x.masked_fill(far.column, near.one)
far.x[near.ids]
far.x[near.mask]
far.x[far.ids]
far.x[near.id]
far.x[:, near.id]
far.x.copy_(near.x)
far.x.view_as(near.x)
far.one.expand_as(near.x)
far.x.index_put((near.ids,), far.x[:2])
far.x.index_put((near.ids,), near.one)
far.x.index_put((far.mask,), near.single)
near.x.to(far.x)
near.x.to(far.x.device)
near.x.to(far.x.device, torch.float64)
near.x.type_as(far.x)
torch.as_tensor(far.x)
torch.as_tensor(near.x, device=far.x.device)
torch.zeros_like(near.x, device=far.x.device)
torch.ones_like(far.x)
far.x.new_full((2,), 3.0)
far.x.new_tensor([1.0, 2.0])
far.x.clone().detach().requires_grad_()
far.x.sort(dim=1, descending=True).values
far.x.abs().mean(0, keepdim=True).T
far.x.max(1)[1]
far.x.split(1)[2]
list(far.x)[1]
torch.stack(list(far.x))
F.one_hot(far.ids)
torch.rand(2, 3, device=far.draw.device, generator=far.draw)
torch.randperm(9, device=far.draw.device, generator=far.draw)
torch.empty(3, device=far.x.device).normal_(generator=far.draw)
torch.linalg.vector_norm(far.x)
far.model(far.x)
far.model(near.x.to(far.x.device))
far.model.weight.data
far.model.state_dict()["weight"]
copy.deepcopy(far.x)
copy.deepcopy(far.model).weight
nn.Linear(2, 2).to(far.x).weight * 0
""".strip().splitlines()

HERE_AFTER = """
near.x.copy_(far.x)
near.x[far.id]
near.x[far.id, 1]
near.x.view_as(far.x)
far.x.cpu()
far.x.to("cpu")
far.x.to(near.x)
far.x.cpu() + near.x
far.x[0].cpu()
torch.as_tensor(far.x, device="cpu")
torch.as_tensor(far.x, dtype=torch.float64, device="cpu")
torch.tensor([far.one, near.one])
torch.full((2,), far.one)
torch.arange(3)
torch.tensor(far.x.tolist())
torch.tensor([far.one.item(), float(far.one), int(far.id), bool(far.one > 0)])
torch.from_numpy(far.x.cpu().numpy())
torch.from_numpy(far.x.numpy(force=True))
copy.deepcopy(far.model).cpu().weight
""".strip().splitlines()

WRITES = """
far.x[1:] = near.x[:2]
far.x[0] = near.single
far.x[0, 1] = near.one
far.x[near.id] = near.single
far.x[...] = near.x
far.x[far.ids] = near.one
far.x[near.ids] = far.square
far.x[near.mask] = 7.0
far.x[far.mask] = near.single
far.x[far.ids] = near.single
near.x[far.ids] = 0.0
near.x[far.mask] = near.single
near.x[1:] = far.x[:2]
near.x[far.id] = far.x[0]
near.x[near.ids] = far.one
far.x += near.one
far.x[:, 1] *= near.one
far.model.weight.data = near.square
far.x.data = near.x
far.model.load_state_dict(near.model.state_dict())
near.model.load_state_dict(far.model.state_dict())
""".strip().splitlines()


@pytest.mark.parametrize(
    "line, side",
    [(line, THERE) for line in THERE_AFTER] + [(line, HERE) for line in HERE_AFTER],
)
def test_what_a_real_gpu_permits(there, line, side):
    """And the result has the bits that it has on the CPU, and lies where it should."""
    result = eval(line, names(there, HERE))
    assert result.device == side and type(result) in (torch.Tensor, nn.Parameter)
    assert (result.is_cuda, result.is_cpu) == (side == THERE, side == HERE)
    assert torch.equal(result.cpu(), eval(line, names(HERE, HERE)))


@pytest.mark.parametrize("line", WRITES)
def test_what_may_be_written_from_the_other_side(there, line):
    mixed, alone = names(there, HERE), names(HERE, HERE)
    run(line, mixed)
    run(line, alone)
    for side in ("far", "near"):
        assert torch.equal(mixed[side].x.cpu(), alone[side].x)
        assert torch.equal(mixed[side].model.weight.cpu(), alone[side].model.weight)
    assert mixed["near"].x.device == HERE
    replaced = ".data = near" in line
    assert (mixed["far"].x.device == HERE) == (replaced and "far.x" in line)
    assert (mixed["far"].model.weight.device == HERE) == (replaced and "model" in line)


MAKERS = """
torch.zeros(2, device={})
torch.ones(2, 2, device={})
torch.full((2,), 3, device={})
torch.empty(2, device={})
torch.tensor([1, 2], device={})
torch.arange(4, device={})
torch.linspace(0, 1, 3, device={})
torch.eye(2, device={})
torch.rand(2, device={})
torch.randn(2, device={})
torch.randint(3, (2,), device={})
torch.randperm(3, device={})
torch.zeros(2).to({})
torch.zeros(2).new_zeros(3, device={})
torch.empty_like(torch.zeros(2), device={})
""".strip().splitlines()


@pytest.mark.parametrize("line", MAKERS)
def test_memory_is_made_where_it_is_asked_for(there, line):
    for name in ("'cuda'", "'cuda:0'", "torch.device('cuda')"):
        made = eval(line.format(name), {"torch": torch})
        assert made.device == there and made.get_device() == 0
    assert eval(line.format("'cpu'"), {"torch": torch}).device == HERE
    assert eval(line.format("None").replace(".to(None)", ""), {"torch": torch}).is_cpu


def test_names_of_devices(there):
    assert torch.zeros(1, device="cuda").device == torch.device("cuda:0") == there
    assert torch.device("cuda") != there and torch.device("cuda").type == "cuda"
    assert torch.cuda.is_available() and torch.cuda.device_count() == 1
    assert torch.zeros(1).cuda().device == there and str(there) == "cuda:0"


def test_a_module_moves_with_all_it_has(there):
    model = nn.BatchNorm1d(2)
    weight = model.weight
    model(torch.ones(3, 2)).sum().backward()
    assert model.to(there) is model and model.weight is weight
    for tensor in (*model.parameters(), *model.buffers(), weight.grad):
        assert tensor.device == there
    assert nn.Linear(2, 2).cuda().weight.device == there
    assert {x.device for x in model.state_dict().values()} == {there}
    assert {x.device for x in model.cpu().state_dict().values()} == {HERE}
    assert weight.grad.device == HERE


def trained(device, optimizer):
    """A few steps of a small network, by other ways to a gradient than `train` goes."""
    layers = [nn.Linear(3, 4), nn.Linear(4, 2)]
    draw = torch.Generator().manual_seed(3)
    for layer in layers:
        nn.init.normal_(layer.weight, generator=draw)
        nn.init.zeros_(layer.bias)
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1]).to(device)
    steppers = optimizer(model)
    inputs = torch.arange(6.0).view(2, 3).to(device)
    for _ in range(3):
        outputs = model(inputs)
        slopes = torch.autograd.grad(outputs.square().sum(), list(model.parameters()))
        model(inputs).backward(gradient=outputs.detach())
        for weight, slope in zip(model.parameters(), slopes, strict=True):
            assert weight.device == weight.grad.device == slope.device
            torch.testing.assert_close(2 * weight.grad, slope)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert norm.device == model[0].weight.device and norm > 0.5
        for stepper in steppers:
            stepper.step()
        model.zero_grad()
    return model, [stepper.state_dict() for stepper in steppers]


def muon(model):
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    return [torch.optim.Muon(matrices, lr=0.1)]


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda model: [torch.optim.AdamW(model.parameters(), lr=0.1)],
        lambda model: [torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)],
        lambda model: [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)],
        muon,
    ],
    ids=["AdamW", "AdamW, fused", "SGD", "Muon"],
)
def test_gradients_and_optimisers(optimizer):
    expected = trained(HERE, optimizer)
    with other_device() as there:
        model, states = trained(there, optimizer)
        assert all(weight.device == there for weight in model.parameters())
    assert_same_bits(dict(model.state_dict()), dict(expected[0].state_dict()))
    assert_same_bits(states, expected[1])


def test_a_gradient_lies_where_its_input_does(there):
    near = torch.ones(2, requires_grad=True)
    far = torch.ones(2, device=there, requires_grad=True)
    slopes = torch.autograd.grad((near.to(there) * far).sum(), [near])
    assert slopes[0].device == HERE
    (near * far.cpu()).sum().backward()
    assert near.grad.device == HERE and far.grad.device == there


def test_a_generator_there_has_its_own_kind_of_state(there):
    near, far = torch.Generator(), torch.Generator("cuda")
    assert (near.device, far.device) == (HERE, there)
    for generator in (near, far):
        state = generator.manual_seed(5).get_state()
        first = torch.rand(3, generator=generator, device=generator.device)
        assert state.device == HERE  # also that of a real GPU's
        assert generator.set_state(state) is generator
        again = torch.rand(3, generator=generator, device=generator.device)
        assert torch.equal(first, again) and first.device == generator.device
        with pytest.raises(TypeError, match="RNG state"):
            generator.set_state(state.to(there))  # as after a load with map_location


def test_a_file_says_where_its_tensors_lay(tmp_path):
    path = tmp_path / "far.pt"
    with other_device() as there:
        tensor = torch.arange(3.0, device=there)
        torch.save({"far": tensor, "near": torch.ones(2)}, path)
        read = torch.load(path)
        assert (read["far"].device, read["near"].device) == (there, HERE)
        assert torch.equal(read["far"], tensor)
        assert torch.load(path, map_location="cpu")["far"].device == HERE
        assert torch.load(path, map_location="cuda")["near"].device == there
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="map_location"):
            torch.load(path)
    assert torch.load(path, map_location="cpu")["far"].tolist() == [0, 1, 2]


def test_nothing_of_it_is_left_behind():
    original = torch.Generator, list(torch.serialization._package_registry)
    available = torch.cuda.is_available()
    with pytest.raises(InterruptedError), other_device() as there:
        tensor = torch.ones(2, device=there)
        raise InterruptedError
    assert (torch.Generator, torch.serialization._package_registry) == original
    assert torch.cuda.is_available() == available
    assert torch.equal(tensor + torch.ones(2), torch.full((2,), 2.0))


# --- the library: every `train` -----------------------------------------------------

STOP = 1  # updates before a run is stopped; every run has more


def judged() -> tuple[Rollout, torch.Tensor]:
    """Answers that somebody else gave, as RRHF takes them: on the CPU."""
    asked, said = zip(*DEMONSTRATIONS, strict=True)
    rows = [(prompt, response) for prompt in asked[:2] for response in said[2:6]]
    tokens, mask = collate(rows, toy.TOKENIZER.pad_id)
    starts = torch.tensor([len(prompt) for prompt, _ in rows])
    ended = torch.zeros(len(rows), dtype=torch.bool)
    unknown = torch.zeros(mask.shape)
    rollout = Rollout(tokens, mask, unknown, starts, ended, temperature=1.0, samples=4)
    return rollout, torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0]])


def preferred() -> list:
    """Pairs that somebody else compared, as DPO takes them."""
    (prompt, chosen), *_, (_, rejected) = DEMONSTRATIONS
    return [(prompt, chosen, rejected), (prompt, chosen, [*rejected[:-1], *rejected])]


def forms(method: Method) -> dict[str, dict]:
    """Changes by name: with a reference and without, and with each kind of state."""
    found = {"with all there is": {}} | {k: x for k, x in method.states.items() if x}
    if method.draws:
        free = {} if method.price is None else {"beta": 0.0}
        found["without a reference"] = {"reference": None, **free}
    return found


RUNS = {
    f"{name}, {form}": (method, changes)
    for name, method in METHODS.items()
    for form, changes in forms(method).items()
}
RUNS["dpo, one reference"] = (METHODS["dpo"], {"reset_reference": False})
RUNS["dpo, given pairs"] = (
    METHODS["dpo"],
    {"given": preferred(), "reference": None},
)
RUNS["rrhf, given answers"] = (METHODS["rrhf"], {"given": judged()})


def begin(name: str, device, state: dict, draws) -> tuple[dict, Iterator[dict]]:
    method, changes = RUNS[name]
    return start(method, state, device, draws, **changes)


@cache
def whole_run(name: str) -> tuple[list[dict], dict, dict]:
    """On the CPU, without a stop: metrics, the state after STOP and the last one."""
    state: dict = {}
    _, steps = begin(name, HERE, state, HERE)
    metrics = list(islice(steps, STOP))
    middle = copy.deepcopy(state)
    metrics += steps
    assert len(metrics) > STOP
    return metrics, middle, state


def assert_same_end(state: dict, expected: dict) -> None:
    """The same bits, but for the generator: the two kinds have states of their own."""
    without = [
        {key: value for key, value in each.items() if key != "generator"}
        for each in (state, expected)
    ]
    assert_same_bits(*without)


def run_there(name: str, state: dict, draws, count: int | None = None) -> list[dict]:
    """That many updates on the device that is not there, and nowhere else."""
    models, steps = begin(name, THERE, state, draws)
    metrics = list(islice(steps, count))
    for model in models.values():
        assert all(lies_there(tensor) for tensor in model.state_dict().values())
    return metrics


@pytest.mark.parametrize("name", RUNS)
def test_training_gives_the_bits_of_the_cpu(name):
    expected, _, end = whole_run(name)
    state: dict = {}
    with other_device():
        metrics = run_there(name, state, THERE)
    assert metrics == expected
    assert_same_end(state, end)


@pytest.mark.parametrize("name", RUNS)
def test_training_goes_on_there_with_a_file_of_the_cpu(name, tmp_path):
    """And with a generator of the CPU's: the file holds the state of such a one."""
    expected, middle, end = whole_run(name)
    checkpoint.save(tmp_path / "state", middle)
    with other_device():
        state = checkpoint.load(tmp_path / "state")
        metrics = run_there(name, state, HERE)
    assert metrics == expected[STOP:]
    assert_same_end(state, end)


@pytest.mark.parametrize("name", RUNS)
def test_training_goes_on_there_with_its_own_file(name, tmp_path):
    expected, _, end = whole_run(name)
    with other_device():
        begun: dict = {}
        assert run_there(name, begun, THERE, STOP) == expected[:STOP]
        checkpoint.save(tmp_path / "state", begun)
        state = checkpoint.load(tmp_path / "state")
        metrics = run_there(name, state, THERE)
    assert metrics == expected[STOP:]
    assert_same_end(state, end)


@pytest.mark.parametrize("name", RUNS)
def test_the_cpu_goes_on_with_what_was_begun_there(name):
    """In memory, so its state holds tensors of the other side; drawn by the CPU."""
    expected, _, end = whole_run(name)
    state: dict = {}
    with other_device():
        run_there(name, state, HERE, STOP)
        metrics = list(begin(name, HERE, state, HERE)[1])
    assert metrics == expected[STOP:]
    assert_same_end(state, end)


# --- the library: what is used around training --------------------------------------

PROMPTS = [toy.TOKENIZER.encode_prompt(word) for word in ("a", "bcd", "ef", "g", "h")]


def sampled(policy, draws, **more) -> Rollout:
    return generate(
        policy,
        PROMPTS,
        eos_id=toy.TOKENIZER.eos_id,
        pad_id=toy.TOKENIZER.pad_id,
        max_new_tokens=8,
        samples=3,
        generator=torch.Generator(draws).manual_seed(1),
        **more,
    )


def measurements(device, draws) -> dict:
    """What a lesson computes besides training, from a policy on this device."""
    policy = toy.base().to(device)
    reference = toy.stretched().to(device)
    tokenizer = toy.TOKENIZER
    rollout = sampled(policy, draws, chunk=2)
    parts = rollout.micro_batches(4)
    dealt = deal(rollout, 2, 3, 2, torch.Generator(draws).manual_seed(2))
    asked = [*toy.PROBLEMS]
    lengths = rollout.lengths()
    found = {
        "rollout": vars(rollout),
        "one chunk": vars(sampled(policy, draws, temperature=1.5)),
        "rescored": rescore(reference, rollout, parts),
        "rescored, rows of the CPU": rescore(
            policy, rollout, torch.arange(len(rollout.tokens)).split(4)
        ),
        "dealt": [rows for step in dealt for rows in step],
        "kl": measured_kl(reference, policy, rollout, rows=4),
        "gradient": policy_gradient(policy, rollout, lengths.float()),
        "gradient, weights of the CPU": policy_gradient(
            policy, rollout, torch.arange(15.0)
        ),
        "rewards": score(toy.yes, asked, rollout, tokenizer),
        "rewards, from there": score(
            lambda problems, texts: lengths.float(), asked, rollout, tokenizer
        ),
    }
    greedy = {"greedy": True, "first_token": "y"}
    chance = {"generator": torch.Generator(draws).manual_seed(3), "batch_rows": 6}
    for name, samples, more in (("sampled", 3, chance), ("greedy", 1, greedy)):
        answers = sample_answers(
            policy, tokenizer, asked, samples, max_new_tokens=8, **more
        )
        found[name] = [answers.texts, answers.lengths.tolist(), answers.styles]
    return found


@pytest.mark.parametrize("draws", SIDES, ids=["drawn here", "drawn there"])
def test_what_is_measured_has_the_bits_of_the_cpu(draws):
    expected = measurements(HERE, HERE)
    lengths = expected["one chunk"]["mask"].sum(1)
    assert 0 < (lengths > 5).sum() < 0.7 * len(lengths)  # so rows left the batch
    with other_device() as there:
        found = measurements(there, draws)
        tensors = [value for value in found.values() if isinstance(value, torch.Tensor)]
        tensors += [found["rollout"][name] for name in ("tokens", "mask", "logprobs")]
        assert len(tensors) == 10 and all(lies_there(tensor) for tensor in tensors)
    assert_same_bits(found, expected)


def test_what_is_saved_there_is_read_where_there_is_no_gpu(tmp_path):
    state: dict = {}
    with other_device():
        run_there("ppo, a critic apart", state, THERE, STOP)
        checkpoint.save(tmp_path / "state", state)
    assert_same_bits(checkpoint.load(tmp_path / "state"), state)


def test_models_are_saved_from_and_loaded_to_either_side(tmp_path):
    policy, path = toy.base(), tmp_path / "model"
    for saved_on in SIDES:
        with other_device():
            policy.to(saved_on)
            checkpoint.save_model(path, policy, toy.TOKENIZER, {"seed": 1})
            for device in ("cpu", "cuda", THERE):
                loaded, extra = checkpoint.load_model(path, toy.TOKENIZER, device)
                kind = torch.device(device).type
                assert all(x.device.type == kind for x in loaded.parameters())
                assert loaded.cos.device.type == kind and extra == {"seed": 1}
        loaded, _ = checkpoint.load_model(path, toy.TOKENIZER)  # without a GPU
        assert_same_bits(dict(loaded.state_dict()), dict(toy.base_weights()))


# --- the lessons --------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]
LESSONS = sorted(path.stem for path in (ROOT / "lessons").glob("[0-9]*.py"))
RUN = """
import runpy
import sys
from tests.other_device import other_device
del sys.argv[0]  # what is left is what the lesson would have been called with
with other_device():
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the tree, so that tests never touch the reader's own figures."""
    copied = tmp_path_factory.mktemp("clone")
    for name in ("minialign", "lessons", "data", "figures"):
        ignore = shutil.ignore_patterns("__pycache__", "local")
        shutil.copytree(ROOT / name, copied / name, ignore=ignore)
    (copied / "tests").mkdir()
    for name in ("__init__.py", "other_device.py"):
        shutil.copy(ROOT / "tests" / name, copied / "tests")
    return copied


@pytest.mark.slow
@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_runs_on_it(clone, lesson):
    script = str(clone / "lessons" / f"{lesson}.py")
    out = subprocess.run(
        [sys.executable, "-c", RUN, script, "--preset", "smoke", "--device", "cuda"],
        cwd=clone,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MPLBACKEND": "Agg",
            "PYTHONPATH": str(clone),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert f"{lesson}: preset smoke, device cuda" in out.stderr
    assert (clone / "figures" / "local" / f"{lesson}.json").exists()
