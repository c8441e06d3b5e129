"""`GenerateSamples`: a callback that has the model generate texts during training, and writes them to a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_longnet.sequence import sequence_context

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer


class GenerateSamples(Callback):
    """Continues some texts, at the end of each validation or at every n-th step, on all ranks together.

    The module has `generate(input_ids (B, N), tokens, temperature, top_k, seed)`, which returns (B, N + tokens); the
    data module has `encode(str)` and `decode(ids)`.  Rank 0 prints the texts, adds them to `samples.txt` in the run's
    folder, and logs them to loggers that take texts.

    Args:
        prompts: the texts to continue, each of at least one token; a newline by default.
        tokens: the number of tokens to generate.
        every_n_steps: the steps of the optimizer between samples; by default they are at the end of each validation.
        temperature: below 1 likelier tokens, above 1 rarer ones.
        top_k: how many of the likeliest tokens are sampled from; all by default.
        seed: the seed of sampling, the same each time, so that texts can be compared.
        prints: whether rank 0 prints the texts.
    """

    def __init__(
        self,
        prompts: Sequence[str] = ("\n",),
        tokens: int = 200,
        every_n_steps: int | None = None,
        temperature: float = 0.8,
        top_k: int | None = None,
        seed: int = 0,
        prints: bool = True,
    ) -> None:
        if isinstance(prompts, str) or not prompts or not all(isinstance(text, str) for text in prompts):
            raise ValueError(f"prompts must be a list of texts, at least one, got {prompts!r}")
        for name, value in (("tokens", tokens), ("every_n_steps", every_n_steps or 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a number, at least 1, got {value!r}")
        self.prompts, self.tokens, self.every_n_steps = tuple(prompts), tokens, every_n_steps
        self.temperature, self.top_k, self.seed, self.prints = temperature, top_k, seed, prints
        self.last: list[str] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise a ValueError if the module or the data module lacks a method, or a prompt has no token."""
        data: Any = getattr(trainer, "datamodule", None)
        for name, owner, what in (
            ("generate", pl_module, "the module"),
            ("encode", data, "the data module"),
            ("decode", data, "the data module"),
        ):
            if not callable(getattr(owner, name, None)):
                raise ValueError(f"GenerateSamples needs `{name}` of {what}, which {type(owner).__name__} has not")
        for prompt in self.prompts:  # an error now, and not after hours of training
            if not len(data.encode(prompt)):
                raise ValueError(f"prompts must each be a token of the data at least, got {prompt!r}, which is none")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue the texts after a validation of `fit`, unless `every_n_steps` is given."""
        # on_validation_end would be too late: from there on TokenThroughput counts time as a step's
        if self.every_n_steps is None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Continue the texts at every n-th step of the optimizer, if `every_n_steps` is given."""
        if self.every_n_steps is None or trainer.fit_loop._should_accumulate():
            return
        if trainer.global_step % self.every_n_steps == 0:
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, module: Any) -> None:
        """Generate the texts in evaluation mode, on all ranks together, and publish them."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        training, self.last = module.training, []
        module.eval()
        try:
            with isolate_rng(), torch.no_grad(), sequence_context(module).whole():
                for prompt in self.prompts:
                    ids = data.encode(prompt).to(module.device)[None]
                    options = {"temperature": self.temperature, "top_k": self.top_k, "seed": self.seed}
                    self.last.append(data.decode(module.generate(ids, self.tokens, **options)[0].cpu()))
        finally:
            module.train(training)
        self._publish(trainer)

    def _publish(self, trainer: Trainer) -> None:
        """Write the texts to the file, to loggers that take texts, and to the screen, on rank 0."""
        folder = trainer.log_dir or trainer.default_root_dir  # all ranks must read log_dir, which rank 0 broadcasts
        if not trainer.is_global_zero:
            return
        pages = [f"--- step {trainer.global_step}, sample {i}\n{text}" for i, text in enumerate(self.last)]
        Path(folder).mkdir(parents=True, exist_ok=True)
        with (Path(folder) / "samples.txt").open("a") as file:
            file.write("\n".join(pages) + "\n")
        for logger in trainer.loggers:
            board: Any = getattr(logger, "experiment", None)
            if hasattr(logger, "log_text"):  # of W&B
                rows = [[i, text] for i, text in enumerate(self.last)]
                logger.log_text("samples", columns=["sample", "text"], data=rows, step=trainer.global_step)
            elif hasattr(board, "add_text"):  # of TensorBoard
                board.add_text("samples", "\n\n".join(pages), trainer.global_step)
        if self.prints:
            bar = trainer.progress_bar_callback
            show = print if bar is None else bar.print
            show("\n".join(pages))
