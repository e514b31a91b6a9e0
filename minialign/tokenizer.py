"""Text to token ids and back: a byte-level BPE trainer and a `tiktoken` wrapper.

Byte-pair encoding starts from the 256 bytes and, again and again, gives the most
frequent pair of neighbours an id of its own. What may be merged is decided first, by
cutting the text into pieces (`PATTERN`): no token crosses a cut. Ours are

    <<19+14=33>>\\n#### 33   ->   << 1 9 + 1 4 = 3 3 >>\\n '#### ' 3 3

so a number has as many tokens as digits and each digit is one decision; `<<` is a
single first token (it says "I show my work"), and after `#### ` the digits follow.

Ids: the bytes are 0 to 255, then the merges in order, then the four `SPECIALS`. Text
never becomes a special: `encode` knows only bytes and merges, the others go in by id.

`python -m minialign.tokenizer` rebuilds `data/vocabulary.txt`.
"""

import base64
import hashlib
import operator
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import tiktoken

# Only ASCII classes: Python's `re` and tiktoken's Rust engine then cut alike. The last
# alternative takes any character, since tiktoken drops text that nothing matches.
PATTERN = r"<<|>>\n?|#### ?|[0-9]| ?[A-Za-z]+|[\s\S]"
SPECIALS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|answer|>")
VOCABULARY = Path(__file__).resolve().parent.parent / "data" / "vocabulary.txt"


def train_bpe(texts: Iterable[str], vocab_size: int) -> list[bytes]:
    """Learn merges: the bytes of every token in rank order, 256 bytes first.

    Each round merges the most frequent pair of neighbours. Of two that are as frequent
    it takes the one with the larger ids, so the order of the texts does not matter.

    Shapes: vocab_size - 4 tokens come back; the four specials take the rest.
    Raises: ValueError when vocab_size < 260, when a text is not valid Unicode or when
        the texts allow fewer merges than asked; TypeError when texts are not strings.
    Source: Sennrich et al. 2016 (arXiv 1508.07909), on bytes as in GPT-2.
    """
    _check_vocab_size(vocab_size)
    pieces = Counter()
    for text in _each_text(texts):
        pieces.update(re.findall(PATTERN, text))
    words = [(list(piece.encode()), count) for piece, count in pieces.items()]
    tokens = [bytes([value]) for value in range(256)]
    while len(tokens) < vocab_size - len(SPECIALS):
        pairs = Counter()
        for word, count in words:
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            most = len(tokens) + len(SPECIALS)
            raise ValueError(
                f"train_bpe: vocab_size {vocab_size} needs more merges than these "
                f"texts allow; every piece is one token at vocab_size {most}"
            )
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        words = [(_merge(word, best, len(tokens)), count) for word, count in words]
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


