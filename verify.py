r"""Verifiable rewards: the rules that judge an answer, pass@k and calibration.

A rule is the reward, so it is what the policy will attack. Three decisions follow, and one thing is
left open:
  - Text of the model is never executed. Countdown is read with `ast`. Mathematics is compared by
    spelling, then by exact numbers, and only then as formulas that math-verify parses into sympy,
    in worker processes that are killed at a time limit.
  - A gold answer that is a number is compared with numbers only, and exactly. The policy has to do
    the arithmetic, sympy will not do it for it: `\sum_{k=1}^{9} k` is no answer to 45. There is no
    tolerance anywhere: 0.33 is not 1/3, and 1 - 2^{-2023} is not 1 - 2^{-2024}.
  - A verdict is one of "right", "wrong", "no_answer" (nothing there, or unreadable) and "timeout"
    (the worker ran out of time or memory). Each is counted, so that a broken verifier does not look
    like a poor policy.
  - Open: where the gold answer is no number, whatever equals it is right, and so is the formula of
    a "simplify" or "factor" question itself (9 formulas in the 500 problems of MATH500, see
    experiments/results/verifier.md).

Why not math-verify alone? That page compares the two: of answers that hedge, or are wrong, it takes
a part that a policy would find. Where spellings are refused on purpose, such as 1 728 (two answers,
but for a comma), test_all.py lists them.

Numbers come first in this file. They are all that GSM8K, DAPO-Math, AIME and AMC need, and a reader
may stop after them.

A further rule is a function (response, gold answer) that returns a verdict or a number, and its
name in RULES, at the end of this file.
"""

import ast
import json
import os
import queue
import re
import select
import signal
import subprocess
import sys
from bisect import bisect_left, bisect_right
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache
from math import comb, fsum
from statistics import fmean
from typing import NamedTuple

VERDICTS = ("right", "wrong", "no_answer", "timeout")
MAX_ANSWER = 1000  # characters; a longer answer is "no_answer"

# ---- where the answer stands in a response -------------------------------------------------------

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
# TeX boxes one character of `\boxed 12`; who writes it means the number.
UNBRACED = re.compile(r"-?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|[A-Za-z](?![A-Za-z])")


def boxed_span(text, start):
    r"""Where what the box at text[start:] holds begins and ends, and where the box ends; None if it
    is not closed within MAX_ANSWER characters."""
    begin = BOX.match(text, start).end()
    if text[begin : begin + 1] != "{":
        token = UNBRACED.match(text, begin)
        return token and (begin, token.end(), token.end())
    begin += 1
    depth = 1
    i = begin
    while i < min(len(text), begin + MAX_ANSWER + 1):
        if text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
        if depth == 0:
            return begin, i, i + 1
        i += 2 if text[i] == "\\" else 1  # \{ and \} do not nest
    return None


def last_boxed(response, command):
    r"""What the last \boxed{} holds; None if it holds nothing or is not closed.

    A box around the last one, with something beside it, `\boxed{\boxed{3} 4}`, is one answer that
    nothing can equal."""
    last = response.rfind(command)
    text = ""
    for match in BOX.finditer(response, max(0, last - MAX_ANSWER)):
        span = boxed_span(response, match.start())
        if span and span[2] > last:  # the outermost box that holds the last one
            text = response[span[0] : span[1]].strip()
            break
    while BOX.match(text):
        span = boxed_span(text, 0)
        if not span or span[2] != len(text):
            break
        text = text[span[0] : span[1]].strip()
    return text or None


def answer_block(response):
    """What the last <answer> block holds; None if it is not closed."""
    text, closed, _ = response.rpartition("<answer>")[2].partition("</answer>")
    return text.strip() if closed else None


MARKERS = (re.compile(r"\banswer\**\s?:", re.I), re.compile("####"))


def extract(response):
    r"""The answer in a response: what the last \boxed{} (or else \fbox{}) holds; without a box, the
    last <answer> block; without that, the rest of the line after the last `Answer:` or `####`; or
    None."""
    for command in ("\\boxed", "\\fbox"):
        if command in response:
            return last_boxed(response, command)
    found = None
    if "<answer>" in response:
        found = answer_block(response)
    else:
        for marker in MARKERS:
            lines = marker.split(response)
            if len(lines) > 1:
                found = lines[-1].partition("\n")[0].strip(" *\t\r")
                break
    return found if found and len(found) <= MAX_ANSWER else None


# ---- numbers -------------------------------------------------------------------------------------

DECIMAL = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
EXPONENT = r"\{?([+-]?[0-9]{1,3})\}?"
TIMES_TEN_TO = r"(?:[eE]|(?:\\times|\\cdot|\*)10\^)"
# 510^3 is none of these: it does not mean 5 * 10^3.
NUMBER = re.compile(rf"(?:({DECIMAL}){TIMES_TEN_TO}|10\^){EXPONENT}|({DECIMAL})")
FRACTION = re.compile(rf"([0-9]*)\\frac\{{(-?{DECIMAL})\}}\{{(-?{DECIMAL})\}}")
QUOTIENT = re.compile(rf"^(?:([0-9]+) )?({DECIMAL})/(?:({DECIMAL})|\((-{DECIMAL})\))$")
REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\overline\{?([0-9]+)\}?")


def number(text):
    r"""The Fraction that a text without spaces spells, or None.

    It knows 12, .5, 4e33, 4\times10^{33}, a/b, \frac{a}{b}, mixed numbers and 2.\overline{3}."""
    sign = -1 if text.startswith("-") else 1
    if text[:1] in ("+", "-"):
        text = text[1:]
    text = QUOTIENT.sub(r"\1\\frac{\2}{\3\4}", text)
    match = NUMBER.fullmatch(text)
    if match:
        mantissa = Fraction(match[1] or match[3] or 1)
        return sign * mantissa * Fraction(10) ** int(match[2] or 0)
    match = REPEATING.fullmatch(text)
    if match:
        whole, start, period = match.groups()
        repeated = Fraction(int(period), 10 ** len(period) - 1)
        return sign * (int(whole + start or 0) + repeated) / 10 ** len(start)
    match = FRACTION.fullmatch(text)
    if not match:
        return None
    whole, numerator, denominator = match.groups()
    if Fraction(denominator) == 0 or (whole and "-" in numerator + denominator):
        return None
    return sign * (Fraction(whole or 0) + Fraction(numerator) / Fraction(denominator))


def same_number(answer, gold, decide):
    r"""Rule: against a number only an equal number is right.

    62.5 % may be written 62.5\%, 62.5 or 0.625, but not 0.625 %."""
    answer = without_spaces(answer)
    gold = without_spaces(gold)
    expected = number(gold.removesuffix("%"))
    if expected is None:
        return None
    found = number(answer.removesuffix("%"))
    if found is None:
        return False
    scale = Fraction(100 if answer.endswith("%") else 1, 100 if gold.endswith("%") else 1)
    return found in (expected, scale * expected)


