"""The embedded default: a task, a tokenizer and a small base policy; nothing needs a GPU or a download.

The task is Countdown: four numbers from 1 to 13, the operators + - *, a target from 1 to 99. A problem and an answer:

    prompt    "3 5 7 11=39:"
    response  "11*(7-3)-5" and the end-of-sequence token, 8 to 16 tokens

The base is a Qwen2-architecture model of 0.86 M parameters, trained by supervised learning on random correct answers.
It then does what a base model does on mathematics: right now and then, from a broad distribution of answers.

    python tiny.py        makes the base (once) and measures it on the test problems
"""

import hashlib, json, math, os, random, shutil, zlib
from itertools import islice

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from verify import RULES, Problem, pass_at_k

NUMBERS, TARGETS = range(1, 14), range(1, 100)
PAD, EOS = "<pad>", "<eos>"            # pad is not EOS: a mask made from `ids != pad` would lose the EOS tokens
VOCAB = {token: i for i, token in enumerate([PAD, EOS, *"0123456789+-*()=: "])}
SIZES = {  # parameters: 0.21 M, 0.86 M, 2.9 M
    "tiny-mini": dict(hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=2),
    "tiny": dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4),
    "tiny-small": dict(hidden_size=192, intermediate_size=576, num_hidden_layers=6, num_attention_heads=6),
}
# The defaults, 0.02 and 10,000, are for wide models and long texts. Here they cost a little: after 800 steps the loss
# is 0.590 with the one and 0.587 with the other, against 0.577 (one seed).
INIT, ROPE_THETA = 0.05, 100.0
TRAINING = dict(steps=2400, batch=16, lr=1e-3, warmup=100, weight_decay=0.01, seed=0)

PROBLEMS = dict(train=4000, test=128)         # what --data countdown and --eval_data countdown stand for
DEFAULTS = dict(  # train.py's settings with --model tiny; its own are for a language model on GPUs
    prompts_per_step=64, updates_per_rollout=4, steps=100, lr=1e-4, max_prompt_len=24, max_response_len=24,
    eval_data=["countdown"], eval_samples=16, eval_every=20, save_every=20)
KNOBS = {  # shares of tokens: the papers' are meant for 10^6 tokens a step, and would choose one of 5,000
    "clip_cov": ["cov_frac=2e-2"], "kl_cov": ["cov_frac=2e-2"], "clip_v": ["most_frac=2e-2"]}


def random_solution(rng):
    """Four numbers, a target and an expression that reaches it: ([3, 5, 7, 11], 39, "11*(7-3)-5").

    Neighbours in a random row of numbers are joined until one is left. The larger goes first, so nothing is negative on
    the way, and only the parentheses that are needed are written: two answers differ in their arithmetic rather than in
    notation, and that is what entropy measures. The verifier takes every notation.
    """
    while True:
        numbers = rng.choices(NUMBERS, k=4)
        parts = [(n, str(n), False) for n in numbers]                        # value, text, whether text is a bare sum
        while len(parts) > 1:
            i, op = rng.randrange(len(parts) - 1), rng.choice("+-*")
            (a, left, left_is_sum), (b, right, right_is_sum) = sorted(parts[i:i + 2], key=lambda part: -part[0])
            left = f"({left})" if left_is_sum and op == "*" else left
            right = f"({right})" if right_is_sum and op != "+" else right    # 9-(3+5), 9*(3+5), but 9+5+3
            parts[i:i + 2] = [(a + b if op == "+" else a - b if op == "-" else a * b, left + op + right, op != "*")]
        target, text, _ = parts[0]
        if target in TARGETS:
            return sorted(numbers), target, text


def prompt_of(numbers, target):
    """The prompt; numbers come sorted, so one problem has one prompt."""
    return f"{' '.join(map(str, numbers))}={target}:"


def split_of(prompt):
    """One problem in ten is a test problem, by a checksum that is the same in every process (hash() is not)."""
    return "test" if zlib.crc32(prompt.encode()) % 10 == 0 else "train"


def problems(split, count, seed=0):
    """`count` different problems, each solvable: as likely as random solutions hit them.

    The first 100 of 200 are the 100; another seed gives another draw from the same side of the split. The base has seen
    solutions of train problems, never of a test problem.
    """
    if split not in ("train", "test") or not 0 <= count <= 5000:             # 5,000 of about 67,000 and 7,000
        raise ValueError(f"problems({split!r}, {count}): the splits are train and test, the count is 0 to 5000")
    rng, found = random.Random(f"{split} {seed}"), {}                        # a dict keeps the order
    while len(found) < count:
        numbers, target, _ = random_solution(rng)
        prompt = prompt_of(numbers, target)
        if split_of(prompt) == split:
            found[prompt] = Problem(prompt, json.dumps({"numbers": numbers, "target": target}), "countdown")
    return list(found.values())


