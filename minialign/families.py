"""The families of problems: how each draws its numbers and tells its story.

A family is one function that takes a `Teller` (dice, names, things) and returns a
`Draft`: the numbers that identify the problem, the question, and the orders in which
it may be worked. `problems.py` deals drafts into splits and writes the answers.

The odds beside each family say how its teachers answer. Families where an answer in
the head mostly fails have mostly terse teachers: that is what there is to unlearn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

_SHE = """Mia Ana Zoe Lena Ruth Ivy Nora Leah Maya Tara Aisha Carla Dora Elsa Fay
Greta Hana Jade Kira Luz"""
_HE = """Tom Sam Ben Omar Raj Leo Ivan Hugo Noah Paul Ali Carlos Dev Eric Felix Gus
Hans Jack Kofi Luis"""
_IT = """apple ball balloon bead bean book bottle bowl button cake candle card carrot
coin cookie crayon cup egg fig flower kite lemon magnet marble mug nut onion orange
pear pen pencil plum rock shell spoon stamp sticker ticket toy tulip"""
NAMES = {"she": _SHE.split(), "he": _HE.split()}
THINGS = _IT.split()
FRACTIONS = {
    2: "half",
    3: "a third",
    4: "a quarter",
    5: "a fifth",
    6: "a sixth",
    8: "an eighth",
    10: "a tenth",
}
PRONOUNS = {
    "she": {"she": "she", "She": "She"},
    "he": {"she": "he", "She": "He"},
}

Step = tuple[int, str, int]


@dataclass(frozen=True)
class Draft:
    """A told problem: what identifies it, its text, and the ways to work it."""

    family: str
    numbers: tuple[int | str, ...]
    question: str
    orders: tuple[tuple[Step, ...], ...]
    gold: int | str

    @property
    def steps(self) -> int:
        return len(self.orders[0]) if self.orders else 0


class Teller:
    """Dice and a cast. In the templates {A}, {B}, {C} are names, {She}, {she},
    the pronouns of A, {things} what the story is about."""

    def __init__(
        self,
        rng: Random,
        family: str,
        steps: tuple[int, int] = (1, 6),
        larger: bool = False,
    ):
        self.rng, self.family, self.larger = rng, family, larger
        self.least, self.most = steps
        who = rng.choice(("she", "he"))
        first = rng.choice(NAMES[who])
        others = [name for names in NAMES.values() for name in names if name != first]
        second, third = rng.sample(others, 2)
        self.slots = {"A": first, "B": second, "C": third, **PRONOUNS[who]}
        self.slots["things"] = f"{rng.choice(THINGS)}s"

    def size(self, low: int, high: int) -> int:
        """A quantity; in the `larger_numbers` split beyond anything seen in train."""
        if self.larger:
            return self.rng.randint(high + 1, 3 * high)
        return self.rng.randint(low, high)

    def small(self, low: int, high: int) -> int:
        """A multiplier, a divisor, a count of people: never enlarged."""
        return self.rng.randint(low, high)

    def length(self, low: int, high: int) -> int:
        """How many steps this problem takes, within what the split allows; five or
        six less often than fewer."""
        range_ = range(max(low, self.least), min(high, self.most) + 1)
        return self.rng.choices(range_, [3 if steps < 5 else 1 for steps in range_])[0]

    def say(self, *templates: str, **more: object) -> str:
        """One of the templates, filled in."""
        return self.rng.choice(templates).format(**self.slots, **more)

    def draft(self, numbers: tuple, text: list[str], *orders: list[Step]) -> Draft:
        a, op, b = orders[0][-1]
        gold = {"+": a + b, "-": a - b, "*": a * b, "/": a // (b or 1)}[op]
        works = tuple(tuple(steps) for steps in orders)
        return Draft(self.family, numbers, " ".join(text), works, gold)


@dataclass(frozen=True)
class Family:
    """How a family is told, how often, how long, and how its teachers answer."""

    tell: Callable[[Teller], Draft]
    weight: float  # share of problems, up to normalisation
    steps: tuple[int, int]  # fewest and most steps it can have
    terse: float  # share of terse answers, in [0, 1]
    careless: float  # share of careless answers
    showy: float  # share of showy answers; the rest is worked

    def deals(self, wanted: tuple[int, int]) -> bool:
        """Can it tell a problem with a number of steps in the wanted range?"""
        return self.steps[0] <= wanted[1] and self.steps[1] >= wanted[0]


# --- the twelve that the base learns ------------------------------------------------


def running_total(t: Teller) -> Draft:
    """Something is gained and lost, again and again."""
    start = held = t.size(10, 50)
    text = [
        t.say(
            "{A} has {n} {things}.",
            "On Monday {A} has {n} {things}.",
            "{A} starts the day with {n} {things}.",
            "There are {n} {things} in the box of {A}.",
            "{A} owns {n} {things}.",
            "In {A}'s bag there are {n} {things}.",
            n=start,
        )
    ]
    gains = ("{She} finds {n} more.", "{She} gets {n} from {B}.")
    gains += ("{She} buys {n} more.", "{She} wins {n} at a fair.")
    gains += ("{She} gets {n} from a friend.",)
    losses = ("{She} loses {n}.", "{She} gives {n} to {B}.", "{She} sells {n}.")
    losses += ("{She} leaves {n} at school.", "{She} lends {n} to {C}.")
    changes = []
    for _ in range(t.length(1, 8)):
        if held > 20 and t.rng.random() < 0.5:
            n = -t.small(3, min(held - 5, 30))
        else:
            n = t.size(3, 30)
        held += n
        changes.append(n)
        text.append(t.say(*(gains if n > 0 else losses), n=abs(n)))
    text.append(
        t.say(
            "How many {things} does {A} have now?",
            "How many {things} does {she} have in the end?",
            "How many {things} are there now?",
            "What number of {things} does {A} have at the end?",
            "Find how many {things} {A} has then.",
        )
    )
    return t.draft(
        (start, *changes),
        text,
        _chain(start, changes),
        _chain(start, sorted(changes, reverse=True)),  # first all gains
    )


def _chain(start: int, changes: list[int]) -> list[Step]:
    steps, held = [], start
    for n in changes:
        steps.append((held, "+" if n > 0 else "-", abs(n)))
        held += n
    return steps


def comparison(t: Teller) -> Draft:
    """One has more or fewer than another; a third has a multiple."""
    a, k = t.size(10, 50), t.small(2, 5)
    d = t.size(3, 30) if t.rng.random() < 0.6 else -t.small(3, a - 4)
    op, word = ("+", "more") if d > 0 else ("-", "fewer")
    b = a + d
    text = [
        t.say(
            "{A} has {a} {things}. {B} has {d} {word} than {A}.",
            "{A} collected {a} {things}. {B} collected {d} {word} than {A}.",
            "{B} has {d} {word} {things} than {A}, who has {a}.",
            "On {A}'s desk are {a} {things}, and on {B}'s {d} {word} than that.",
            "{A} counts {a} {things}. {B} counts {d} {word} than that.",
            a=a,
            d=abs(d),
            word=word,
        )
    ]
    first = (a, op, abs(d))
    times = t.say(
        "{C} has {k} times as many as {B}.",
        "{C}'s count is {k} times {B}'s.",
        k=k,
    )
    kind = t.rng.choice(("two", "times", "all"))
    if kind == "two":
        text.append(
            t.say(
                "How many {things} do they have together?",
                "How many {things} is that in all?",
                "What is the total number of {things}?",
            )
        )
        return t.draft((kind, a, d), text, [first, (a, "+", b)], [first, (b, "+", a)])
    if kind == "times":
        text += [times, t.say("How many {things} does {C} have?", "How many has {C}?")]
        return t.draft((kind, a, d, k), text, [first, (b, "*", k)])
    text += [times, t.say("How many {things} do the three have?", "How many in all?")]
    head = [first, (b, "*", k)]
    return t.draft(
        (kind, a, d, k),
        text,
        [*head, (a, "+", b), (a + b, "+", b * k)],
        [*head, (b, "+", b * k), (a, "+", b + b * k)],
    )


def rate(t: Teller) -> Draft:
    """So many an hour, for some hours, twice; some of it goes."""
    r, h1, h2 = t.size(3, 15), t.small(2, 6), t.small(2, 6)
    lost = t.small(3, r * (h1 + h2) - 3) if t.rng.random() < 0.5 else 0
    text = [
        t.say(
            "{A} gift-wraps {r} {things} an hour.",
            "A machine makes {r} {things} an hour.",
            "{A} can pack {r} {things} in one hour.",
            "Every hour {A} counts {r} {things}.",
            "At the fair {A} sells {r} {things} each hour.",
            r=r,
        ),
        t.say(
            "It goes on for {h1} hours on Monday and {h2} hours on Friday.",
            "On one day this lasts {h1} hours, on the next {h2} hours.",
            "The first shift is {h1} hours long, the second {h2} hours.",
            h1=h1,
            h2=h2,
        ),
    ]
    if lost:
        text.append(
            t.say(
                "Then {lost} of them are lost. How many {things} are left?",
                "But {lost} of them do not count. How many {things} count?",
                lost=lost,
            )
        )
    else:
        text.append(
            t.say("How many {things} is that?", "How many {things} is that in all?")
        )
    x, y = r * h1, r * h2
    end = [(x + y, "-", lost)] if lost else []
    return t.draft(
        (r, h1, h2, lost),
        text,
        [(r, "*", h1), (r, "*", h2), (x, "+", y), *end],
        [(r, "*", h2), (r, "*", h1), (y, "+", x), *end],
    )


def shopping(t: Teller) -> Draft:
    """Price times quantity, a few times over, and perhaps the change."""
    steps = t.length(3, 8)
    kinds = (steps + 1) // 2
    counts = [t.small(2, 8) for _ in range(kinds)]
    prices = [t.size(2, 10) for _ in range(kinds)]
    costs = [n * p for n, p in zip(counts, prices, strict=True)]
    paid = (sum(costs) // 50 + 1) * 50 if steps % 2 == 0 else 0
    goods = t.rng.sample(THINGS, kinds)
    wares = [
        f"{n} {thing}s at ${p} each"
        for n, thing, p in zip(counts, goods, prices, strict=True)
    ]
    listed = ", ".join(wares[:-1]) + f" and {wares[-1]}"
    text = [
        t.say(
            "{A} buys {listed}.",
            "At the shop {A} picks {listed}.",
            "{A} orders {listed}.",
            "For a party {A} gets {listed}.",
            "{A}'s basket holds {listed}.",
            listed=listed,
        )
    ]
    if paid:
        text.append(
            t.say(
                "{She} pays with ${paid}. How much change does {she} get?",
                "{She} has ${paid}. How many dollars are left?",
                "How many dollars of ${paid} does {she} keep?",
                paid=paid,
            )
        )
    else:
        text.append(
            t.say(
                "How much does {she} pay?",
                "How many dollars is that?",
                "What does it cost in dollars?",
            )
        )
    products = [(n, "*", p) for n, p in zip(counts, prices, strict=True)]
    orders = []
    for way in (1, -1):
        running = _chain(costs[::way][0], costs[::way][1:])
        change = [(paid, "-", sum(costs))] if paid else []
        orders.append([*products[::way], *running, *change])
    return t.draft((*counts, *prices, paid), text, *orders)


def sharing(t: Teller) -> Draft:
    """Packs are opened and shared out equally."""
    friends, each = t.small(2, 8), t.size(4, 12)
    total = friends * each
    packs = t.rng.choice([p for p in range(2, 11) if total % p == 0] or [1])
    loose = 0
    if packs == 1 or t.rng.random() < 0.4:
        packs = t.small(3, 8)
        loose = total % packs + packs * t.small(0, 1)
        if loose < 2 or loose >= total:
            loose += packs
    per = (total - loose) // packs
    if per < 2:
        return sharing(t)
    text = [
        t.say(
            "{A} opens {packs} packs of {per} {things}.",
            "{A} has {packs} bags with {per} {things} in each.",
            "There are {packs} boxes of {per} {things} in {A}'s room.",
            "{A} brings {packs} trays of {per} {things}.",
            "{A} bought {packs} packs that hold {per} {things} each.",
            packs=packs,
            per=per,
        )
    ]
    steps: list[Step] = [(packs, "*", per)]
    if loose:
        text.append(t.say("There are {n} more on the table.", n=loose))
        steps.append((packs * per, "+", loose))
    text.append(
        t.say(
            "{She} shares them equally among {n} friends.",
            "All are shared equally by {n} children.",
            "{She} puts the same number on each of {n} plates.",
            n=friends,
        )
    )
    steps.append((total, "/", friends))
    used = t.small(2, each - 2) if t.rng.random() < 0.6 else 0
    if used:
        steps.append((each, "-", used))
        text.append(
            t.say(
                "If {n} of each share are lost, how many {things} are left in one?",
                "From one share {n} are taken. How many {things} are left in it?",
                n=used,
            )
        )
    else:
        text.append(
            t.say("How many {things} is one share?", "How many are in one share?")
        )
    return t.draft((packs, per, loose, friends, used), text, steps)


def fraction_of(t: Teller) -> Draft:
    """A fraction goes; something else happens to the rest."""
    under = t.rng.choice(list(FRACTIONS))
    whole = under * t.size(max(3, 20 // under), 100 // under)
    part = whole // under
    rest = whole - part
    text = [
        t.say(
            "{A} has {n} {things} and gives {part} of them to {B}.",
            "{A} baked {n} cakes and sold {part} of them.",
            "Of {n} {things} in a shop, {part} are sold to {A}.",
            "{A} picks {n} {things}. {B} takes {part} of them.",
            "There were {n} {things} in a jar. {A} used {part} of them.",
            n=whole,
            part=FRACTIONS[under],
        )
    ]
    steps: list[Step] = [(whole, "/", under), (whole, "-", part)]
    change = t.rng.choice((0, 1, 1, -1, -1))
    if change > 0:
        change = t.size(3, 30)
        text.append(t.say("Then {n} more come in.", "Later {n} are added.", n=change))
    elif change < 0:
        change = -t.small(2, rest - 1)
        text.append(t.say("Then {n} more go.", "Later {n} are lost.", n=-change))
    if change:
        steps += _chain(rest, [change])
    text.append(
        t.say("How many are left?", "How many are there now?", "How many remain?")
    )
    return t.draft((whole, under, change), text, steps)


def groups(t: Teller) -> Draft:
    """Containers of several kinds, some contents used up."""
    steps = t.length(3, 8)
    kinds = (steps + 1) // 2
    counts = [t.small(2, 9) for _ in range(kinds)]
    sizes = [t.size(3, 10) for _ in range(kinds)]
    held = [n * s for n, s in zip(counts, sizes, strict=True)]
    used = t.small(2, sum(held) - 2) if steps % 2 == 0 else 0
    boxes = t.rng.sample(("bags", "boxes", "jars", "trays", "crates", "packs"), kinds)
    named = [
        f"{n} {box} of {s} {t.slots['things']}"
        for n, box, s in zip(counts, boxes, sizes, strict=True)
    ]
    listed = ", ".join(named[:-1]) + f" and {named[-1]}"
    text = [
        t.say(
            "{A} has {listed}.",
            "On a shelf there are {listed}.",
            "A shop holds {listed}.",
            "{A} carries {listed}.",
            "In {A}'s kitchen there are {listed}.",
            listed=listed,
        )
    ]
    if used:
        text.append(
            t.say(
                "Then {n} are used. How many {things} are left?",
                "After {n} are given away, how many {things} are left?",
                n=used,
            )
        )
    else:
        text.append(
            t.say("How many {things} is that?", "How many {things} are there in all?")
        )
    products = [(n, "*", s) for n, s in zip(counts, sizes, strict=True)]
    orders = []
    for way in (1, -1):
        running = _chain(held[::way][0], held[::way][1:])
        left = [(sum(held), "-", used)] if used else []
        orders.append([*products[::way], *running, *left])
    return t.draft((*counts, *sizes, used), text, *orders)


def together(t: Teller) -> Draft:
    """Two people work side by side for some days."""
    a, b, days = t.size(3, 15), t.size(3, 15), t.small(2, 6)
    total = (a + b) * days
    goal = total + t.small(5, 50) if t.rng.random() < 0.5 else 0
    text = [
        t.say(
            "{A} reads {a} pages a day and {B} reads {b}.",
            "{A} plants {a} {things} a day, {B} plants {b} a day.",
            "Each day {A} fixes {a} {things} and {B} fixes {b}.",
            "{A} makes {a} {things} a day while {B} makes {b} a day.",
            "Every day {A} sells {a} {things} and {B} sells {b}.",
            a=a,
            b=b,
        )
    ]
    if goal:
        text.append(
            t.say(
                "They want {g}. How many are missing after {n} days?",
                "They need {g} in all. How many are still to do after {n} days?",
                g=goal,
                n=days,
            )
        )
    else:
        text.append(
            t.say(
                "How many do they manage together in {n} days?",
                "How many is that for both in {n} days?",
                n=days,
            )
        )
    end = [(goal, "-", total)] if goal else []
    return t.draft(
        (a, b, days, goal),
        text,
        [(a, "+", b), (a + b, "*", days), *end],
        [(b, "+", a), (a + b, "*", days), *end],
    )


def unknown_first(t: Teller) -> Draft:
    """The end is told and the beginning asked."""
    end, gained, lost = t.size(10, 60), t.small(3, 30), t.size(5, 40)
    start = end + lost - gained
    if start < 2:
        return unknown_first(t)
    third = t.small(3, 30) if t.rng.random() < 0.5 else 0
    text = [
        t.say(
            "{A} had some {things}.",
            "{A} kept {things} in a box.",
            "In the morning {A} had a bag of {things}.",
            "{A} had a pile of {things}.",
            "Last week {A} owned some {things}.",
        ),
        t.say(
            "{She} gave {lost} to {B} and then found {gained}.",
            "{She} lost {lost} and bought {gained}.",
            "{She} sold {lost}, then got {gained} from {B}.",
            lost=lost,
            gained=gained,
        ),
    ]
    if third:
        text.append(t.say("Then {C} took {n}.", "Then {n} more were lost.", n=third))
    text.append(
        t.say(
            "Now {she} has {end}. How many did {she} have at first?",
            "That left {end}. How many {things} were there at first?",
            end=end,
        )
    )
    extra = [third] if third else []
    return t.draft(
        (end, gained, lost, third),
        text,
        _chain(end, [*extra, lost, -gained]),
        _chain(end, [lost, *extra, -gained]),
    )


def distance(t: Teller) -> Draft:
    """Speeds and hours, and how far it still is."""
    v, w, h, g = t.size(3, 12), t.size(3, 12), t.small(2, 6), t.small(2, 6)
    x, y = v * h, w * g
    goal = x + y + t.small(5, 50) if t.rng.random() < 0.5 else 0
    text = [
        t.say(
            "{A} cycles at {v} miles an hour for {h} hours and at {w} for {g} hours.",
            "A boat sails at {v} miles an hour for {h} hours, then {w} for {g} hours.",
            "{A} rides {v} miles an hour for {h} hours and {w} for {g} hours.",
            "A cart makes {v} miles an hour for {h} hours, then {w} for {g} hours.",
            "{A} walks {v} miles an hour for {h} hours, then runs {w} for {g} hours.",
            v=v,
            w=w,
            h=h,
            g=g,
        )
    ]
    if goal:
        text.append(
            t.say(
                "The trip is {n} miles. How many miles are left?",
                "The goal is {n} miles away. How far is it still?",
                n=goal,
            )
        )
    else:
        text.append(t.say("How many miles is that?", "How far is that in miles?"))
    end = [(goal, "-", x + y)] if goal else []
    return t.draft(
        (v, h, w, g, goal),
        text,
        [(v, "*", h), (w, "*", g), (x, "+", y), *end],
        [(w, "*", g), (v, "*", h), (y, "+", x), *end],
    )


def ages(t: Teller) -> Draft:
    """Years older, times as old, years from now."""
    a, k, d = t.size(3, 15), t.small(2, 5), t.size(2, 20)
    b = a * k
    older = t.rng.random() < 0.5 or d > b - 2
    c = b + d if older else b - d
    word = "older" if older else "younger"
    text = [
        t.say(
            "{A} is {a} years old. {B} is {k} times as old as {A}.",
            "{A} is {a}. {B} is {k} times that age.",
            "{B} is {k} times as old as {A}, who is {a}.",
            "{A} is only {a}, and {B} is {k} times as old.",
            "{A} turned {a} today. {B} is {k} times as old.",
            a=a,
            k=k,
        ),
        t.say(
            "{C} is {d} years {word} than {B}.",
            "{B}'s friend {C} is {d} years {word}.",
            d=d,
            word=word,
        ),
    ]
    steps: list[Step] = [(a, "*", k), (b, "+" if older else "-", d)]
    ahead = t.size(2, 20)
    kind = t.rng.choice(("now", "later", "sum"))
    if kind == "now":
        text.append(t.say("How old is {C}?", "What is the age of {C}?"))
        return t.draft((kind, a, k, d, word), text, steps)
    if kind == "later":
        text.append(t.say("How old will {C} be in {n} years?", n=ahead))
        steps.append((c, "+", ahead))
        return t.draft((kind, a, k, d, word, ahead), text, steps)
    text.append(
        t.say("How old are the three together?", "What do their three ages add up to?")
    )
    return t.draft(
        (kind, a, k, d, word),
        text,
        [*steps, (a, "+", b), (a + b, "+", c)],
        [*steps, (b, "+", c), (a, "+", b + c)],
    )


def leftovers(t: Teller) -> Draft:
    """People take some each; what is left over?"""
    packs, per, people = t.small(3, 9), t.size(4, 12), t.small(3, 9)
    total = packs * per
    most = (total - 1) // people
    if most < 2:
        return leftovers(t)
    each = t.small(2, min(most, 12))
    saved = t.small(2, 30) if t.rng.random() < 0.5 else 0
    text = [
        t.say(
            "{A} brings {packs} packs of {per} {things} to a party.",
            "For a party there are {packs} boxes of {per} {things}.",
            "{A} puts out {packs} plates with {per} {things} each.",
            "A class gets {packs} bags of {per} {things}.",
            "At camp {A} opens {packs} crates of {per} {things}.",
            packs=packs,
            per=per,
        ),
        t.say(
            "The {n} guests take {each} each.",
            "Each of the {n} children takes {each}.",
            "There, {n} people get {each} each.",
            n=people,
            each=each,
        ),
    ]
    taken = people * each
    steps: list[Step] = [(packs, "*", per), (people, "*", each), (total, "-", taken)]
    swapped = [steps[1], steps[0], steps[2]]
    if saved:
        text.append(t.say("{B} brings {n} more.", "Then {n} more arrive.", n=saved))
        steps.append((total - taken, "+", saved))
        swapped.append((total - taken, "+", saved))
    text.append(
        t.say("How many {things} are left?", "How many {things} are there now?")
    )
    return t.draft((packs, per, people, each, saved), text, steps, swapped)


# --- three that it never sees -------------------------------------------------------


def savings(t: Teller) -> Draft:
    """Saving week by week for something dear."""
    had, week, weeks = t.size(10, 60), t.size(4, 25), t.small(3, 9)
    saved = had + week * weeks
    price = saved + t.small(5, 90)
    text = [
        t.say(
            "{A} has ${had} and saves ${week} a week.",
            "{A} saves ${week} each week and already has ${had}.",
            "There is ${had} in {A}'s purse, and ${week} comes in every week.",
            "With ${had} to begin with, {A} puts ${week} aside each week.",
            "{A} starts with ${had}. Every week {she} earns ${week}.",
            had=had,
            week=week,
        ),
        t.say(
            "A bike costs ${price}. How much is missing after {n} weeks?",
            "After {n} weeks, how many dollars short is {she} of ${price}?",
            "How many dollars does {she} still need for a ${price} tent in {n} weeks?",
            price=price,
            n=weeks,
        ),
    ]
    steps = [(week, "*", weeks), (had, "+", week * weeks), (price, "-", saved)]
    return t.draft((had, week, weeks, price), text, steps)


def perimeter(t: Teller) -> Draft:
    """A fence round a garden, and its price."""
    long, wide, cost = t.size(8, 30), t.size(4, 20), t.small(2, 5)
    text = [
        t.say(
            "A garden is {a} feet long and {b} feet wide.",
            "{A}'s field measures {a} feet by {b} feet.",
            "{A} has a yard of {a} by {b} feet.",
            "A farm lot is {a} feet by {b} feet.",
            "A playground is {a} feet long and {b} feet across.",
            a=long,
            b=wide,
        ),
        t.say(
            "A fence around it costs ${n} a foot. How many dollars is that?",
            "What does a rope all around it cost at ${n} a foot?",
            n=cost,
        ),
    ]
    half = long + wide
    steps = [(long, "+", wide), (half, "*", 2), (half * 2, "*", cost)]
    return t.draft((long, wide, cost), text, steps)


def recipe(t: Teller) -> Draft:
    """A recipe for few, cooked for many."""
    base, factor, cups = t.small(2, 6), t.small(2, 6), t.size(2, 12)
    guests = base * factor
    had = t.small(2, cups * factor - 1)
    text = [
        t.say(
            "{A}'s soup for {n} people takes {cups} cups of rice.",
            "{A}'s recipe feeds {n} and needs {cups} cups of flour.",
            "To feed {n} people {A} uses {cups} cups of beans.",
            "With {cups} cups of oats {A} can serve {n} people.",
            "In {A}'s kitchen {n} people eat {cups} cups of pasta.",
            n=base,
            cups=cups,
        ),
        t.say(
            "{She} cooks for {g} and has {had} cups. How many cups are missing?",
            "For {g} people, how many cups must {she} add to the {had} at home?",
            g=guests,
            had=had,
        ),
    ]
    steps = [(guests, "/", base), (cups, "*", factor), (cups * factor, "-", had)]
    return t.draft((base, factor, cups, had), text, steps)


# --- a second skill -----------------------------------------------------------------


def _skill(t: Teller, numbers: list[int], question: str, gold: object) -> Draft:
    return Draft(t.family, tuple(numbers), question, (), str(gold))


def sort_numbers(t: Teller) -> Draft:
    numbers = t.rng.sample(range(2, 100), t.small(3, 5))
    question = t.say(
        "Sort these numbers, smallest first: {n}.",
        "Put {n} in order from small to large.",
        "Order these from the smallest to the largest: {n}.",
        "Write {n} in rising order.",
        "Arrange {n} so that each is larger than the one before.",
        n=", ".join(map(str, numbers)),
    )
    return _skill(t, numbers, question, ", ".join(map(str, sorted(numbers))))


def continue_sequence(t: Teller) -> Draft:
    start, step = t.small(1, 99), t.small(2, 20)
    shown = ", ".join(str(start + step * i) for i in range(4))
    question = t.say(
        "Continue the sequence: {n}, ...",
        "Which two numbers come next? {n}, ...",
        "Give the next two numbers of {n}.",
        "A row of numbers goes {n}. Write the next two.",
        "Count on by the same step, twice: {n}.",
        n=shown,
    )
    return _skill(t, [start, step], question, f"{start + step * 4}, {start + step * 5}")


def say_larger(t: Teller) -> Draft:
    a, b = t.rng.sample(range(10, 1000), 2)
    question = t.say(
        "Which is larger, {a} or {b}?",
        "Say the larger of {a} and {b}.",
        "Of {a} and {b}, which number is larger?",
        "Compare {a} with {b} and name the larger one.",
        "What is the larger number, {a} or {b}?",
        a=a,
        b=b,
    )
    return _skill(t, [a, b], question, max(a, b))


FAMILIES = {  # tell, weight, steps, terse, careless, showy
    "running_total": Family(running_total, 1.2, (1, 8), 0.63, 0.10, 0.06),
    "comparison": Family(comparison, 0.75, (2, 4), 0.02, 0.01, 0.02),
    "rate": Family(rate, 1.0, (3, 4), 0.63, 0.10, 0.06),
    "shopping": Family(shopping, 1.2, (3, 8), 0.63, 0.10, 0.06),
    "sharing": Family(sharing, 0.75, (2, 4), 0.02, 0.01, 0.02),
    "fraction_of": Family(fraction_of, 0.75, (2, 3), 0.02, 0.01, 0.02),
    "groups": Family(groups, 1.2, (3, 8), 0.63, 0.10, 0.06),
    "together": Family(together, 1.0, (2, 3), 0.63, 0.10, 0.06),
    "unknown_first": Family(unknown_first, 1.0, (2, 3), 0.63, 0.10, 0.06),
    "distance": Family(distance, 1.0, (3, 4), 0.63, 0.10, 0.06),
    "ages": Family(ages, 0.75, (2, 4), 0.02, 0.01, 0.02),
    "leftovers": Family(leftovers, 1.0, (3, 4), 0.63, 0.10, 0.06),
}
NEW_FAMILIES = {
    "savings": Family(savings, 1.0, (3, 3), 0.0, 0.0, 0.0),
    "perimeter": Family(perimeter, 1.0, (3, 3), 0.0, 0.0, 0.0),
    "recipe": Family(recipe, 1.0, (3, 3), 0.0, 0.0, 0.0),
}
SKILLS: dict[str, Callable[[Teller], Draft]] = {
    "sort_numbers": sort_numbers,
    "continue_sequence": continue_sequence,
    "say_larger": say_larger,
}
