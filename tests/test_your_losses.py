"""A reader's file of losses: who is right and who is not is said, and how."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import mutants, your_losses
from tests.properties import common

ROOT = Path(__file__).resolve().parents[1]

RIGHT = """
import torch
from minialign.checks import (check_logprobs, check_mask, check_rows,)
from minialign.logprobs import sequence_sum

def reinforce_loss(logprobs, advantages, mask, count=None):
    check_mask(mask)
    check_logprobs("logprobs", logprobs, mask)
    check_rows("advantages", advantages, mask)
    return -sequence_sum(logprobs * advantages.detach()[:, None], mask, count)

def logistic(h, beta):
    return torch.nn.functional.softplus(-beta * h)

def logistics(h, beta):
    return h
"""

# Without an option of ours, without a look at the inputs; and right.
BARE = """
from __future__ import annotations
from dataclasses import dataclass
import torch

@dataclass
class Unused:
    x: int = 0

def ranking_loss(mean_logprobs, rewards, count=None):
    r = rewards.detach()
    pairs = r[:, :, None] < r[:, None, :]
    p = mean_logprobs
    gaps = torch.where(pairs, p[:, :, None] - p[:, None, :], 0.0)
    return torch.relu(gaps).sum() / (len(rewards) if count is None else count)
"""

WRONG = """
def sft_loss(logprobs, mask):
    return -(logprobs * mask).sum() / mask.sum()

def leave_one_out(rewards):
    return rewards - rewards.mean(1, keepdim=True)

def gae(rewards, values, gamma, lam):
    return rewards
"""


@pytest.fixture
def file(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "my_losses.py"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def outcomes(path: Path) -> dict[str, dict[str, str]]:
    """What became of the properties of each function."""
    found = {}
    for name, function in your_losses.functions_of(your_losses.load(path)).items():
        for entry in your_losses.meant(name, function):
            verdicts = your_losses.judge(function, entry)
            found[entry.name] = {
                common.name_of(each.check): each.outcome for each in verdicts
            }
    return found


def test_right_functions_hold(file):
    """Of several entries of one name the arguments decide; other names are let be."""
    found = outcomes(file(RIGHT))
    assert found.keys() == {"reinforce.reinforce_loss", "dpo.logistic"}
    assert {each for some in found.values() for each in some.values()} == {"holds"}


def test_what_it_does_not_take_and_does_not_refuse_is_no_bug(file, capsys):
    """And a file may hold what a module may hold."""
    (found,) = outcomes(file(BARE)).values()
    assert set(found.values()) == {"holds", "lax", "skipped"}
    assert found["check_golden_vectors"] == found["check_microbatches"] == "holds"
    assert found["check_shapes_refused"] == "lax"
    assert found["check_options_matter"] == "skipped"
    assert your_losses.main(file(BARE)) == 0
    assert "(you have no `margin`)" in capsys.readouterr().out


def test_wrong_functions_are_found_by_what_is_wrong_with_them(file):
    found = outcomes(file(WRONG))
    sft, others = found["sft.sft_loss"], found["rloo.leave_one_out"]
    assert sft["check_mask_is_inert"] == "BROKEN"
    assert sft["check_pure"] == sft["check_every_token_counts_alike"] == "holds"
    assert sft["check_microbatches"] == "skipped"
    assert others["check_unbiased_in_groups"] == "BROKEN"
    assert others["check_no_gradient_to"] == others["check_golden_vectors"] == "BROKEN"


def test_the_command_prints_a_table(file):
    command = [sys.executable, str(ROOT / "tests" / "mutants.py"), str(file(WRONG))]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 1, out.stderr
    lines = out.stdout.splitlines()
    assert "rloo.leave_one_out" in lines and "sft.sft_loss" in lines
    at = lines.index("  BROKEN  mask is inert")
    assert "masked slots changes neither value nor gradient" in lines[at + 1]
    takes = "it takes rewards, values, gamma, lam; ours also token_rewards, mask"
    assert f"  BROKEN  {takes}" in lines
    assert any("Greatest absolute difference" in line for line in lines)


def test_a_name_that_is_nearly_ours_is_pointed_out(file, capsys):
    your_losses.main(file(RIGHT))
    assert "logistics (did you mean logistic?)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, says",
    [
        (None, "no such file"),
        ("def broken(:", "cannot be imported: SyntaxError"),
        ("raise SystemExit('no')", "cannot be imported: SystemExit"),
        ("def mine(x): return x", "no function has the name of one of ours"),
    ],
)
def test_what_cannot_be_judged_is_one_line_and_exit_2(file, capsys, text, says):
    path = "nowhere.py" if text is None else file(text)
    assert mutants.main([str(path)]) == 2
    said = capsys.readouterr().err
    assert says in said and len(said.splitlines()) == 1
