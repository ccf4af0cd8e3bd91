r"""Verifiable rewards: the rules that judge an answer, pass@k and calibration.

A rule is the reward, so it is what the policy will attack. Three decisions follow, and one thing is
left open:
  - Text of the model is never executed. Countdown is read with `ast`. Mathematics is compared by
    spelling, then by exact numbers, and only then by math-verify (sympy), in worker processes that
    are killed at a time limit.
  - A gold answer that is a number is compared with numbers only, and exactly. The policy has to do
    the arithmetic, sympy will not do it for it: `\sum_{k=1}^{9} k` is no answer to 45. There is no
    tolerance anywhere: 0.33 is not 1/3.
  - A verdict is one of "right", "wrong", "no_answer" (nothing there, or unreadable) and "timeout"
    (the worker ran out of time or memory). Each is counted, so that a broken verifier does not look
    like a poor policy.
  - Open: where the gold answer is no number, whatever equals it is right, and so is the formula of
    a "simplify" or "factor" question itself (10 of the 500 problems of MATH500, see
    experiments/results/verifier.md).

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


def boxed_span(text, start):
    r"""Where what the \boxed at text[start:] holds begins and ends; None if it is not closed within
    MAX_ANSWER characters."""
    begin = re.compile(r"\\boxed\s*").match(text, start).end() + 1
    if text[begin - 1 : begin] != "{":
        return None
    depth = 1
    i = begin
    while i < min(len(text), begin + MAX_ANSWER + 1):
        if text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
        if depth == 0:
            return begin, i
        i += 2 if text[i] == "\\" else 1  # \{ and \} do not nest
    return None


def last_boxed(response):
    r"""What the last \boxed{} holds; None if it holds nothing or is not closed.

    A box around the last one, with something beside it, `\boxed{\boxed{3} 4}`, is one answer that
    nothing can equal."""
    last = response.rfind("\\boxed")
    near = re.compile(r"\\boxed").finditer(response, max(0, last - MAX_ANSWER))
    text = ""
    for match in near:
        span = boxed_span(response, match.start())
        if span and span[1] > last:  # the outermost box that holds the last one
            text = response[slice(*span)].strip()
            break
    while text.startswith("\\boxed"):
        span = boxed_span(text, 0)
        if not span or span[1] != len(text) - 1:
            break
        text = text[slice(*span)].strip()
    return text or None


def extract(response):
    r"""The answer in a response: what the last \boxed{} holds; without a box, the rest of the line
    after the last `Answer:` or `####`; or None."""
    if "\\boxed" in response:
        return last_boxed(response)
    for marker in ("Answer:", "####"):
        if marker in response:
            line = response.rpartition(marker)[2].partition("\n")[0].strip(" *\t\r")
            return line if 0 < len(line) <= MAX_ANSWER else None
    return None


# ---- numbers -------------------------------------------------------------------------------------

DECIMAL = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
EXPONENT = r"\{?([+-]?[0-9]{1,3})\}?"
TIMES_TEN_TO = r"(?:[eE]|(?:\\times|\\cdot|\*)10\^)"
# 510^3 is none of these: it does not mean 5 * 10^3.
NUMBER = re.compile(rf"(?:({DECIMAL}){TIMES_TEN_TO}|10\^){EXPONENT}|({DECIMAL})")
FRACTION = re.compile(rf"([0-9]*)\\frac\{{(-?{DECIMAL})\}}\{{({DECIMAL})\}}")
QUOTIENT = re.compile(rf"^({DECIMAL})/({DECIMAL})$")


def number(text):
    r"""The Fraction that a text without spaces spells, or None.

    It knows 12, .5, 4e33, 4\times10^{33}, a/b, \frac{a}{b} and mixed numbers."""
    sign = -1 if text.startswith("-") else 1
    if text[:1] in ("+", "-"):
        text = text[1:]
    text = QUOTIENT.sub(r"\\frac{\1}{\2}", text)
    match = NUMBER.fullmatch(text)
    if match:
        mantissa = Fraction(match[1] or match[3] or 1)
        return sign * mantissa * Fraction(10) ** int(match[2] or 0)
    match = FRACTION.fullmatch(text)
    if not match:
        return None
    whole, numerator, denominator = match.groups()
    if Fraction(denominator) == 0 or (whole and "-" in numerator):
        return None
    return sign * (Fraction(whole or 0) + Fraction(numerator) / Fraction(denominator))


def same_number(answer, gold, decide):
    r"""Rule: against a number only an equal number is right.

    62.5 % may be written 62.5\%, 62.5 or 0.625, but not 0.625 %."""
    answer = without_spaces(answer)
    gold = without_spaces(gold)
    expected = number(gold.rstrip("%"))
    if expected is None:
        return None
    found = number(answer.rstrip("%"))
    if found is None:
        return False
    scale = Fraction(100 if answer.endswith("%") else 1, 100 if gold.endswith("%") else 1)
    return found in (expected, scale * expected)


# ---- one spelling for the many of one answer -----------------------------------------------------
# A unit ends an answer: \text{...} with letters and no numbers, or words after a number. What would
# change the number is no unit: `10 million`, `3 plus five`, `3 squared` (but 3 feet squared is
# one), `3\text{}^2`, `3\mathrm{i}`.

SMALL_NUMBERS = "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
TEENS = "(?:thir|four|fif|six|seven|eigh|nine)teen"
TENS = "(?:twen|thir|for|fif|six|seven|eigh|nine)ty"
MULTIPLES = "hundred|thousand|dozen|hal(?:f|ves)|thirds"
OPERATORS = r"not|plus|minus|over|times(?= [a-z]\b)"  # but `34 times` has a unit
FUNCTIONS = "sin|cos|tan|log|exp|sqrt"
COUNTING = f"{MULTIPLES}|{OPERATORS}|{FUNCTIONS}|{SMALL_NUMBERS}|{TEENS}|{TENS}"
# Anywhere in it a word that counts; "illion" also inside of a word.
HOLDS_A_NUMBER = rf"[^{{}}]*(?:illion|\b(?:{COUNTING})s?\b)"

BEGINS_WITH_MATHEMATICS = (
    r" ?(?:(?:squared|cubed|factorials?|\\?pi|[einxy])\b"  # 3 squared, 3\mathrm{i}
    r"|[-+*=<>!^_]"  # 3\text{+5}
    r"|/[a-z]\})"  # 3\text{/x}
)
NO_NUMBER = rf"(?!{BEGINS_WITH_MATHEMATICS})(?!{HOLDS_A_NUMBER})"

TEXT_UNIT = (
    rf"\\(?:text|mathrm|textrm|mbox)\{{{NO_NUMBER}"
    r"(?=[^{}]*[A-Za-z])"  # at least one letter: \text{} is none
    r"(?:[^{}0-9,]|\^[0-9])*"  # no digit but an exponent: cm^2
    r"(?:\{[^{}]*\})?\}"  # m/s^{2}
)
WORD_UNIT = (
    rf"(?<=[0-9}}]) {NO_NUMBER}"
    r"(?:[A-Za-z]{3,}|[cmk]m|kg|ft)"  # two letters may be two factors, except these
    r"(?:[ /][A-Za-z]+)*"  # feet squared, miles/hour
)
UNIT_POWER = r"(?:\^\{?-?[0-9]\}?)?"  # \text{cm}^2
UNIT = rf"(?:{TEXT_UNIT}|{WORD_UNIT}){UNIT_POWER}"

FONTS = "text|mathrm|textbf|mathbf|textrm|mbox|operatorname"
DELIMITERS = r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![A-Za-z])|\\?\$|\\[()\[\]]"
DEGREES = r" ?\^ ?(?:\\circ(?![A-Za-z])|\{ ?\\circ ?\})|\\degree(?![A-Za-z])|°"
SPACES = r"(?:\\[,;:! ]|~|\\q?quad(?![A-Za-z])|\s)+"
AND_OR = r",? ?(?:\\text\{ ?,? ?(?:and|or) ?\}|(?<![\\A-Za-z])(?:and|or)(?![A-Za-z])) ?"

# (pattern, replacement), applied in this order. What is dropped leaves a space, or `3$4` and 3°4
# would be 34.
SPELLINGS = (
    # \dfrac, \tfrac, \cfrac
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    # 1{,}000  1,\!000  1\,000
    (r"(?<=[0-9])(?:\{,\}|,? ?\\! ?|\\, ?)(?=[0-9]{3}(?![0-9]))", ""),
    (DELIMITERS, " "),
    (DEGREES, " "),
    (SPACES, " "),
    # 50\%, 50 percent, 50\text{ percent}
    (r" ?\\%| ?(?:\\text\{ ?)?\bpercent\b\}?", "%"),
    # `1 and 3` is the list 1, 3
    (AND_OR, ", "),
    # \ge, \geq, \geqslant, \le ...
    (r"\\([gl])eq?(?:slant)?(?![A-Za-z])", r"\\\1eq"),
    # \frac12, \frac{270}7, \sqrt5
    (r"\\frac ?([0-9]) ?([0-9])", r"\\frac{\1}{\2}"),
    (r"\\frac ?(\{[^{}]*\}) ?([0-9])", r"\\frac\1{\2}"),
    (r"\\sqrt ?([0-9])", r"\\sqrt{\1}"),
    # bmatrix is pmatrix
    (r"\\(begin|end)\{[bp]matrix\}", r"\\\1{pmatrix}"),
    # x \in [1,2]
    (r"^[A-Za-z] ?\\in(?![A-Za-z])", ""),
    # the unit; `C\text{D}` has none
    (rf"^(?![A-Za-z ]+\\)(.*?[^ {{(,=]) ?(?:{UNIT})\.?$", r"\1"),
    # \text{even} is even
    (rf"\\(?:{FONTS})\{{([^{{}}]*)\}}", r" \1 "),
    (r" +", " "),
)
SPELLINGS = [(re.compile(pattern), replacement) for pattern, replacement in SPELLINGS]
BRACKETS = re.compile(r"[(\[]|\\\{")
THOUSANDS = re.compile(r"(?<![0-9,.])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9,])")


def without_commas(match):
    return match[0].replace(",", "")


def normalise(text):
    """One spelling for the many of one answer; still LaTeX, with single spaces."""
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


# ---- you may stop here: what follows are answers that are no numbers -----------------------------
# First lists, sets, tuples and intervals, and the brackets that hold them.


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
        if char in "([":
            depth += 1
        elif char in ")]":
            depth -= 1
        if depth == 0:
            return 0 < i == len(text) - 1
    return False


def strip_outer_parentheses(text):
    """Without parentheses around all of it, unless they make a tuple: (C) is C."""
    while text.startswith("(") and text.endswith(")") and is_bracketed(text):
        if len(split_outside_brackets(text[1:-1], ",")) > 1:
            break
        text = text[1:-1].strip()
    return text


def parts_of_union(text):
    return split_outside_brackets(text, "\\cup")


def elements(text):
    r"""The members of a list `1, 2` or a set `\{1, 2\}`; a \pm b is two."""
    if text.startswith("\\{") and text.endswith("\\}"):
        text = text[2:-2]
    found = []
    for piece in split_outside_brackets(text, ","):
        if "\\pm" in piece:
            found += [piece.replace("\\pm", "+"), piece.replace("\\pm", "-")]
        else:
            found.append(piece)
    return found


def same_members(answer, gold, decide):
    """Rule: lists, sets and unions match in any order."""
    for members in (parts_of_union, elements):
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
            if same_answer(piece, other, decide):
                left.pop(i)
                break
        else:
            return False
    return True


def same_tuple(answer, gold, decide):
    """Rule: tuples, points and intervals match in their order, with their brackets."""
    expected = split_outside_brackets(gold[1:-1], ",") if is_bracketed(gold) else []
    if len(expected) < 2:
        return None
    found = split_outside_brackets(answer[1:-1], ",") if is_bracketed(answer) else []
    if (answer[:1], answer[-1:], len(found)) != (gold[:1], gold[-1:], len(expected)):
        return False
    return all(same_answer(piece, other, decide) for piece, other in zip(found, expected))


# ---- names, words, formulas ----------------------------------------------------------------------

GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|omega|ell"
ONE_NAME = (
    rf"(?:[A-Z]{{2}}|[A-Za-z]|\\(?:{GREEK}))"
    r"(?:_(?:[A-Za-z0-9]|\{[^{}]*\}))?"
    r"(?:\([A-Za-z]\))?"
)
NAME = re.compile(rf"{ONE_NAME}(?:[+-]{ONE_NAME})*")


def name_and_values(text):
    """`x = 6/2 = 3` is x, [6/2, 3]; without a name on the left None, and all that the equals signs
    separate."""
    links = split_outside_brackets(text, "=")
    if len(links) > 1 and NAME.fullmatch(without_spaces(links[0])):
        return without_spaces(links[0]), links[1:]
    return None, links


def same_assignment(answer, gold, decide):
    """Rule: `x = 6/2 = 3` is 3, and every link has to be. `k = 3` is not `m = 3`. `D = C` does not
    choose C."""
    found_name, found = name_and_values(answer)
    gold_name, expected = name_and_values(gold)
    named = found_name is not None or gold_name is not None
    if not named or re.fullmatch("[A-Z]", without_spaces(gold)):
        return None
    if None not in (found_name, gold_name) and found_name != gold_name:
        return False
    return len(expected) == 1 and all(same_answer(link, expected[0], decide) for link in found)


def same_word(answer, gold, decide):
    """Rule: a word matches itself only. To sympy `east` is e a s t, and so is `seat`."""
    gold = without_spaces(gold)
    if not re.fullmatch(r"[A-Za-z]{2,}", gold):
        return None
    return without_spaces(answer).casefold() == gold.casefold()


# What sympy may read. The rest math-verify would evaluate for the policy (\sum, \int, \gcd: the
# question repeated), drop (primes, the base of 4210_5; a derivative is 0) or take for something
# else (\gamma is a function, 3 4 is 7).
COMMANDS = (
    "frac|sqrt|pi|cdot|times|div|binom|begin|end|geq|leq"
    "|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp"
    "|lfloor|rfloor|lceil|rceil"
    "|alpha|beta|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|psi|omega|Delta|Omega|hbar"
)
READABLE = re.compile(
    rf"(?:[A-Za-z0-9 +*/^_(){{}}\[\]=<>.,!|&-]|\\\\|\\(?:{COMMANDS})(?![A-Za-z]))*"
)
MISREAD = re.compile(r"[0-9]_|\\frac ?\{ ?d[^{}]*\} ?\{ ?d|(?<![\^_0-9.])[0-9.]+ [0-9]")
CALL = re.compile(r"\\(?:arc|sin|cos|tan|cot|sec|csc|log|ln|exp|binom|lfloor|lceil)|!")
COMMAND = re.compile(r"\\[A-Za-z]+")
LETTER = re.compile(r"[A-Za-df-z]")  # e is a number


def letters(text):
    return set(LETTER.findall(COMMAND.sub(" ", text)))


def is_readable(text):
    return bool(READABLE.fullmatch(text)) and not MISREAD.search(text)


def same_formula(answer, gold, decide):
    r"""Rule, the last: the same letters on both sides, as math-verify would take m for M; nothing
    that it misreads; and then it decides.

    \arcsin(-1/2) for -\pi/6 is the question repeated: where the gold answer has no letters and
    calls no function, the answer may not call one either."""
    if not letters(gold) and CALL.search(answer) and not CALL.search(gold):
        return False
    _, found = name_and_values(answer)
    _, expected = name_and_values(gold)
    if len(found) != len(expected) or letters(answer) != letters(gold):
        return False
    return is_readable(answer) and is_readable(gold) and decide(answer, gold)


def same_spelling(answer, gold, decide):
    """Rule: the same spelling is the same answer. Digits and letters of other scripts, and
    zero-width characters, are never read further."""
    found = without_spaces(answer)
    if found == without_spaces(gold):
        return True
    return None if found.isascii() else False


# Each rule takes (answer, gold, decide) and returns True, False, or None: "I do not decide".
SAMENESS = (
    same_spelling,
    same_members,
    same_tuple,
    same_assignment,
    same_number,
    same_word,
    same_formula,
)


def same_answer(answer, gold, decide):
    """Whether two normalised answers mean the same, by the first rule of SAMENESS that decides.

    decide(answer, gold) -> bool: for two formulas, which the rules cannot compare themselves."""
    answer = strip_outer_parentheses(answer)
    gold = strip_outer_parentheses(gold)
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
        return ask_worker(found, gold)


# ---- the worker that may ask sympy ---------------------------------------------------------------
# It is this file again, run as a script that reads and writes lines of JSON. No fork (the parent
# has threads and CUDA), no multiprocessing (it would import train.py again), no SIGALRM timeout of
# math-verify (off the main thread it makes every reward 0). A worker ends with its input, or by its
# own alarm if the parent was killed while it computed.

TIME_LIMIT = 5.0  # seconds per answer
MEMORY_LIMIT = 2 << 30  # bytes of address space of a worker
WORKERS = min(4, os.cpu_count() or 1)  # at most, per rank; started when first needed

_idle = queue.LifoQueue()


def start_worker():
    worker = subprocess.Popen(
        [sys.executable, __file__, "--worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the parent
    )
    if receive(worker, 120) != "ready":  # importing sympy can be slow
        stop_worker(worker)
        raise RuntimeError(
            "the math-verify worker does not start; to see why: "
            f"{sys.executable} {__file__} --worker"
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
    """A worker's verdict on two answers as they were given; "timeout" if it had to be killed."""
    try:
        worker = _idle.get_nowait()
    except queue.Empty:
        worker = start_worker()
    try:
        worker.stdin.write(json.dumps([answer, gold]).encode() + b"\n")
        worker.stdin.flush()
        verdict = receive(worker, TIME_LIMIT)
    except BrokenPipeError:  # killed from outside while idle
        verdict = None
    if verdict is None:
        stop_worker(worker)
        return "timeout"
    _idle.put(worker)
    return verdict


