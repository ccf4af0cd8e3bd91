"""How the verifier judges the gold answers of real problems, in other words and changed; and how
math-verify by itself judges the same answers.

    python -m experiments.verifier DAPO-Math-17k.parquet math500.parquet ...     files or hub names

First every gold answer is spelled as a model would spell it; at least 99.5 % of these should be
accepted. Second it is changed to mean something else; at most 0.1 % of these should be. Third,
where the answer is no number, every formula of the question is boxed: what is accepted costs the
policy no thought. Fourth, a sample of these and all of experiments/answers.py are judged by
verify.py and by plain math-verify. Writes results/verifier.md.
"""

import argparse
import multiprocessing
import random
import re
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from experiments.answers import OTHERS, PAIRS, WRONG_ANSWERS, hedges_of, pairs_of
from experiments.runs import table
from train import load_sets
from verify import (
    judge_math,
    normalise,
    number,
    split_outside_brackets,
    value_and_unit,
    without_spaces,
)

RESULT = Path("experiments/results/verifier.md")
SUMMARY = (
    "set",
    "problems",
    "spellings",
    "accepted",
    "perturbed",
    "accepted",
    "formulas",
    "accepted",
    "ms per answer",
)
COMPARED = (
    "suite",
    "answers",
    "verify.py: right refused",
    "wrong accepted",
    "math-verify: right refused",
    "wrong accepted",
    "no verdict in time",
)
SAMPLE = 500  # per set of data, of its spellings and of its perturbed answers; math-verify is slow
SEED = 0
PLAIN_LIMIT = 20.0  # seconds; math-verify ends most answers itself after 5
DETAILS = ("what", "set", "kind", "gold", "answer", "verdict", "count")


def value(gold):
    """A Fraction, or None if the answer is no number."""
    without_unit, _ = value_and_unit(normalise(gold), bare=False)
    return number(without_spaces(without_unit))


# ---- the same answer in other words --------------------------------------------------------------


def spellings(problem):
    """Yields (kind, response): the ways in which a model writes the answer."""
    gold = problem.answer
    yield "boxed", f"Therefore the answer is $\\boxed{{{gold}}}$."
    yield "boxed, spaces", f"\\[ \\boxed{{ {gold} }} \\]\nI hope it is correct."
    yield "boxed formula", f"\\boxed{{${gold}$}}"
    yield "after Answer:", f"so it follows.\n\nAnswer: {gold}"
    yield "after Answer:, formula", f"Reasoning.\nAnswer: ${gold}$"
    yield "after Answer:, bold", f"Reasoning.\n**Answer: {gold}**"
    yield "after ####", f"Reasoning.\n#### {gold}"
    for kind, answer in in_other_words(gold).items():
        if answer != gold:
            yield kind, rf"\boxed{{{answer}}}"


def in_other_words(gold):
    """{kind: answer} of the same meaning."""
    return (
        general_spellings(gold)
        | spellings_of_fractions(gold)
        | spellings_of_integers(gold)
        | spellings_with_units(gold)
        | spellings_of_decimals(gold)
        | spellings_of_words(gold)
        | spellings_of_lists(gold)
    )


def general_spellings(gold):
    with_left = re.sub(r"(?<!\\left)\(", r"\\left(", gold)
    same = {
        "a full stop": f"{gold}.",
        "displaystyle": rf"\displaystyle {gold}",
        r"\left( \right)": re.sub(r"(?<!\\right)\)", r"\\right)", with_left),
        "union reversed": r" \cup ".join(split_outside_brackets(gold, r"\cup")[::-1]),
        "bmatrix": gold.replace("pmatrix", "bmatrix"),
    }
    if not re.fullmatch(r"[\d,.e+-]+", gold):
        spaced = re.sub(r"(?<=[^\s^_{(\\])([+=]|(?<![e^{(,])-)", r" \1 ", gold)
        same["spaces"] = spaced.replace(",", ", ")
    if r"\pm" in gold and "," not in gold:
        same["both signs"] = gold.replace(r"\pm", "+") + ", " + gold.replace(r"\pm", "-")
    return same


def spellings_of_fractions(gold):
    same = {}
    for command in ("frac", "dfrac", "tfrac"):
        same[command] = re.sub(r"\\[dt]?frac", rf"\\{command}", gold)
    match = re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", gold)
    if match:
        sign, above, below = match.groups()
        same["a/b"] = f"{sign}{above}/{below}"
        same["10a/10b"] = rf"{sign}\frac{{{above}0}}{{{below}0}}"
    return same


