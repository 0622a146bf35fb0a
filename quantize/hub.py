"""The Hugging Face hub: reached by `push` and `pull` alone, only while they run, and without telemetry."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from quantize.errors import BadInput

DEFAULT_ENDPOINT = "https://huggingface.co"
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_BLOCK = 1 << 20  # what an interruption loses at most
_SMALL = 16 << 20  # more than any list of files is long
_TRIES = 5  # in a row without a byte more
_PAUSE = 1.0  # seconds before the first repetition; doubled each time
_TIMEOUT = 30.0  # seconds without a byte
_BUSY = (408, 429, 500, 502, 503, 504)


def endpoint_of(argument: str | None) -> str:
    """The hub's address: the option, HF_ENDPOINT, or huggingface.co.

    Raises BadInput for what is no address, and for one that a token would go to in the clear.
    """
    found = (argument or os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
    if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", found):
        raise BadInput(f"{found!r} is no address of a hub; write it as https://host, or leave out --endpoint.")
    if not re.match(r"https://|http://(localhost|127\.[\d.]+|\[::1\])(:\d+)?(/|$)", found):
        raise BadInput(f"{found} would get your token unencrypted; write https:// (http is for this machine only).")
    return found


@contextlib.contextmanager
def online(*, chunked: bool) -> Iterator[None]:
    """Lets huggingface_hub reach the network while it lasts, whatever HF_HUB_OFFLINE says; no telemetry.

    `chunked`: use the Xet protocol where it is installed. Plain HTTP can go on in the middle of a file and
    passes through mirrors; Xet repeats no chunk of an upload that the hub has already.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import logging

    changes: dict[str, Any] = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_TELEMETRY": True}
    if not chunked:
        changes["HF_HUB_DISABLE_XET"] = True
    before, verbosity = {name: getattr(constants, name) for name in changes}, logging.get_verbosity()
    try:
        for name, value in changes.items():
            setattr(constants, name, value)
        logging.set_verbosity_error()
        yield
    finally:
        logging.set_verbosity(verbosity)
        for name, value in before.items():
            setattr(constants, name, value)


@contextlib.contextmanager
def failures(repo: str, endpoint: str) -> Iterator[None]:
    """Turns what goes wrong with the hub into BadInput with cause and remedy."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except (httpx2.HTTPError, errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise BadInput(_explained(error, repo, endpoint)) from error
    except json.JSONDecodeError as error:
        raise BadInput(f"{endpoint} gave no hub's answer; is it the sign-in page of this network?") from error
    except (RuntimeError, ValueError) as error:  # huggingface_hub wraps what went wrong with one file of an upload
        cause = error.__cause__
        if isinstance(cause, httpx2.HTTPError | errors.HfHubHTTPError):
            raise BadInput(_explained(cause, repo, endpoint)) from error
        raise BadInput(f"The hub at {endpoint} refused {repo}: {error}") from error


def read_small(url: str) -> bytes:
    """A short file of a repository, whole. Raises BadInput when it is not short; see `failures` for the others."""
    data = bytearray()
    with _opened(url, {}) as response:
        for block in response.iter_bytes(_BLOCK):
            data += block
            if len(data) > _SMALL:
                raise BadInput(f"{url} is longer than any list of files; it is not what `pediatricsgpt push` wrote.")
    return bytes(data)


def download(url: str, part: Path, size: int, progress: Callable[[int, int], None]) -> None:
    """Fetches what `part` lacks of `size` bytes, again and again while bytes keep coming.

    `part` stays when this fails, and the next call goes on from its end: huggingface_hub's own download
    throws an unfinished file away. Raises BadInput when there is more to fetch than `size`; see `failures`.
    """
    import httpx2

    if not part.exists() or _length(part) > size:
        part.write_bytes(b"")
    tries = 0
    while (have := _length(part)) < size:
        try:
            _go_on(url, part, have, size, progress)
            problem = None
        except httpx2.TransportError as error:
            problem = error
        tries = 0 if _length(part) > have else tries + 1
        if tries == _TRIES:
            raise problem or BadInput(f"{url} ends after {have} of {size} bytes; the upload was not finished.")
        if problem or tries:
            time.sleep(_PAUSE * 2**tries)
    progress(size, size)


def _go_on(url: str, part: Path, have: int, size: int, progress: Callable[[int, int], None]) -> None:
    with _opened(url, {"Range": f"bytes={have}-"} if have else {}) as response:
        goes_on = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if not goes_on:  # the server begins at the beginning
            have = 0
        with part.open("ab" if goes_on else "wb") as file:
            for block in response.iter_bytes(_BLOCK):
                have += len(block)
                if have > size:
                    raise BadInput(
                        f"{url} is longer than the {size} bytes of its manifest; it was replaced or damaged."
                    )
                file.write(block)
                progress(have, size)


@contextlib.contextmanager
def _opened(url: str, headers: dict[str, str]) -> Iterator[Any]:
    """The answer to a GET; its token does not follow a redirection to another host, which is httpx2's own rule."""
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    headers = {**build_hf_headers(), "Accept-Encoding": "identity", **headers}
    # Nothing that fails while the body is read may be repeated in there: the body would begin anew.
    with http_stream_backoff(
        "GET", url, headers=headers, timeout=_TIMEOUT, base_wait_time=_PAUSE,
        retry_on_exceptions=(), retry_on_status_codes=_BUSY,
    ) as response:  # fmt: skip
        hf_raise_for_status(response)
        yield response


def _length(part: Path) -> int:
    return part.stat().st_size


def _explained(error: Exception, repo: str, endpoint: str) -> str:
    import httpx2
    from huggingface_hub import errors

    sign_in = "`hf auth login`, or HF_TOKEN in the environment, with a token that may"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repo} is open only to those who accepted its terms: do that at {endpoint}/{repo}, then {sign_in} read."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no such revision; look at {endpoint}/{repo}/commits, or leave out --revision."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{endpoint} shows no repository {repo}: check the name; if it is private, {sign_in} read it."
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        said = f" ({error.server_message})" if error.server_message else ""
        if status == 401:
            return f"{endpoint} does not know you{said}: {sign_in} do this. A token that ran out is refused too."
        if status == 403:
            return f"Your token may not do this with {repo}{said}: take one with write access, or another owner's name."
        if status == 404:
            return f"{endpoint} has no {error.response.url.path}{said}; check the repository and --revision."
        if status in (409, 412):
            return f"{repo} exists already or was changed meanwhile{said}; look at it and start again."
        if status == 429:
            return f"{endpoint} asks for patience, too many requests{said}; try again in some minutes."
        return f"{endpoint} answered {status}{said}; try again later, or another address with --endpoint."
    if isinstance(error, httpx2.HTTPError):
        return (
            f"{endpoint} cannot be reached, or the connection broke ({error or type(error).__name__}). Check network "
            "and proxy, or name a mirror with --endpoint; the same command goes on where it stopped."
        )
    return f"{repo!r} is no name of a repository ({error}); write OWNER/NAME."