def worker_main():
    """What a worker does: reads pairs of answers, writes verdicts, for ever."""
    import logging
    import resource

    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off
    if sys.platform == "linux":  # macOS refuses
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    spelling = NormalizationConfig(units=False, nits=False, boxed="none")
    config = [LatexExtractionConfig(normalization_config=spelling)]

    def exact(match):
        """Decimals as fractions: sympy compares floats at 6 digits, and 1e-8 would be 0."""
        if "." not in match[0]:
            return match[0]
        numerator, denominator = Fraction(match[0]).as_integer_ratio()
        return rf"{{\frac{{{numerator}}}{{{denominator}}}}}"

    def read(text):
        latex = f"${re.sub(DECIMAL, exact, text)}$"
        found = parse(latex, config, fallback_mode="no_fallback", parsing_timeout=None)
        if not found:
            raise ValueError("not readable")
        return found

    def decide(answer, gold):
        # At 15 digits, the default, 1e-20 is 0.
        return verify(read(gold), read(answer), timeout_seconds=None, numeric_precision=50)

    sympy_raises_on_nonsense = (
        ValueError,
        ArithmeticError,
        AttributeError,
        TypeError,
        RecursionError,
        MemoryError,
    )
    print('"ready"', flush=True)
    for line in sys.stdin:
        signal.alarm(int(TIME_LIMIT) + 2)  # the default action ends the process
        answer, gold = map(normalise, json.loads(line))
        try:
            verdict = "right" if same_answer(answer, gold, decide) else "wrong"
        except sympy_raises_on_nonsense:
            verdict = "no_answer"
        signal.alarm(0)
        print(json.dumps(verdict), flush=True)


# ---- Countdown -----------------------------------------------------------------------------------


def judge_countdown(response, gold):
    """The verdict on an expression. gold: JSON {"numbers": [...], "target": n}.

    The last <answer> block counts, else the whole response. Integers, + - * / and parentheses,
    exact division, no unary minus; `= target` may follow."""
    gold = json.loads(gold)
    text = response
    if "<answer>" in text:
        text, closed, _ = text.rpartition("<answer>")[2].partition("</answer>")
        if not closed:
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


if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    worker_main()
