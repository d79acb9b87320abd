"""Event files for TensorBoard: the one module that needs tensorboardX."""

import pathlib
import time

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary


class EventFile:
    """Scalars of the epochs from ``start`` on; hides those that were written of them before.

    ``tensorboardX.SummaryWriter`` leaves the writing to a thread, which dies of a full disk, and
    whoever adds to its queue then waits for ever.
    """

    def __init__(self, folder: pathlib.Path, start: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.writer = EventsWriter(str(folder / "events"))
        self.flush, self.close = self.writer.flush, self.writer.close
        session = SessionLog(status=SessionLog.START)
        self.writer.write_event(Event(step=start, session_log=session))

    def add(self, epoch: int, scalars: dict[str, float]) -> None:
        values = [Summary.Value(tag=tag, simple_value=x) for tag, x in scalars.items()]
        summary = Summary(value=values)
        self.writer.write_event(Event(step=epoch, wall_time=time.time(), summary=summary))