# ---- one spelling for the many of one answer -----------------------------------------------------
# A unit stands behind a number, and normalise() puts it between backticks: `36 \text{ cm}^2` is
# 36 `cm^2`. It is a symbol of the list below, or words in which nothing counts: any noun can be
# counted, and no list holds them all. What would change the number is no unit: `10 million`, `3
# plus five`, `3 squared` (but 3 feet squared is one), `3 below zero`, `3\text{}^2`, `3\mathrm{i}`.

SMALL_NUMBERS = "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
TEENS = "(?:thir|four|fif|six|seven|eigh|nine)teen"
TENS = "(?:twen|thir|for|fif|six|seven|eigh|nine)ty"
MULTIPLES = "hundred|thousand|lakh|crore|dozen|hal(?:f|ves)|thirds|quarters|twice|[a-z]*fold"
MULTIPLES += "|(?:four|fif|six|seven|eigh|nin|ten|[a-z]*teen|[a-z]*tie|hundred|thousand)ths"
OPERATORS = "plus|minus|over|under|below|negative|less|divided|multiplied|doubled|tripled|negated"
OPERATORS += r"|mod(?:ulo)?|choose|times(?= (?:[a-z]|pi)\b)"  # 34 times: a unit
NEGATIONS = "not?|none|never"
LOSSES = "loss(?:es)?|lost|decreased?|reduction"  # 20\% loss is not 20\% profit
FUNCTIONS = "sin|cos|tan|log|exp|sqrt|square root|factorial|reciprocal"
CONSTANTS = "pi|tau|phi|infinity"
# 34 perhaps: no answer was given
HEDGES = "maybe|perhaps|probably|possibly|approximately|roughly|at least|at most|if|otherwise"
HEDGES += "|except|excluded|isn't"
# 34 in binary, but 34 binary strings; 34 is wrong, but 34 wrong answers
LAST = "(?:binary|octal|hex|recurring|repeating|double|gross|permille|ppm|basis points|infinite"
LAST += "|inverse|opposite|wrong|incorrect)(?! ?[A-Za-z])"
CALCULATING = f"{OPERATORS}|{NEGATIONS}|{LOSSES}|{FUNCTIONS}|{CONSTANTS}|{HEDGES}|{LAST}"
COUNTING = f"{MULTIPLES}|{CALCULATING}|{SMALL_NUMBERS}|{TEENS}|{TENS}"
# Anywhere in it a word that counts; "illion" also inside of a word.
HOLDS_A_NUMBER = rf"[^{{}}]*(?:illion|\b(?:{COUNTING})s?\b)"

BEGINS_WITH_MATHEMATICS = (
    r" ?(?:(?:squared|cubed|factorials?|\\?pi|[einxy])\b"  # 3 squared, 3\mathrm{i}
    r"|[-+*=<>!^_]"  # 3\text{+5}
    r"|/[a-z]\})"  # 3\text{/x}
)
NO_NUMBER = rf"(?!{BEGINS_WITH_MATHEMATICS})(?!{HOLDS_A_NUMBER})"

PREFIXED = "m|g|s|A|K|mol|J|N|W|Pa|Hz|V|C|F|L|l|eV|T|B|cal|bar"
LONG_SYMBOL = (
    r"[numcdkMGT](?:m|g|s|A|J|N|W|Pa|Hz|V|L|l|eV|B|cal|bar)|mol|Pa|Hz|eV|min|hr|yr|ft|in|yd|mi|lb"
    r"|oz|mph|rad|sq|erg|atm|pc|AU|gal|USD|\\AA|M_ ?\{?\\odot\}?|\\(?:mu ?[mgsACL]|Omega)"
)
SYMBOL = rf"(?:{LONG_SYMBOL}|{PREFIXED}|h)(?![A-Za-z])"
UNIT_POWER = r"(?: ?\^ ?\{? ?-?[0-9] ?\}?)?"  # \text{cm}^2, s^{-1}
FACTOR = rf"{SYMBOL}{UNIT_POWER}"
PRODUCT = rf"{FACTOR}(?:(?: ?\\cdot ?| ?/ ?| ){FACTOR})*"

BEHIND_A_VALUE = r"(?<=[0-9)}\]%!`i])"
TEXT_UNIT = (
    rf"{BEHIND_A_VALUE} ?((?:\\cdot ?|/ ?)?)"
    rf"\\(?:text|mathrm|textrm|mbox)\{{({NO_NUMBER}(?= ?\(?{SYMBOL}|[^{{}}]*[A-Za-z]{{3}})"
    r"(?:[^{}0-9,]|\^[0-9])*"  # no digit but an exponent: cm^2
    rf"(?:\{{[^{{}}]*\}})?)\}}({UNIT_POWER})"  # m/s^{2}
)
END = r"\.?(?= ?(?:$|[0-9,)\]]|\\[}c]))"
WORDS = r"(?:[A-Za-z]{3,}|[cmk]m|kg|ft|of|sq)(?:[ /][A-Za-z]+)*"  # two letters may be two factors
WORD_UNIT = rf"(?<=[0-9}})%`])(?: |/ ?(?=[a-z]{{3}}))({NO_NUMBER}(?:{WORDS}|\( ?{WORDS} ?\))"
WORD_UNIT += rf"{UNIT_POWER}){END}"

NESTED = r"((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)"
FONTS = (
    "text|textbf|textit|textrm|textsf|emph|mbox|mathrm|mathbf|mathit|mathsf|bm|boldsymbol"
    "|operatorname"
)
STYLES = "displaystyle|textstyle|large|Large|LARGE|huge|Huge|bf|rm|it"
DELIMITERS = (
    rf"\\(?:left|right|[bB]igg?[lr]?|{STYLES})(?![A-Za-z])|\\?\$|\\[()\[\]]"
    r"|\\(?:text)?color ?\{[A-Za-z]+\}"
)
DEGREES = r"(?: ?\^ ?(?:\\circ(?![A-Za-z])|\{ ?\\circ ?\})| ?\\degree(?![A-Za-z])|°)"
TRIG = r"\\(?:sin|cos|tan|cot|sec|csc)"
CELSIUS = r"(?: ?\\(?:text|mathrm) ?\{ ?([CFK]) ?\}| ?([CFK])(?![A-Za-z]))?"
SPACES = r"(?:\\[,;:! ]|~|\\q?quad(?![A-Za-z])|\s)+"
AND = r"(?:\\text\{ ?,? ?and ?\}|(?<![\\A-Za-z])and(?![A-Za-z]))"
OR = r"(?:\\text\{ ?,? ?or ?\}|(?<![\\A-Za-z])or(?![A-Za-z])|\\vee(?![A-Za-z]))"
RELATION = r"(?:[<>]|\\[gl]e(?:q|qslant)?(?![A-Za-z]))"
THE_ANSWER_IS = r"(?i:(?:the )?(?:final )?answer(?: is ?:?|:) ?)"

