"""Stories from the Hugging Face Hub: one of the sources of `stories.py`. A child process does the reading.

`datasets` retries for up to half an hour, its settings hold for a whole process, and Arrow's threads can crash an
interpreter that ends while they read (apache/arrow#45214). A child can be given settings of its own, and be killed.
"""

import contextlib
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from tinystories_jax.errors import UserError

# Silence of the Hub that is taken for an outage. Once stories flow, a dropped connection is worth some patience.
FIRST_STORY_SECONDS = 25.0
NEXT_STORY_SECONDS = 60.0
# For importing `datasets`, which takes seconds, or a minute from a cold network drive.
_START_SECONDS = 180.0
_BATCH_SIZE = 1000

_OTHER_SOURCES = (
    "or take other stories: --config.data.source=files with --config.data.train_files=PATH and "
    "--config.data.valid_files=PATH for local ones, --config.data.source=sample for the small bundled ones (of "
    "train_tokenizer.py: --source and --train_files)"
)


def iter_hub(name: str, *, subset: str, revision: str, split: str) -> Iterator[tuple[int, int, str]]:
    """Yields (stories read, stories of the split by the data set's own metadata or 0, story), file by file.

    A story is the value of column `text`; null is an empty one. Raises `UserError` when the Hub cannot be reached or
    falls silent, when it has no such data set, revision, split or column, and when the split ends before its own count.
    No local copy is ever taken instead.
    """
    num_read = size = 0
    with tempfile.TemporaryDirectory(prefix="tinystories-hub-", ignore_cleanup_errors=True) as scratch:
        request = {"name": name, "subset": subset, "revision": revision, "split": split, "scratch": scratch}
        with contextlib.closing(_messages(request)) as messages:
            for size, stories in messages:
                for num_read, story in enumerate(stories, start=num_read + 1):  # noqa: B020
                    yield num_read, size, story or ""
    if size and num_read != size:
        raise UserError(
            f"{_title(request)} ended after {num_read} stories, but its own metadata says {size}; "
            "try again, or choose another hub_revision"
        )


