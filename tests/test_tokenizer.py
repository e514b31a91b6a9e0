"""The tokenizer: what a token may be, round trips, refusals, the vocabulary file."""

import base64
import hashlib
import random
import re
import sys
import types
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minialign import tokenizer as module
from minialign.tokenizer import PATTERN, SPECIALS, Tokenizer, train_bpe

TEXTS = [
    "Tom has 14 apples and buys 19 more. How many apples does Tom have?",
    "<<19+14=33>>\n#### 33",
    "<<33*2=66>>\n<<66-4=62>>\n#### 62",
    "#### 7",
]
BYTES = [bytes([value]) for value in range(256)]
TOKENIZER = Tokenizer(train_bpe(TEXTS, 299))  # each piece of TEXTS is one token
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text(
    "<>#\n 0139+-=*/abAB'é", max_size=40
)


def pieces(text, tokenizer=TOKENIZER):
    return [tokenizer.decode([token_id]) for token_id in tokenizer.encode(text)]


# What a token may be.


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<<19+14=33>>\n", "<<|1|9|+|1|4|=|3|3|>>\n"),
        ("<<66-4=62>>\n#### 62", "<<|6|6|-|4|=|6|2|>>\n|#### |6|2"),
        ("#### -3", "#### |-|3"),
        ("33*2/6", "3|3|*|2|/|6"),
        ("Tom has 14 apples.", "Tom| has| |1|4| apples|."),
        ("<<<", "<<|<"),
        ("#####", "####|#"),
    ],
)
def test_pieces(text, expected):
    assert pieces(text) == expected.split("|")


def test_a_worked_answer_starts_with_one_token():
    assert len(TOKENIZER.encode("<<")) == 1
    assert TOKENIZER.encode("<<9")[0] == TOKENIZER.encode("<<")[0]


@given(TEXT)
def test_digits_and_operators_are_their_own_tokens(text):
    ids = TOKENIZER.encode(text)
    for character in "0123456789+-*/=":
        assert ids.count(ord(character)) == text.count(character)


# Training.


def test_merges_by_hand():
    assert train_bpe(["abab"], 262) == [*BYTES, b"ab", b"abab"]
    # Three pairs seen once each: (c, d) is the largest, then (a, b), then (space, cd).
    assert train_bpe(["ab cd"], 263) == [*BYTES, b"cd", b"ab", b" cd"]
    # Counts weigh: "zz" comes once, "ab" twice, in two texts or in one.
    assert train_bpe(["ab", "ab zz"], 261) == [*BYTES, b"ab"]
    assert train_bpe(["ab\nab\nzz"], 261) == [*BYTES, b"ab"]
    # Overlaps merge from the left: aaa is aa + a.
    assert train_bpe(["aaa"], 262) == [*BYTES, b"aa", b"aaa"]


@given(st.lists(st.text("ab c1<#\n", max_size=12), min_size=1, max_size=6), st.data())
def test_training_ignores_the_order_of_texts(texts, data):
    texts = [*texts, "abcabc abab"]
    shuffled = data.draw(st.permutations(texts))
    assert train_bpe(texts, 264) == train_bpe(shuffled, 264)


MIXED = st.text("aab é日", max_size=25)  # some characters are two bytes, or three


@given(st.lists(MIXED, max_size=5), MIXED)
def test_encoding_replays_the_merges(texts, text):
    tokens = train_bpe([*texts, "aabab aaaab é日"], 268)
    parents = parents_of(tokens)
    expected = [
        token for piece in split_by_hand(text) for token in merged(piece, parents)
    ]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    assert Tokenizer(tokens).encode(text) == [ranks[token] for token in expected]


def parents_of(tokens):
    """The two words whose merge each token was: what the earlier merges leave of it."""
    parents = {}
    for token in tokens[256:]:
        parents[token] = merged(token, parents)
        assert len(parents[token]) == 2
    return parents