# (pattern, replacement), applied in this order. What is dropped leaves a space, or `3$4` and 3°4
# would be 34.
SPELLINGS = (
    ("`", " "),
    # the rows of a matrix: \\ and \\[4pt], before \[ is a delimiter and `\\ ` a space
    (r" ?\\\\ ?(?:\[ ?-?[0-9.]+ ?[a-z]{2} ?\])?", r" \\cr "),
    # \dfrac, \tfrac, \cfrac, \dbinom, {a \over b}, {n \choose k}
    (r"\\[dtc](frac|binom)(?![A-Za-z])", r"\\\1"),
    (r"\{ ?([^{}]*?) ?\\over(?![A-Za-z]) ?([^{}]*?) ?\}", r"\\frac{\1}{\2}"),
    (r"\{ ?([^{}]*?) ?\\choose(?![A-Za-z]) ?([^{}]*?) ?\}", r"\\binom{\1}{\2}"),
    # 1{,}000  1,\!000  1\,000, but not `1 000`: a space separates two answers
    (r"(?<=[0-9])(?:\{,\}|,? ?\\! ?|\\, ?)(?=[0-9]{3}(?![0-9]))", ""),
    (DELIMITERS, " "),
    # \sin 10^\circ is another number than \sin 10
    (rf"({TRIG}) ?([0-9.]+) ?{DEGREES}", r"\1(\\frac{\2\\pi}{180})"),
    (rf"({TRIG}) ?[({{] ?([0-9.]+) ?{DEGREES} ?[)}}]", r"\1(\\frac{\2\\pi}{180})"),
    (DEGREES + CELSIUS, r" `degree\1\2` "),
    # cm², Å, Ω, µm; elsewhere signs of other scripts are not read
    (r"(?<=m|t|n)(\}?)([²³])", r"\1^\2"),
    (r"(?<=[cmk]m\^|[ {]m\^|m\}\^|ft\^|in\^)²", "2"),
    (r"(?<=[cmk]m\^|[ {]m\^|m\}\^|ft\^|in\^)³", "3"),
    ("Å", r"\\AA"),
    (r"[€£]|\\(?:pounds|euro)(?![A-Za-z])", " "),
    ("[ΩΩ]", r"\\Omega"),
    (SPACES, " "),
    # 50\%, 50 percent, 50\text{ percent}
    (r" ?\\%| ?(?:\\text\{ ?)?\bpercent\b\}?", "%"),
    # `1 and 3` is the list 1, 3, but `x < 1 and x > -1` is not `x < 1 or x > -1`
    (rf",? ?{OR} ?(?={RELATION}|[^,]*{RELATION})", r" \\cup "),
    (rf",? ?{AND} ?(?={RELATION}|[^,]*{RELATION})", r" \\cap "),
    (rf",? ?(?:{AND}|{OR}) ?", ", "),
    # \ge, \geq, \geqslant, \le ...
    (r"\\([gl])eq?(?:slant)?(?![A-Za-z])", r"\\\1eq"),
    # \frac12, \frac7{12}, \frac{270}7, \sqrt5
    (r"\\frac ?([0-9]) ?([0-9])", r"\\frac{\1}{\2}"),
    (r"\\frac ?([0-9]) ?\{", r"\\frac{\1}{"),
    (r"\\frac ?(\{[^{}]*\}) ?([0-9])", r"\\frac\1{\2}"),
    (r"\\sqrt ?([0-9])", r"\\sqrt{\1}"),
    # bmatrix, and a matrix or an array in brackets, are pmatrix
    (r"\\(begin|end)\{(?:[bp]?matrix|array)\}(?: ?\{[lcr| ]+\})?", r"\\\1{pmatrix}"),
    (r"[(\[] ?(\\begin\{pmatrix\}(?:(?!\\end).)*\\end\{pmatrix\}) ?[)\]]", r"\1"),
    (r"\\cr ?(?=\\end|\.?$)", ""),
    # \langle 1, 2 \rangle is (1, 2)
    (r"\\langle(?![A-Za-z])([^|]*?,[^|]*?)\\rangle(?![A-Za-z])", r"(\1)"),
    # \pmod{4} and \pmod 4
    (r"\\pmod ?\{ ?([0-9A-Za-z]+) ?\}", r"\\pmod \1"),
    # the real numbers, the empty set, infinities, bars, dots
    (r"\\(?:mathb[bf]|Bbb) ?(?:\{ ?R ?\}|R(?![A-Za-z]))", r"(-\\infty,\\infty)"),
    (r"\\varnothing(?![A-Za-z])|\\\{ ?\\\}", r"\\emptyset"),
    (r"(^|[,(\[=]) ?\+ ?\\infty", r"\1\\infty"),
    (r"\\[lr]?vert(?![A-Za-z])", "|"),
    (r"\\[cd]ots(?![A-Za-z])", r"\\ldots"),
    # \{x \mid x > 2\} and \{x \in \mathbb{R} : x > 2\} are x > 2, ]a,b[ is (a,b)
    (r"^(\\\{ ?[A-Za-z]) ?\\in ?\(-\\infty,\\infty\)", r"\1"),
    (
        rf"^\\\{{ ?([A-Za-z]) ?(?:\\mid(?![A-Za-z])|[|:]) ?(?=[^|]*{RELATION})(?=.*\1)(.*)\\\}}$",
        r"\2",
    ),
    (r"^\]([^()\[\]]*),([^()\[\]]*)\[$", r"(\1,\2)"),
    # the unit, in two spellings; between them, \text{even} is even
    (TEXT_UNIT, r" `\1\2\3` "),
    (rf"\\(?:{FONTS}) ?\{{{NESTED}\}}", r" \1 "),
    (r" +", " "),
    # 4^{th}, 12{:}15, (52)_8, 6:00 p.m.
    (r" ?\^ ?\{ ?(st|nd|rd|th) ?\}", r"\1"),
    (r" ?(?:\{:\}|:) ?", ":"),
    (r"\(([0-9]+)\) ?_", r"\1_"),
    (r"(?<=:[0-9]{2}) ?([AaPp])\.? ?[Mm]\.?$", r" `\1m`"),
    (WORD_UNIT, r" `\1`"),
    # \therefore x = 5, the answer is 5, x: 5
    (r"^ ?\\(?:therefore|Rightarrow|implies)(?![A-Za-z])", ""),
    (rf"^ ?{THE_ANSWER_IS}(?=[-0-9\\(\[.a-zA-Z])", ""),
    (r"^ ?([A-Za-z]):(?=-?[0-9.]+$)", r"\1 = "),
    (r" +", " "),
)
SPELLINGS = [(re.compile(pattern), replacement) for pattern, replacement in SPELLINGS]
DIGITS = re.compile("-?[0-9]+")  # most answers are spelled already
BRACKETS = re.compile(r"[(\[]|\\\{")
THOUSANDS = re.compile(r"(?<![0-9,.])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9,])")


