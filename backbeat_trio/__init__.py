"""Budgets, beats and claims for Trio, on one metronome for a whole cluster.

Layers, from the bottom up; imports point downwards only:

====  =====================================  ======================================
0     `_errors`, `_wire`                     errors; the wire contract
1     `_timeline`, `_steering`, `_drift`     pure: the grid, cluster time, punctuality
1     `_grid`, `_follower`                   pure: where an agent is, and whom it believes
1     `_tempo`, `_operations`, `_config`     pure: changes of the grid, phases, settings
1     `server`                               a nats-server of one's own
2     `_clock`, `_transport`, `_ledger`      beats for tasks; the in-process bus; the record
3     `_nats`, `_nats_client`, `_jetstream`  NATS: the supervisor, one connection, what is stored
3     `_listener`, `_emitter`, `_services`   what a session runs
3     `_health`                              what a session tells of itself
3     `_metronome`, `_leader`, `_standby`    the metronome: its turns, leading, standing by
4     `_session`                             what an application does with a session
4     `_lifecycle`                           the nursery, start-up and shutdown
5     `testing`                              for tests of what uses this
6     `_demo`, `_cli`, `__main__`            the command line
====  =====================================  ======================================
"""

from ._clock import Beat as Beat, Beats as Beats, BeatScope as BeatScope
from ._config import BackbeatConfig as BackbeatConfig
from ._errors import (
    AuthenticationFailed as AuthenticationFailed,
    BackbeatError as BackbeatError,
    BeatBudgetExceeded as BeatBudgetExceeded,
    ConfigError as ConfigError,
    InvalidTransition as InvalidTransition,
    MetronomeUnavailable as MetronomeUnavailable,
    NoResponders as NoResponders,
    OperationExists as OperationExists,
    OperationNotFound as OperationNotFound,
    SessionClosed as SessionClosed,
    TempoRefused as TempoRefused,
    TLSFailed as TLSFailed,
    TransportBroken as TransportBroken,
    TransportClosed as TransportClosed,
    TransportError as TransportError,
)
from ._health import Health as Health, SessionStatistics as SessionStatistics
from ._lifecycle import session as session
from ._metronome import Metronome as Metronome, MetronomeStatistics as MetronomeStatistics
from ._operations import Operation as Operation, Phase as Phase
from ._services import Logger as Logger
from ._session import Session as Session, current_session as current_session
from ._transport import (
    MemoryBus as MemoryBus,
    MemoryTransport as MemoryTransport,
    Message as Message,
    Reply as Reply,
    Transport as Transport,
    TransportStatistics as TransportStatistics,
)
from ._wire import Segment as Segment, StatusClaim as StatusClaim

__version__ = "0.1.0"