def merged(piece, parents):
    """Replay every merge over the piece in the order in which they were learned."""
    word = [piece[i : i + 1] for i in range(len(piece))]
    for left, right in parents.values():
        i = 0
        while i + 1 < len(word):
            if (word[i], word[i + 1]) == (left, right):
                word[i : i + 2] = [left + right]
            i += 1
    return word


def split_by_hand(text):
    """Cut letters, spaces and others: a word takes one space before it."""
    words = []
    for before, character in pairwise(" " + text):
        glued = character in "ab" and (before in "ab" or words[-1:] == [" "])
        words[-1:] = [words[-1] + character] if glued else [*words[-1:], character]
    return [word.encode() for word in words]


def test_too_few_merges_is_an_error_that_says_how_many_there_are():
    with pytest.raises(ValueError, match="vocab_size 263.*at vocab_size 262"):
        train_bpe(["abab"], 263)
    with pytest.raises(ValueError, match="at vocab_size 260"):
        train_bpe([], 261)
    assert train_bpe([], 260) == BYTES


@pytest.mark.parametrize(
    "texts, vocab_size, error, message",
    [
        (["a"], 259, ValueError, "vocab_size is 259; the least is 260"),
        (["a"], 300.0, TypeError, "vocab_size is 300.0"),
        (["a"], True, TypeError, "vocab_size is True"),
        ("abc", 300, TypeError, "texts is one string"),
        (["a", b"b"], 300, TypeError, "text 1: text is bytes"),
        (["a", "b\ud800"], 300, ValueError, r"text 1: lone surrogate.*position 1"),
    ],
)
def test_training_refuses(texts, vocab_size, error, message):
    with pytest.raises(error, match=message):
        train_bpe(texts, vocab_size)


# Text to ids and back.


@given(TEXT)
def test_round_trip(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= token_id < TOKENIZER.n_vocab - 4 for token_id in ids)


def test_untrained_vocabulary_is_the_bytes():
    assert Tokenizer(BYTES).encode("é<<1") == [0xC3, 0xA9, 60, 60, 49]


@given(TEXT, TEXT)
def test_decoding_is_additive(first, second):
    ids = TOKENIZER.encode(first) + TOKENIZER.encode(second)
    assert TOKENIZER.decode(ids) == first + second


def test_encoding_is_not_additive_and_not_the_inverse_of_decoding():
    assert TOKENIZER.encode("<") * 2 != TOKENIZER.encode("<<")
    ids = [ord("<"), ord("<")]
    assert TOKENIZER.encode(TOKENIZER.decode(ids)) != ids


@pytest.mark.parametrize("text", ["\ud800", "ab\udfffc", "x\udc00\ud800"])
def test_lone_surrogates_are_refused(text):
    position = next(i for i, character in enumerate(text) if ord(character) > 0xD7FF)
    for encode in (
        TOKENIZER.encode,
        TOKENIZER.encode_prompt,
        TOKENIZER.encode_response,
    ):
        with pytest.raises(ValueError, match=f"surrogate.*position {position}"):
            encode(text)


@pytest.mark.parametrize("text", [b"bytes", None, 3, ["a"]])
def test_only_strings_are_encoded(text):
    with pytest.raises(TypeError, match="must be str"):
        TOKENIZER.encode(text)


@given(st.sampled_from(SPECIALS), TEXT, TEXT)
def test_the_name_of_a_special_is_ordinary_text(name, before, after):
    text = before + name + after
    ids = TOKENIZER.encode(text)
    assert max(ids) < TOKENIZER.n_vocab - 4
    assert TOKENIZER.decode(ids) == text


@given(TEXT)
def test_prompt_and_response(text):
    tok, ids = TOKENIZER, TOKENIZER.encode(text)
    assert tok.encode_prompt(text) == [296, *ids, 298]
    assert tok.encode_response(text) == [*ids, 297]
    assert tok.decode_response(tok.encode_response(text)) == text
    assert (tok.pad_id, tok.bos_id, tok.eos_id, tok.answer_id) == (295, 296, 297, 298)
    assert tok.n_vocab == 299


