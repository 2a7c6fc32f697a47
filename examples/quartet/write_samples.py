"""Let quartet write `samples.jsonl`: the text `make demo` calibrates and trains its path router on.

    python examples/quartet/write_samples.py

A clean clone then needs no text of anybody else's. Temperature 1 from the empty prompt, so the samples follow the
mix of the four domains quartet was trained on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE)
    parser.add_argument("--out", type=Path, default=HERE / "samples.jsonl")
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=440)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    start = torch.full((args.batch, 1), tokenizer.bos_token_id)
    with args.out.open("w", encoding="utf-8") as file:
        for done in range(0, args.documents, args.batch):
            ids = model.generate(
                start, max_new_tokens=args.tokens, do_sample=True, top_k=0, pad_token_id=tokenizer.eos_token_id
            )
            for text in tokenizer.batch_decode(ids, skip_special_tokens=True):
                file.write(json.dumps({"text": text.strip()}, ensure_ascii=False) + "\n")
            print(f"{done + args.batch} of {args.documents}", flush=True)


if __name__ == "__main__":
    main()
