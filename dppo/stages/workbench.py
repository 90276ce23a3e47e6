"""What every stage works with: the cache, the device, the processes, and the lines that the user reads."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from dppo.artifacts import Build, Cache, Slot, Store
from dppo.types import Artifact, Json

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

_log = logging.getLogger("dppo")


@dataclass
class Record:
    """What a run did at one stage: how long it took, and whether the cache had it."""

    stage: str
    fingerprint: str
    seconds: float
    reused: bool
    detail: str


@dataclass
class Workbench:
    """One run's view of the cache; ``records`` grow as stages finish."""

    cache: Cache
    accelerator: Accelerator
    records: list[Record] = field(default_factory=list)
    on_record: Callable[[], None] = lambda: None

    @property
    def device(self) -> torch.device:
        return cast("torch.device", self.accelerator.device)

    @property
    def is_main(self) -> bool:
        """Only the main process builds, prints and writes; the others wait and read."""
        return bool(self.accelerator.is_main_process)

    def numerics(self, precision: str, packing: Literal["packed", "padded"] | None = None) -> dict[str, Json]:
        """What decides the rounding of log-probs: part of the fingerprint of every stage that runs a model."""
        import torch

        return {
            "precision": precision,
            "packing": packing,
            "attention": "sdpa",
            "torch": ".".join(torch.__version__.split(".")[:2]),
            "device": self.device.type,
        }

    def say(self, line: str) -> None:
        if self.is_main:
            _log.info("%s", line)

    def warn(self, line: str) -> None:
        if self.is_main:
            _log.warning("warning: %s", line)

    @contextmanager
    def working(self, title: str, entry: Slot | Store[Any], *, reuse: bool, detail: str) -> Iterator[None]:
        """Say what happens at a stage, time it and record it."""
        verb = "reuse" if reuse else "build"
        why = detail if reuse else f"{detail}; {entry.reason()}" if detail else entry.reason()
        self.say(f"{verb} {title:<10} {entry.fingerprint[:4]}  {why}")
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.records.append(Record(title, entry.fingerprint, round(seconds, 3), reuse, detail))
        self.on_record()

    def artifact(self, title: str, slot: Slot, detail: str, build: Callable[[Build], None]) -> Artifact:
        """Reuse a complete artifact or build it; every process of the run enters ``build``, one commits."""
        if self.accelerator.num_processes > 1:
            return self._collective(title, slot, detail, build)
        if slot.complete():
            with self.working(title, slot, reuse=True, detail=detail):
                return slot.artifact(reused=True)
        with slot.lock(self.say):
            reuse = slot.complete()  # another process may have built it while this one waited
            with self.working(title, slot, reuse=reuse, detail=detail):
                return slot.get_or_build(build, self.say)

    def _collective(self, title: str, slot: Slot, detail: str, build: Callable[[Build], None]) -> Artifact:
        """The same with several processes: the main one holds the lock, all train, the main one commits."""
        from accelerate.utils import broadcast_object_list

        if self.is_main:
            with slot.lock(self.say):
                reuse = slot.complete()
                with self.working(title, slot, reuse=reuse, detail=detail):
                    if not reuse:
                        with slot.building() as started:
                            broadcast_object_list([str(started.directory), str(started.work)])
                            build(started)
                    else:
                        broadcast_object_list([None, None])
            self.accelerator.wait_for_everyone()
            return slot.artifact(reused=reuse)
        from pathlib import Path

        where: list[Any] = [None, None]
        broadcast_object_list(where)
        if where[0] is not None:
            build(Build(Path(where[0]), Path(where[1])))
        self.accelerator.wait_for_everyone()
        return slot.artifact(reused=where[0] is None)

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Let the main process fill a store while the others wait; yields whether this is the main process."""
        if self.is_main:
            yield True
        self.accelerator.wait_for_everyone()
        if not self.is_main:
            yield False
