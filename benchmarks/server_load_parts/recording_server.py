"""The server, which also writes down every batch and every state of the tasks, so that all of it can be repeated.

python -m server_load_parts.recording_server FOLDER RECORD_FOLDER
"""

from __future__ import annotations

import pickle
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hyperadapters.errors import HyperAdaptersError
from hyperadapters.serving import app
from hyperadapters.serving.served_model import Answer, Question, ServedModel
from hyperadapters.serving.server import serve
from hyperadapters.serving.settings import ServerSettings


class RecordingModel(ServedModel):
    """A served model that writes its questions to `batches.pickle` and its tasks to a folder for each revision."""

    record: Path

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._file = (self.record / "batches.pickle").open("wb")

    def answer(self, questions: Sequence[Question]) -> list[Answer | HyperAdaptersError]:
        """Answer questions, and write them down with the revision of the tasks."""
        with self.model.lock:
            revision = self.model.task_table.revision
            found = super().answer(questions)
        pickle.dump((revision, list(questions)), self._file)
        self._file.flush()
        return found

    def refresh(self) -> bool:
        """Switch to the tasks in the folder, and copy them."""
        has_changed = super().refresh()
        target = self.record / str(self.model.task_table.revision)
        if not target.exists():  # the next change is made after this
            shutil.copytree(self.folder, target)
        return has_changed


def main() -> None:
    folder, RecordingModel.record = Path(sys.argv[1]), Path(sys.argv[2])
    app.ServedModel = RecordingModel
    serve(folder, ServerSettings(port=0), lambda address: print(address, flush=True))


if __name__ == "__main__":
    main()
