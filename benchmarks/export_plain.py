"""Reads an exported folder with plain transformers; importing pregate fails here. Started by `benchmarks.export`.

    python benchmarks/export_plain.py FOLDER QUESTIONS ANSWERS

QUESTIONS: JSON, {"prompts": texts, "new_tokens": number, "rows": lists of token ids, "num_kept": rows to keep the
logits of}. ANSWERS: a .safetensors file with those logits; beside it, as .json, texts and perplexity.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any


def main(folder: str, questions: str, answers: str) -> None:
    sys.modules["pregate"] = None  # pyright: ignore[reportArgumentType]
    # This folder holds a kernels.py, which transformers would take for Hugging Face's package of that name.
    sys.path = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
    import torch
    import transformers
    from safetensors.torch import save_file

    asked = json.loads(Path(questions).read_text())
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    texts = []
    for prompt in asked["prompts"]:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
        mask = torch.ones_like(ids)
        new = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=asked["new_tokens"])
        texts.append(new[0, ids.shape[1] :].tolist())
    nats, num_tokens, kept = 0.0, 0, {}
    for number, row in enumerate(asked["rows"]):
        logits_NV = model(torch.tensor([row])).logits[0]
        nats += torch.nn.functional.cross_entropy(logits_NV[:-1], torch.tensor(row[1:]), reduction="sum").item()
        num_tokens += len(row) - 1
        if number < asked["num_kept"]:
            kept[str(number)] = logits_NV
    save_file(kept, answers)
    found = {
        "class": type(model).__name__,
        "transformers": transformers.__version__,
        "modules_of_pregate": [
            name for name, module in sys.modules.items() if name.split(".")[0] == "pregate" and module
        ],
        "texts": texts,
        "decoded": [tokenizer.decode(text) for text in texts],
        "perplexity": math.exp(nats / num_tokens),
        "num_tokens": num_tokens,
    }
    Path(answers).with_suffix(".json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