def _messages(request: dict[str, str]) -> Generator[tuple[int, list[str | None]]]:
    """Yields what the child sends, until it is done; the child is gone when this generator is closed."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    stderr_path = Path(request["scratch"]) / "stderr"
    with receiver, stderr_path.open("wb") as stderr:
        with sender:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(sender.fileno()), json.dumps(request)],
                pass_fds=[sender.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=_child_environment(),
                # Ctrl-C is for the parent to handle; it then ends the child.
                start_new_session=True,
            )
        try:
            yield from _listen(receiver, request)
        except EOFError:
            last_words = stderr_path.read_text(encoding="utf-8", errors="replace").strip().rsplit("\n", 1)[-1]
            raise UserError(
                f"the process that reads {_title(request)} ended with exit status {child.wait()} ({last_words[:500]}); "
                f"try again, {_OTHER_SOURCES}"
            ) from None
        finally:
            child.kill()
            child.wait()


def _listen(receiver: Connection, request: dict[str, str]) -> Generator[tuple[int, list[str | None]]]:
    endpoint, trouble, patience = "", "", _START_SECONDS
    deadline = time.monotonic() + patience
    while True:
        if not receiver.poll(max(0.0, deadline - time.monotonic())):
            reason = f"no answer for {patience:.0f} seconds" + (f" (last: {trouble})" if trouble else "")
            raise _unreachable(request, endpoint, reason)
        try:
            message = receiver.recv_bytes()
        except OSError as error:  # as EOFError is; a child that was killed has sent a part of one
            raise EOFError(str(error)) from error
        kind, value = json.loads(message)
        if kind == "trouble":
            trouble = value
            continue
        if kind == "end":
            return
        if kind == "unreachable":
            raise _unreachable(request, endpoint, value)
        if kind == "refused":
            raise UserError(
                f"cannot use {_title(request)} of the Hub at {endpoint}: {value}. "
                "Check hub_name, hub_subset and hub_revision; a private or gated data set needs HF_TOKEN or "
                f"`hf auth login`; {_OTHER_SOURCES}"
            )
        if kind == "ready":
            endpoint, patience = value, FIRST_STORY_SECONDS
        if kind == "stories":
            patience = NEXT_STORY_SECONDS
            yield value
        deadline = time.monotonic() + patience


def _unreachable(request: dict[str, str], endpoint: str, reason: str) -> UserError:
    return UserError(
        f"cannot read {_title(request)} from the Hub at {endpoint or 'its endpoint'}: {reason}. "
        f"Check the network, the proxy and HF_ENDPOINT, {_OTHER_SOURCES}"
    )


def _title(request: dict[str, str]) -> str:
    subset = f" ({request['subset']})" if request["subset"] else ""
    return f"split {request['split']} of {request['name']}{subset} at revision {request['revision'] or 'main'}"


def _child_environment() -> dict[str, str]:
    # The child must import this very package, wherever the parent found it, and nothing from the current folder.
    package_root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    return {**os.environ, "PYTHONPATH": path, **quiet}


def _serve(sender: Connection, request: dict[str, str]) -> None:
    """What the child does: sends stories, signs of life and, in the end, how it went."""
    lock = threading.Lock()

    def send(kind: str, value: Any = None) -> None:
        # Arrow reads from several threads, and a Connection takes one message at a time.
        with lock:
            sender.send_bytes(json.dumps((kind, value)).encode())

    # Imported before "ready", where the patience with the network begins.
    import datasets  # noqa: F401
    from huggingface_hub import constants

    _report_life(send)
    send("ready", constants.ENDPOINT)
    try:
        _send_stories(send, request)
    except BrokenPipeError:
        return  # the parent has gone
    except Exception as error:
        outage = _find_outage(error)
        send("refused" if outage is None else "unreachable", _in_one_line(outage or error))
    else:
        send("end")


def _send_stories(send: Callable[..., None], request: dict[str, str]) -> None:
    import datasets
    import pyarrow as pa
    from huggingface_hub import constants, get_session

    # Whatever it answers: `datasets` would retry a refused connection or an unknown host for long, and then hide why.
    get_session().head(f"{constants.ENDPOINT}/api/datasets/{request['name']}", timeout=10.0)
    # `datasets` takes a folder of that name here, or a copy in its cache, for the data set when the Hub fails:
    # the prefix rules out the first, an empty cache folder the second.
    dataset = datasets.load_dataset(
        "hf://datasets/" + request["name"],
        request["subset"] or None,
        split=request["split"],
        revision=request["revision"] or None,
        streaming=True,
        cache_dir=request["scratch"],
    )
    splits = dataset.info.splits or {}
    size = splits[request["split"]].num_examples if request["split"] in splits else 0
    for table in cast(Any, dataset).with_format("arrow").iter(batch_size=_BATCH_SIZE):
        if "text" not in table.column_names:
            raise ValueError(f"it has no column `text`, only {', '.join(table.column_names)}")
        column = table.column("text")
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            raise ValueError(f"its column `text` holds {column.type}, not strings")
        send("stories", (size, column.to_pylist()))


def _report_life(send: Callable[..., None]) -> None:
    """Sends "alive" while bytes arrive, so that a slow Hub is not taken for a dead one, and "trouble" at each retry."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import httpx
    from huggingface_hub.utils._http import default_client_factory

    last_sent = 0.0

    def alive() -> None:
        nonlocal last_sent
        if time.monotonic() - last_sent > 1.0:
            last_sent = time.monotonic()
            send("alive")

    class WatchedStream(httpx.SyncByteStream):
        def __init__(self, stream: Any):
            self._stream = stream

        def __iter__(self) -> Iterator[bytes]:
            for chunk in self._stream:
                alive()
                yield chunk

        def close(self) -> None:
            self._stream.close()

    def watch(response: Any) -> None:
        if not _means_outage(response.status_code):
            alive()
            response.stream = WatchedStream(response.stream)

    def watched_client() -> Any:
        client = default_client_factory()
        client.event_hooks["response"].append(watch)
        return client

    class Trouble(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "Retrying in" not in record.getMessage():
                send("trouble", _in_one_line(record.getMessage()))

    set_client_factory(watched_client)
    for name in ("huggingface_hub", "datasets"):
        logging.getLogger(name).addHandler(Trouble(logging.WARNING))


def _find_outage(error: BaseException | None) -> BaseException | None:
    """Returns the innermost failure of the network or the Hub behind `error`, None if there is none."""
    from huggingface_hub.errors import FileMetadataError, HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import httpx

    outage = None
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            if _is_refusal(error):
                return outage
            outage = error
        elif isinstance(error, (ConnectionError, TimeoutError, httpx.RequestError)):
            outage = error
        elif isinstance(error, (FileMetadataError, LocalEntryNotFoundError)):
            # The Hub has answered, but not as a Hub does.
            outage = error
        error = error.__cause__ or error.__context__
    return outage


def _is_refusal(error: Any) -> bool:
    """Whether an HfHubHTTPError is the Hub's own answer; without its code it is a proxy's, or a login page's."""
    from huggingface_hub.errors import RepositoryNotFoundError

    if error.response is None or _means_outage(error.response.status_code):
        return False
    return isinstance(error, RepositoryNotFoundError) or "X-Error-Code" in error.response.headers


def _means_outage(status_code: int) -> bool:
    return status_code >= 500 or status_code in (408, 429)


def _in_one_line(error: object) -> str:
    # What Python raises needs its type to be understood (KeyError: 'x'); what `datasets` raises speaks for itself.
    named = type(error).__module__ == "builtins" and not isinstance(error, (str, ValueError, OSError))
    text = " ".join(str(error).split()).split(" For more information check:")[0][:500].rstrip(".")
    return f"{type(error).__name__}: {text}" if named or not text else text


if __name__ == "__main__":
    with Connection(int(sys.argv[1]), readable=False) as _sender:
        _serve(_sender, json.loads(sys.argv[2]))
