"""The process that our servers are compared with: transformers' generate, one static batch.

For each line "NUM_SEQUENCES NUM_PROMPT_TOKENS NUM_OUTPUT_TOKENS" on its input it prints the seconds that it took.
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
    parser.add_argument("--num-threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.num_threads)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto").eval()
    generator = random.Random(0)
    print(model.dtype, flush=True)
    for line in sys.stdin:
        num_sequences, num_prompt, num_output = map(int, line.split())
        prompts = [generator.choices(range(300, 1300), k=num_prompt) for _ in range(num_sequences)]
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
        assert answer.shape == (num_sequences, num_prompt + num_output)
        print(elapsed_s, flush=True)


if __name__ == "__main__":
    main()
