"""`pregate tune`: recover by training what a conversion cost, or tune a dense model alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pregate.cli.model import ModelOption, OutOption, SeedOption, TextFieldOption, report


def tune(
    model: ModelOption,
    out: OutOption,
    text: Annotated[
        list[Path], typer.Option(help="Text to tune on: .txt, .jsonl or folders of them.", show_default=False)
    ],
    teacher: Annotated[
        Path | None, typer.Option(help="Dense model to keep to; without, the dense parent.", show_default=False)
    ] = None,
    method: Annotated[str, typer.Option(help="full or lora.")] = "full",
    rank: Annotated[int, typer.Option(help="Rank of LoRA's changes.")] = 8,
    alpha: Annotated[float, typer.Option(help="LoRA's changes count alpha / rank.")] = 32.0,
    router: Annotated[
        bool, typer.Option(help="Tune the path router, or the layers' gates; a scale of experts' weights always is.")
    ] = True,
    backbone: Annotated[bool, typer.Option(help="Tune attention, norms, embeddings and head.")] = True,
    kl_share: Annotated[float, typer.Option(help="Share of the KL to the teacher in the loss, 0 to 1.")] = 0.9,
    hidden_match: Annotated[
        float | None,
        typer.Option(help="Weight of every layer's output being the teacher's; 20 with KL.", show_default=False),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of the model; without, by --method.", show_default=False)
    ] = None,
    router_learning_rate: Annotated[float, typer.Option(help="Of the router or gates, and of the scale u.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = 0.01,
    router_mass: Annotated[float, typer.Option(help="Weight of the router's error as a forecast of masses.")] = 1.0,
    straight_through: Annotated[
        bool, typer.Option(help="Let the router learn from the losses as well, as if its choice were soft.")
    ] = True,
    refit: Annotated[bool, typer.Option(help="First fit the down projections in closed form.")] = True,
    balance: Annotated[str, typer.Option(help="none, bias (as CMoE) or loss (as Switch): even use of experts.")] = (
        "none"
    ),
    balance_rate: Annotated[float, typer.Option(help="What --balance bias adds to a bias per step.")] = 1e-2,
    balance_loss: Annotated[float, typer.Option(help="Weight of --balance loss.")] = 1e-2,
    steps: Annotated[int | None, typer.Option(help="Most optimizer steps.", show_default=False)] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="End with the step that reaches so many; 1500000 where no budget is given.", show_default=False
        ),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Most minutes of tuning.", show_default=False)] = None,
    warmup_steps: Annotated[int, typer.Option(help="Steps in which the learning rate rises.")] = 20,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a batch, padding included.")] = 2048,
    accumulate: Annotated[int, typer.Option(help="Batches of a step.")] = 1,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a row; longer documents become several.")] = 512,
    validation_share: Annotated[float, typer.Option(help="Share of the documents kept to measure on.")] = 0.05,
    validation: Annotated[
        list[Path] | None, typer.Option(help="Text to measure on instead: .txt, .jsonl or folders.", show_default=False)
    ] = None,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations.")] = 200,
    patience: Annotated[int, typer.Option(help="Stop after so many evaluations without a better one; 0: never.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(help="Steps after which an interrupted run can go on.")] = 100,
    precision: Annotated[str, typer.Option(help="auto (bfloat16 on a GPU), float32 or bfloat16 products.")] = "auto",
    seed: SeedOption = 0,
    device: Annotated[str, typer.Option(help="auto (a GPU when there is one), cpu, cuda or cuda:N.")] = "auto",
    text_field: TextFieldOption = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard what an interrupted run left.")] = False,
) -> None:
    """Tune a checkpoint under its own routing (or a dense model, the control). Interrupted, it can go on."""
    from pregate.convert.progress import RichProgress
    from pregate.convert.tune.options import TuneOptions
    from pregate.convert.tune.run import tune as run
    from pregate.model.quiet import quiet_transformers

    quiet_transformers()
    options = TuneOptions(
        model=model,
        out=out,
        text=tuple(text),
        teacher=teacher,
        method=method,
        rank=rank,
        alpha=alpha,
        router=router,
        backbone=backbone,
        kl_share=kl_share,
        hidden_match=hidden_match,
        learning_rate=learning_rate,
        router_learning_rate=router_learning_rate,
        weight_decay=weight_decay,
        router_mass=router_mass,
        straight_through=straight_through,
        refit=refit,
        balance=balance,
        balance_rate=balance_rate,
        balance_loss=balance_loss,
        steps=steps,
        tokens=tokens,
        minutes=minutes,
        warmup_steps=warmup_steps,
        batch_tokens=batch_tokens,
        accumulate=accumulate,
        sequence_length=sequence_length,
        validation_share=validation_share,
        validation=tuple(validation or ()),
        eval_every=eval_every,
        patience=patience,
        checkpoint_every=checkpoint_every,
        precision=precision,
        seed=seed,
        device=device,
        restart=restart,
        text_field=text_field,
    )
    try:
        figures = run(options, RichProgress()).figures["tune"]
    except KeyboardInterrupt:
        from pregate.convert.tune.state import interrupted

        typer.echo(f"pregate: {interrupted(out)}", err=True)
        raise typer.Exit(130) from None
    report(out, figures)