def test_decode_response_takes_whatever_a_policy_samples():
    tok, a = TOKENIZER, ord("a")
    assert tok.decode_response([a, tok.eos_id, a, tok.pad_id]) == "a"
    assert tok.decode_response([a, a]) == "aa"  # truncated: no EOS
    assert tok.decode_response([tok.eos_id]) == tok.decode_response([]) == ""
    specials = [tok.pad_id, a, tok.bos_id, tok.answer_id]
    assert tok.decode_response(specials) == "<|pad|>a<|bos|><|answer|>"
    assert tok.decode_response([0xC3, a, 0xE2, 0x82]) == "\ufffda\ufffd"
    assert tok.decode([0xC3]) == "\ufffd"


@given(st.lists(st.integers(0, TOKENIZER.n_vocab - 1), max_size=30))
def test_decode_response_never_fails_on_ids_of_the_vocabulary(ids):
    text = TOKENIZER.decode_response(ids)
    text.encode()  # and the text is valid Unicode
    assert "<|eos|>" not in text


def test_ids_may_be_numpy_or_torch_integers():
    ids = TOKENIZER.encode("<<1+1=2>>\n")
    assert TOKENIZER.decode(np.array(ids)) == "<<1+1=2>>\n"
    assert TOKENIZER.decode_response(torch.tensor(ids)) == "<<1+1=2>>\n"


