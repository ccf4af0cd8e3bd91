r"""Problems: read from files and from the hub, and rendered as the model's prompts.

What --data and --eval_data take: a .jsonl or .parquet file, or the name of a data set on the hub,
with configuration and split if it needs them (`openai/gsm8k:main:test`; the default split is train,
else test, else the only one). These columns are understood, in capitals or not:

    prompt + reward_model.ground_truth              verl's schema
    nums + target                                   Countdown
    problem | question, with answer | final_answer  GSM8K's answer follows the last ####
    problem | question, with a solution             its last \boxed{} is the answer

Hub names of the usual sets:

    DAPO-Math-17k    BytedTsinghua-SIA/DAPO-Math-17k
    GSM8K            openai/gsm8k:main:test
    MATH500          HuggingFaceH4/MATH-500
    AIME 2024, 2025  math-ai/aime24, math-ai/aime25
    AMC23            math-ai/amc23
    Minerva          math-ai/minervamath
    OlympiadBench    math-ai/olympiadbench or Hothan/OlympiadBench:OE_TO_maths_en_COMP:train
    Countdown        Jiayi-Pan/Countdown-Tasks-3to4

The hub was not reachable when this was written. The problems of the first eight sets were read from
Parquet files in verl's schema, and the columns of each hub set from rows made by hand.
"""

import json
import random
from dataclasses import dataclass
from fractions import Fraction
from itertools import permutations
from pathlib import Path

from verify import MAX_ANSWER, RULES, extract, score_one

BOXED = "\n\nReason step by step, and put your final answer within \\boxed{}."
COUNTDOWN = (
    "Using the numbers {numbers}, write an arithmetic expression that equals {target}. Use each "
    "number exactly once, the operations + - * / and parentheses. Think first, then give the "
    "expression alone in <answer> </answer> tags."
)


@dataclass(frozen=True)
class Problem:
    prompt: str | list  # plain text, or chat messages [{"role": ..., "content": ...}, ...]
    answer: str
    rule: str  # a key of verify.RULES


# ---- problems from rows --------------------------------------------------------------------------


def load_problems(path_or_hub_name, rule=None, limit=None):
    """The distinct problems of a file or of a hub data set, in order of first appearance.

    rule: a key of verify.RULES; if None, it is inferred from the columns. limit: stop after so many
    problems. Any fault is a ValueError of one line that names the row."""
    if rule is not None and rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; known: {', '.join(RULES)}")
    name = str(path_or_hub_name)
    problems = {}
    for number, row in enumerate(read_rows(name), 1):
        if limit is not None and len(problems) >= limit:
            break
        try:
            problem = problem_of(row, rule)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = error if type(error) is ValueError else repr(error)
            raise ValueError(f"{name}, row {number}: {why}") from None
        identity = json.dumps([problem.prompt, problem.answer])
        problems.setdefault(identity, problem)  # AIME files repeat each problem 32 times
    if not problems:
        raise ValueError(f"{name} has no problems; give a file or a split with at least one row")
    return list(problems.values())


def problem_of(row, rule):
    """The Problem in a row, by the first schema that knows its columns."""
    columns = {key.lower(): value for key, value in row.items() if value is not None}
    for schema in (verl_schema, countdown_schema, question_schema):
        found = schema(columns, rule)
        if found is not None:
            break
    else:
        raise ValueError(
            f"has the columns {', '.join(row)}; understood are prompt + reward_model.ground_truth, "
            "nums + target, problem | question + answer | final_answer | solution with a box"
        )
    prompt, answer = found
    if isinstance(prompt, list):
        prompt = [{"role": message["role"], "content": message["content"]} for message in prompt]
    if rule is None:
        rule = "countdown" if isinstance(answer, dict) else "math"
    answer = answer_text(answer)
    check_answer(answer, rule)
    return Problem(prompt, answer, rule)


# A schema takes the columns that hold something, and returns prompt and answer as they stand there,
# or None if it does not know these columns.


