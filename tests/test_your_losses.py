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
from minialign.logprobs import check_logprobs, check_mask, check_rows, sequence_sum

def reinforce_loss(logprobs, advantages, mask, count=None):
    check_mask(mask)
    check_logprobs("logprobs", logprobs, mask)
    check_rows("advantages", advantages, mask)
    return -sequence_sum(logprobs * advantages.detach()[:, None], mask, count)

def logistic(h, beta):
    return torch.nn.functional.softplus(-beta * h)

def of_another_name(x):
    return x
"""

WRONG = """
import torch

def sft_loss(logprobs, mask):
    return -(logprobs * mask).sum() / mask.sum()

def leave_one_out(rewards):
    return rewards - rewards.mean(1, keepdim=True)
"""


@pytest.fixture
def file(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "my_losses.py"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def broken(path: Path) -> dict[str, set[str]]:
    """The properties that each function breaks."""
    found = {}
    for verdict in your_losses.judge(path):
        found.setdefault(verdict.function, set())
        if verdict.complaint:
            found[verdict.function].add(common.name_of(verdict.check))
    return found


def test_right_functions_hold(file):
    """Of several entries of one name the arguments decide; other names are let be."""
    assert broken(file(RIGHT)) == {
        "reinforce.reinforce_loss": set(),
        "dpo.logistic": set(),
    }


def test_wrong_functions_are_found_by_what_is_wrong_with_them(file):
    """An option that is not taken is not asked about where ours has its default."""
    found = broken(file(WRONG))
    assert found.keys() == {"sft.sft_loss", "rloo.leave_one_out"}
    assert "check_mask_is_inert" in found["sft.sft_loss"]
    assert found["sft.sft_loss"].isdisjoint({"check_pure", "check_float32"})
    assert "check_gradient_reaches" in found["sft.sft_loss"]  # for its lack of `count`
    assert "check_unbiased_in_groups" in found["rloo.leave_one_out"]
    assert "check_no_gradient_to" in found["rloo.leave_one_out"]


def test_the_command_prints_a_table(file):
    command = [sys.executable, str(ROOT / "tests" / "mutants.py"), str(file(WRONG))]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 1, out.stderr
    lines = out.stdout.splitlines()
    assert "rloo.leave_one_out" in lines and "sft.sft_loss" in lines
    assert "  holds   pure" in lines
    (line,) = [x for x in lines if "BROKEN  mask_is_inert" in x]
    assert "what lies in masked slots changes neither value nor gradient" in line
    assert lines[-1].startswith("my_losses.py: ")


def test_no_file_is_one_line_and_exit_2(capsys):
    assert mutants.main(["nowhere.py"]) == 2
    said = capsys.readouterr().err
    assert "nowhere.py is no file" in said and len(said.splitlines()) == 1


def test_a_file_without_a_function_of_ours_is_refused(file, capsys):
    assert your_losses.main(file("def mine(x): return x")) == 2
    assert "reinforce_loss" in capsys.readouterr().err