def without_commas(match):
    return match[0].replace(",", "")


@lru_cache(1 << 12)  # a group shares its gold answer
def normalise(text):
    """One spelling for the many of one answer; still LaTeX, with single spaces, and units between
    backticks."""
    if DIGITS.fullmatch(text):
        return text
    for pattern, replacement in SPELLINGS:
        text = pattern.sub(replacement, text.strip())
    text = text.strip().removesuffix(".")
    if not BRACKETS.search(text):  # in brackets 1,000 may be two numbers
        text = THOUSANDS.sub(without_commas, text)
    return text


SPACE_NOT_BETWEEN_DIGITS = re.compile(r"(?<![0-9.]) | (?![0-9.])")
SHORT_POWER = re.compile(r"([\^_])\{([A-Za-z0-9])\}")


def without_spaces(text):
    """Without spaces, except between digits (`3 4` is not 34), and with x^{2} as x^2."""
    return SHORT_POWER.sub(r"\1\2", SPACE_NOT_BETWEEN_DIGITS.sub("", text))


# A unit that only one side names may go; two different ones may not.

MARKED = re.compile(r"([^`]*?) ?((?:`[^`]*` ?)+)")
BARE = re.compile(
    rf"([^`]*[0-9)}}])(?: ({PRODUCT}|\\frac ?\{{ ?{PRODUCT} ?\}} ?\{{ ?{PRODUCT} ?\}})"
    rf"|((?:[cmk]m|kg|ft|lb|min|hr|mph|mL)(?![A-Za-z]){UNIT_POWER}))"  # 12mg may be a product
)
SHORT_NAMES = {
    "m": "meter metre",
    "cm": "centimeter centimetre",
    "km": "kilometer kilometre",
    "mm": "millimeter millimetre",
    "g": "gram",
    "kg": "kilogram",
    "s": "second sec",
    "min": "minute",
    "h": "hour hr",
    "ft": "foot feet",
    "in": "inch inche",
    "mi": "mile",
    "lb": "pound",
    "dollar": "USD",
    "cent": "penny pennie",
    "am": "Am AM aM",
    "pm": "Pm PM pM",
}
SHORT_NAME = {}
for short, names in SHORT_NAMES.items():
    SHORT_NAME.update(dict.fromkeys(names.split(), short))


def one_name(match):
    word = match[0]
    singular = word[:-1].lower() if len(word) > 3 and word.endswith("s") else word
    return SHORT_NAME.get(singular, singular)


def canonical(unit):
    """One name for a unit: square centimeters, cm^2 and sq cm."""
    unit = re.sub(r"[`{}().]|\\cdot", " ", unit)
    unit = re.sub(r"\bper\b", "/", unit)
    unit = re.sub(r"\b(?:square|sq) ([A-Za-z]+)|([A-Za-z]+) squared", r"\1\2^2", unit)
    unit = re.sub(r"\bcubic ([A-Za-z]+)|([A-Za-z]+) cubed", r"\1\2^3", unit)
    return re.sub("[A-Za-z]+", one_name, unit).replace(" ", "")


def value_and_unit(text, bare):
    """`36 `cm`` is 36, cm. bare: units without a mark count too, as in 12 N and 19cm."""
    match = MARKED.fullmatch(text) or (bare and BARE.fullmatch(text))
    if not match or not re.search(r"[0-9]|\\pi", match[1]):
        return text, ""
    return match[1], canonical("".join(filter(None, match.groups()[1:])))


def same_quantity(answer, gold, decide):
    """Rule: the values are the same, and the units if both sides name one.

    Where the gold answer has letters, 12 N may be a product."""
    expected, gold_unit = value_and_unit(gold, bare=False)
    found, unit = value_and_unit(answer, bare=not letters(expected))
    if not unit and not gold_unit:
        return None
    for value, its_unit in ((found, unit), (expected, gold_unit)):
        if "degree" in its_unit and re.search(r"\\(?:pi|sin|cos|tan)", value):
            return False  # radians are no degrees, and \sin 10 is not \sin 10^\circ
    degrees = {unit, gold_unit} in ({"degree", "degreeC"}, {"degree", "degreeF"})
    if unit and gold_unit and unit != gold_unit and not degrees:
        return False
    return same_answer(found, expected, decide)


# ---- you may stop here: what follows are answers that are no numbers -----------------------------
# First lists, sets, tuples, intervals and matrices, and the brackets that hold them.


def split_outside_brackets(text, separator):
    """The pieces between separators that stand outside of all brackets; at least one."""
    pieces = []
    depth = 0
    start = 0
    for i, char in enumerate(text):
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        if depth == 0 and text.startswith(separator, i):
            pieces.append(text[start:i].strip())
            start = i + len(separator)
    pieces.append(text[start:].strip())
    return pieces


def is_bracketed(text):
    """Whether one pair of brackets holds all of the text: (1,2] but not (1,2),(3,4)."""
    depth = 0
    for i, char in enumerate(text):
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        if depth == 0:
            return 0 < i == len(text) - 1
    return False


def strip_outer_brackets(text):
    r"""Without brackets around all of it, unless they make a tuple: (C) is C, {2} and \{2\} are 2,
    but \{\emptyset\} is not \emptyset."""
    while True:
        if text.startswith("\\{") and text.endswith("\\}") and "\\emptyset" not in text:
            inside = text[2:-2]
        elif text[:1] + text[-1:] in ("()", "{}") and is_bracketed(text):
            inside = text[1:-1]
        else:
            return text
        if len(split_outside_brackets(inside, ",")) > 1 or "\\{" in inside:
            return text
        text = inside.strip()


def parts_of_union(text):
    return split_outside_brackets(text, "\\cup")


def parts_of_intersection(text):
    return split_outside_brackets(text, "\\cap")


def elements(text):
    r"""The members of a list `1, 2` or a set `\{1, 2\}`; a \pm b is two."""
    if text.startswith("\\{") and text.endswith("\\}") and is_bracketed(text[1:]):
        text = text[2:-2]
    found = []
    for piece in split_outside_brackets(text, ","):
        if "\\pm" in piece:
            found += [piece.replace("\\pm", "+"), piece.replace("\\pm", "-")]
        else:
            found.append(piece)
    return found


def same_members(answer, gold, decide):
    """Rule: lists, sets, unions and intersections match in any order."""
    for members in (parts_of_union, parts_of_intersection, elements):
        found = members(answer)
        expected = members(gold)
        if len(found) != len(expected):
            return False
        if len(expected) > 1:
            return same_in_any_order(found, expected, decide)
    return None


