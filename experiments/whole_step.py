"""Whole training steps of train.py and of TRL's GRPOTrainer on the same random model, timed; rows of benchmark.py."""
import os
import time
from functools import partial

import numpy as np
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

import record
import tiny
import train
import verify
from rollout import prepare_environment

P, G, T = 64, 8, 32  # prompts, answers each, longest answer in tokens
CHANCE = {"ragged": 0.12, "full": 1e-9}  # of EOS at every token: mean length 8 with a long tail, or all of length T


def model_of(kind, folder):
    """Folder of a random model of the default's size that ends an answer with the same CHANCE at every token."""
    vocab, end = len(tiny.VOCAB), tiny.VOCAB[tiny.EOS]
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocab, **tiny.SIZES["tiny"], num_key_value_heads=4, max_position_embeddings=64, bos_token_id=None,
        eos_token_id=end, pad_token_id=tiny.VOCAB[tiny.PAD], tie_word_embeddings=False))
    with torch.no_grad():  # coordinate 0 is the same for every token, so the head can read a constant from it
        model.model.embed_tokens.weight[:, 0] = 1.0
        constant = model.model(torch.randint(2, vocab, (64, 16))).last_hidden_state[..., 0].mean()
        model.lm_head.weight.zero_()
        model.lm_head.weight[end, 0] = np.log(CHANCE[kind] * (vocab - 1) / (1 - CHANCE[kind])) / constant
        model.lm_head.weight[tiny.VOCAB[tiny.PAD], 0] = -20 / constant  # never sampled: it marks the end of an answer
    model.save_pretrained(folder / kind)
    tiny.make_tokenizer().save_pretrained(folder / kind)
    return str(folder / kind)


def our_steps(arguments, folder, steps):
    """Processor and wall seconds per step of train.py, the first step left out."""
    clock, write = [], record.RunLog.write
    prepare_environment()

    def timed_write(self, row):
        clock.append((time.process_time(), time.perf_counter()))
        write(self, row)
    record.RunLog.write = timed_write
    train.main([*arguments.split(), "--steps", str(steps), "--out", str(folder), "--overwrite", "--eval_data", "none"])
    record.RunLog.write = write
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]  # a later run sets them anew, and TRL would take them for its own
    return (np.array(clock[-1]) - clock[0]) / (steps - 1)


def steps_less_metrics(folder, steps):
    """Processor seconds per step of the default run, and less what the entropy metrics take in it.

    Old log-probs are needed without them too, so these are scored a second time, alone: only what the other statistics
    add counts, and that second time counts nowhere."""
    real = {name: getattr(train, name) for name in ("score_all", "measure", "entropy_after")}
    seconds = {name: [] for name in (*real, "alone")}

    def timed(name, *args, into=None):
        start = time.process_time()
        result = real[name](*args)
        seconds[into or name].append(time.process_time() - start)
        return result

    def score_all(policy, batch, wanted, *rest):
        timed("score_all", policy, batch, ["log_probs"], *rest, into="alone")
        return timed("score_all", policy, batch, wanted, *rest)
    train.score_all = score_all
    train.measure, train.entropy_after = partial(timed, "measure"), partial(timed, "entropy_after")
    step = our_steps("--method grpo", folder, steps)[0]
    train.score_all, train.measure, train.entropy_after = real.values()
    means = {name: np.mean(found[1:]) for name, found in seconds.items()}  # without the first step, as our_steps
    return step - means["alone"], step - sum(means.values()) + means["alone"]


def trl_steps(model, problems, updates, steps):
    """As our_steps: float32, no gradient checkpointing (TRL's fastest on CPU), no KL, the same reward function."""
    import trl
    from datasets import Dataset

    class Clock(TrainerCallback):
        seconds = []

        def on_step_end(self, args, state, control, **_):
            self.seconds.append((time.process_time(), time.perf_counter()))
    config = trl.GRPOConfig(
        output_dir=model + "-trl", use_cpu=True, bf16=False, gradient_checkpointing=False, beta=0.0, temperature=1.0,
        per_device_train_batch_size=P * G // updates, steps_per_generation=updates, gradient_accumulation_steps=1,
        num_generations=G, max_completion_length=T, max_steps=steps * updates, learning_rate=1e-6, top_p=1.0, top_k=0,
        report_to="none", save_strategy="no", logging_steps=10**6, disable_tqdm=True)
    data = Dataset.from_list([{"prompt": p.prompt, "gold": p.answer} for p in problems])
    reward = lambda completions, gold, **_: list(map(verify.RULES["countdown"], completions, gold))
    trl.GRPOTrainer(Qwen2ForCausalLM.from_pretrained(model, dtype=torch.float32), reward, config, data,
                    processing_class=AutoTokenizer.from_pretrained(model), callbacks=[Clock()]).train()
    ends = np.array(Clock.seconds[updates - 1::updates])
    return (ends[-1] - ends[0]) / (steps - 1)
