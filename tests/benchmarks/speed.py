"""How fast are training, sampling and one update of REINFORCE on this machine?

    python tests/benchmarks/speed.py [--device cpu] [--out speed.json]

Run by hand, on an idle machine; nothing is asserted about time. Shares of the peak
count 6 operations per weight inside the blocks and real token (no padding, no
attention scores, no output projection): an underestimate, the same for everyone.
With `transformers` installed it also measures Hugging Face `generate` on the same
weights in its Llama class, after checking that the two give the same logits.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from minialign import course, plotting
from minialign.algorithms import reinforce, sft
from minialign.logprobs import token_logprobs
from minialign.model import GPT
from minialign.problems import demonstration
from minialign.rewards import score, verifier
from minialign.sampling import generate


def timed(function, repeats: int = 3, warmup: int = 1) -> tuple[float, object]:
    """The best of a few runs, in seconds, and what the last one returned."""
    best = float("inf")
    for run in range(warmup + repeats):
        began = time.perf_counter()
        result = function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if run >= warmup:
            best = min(best, time.perf_counter() - began)
    return best, result


def matmul_peak(device: torch.device, size: int = 2048) -> float:
    """Floating-point operations per second of a large float32 product."""
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    return 2 * size**3 / timed(lambda: a @ b, repeats=8)[0]


def training(tokenizer, device, updates: int = 40) -> tuple[float, float]:
    """(real tokens per second, padding share) of SFT, data and optimiser included."""

    class Mixture:
        def __len__(self):
            return updates * 64

        def __getitem__(self, index):
            row = demonstration(0, "train", index)
            return (
                tokenizer.encode_prompt(row.problem.question),
                tokenizer.encode_response(row.answer),
            )

    model = course.load_policy(tokenizer, device)
    config = sft.SFTConfig(updates=updates)
    tokens, padding, began = 0, 0.0, 0.0
    for metrics in sft.train(model, Mixture(), config, pad_id=tokenizer.pad_id):
        if metrics["update"] == 8:
            began, tokens, padding = time.perf_counter(), 0, 0.0
        tokens += metrics["tokens"]
        padding += metrics["padding"]
    return tokens / (time.perf_counter() - began), padding / (updates - 8)


def uncached(model: GPT, prompts, samples: int, steps: int, eos: int, pad: int, dice):
    """The loop everyone writes first: the whole sequence again for each new token."""
    longest = max(map(len, prompts))
    left = [[pad] * (longest - len(p)) + list(p) for p in prompts]
    rows = [row for row in left for _ in range(samples)]
    tokens = torch.tensor(rows, device=model.embed_tokens.weight.device)
    padding = (tokens == pad).sum(1)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=tokens.device)
    count = 0
    with torch.no_grad():
        for _ in range(steps):
            hidden = model(tokens, padding=padding)[:, -1]
            probs = model.logits(hidden).softmax(-1)
            choice = torch.multinomial(probs, 1, generator=dice)[:, 0]
            count += int((~ended).sum())
            ended |= choice == eos
            tokens = torch.cat([tokens, choice[:, None]], 1)
            if ended.all():
                break
    return count


def hugging_face(model: GPT, tokenizer):
    """The same weights in Hugging Face's Llama class, or None without the package."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
    c = model.config
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.dim,
        intermediate_size=c.hidden,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        max_position_embeddings=c.context,
        rms_norm_eps=c.norm_eps,
        rope_theta=c.rope_theta,
        tie_word_embeddings=c.tied,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    theirs = LlamaForCausalLM(config).to(model.embed_tokens.weight.device).eval()
    weights = {
        name if name.startswith("lm_head") else f"model.{name}": weight
        for name, weight in model.state_dict().items()
    }
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and not [n for n in missing if "rotary" not in n]
    device = model.embed_tokens.weight.device
    tokens = torch.randint(c.vocab_size, (4, 50), device=device)
    with torch.no_grad():
        apart = (model.logits(model(tokens)) - theirs(tokens).logits).abs().max().item()
    assert apart < 1e-4, f"logits {apart} apart"
    print(f"Hugging Face Llama, same weights: logits at most {apart:.1e} apart")
    return theirs


