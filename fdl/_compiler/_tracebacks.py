"""Short tracebacks: the user's lines, without the frames of torch and fdl between them."""

from __future__ import annotations

import os
import traceback
from types import FrameType, TracebackType

from fdl._compiler._user_lines import format_line, is_user_code

FULL = "FDL_TRACEBACK"  # an environment variable; "full" keeps all frames


def shorten(error: BaseException) -> None:
    """Drop the frames of torch and fdl from the traceback of an error of the user's function.

    So that its last frame is the user's line, which a note repeats. An error without a frame of
    the user's function keeps its traceback. `FDL_TRACEBACK=full` keeps all frames.
    """
    if os.environ.get(FULL) == "full":
        return
    lines = _user_lines(error)
    if not lines:
        return
    _name_tensors(error)
    hint = f"({FULL}=full shows the frames of torch and fdl)"
    where = format_line(lines[-1])
    error.add_note(hint if where in str(error) else f"at {where} {hint}")
    seen = set[int]()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if _user_lines(link):
            link.__traceback__ = _only_user_frames(link.__traceback__)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _user_lines(error: BaseException) -> list[tuple[str, int]]:
    frames = traceback.walk_tb(error.__traceback__)
    return [(f.f_code.co_filename, line) for f, line in frames if _is_user_frame(f)]


def _is_user_frame(frame: FrameType) -> bool:
    """Check for user code, which the wrapper that `make_fx` evaluates from a string is not."""
    return is_user_code(frame.f_code) and not frame.f_globals.keys() <= {"fn", "__builtins__"}


def _only_user_frames(tb: TracebackType | None) -> TracebackType | None:
    kept = []
    while tb is not None:
        if _is_user_frame(tb.tb_frame):
            kept.append(tb)
        tb = tb.tb_next
    chain = None
    for tb in reversed(kept):
        chain = TracebackType(chain, tb.tb_frame, tb.tb_lasti, tb.tb_lineno)
    return chain


def _name_tensors(error: BaseException) -> None:
    """Call a tensor that is traced a Tensor in the message, as eager torch does."""
    if type(error) is TypeError and len(error.args) == 1 and isinstance(error.args[0], str):
        error.args = (error.args[0].replace("FakeTensor", "Tensor"),)
