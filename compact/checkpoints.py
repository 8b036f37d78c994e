"""A trainer's checkpoints: each there whole or not at all, with what a learned strategy must not forget."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging as transformers_logging

from compact.errors import UserError
from compact.information import InformationLog
from compact.metrics import MetricsTable
from compact.norm_cap import LastNormCap

if TYPE_CHECKING:
    from compact.strategies.base import Strategy

STRATEGY_STATE = "strategy.pt"
CAP_STATE = "norms.pt"  # what gradients.cap_by last remembers
# The files of a checkpoint, how many questions a step of its run has, and a digest of its own strategy's source.
SEAL = "checkpoint.json"


class WholeCheckpoints(Trainer):
    """transformers' Trainer, which writes a checkpoint aside and reads none that is not whole."""

    table: MetricsTable
    information: InformationLog | None
    strategy: Strategy
    _source: str | None  # of a strategy of the user's own
    _last_norm_cap: LastNormCap | None
    _aside: str | None = None  # where a checkpoint is being written

    def _get_output_dir(self, trial: Any = None) -> str:
        return self._aside or super()._get_output_dir(trial)

    def _flush(self) -> dict[str, float]:
        """Write what waits for the run's tables; give what there is to log of it."""
        logs = self.table.flush(self.accelerator, self.strategy.logs())
        return logs if self.information is None else logs | self.information.flush(self.accelerator)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write the checkpoint aside, then rename it: a folder called checkpoint-N is always whole."""
        self._flush()  # raises where the loss or the weights are not what they must be: nothing is saved after that
        final = Path(super()._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        aside = final.parent / f".{final.name}.writing"
        written = aside / final.name
        self._aside = str(aside)
        try:
            super()._save_checkpoint(model, trial)
            state = self.strategy.state_dict()
            if state and self.args.should_save:
                torch.save(state, written / STRATEGY_STATE)
            if self._last_norm_cap is not None and self.args.should_save:
                torch.save(self._last_norm_cap.state_dict(), written / CAP_STATE)
            if self.state.best_global_step and self.args.should_save:
                best = final.parent / f"checkpoint-{self.state.best_global_step}"
                self.state.best_model_checkpoint = str(best) if best == final or best.exists() else None
                self.state.save_to_json(str(written / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
            if self.args.process_index == 0:
                self._seal(written)
        except Exception as error:
            shutil.rmtree(aside, ignore_errors=True)
            if (
                isinstance(error, OSError)
                or "SafetensorError" in type(error).__name__
                or "inline_container" in str(error)
            ):
                raise UserError(
                    f"the checkpoint of step {self.state.global_step} could not be written to {final.parent}: "
                    f"{error}. Earlier checkpoints are whole: make room and run the same command again to go on from "
                    "the last one."
                ) from error
            raise
        finally:
            self._aside = None
        if self.args.process_index == 0:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(written, final)
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.local_process_index == 0 and written.exists():  # nodes without a shared file system
            self._seal(written)
            os.replace(written, final)
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(final.parent),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()  # a bar of its own for every checkpoint would cut through ours
        try:
            super()._save(output_dir, state_dict)
        finally:
            if bars:
                transformers_logging.enable_progress_bar()
        folder = output_dir or self.args.output_dir
        if self.args.should_save and folder is not None:  # a pickle that nobody here reads
            (Path(folder) / "training_args.bin").unlink(missing_ok=True)

    @property
    def _questions_per_step(self) -> int:
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size

    def _seal(self, folder: Path) -> None:
        files = sorted(path.name for path in folder.iterdir())
        seal = {"questions_per_step": self._questions_per_step, "strategy_source": self._source, "files": files}
        (folder / SEAL).write_text(json.dumps(seal))

    def _check_seal(self, folder: Path) -> None:
        """
        Raises:
            UserError: something is missing, or steps were of another number of questions, or of weights by another
                source: not these would follow.
        """
        if not (folder / SEAL).exists():  # of an older version
            return
        seal = json.loads((folder / SEAL).read_text())
        if missing := [name for name in seal["files"] if not (folder / name).exists()]:
            raise UserError(
                f"the checkpoint {folder} is not whole: it has no {', '.join(missing)}. Remove it and run the same "
                "command again, which goes on from the one before, or from the start where there is none"
            )
        if seal["questions_per_step"] != self._questions_per_step:
            raise UserError(
                f"{folder} is of a run with {seal['questions_per_step']} questions a step, this one has "
                f"{self._questions_per_step} (batch size × accumulation × processes): questions would be met twice or "
                "never, and the learning rate would jump. Start as many processes as then, or choose another folder"
            )
        if seal.get("strategy_source", self._source) != self._source:
            raise UserError(
                f"{folder} is of a run whose strategy has changed since: bring back the file that it is in, remove "
                f"{folder.parent.parent} to begin again, or choose another folder"
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._check_seal(Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._check_seal(Path(checkpoint))  # under DeepSpeed the first to look
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (Path(checkpoint) / STRATEGY_STATE).exists():
            state = torch.load(Path(checkpoint) / STRATEGY_STATE, weights_only=True, map_location="cpu")
            self.strategy.load_state_dict(state)
        if checkpoint is not None and self._last_norm_cap is not None and (Path(checkpoint) / CAP_STATE).exists():
            state = torch.load(Path(checkpoint) / CAP_STATE, weights_only=True, map_location="cpu")
            self._last_norm_cap.load_state_dict(state)