def spellings_of_integers(gold):
    if not re.fullmatch(r"-?\d{1,3}(,\d{3})*|-?\d+", gold):
        return {}
    n = int(gold.replace(",", ""))
    same = {
        "digits": f"{n}",
        "decimals": f"{n}.00",
        "x =": f"x = {n}",
        "a = b = n": rf"N = {2 * n}/2 = {n}",
    }
    for comma in (",", "{,}", r",\!", r"\,"):
        same[f"thousands {comma}"] = f"{n:,}".replace(",", comma)
    return same


UNITS = (
    r"\text{ cm}^2",
    r"\,\mathrm{m/s^{2}}",
    r"~\mathrm{units}",
    r"\text{ square feet}",
    r"^\circ",
    r"^{\circ}",
)
UNITS_OF_PI = UNITS[:4]  # an angle in radians has no degrees
UNITS_IN_WORDS = (
    " dollars",
    " apples",
    " miles per hour",
    " square units",
    " cm",
    " percent",
    r"\%",
)


def spellings_with_units(gold):
    """A number with a unit; per cent and degrees without their sign, or in words."""
    same = {}
    if value(gold) is not None or re.fullmatch(r"\d*(\\sqrt\{\d+\}|\\pi)", gold):
        is_decimal = re.fullmatch(r"[\d,.]+", gold)
        units = UNITS_OF_PI if "pi" in gold else UNITS
        if is_decimal:
            units += UNITS_IN_WORDS
        if not re.search(r"%|circ", gold):
            for unit in units:
                same[f"unit {unit}"] = gold + unit
        same["$"] = rf"\${gold}"
    for sign, word in ((r" ?\\?%", "percent"), (r"\^\{?\\circ\}?", "degrees")):
        match = re.fullmatch(rf"(-?[\d.]+){sign}", gold)
        if match:
            same[f"{word} dropped"] = match[1]
            same[f"{word} in words"] = f"{match[1]} {word}"
    return same


def spellings_of_decimals(gold):
    same = {}
    if re.fullmatch(r"-?\d*\.\d+", gold):
        same["trailing 0"] = f"{gold}0"
        same["leading 0"] = re.sub(r"(?<!\d)\.", "0.", gold)
    match = re.fullmatch(r"(-?[\d.]+)e(-?\d+)", gold)
    if match:
        same["times"] = rf"{match[1]} \times 10^{{{match[2]}}}"
        same["cdot"] = rf"{match[1]}\cdot 10^{{{match[2]}}}"
    return same


def spellings_of_words(gold):
    if not re.fullmatch(r"[A-Za-z]{2,}|\([A-E]\)", gold):
        return {}
    return {
        "text": rf"\text{{{gold}}}",
        "spaced text": rf"\text{{ {gold} }}",
        "bold text": rf"\textbf{{{gold}}}",
    }


def spellings_of_lists(gold):
    """Lists and sets in any order; intervals."""
    same = {}
    braces = re.fullmatch(r"\\\{(.*)\\\}", gold)
    inside = braces[1] if braces else gold
    parts = split_outside_brackets(normalise(inside), ",")
    if len(parts) > 1:
        same["list"] = ", ".join(parts)
        same["reversed"] = ", ".join(parts[::-1])
        same["set"] = rf"\{{{', '.join(parts)}\}}"
        same["list with and"] = rf"{', '.join(parts[:-1])} \text{{ and }} {parts[-1]}"
    if re.fullmatch(r"[\[(][^()\[\]]*,[^()\[\]]*[\])]", gold):
        same["element"] = rf"x \in {gold}"
    return same


# ---- another answer ------------------------------------------------------------------------------


def perturbations(problem):
    """Yields (kind, answer) that means something else: not -0 for 0."""
    gold = problem.answer
    yield from changed_numbers(gold)
    yield from flipped_signs(gold)
    yield from changed_lists(gold)
    for match in re.finditer(r"(\\\{|[\[(])((?:[^()\[\]{}]|\{[^{}]*\})*)(\\\}|[\])])", gold):
        yield from changed_brackets(gold, match)
    yield "element dropped", split_outside_brackets(gold, r"\cup")[0]
    yield "several", f"{gold}, 1, 2, 3"
    yield "several", rf"1 \text{{ or }} {gold}"