def _merge(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Replace each occurrence of the pair, from the left, by the new id."""
    merged = []
    position = 0
    while position < len(word):
        if tuple(word[position : position + 2]) == pair:
            merged.append(new)
            position += 2
        else:
            merged.append(word[position])
            position += 1
    return merged


class Tokenizer:
    """Token ids for prompts and responses over one vocabulary.

    `fingerprint` is the sha256 of everything that decides an encoding: the pattern,
    the specials and the tokens. A checkpoint stores it to refuse another vocabulary.
    """

    def __init__(self, tokens: Sequence[bytes]) -> None:
        """Wrap the tokens that `train_bpe` returned.

        Raises: ValueError when tokens 0 to 255 are not the bytes, or a token repeats.
        """
        tokens = list(tokens)
        fault = _first_fault(tokens)
        if fault:
            rank, reason = fault
            raise ValueError(f"Tokenizer: token {rank}: {reason}")
        ranks = {token: rank for rank, token in enumerate(tokens)}
        specials = {name: len(tokens) + i for i, name in enumerate(SPECIALS)}
        self.pad_id = specials["<|pad|>"]
        self.bos_id = specials["<|bos|>"]
        self.eos_id = specials["<|eos|>"]
        self.answer_id = specials["<|answer|>"]
        self.n_vocab = len(tokens) + len(SPECIALS)
        self._n_text = len(tokens)
        self._bytes = tokens + [name.encode() for name in SPECIALS]
        self._encoding = tiktoken.Encoding(
            name="minialign",
            pat_str=PATTERN,
            mergeable_ranks=ranks,
            special_tokens=specials,
            explicit_n_vocab=self.n_vocab,
        )
        content = "\n".join([PATTERN, *SPECIALS, *self._lines()])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; the name of a special in it is ordinary text too.

        Encode prompt and response apart: encode(a + b) is not encode(a) + encode(b).

        Raises: TypeError when text is no string; ValueError at a lone surrogate, which
            tiktoken would silently replace.
        """
        return self._encoding.encode_ordinary(_checked_text("encode", text))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ordinary ids; bytes that are not UTF-8 become U+FFFD.

        Raises: ValueError or TypeError naming the first id, and its position, that is
            a special, outside the vocabulary or not an integer.
        """
        checked = self._checked_ids("decode", ids)
        for position, token_id in enumerate(checked):
            if token_id >= self._n_text:
                raise ValueError(
                    f"decode: id {token_id} at position {position} is the special "
                    f"{SPECIALS[token_id - self._n_text]}; ids of text are 0 to "
                    f"{self._n_text - 1} (decode_response takes sampled ids)"
                )
        return self._text(checked)

    def encode_prompt(self, question: str) -> list[int]:
        """Ids of [bos] + question + [answer]: what the policy is asked to continue."""
        return [self.bos_id, *self.encode(question), self.answer_id]

    def encode_response(self, answer: str) -> list[int]:
        """Ids of answer + [eos]: what the policy should say, including when to stop."""
        return [*self.encode(answer), self.eos_id]

    def decode_response(self, ids: Iterable[int]) -> str:
        """Text up to the first EOS, whatever a policy sampled.

        Other specials show as their names, and bytes that are not UTF-8 as U+FFFD.

        Raises: ValueError or TypeError naming the first id, and its position, that is
            outside the vocabulary or not an integer.
        """
        checked = self._checked_ids("decode_response", ids)
        if self.eos_id in checked:
            checked = checked[: checked.index(self.eos_id)]
        return self._text(checked)

    def save(self, path: str | Path = VOCABULARY) -> None:
        """Write one header line, then `base64(token) rank`, one line per token."""
        text = "\n".join([self._header(), *self._lines()]) + "\n"
        Path(path).write_text(text, encoding="ascii", newline="\n")

    @classmethod
    def load(cls, path: str | Path = VOCABULARY) -> "Tokenizer":
        """Read what `save` wrote.

        Raises: ValueError naming the file, the line and the reason when any of it is
            not as written; OSError when there is nothing to read.
        """
        lines = _read_lines(path)
        header = lines[0]
        n_text, sha256 = _read_header(path, header)
        if lines[-1] != "":
            reason = "the last line does not end: cut short?"
            raise _refusal(path, len(lines), reason)
        body = lines[1:-1]
        if len(body) != n_text:
            reason = f"the file ends after {len(body)} tokens of text, not {n_text}"
            raise _refusal(path, len(lines) - 1, reason)
        tokens = [_read_token(path, line, rank) for rank, line in enumerate(body)]
        fault = _first_fault(tokens)
        if fault:
            rank, reason = fault
            raise _refusal(path, rank + 2, reason)  # the header is line 1
        tokenizer = cls(tokens)
        if tokenizer._header() != header:
            reason = (
                f"the header says sha256 {sha256}, this content has "
                f"{tokenizer.fingerprint}: damaged, or made for another split pattern"
            )
            raise _refusal(path, 1, reason)
        return tokenizer

    def _lines(self) -> list[str]:
        """One line for each token of text, in rank order."""
        tokens = self._bytes[: self._n_text]
        return [_line(token, rank) for rank, token in enumerate(tokens)]

    def _header(self) -> str:
        """The first line of a vocabulary file: how many tokens, and their sha256."""
        return (
            f"minialign-vocabulary version=1 tokens={self.n_vocab} "
            f"specials={','.join(SPECIALS)} sha256={self.fingerprint}"
        )

    def _text(self, ids: list[int]) -> str:
        """The bytes of these ids, read as UTF-8."""
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", errors="replace")

    def _checked_ids(self, where: str, ids: Iterable[int]) -> list[int]:
        """The ids as ints, each in the vocabulary; `where` is named in a refusal."""
        if hasattr(ids, "tolist"):  # of torch or numpy, where a bool has an index
            ids = ids.tolist()
        checked = []
        for position, item in enumerate(ids):
            try:
                if isinstance(item, bool):
                    raise TypeError
                token_id = operator.index(item)
            except TypeError:
                raise TypeError(
                    f"{where}: id {item!r} at position {position} is not an integer"
                ) from None
            if not 0 <= token_id < self.n_vocab:
                raise ValueError(
                    f"{where}: id {token_id} at position {position} is outside the "
                    f"vocabulary; ids are 0 to {self.n_vocab - 1}"
                )
            checked.append(token_id)
        return checked


def _first_fault(tokens: list[bytes]) -> tuple[int, str] | None:
    """The rank of the first token that cannot stand where it is, and why."""
    # Without all 256 bytes tiktoken panics on text it has not seen, with an exception
    # that `except Exception` does not catch.
    if len(tokens) < 256:
        return len(tokens), "missing; the first 256 tokens are the bytes in order"
    seen = {}
    for rank, token in enumerate(tokens):
        if not isinstance(token, bytes) or not token:
            return rank, f"got {token!r}; a token is one byte or more"
        if rank < 256 and token != bytes([rank]):
            return rank, f"got {token!r}; the first 256 tokens are the bytes in order"
        if token in seen:
            return rank, f"{token!r} repeats token {seen[token]}"
        seen[token] = rank
    return None


def _line(token: bytes, rank: int) -> str:
    """What stands in a vocabulary file for a token."""
    return f"{base64.b64encode(token).decode('ascii')} {rank}"


def _refusal(path: str | Path, line: int, reason: str) -> ValueError:
    return ValueError(f"{path}, line {line}: {reason}")


def _read_lines(path: str | Path) -> list[str]:
    """The lines of an ASCII file; the last one is empty where the file is whole."""
    data = Path(path).read_bytes().replace(b"\r\n", b"\n")
    if not data.isascii():
        first = next(i for i, value in enumerate(data) if value > 127)
        line = data.count(b"\n", 0, first) + 1
        raise _refusal(path, line, f"byte {data[first]:#04x} is not ASCII")
    return data.decode("ascii").split("\n")


def _read_header(path: str | Path, header: str) -> tuple[int, str]:
    """The number of tokens without the specials, and the sha256."""
    if not header.startswith("minialign-vocabulary "):
        raise _refusal(path, 1, "this is not a minialign vocabulary file")
    fields = {}
    for item in header.split(" ")[1:]:
        name, _, value = item.partition("=")
        fields[name] = value
    version = fields.get("version")
    if version != "1":
        raise _refusal(path, 1, f"version {version}; this code reads version 1")
    specials = fields.get("specials")
    if specials != ",".join(SPECIALS):
        raise _refusal(
            path, 1, f"specials {specials}; this code has {','.join(SPECIALS)}"
        )
    n_vocab = fields.get("tokens")
    if not re.fullmatch(r"[0-9]{1,9}", n_vocab or ""):
        raise _refusal(path, 1, f"tokens={n_vocab} is not a count")
    return int(n_vocab) - len(SPECIALS), fields.get("sha256", "(none)")


def _read_token(path: str | Path, line: str, rank: int) -> bytes:
    """The token in a line; the header is line 1, so rank 0 stands in line 2."""
    try:
        token = base64.b64decode(line.split(" ")[0], validate=True)
    except ValueError as error:
        raise _refusal(path, rank + 2, f"not base64: {error}") from None
    if line != _line(token, rank):
        reason = f"got {line!r}, not base64, a space and {rank}"
        raise _refusal(path, rank + 2, reason)
    return token


def _check_vocab_size(vocab_size: int) -> None:
    least = 256 + len(SPECIALS)
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"train_bpe: vocab_size is {vocab_size!r}; it is an integer")
    if vocab_size < least:
        raise ValueError(
            f"train_bpe: vocab_size is {vocab_size}; the least is {least}: 256 bytes "
            f"and {len(SPECIALS)} specials"
        )


def _each_text(texts: Iterable[str]) -> Iterable[str]:
    if isinstance(texts, str | bytes):
        raise TypeError("train_bpe: texts is one string; pass an iterable of strings")
    for number, text in enumerate(texts):
        yield _checked_text(f"train_bpe, text {number}", text)


def _checked_text(where: str, text: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{where}: text is {type(text).__name__}; it must be str")
    lone = re.search(r"[\ud800-\udfff]", text)
    if lone:
        raise ValueError(
            f"{where}: lone surrogate {lone[0]!r} at position {lone.start()}; "
            "text must be valid Unicode"
        )
    return text


def main() -> None:
    """Train on 20,000 demonstrations (seed 0) and write `data/vocabulary.txt`."""
    from minialign.problems import demonstration

    texts = []
    for index in range(20_000):
        example = demonstration(0, "train", index)
        texts += [example.problem.question, example.answer]
    tokenizer = Tokenizer(train_bpe(texts, vocab_size=768))
    VOCABULARY.parent.mkdir(exist_ok=True)
    tokenizer.save(VOCABULARY)
    n_tokens = sum(len(tokenizer.encode(text)) for text in texts)
    print(
        f"{VOCABULARY}: {tokenizer.n_vocab} tokens, sha256 {tokenizer.fingerprint}; "
        f"{sum(map(len, texts)) / n_tokens:.2f} characters per token"
    )


if __name__ == "__main__":
    main()
