"""A program for tests: vLLM continues the prompts in a file, in a process of its own."""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, prompts, out, options = sys.argv[1:]
    engine = LLM(
        folder,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=160,
        max_num_seqs=4,
        kv_cache_memory_bytes=32 << 20,
        **json.loads(options),
    )
    asked = [{"prompt_token_ids": ids} for ids in json.loads(Path(prompts).read_text())]
    greedy = SamplingParams(temperature=0, max_tokens=20, detokenize=False)
    rounds = [engine.generate(asked, greedy, use_tqdm=False) for _ in range(2)]  # in the second, pages were in use
    Path(out).write_text(json.dumps([[list(one.outputs[0].token_ids) for one in answers] for answers in rounds]))