def same_in_any_order(found, expected, decide):
    """Sameness is transitive, so the first match does as well as any."""
    left = list(expected)
    for piece in found:
        spelled = without_spaces(piece)
        left.sort(key=lambda other: without_spaces(other) != spelled)  # the same spelling first
        for i, other in enumerate(left):
            both_sets = piece.startswith("\\{") == other.startswith("\\{")  # {1} is not 1 in a set
            if both_sets and same_answer(piece, other, decide):
                left.pop(i)
                break
        else:
            return False
    return True


def as_point(text):
    """`x = 3, y = 4` is (3,4), if the names are in the order of the alphabet; else the text."""
    named = [name_and_values(piece) for piece in split_outside_brackets(text, ",")]
    names = [name for name, _ in named]
    if not all(name and len(name) == 1 and len(values) == 1 for name, values in named):
        return text
    if names != sorted(set(names)):
        return text
    return f"({','.join(value for _, (value,) in named)})"


def same_tuple(answer, gold, decide):
    """Rule: tuples, points and intervals match in their order, with their brackets."""
    if "=" in answer and gold.startswith("("):
        answer = as_point(answer)
    expected = split_outside_brackets(gold[1:-1], ",") if is_bracketed(gold) else []
    if len(expected) < 2:
        return None
    found = split_outside_brackets(answer[1:-1], ",") if is_bracketed(answer) else []
    if (answer[:1], answer[-1:], len(found)) != (gold[:1], gold[-1:], len(expected)):
        return False
    return all(same_answer(piece, other, decide) for piece, other in zip(found, expected))


MATRIX = re.compile(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}")


def rows_of_matrix(text):
    """[[entry, ...], ...], or None if the text is no matrix."""
    match = MATRIX.fullmatch(text)
    if not match or "\\begin" in match[1]:
        return None
    return [row.strip().split("&") for row in match[1].split("\\cr")]


def same_matrix(answer, gold, decide):
    """Rule: matrices match entry by entry."""
    expected = rows_of_matrix(gold)
    if expected is None:
        return None
    found = rows_of_matrix(answer)
    if found is None or [len(row) for row in found] != [len(row) for row in expected]:
        return False
    pairs = zip(sum(found, []), sum(expected, []))
    return all(same_answer(entry.strip(), other.strip(), decide) for entry, other in pairs)


# An inequality in one letter is an interval, or a union of two.

ORDER = re.compile(r"(<|>|\\leq(?![A-Za-z])|\\geq(?![A-Za-z])|\\neq?(?![A-Za-z]))")
OPPOSITE = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq"}


def range_of(text):
    r"""`2 \leq x < 5` is x, [2,5); (None, None) if it is no such inequality."""
    sides = [side.strip() for side in ORDER.split(text)]
    if len(sides) == 3 and not SYMBOL_NAME.fullmatch(sides[0]):
        sides = [sides[2], OPPOSITE.get(sides[1], sides[1]), sides[0]]
    if len(sides) == 3 and SYMBOL_NAME.fullmatch(sides[0]) and sides[2]:
        name, sign, bound = sides
        opening = "[" if sign == "\\geq" else "("
        closing = "]" if sign == "\\leq" else ")"
        low = f"{opening}{bound},\\infty)"
        high = f"(-\\infty,{bound}{closing}"
        if sign in OPPOSITE:
            return name, low if sign in (">", "\\geq") else high
        return name, f"{high}\\cup {low}"
    if len(sides) == 5 and SYMBOL_NAME.fullmatch(sides[2]):
        if sides[1] in (">", "\\geq"):
            sides = [OPPOSITE.get(side, side) for side in sides[::-1]]
        low, left, name, right, high = sides
        if low and high and {left, right} <= {"<", "\\leq"}:
            opening = "(" if left == "<" else "["
            closing = ")" if right == "<" else "]"
            return name, f"{opening}{low},{high}{closing}"
    return None, None


def same_range(answer, gold, decide):
    r"""Rule: `x < -1 \text{ or } x > 1` is (-\infty,-1)\cup(1,\infty)."""
    sides = []
    for text in (answer, gold):
        pieces = [range_of(piece) for piece in parts_of_union(text)]
        names = {name for name, _ in pieces}
        if len(names) > 1:  # of x < 1 or y > 2 nothing is known
            return False
        is_range = None not in names
        sides.append((names, "\\cup ".join(part for _, part in pieces)) if is_range else None)
    if sides == [None, None]:
        return None
    names = [side[0] for side in sides if side]
    if names[0] != names[-1]:
        return False
    texts = [side[1] if side else text for side, text in zip(sides, (answer, gold))]
    return same_answer(*texts, decide)


# ---- names, words, formulas ----------------------------------------------------------------------

# What may stand before the equals sign, or before \in: x, f(2), P(X = 3), a^2 + b^2, \frac{m}{n},
# |AB|, \angle ABC, \cos A, \min f(x), (x,y), Area. Not 2x, x^2 or \sqrt{x}: their equation has
# still to be solved.

GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|omega|ell|Delta|Omega"
LETTER_NAME = rf"(?:[A-Za-z]|\\(?:{GREEK})(?![A-Za-z]))(?: ?_ ?(?:[A-Za-z0-9]|\{{[^{{}}]*\}}))?'*"
SYMBOL_NAME = re.compile(LETTER_NAME)
ARGUMENT = r"(?: ?\([^()]*\))"
ONE_NAME = rf"(?:[A-Z]{{2,4}}(?![a-z])|{LETTER_NAME}{ARGUMENT}?)"
POWER_OF_NAME = rf"{LETTER_NAME}(?: ?\^ ?[0-9])?"
FUNCTION_NAME = r"\\?(?:angle|triangle|cos|sin|tan|min|max|det|lcm|gcd)(?![A-Za-z])"
NAME = re.compile(
    rf"{ONE_NAME}(?: ?[+-] ?{ONE_NAME})*"
    rf"|\\frac ?\{{ ?{LETTER_NAME} ?\}} ?\{{ ?{LETTER_NAME} ?\}}|{LETTER_NAME} ?/ ?{LETTER_NAME}"
    rf"|(?:m ?)?{FUNCTION_NAME} ?(?:[A-Z]{{1,4}}|{LETTER_NAME}{ARGUMENT}?|{ARGUMENT})"
    r"|\| ?[A-Za-z]{1,2} ?\||\\lfloor ?[a-z] ?\\rfloor|\\lceil ?[a-z] ?\\rceil|\[[A-Z]{3,4}\]"
    r"|\\(?:vec|overrightarrow|overline|hat) ?\{? ?[A-Za-z]{1,2} ?\}?"
    r"|\( ?[A-Za-z](?: ?, ?[A-Za-z])+ ?\)"
)
SEVERAL_LETTERS = re.compile(
    rf"(?!{HOLDS_A_NUMBER}){POWER_OF_NAME}(?:(?: ?[+-] ?| ?){POWER_OF_NAME})+"
)
WORDS_BEFORE = re.compile(rf"(?!{HOLDS_A_NUMBER})[A-Za-z]{{3,}}(?: [A-Za-z]+)*")
ELEMENT_OF = re.compile(r"(.*?) ?\\in(?![A-Za-z])(.*)")


