"""Settings of `evaluate`."""

from __future__ import annotations

from pydantic import Field, model_validator

from honeloom.config.base import (
    Attention,
    LoadIn,
    ModelInput,
    OptionalFolderInput,
    OptionalModelInput,
    RowsConfig,
    RowsInput,
)

__all__ = ["EvaluateConfig"]


class EvaluateConfig(RowsConfig):
    """Measure a model on rows, per domain, with errors; optionally against another."""

    model: ModelInput
    rows: RowsInput = Field((), description="Plain text, instruction or multiple-choice rows.")
    tasks: tuple[str, ...] = Field((), description="lm-eval tasks (extra `lm-eval`).")
    task_path: OptionalFolderInput = Field(None, description="Folder with lm-eval task YAML files of your own.")
    against: OptionalModelInput = Field(None, description="Another model, or the output of an earlier evaluate.")
    train_rows: RowsInput = Field((), description="Rows the model was tuned on, for the overlap check.")
    load_in: LoadIn = None
    attn: Attention = None
    batch_size: int = Field(16, gt=0, description="Rows per forward pass.")
    max_length: int | None = Field(None, gt=1, description="Tokens per row; default: the model's limit, at most 2048.")
    bootstrap: int = Field(2000, ge=100, description="Resamples of the paired comparison.")

    @model_validator(mode="after")
    def _measures_something(self) -> EvaluateConfig:
        if not (self.rows or self.tasks):
            raise ValueError("nothing to measure: give rows (--rows) or tasks (--tasks)")
        if self.task_path and not self.tasks:
            raise ValueError(f"task_path {self.task_path!r} is only used with tasks; name some (--tasks)")
        return self
