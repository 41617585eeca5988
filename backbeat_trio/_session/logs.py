"""Beat and position in log records: in those of a session, and in a program's own.

Both have the same attributes, so a formatter can treat all records alike. A record that is made
outside of any session has them, too, with None, because a format such as ``%(backbeat_beat)s``
fails without the attribute.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any, Final, final

from .._config import BackbeatConfig
from .._errors import Logger
from .._runtime.runtime import Runtime
from .session import session_var

_NOTHING: Final[dict[str, Any]] = {
    "backbeat_beat": None,
    "backbeat_position": None,
    "backbeat_cluster": None,
    "backbeat_agent": None,
}


class BeatFilter(logging.Filter):
    """A filter that lets all log records pass, and adds the beat of the current session to them.

    Add one to a handler, so that it sees the records of all loggers::

        handler.addFilter(backbeat_trio.BeatFilter())

    A record then has these attributes, which are None outside of a session: ``backbeat_beat``, the
    index of the present beat; ``backbeat_position``, the position in beats; ``backbeat_cluster``
    and ``backbeat_agent``, the ids of the cluster and of the agent. In a thread, the beat is the
    last one that the session has noted, and there is no position. The session's own records have
    these attributes also without a filter.

    Args:
      name: as for `logging.Filter`: only records of this logger and of those below it get the
        attributes. An empty name is all loggers. Unlike there, the other records pass, too.

    """

    def __init__(self, name: str = "") -> None:
        super().__init__(name)

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the attributes to a record, unless it has them, and let it pass.

        Args:
          record: the record, which is changed.

        """
        if not hasattr(record, "backbeat_beat") and super().filter(record):
            bb = session_var.get(None)
            vars(record).update(_NOTHING if bb is None else bb._runtime.stamp())
        return True


@final
class SessionLogger(logging.LoggerAdapter[logging.Logger]):
    """The logger of a session, which adds the beat to its records.

    Args:
      logger: where the records go.
      config: the settings of the session.

    """

    def __init__(self, logger: logging.Logger, config: BackbeatConfig) -> None:
        super().__init__(logger, {})
        self.runtime: Runtime | None = None
        """The session's; None until it was made."""
        self._ids = {
            "backbeat_cluster": config.cluster_id,
            "backbeat_agent": config.agent_id,
        }

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """See `logging.LoggerAdapter`."""
        known = _NOTHING | self._ids if self.runtime is None else self.runtime.stamp()
        kwargs["extra"] = known | (kwargs.get("extra") or {})
        return msg, kwargs


def stamped(logger: Logger, config: BackbeatConfig) -> Logger:
    """Return a logger that adds the beat to records, or the same one if it is of another kind."""
    return SessionLogger(logger, config) if isinstance(logger, logging.Logger) else logger
