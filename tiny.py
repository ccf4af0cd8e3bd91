"""The embedded default: a task, a tokenizer and a small base policy. Nothing needs a GPU or a
download.

The task is Countdown: four numbers from 1 to 13, the operators + - *, a target from 1 to 99. A
problem and an answer:

    prompt    "3 5 7 11=39:"
    response  "11*(7-3)-5" and the end-of-sequence token, 8 to 16 tokens

The base is a Qwen2-architecture model of 0.86 M parameters, trained by supervised learning on
random correct answers. It then does what a base model does on mathematics: it is right now and
then, from a broad distribution of answers.

    python tiny.py              makes the base, once
    python train.py --steps 0   measures it on the test problems
"""

import hashlib
import json
import math
import os
import random
import shutil
import zlib
from itertools import islice

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from data import Problem

NUMBERS = range(1, 14)
TARGETS = range(1, 100)
PAD = "<pad>"
EOS = "<eos>"  # another token than PAD: a mask made from `ids != pad` would lose the EOS tokens
VOCAB = {token: i for i, token in enumerate([PAD, EOS, *"0123456789+-*()=: "])}

SIZES = {
    "tiny-mini": dict(  # 0.21 M parameters
        hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=2
    ),
    "tiny": dict(  # 0.86 M
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4
    ),
    "tiny-small": dict(  # 2.9 M
        hidden_size=192, intermediate_size=576, num_hidden_layers=6, num_attention_heads=6
    ),
}
# The defaults, 0.02 and 10,000, are for wide models and long texts. Here they cost a little: after
# 800 steps the loss is 0.590 with the one and 0.587 with the other, against 0.577 (one seed).
INIT = 0.05
ROPE_THETA = 100.0
TRAINING = dict(steps=2400, batch=16, lr=1e-3, warmup=100, weight_decay=0.01, seed=0)

# What --data countdown and --eval_data countdown stand for.
PROBLEMS = dict(train=4000, test=128)
# train.py's settings with --model tiny; its own are for a language model on GPUs.
DEFAULTS = dict(
    prompts_per_step=64,
    updates_per_rollout=4,
    steps=100,
    lr=1e-4,
    max_prompt_len=24,
    max_response_len=24,
    eval_data=["countdown"],
    eval_samples=16,
    eval_every=20,
    save_every=20,
)
# Shares of tokens: the papers' are meant for 10^6 tokens a step, and would choose one of 5,000.
KNOBS = {
    "clip_cov": ["cov_frac=2e-2"],
    "kl_cov": ["cov_frac=2e-2"],
    "clip_v": ["most_frac=2e-2"],
}

# ---- problems ------------------------------------------------------------------------------------


def random_solution(rng):
    """Four numbers, a target and an expression that reaches it: ([3, 5, 7, 11], 39, "11*(7-3)-5").

    Neighbours in a random row of numbers are joined until one is left. The larger goes first, so
    nothing is negative on the way. Only the parentheses that are needed are written: two answers
    differ in their arithmetic rather than in notation, and that is what entropy measures. The
    verifier takes every notation.
    """
    while True:
        numbers = rng.choices(NUMBERS, k=4)
        parts = [(number, str(number), False) for number in numbers]  # value, text, is it a sum?
        while len(parts) > 1:
            i = rng.randrange(len(parts) - 1)
            operator = rng.choice("+-*")
            larger, smaller = sorted(parts[i : i + 2], key=lambda part: -part[0])
            parts[i : i + 2] = [joined(larger, operator, smaller)]
        target, text, _ = parts[0]
        if target in TARGETS:
            return sorted(numbers), target, text


def joined(left, operator, right):
    """The part (value, text, is it a sum?) that an operator makes of two."""
    a, left_text, left_is_sum = left
    b, right_text, right_is_sum = right
    if left_is_sum and operator == "*":
        left_text = f"({left_text})"
    if right_is_sum and operator != "+":  # 9-(3+5), 9*(3+5), but 9+5+3
        right_text = f"({right_text})"
    if operator == "+":
        value = a + b
    elif operator == "-":
        value = a - b
    else:
        value = a * b
    return value, left_text + operator + right_text, operator != "*"


def prompt_of(numbers, target):
    """The prompt; numbers come sorted, so one problem has one prompt."""
    return f"{' '.join(map(str, numbers))}={target}:"


def split_of(prompt):
    """One problem in ten is a test problem, by a checksum that is the same in every process (hash()
    is not)."""
    return "test" if zlib.crc32(prompt.encode()) % 10 == 0 else "train"


