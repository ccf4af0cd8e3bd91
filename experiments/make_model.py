"""A small untrained Qwen2 model with a byte-level BPE tokenizer, in Hugging Face format.

    python -m experiments.make_model problems.parquet runs/untrained

The tokenizer is trained on the prompts of the data file. The model answers nonsense, and lets real
problems go through every part of train.py on a laptop, with nothing downloaded.
"""

import sys

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from data import load_problems

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model(data, folder, vocab_size=4096, hidden_size=64, layers=2, chat=True, **config):
    """Writes the model to `folder`; its head dimension is 32, which vLLM on CPU needs."""
    tokenizer = train_tokenizer(data, vocab_size)
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=hidden_size // 32,
            num_key_value_heads=hidden_size // 32,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            **config,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer(data, vocab_size):
    """Byte-level BPE, trained on the prompts of the data file."""
    texts = []
    for problem in load_problems(data):
        prompt = problem.prompt
        if not isinstance(prompt, str):  # a chat
            prompt = "\n".join(message["content"] for message in prompt)
        texts.append(prompt)
    tokenizer = Qwen2Tokenizer(
        vocab={"<|endoftext|>": 0, "<|im_end|>": 1},
        merges=[],
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        bos_token=None,
    )
    return tokenizer.train_new_from_iterator(texts, vocab_size, new_special_tokens=["<|im_start|>"])


if __name__ == "__main__":
    data, folder = sys.argv[1:]
    make_model(data, folder)
    print(f"train.py --model {folder} --data {data}")