def verl_schema(columns, rule):
    if "prompt" not in columns or "reward_model" not in columns:
        return None
    return columns["prompt"], columns["reward_model"]["ground_truth"]


def countdown_schema(columns, rule):
    if "nums" not in columns or "target" not in columns:
        return None
    numbers = columns["nums"]
    target = columns["target"]
    prompt = COUNTDOWN.format(numbers=numbers, target=target)
    return prompt, {"numbers": numbers, "target": target}


def question_schema(columns, rule):
    question = columns.get("problem", columns.get("question"))
    answer = columns.get("answer", columns.get("final_answer"))
    if answer is None and isinstance(columns.get("solution"), str):
        answer = extract(columns["solution"])
    if question is None or answer is None:
        return None
    prompt = question + ("" if rule == "countdown" else BOXED)
    if "####" in str(answer):  # GSM8K: reasoning, then `#### 18`
        answer = answer.rpartition("####")[2]
    return prompt, answer


def answer_text(answer):
    """A gold answer as the text that rules take."""
    if isinstance(answer, dict):
        return json.dumps(answer)
    if isinstance(answer, list):
        return ", ".join(map(str, answer))
    return str(answer).strip()


def check_answer(answer, rule):
    """Raises where the rule would, at the first response. Of a rule that is not ours it knows
    nothing."""
    is_countdown = answer.startswith('{"')
    unfit = {"countdown": not is_countdown, "math": is_countdown}.get(rule, False)
    if unfit or not 0 < len(answer) <= MAX_ANSWER:
        raise ValueError(f"the rule {rule} cannot judge the answer {answer[:80]!r}")
    if rule == "countdown":
        gold = json.loads(answer)
        sorted(gold["numbers"]).append(gold["target"])  # no numbers, no target


# ---- rows from files and from the hub ------------------------------------------------------------


def read_rows(name):
    """Yields the rows as dictionaries, with no more than a batch of them in memory."""
    path = Path(name).expanduser()
    if path.suffix == ".jsonl" and path.is_file():
        return read_jsonl(name, path)
    if path.suffix == ".parquet" and path.is_file():
        return read_parquet(name, path)
    if path.exists():
        raise ValueError(f"{name or 'the data'}: not a .jsonl or .parquet file")
    is_file_name = path.suffix in (".json", ".jsonl", ".parquet", ".csv")
    if is_file_name or name[:1] in ("", ".", "/", "~"):
        raise ValueError(f"{name or 'the data'}: no such file")
    return read_hub(name)


def read_jsonl(name, path):
    for number, line in enumerate(path.open("rb"), 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"{name}, line {number} is not JSON: {error}") from None


def read_parquet(name, path):
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000):
            yield from batch.to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(f"{name} is not a whole Parquet file: {first_line}") from None


def read_hub(name):
    from datasets import load_dataset

    repo, config, split = (name.split(":") + ["", ""])[:3]
    try:
        data = load_dataset(repo, config or None, split=split or None)
    except Exception as error:  # the hub fails in many ways, and all mean the same to the user
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"cannot load {name} ({why}); give a data file or name:config:split"
        ) from None
    if not split:
        split = next(s for s in ("train", "test", *data) if s in data)
        if split not in ("train", "test") and len(data) > 1:
            raise ValueError(
                f"{name} has the splits {', '.join(data)}; choose one: {repo}:{config}:{split}"
            )
        data = data[split]
    for batch in data.with_format("arrow").iter(1000):
        yield from batch.to_pylist()


# ---- prompts -------------------------------------------------------------------------------------


