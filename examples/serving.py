"""Serving: a server answers requests of mixed tasks, while a client adds a task to it.

The server usually runs as a command, `hyperadapters serve FOLDER`; here it runs in a thread, so that one program shows
both sides. Needs the extras `demo`, `serve` and `client`. Run it with `python examples/serving.py`.
"""

import tempfile
import threading
import time

import uvicorn

from hyperadapters import HyperAdapterModel, Task, Trainer, TrainingArguments
from hyperadapters.client import Client
from hyperadapters.serving.app import create_app

TRAIN = {
    "help": {
        "delivery": ["Where is my parcel?", "My order has not arrived", "The courier never came"],
        "refund": ["I want my money back", "When is my payment returned?", "Please pay me back"],
    },
    "film": {
        "good": ["A wonderful film", "The best acting of the year", "I laughed and cried"],
        "bad": ["Two hours of fog", "The jokes are dull", "A waste of an evening"],
    },
}
EVALUATION = {
    "help": {"delivery": ["Has it been sent?", "It got lost on its way"], "refund": ["Refund me", "I paid too much"]},
    "film": {"good": ["Funny and moving", "A masterpiece"], "bad": ["I fell asleep", "What a bad story"]},
}
URGENT = {
    "yes": ["My parcel has to be here today", "I need the money back at once"],
    "no": ["Take your time with my order", "I only wonder when you open"],
}


def as_rows(texts: dict[str, list[str]]) -> list[dict[str, str]]:
    """Return one row for each text."""
    return [{"text": text, "label": label} for label, found in texts.items() for text in found]


def main() -> None:
    """Train, serve, ask, add a task, and ask again."""
    tasks = [Task.classification(name, list(labels)) for name, labels in TRAIN.items()]
    model = HyperAdapterModel.from_backbone("sentence-transformers/all-MiniLM-L6-v2", tasks)
    train, evaluation = ({name: as_rows(texts) for name, texts in data.items()} for data in (TRAIN, EVALUATION))
    Trainer(model, train, evaluation, TrainingArguments(max_steps=20, eval_steps=10)).train()

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        server = uvicorn.Server(uvicorn.Config(create_app(folder), port=0, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        port = server.servers[0].sockets[0].getsockname()[1]
        with Client(f"http://127.0.0.1:{port}") as client:
            for row in client.predict(["Has my parcel been sent?", "A dull and boring story"]):
                print(f"{row.task}: {row.answer}")
            client.add_task("urgent", as_rows(URGENT))  # a worker process fits it while the server answers
            print("tasks now:", ", ".join(task.name for task in client.tasks()))
            [answer] = client.predict(["The repair cannot wait until tomorrow"], task="urgent")
            print(f"urgent: {answer.answer}")
        server.should_exit = True
        thread.join()


if __name__ == "__main__":  # the worker process imports this file again
    main()