def their_generate(theirs, prompts, samples, steps, eos: int, pad: int, least: int):
    longest = max(map(len, prompts))
    left = [[pad] * (longest - len(p)) + list(p) for p in prompts]
    rows = [row for row in left for _ in range(samples)]
    tokens = torch.tensor(rows, device=theirs.device)
    with torch.no_grad():
        out = theirs.generate(
            tokens,
            attention_mask=(tokens != pad).long(),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=steps,
            min_new_tokens=least,
            eos_token_id=eos,
            pad_token_id=pad,
        )[:, longest:]
    return int((out != pad).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", help="also write the numbers to this JSON file")
    options = parser.parse_args()
    device = course.pick_device(options.device)
    tokenizer = course.load_tokenizer()
    model = course.load_policy(tokenizer, device)
    eos, pad = tokenizer.eos_id, tokenizer.pad_id
    inside = sum(p.numel() for p in model.layers.parameters())
    numbers: dict[str, object] = plotting.provenance(device)

    def report(name: str, value: float, unit: str) -> None:
        numbers[name] = value
        print(f"{name:<58}{value:>12,.2f} {unit}")

    peak = matmul_peak(device)
    report("float32 matmul peak", peak / 1e9, "GFLOP/s")
    speed, padding = training(tokenizer, device)
    report("training", speed, "real tokens/s")
    report("training, share of the peak", 6 * inside * speed / peak * 100, "%")
    report("training, padding", padding * 100, "%")

    problems = course.stream(0, 64)
    prompts = [tokenizer.encode_prompt(p.question) for p in problems]
    dice = torch.Generator(device).manual_seed(0)
    theirs = hugging_face(model, tokenizer)
    never = tokenizer.answer_id  # a special that the base never samples
    for draw, rows, samples, steps, stop in (
        ("REINFORCE draw, 32 x 8 to EOS", prompts[:32], 8, 128, eos),
        ("fixed 256 x 64, 32 prompts x 8", prompts[:32], 8, 64, never),
    ):

        def ours(rows=rows, samples=samples, steps=steps, stop=stop):
            out = generate(
                model,
                rows,
                eos_id=stop,
                pad_id=pad,
                max_new_tokens=steps,
                samples=samples,
                generator=dice,
            )
            return int(out.lengths().sum())

        seconds, tokens = timed(ours)
        report(f"{draw}: ours", tokens / seconds, "tokens/s")
        report(f"{draw}: ours", seconds, "s")
        arguments = (rows, samples, steps, stop, pad)
        slow, count = timed(lambda a=arguments: uncached(model, *a, dice), 1, 0)
        report(f"{draw}: uncached loop", count / slow, "tokens/s")
        if theirs is not None:
            least = steps if stop == never else 1
            other, count = timed(
                lambda a=arguments, n=least: their_generate(theirs, *a, n), 2
            )
            report(f"{draw}: Hugging Face generate", count / other, "tokens/s")
            report(f"{draw}: Hugging Face generate", other, "s")
            report(f"{draw}: ours is faster by", other / seconds, "x")

    def draw():
        return generate(
            model,
            prompts[:32],
            eos_id=eos,
            pad_id=pad,
            max_new_tokens=128,
            samples=8,
            generator=dice,
        )

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    drawing, rollout = timed(draw)
    scoring, rewards = timed(lambda: score(verifier, problems[:32], rollout, tokenizer))
    advantages = (rewards - rewards.mean()).to(device)

    def update():
        for rows in rollout.micro_batches(64):
            part = rollout.select(rows)
            logprobs = token_logprobs(model, part.tokens, part.mask)
            loss = reinforce.reinforce_loss(
                logprobs, advantages[rows], part.mask, count=len(rewards)
            )
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    updating, _ = timed(update)
    for name, seconds in (("draw", drawing), ("score", scoring), ("update", updating)):
        report(f"one REINFORCE update, 32 x 8: {name}", seconds, "s")
    if options.out:
        Path(options.out).write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