@pytest.mark.parametrize(
    "bad, error",
    [
        (-1, ValueError),
        (299, ValueError),
        (10**30, ValueError),
        (1.0, TypeError),
        (True, TypeError),
        ("1", TypeError),
        (None, TypeError),
        (torch.tensor(1.0), TypeError),
        (np.bool_(True), TypeError),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(bad, error):
    for decode in (TOKENIZER.decode, TOKENIZER.decode_response):
        with pytest.raises(error, match="position 2") as caught:
            decode([97, 98, bad, -7])
        assert str(bad) in str(caught.value)
    # After an EOS too: a bad id is a bug wherever it stands.
    with pytest.raises(error, match="position 1"):
        TOKENIZER.decode_response([TOKENIZER.eos_id, bad])


def test_a_mask_or_a_batch_is_no_list_of_ids():
    for wrong in (torch.tensor([True]), np.array([1.0]), torch.tensor([[97]]), "a"):
        with pytest.raises(TypeError, match="position 0 is not an integer"):
            TOKENIZER.decode(wrong)


@pytest.mark.parametrize("i", range(4))
def test_decode_refuses_specials(i):
    message = rf"id {295 + i} at position 1 is the special .*{SPECIALS[i].strip('<|>')}"
    with pytest.raises(ValueError, match=message):
        TOKENIZER.decode([97, 295 + i])


@pytest.mark.parametrize(
    "tokens, message",
    [
        (BYTES[:-1], "token 255: missing"),
        ([b"b", *BYTES[1:]], "token 0: got b'b'"),
        ([*BYTES, b"ab", b"cd", b"ab"], "token 258: b'ab' repeats token 256"),
        ([*BYTES, b"a"], "token 256: b'a' repeats token 97"),
        ([*BYTES, b""], "token 256: got b''"),
        ([*BYTES, "ab"], "token 256: got 'ab'"),
    ],
)
def test_tokens_that_cannot_be_a_vocabulary(tokens, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(tokens)


# The fingerprint and the file.


def test_fingerprint_knows_the_tokens_their_order_and_the_pattern(monkeypatch):
    variants = [[], [b"ab"], [b"ab", b"cd"], [b"cd", b"ab"], [b"abcd"]]
    prints = {Tokenizer([*BYTES, *extra]).fingerprint for extra in variants}
    assert len(prints) == len(variants)
    monkeypatch.setattr(module, "PATTERN", PATTERN + "|x")
    assert Tokenizer(BYTES).fingerprint not in prints


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "vocabulary.txt"
    TOKENIZER.save(path)
    return path


def test_file_round_trip(vocabulary):
    loaded = Tokenizer.load(vocabulary)
    assert loaded.fingerprint == TOKENIZER.fingerprint
    text = "".join(TEXTS)
    assert loaded.encode(text) == TOKENIZER.encode(text)
    assert loaded.n_vocab == 299
    before = vocabulary.read_bytes()
    loaded.save(vocabulary)
    assert vocabulary.read_bytes() == before


def test_the_format_as_written_down(vocabulary):
    tokens = [*BYTES, b"ab", b"abab"]
    lines = [
        f"{base64.b64encode(token).decode()} {i}" for i, token in enumerate(tokens)
    ]
    content = "\n".join([PATTERN, *SPECIALS, *lines])
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    header = (
        "minialign-vocabulary version=1 tokens=262 "
        f"specials=<|pad|>,<|bos|>,<|eos|>,<|answer|> sha256={sha256}"
    )
    Tokenizer(tokens).save(vocabulary)
    assert vocabulary.read_text() == "\n".join([header, *lines, ""])
    # A checkout that turns line ends into CRLF leaves the same vocabulary.
    vocabulary.write_bytes("\r\n".join([header, *lines, ""]).encode())
    assert Tokenizer.load(vocabulary).fingerprint == sha256


def replace_line(number, new):
    def edit(data):
        lines = data.split(b"\n")
        lines[number - 1] = new(lines[number - 1])
        return b"\n".join(lines)

    return edit


@pytest.mark.parametrize(
    "edit, line, reason",
    [
        (lambda data: b"", 1, "not a minialign vocabulary"),
        (lambda data: b"\x89PNG\r\n" + data, 1, "0x89 is not ASCII"),
        (lambda data: data[:-1], 296, "does not end"),
        (lambda data: data + b"\n", 297, "after 296 tokens of text, not 295"),
        (lambda data: data[: data.index(b"MQ== 49")], 50, "after 49 tokens"),
        (replace_line(1, lambda old: old.replace(b"n=1", b"n=2")), 1, "version 2"),
        (replace_line(1, lambda old: old.replace(b"=299", b"=300")), 296, "not 296"),
        (replace_line(1, lambda old: old.replace(b"=299", b"=x")), 1, "tokens=x"),
        (replace_line(1, lambda old: old.replace(b"bos", b"bof")), 1, "specials"),
        (replace_line(1, lambda old: old[:-1]), 1, "damaged"),
        (replace_line(1, lambda old: old + b" more=1"), 1, "damaged"),
        (replace_line(1, lambda old: b"minialign-vocabulary "), 1, "version None"),
        (replace_line(9, lambda old: b"*" + old[1:]), 9, "not base64"),
        (replace_line(9, lambda old: b""), 9, "not base64, a space and 7"),
        (replace_line(9, lambda old: old + b" "), 9, "and 7"),
        (replace_line(9, lambda old: b"Bx== 7"), 9, "and 7"),  # stray low bits
        (replace_line(9, lambda old: b"BwA= 7"), 9, "the first 256 tokens"),
        (replace_line(9, lambda old: b"Bw== 8"), 9, "and 7"),
        (replace_line(9, lambda old: b"QQ== 7"), 9, "got b'A'; the first 256"),
        (replace_line(290, lambda old: b"QQ== 288"), 290, "repeats token 65"),
        (replace_line(290, lambda old: b" 288"), 290, "got b''"),
        (replace_line(290, lambda old: b"enp6eg== 288"), 1, "damaged"),
        (replace_line(9, lambda old: b"\xff" + old), 9, "0xff is not ASCII"),
    ],
)
def test_damage_is_named(vocabulary, edit, line, reason):
    vocabulary.write_bytes(edit(vocabulary.read_bytes()))
    with pytest.raises(ValueError, match=reason) as caught:
        Tokenizer.load(vocabulary)
    assert str(caught.value).startswith(f"{vocabulary}, line {line}: ")


def test_no_damage_passes(vocabulary):
    data, chance = vocabulary.read_bytes(), random.Random(0)
    damaged = [data[:length] for length in range(0, len(data), 61)]
    for _ in range(400):
        flipped = bytearray(data)
        flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        damaged.append(bytes(flipped))
    for start in range(0, len(data), 97):
        damaged.append(data[:start] + bytes(64) + data[start + 64 :])
    for copy in damaged:
        vocabulary.write_bytes(copy)
        with pytest.raises(ValueError, match=rf"{vocabulary}, line \d+: "):
            Tokenizer.load(vocabulary)


def test_a_file_for_another_pattern_is_refused(vocabulary, monkeypatch):
    monkeypatch.setattr(module, "PATTERN", r"[\s\S]")
    with pytest.raises(ValueError, match="another split pattern"):
        Tokenizer.load(vocabulary)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt"):
        Tokenizer.load(tmp_path / "nothing.txt")


# The command, and the vocabulary it made.


def test_main_trains_on_demonstrations(tmp_path, monkeypatch, capsys):
    chance, asked = random.Random(0), []
    words = ["".join(chance.choices("abcdefgh", k=6)) for _ in range(300)]

    def demonstration(seed, split, index):
        asked.append((seed, split, index))
        question = f"{words[index % 300]} {words[(index + 1) % 300]}?"
        problem = types.SimpleNamespace(question=question)
        return types.SimpleNamespace(problem=problem, answer=f"<<{index}>>\n")

    stub = types.ModuleType("minialign.problems")
    stub.demonstration = demonstration
    monkeypatch.setitem(sys.modules, "minialign.problems", stub)
    monkeypatch.setattr(module, "VOCABULARY", tmp_path / "data" / "vocabulary.txt")
    module.main()
    tokenizer = Tokenizer.load(tmp_path / "data" / "vocabulary.txt")
    assert asked == [(0, "train", index) for index in range(20_000)]
    assert tokenizer.n_vocab == 768
    assert pieces("<<12>>\n", tokenizer) == ["<<", "1", "2", ">>\n"]
    assert tokenizer.fingerprint in capsys.readouterr().out


COMMITTED = Tokenizer.load()
N_TEXT = COMMITTED.n_vocab - len(SPECIALS)
MERGES = [COMMITTED.decode([token_id]) for token_id in range(256, N_TEXT)]
ODD = [*SPECIALS, "<|", "|>", "eos", *"<>#|0 \n", "é", "日本", "\U0001f34e", "\x00"]


def test_texts_made_of_the_merges():
    """Round trip, no special, and each piece as the merges in their order make it."""
    tokens = [base64.b64decode(line.split()[0]) for line in vocabulary_lines()]
    parents, ranks = parents_of(tokens), {token: i for i, token in enumerate(tokens)}
    seen = set()

    @given(st.lists(st.sampled_from([*MERGES, *ODD * 9]), min_size=9, max_size=40))
    def holds(words):
        text = "".join(words)
        ids = COMMITTED.encode(text)
        assert COMMITTED.decode(ids) == text
        assert COMMITTED.decode_response(COMMITTED.encode_response(text)) == text
        pieces = [piece.encode() for piece in re.findall(PATTERN, text)]
        expected = [word for piece in pieces for word in merged(piece, parents)]
        assert ids == [ranks[word] for word in expected]
        assert max(ids, default=0) < N_TEXT
        seen.update(ids)

    holds()
    assert len(seen - set(range(256))) > 100  # many merges do come up


def vocabulary_lines():
    return module.VOCABULARY.read_text().splitlines()[1:]


def test_the_committed_vocabulary():
    assert COMMITTED.n_vocab == 768
    worked = "<<19+14=33>>\n<<33*2=66>>\n#### 66"
    expected = "<<|1|9|+|1|4|=|3|3|>>\n|<<|3|3|*|2|=|6|6|>>\n|#### |6|6"
    assert pieces(worked, COMMITTED) == expected.split("|")