def render(problem, tokenizer):
    """Token ids of the prompt: by the chat template when the tokenizer has one, else of the plain
    text."""
    messages = problem.prompt
    if not isinstance(messages, list):
        messages = [{"role": "user", "content": messages}]
    if tokenizer.chat_template:  # it writes its own special tokens, so none are added
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
    text = "\n\n".join(message["content"] for message in messages)
    has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids = tokenizer(text, add_special_tokens=not has_bos)["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id:  # some add EOS: the answer would be over
        return ids[:-1]
    return ids


def turn_ends(tokenizer):
    """The id of the special or added token with which the chat template ends an assistant's turn,
    as a set; empty without a template, or if plain text ends it.

    A base model's end of text may be another token (Qwen2.5: <|endoftext|>) than the one that its
    template writes there (<|im_end|>), and an answer that ends as the template does is over."""
    if not tokenizer.chat_template:
        return set()
    content = "0123456789"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    _, found, after = text.rpartition(content)
    ids = tokenizer(after.strip(), add_special_tokens=False)["input_ids"] if found else []
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    return set(ids[:1]) & special - {tokenizer.unk_token_id}


def render_all(sets, tokenizer, max_prompt_len, count=0, seed=0):
    """The problems of several sets {name: problems}, and their prompts' token ids: two lists.

    count: that many of them only, the first of one list shuffled by the seed, so that smaller
    subsets lie in larger ones; 0: all, in order. ValueError if a prompt is longer than
    max_prompt_len tokens."""
    problems = [problem for one_set in sets.values() for problem in one_set]
    if count:
        random.Random(seed).shuffle(problems)
        problems = problems[:count]
    prompts = [render(problem, tokenizer) for problem in problems]
    longest = max(map(len, prompts), default=0)
    too_long = sum(len(prompt) > max_prompt_len for prompt in prompts)
    if too_long:
        raise ValueError(
            f"{too_long} of {len(prompts)} prompts are longer than --max_prompt_len "
            f"{max_prompt_len}: raise it to {longest}, or take these problems out"
        )
    return problems, prompts


def first_prompt(tokenizer, prompts, eval_sets):
    """What the model reads first, as text: the first of the training prompts (token ids), or
    without any the first of the sets {name: (problems, prompts)}; "" if there is none. A long one
    lacks its middle."""
    everything = [prompts]
    everything += [prompts_of_set for _, prompts_of_set in eval_sets.values()]
    ids = next((some[0] for some in everything if some), [])
    text = tokenizer.decode(ids)
    if len(text) <= 600:
        return text
    return f"{text[:400]} [... {len(text) - 600} characters ...] {text[-200:]}"


# ---- a look at the first problems (--dry_run) ----------------------------------------------------


def preview(tokenizer, problems, prompts, count=3):
    """Prints the first prompts as the model will see them, each with the verdict on its gold
    answer."""
    for problem, prompt in list(zip(problems, prompts))[:count]:
        response = gold_response(problem)
        verdict = score_one(problem.rule, response, problem.answer).verdict
        told = "right" if verdict == "right" else "refused: see verify.py"
        print(f"---- prompt of {len(prompt)} tokens\n{tokenizer.decode(prompt)}")
        print(f"---- gold answer {response}: {told}")


def gold_response(problem):
    """A response that ought to be right."""
    if problem.rule != "countdown":
        return f"\\boxed{{{problem.answer}}}"
    gold = json.loads(problem.answer)
    parts = [(Fraction(n), str(n)) for n in gold["numbers"]]
    found = solution(parts, gold["target"]) if len(parts) <= 5 else None
    return found or "(no solution looked for or found)"


def solution(parts, target):
    """An expression that joins all parts, [(value, text)], to the target, or None; tries all of
    them."""
    if len(parts) == 1:
        value, text = parts[0]
        return text if value == target else None
    for (a, x), (b, y) in permutations(parts, 2):
        rest = parts.copy()
        rest.remove((a, x))
        rest.remove((b, y))
        joined = [(a + b, f"({x}+{y})"), (a - b, f"({x}-{y})"), (a * b, f"({x}*{y})")]
        if b:
            joined.append((a / b, f"({x}/{y})"))
        for new in joined:
            found = solution([*rest, new], target)
            if found:
                return found
    return None