def is_name(text, of_numbers):
    """Whether the text only names what the answer is. Words, and a product that could be one, name
    numbers only: `west = east`."""
    if NAME.fullmatch(text) or not of_numbers:
        return bool(NAME.fullmatch(text))
    if WORDS_BEFORE.fullmatch(text):
        return True
    symbols = SYMBOL_NAME.findall(text)  # of x^2 + x each occurs twice
    return bool(SEVERAL_LETTERS.fullmatch(text)) and len(set(symbols)) == len(symbols)


def name_and_values(text):
    """`x = 6/2 = 3` is x, [6/2, 3], and `3 = x` is x, [3]; without a name None, and all that the
    equals signs separate."""
    links = split_outside_brackets(text, "=")
    if len(links) == 1:
        return None, links
    if is_name(links[0], of_numbers=re.search("[0-9]", links[-1])):
        return without_spaces(links[0]), links[1:]
    if len(links) == 2 and SYMBOL_NAME.fullmatch(links[1]) and not letters(links[0]):
        return links[1], links[:1]
    return None, links


def without_element_of(text):
    r"""`x \in [1,2]` is [1,2]: there x names no number, and may be any letter."""
    match = ELEMENT_OF.fullmatch(text)
    return match[2].strip() if match and is_name(match[1], of_numbers=False) else text


ARITHMETIC = re.compile(r"[0-9+*/() -]{1,100}")


def evaluates_to(text, expected):
    r"""Whether integers with + - \times / give the number: of `3 \times 4 = 12` the left side."""
    text = re.sub(r"\\(?:times|cdot)(?![A-Za-z])", "*", text).strip()
    if not ARITHMETIC.fullmatch(text):
        return False
    try:
        return exact_value(ast.parse(text, mode="eval").body, []) == expected
    except (SyntaxError, TypeError, ZeroDivisionError):
        return False


def same_assignment(answer, gold, decide):
    """Rule: `x = 6/2 = 3` is 3, and every link has to be. `k = 3` is not `m = 3`. `D = C` does not
    choose C. Lists come later, member by member."""
    if any(len(split_outside_brackets(text, ",")) > 1 for text in (answer, gold)):
        return None
    found_name, found = name_and_values(answer)
    gold_name, expected = name_and_values(gold)
    if len(expected) > 1 or re.fullmatch("[A-Z]+", without_spaces(expected[0])):
        return None
    *links, last = found
    value = number(without_spaces(expected[0]))
    if found_name is None and (value is None if links else gold_name is None):
        return None  # x + 3 = x + 3 says nothing of y
    if None not in (found_name, gold_name) and found_name != gold_name:
        return False
    if not same_answer(last, expected[0], decide):
        return False
    return all(same_answer(x, expected[0], decide) or evaluates_to(x, value) for x in links)


def same_equation(answer, gold, decide):
    """Rule: equations in several letters are the same if one is a multiple of the other. Where it
    is none, the formulas behind a name may still be the same."""
    sides = [split_outside_brackets(text, "=") for text in (answer, gold)]
    several = len(letters(gold)) > 1 and letters(answer) == letters(gold)
    if not several or [len(side) for side in sides] != [2, 2]:
        return None
    solved_for = {left for left, _ in sides if SYMBOL_NAME.fullmatch(left)}
    if len(solved_for) == 2:  # m = k/2 does not solve for k
        return None
    if not (is_readable(answer) and is_readable(gold)):
        return None
    return True if decide(answer, gold) else None


CHOICE = re.compile(
    r"(?:(?:option|choice|answer) )?(?:([A-Z])|(?:\( ?([A-Z]) ?\)(?: ?[.:])?|([A-Z])[.:)])"
    r"(?: ?(?:-?[0-9]|\\frac|\\sqrt)(?:[0-9./{}()+ ^-]|\\(?:frac|sqrt|pi)(?![A-Za-z]))*)?)",
    re.I,
)


def same_choice(answer, gold, decide):
    """Rule: of a multiple choice the letter counts: C, (C), C), Option C, (C) 12, C. 12."""
    if not re.fullmatch("[A-J]", gold):
        return None
    match = CHOICE.fullmatch(answer)
    return (match[1] or match[2] or match[3]) == gold if match else None


WORD = re.compile(r"[A-Za-z]{3,}")


def words(text):
    return [word.casefold() for word in WORD.findall(COMMAND.sub(" ", text))]


def same_word(answer, gold, decide):
    """Rule: words match themselves only. To sympy `east` is e a s t, and so is `seat`."""
    if not re.fullmatch(r"[A-Za-z ]{2,}", gold) or len(without_spaces(gold)) < 2:
        return None
    same = without_spaces(answer).casefold() == without_spaces(gold).casefold()
    if not words(gold) and gold.casefold() != "no":  # mv and Mv are two products
        same = without_spaces(answer) == without_spaces(gold)
    return same and words(answer) == words(gold)


# What sympy may read. The rest math-verify would evaluate for the policy (\sum, \int, \gcd: the
# question repeated), drop (primes, the base of 4210_5; a derivative is 0) or take for something
# else (3 4 is 7).
COMMANDS = (
    "frac|sqrt|pi|cdot|times|div|binom|begin|end|cr|geq|leq"
    "|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp"
    "|lfloor|rfloor|lceil|rceil"
    "|alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|psi|omega"
    "|Delta|Omega|hbar"
)
READABLE = re.compile(rf"(?:[A-Za-z0-9 +*/^_(){{}}\[\]=<>.,!|&-]|\\(?:{COMMANDS})(?![A-Za-z]))*")
MISREAD = re.compile(r"[0-9][A-Z]*_|\\frac ?\{ ?d[^{}]*\} ?\{ ?d|(?<![\^_0-9.])[0-9.]+ [0-9]")
CALL = re.compile(r"\\(?:arc|sin|cos|tan|cot|sec|csc|log|ln|exp|binom|lfloor|lceil)|!")
COMMAND = re.compile(r"\\[A-Za-z]+")
LETTER = re.compile(r"[A-Za-df-z]")  # e is a number
GREEK_LETTER = re.compile(rf"\\(?:{GREEK}|nu|psi)(?![A-Za-z])")  # \pi is one, too


def letters(text):
    return set(LETTER.findall(COMMAND.sub(" ", text)) + GREEK_LETTER.findall(text))


def count_of_i(text):
    return COMMAND.sub(" ", text).count("i")


def is_readable(text):
    return bool(READABLE.fullmatch(text)) and not MISREAD.search(text)


