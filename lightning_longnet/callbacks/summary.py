"""`FitSummary`: a callback that prints the results of a run and what to do next, when fitting ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class FitSummary(Callback):
    """Prints the last figures of validation, beside those of guessing by frequency, and the path of the checkpoint.

    Args:
        next: lines to print after them; `{checkpoint}` and `{run}` stand for the last checkpoint and the folder of the
            run.
    """

    def __init__(self, next: str = "") -> None:
        try:
            next.format(checkpoint="", run="")
        except (LookupError, ValueError) as error:  # an error now, and not at the end of the run
            raise ValueError(
                f"next must hold no braces but {{checkpoint}} and {{run}}, which others are doubled for: {error}"
            ) from None
        self.next = next

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the lines on rank 0; Lightning calls it on all ranks."""
        run = trainer.log_dir or trainer.default_root_dir  # all ranks must read log_dir, which rank 0 broadcasts
        if trainer.is_global_zero:
            print("\n" + "\n".join(self.lines(trainer, run)), flush=True)  # noqa: T201

    def lines(self, trainer: Trainer, run: str) -> list[str]:
        """Return the lines to print; `run` is the folder of the run."""
        figures = {name: x.item() for name, x in trainer.callback_metrics.items()}
        data: Any = getattr(trainer, "datamodule", None)
        results = []
        if "val/bits_per_byte" in figures:
            bits = figures["val/bits_per_byte"]
            results.append(f"{bits:.3f} bits per byte")
            unigram = getattr(data, "unigram_bits", None)
            if unigram is not None:
                alone = unigram / data.bytes_per_token
                where = "below" if bits < alone else "above"
                results[-1] += f" ({abs(1 - bits / alone):.0%} {where} the {alone:.3f} of frequencies alone)"
        if "val/perplexity" in figures:
            results.append(f"perplexity {figures['val/perplexity']:.2f}")
        lines = [f"Validation: {', '.join(results)}."] if results else ["No validation ran: see val_check_interval."]
        checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if checkpoint:
            lines.append(f"Checkpoint: {checkpoint}")
        elif trainer.checkpoint_callbacks:
            lines.append("No checkpoint was saved: by default one is saved after each validation.")
        if self.next and (checkpoint or "{checkpoint}" not in self.next):
            lines.append(self.next.format(checkpoint=checkpoint, run=run))
        return lines
