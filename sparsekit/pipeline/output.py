"""The output of a verb: begun or resumed, and published with its entry and model card at once."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.entry import Entry, Stage
from sparsekit.checkpoint.entry_parts import Settings, Source
from sparsekit.checkpoint.layout import Layout
from sparsekit.checkpoint.writer import CheckpointWriter
from sparsekit.errors import DataError
from sparsekit.files import read_json, sha256_json
from sparsekit.pipeline.cost import Cost
from sparsekit.progress import Progress
from sparsekit.provenance.entry import Report
from sparsekit.provenance.environment import versions
from sparsekit.provenance.front_matter import Origin
from sparsekit.provenance.model_card import model_card


class Output:
    """A folder that a verb makes; time and memory count from its construction.

    Args:
        stage: The verb.
        model: The name of the model, as it was given.
        out: The folder.
        words: The options that were given, as they were written.
        overwrite: Whether it may replace an earlier output of sparsekit.
        progress: Reports where an interrupted run resumes.
    """

    def __init__(
        self,
        stage: str,
        model: str,
        out: Path,
        words: Mapping[str, Any],
        *,
        overwrite: bool,
        progress: Progress,
    ) -> None:
        self.cost = Cost()
        self._stage, self._model, self._out = stage, model, out
        self._words = json.loads(json.dumps(dict(words), default=str))
        self._overwrite, self._progress = overwrite, progress
        self._settings: Settings
        self.resumed = 0
        """Parts that an interrupted run had finished."""

    @contextlib.contextmanager
    def writing(
        self,
        source: Checkpoint,
        settings: Settings,
        *,
        layout: Layout,
        key: Mapping[str, Any] | None = None,
        parts: str = "",
    ) -> Iterator[CheckpointWriter]:
        """Begin to write, or resume an interrupted run with the same settings and source.

        The digests of the source are taken while it is read. A resumed run reads again what the
        interrupted one had read, so that no output is made of two different sources.

        Args:
            source: The checkpoint whose layout and other files the output takes.
            settings: What decides the output's bytes, for the entry.
            layout: The weight files.
            key: What else decides them.
            parts: What the parts are, of a verb that reads the source only while it writes them.
                A note counts those of an interrupted run, and a refused source leaves no folder.

        Raises:
            UsageError: The output is in use, or an interrupted run with others is in the way.
            DataError: A tensor of the source is not finite, or changed since it was read before.
            StorageError: The disk has no room.
        """
        run_key = {
            "stage": self._stage,
            "config": sha256_json(read_json(source.path / "config.json")),
            "layout": source.layout,
            "versions": versions(),
            **settings.to_json(),
            **(key or {}),
        }
        self._settings = settings
        source.watch()
        with CheckpointWriter(
            self._out,
            source,
            run_key,
            layout=layout,
            overwrite=self._overwrite,
            progress=self._progress,
        ) as writer:
            self._writer, self.resumed = writer, len(writer.finished)
            if self.resumed and parts:
                note = f"going on after {self.resumed} finished {parts} in {writer.partial}"
                self._progress.note(note)
            try:
                yield writer
            except DataError:
                if parts and source.damaged:  # the parts were made of it
                    writer.abandon()
                raise

    def publish(
        self,
        kind: type[Stage],
        *,
        source_name: str | None = None,
        history: Sequence[Entry] | None = None,
        config_json: Mapping[str, Any] | None = None,
        **recorded: Any,
    ) -> Report:
        """Complete the folder with its entry and model card, and publish it.

        Args:
            kind: Of the entry.
            source_name: The name of the source, where the model names another one.
            history: The entries before this one; None: those of the source.
            config_json: The contents of config.json; None: those of the source's.
            recorded: What the entry has besides what all have.

        Raises:
            DataError: The source is not finite, changed while it was read, or its bytes are not the
                recorded ones.
            StorageError: The output cannot be written.
        """
        writer = self._writer
        source = writer.source
        writer.complete(config_json)
        fingerprint = source.scan(self._progress)
        entry = kind(
            stage=self._stage,
            model=self._model,
            words=self._words,
            source=Source(path=source_name or self._model, fingerprint=fingerprint),
            versions=versions(),
            **{"settings": self._settings, **self.cost.to_json(), **recorded},
        )
        history = source.provenance().history if history is None else history
        card = model_card(entry, Origin.of(self._model, source.path), history)
        writer.commit(entry, card, history)
        return Report(out=self._out, entry=entry)