def changed_numbers(gold):
    for match in re.finditer(r"\d+", gold):
        digits = match[0]
        one_more = str(int(digits) + 1)
        first_digit_more = str(int(digits) + 10 ** (len(digits) - 1))
        for new in sorted({one_more, first_digit_more, "7" + digits}):
            yield "number changed", gold[: match.start()] + new + gold[match.end() :]


def flipped_signs(gold):
    for match in re.finditer(r"(?<![e^{\d])-|(?<=[\d}nkxab])[+-]", gold):
        other = "-" if match[0] == "+" else "+"
        yield "sign flipped", gold[: match.start()] + other + gold[match.end() :]
    has_one_sign = re.match(r"-[^-]*$|[\d.\\](?!in|text|pm|quad|\{)", gold)
    if has_one_sign and "," not in gold and value(gold) != 0:
        yield "sign flipped", gold[1:] if gold[0] == "-" else f"-{gold}"


def changed_lists(gold):
    parts = split_outside_brackets(gold, ",")
    has_thousands = re.fullmatch(r"\d{1,3}(,\d{3})+", gold)
    if len(parts) > 1 and not has_thousands:
        yield "element dropped", ",".join(parts[:-1])
        yield "element added", f"{gold},123"
        yield "element changed", ",".join([f"{parts[0]}+1", *parts[1:]])


OTHER_BRACKET = {"(": "[", "[": "(", ")": "]", "]": ")"}


def changed_brackets(gold, match):
    """Of a set, tuple or interval: match has the bracket, what is inside, and the other bracket."""
    opening, content, closing = match.groups()
    before = gold[: match.start()]
    after = gold[match.end() :]
    elements = split_outside_brackets(content, ",")
    if len(elements) < 2:
        return
    left = before + opening
    right = closing + after
    changed = ",".join([*elements[:-1], elements[-1] + "+1"])
    yield "element changed", f"{left}{changed}{right}"
    yield "element dropped", f"{left}{','.join(elements[:-1])}{right}"
    yield "element added", f"{left}{content},123{right}"
    if opening in "([":
        yield "bracket changed", before + OTHER_BRACKET[opening] + content + right
        yield "bracket changed", left + content + OTHER_BRACKET[closing] + after
        yield "another order", f"{left}{','.join(elements[::-1])}{right}"


# ---- formulas of the question --------------------------------------------------------------------


def formulas(problem):
    """Yields (kind, answer): formulas not spelled as the gold answer, where that is no number."""
    gold = problem.answer
    if value(gold) is not None:
        return
    text = problem.prompt
    if not isinstance(text, str):
        text = text[-1]["content"]
    for groups in re.findall(r"\$+([^$]+)\$+|\\\[(.+?)\\\]|\\\((.+?)\\\)", text, re.S):
        found = "".join(groups)
        sides = {side.strip(" .,\n") for side in (found, *found.split("="))}
        for formula in sorted(sides - {""}):
            is_whole = formula.count("{") == formula.count("}")
            if is_whole and plain(formula) != plain(gold):
                yield "formula", formula


def plain(answer):
    return without_spaces(normalise(answer))


# ---- plain math-verify ---------------------------------------------------------------------------


def plain_worker(connection):
    """Judges (response, gold) as the README of math-verify shows, for ever."""
    from math_verify import parse, verify

    while True:
        response, gold = connection.recv()
        try:
            is_right = verify(parse(f"${gold}$"), parse(response))
        except Exception:  # it raises what sympy raises, and whoever uses it gives no reward then
            is_right = False
        connection.send(bool(is_right))


class PlainMathVerify:
    """math-verify alone, in a process that is ended when it exceeds PLAIN_LIMIT."""

    def __init__(self):
        self.process = None

    def start(self):
        self.connection, other = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=plain_worker, args=(other,), daemon=True)
        self.process.start()

    def close(self):
        self.process.kill()
        self.process.join()
        self.process = None

    def judge(self, response, gold):
        """Whether it is right; None if there was no verdict in time."""
        if self.process is None:
            self.start()
        self.connection.send((response, gold))
        if self.connection.poll(PLAIN_LIMIT):
            return self.connection.recv()
        self.close()
        return None


