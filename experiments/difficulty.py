"""The default training problems in two halves, by how many of 16 answers of the base are right.

    python -m experiments.difficulty        writes runs/difficulty-easy.jsonl and runs/difficulty-hard.jsonl, a minute
"""
import json
from pathlib import Path

from rollout import answer, full_tensors, make_engine  # first: it sets what torch reads when it is imported
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
import verify
from record import write_whole

FILES = {half: Path(f"runs/difficulty-{half}.jsonl") for half in ("easy", "hard")}


def main(n=16):
    if all(path.exists() for path in FILES.values()):
        return
    folder = tiny.base_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    longest, max_tokens = tiny.DEFAULTS["max_prompt_len"], tiny.DEFAULTS["max_response_len"]
    problems, prompts = verify.render_all(verify.load_sets(["countdown"], "train"), tokenizer, longest)
    engine = make_engine("torch", folder, dtype=torch.float32, device=torch.device("cpu"), trust_remote_code=False,
                         stop_ids={tokenizer.eos_token_id}, max_model_len=longest + max_tokens)
    engine.push_weights(full_tensors(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)))
    groups = answer(engine, tokenizer, problems, prompts, range(0, n * len(problems), n), n=n, max_tokens=max_tokens,
                    temperature=1.0)
    solved = [group[0]["group_accuracy"] for group in groups]
    order = sorted(range(len(problems)), key=lambda i: -solved[i])
    for half, chosen in (("easy", order[:len(order) // 2]), ("hard", order[len(order) // 2:])):
        rows = [{"prompt": problems[i].prompt, "reward_model": {"ground_truth": json.loads(problems[i].answer)}}
                for i in sorted(chosen)]
        write_whole(FILES[half], "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{FILES[half]}: {len(rows)} problems, the base solves {sum(solved[i] for i in chosen) / len(rows):.3f}")


if __name__ == "__main__":
    main()
