"""Train quartet, the small Llama-type model that ships with the repository.

    python examples/quartet/train.py --text ../shared/text --work runs/quartet --out examples/quartet

Writes the tokenizer, weights (bf16 safetensors), config and `training.json` (data, steps, losses, held-out
perplexity per domain) to `--out`. Interrupted, it goes on from the last checkpoint in `--work`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch
from corpus import DOMAINS, MIX, TokenStream, documents, encode
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 512


def train_tokenizer(texts: dict[str, list[str]], vocab_size: int, out: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE over a sample of every domain, so that no text is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((t for domain in texts.values() for t in domain[::3]), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(out)
    return fast


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.dim // 32,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.04,
    )
    return LlamaForCausalLM(config)


def optimizer_for(model: LlamaForCausalLM, args: argparse.Namespace) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    warmup = min(1.0, (step + 1) / args.warmup)
    return args.lr * warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))


def draw_batch(streams: dict[str, TokenStream], step: int, args: argparse.Namespace) -> torch.Tensor:
    """Windows [batch, CONTEXT + 1] of step `step`; a function of (seed, step), so a resumed run draws the same."""
    rng = np.random.default_rng([args.seed, step])
    counts = rng.multinomial(args.batch, [MIX[d] for d in DOMAINS])
    rows = [streams[d].windows(rng, int(c), CONTEXT + 1) for d, c in zip(DOMAINS, counts, strict=True) if c]
    return torch.from_numpy(np.concatenate(rows).astype(np.int64))


def train_step(model, optimizer, batch: torch.Tensor, device: str) -> float:
    batch = batch.to(device)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        logits = model(batch[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


@torch.no_grad()
def held_out_perplexity(model, tokenizer, texts: list[str], device: str, limit: int = 60) -> dict[str, float]:
    """Per document, BOS prepended, cut to the context: perplexity and bits per byte of at most `limit` documents."""
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for text in texts[:: max(1, len(texts) // limit)][:limit]:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=CONTEXT)["input_ids"].to(device)
        logits = model(ids).logits[0, :-1].float()
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        num_tokens += ids.shape[1] - 1
        num_bytes += len(tokenizer.decode(ids[0, 1:]).encode())
    return {
        "perplexity": round(math.exp(nats / num_tokens), 3),
        "bits_per_byte": round(nats / math.log(2) / num_bytes, 4),
        "num_documents": min(limit, len(texts)),
    }


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.work.mkdir(parents=True, exist_ok=True)
    splits = {d: documents(args.text, d) for d in DOMAINS}
    tokenizer = train_tokenizer({d: s[0] for d, s in splits.items()}, args.vocab_size, args.out)
    streams = {d: encode(tokenizer, s[0]) for d, s in splits.items()}
    model = build_model(args).to(device)
    optimizer = optimizer_for(model, args)
    checkpoint = args.work / "checkpoint.pt"
    first, elapsed, losses = 0, 0.0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, elapsed, losses = state["step"], state["elapsed_s"], state["losses"]
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, from step {first}", flush=True)
    started = time.monotonic() - elapsed
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        losses.append(train_step(model, optimizer, draw_batch(streams, step, args), device))
        done = step + 1
        if done % 20 == 0:
            elapsed = time.monotonic() - started
            print(f"step {done} loss {sum(losses[-20:]) / 20:.3f} left {elapsed / done * (args.steps - done):.0f} s")
            print(end="", flush=True)
        if done % 200 == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            state |= {"elapsed_s": time.monotonic() - started, "losses": losses}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
    save(model, tokenizer, splits, losses, time.monotonic() - started, device, args)


def save(model, tokenizer, splits, losses, elapsed_s: float, device: str, args: argparse.Namespace) -> None:
    """Write bf16 weights and training.json; the figures are those of the rounded weights that ship."""
    model = model.to(torch.bfloat16)
    model.save_pretrained(args.out)
    model = model.float().eval()
    card = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": args.steps,
        "tokens": args.steps * args.batch * CONTEXT,
        "batch": [args.batch, CONTEXT],
        "learning_rate": args.lr,
        "seed": args.seed,
        "device": device,
        "threads": args.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "minutes": round(elapsed_s / 60, 1),
        "loss_first_20": round(float(np.mean(losses[:20])), 3),
        "loss_last_100": round(float(np.mean(losses[-100:])), 3),
        "held_out": {d: held_out_perplexity(model, tokenizer, splits[d][1], device) for d in DOMAINS},
    }
    (args.out / "training.json").write_text(json.dumps(card, indent=1) + "\n")
    print(json.dumps(card, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder with fiction/ nonfiction/ verse/ math/")
    parser.add_argument("--work", type=Path, required=True, help="where the resumable checkpoint goes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--warmup", type=int, default=60)
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--ffn", type=int, default=640)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