def suites(sets):
    """{name: [(response, gold, right)]} for both verifiers; of the data's answers a sample."""
    draw = random.Random(SEED)
    spelled = []
    perturbed = []
    for problems in sets.values():
        for cases, variants in ((spelled, spellings), (perturbed, perturbations)):
            found = []
            for problem in problems:
                for _, text in variants(problem):
                    if text != problem.answer:
                        found.append((text, problem.answer))
            cases += draw.sample(found, min(SAMPLE, len(found)))
    hedges = [(text, gold) for gold, other in OTHERS.items() for text in hedges_of(gold, other)]
    return {
        "gold answers in other words": [(text, gold, True) for text, gold in spelled],
        "gold answers changed": [(rf"\boxed{{{text}}}", gold, False) for text, gold in perturbed],
        "hedges": [(text, gold, False) for text, gold in hedges],
        "wrong answers": [
            (rf"so \boxed{{{text}}}.", gold, False) for text, gold in pairs_of(WRONG_ANSWERS)
        ],
        "pairs": [(pair["response"], pair["gold"], pair["right"]) for pair in PAIRS],
    }


def compared(sets):
    """Rows of COMPARED."""
    plain = PlainMathVerify()
    rows = []
    for name, cases in suites(sets).items():
        count = Counter()
        for response, gold, is_right in tqdm(cases, name):
            ours = judge_math(response, gold) == "right"
            theirs = plain.judge(response, gold)
            count["ours", is_right, ours] += 1
            count["theirs", is_right, bool(theirs)] += 1
            count["late"] += theirs is None
        row = [name, f"{len(cases):,}"]
        for who in ("ours", "theirs"):
            row.append(out_of(count, who, True, False))
            row.append(out_of(count, who, False, True))
        rows.append([*row, count["late"]])
    plain.close()
    return rows


def out_of(count, who, is_right, accepted):
    total = count[who, is_right, True] + count[who, is_right, False]
    return f"{count[who, is_right, accepted]} of {total:,}" if total else ""


# ---- the page ------------------------------------------------------------------------------------


def judge(name, problems):
    """(row of SUMMARY, counts {row of DETAILS without its count: count}) of a set."""
    row = [name, f"{len(problems):,}"]
    unexpected = Counter()
    judged = 0
    start = time.perf_counter()
    trials = {"spelling": spellings, "perturbed": perturbations, "formula": formulas}
    for what, variants in trials.items():
        cases = []
        for problem in problems:
            for kind, text in variants(problem):
                if text != problem.answer:
                    cases.append((problem.answer, kind, text))
        right = 0
        for gold, kind, text in tqdm(cases, f"{name}, {what}"):
            response = text if what == "spelling" else rf"\boxed{{{text}}}"
            verdict = judge_math(response, gold)
            is_right = verdict == "right"
            right += is_right
            if is_right != (what == "spelling"):
                unexpected[what, name, kind, gold, text, verdict] += 1
        judged += len(cases)
        row.append(f"{len(cases):,}")
        row.append(right if what == "formula" else f"{right / len(cases):.3%}")
    milliseconds = 1000 * (time.perf_counter() - start) / judged
    row.append(f"{milliseconds:.2f}")
    return row, unexpected


def escaped(cell):
    """For a cell of a Markdown table."""
    return str(cell).replace("|", r"\|").replace("\n", " ")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="+", help="files or hub names, as for --data")
    names = parser.parse_args().data
    summary = []
    details = []
    sets = load_sets(names, "test")
    for name, problems in sets.items():
        row, unexpected = judge(name, problems)
        summary.append([escaped(cell) for cell in row])
        for case, count in unexpected.items():
            details.append([escaped(f"`{cell}`") for cell in case] + [count])
    files = " ".join(Path(name).name for name in names)
    text = (
        f"`python -m experiments.verifier {files}`\n\n{table(SUMMARY, summary)}\n\n"
        f"Spellings not accepted, and what else was:\n\n{table(DETAILS, details)}\n\n"
        "The same answers judged by verify.py and by plain math-verify, "
        "`verify(parse(gold), parse(response))`. Of each set of data up to "
        f"{SAMPLE} spellings and {SAMPLE} changed answers were drawn (seed {SEED}); hedges, wrong "
        "answers and pairs, all of them, are in experiments/answers.py and answers.jsonl.\n\n"
        f"{table(COMPARED, compared(sets))}\n"
    )
    RESULT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
