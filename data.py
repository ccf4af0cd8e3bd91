r"""Problems: read from files and from the hub, and rendered as the model's prompts.

What --data and --eval_data take: a .jsonl, .json or .parquet file, or the name of a data set on the
hub, with configuration and split if it needs them (`openai/gsm8k:main:test`; the default split is
train, else test, else the only one). These columns are understood, in capitals or not:

    prompt + reward_model.ground_truth              verl's schema
    nums + target                                   Countdown
    problem | question, with answer | final_answer  GSM8K's answer follows the last ####
    problem | question, with a solution             its last \boxed{} is the answer

An answer may be a text, a number or a list of them, with a box around it or without. A row without
an answer, or with one that no response could equal, is refused: silence would make it a reward of 0
for ever.

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
import os.path
import random
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import permutations
from pathlib import Path

from verify import MAX_ANSWER, RULES, extract, normalise, score_one

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
    for number, row in read_rows(name):
        if limit is not None and len(problems) >= limit:
            break
        try:
            problem = problem_of(row, rule)
            # encode() refuses half of a surrogate pair, as tokenizers do.
            identity = json.dumps([problem.prompt, problem.answer], ensure_ascii=False).encode()
        except ValueError as error:
            raise ValueError(f"{name}, row {number}: {error}") from None
        problems.setdefault(identity, problem)  # AIME files repeat each problem 32 times
    if not problems:
        raise ValueError(f"{name} has no problems; give a file or a split with at least one row")
    found = list(problems.values())
    check_solvable(name, found[:3])
    return found


# The columns that a schema reads.
COLUMNS = {
    "prompt",
    "reward_model",
    "nums",
    "target",
    "problem",
    "question",
    "answer",
    "final_answer",
    "solution",
}


def problem_of(row, rule):
    """The Problem in a row, by the first schema that knows its columns."""
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object {{...}} is expected, not {shortened(row)}")
    columns = {}
    for key, value in row.items():
        name = key.lower()
        if is_missing(value):
            continue
        if name in columns and name in COLUMNS:
            raise ValueError(f"has the column {name} twice, in capitals and not; leave one out")
        columns[name] = value
    for schema in (verl_schema, countdown_schema, question_schema):
        found = schema(columns, rule)
        if found is not None:
            break
    else:
        empty = [key for key in row if key.lower() not in columns]
        nothing_in = f" (nothing in {', '.join(empty)})" if empty else ""
        raise ValueError(
            f"has the columns {', '.join(row)}{nothing_in}; understood are "
            "prompt + reward_model.ground_truth, nums + target, "
            "problem | question + answer | final_answer | solution with a box"
        )
    prompt, answer = found
    if rule is None:
        rule = "countdown" if isinstance(answer, dict) else "math"
    return Problem(checked_prompt(prompt), gold_answer(answer, rule), rule)


def is_missing(value):
    """None, or the NaN that pandas writes for it."""
    return value is None or value != value


# A schema takes the columns that hold something, and returns prompt and answer as they stand there,
# or None if it does not know these columns.


def verl_schema(columns, rule):
    if "prompt" not in columns or "reward_model" not in columns:
        return None
    reward_model = columns["reward_model"]
    if isinstance(reward_model, str):
        reward_model = json_of(reward_model, "the reward_model")
    if not isinstance(reward_model, dict) or is_missing(reward_model.get("ground_truth")):
        raise ValueError("no answer found: reward_model has nothing in ground_truth")
    return columns["prompt"], without_list(reward_model["ground_truth"])


def without_list(answer):
    """The one answer of a list of texts in JSON, as Skywork-OR1 writes it: '["5"]' is 5."""
    if not isinstance(answer, str) or not TEXT_OF_LIST.match(answer):
        return answer
    answers = json_of(answer, "the answer")
    if len(answers) != 1:
        raise ValueError(
            f"the answer is a list of {len(answers)}: {shortened(answer)}; give the one that "
            "counts, or take the row out"
        )
    return answers[0]


def countdown_schema(columns, rule):
    if "nums" not in columns or "target" not in columns:
        return None
    answer = countdown_gold({"numbers": columns["nums"], "target": columns["target"]})
    return COUNTDOWN.format(**answer), answer


def question_schema(columns, rule):
    question = columns.get("problem", columns.get("question"))
    answer = columns.get("answer", columns.get("final_answer"))
    if question is None:
        return None
    if answer is None and "solution" in columns:
        answer = answer_in_solution(columns["solution"])
    if answer is None:
        return None
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"the question is no text: {shortened(question)}")
    prompt = question + ("" if rule == "countdown" else BOXED)
    if isinstance(answer, str) and "####" in answer:  # GSM8K: reasoning, then `#### 18`
        answer = answer.rpartition("####")[2]
    return prompt, answer


def answer_in_solution(solution):
    if isinstance(solution, list):
        solution = "\n".join(map(str, solution))
    answer = extract(str(solution))
    if answer is None:
        raise ValueError(
            f"no answer found in the solution, which ends in {str(solution)[-60:]!r}; give it a "
            "\\boxed{...}, or take the row out"
        )
    return answer


def json_of(text, what):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{what} looks like JSON and is none: {shortened(text)}") from None


def shortened(value):
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---- the prompt and the gold answer of a row -----------------------------------------------------

TEXT_OF_LIST = re.compile(r"\s*\[\s*\"")

# Messages that were stored as one text, by json.dumps or by str.
TEXT_OF_MESSAGES = re.compile(r"\s*\[\s*\{\s*[\"'](role|content)[\"']")


def checked_prompt(prompt):
    """The prompt as a text, or as messages that hold a role and a text each."""
    if isinstance(prompt, str) and TEXT_OF_MESSAGES.match(prompt):
        prompt = json_of(prompt, "the prompt")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        return prompt
    if not isinstance(prompt, list):
        raise ValueError(f"the prompt is neither a text nor messages: {shortened(prompt)}")
    messages = [checked_message(message) for message in prompt]
    asked = [message["content"] for message in messages if message["role"] == "user"]
    if not "".join(asked).strip():
        raise ValueError("the prompt is empty: it has no message of the role user with a text")
    if messages[-1]["role"] == "assistant":
        raise ValueError("the prompt ends in an answer: its last message is the assistant's")
    return messages


def checked_message(message):
    """A chat message without further keys; the texts of a list of parts are joined."""
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise ValueError(f"a message needs a role and a content, not {shortened(message)}")
    content = message["content"]
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        content = None
        if all(isinstance(part.get("text"), str) for part in parts):
            content = "".join(part["text"] for part in parts)
    if not isinstance(content, str) or not isinstance(message["role"], str):
        raise ValueError(f"a message's role and content must be texts, not {shortened(message)}")
    return {"role": message["role"], "content": content}


def gold_answer(answer, rule):
    """The gold answer as the text that the rule takes; ValueError if no response could equal it. Of
    a rule that is not ours it knows only that it needs a text that is not too long."""
    if rule == "countdown":
        if isinstance(answer, str) and answer.lstrip().startswith("{"):
            answer = json_of(answer, "the answer")
        gold = json.dumps(countdown_gold(answer))
    elif isinstance(answer, dict):
        gold = json.dumps(answer)
    elif isinstance(answer, list):
        gold = ", ".join(answer_text(part, rule) for part in answer)
    else:
        gold = answer_text(answer, rule)
    fits = 0 < len(gold) <= MAX_ANSWER and not (rule == "math" and gold.startswith('{"'))
    if fits and rule == "math":
        fits = equals_itself(gold)
    if not fits:
        raise ValueError(f"the rule {rule} cannot judge the answer {shortened(gold)}")
    return gold


@lru_cache(1 << 16)  # many problems have the same answer
def equals_itself(gold):
    """Whether the rule math takes the gold answer's own spelling: not if nothing is left of it, as
    of $$, nor if its braces do not close."""
    verdict = score_one("math", f"\\boxed{{{gold}}}", gold).verdict
    return verdict == "right" and normalise(gold) != ""


# As str() and pandas write what is not there, and NuminaMath-1.5; its proofs have no answer.
MISSING = ("None", "null", "nan", "NaN", "<NA>", "notfound", "proof")


def answer_text(answer, rule):
    """One answer as a text; for the rule math without the box around it."""
    if is_missing(answer) or isinstance(answer, (list, dict, bytes)):
        raise ValueError(f"an answer is a text or a number, not {shortened(answer)}")
    text = str(answer).strip()
    is_infinite = isinstance(answer, float) and "inf" in text
    if text in MISSING or is_infinite:
        raise ValueError(f"no answer found: it is {shortened(answer)}")
    if rule != "math" or "\\boxed" not in text:
        return text
    boxed = extract(text)
    if boxed is None or text.count("\\boxed") > 1:
        raise ValueError(f"the answer should hold one whole \\boxed{{...}}: {shortened(answer)}")
    return boxed


def countdown_gold(answer):
    """{"numbers": integers, "target": integer} of the same whose numbers may be texts or floats."""
    if not isinstance(answer, dict) or not {"numbers", "target"} <= answer.keys():
        raise ValueError(
            "the rule countdown cannot judge the answer: numbers and a target are expected, not "
            f"{shortened(answer)}"
        )
    numbers = answer["numbers"]
    if not isinstance(numbers, list) or not numbers:
        raise ValueError(f"the numbers of Countdown are a list, not {shortened(numbers)}")
    numbers = [integer(number) for number in numbers]
    longest = len("+".join(map(str, numbers)))
    if min(numbers) < 0 or longest > 200:
        raise ValueError(
            "the rule countdown reads numbers from 0 and 200 characters of them: "
            f"{shortened(numbers)}"
        )
    return {"numbers": numbers, "target": integer(answer["target"])}


def integer(value):
    """3 of 3, 3.0 and "3"."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    is_integer = is_integer or isinstance(value, float) and value.is_integer()
    if isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]{1,200}\s*", value):
        is_integer = True
    if not is_integer:
        raise ValueError(f"Countdown is about whole numbers, not {shortened(value)}")
    return int(value)


