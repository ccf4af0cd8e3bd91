"""How the verifier judges the gold answers of real problems, in other words and changed.

    python -m experiments.verifier DAPO-Math-17k.parquet math500.parquet ...     files or hub names

First every gold answer is spelled as a model would spell it; at least 99.5 % of these should be
accepted. Second it is changed to mean something else; at most 0.1 % of these should be. Third,
where the answer is no number, every formula of the question is boxed: what is accepted costs the
policy no thought. Writes results/verifier.md.
"""

import argparse
import re
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from experiments.runs import table
from train import load_sets
from verify import judge_math, normalise, number, split_outside_brackets, without_spaces

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
DETAILS = ("what", "set", "kind", "gold", "answer", "verdict", "count")


def value(gold):
    """A Fraction, or None if the answer is no number."""
    return number(without_spaces(normalise(gold)))


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
        units = UNITS + UNITS_IN_WORDS if is_decimal else UNITS
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
    for name, problems in load_sets(names, "test").items():
        row, unexpected = judge(name, problems)
        summary.append([escaped(cell) for cell in row])
        for case, count in unexpected.items():
            details.append([escaped(f"`{cell}`") for cell in case] + [count])
    files = " ".join(Path(name).name for name in names)
    text = (
        f"`python -m experiments.verifier {files}`\n\n{table(SUMMARY, summary)}\n\n"
        f"Spellings not accepted, and what else was:\n\n{table(DETAILS, details)}\n"
    )
    RESULT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
