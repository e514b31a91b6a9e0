"""The families of problems: how each draws its numbers and tells its story.

A family is one function that takes a `Teller` (a random generator, names, things) and
returns a `Draft`: the numbers that identify the problem, the question, and the orders
in which it may be worked. `problems.py` deals drafts into splits and writes the
answers. What belongs to A, B and C, the people of the story, is `a`, `b` and `c`.

The problems in `data/` depend on the order in which a family draws. Even what is drawn
and then not told stays where it is.

The odds beside each family say how its teachers answer. Families where an answer in
the head mostly fails have mostly terse teachers: that is what there is to unlearn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
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

Step = tuple[int, str, int]  # one calculation: a number, one of + - * /, a number


@dataclass(frozen=True)
class Draft:
    """A told problem: what identifies it, its text, and the ways to work it."""

    family: str
    numbers: tuple[int | str, ...]  # what makes it this problem, whatever the names
    question: str
    orders: tuple[tuple[Step, ...], ...]  # each works the problem; none: second skill
    gold: int | str

    @property
    def steps(self) -> int:
        """How many calculations the problem takes; the second skill takes none."""
        return len(self.orders[0]) if self.orders else 0


def calculate(a: int, op: str, b: int) -> int:
    """The result of one step.

    Raises: ValueError when it is below 0 or no integer: no story here tells of such.
    """
    if op == "+":
        result = a + b
    elif op == "-":
        result = a - b
    elif op == "*":
        result = a * b
    else:
        result = Fraction(a, b)
    if result < 0 or result != int(result):
        raise ValueError(f"step {a}{op}{b}: every result is a non-negative integer")
    return int(result)


class Teller:
    """A random generator and a cast, for one problem.

    In the templates {A}, {B} and {C} are names, {She} and {she} the pronouns of A, and
    {things} is what the story is about. The other slots are filled by the caller.
    """

    def __init__(
        self,
        rng: Random,
        family: str,
        steps: tuple[int, int] = (1, 6),
        larger: bool = False,
    ):
        self.rng = rng
        self.family = family
        self.larger = larger
        self.fewest, self.most = steps
        who = rng.choice(("she", "he"))
        first = rng.choice(NAMES[who])
        everybody = NAMES["she"] + NAMES["he"]
        others = [name for name in everybody if name != first]
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

    def chance(self, share: float) -> bool:
        """True in this share of cases."""
        return self.rng.random() < share

    def length(self, low: int, high: int) -> int:
        """How many steps this problem takes, within what the split allows.

        Five or more are a third as likely as fewer.
        """
        allowed = range(max(low, self.fewest), min(high, self.most) + 1)
        odds = [3 if steps < 5 else 1 for steps in allowed]
        return self.rng.choices(allowed, odds)[0]

    def say(self, *templates: str, **more: object) -> str:
        """One of the templates, filled in."""
        return self.rng.choice(templates).format(**self.slots, **more)

    def draft(self, numbers: tuple, text: list[str], *orders: list[Step]) -> Draft:
        """The problem as told; the last result of each order is the answer."""
        a, op, b = orders[0][-1]
        return Draft(
            family=self.family,
            numbers=numbers,
            question=" ".join(text),
            orders=tuple(tuple(steps) for steps in orders),
            gold=calculate(a, op, b),
        )


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
        fewest, most = self.steps
        fewest_wanted, most_wanted = wanted
        return fewest <= most_wanted and most >= fewest_wanted


# --- steps that several families share ----------------------------------------------


def _add_up(start: int, changes: list[int]) -> list[Step]:
    """One step for each change: added where it is positive, else taken away."""
    steps = []
    held = start
    for change in changes:
        op = "+" if change > 0 else "-"
        steps.append((held, op, abs(change)))
        held += change
    return steps


def _multiply_and_add_up(counts: list[int], sizes: list[int]) -> list[Step]:
    """Every count times its size, and then the sum of the results."""
    products = []
    results = []
    for count, size in zip(counts, sizes, strict=True):
        products.append((count, "*", size))
        results.append(count * size)
    return products + _add_up(results[0], results[1:])


def _listed(parts: list[str]) -> str:
    """English for a list of two or more: "a, b and c"."""
    return ", ".join(parts[:-1]) + f" and {parts[-1]}"


# --- the twelve that the base learns ------------------------------------------------


def running_total(teller: Teller) -> Draft:
    """Something is gained and lost, again and again."""
    start = teller.size(10, 50)
    text = [
        teller.say(
            "{A} has {n} {things}.",
            "On Monday {A} has {n} {things}.",
            "{A} starts the day with {n} {things}.",
            "There are {n} {things} in the box of {A}.",
            "{A} owns {n} {things}.",
            "In {A}'s bag there are {n} {things}.",
            n=start,
        )
    ]
    changes = []
    held = start
    for _ in range(teller.length(1, 8)):
        if held > 20 and teller.chance(0.5):
            lost = teller.small(3, min(held - 5, 30))
            held -= lost
            changes.append(-lost)
            text.append(
                teller.say(
                    "{She} loses {n}.",
                    "{She} gives {n} to {B}.",
                    "{She} sells {n}.",
                    "{She} leaves {n} at school.",
                    "{She} lends {n} to {C}.",
                    n=lost,
                )
            )
        else:
            gained = teller.size(3, 30)
            held += gained
            changes.append(gained)
            text.append(
                teller.say(
                    "{She} finds {n} more.",
                    "{She} gets {n} from {B}.",
                    "{She} buys {n} more.",
                    "{She} wins {n} at a fair.",
                    "{She} gets {n} from a friend.",
                    n=gained,
                )
            )
    text.append(
        teller.say(
            "How many {things} does {A} have now?",
            "How many {things} does {she} have in the end?",
            "How many {things} are there now?",
            "What number of {things} does {A} have at the end?",
            "Find how many {things} {A} has then.",
        )
    )
    gains_first = sorted(changes, reverse=True)
    return teller.draft(
        (start, *changes),
        text,
        _add_up(start, changes),
        _add_up(start, gains_first),
    )


def comparison(teller: Teller) -> Draft:
    """One has more or fewer than another; a third has a multiple."""
    a = teller.size(10, 50)
    factor = teller.small(2, 5)
    if teller.chance(0.6):
        difference = teller.size(3, 30)
        word = "more"
    else:
        difference = -teller.small(3, a - 4)
        word = "fewer"
    b = a + difference
    c = b * factor
    text = [
        teller.say(
            "{A} has {a} {things}. {B} has {d} {word} than {A}.",
            "{A} collected {a} {things}. {B} collected {d} {word} than {A}.",
            "{B} has {d} {word} {things} than {A}, who has {a}.",
            "On {A}'s desk are {a} {things}, and on {B}'s {d} {word} than that.",
            "{A} counts {a} {things}. {B} counts {d} {word} than that.",
            a=a,
            d=abs(difference),
            word=word,
        )
    ]
    told_of_c = teller.say(  # drawn for each kind, told for two of them
        "{C} has {k} times as many as {B}.",
        "{C}'s count is {k} times {B}'s.",
        k=factor,
    )
    find_b = _add_up(a, [difference])
    find_c = [*find_b, (b, "*", factor)]
    kind = teller.rng.choice(("two", "times", "all"))
    if kind == "two":
        text.append(
            teller.say(
                "How many {things} do they have together?",
                "How many {things} is that in all?",
                "What is the total number of {things}?",
            )
        )
        return teller.draft(
            (kind, a, difference),
            text,
            [*find_b, (a, "+", b)],
            [*find_b, (b, "+", a)],
        )
    text.append(told_of_c)
    numbers = (kind, a, difference, factor)
    if kind == "times":
        text.append(teller.say("How many {things} does {C} have?", "How many has {C}?"))
        return teller.draft(numbers, text, find_c)
    text.append(teller.say("How many {things} do the three have?", "How many in all?"))
    return teller.draft(
        numbers,
        text,
        [*find_c, (a, "+", b), (a + b, "+", c)],
        [*find_c, (b, "+", c), (a, "+", b + c)],
    )


def rate(teller: Teller) -> Draft:
    """So many an hour, for some hours, twice; some of it goes."""
    per_hour = teller.size(3, 15)
    hours = teller.small(2, 6)
    more_hours = teller.small(2, 6)
    made = per_hour * hours
    more_made = per_hour * more_hours
    total = made + more_made
    lost = teller.small(3, total - 3) if teller.chance(0.5) else 0
    text = [
        teller.say(
            "{A} gift-wraps {n} {things} an hour.",
            "A machine makes {n} {things} an hour.",
            "{A} can pack {n} {things} in one hour.",
            "Every hour {A} counts {n} {things}.",
            "At the fair {A} sells {n} {things} each hour.",
            n=per_hour,
        ),
        teller.say(
            "It goes on for {hours} hours on Monday and {more} hours on Friday.",
            "On one day this lasts {hours} hours, on the next {more} hours.",
            "The first shift is {hours} hours long, the second {more} hours.",
            hours=hours,
            more=more_hours,
        ),
    ]
    if lost:
        text.append(
            teller.say(
                "Then {lost} of them are lost. How many {things} are left?",
                "But {lost} of them do not count. How many {things} count?",
                lost=lost,
            )
        )
    else:
        text.append(
            teller.say(
                "How many {things} is that?", "How many {things} is that in all?"
            )
        )
    first = (per_hour, "*", hours)
    second = (per_hour, "*", more_hours)
    end = [(total, "-", lost)] if lost else []
    return teller.draft(
        (per_hour, hours, more_hours, lost),
        text,
        [first, second, (made, "+", more_made), *end],
        [second, first, (more_made, "+", made), *end],
    )


def shopping(teller: Teller) -> Draft:
    """Price times quantity, a few times over, and perhaps the change."""
    steps = teller.length(3, 8)
    kinds = (steps + 1) // 2
    counts = [teller.small(2, 8) for _ in range(kinds)]
    prices = [teller.size(2, 10) for _ in range(kinds)]
    total = sum(count * price for count, price in zip(counts, prices, strict=True))
    # Two kinds take three steps (two products and a sum), three take five, and so on:
    # where the number of steps is even, the last one is the change.
    gives_change = steps % 2 == 0
    paid = (total // 50 + 1) * 50 if gives_change else 0
    goods = teller.rng.sample(THINGS, kinds)
    wares = []
    for count, thing, price in zip(counts, goods, prices, strict=True):
        wares.append(f"{count} {thing}s at ${price} each")
    listed = _listed(wares)
    text = [
        teller.say(
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
            teller.say(
                "{She} pays with ${paid}. How much change does {she} get?",
                "{She} has ${paid}. How many dollars are left?",
                "How many dollars of ${paid} does {she} keep?",
                paid=paid,
            )
        )
    else:
        text.append(
            teller.say(
                "How much does {she} pay?",
                "How many dollars is that?",
                "What does it cost in dollars?",
            )
        )
    change = [(paid, "-", total)] if paid else []
    return teller.draft(
        (*counts, *prices, paid),
        text,
        _multiply_and_add_up(counts, prices) + change,
        _multiply_and_add_up(counts[::-1], prices[::-1]) + change,
    )


def sharing(teller: Teller) -> Draft:
    """Packs are opened and shared out equally."""
    friends = teller.small(2, 8)
    each = teller.size(4, 12)
    total = friends * each
    # Either all of it lies in packs, or some of it lies loose beside them.
    divisors = [count for count in range(2, 11) if total % count == 0]
    packs = teller.rng.choice(divisors or [1])
    loose = 0
    if packs == 1 or teller.chance(0.4):
        packs = teller.small(3, 8)
        loose = total % packs + packs * teller.small(0, 1)
        if loose < 2 or loose >= total:
            loose += packs
    per_pack = (total - loose) // packs
    if per_pack < 2:
        return sharing(teller)  # with other numbers
    text = [
        teller.say(
            "{A} opens {packs} packs of {per} {things}.",
            "{A} has {packs} bags with {per} {things} in each.",
            "There are {packs} boxes of {per} {things} in {A}'s room.",
            "{A} brings {packs} trays of {per} {things}.",
            "{A} bought {packs} packs that hold {per} {things} each.",
            packs=packs,
            per=per_pack,
        )
    ]
    steps: list[Step] = [(packs, "*", per_pack)]
    if loose:
        text.append(teller.say("There are {n} more on the table.", n=loose))
        steps.append((packs * per_pack, "+", loose))
    text.append(
        teller.say(
            "{She} shares them equally among {n} friends.",
            "All are shared equally by {n} children.",
            "{She} puts the same number on each of {n} plates.",
            n=friends,
        )
    )
    steps.append((total, "/", friends))
    used = teller.small(2, each - 2) if teller.chance(0.6) else 0
    if used:
        steps.append((each, "-", used))
        text.append(
            teller.say(
                "If {n} of each share are lost, how many {things} are left in one?",
                "From one share {n} are taken. How many {things} are left in it?",
                n=used,
            )
        )
    else:
        text.append(
            teller.say("How many {things} is one share?", "How many are in one share?")
        )
    return teller.draft((packs, per_pack, loose, friends, used), text, steps)


def fraction_of(teller: Teller) -> Draft:
    """A fraction goes; something else happens to the rest."""
    under = teller.rng.choice(list(FRACTIONS))
    whole = under * teller.size(max(3, 20 // under), 100 // under)
    part = whole // under
    rest = whole - part
    text = [
        teller.say(
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
    change = 0
    direction = teller.rng.choice((0, 1, 1, -1, -1))
    if direction == 1:
        change = teller.size(3, 30)
        text.append(
            teller.say("Then {n} more come in.", "Later {n} are added.", n=change)
        )
        steps.append((rest, "+", change))
    elif direction == -1:
        lost = teller.small(2, rest - 1)
        change = -lost
        text.append(teller.say("Then {n} more go.", "Later {n} are lost.", n=lost))
        steps.append((rest, "-", lost))
    text.append(
        teller.say("How many are left?", "How many are there now?", "How many remain?")
    )
    return teller.draft((whole, under, change), text, steps)


def groups(teller: Teller) -> Draft:
    """Containers of several kinds, some contents used up."""
    steps = teller.length(3, 8)
    kinds = (steps + 1) // 2
    counts = [teller.small(2, 9) for _ in range(kinds)]
    sizes = [teller.size(3, 10) for _ in range(kinds)]
    total = sum(count * size for count, size in zip(counts, sizes, strict=True))
    some_go = steps % 2 == 0  # as with the change in `shopping`: it is the last step
    used = teller.small(2, total - 2) if some_go else 0
    boxes = teller.rng.sample(
        ("bags", "boxes", "jars", "trays", "crates", "packs"), kinds
    )
    named = []
    for count, box, size in zip(counts, boxes, sizes, strict=True):
        named.append(f"{count} {box} of {size} {teller.slots['things']}")
    listed = _listed(named)
    text = [
        teller.say(
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
            teller.say(
                "Then {n} are used. How many {things} are left?",
                "After {n} are given away, how many {things} are left?",
                n=used,
            )
        )
    else:
        text.append(
            teller.say(
                "How many {things} is that?", "How many {things} are there in all?"
            )
        )
    end = [(total, "-", used)] if used else []
    return teller.draft(
        (*counts, *sizes, used),
        text,
        _multiply_and_add_up(counts, sizes) + end,
        _multiply_and_add_up(counts[::-1], sizes[::-1]) + end,
    )


def together(teller: Teller) -> Draft:
    """Two people work side by side for some days."""
    a = teller.size(3, 15)
    b = teller.size(3, 15)
    days = teller.small(2, 6)
    total = (a + b) * days
    goal = 0  # not told
    if teller.chance(0.5):
        goal = total + teller.small(5, 50)
    text = [
        teller.say(
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
            teller.say(
                "They want {g}. How many are missing after {n} days?",
                "They need {g} in all. How many are still to do after {n} days?",
                g=goal,
                n=days,
            )
        )
    else:
        text.append(
            teller.say(
                "How many do they manage together in {n} days?",
                "How many is that for both in {n} days?",
                n=days,
            )
        )
    end = [(goal, "-", total)] if goal else []
    return teller.draft(
        (a, b, days, goal),
        text,
        [(a, "+", b), (a + b, "*", days), *end],
        [(b, "+", a), (a + b, "*", days), *end],
    )


def unknown_first(teller: Teller) -> Draft:
    """The end is told and the beginning asked."""
    end = teller.size(10, 60)
    gained = teller.small(3, 30)
    lost = teller.size(5, 40)
    start = end + lost - gained
    if start < 2:
        return unknown_first(teller)  # with other numbers
    taken = teller.small(3, 30) if teller.chance(0.5) else 0
    text = [
        teller.say(
            "{A} had some {things}.",
            "{A} kept {things} in a box.",
            "In the morning {A} had a bag of {things}.",
            "{A} had a pile of {things}.",
            "Last week {A} owned some {things}.",
        ),
        teller.say(
            "{She} gave {lost} to {B} and then found {gained}.",
            "{She} lost {lost} and bought {gained}.",
            "{She} sold {lost}, then got {gained} from {B}.",
            lost=lost,
            gained=gained,
        ),
    ]
    if taken:
        text.append(
            teller.say("Then {C} took {n}.", "Then {n} more were lost.", n=taken)
        )
    text.append(
        teller.say(
            "Now {she} has {end}. How many did {she} have at first?",
            "That left {end}. How many {things} were there at first?",
            end=end,
        )
    )
    # Worked backwards: what was lost comes back, what was found goes.
    taken_back = [taken] if taken else []
    return teller.draft(
        (end, gained, lost, taken),
        text,
        _add_up(end, [*taken_back, lost, -gained]),
        _add_up(end, [lost, *taken_back, -gained]),
    )


def distance(teller: Teller) -> Draft:
    """Speeds and hours, and how far it still is."""
    speed = teller.size(3, 12)
    next_speed = teller.size(3, 12)
    hours = teller.small(2, 6)
    next_hours = teller.small(2, 6)
    way = speed * hours
    next_way = next_speed * next_hours
    total = way + next_way
    goal = 0  # not told
    if teller.chance(0.5):
        goal = total + teller.small(5, 50)
    text = [
        teller.say(
            "{A} cycles at {v} miles an hour for {h} hours and at {w} for {g} hours.",
            "A boat sails at {v} miles an hour for {h} hours, then {w} for {g} hours.",
            "{A} rides {v} miles an hour for {h} hours and {w} for {g} hours.",
            "A cart makes {v} miles an hour for {h} hours, then {w} for {g} hours.",
            "{A} walks {v} miles an hour for {h} hours, then runs {w} for {g} hours.",
            v=speed,
            h=hours,
            w=next_speed,
            g=next_hours,
        )
    ]
    if goal:
        text.append(
            teller.say(
                "The trip is {n} miles. How many miles are left?",
                "The goal is {n} miles away. How far is it still?",
                n=goal,
            )
        )
    else:
        text.append(teller.say("How many miles is that?", "How far is that in miles?"))
    first = (speed, "*", hours)
    second = (next_speed, "*", next_hours)
    end = [(goal, "-", total)] if goal else []
    return teller.draft(
        (speed, hours, next_speed, next_hours, goal),
        text,
        [first, second, (way, "+", next_way), *end],
        [second, first, (next_way, "+", way), *end],
    )


def ages(teller: Teller) -> Draft:
    """Years older, times as old, years from now."""
    a = teller.size(3, 15)
    factor = teller.small(2, 5)
    difference = teller.size(2, 20)
    b = a * factor
    if teller.chance(0.5) or difference > b - 2:
        c = b + difference
        op = "+"
        word = "older"
    else:
        c = b - difference
        op = "-"
        word = "younger"
    text = [
        teller.say(
            "{A} is {a} years old. {B} is {k} times as old as {A}.",
            "{A} is {a}. {B} is {k} times that age.",
            "{B} is {k} times as old as {A}, who is {a}.",
            "{A} is only {a}, and {B} is {k} times as old.",
            "{A} turned {a} today. {B} is {k} times as old.",
            a=a,
            k=factor,
        ),
        teller.say(
            "{C} is {d} years {word} than {B}.",
            "{B}'s friend {C} is {d} years {word}.",
            d=difference,
            word=word,
        ),
    ]
    steps: list[Step] = [(a, "*", factor), (b, op, difference)]
    ahead = teller.size(2, 20)  # drawn for each kind, told for one of them
    kind = teller.rng.choice(("now", "later", "sum"))
    numbers = (kind, a, factor, difference, word)
    if kind == "now":
        text.append(teller.say("How old is {C}?", "What is the age of {C}?"))
        return teller.draft(numbers, text, steps)
    if kind == "later":
        text.append(teller.say("How old will {C} be in {n} years?", n=ahead))
        steps.append((c, "+", ahead))
        return teller.draft((*numbers, ahead), text, steps)
    text.append(
        teller.say(
            "How old are the three together?", "What do their three ages add up to?"
        )
    )
    return teller.draft(
        numbers,
        text,
        [*steps, (a, "+", b), (a + b, "+", c)],
        [*steps, (b, "+", c), (a, "+", b + c)],
    )


def leftovers(teller: Teller) -> Draft:
    """People take some each; what is left over?"""
    packs = teller.small(3, 9)
    per_pack = teller.size(4, 12)
    people = teller.small(3, 9)
    total = packs * per_pack
    most = (total - 1) // people
    if most < 2:
        return leftovers(teller)  # with other numbers
    each = teller.small(2, min(most, 12))
    taken = people * each
    brought = teller.small(2, 30) if teller.chance(0.5) else 0
    text = [
        teller.say(
            "{A} brings {packs} packs of {per} {things} to a party.",
            "For a party there are {packs} boxes of {per} {things}.",
            "{A} puts out {packs} plates with {per} {things} each.",
            "A class gets {packs} bags of {per} {things}.",
            "At camp {A} opens {packs} crates of {per} {things}.",
            packs=packs,
            per=per_pack,
        ),
        teller.say(
            "The {n} guests take {each} each.",
            "Each of the {n} children takes {each}.",
            "There, {n} people get {each} each.",
            n=people,
            each=each,
        ),
    ]
    opened = (packs, "*", per_pack)
    handed_out = (people, "*", each)
    end: list[Step] = [(total, "-", taken)]
    if brought:
        text.append(
            teller.say("{B} brings {n} more.", "Then {n} more arrive.", n=brought)
        )
        end.append((total - taken, "+", brought))
    text.append(
        teller.say("How many {things} are left?", "How many {things} are there now?")
    )
    return teller.draft(
        (packs, per_pack, people, each, brought),
        text,
        [opened, handed_out, *end],
        [handed_out, opened, *end],
    )


# --- three that it never sees -------------------------------------------------------


def savings(teller: Teller) -> Draft:
    """Saving week by week for something dear."""
    had = teller.size(10, 60)
    weekly = teller.size(4, 25)
    weeks = teller.small(3, 9)
    added = weekly * weeks
    saved = had + added
    price = saved + teller.small(5, 90)
    text = [
        teller.say(
            "{A} has ${had} and saves ${weekly} a week.",
            "{A} saves ${weekly} each week and already has ${had}.",
            "There is ${had} in {A}'s purse, and ${weekly} comes in every week.",
            "With ${had} to begin with, {A} puts ${weekly} aside each week.",
            "{A} starts with ${had}. Every week {she} earns ${weekly}.",
            had=had,
            weekly=weekly,
        ),
        teller.say(
            "A bike costs ${price}. How much is missing after {n} weeks?",
            "After {n} weeks, how many dollars short is {she} of ${price}?",
            "How many dollars does {she} still need for a ${price} tent in {n} weeks?",
            price=price,
            n=weeks,
        ),
    ]
    missing = price - had
    return teller.draft(
        (had, weekly, weeks, price),
        text,
        [(weekly, "*", weeks), (had, "+", added), (price, "-", saved)],
        [(price, "-", had), (weekly, "*", weeks), (missing, "-", added)],
        [(weekly, "*", weeks), (price, "-", added), (price - added, "-", had)],
    )


def perimeter(teller: Teller) -> Draft:
    """A fence round a garden, and its price."""
    long = teller.size(8, 30)
    wide = teller.size(4, 20)
    cost = teller.small(2, 5)
    text = [
        teller.say(
            "A garden is {a} feet long and {b} feet wide.",
            "{A}'s field measures {a} feet by {b} feet.",
            "{A} has a yard of {a} by {b} feet.",
            "A farm lot is {a} feet by {b} feet.",
            "A playground is {a} feet long and {b} feet across.",
            a=long,
            b=wide,
        ),
        teller.say(
            "A fence around it costs ${n} a foot. How many dollars is that?",
            "What does a rope all around it cost at ${n} a foot?",
            n=cost,
        ),
    ]
    half = long + wide
    around = half * 2
    return teller.draft(
        (long, wide, cost),
        text,
        [(long, "+", wide), (half, "*", 2), (around, "*", cost)],
        [(long, "+", wide), (half, "*", cost), (half * cost, "*", 2)],
        [(cost, "*", 2), (long, "+", wide), (half, "*", cost * 2)],
    )


def recipe(teller: Teller) -> Draft:
    """A recipe for few, cooked for many."""
    eaters = teller.small(2, 6)
    factor = teller.small(2, 6)
    cups = teller.size(2, 12)
    guests = eaters * factor
    needed = cups * factor
    had = teller.small(2, needed - 1)
    text = [
        teller.say(
            "{A}'s soup for {n} people takes {cups} cups of rice.",
            "{A}'s recipe feeds {n} and needs {cups} cups of flour.",
            "To feed {n} people {A} uses {cups} cups of beans.",
            "With {cups} cups of oats {A} can serve {n} people.",
            "In {A}'s kitchen {n} people eat {cups} cups of pasta.",
            n=eaters,
            cups=cups,
        ),
        teller.say(
            "{She} cooks for {g} and has {had} cups. How many cups are missing?",
            "For {g} people, how many cups must {she} add to the {had} at home?",
            g=guests,
            had=had,
        ),
    ]
    for_all = cups * guests
    return teller.draft(
        (eaters, factor, cups, had),
        text,
        [(guests, "/", eaters), (cups, "*", factor), (needed, "-", had)],
        [(cups, "*", guests), (for_all, "/", eaters), (needed, "-", had)],
    )


# --- a second skill -----------------------------------------------------------------


def _skill(teller: Teller, numbers: list[int], question: str, gold: object) -> Draft:
    """A problem without calculations, whose answer is a text."""
    return Draft(
        family=teller.family,
        numbers=tuple(numbers),
        question=question,
        orders=(),
        gold=str(gold),
    )


def sort_numbers(teller: Teller) -> Draft:
    """Three to five numbers, smallest first."""
    numbers = teller.rng.sample(range(2, 100), teller.small(3, 5))
    question = teller.say(
        "Sort these numbers, smallest first: {n}.",
        "Put {n} in order from small to large.",
        "Order these from the smallest to the largest: {n}.",
        "Write {n} in rising order.",
        "Arrange {n} so that each is larger than the one before.",
        n=", ".join(map(str, numbers)),
    )
    in_order = ", ".join(map(str, sorted(numbers)))
    return _skill(teller, numbers, question, in_order)


def continue_sequence(teller: Teller) -> Draft:
    """Four numbers at equal distances are shown; the next two are asked."""
    start = teller.small(1, 99)
    step = teller.small(2, 20)
    shown = ", ".join(str(start + step * i) for i in range(4))
    question = teller.say(
        "Continue the sequence: {n}, ...",
        "Which two numbers come next? {n}, ...",
        "Give the next two numbers of {n}.",
        "A row of numbers goes {n}. Write the next two.",
        "Count on by the same step, twice: {n}.",
        n=shown,
    )
    next_two = f"{start + step * 4}, {start + step * 5}"
    return _skill(teller, [start, step], question, next_two)


def say_larger(teller: Teller) -> Draft:
    """The larger of two numbers."""
    a, b = teller.rng.sample(range(10, 1000), 2)
    question = teller.say(
        "Which is larger, {a} or {b}?",
        "Say the larger of {a} and {b}.",
        "Of {a} and {b}, which number is larger?",
        "Compare {a} with {b} and name the larger one.",
        "What is the larger number, {a} or {b}?",
        a=a,
        b=b,
    )
    return _skill(teller, [a, b], question, max(a, b))


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