def same_formula(answer, gold, decide):
    r"""Rule, the last: the same letters on both sides, as math-verify would take m for M; nothing
    that it misreads; and then it decides.

    \arcsin(-1/2) for -\pi/6 is the question repeated: where the gold answer has no letters and
    calls no function, the answer may not call one either. So is (1+2i)^2: a number has its i as
    often as the gold answer at most."""
    if not letters(gold) and CALL.search(answer) and not CALL.search(gold):
        return False
    _, found = name_and_values(answer)
    _, expected = name_and_values(gold)
    if len(found) != len(expected) or letters(answer) != letters(gold):
        return False
    if letters(gold) == {"i"} and count_of_i(answer) > count_of_i(gold):
        return False
    return is_readable(answer) and is_readable(gold) and decide(answer, gold)


def same_spelling(answer, gold, decide):
    """Rule: the same spelling is the same answer, but `e a s t` is not `east`. Digits and letters
    of other scripts, and zero-width characters, are never read further."""
    found = without_spaces(answer)
    if found == without_spaces(gold):
        return True if words(answer) == words(gold) else None
    return None if found.isascii() else False


# Each rule takes (answer, gold, decide) and returns True, False, or None: "I do not decide".
SAMENESS = (
    same_spelling,
    same_choice,
    same_range,
    same_equation,
    same_assignment,
    same_tuple,
    same_members,
    same_matrix,
    same_quantity,
    same_number,
    same_word,
    same_formula,
)


def same_answer(answer, gold, decide):
    """Whether two normalised answers mean the same, by the first rule of SAMENESS that decides.

    decide(answer, gold) -> bool: for two formulas, which the rules cannot compare themselves."""
    answer = strip_outer_brackets(without_element_of(answer))
    gold = strip_outer_brackets(without_element_of(gold))
    for rule in SAMENESS:
        verdict = rule(answer, gold, decide)
        if verdict is not None:
            return verdict


class Undecided(Exception):
    """Neither spelling nor exact numbers tell whether two answers are the same: sympy has to."""


def undecided(answer, gold):
    raise Undecided


def judge_math(response, gold):
    """The verdict on a response whose answer should be `gold`, a number or LaTeX."""
    found = extract(response)
    if found is None:
        return "no_answer"
    try:
        return "right" if same_answer(normalise(found), normalise(gold), undecided) else "wrong"
    except Undecided:
        pass
    try:
        return ask_worker(found, gold)
    except WorkerLost:
        return "timeout"


# ---- the worker that may ask sympy ---------------------------------------------------------------
# It is this file again, run as a script that reads and writes lines of JSON. No fork (the parent
# has threads and CUDA), no multiprocessing (it would import train.py again), no SIGALRM timeout of
# math-verify (off the main thread it makes every reward 0). A worker ends with its input, or by its
# own timer once an answer has taken TIME_LIMIT of processor time.

TIME_LIMIT = 5.0  # seconds of processor time per answer
PATIENCE = 4  # a busy machine may take so many times as long
MEMORY_LIMIT = 2 << 30  # bytes of address space of a worker
WORKERS = min(4, os.cpu_count() or 1)  # at most, per rank; started when first needed

_idle = queue.LifoQueue()


class WorkerLost(Exception):
    """No verdict, for a reason that need not be the answer's: a busy machine, a killed worker."""