def problems(split, count, seed=0):
    """`count` different problems, each solvable: as likely as random solutions hit them.

    The first 100 of 200 are the 100. Another seed gives another draw from the same side of the
    split. The base has seen solutions of train problems, never of a test problem.
    """
    if split not in ("train", "test") or not 0 <= count <= 5000:  # of about 67,000 and 7,000
        raise ValueError(
            f"problems({split!r}, {count}): the splits are train and test, the count is 0 to 5000"
        )
    rng = random.Random(f"{split} {seed}")
    found = {}  # a dict keeps the order
    while len(found) < count:
        numbers, target, _ = random_solution(rng)
        prompt = prompt_of(numbers, target)
        if split_of(prompt) == split:
            answer = json.dumps({"numbers": numbers, "target": target})
            found[prompt] = Problem(prompt, answer, "countdown")
    return list(found.values())


# ---- the base policy -----------------------------------------------------------------------------


def make_tokenizer():
    """One token a character; encode adds no special token, decode no space. Characters that are not
    in VOCAB are dropped.

    Qwen2's class without merges, as AutoTokenizer takes that class for every Qwen2 model, whatever
    the folder says.
    """
    # Byte-level BPE writes a space as this letter.
    vocab = {token.replace(" ", "\u0120"): i for token, i in VOCAB.items()}
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        pad_token=PAD,
        eos_token=EOS,
        unk_token=None,
        model_max_length=64,
    )


def supervised_batches(rng, batch):
    """Yields (ids, labels) for ever, each (batch, T) long; labels are -100 except on the answer,
    where the loss is.

    Padding is on the right, where a causal model needs no mask. Sixteen batches at a time are
    sorted by length and come in random order: a fifth fewer tokens.
    """
    while True:
        rows = []
        while len(rows) < 16 * batch:
            numbers, target, text = random_solution(rng)
            prompt = prompt_of(numbers, target)
            if split_of(prompt) == "train":
                prompt_ids = [VOCAB[character] for character in prompt]
                answer_ids = [VOCAB[character] for character in text] + [VOCAB[EOS]]
                rows.append((prompt_ids, answer_ids))
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        for start in rng.sample(range(0, len(rows), batch), 16):
            ids = []
            labels = []
            for prompt_ids, answer_ids in rows[start : start + batch]:
                ids.append(torch.tensor(prompt_ids + answer_ids))
                labels.append(torch.tensor([-100] * len(prompt_ids) + answer_ids))
            padded_ids = pad_sequence(ids, batch_first=True, padding_value=VOCAB[PAD])
            padded_labels = pad_sequence(labels, batch_first=True, padding_value=-100)
            yield padded_ids, padded_labels


def untrained_base(size):
    """The model with random weights; the caller's random state is left as it was."""
    config = Qwen2Config(
        vocab_size=len(VOCAB),
        **SIZES[size],
        num_key_value_heads=SIZES[size]["num_attention_heads"],
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=INIT,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        bos_token_id=None,
        eos_token_id=VOCAB[EOS],
        pad_token_id=VOCAB[PAD],
    )
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed the caller's GPUs as well.
        torch.default_generator.manual_seed(TRAINING["seed"])
        return Qwen2ForCausalLM(config)


def train_base(size, progress):
    """The supervised model, trained with a linear warm-up and a cosine."""
    steps = TRAINING["steps"]
    model = untrained_base(size).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=TRAINING["weight_decay"]
    )
    batches = supervised_batches(random.Random(TRAINING["seed"]), TRAINING["batch"])
    bar = tqdm(islice(batches, steps), "base policy", steps, disable=not progress)
    for step, (ids, labels) in enumerate(bar):
        warmup = (step + 1) / TRAINING["warmup"]
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = TRAINING["lr"] * min(warmup, cosine)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


def base_path(folder, size):
    """{folder}-{size}-{hash}. The hash is of all that shapes the base, so that editing the task or
    the training makes another."""
    examples = [random_solution(random.Random(i)) for i in range(16)]
    first_prompt = prompt_of(*examples[0][:2])
    recipe = [VOCAB, SIZES[size], INIT, ROPE_THETA, TRAINING, examples, first_prompt]
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]
    return f"{folder}-{size}-{digest}"


def base_model(folder="runs/tiny-base", progress=True, size="tiny"):
    """Path of the base policy in Hugging Face format: made on the first call, found later.

    The caller's random state and number of threads are left as they were."""
    path = base_path(folder, size)
    if os.path.isdir(path):
        return path
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads are slower at this size, and change the sums
    try:
        model = train_base(size, progress)
    finally:
        torch.set_num_threads(threads)
    unfinished = f"{path}.{os.getpid()}.tmp"  # renamed when complete: a killed run leaves no base
    model.save_pretrained(unfinished)
    make_tokenizer().save_pretrained(unfinished)
    try:
        os.rename(unfinished, path)
    except OSError:  # another run made the same base meanwhile
        shutil.rmtree(unfinished)
        if not os.path.isdir(path):
            raise
    return path


if __name__ == "__main__":
    print(base_model())
    print("To measure it on the test problems: python train.py --steps 0")