def check_solvable(name, problems):
    """ValueError if none of the first three problems of Countdown has a solution, as when numbers
    and targets were mixed up; of more than 4 numbers it tries nothing."""
    if len(problems) < 3:
        return
    for problem in problems:
        gold = json.loads(problem.answer) if problem.rule == "countdown" else None
        if gold is None or len(gold["numbers"]) > 4 or gold_response(problem) != NO_SOLUTION:
            return
    raise ValueError(
        f"{name}: none of the first three problems has a solution; do the numbers belong to the "
        "targets?"
    )


# ---- rows from files and from the hub ------------------------------------------------------------


def read_rows(name):
    """Yields (number, row) with rows as dictionaries, and no more than a batch of them in memory.
    Of equal rows in Parquet files and on the hub only the first may come."""
    path = Path(os.path.expanduser(name))
    kind = path.suffix.lower()
    if kind in (".jsonl", ".json") and path.is_file():
        return read_json(name, path)
    if kind == ".parquet" and path.is_file():
        return read_parquet(name, path)
    if path.is_dir():
        raise ValueError(f"{name or 'the data'} is a folder, not a .jsonl, .json or .parquet file")
    if path.exists():
        raise ValueError(f"{name}: not a .jsonl, .json or .parquet file; convert it first")
    is_file_name = kind in (".json", ".jsonl", ".parquet", ".csv", ".gz")
    if is_file_name or "\\" in name or name[:1] in ("", ".", "/", "~"):
        raise ValueError(f"{name or 'the data'}: no such file")
    return read_hub(name)