def make_tokenizer():
    """One token a character; encode adds no special token, decode no space. Characters not in VOCAB are dropped.

    Qwen2's class without merges, as AutoTokenizer takes that class for every Qwen2 model, whatever the folder says.
    """
    vocab = {token.replace(" ", "\u0120"): i for token, i in VOCAB.items()}  # byte-level BPE writes a space so
    return Qwen2Tokenizer(vocab=vocab, merges=[], pad_token=PAD, eos_token=EOS, unk_token=None, model_max_length=64)


def supervised_batches(rng, batch):
    """Yields (ids, labels) for ever, each (batch, T) long; labels are -100 except on the answer, where the loss is.

    Padding is on the right, where a causal model needs no mask. Sixteen batches at a time are sorted by length
    and come in random order: a fifth fewer tokens.
    """
    while True:
        rows = []
        while len(rows) < 16 * batch:
            numbers, target, text = random_solution(rng)
            prompt = prompt_of(numbers, target)
            if split_of(prompt) == "train":
                rows.append(([VOCAB[c] for c in prompt], [VOCAB[c] for c in text] + [VOCAB[EOS]]))
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        for i in rng.sample(range(0, len(rows), batch), 16):
            ids = [torch.tensor(prompt + answer) for prompt, answer in rows[i:i + batch]]
            labels = [torch.tensor([-100] * len(prompt) + answer) for prompt, answer in rows[i:i + batch]]
            yield pad_sequence(ids, True, VOCAB[PAD]), pad_sequence(labels, True, -100)


def train_base(size, progress):
    """The supervised model; the caller's random state and number of threads are left as they were."""
    steps, batch, seed = TRAINING["steps"], TRAINING["batch"], TRAINING["seed"]
    config = Qwen2Config(vocab_size=len(VOCAB), **SIZES[size], num_key_value_heads=SIZES[size]["num_attention_heads"],
                         max_position_embeddings=64, tie_word_embeddings=True, initializer_range=INIT,
                         rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
                         bos_token_id=None, eos_token_id=VOCAB[EOS], pad_token_id=VOCAB[PAD])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)           # torch.manual_seed would reseed the caller's GPUs as well
        model = Qwen2ForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=TRAINING["weight_decay"])
    batches = islice(supervised_batches(random.Random(seed), batch), steps)
    bar = tqdm(batches, "base policy", steps, disable=not progress)
    for step, (ids, labels) in enumerate(bar):
        warmup, cosine = (step + 1) / TRAINING["warmup"], 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = TRAINING["lr"] * min(warmup, cosine)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


def base_model(folder="runs/tiny-base", progress=True, size="tiny"):
    """Path of the base policy in Hugging Face format, {folder}-{size}-{hash}: made on the first call, found later.

    The hash is of all that shapes the base, so that editing the task or the training makes another.
    """
    examples = [random_solution(random.Random(i)) for i in range(16)]
    recipe = json.dumps([VOCAB, SIZES[size], INIT, ROPE_THETA, TRAINING, examples, prompt_of(*examples[0][:2])])
    path = f"{folder}-{size}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
    if os.path.isdir(path):
        return path
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                # two threads are slower at this size, and change the sums
    try:
        model = train_base(size, progress)
    finally:
        torch.set_num_threads(threads)
    unfinished = f"{path}.{os.getpid()}.tmp"                # renamed when complete: a killed run leaves no half a base
    model.save_pretrained(unfinished)
    make_tokenizer().save_pretrained(unfinished)
    try:
        os.rename(unfinished, path)
    except OSError:                                         # another run made the same base meanwhile
        shutil.rmtree(unfinished)
        if not os.path.isdir(path):
            raise
    return path


@torch.no_grad()
def measure(path, count=128, n=16):
    """Prints pass@1, pass@8 and entropy over n answers to each of `count` test problems, and a few answers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    tests = problems("test", count)
    prompts = tokenizer([p.prompt for p in tests], padding=True, padding_side="left", return_tensors="pt")
    out = model.generate(**prompts, do_sample=True, top_k=0, top_p=1.0, num_return_sequences=n, max_new_tokens=24,
                         return_dict_in_generate=True, output_logits=True)
    ids = out.sequences[:, prompts["input_ids"].shape[1]:]                  # (count n, T)
    ended = ids == VOCAB[EOS]
    mask = ended.cumsum(1) - ended.long() == 0                              # up to the first EOS, with it
    log_probs = torch.stack(out.logits, 1).log_softmax(-1)                  # (count n, T, V)
    entropy = -(log_probs.exp() * log_probs).sum(-1)[mask].mean()
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    rewards = [RULES["countdown"](text, tests[i // n].answer) for i, text in enumerate(texts)]
    right = [int(sum(rewards[i:i + n])) for i in range(0, len(rewards), n)]
    for k in (1, 8):
        print(f"pass@{k}    {sum(pass_at_k(n, c, k) for c in right) / count:.3f}")
    print(f"entropy   {entropy:.3f} nats a token, {mask.sum(1).float().mean():.1f} tokens an answer")
    for i in range(0, len(texts), len(texts) // 8):
        print(f"{tests[i // n].prompt:>18} {texts[i]:<16} {'right' if rewards[i] else 'wrong'}")


if __name__ == "__main__":
    measure(base_model())
