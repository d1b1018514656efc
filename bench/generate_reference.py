"""The process that bench/end_to_end.py compares with: transformers' generate, one static batch, one thread.

For each line "NUM_SEQUENCES" on its input it prints a line with the tokens/s of one batch.
"""

import argparse
import random
import sys
import time

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--num-prompt-tokens", type=int, required=True)
    parser.add_argument("--num-output-tokens", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto").eval()
    num_output = arguments.num_output_tokens
    generator = random.Random(0)
    print(model.dtype, flush=True)
    for line in sys.stdin:
        prompts = [generator.choices(range(300, 1300), k=arguments.num_prompt_tokens) for _ in range(int(line))]
        token_ids = torch.tensor(prompts)
        began_s = time.perf_counter()
        answer = model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            do_sample=False,
            max_new_tokens=num_output,
            min_new_tokens=num_output,
        )
        elapsed_s = time.perf_counter() - began_s
        assert answer.shape == (len(prompts), arguments.num_prompt_tokens + num_output)
        print(len(prompts) * num_output / elapsed_s, flush=True)


if __name__ == "__main__":
    main()
