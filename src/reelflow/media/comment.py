"""How a file was made, as JSON in the comment that every container has room for.

Beside the metadata (`made`) it holds two facts about the clip that a container cannot: the exact `fps`, and the true `size` of
a clip with an odd side in MP4. `MARK` tells our comments from those of other programs.
"""

import json
from collections.abc import Mapping
from typing import Any

MARK = "reelflow"


class MediaError(ValueError):
    """A file that cannot be read or written as asked: one line that says what, why and what to do."""


def pack(metadata: Mapping[str, Any] | None, **facts: Any) -> str:
    """The comment that `unpack` reads; `metadata=None` leaves out how the file was made.

    Raises `MediaError` for metadata that JSON cannot hold.
    """
    made = {} if metadata is None else {"made": dict(metadata)}
    try:
        return json.dumps({MARK: 1, **facts, **made}, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise MediaError(f"metadata must be JSON (text, finite numbers, lists, dictionaries): {error}") from None


def unpack(comment: str | bytes | None) -> dict[str, Any]:
    """What `pack` wrote, checked; {} for a comment that is somebody else's.

    Returns a dictionary with any of `made` (dict), `fps` (frames per second) and `size` ([height, width]).
    """
    try:
        said = json.loads(comment or "")
    except (ValueError, RecursionError):
        return {}
    if not isinstance(said, dict) or MARK not in said:
        return {}
    made, fps, size = said.get("made"), said.get("fps"), said.get("size")
    facts: dict[str, Any] = {"made": made} if isinstance(made, dict) else {}
    if isinstance(fps, (int, float)) and 0.001 <= fps <= 1000:
        facts["fps"] = float(fps)
    if isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) for side in size):
        facts["size"] = size
    return facts
