"""Tells the report where a multirun writes: Hydra's callback is handed the composed directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class SweepDirectory(Callback):
    """``hydra.callbacks.report`` of the configuration."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        from dppo.processes import rank
        from dppo.report import at_end
        from dppo.search.study import WORKER

        # The workers of a search compose the same multirun, and so do the processes of torchrun.
        first = rank() == 0 and WORKER not in os.environ
        if first and config.report and not config.dry_run:
            at_end.begin(Path(str(config.hydra.sweep.dir)))