def read_json(name, path):
    """JSON Lines, or one array of rows."""
    with path.open("rb") as file:
        is_array = file.read(100).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if is_array:
        try:
            rows = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} begins with [ and is no JSON array: {error}") from None
        yield from enumerate(rows, 1)
        return
    for number, line in enumerate(path.open("rb"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}, line {number} is not a whole JSON object: {error}") from None
        yield number, row


def read_parquet(name, path):
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        twice = [column for column in names if names.count(column) > 1]
        if twice:
            raise ValueError(f"{name} has the column {twice[0]} twice; leave one out")
        yield from distinct_rows(file.iter_batches(BATCH))
    except (pyarrow.ArrowInvalid, OSError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(f"{name} is not a whole Parquet file: {first_line}") from None
    except pyarrow.ArrowNotImplementedError as error:  # a type that pyarrow cannot compute with
        raise ValueError(
            f"{name} has a column of an unusual type ({error}): convert it to JSON Lines"
        ) from None


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
    tables = data.with_format("arrow").iter(BATCH)
    yield from distinct_rows(batch for table in tables for batch in table.to_batches())


# ---- of equal rows the first ---------------------------------------------------------------------

BATCH = 10_000  # rows


def distinct_rows(batches):
    """Yields (number, row) for the rows of Arrow batches that differ from all before them in the
    COLUMNS. DAPO-Math-17k on the hub holds each problem about 100 times, and to make a dictionary
    of a row takes far longer than to compare it."""
    import pyarrow

    seen = set()
    number = 0
    for batch in batches:
        known = [name for name in batch.schema.names if name.lower() in COLUMNS]
        new = []
        for i, text in enumerate(texts_of(batch.select(known).to_struct_array()).to_pylist()):
            digest = hash(text)  # of 64 bits, since the texts of a large set would fill the memory
            if digest not in seen:
                seen.add(digest)
                new.append(i)
        if new:
            rows = batch.take(pyarrow.array(new)).to_pylist()
            yield from zip([number + i + 1 for i in new], rows)
        number += len(batch)


def texts_of(array):
    """A text for each entry of an Arrow array; they are equal where the entries are. The characters
    that join the fields are control characters, which no text of a problem holds."""
    import pyarrow.compute
    from pyarrow import types

    def separator(character):
        return pyarrow.scalar(character, pyarrow.large_string())

    kind = array.type
    if types.is_struct(kind) and kind.num_fields:
        fields = [texts_of(field) for field in array.flatten()]
        texts = pyarrow.compute.binary_join_element_wise(*fields, separator("\x1f"))
    elif types.is_list(kind) or types.is_large_list(kind):
        lists = type(array).from_arrays(array.offsets, texts_of(array.values))
        texts = pyarrow.compute.binary_join(lists, separator("\x1e"))
    elif types.is_string(kind):
        texts = array.cast(pyarrow.large_string())
    else:
        entries = [repr(entry) for entry in array.to_pylist()]
        texts = pyarrow.array(entries, pyarrow.large_string())
    return texts.fill_null("\x00")


# ---- prompts -------------------------------------------------------------------------------------


def render(problem, tokenizer):
    """Token ids of the prompt: by the chat template when the tokenizer has one, else of the plain
    text."""
    messages = problem.prompt
    if not isinstance(messages, list):
        messages = [{"role": "user", "content": messages}]
    if tokenizer.chat_template:  # it writes its own special tokens, so none are added
        try:
            return tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
        except Exception as error:  # a template is a program, and raises what it likes
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"the model's chat template refuses messages of the roles {roles} ({error}): "
                f"change the prompt {shortened(problem.prompt)}"
            ) from None
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
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template that refuses an assistant's message says nothing of its end
        return set()
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
    if [] in prompts:
        lost = problems[prompts.index([])]
        raise ValueError(
            f"the tokenizer leaves nothing of the prompt {shortened(lost.prompt)}: are its files "
            "beside the model's, and does its chat template write the messages?"
        )
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


NO_SOLUTION = "(no solution looked for or found)"


def gold_response(problem):
    """A response that ought to be right."""
    if problem.rule != "countdown":
        return f"\\boxed{{{problem.answer}}}"
    gold = json.loads(problem.answer)
    parts = [(Fraction(n), str(n)) for n in gold["numbers"]]
    found = solution(parts, gold["target"]) if len(parts) <= 5 else None
    return found or NO_SOLUTION


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
