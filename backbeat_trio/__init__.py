"""Time limits for Trio that a whole cluster shares, and that can be stretched or paused.

They count beats of a metronome, which all agents of the cluster follow::

    import backbeat_trio as backbeat

    async with backbeat.session() as bb:  # settings from CHORUS_BACKBEAT_*
        async with bb.operation("search", beats=4):  # its progress is published on every beat
            with bb.move_on_after(2):  # two beats, however long they last
                await search()

`session` opens a `Session`, which has budgets (`BeatScope`), beats (`Beat`), operations
(`Operation`, `Phase`), claims (`StatusClaim`) and its own `Health`. `BackbeatConfig` has all
settings. `run` runs a program that SIGTERM may end. `Metronome` runs a metronome, on a `Transport`.
All errors are subclasses of `BackbeatError`. The module `backbeat_trio.testing` is for tests, and
the command ``backbeat demo`` shows a cluster at work.

For those who change the package: folders are layers, and imports point downwards only. From the
ground up:

===============  ===========================================================
`_version`       the version of this package
`_errors`        errors, and what a logger must have
`_wire`          the wire contract: messages, subjects and codecs
`_checks`        checks of arguments
`nats_server`    a nats-server of one's own
`_grid`          pure: the grid, cluster time, and whom an agent believes
`_config`        settings
`_time`          beats and budgets for Trio's tasks
`_transport`     NATS, and the bus inside a process
`_metronome`     following a leader, leading, and standing by
`_runtime`       what a session runs: operations, claims, health
`_calls`         messages that carry a caller's deadline, and cancelling from outside
`_session`       what an application calls, and how a session begins and ends
`_views`         what an operator sees of a cluster
`http`           HTTP requests that carry a caller's deadline
`metrics`        metrics for Prometheus
`tracing`        traces by OpenTelemetry
`serving`        probes and metrics over HTTP
`testing`        for tests of what uses this
`_cli`           the command line
===============  ===========================================================
"""

import signal as _signal
import sys as _sys
import threading as _threading
import typing as _typing
from importlib import reload as _reload

from ._version import __version__ as __version__

# The program `backbeat` imports this module before it runs any of its own lines. Until then Ctrl-C
# ends it without a traceback. In any other program Ctrl-C stays a `KeyboardInterrupt`. `backbeat`
# imports what a command needs by itself, which is little for `backbeat --version` and for the
# completion of a shell. Another program of that name gets all names by `__getattr__`.
_starts_program = (
    "_starts_program" not in globals()
    and "".join(getattr(_sys, "argv", ())[:1]).rpartition("/")[2] in ("backbeat", "-m")
    and _threading.current_thread() is _threading.main_thread()
    and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler
)
if _starts_program:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

if _typing.TYPE_CHECKING or not _starts_program:
    from ._calls.endpoint import Request as Request
    from ._calls.instrument import (
        Call as Call,
        Instrument as Instrument,
        Observed as Observed,
    )
    from ._calls.remaining import Remaining as Remaining
    from ._calls.requests import Response as Response
    from ._calls.service import Service as Service
    from ._config import BackbeatConfig as BackbeatConfig
    from ._errors import (
        AuthenticationFailed as AuthenticationFailed,
        BackbeatError as BackbeatError,
        BeatBudgetExceeded as BeatBudgetExceeded,
        CancelRefused as CancelRefused,
        ClaimsUnavailable as ClaimsUnavailable,
        ConfigError as ConfigError,
        InvalidTransition as InvalidTransition,
        Logger as Logger,
        MetronomeUnavailable as MetronomeUnavailable,
        NoResponders as NoResponders,
        OperationCancelled as OperationCancelled,
        OperationExists as OperationExists,
        OperationNotFound as OperationNotFound,
        PermissionDenied as PermissionDenied,
        ServiceError as ServiceError,
        SessionClosed as SessionClosed,
        TempoRefused as TempoRefused,
        TLSFailed as TLSFailed,
        TransportBroken as TransportBroken,
        TransportClosed as TransportClosed,
        TransportError as TransportError,
    )
    from ._metronome.metronome import (
        Metronome as Metronome,
        MetronomeStatistics as MetronomeStatistics,
    )
    from ._runtime.health import (
        Health as Health,
        PendingChange as PendingChange,
        SessionStatistics as SessionStatistics,
    )
    from ._runtime.operations import Operation as Operation, Phase as Phase
    from ._session.lifecycle import session as session
    from ._session.logs import BeatFilter as BeatFilter
    from ._session.run import run as run
    from ._session.session import (
        Session as Session,
        current_session as current_session,
        use_session as use_session,
    )
    from ._time.beats import Beat as Beat, Beats as Beats
    from ._time.scopes import BeatScope as BeatScope
    from ._transport.memory import MemoryBus as MemoryBus, MemoryTransport as MemoryTransport
    from ._transport.protocol import (
        Message as Message,
        Reply as Reply,
        Transport as Transport,
        TransportStatistics as TransportStatistics,
    )
    from ._transport.store import RecordRefused as RecordRefused
    from ._wire import Segment as Segment, StatusClaim as StatusClaim

if _starts_program:
    _signal.signal(_signal.SIGINT, _signal.default_int_handler)

if not _typing.TYPE_CHECKING and _starts_program:

    def __getattr__(name):
        names = {} if name.startswith("_") else vars(_reload(_sys.modules[__name__]))
        if name not in names:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return names[name]