def start_worker():
    worker = subprocess.Popen(
        [sys.executable, __file__, "--worker", str(TIME_LIMIT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the parent
    )
    if receive(worker, 120) != "ready":  # importing sympy can be slow
        stop_worker(worker)
        raise RuntimeError(
            "the math-verify worker does not start; to see why: "
            f"{sys.executable} {__file__} --worker {TIME_LIMIT}"
        )
    return worker


def stop_worker(worker):
    worker.kill()
    worker.communicate()


def close():
    """End the idle workers. Not needed at exit: they end with the parent."""
    while not _idle.empty():
        stop_worker(_idle.get())


def receive(worker, seconds):
    """The next message, or None when the time is over or the worker has ended."""
    poll = select.poll()  # select() fails once the process has 1024 files open
    poll.register(worker.stdout, select.POLLIN)
    line = worker.stdout.readline() if poll.poll(1000 * seconds) else b""
    return json.loads(line) if line else None


@lru_cache(1 << 16)  # a group repeats its answers, and a slow one should cost its time once
def ask_worker(answer, gold):
    """A worker's verdict on two answers as they were given; "timeout" if it used up its processor
    time. Raises WorkerLost, which is not remembered, if it was lost in another way."""
    try:
        worker = _idle.get_nowait()
    except queue.Empty:
        worker = start_worker()
    try:
        worker.stdin.write(json.dumps([answer, gold]).encode() + b"\n")
        worker.stdin.flush()
        verdict = receive(worker, PATIENCE * TIME_LIMIT)
    except BrokenPipeError:  # killed from outside while idle
        verdict = None
    if verdict is not None:
        _idle.put(worker)
        return verdict
    stop_worker(worker)
    if worker.returncode == -signal.SIGPROF:
        return "timeout"
    raise WorkerLost


def worker_main(time_limit):
    """What a worker does: reads pairs of answers, writes verdicts, for ever."""
    import logging
    import resource

    import sympy
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse
    from sympy.core.relational import GreaterThan, LessThan, StrictGreaterThan, StrictLessThan

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off
    if sys.platform == "linux":  # macOS refuses
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    spelling = NormalizationConfig(units=False, nits=False, boxed="none")
    config = [LatexExtractionConfig(normalization_config=spelling)]

    def exact(match):
        """Decimals as fractions: there are no floats here, so that nothing is rounded."""
        if "." not in match[0]:
            return match[0]
        numerator, denominator = Fraction(match[0]).as_integer_ratio()
        return rf"{{\frac{{{numerator}}}{{{denominator}}}}}"

    def read(text):
        """What math-verify reads, evaluated, with one symbol for a name; i is the imaginary unit
        (math-verify decides that text by text), and \\gamma no function."""
        text = re.sub(r"\\gamma(?![A-Za-z])", r"\\xi", text.replace("\\cr", "\\\\"))
        latex = f"${re.sub(DECIMAL, exact, text)}$"
        found = parse(latex, config, fallback_mode="no_fallback", parsing_timeout=None)
        if not found or not isinstance(found[0], sympy.Basic):
            raise ValueError("not readable")
        symbols = found[0].free_symbols
        real = {x: sympy.Symbol(x.name, real=True) for x in symbols if x.name != "i"}
        imaginary = {x: sympy.I for x in symbols if x.name == "i"}
        return found[0].xreplace(real | imaginary).doit()

    undefined = (sympy.zoo, sympy.nan, sympy.oo, -sympy.oo)

    def is_zero(value):
        """Whether it is proven that a value is 0: by exact arithmetic or algebra. Floats only tell
        at once what is far from 0."""
        value = value.doit()
        if value.has(*undefined):
            return False
        if value.is_Rational:
            return value == 0
        names = sorted(value.free_symbols, key=str)
        point = {x: sympy.Rational(7 + 2 * i, 5 + i) for i, x in enumerate(names)}
        there = value.subs(point).evalf(20)
        if there.is_number and there.is_comparable is not False and abs(there) > 1e-6:
            return False
        for transform in (sympy.expand, sympy.simplify, complex_parts):
            if transform(value) == 0:
                return True
        if names or not value.is_algebraic:
            return False
        x = sympy.Dummy()
        return sympy.minimal_polynomial(value, x) == x

    def complex_parts(value):
        return sympy.simplify(value.expand(complex=True))

    def difference(relation):
        """The relation is `difference = 0`, `> 0` or `>= 0`."""
        if isinstance(relation, sympy.Equality):
            return relation.lhs - relation.rhs
        return relation.gts - relation.lts

    kinds = ((sympy.Equality,), (StrictGreaterThan, StrictLessThan), (GreaterThan, LessThan))

    def decide(answer, gold):
        found = read(answer)
        expected = read(gold)
        if isinstance(found, sympy.Expr) and isinstance(expected, sympy.Expr):
            is_defined = not found.has(*undefined) and not expected.has(*undefined)
            return is_defined and is_zero(found - expected)
        for kind in kinds:
            if isinstance(found, kind) and isinstance(expected, kind):
                one, other = difference(found), difference(expected)
                if one.has(*undefined) or is_zero(one) or is_zero(other):
                    return False
                ratio = sympy.simplify(one / other)
                is_order = kind[0] is not sympy.Equality
                is_constant = not ratio.free_symbols
                return bool(ratio.is_positive if is_order else ratio.is_nonzero) and is_constant
        return False

    sympy_raises_on_nonsense = (
        ValueError,
        ArithmeticError,
        AttributeError,
        TypeError,
        NotImplementedError,
        RecursionError,
        MemoryError,
    )
    print('"ready"', flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, time_limit)  # at its end the process is ended
        answer, gold = map(normalise, json.loads(line))
        try:
            verdict = "right" if same_answer(answer, gold, decide) else "wrong"
        except sympy_raises_on_nonsense:
            verdict = "no_answer"
        print(json.dumps(verdict), flush=True)


# ---- Countdown -----------------------------------------------------------------------------------


def judge_countdown(response, gold):
    """The verdict on an expression. gold: JSON {"numbers": [...], "target": n}.

    The last <answer> block counts, else the whole response. Integers, + - * / and parentheses,
    exact division, no unary minus; `= target` may follow."""
    gold = json.loads(gold)
    text = response
    if "<answer>" in text:
        text = answer_block(text)
        if text is None:
            return "no_answer"
    text, equals, result = text.strip().partition("=")
    if not re.fullmatch(r"[0-9 +*/()-]{1,200}", text):
        return "no_answer"  # 200 characters bound the depth and the size of everything below
    numbers = []
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        value = exact_value(tree, numbers)
    except (SyntaxError, TypeError):
        return "no_answer"
    except ZeroDivisionError:
        return "wrong"
    if equals and result.strip() != str(gold["target"]):
        return "wrong"
    reached = value == gold["target"] and sorted(numbers) == sorted(gold["numbers"])
    return "right" if reached else "wrong"


def exact_value(node, numbers):
    """The exact value of a syntax tree; appends the numbers that it uses. What is not listed here
    is a TypeError."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        return Fraction(node.value)
    if not isinstance(node, ast.BinOp):
        raise TypeError(f"{type(node).__name__} is not allowed")
    left = exact_value(node.left, numbers)
    right = exact_value(node.right, numbers)
    match node.op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
    raise TypeError(f"{type(node.op).__name__} is not allowed")


# ---- rules and scores ----------------------------------------------------------------------------

# name: rule(response, gold answer) -> a verdict, or a number, which is the reward
RULES = {"countdown": judge_countdown, "math": judge_math}


class Score(NamedTuple):
    reward: float
    verdict: str  # one of VERDICTS


def score_one(rule, response, gold):
    """The Score of a response by a rule of RULES: a verdict "right" is worth 1, others 0. Where the
    rule returns a number, above 0 counts as right."""
    judged = RULES[rule](response, gold)
    if isinstance(judged, str):
        if judged not in VERDICTS:
            raise ValueError(f"the rule {rule} returned {judged!r}, which is no verdict")
        return Score(float(judged == "right"), judged)
    reward = float(judged)
    return Score(reward, "right" if reward > 0 else "wrong")


def score(problems, responses):
    """The Scores of responses[i] to problems[i], in order."""
    if len(problems) != len(responses):
        raise ValueError(f"{len(problems)} problems, but {len(responses)} responses")

    def one(problem, response):
        return score_one(problem.rule, response, problem.answer)

    with ThreadPoolExecutor(WORKERS) as pool:  # the threads only wait for the workers
        return list(pool.map(one, problems, responses))


# ---- pass@k and calibration ----------------------------------------------------------------------


def pass_at_k(n, c, k):
    """Probability that k of n answers, c of them right, drawn without replacement, hold a right
    one.

        1 - C(n-c, k) / C(n, k)          Chen et al. 2021, arXiv 2107.03374, eq. 1; unbiased

    In integers and one division, so correctly rounded. The float product of the paper's code is
    not.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return (comb(n, k) - comb(n - c, k)) / comb(n, k)


def calibration(confidence, right):
    """Whether confident answers are the right ones. confidence: N numbers in [0, 1]; right: N times
    0 or 1.

        conf_right, conf_wrong    mean confidence of the right, of the wrong answers
        conf_gap                  the first minus the second
        auroc                     P(a right answer is more confident than a wrong one), a tie half
        ece                       sum over bins b of N_b/N |accuracy_b - mean confidence_b|,
                                  bins [0, .1) ... [.9, 1]; Guo et al. 2017, arXiv 1706.04599, eq. 3

    What needs right answers, wrong ones or any is left out where there are none: nan is no JSON.
    """
    if len(confidence) != len(right) or not all(0 <= c <= 1 for c in confidence):
        raise ValueError("calibration needs as many confidences, each in [0, 1], as verdicts")
    of_right = [c for c, r in zip(confidence, right) if r]
    of_wrong = sorted(c for c, r in zip(confidence, right) if not r)
    found = {}
    if of_right:
        found["conf_right"] = fmean(of_right)
    if of_wrong:
        found["conf_wrong"] = fmean(of_wrong)
    if of_right and of_wrong:
        found["conf_gap"] = found["conf_right"] - found["conf_wrong"]
        twice_won = sum(bisect_left(of_wrong, c) + bisect_right(of_wrong, c) for c in of_right)
        found["auroc"] = twice_won / (2 * len(of_right) * len(of_wrong))
    bins = [[] for _ in range(10)]
    for c, r in zip(confidence, right):
        bins[min(int(10 * c), 9)].append(c - r)
    if confidence:
        found["ece"] = fsum(abs(fsum(one_bin)) for one_bin in bins) / len(confidence)
    return found


if __name__ == "__main__" and sys.argv[1:2] == ["--worker"]:
    worker_main(float(sys.argv[2]))
