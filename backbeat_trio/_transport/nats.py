"""The transport over NATS: a supervisor of a client that can be replaced.

To reconnect, the supervisor makes another client. So it need not rely on the old one, whose thread
may still be busy.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import re
import secrets
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, TypeVar, final

import trio

from .._config import PREFIX, BackbeatConfig
from .._errors import ConfigError, NoResponders, PermissionDenied, TransportBroken
from .._wire import beat_subject, recall_subject, status_subject, sync_subject, tempo_subject
from .base import BaseTransport, Mailbox, State
from .headers import encode_headers
from .nats_client import Client
from .nats_incoming import INBOX, Arrival
from .nats_outgoing import Departure, Publish, Subscribe, Unsubscribe
from .protocol import Answers, Message, Reply

# The first retry comes soon, because a restarted server is back within 20 ms. Later ones come less
# often, so that a server is not flooded.
_BACKOFF_MIN: Final = 0.01
_BACKOFF_MAX: Final = 1.0
# A connection that lasted for less than this many seconds counts as a failure.
_LASTING: Final = 1.0
# How many clients with threads that have not ended there may be; more are not made.
_UNENDED_CLIENTS: Final = 8
# The server's text for a refusal, and how many different refusals are counted.
_REFUSAL: Final = re.compile(r'permissions violation for (\w+) to "([^"]+)"')
_REFUSALS: Final = 64
# How long the part of a reply subject is that tells requests apart, and how many are drawn at once.
_TOKEN_BYTES: Final = 10
_TOKENS: Final = 64
_CREDENTIALS: Final = (b"BEGIN NATS USER JWT", b"BEGIN USER NKEY SEED")

T = TypeVar("T")

# How many times this process is the child of a fork. To ask for the process's id with each message
# would cost more than the message.
_forks = 0


def _note_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_note_fork)


@final
class Backoff:
    """The wait before each attempt to connect, which doubles after each failure.

    A connection that did not last counts as a failure, too. But such failures are counted apart
    from failed attempts, so that a server that restarts a few times in a row is reached quickly.
    """

    def __init__(self) -> None:
        self._first = self._next = _BACKOFF_MIN

    def lost(self, lasted: float) -> None:
        """Report that a connection was lost.

        Args:
          lasted: how long there was a connection, in seconds.

        """
        short = lasted < _LASTING
        self._first = min(2 * self._first, _BACKOFF_MAX) if short else _BACKOFF_MIN
        self._next = self._first

    def next_delay(self) -> float:
        """Return the longest wait before the next attempt, in seconds."""
        delay = self._next
        self._next = min(2 * delay, _BACKOFF_MAX)
        return delay


@final
class _Answers(Departure):
    """An async iterator of the answers to one request; see `Transport.open_request`."""

    # Requests are many, so this has no `trio.lowlevel.ParkingLot`, and one task waits at a time.
    __slots__ = ("_check_open", "_client", "_refusal", "_task", "arrived", "reply", "subject")

    def __init__(
        self, client: Client, subject: str, reply: str, check_open: Callable[[], None]
    ) -> None:
        self.stamp = 0
        self._client = client
        self._check_open = check_open
        self.subject = subject
        self.reply: str = reply
        self.arrived: list[tuple[Arrival, int]] = []
        """The answers that nobody has read, each with what to add to its time stamp."""
        self._refusal: PermissionDenied | None = None
        self._task: trio.lowlevel.Task | None = None

    def take(self, item: Arrival, behind_ns: int) -> None:
        """Queue an answer; ``behind_ns`` is added to its time stamps to get local time."""
        self.arrived.append((item, behind_ns))
        self.wake()

    def refuse(self, error: PermissionDenied) -> None:
        """Note that the server has refused the request."""
        self._refusal = error
        self.wake()

    def wake(self) -> None:
        """Wake the task that waits, so that it checks whether an answer can still come."""
        task, self._task = self._task, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    def __aiter__(self) -> _Answers:
        return self

    async def __anext__(self) -> Reply:
        if self.arrived:
            await trio.lowlevel.checkpoint()
        while not self.arrived:
            self.expect()
            await trio.lowlevel.wait_task_rescheduled(self.abort)
        return self.read()

    def expect(self) -> None:
        """Have the current task woken by what comes next, or raise why no answer can come."""
        self._check_open()
        client = self._client
        if client.lost.is_set():
            raise TransportBroken(str(client.error))
        denied = self._refusal or client.no_answers
        if denied is not None:
            raise PermissionDenied(str(denied))
        if self._task is not None:
            raise trio.BusyResourceError("another task waits for the answers to this request")
        self._task = trio.lowlevel.current_task()

    def abort(self, _: object) -> trio.lowlevel.Abort:
        """Let the task that waits be cancelled, unless an answer has arrived.

        If the loop was busy, a deadline and an answer that came before it are found in one turn.
        """
        self._client.incoming.drain()
        if self._task is None:
            return trio.lowlevel.Abort.FAILED
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED

    def read(self) -> Reply:
        """Return the first answer that has arrived."""
        item, behind_ns = self.arrived.pop(0)
        if item.status == "503":
            raise NoResponders(f"no process is subscribed to {self.subject}")
        return Reply(item.data, self.stamp + behind_ns, item.stamp + behind_ns, item.headers)


@final
class NatsTransport(BaseTransport):
    """The transport over NATS.

    Args:
      config: the servers, logins and certificates, and the inbox prefix.
      name: the name of the connection, as the server shows it; None for the default name.

    Raises:
      ConfigError: if certificates or credentials cannot be loaded.

    """

    def __init__(self, config: BackbeatConfig, *, name: str | None = None) -> None:
        super().__init__(inbox_prefix=config.inbox_prefix)
        self.connect_timeout = config.connect_timeout
        self.limiter = trio.CapacityLimiter(_UNENDED_CLIENTS)
        self._servers = config.servers
        self._agent_id, self._cluster_id = config.agent_id, config.cluster_id
        self._options = _options(config, name or f"backbeat {config.agent_id}")
        self._client: Client | None = None
        self._requests: dict[str, _Answers] = {}
        self._tokens: list[str] = []
        self._attempted = trio.Event()
        self._first_error: TransportBroken | None = None
        self._stop = trio.CancelScope()
        self._forks = _forks

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """See `Transport.run`."""
        self._check_open()
        task_status.started()
        try:
            with self._stop:
                async with trio.open_nursery() as nursery:
                    await self._supervise(nursery)
        finally:
            self._close()
            self._attempted.set()

    async def _supervise(self, nursery: trio.Nursery) -> None:
        backoff = Backoff()
        for attempt, server in enumerate(itertools.cycle(self._servers), 1):
            client = Client(self, server, self._options)
            try:
                await client.open()
            except TransportBroken as error:
                self._note_down(error)
                if attempt == len(self._servers) and not self.generation:
                    self._first_error = error
                    self._attempted.set()
            else:
                if self._state.value is State.CLOSED:
                    # A task has closed the transport since the connection was made.
                    return
                nursery.start_soon(client.outgoing.push)
                self._use(client)
                connected = trio.current_time()
                await client.lost.wait()
                backoff.lost(trio.current_time() - connected)
                self._note_down(_failure_of(client))
            finally:
                # In the background, because a client that hangs must not delay the next attempt.
                nursery.start_soon(client.close)
            delay = backoff.next_delay()
            await trio.sleep(random.uniform(delay / 2, delay))

    def _use(self, client: Client) -> None:
        self._client = client
        self.max_payload = client.max_payload
        self.generation += 1
        for number, mailbox in self._mailboxes.items():
            # Permissions may have changed meanwhile.
            mailbox.refusal = None
            client.outgoing.send(Subscribe(number, mailbox.subject, mailbox.queue))
        self._note_up()
        self._attempted.set()
        self._state.value = State.UP

    def client_lost(self, client: Client) -> None:
        """Report that the connection of a client was lost."""
        if client is not self._client:
            return
        self._client = None
        if self.connected:
            if not client.closing:
                # The tasks that wait for the loss will ask for the reason.
                self._note_down(_failure_of(client))
            self._state.value = State.DOWN
        self._wake_waiters()

    def _wake_waiters(self) -> None:
        for answers in self._requests.values():
            answers.wake()

    def _close(self) -> None:
        super()._close()
        self._wake_waiters()

    async def first_attempt(self) -> None:
        """See `Transport.first_attempt`."""
        await self._attempted.wait()
        if self._first_error is not None:
            raise self._first_error
        self._check_open()

    def _current(self) -> Client:
        self._check_open()
        return self._present()

    def _present(self) -> Client:
        # For those who have checked that the transport is open.
        if self._forks != _forks:
            raise TransportBroken(
                "the connection belongs to the process that this one was forked from"
            )
        if self._client is None:
            raise TransportBroken(self._last_error or "there is no connection yet")
        return self._client

    def _unsent_bytes(self) -> int:
        return 0 if self._client is None else self._client.outgoing.backlog

    def publish_nowait(
        self,
        subject: str,
        data: bytes,
        *,
        reply: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """See `Transport.publish_nowait`."""
        block = encode_headers(headers) if headers else b""
        self._check_message(subject, data, reply, block)
        self._present().outgoing.send(Publish(subject, data, reply, block, None))

    async def publish(
        self,
        subject: str,
        data: bytes,
        *,
        reply: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """See `Transport.publish`."""
        await trio.lowlevel.checkpoint()
        block = encode_headers(headers) if headers else b""
        self._check_message(subject, data, reply, block)
        client = self._current()
        await client.outgoing.wait_room()
        self._check_open()
        if client.lost.is_set():
            raise TransportBroken(str(client.error))
        client.outgoing.send(Publish(subject, data, reply, block, None))

    async def flush(self) -> None:
        """See `Transport.flush`."""
        await trio.lowlevel.checkpoint()
        await self._current().flush(next(self._numbers))

    async def request(
        self,
        subject: str,
        data: bytes,
        *,
        timeout: float,
        headers: Mapping[str, str] | None = None,
        abandoned: Callable[[str, BaseException], object] | None = None,
    ) -> Reply:
        """See `Transport.request`."""
        if timeout != math.inf:
            return await super().request(
                subject, data, timeout=timeout, headers=headers, abandoned=abandoned
            )
        token, answers = self._send_request(subject, data, headers)
        if abandoned is not None:
            self._abandoned[answers.reply] = abandoned
        try:
            # As `anext` does, at a lower cost.
            while not answers.arrived:
                answers.expect()
                await trio.lowlevel.wait_task_rescheduled(answers.abort)
            return answers.read()
        except BaseException as error:
            if not isinstance(error, Exception):
                self._abandon(answers.reply, error)
            raise
        finally:
            self._abandoned.pop(answers.reply, None)
            self._forget(token)

    @asynccontextmanager
    async def open_request(
        self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None
    ) -> AsyncGenerator[Answers, None]:
        """See `Transport.open_request`."""
        token, answers = self._send_request(subject, data, headers)
        try:
            yield answers
        finally:
            self._forget(token)

    def _send_request(
        self, subject: str, data: bytes, headers: Mapping[str, str] | None
    ) -> tuple[str, _Answers]:
        block = encode_headers(headers) if headers else b""
        self._check_message(subject, data, block=block)
        client, token = self._present(), self._next_token()
        if client.no_answers is not None:
            # Nothing is asked for an answer that cannot arrive.
            raise PermissionDenied(str(client.no_answers))
        reply = f"{client.inbox}.{token}"
        answers = self._requests[token] = _Answers(client, subject, reply, self._check_open)
        # If it is the only one, nothing is gained by waiting for others.
        client.outgoing.send(
            Publish(subject, data, reply, block, answers), at_once=len(self._requests) == 1
        )
        return token, answers

    def _forget(self, token: str) -> None:
        # What has arrived since its task was cancelled is late, too.
        self._late_replies += len(self._requests.pop(token).arrived)

    def _next_token(self) -> str:
        # Whoever answers one request could otherwise guess the subjects of others, and answer those
        # in the place of the metronome.
        if not self._tokens:
            drawn = secrets.token_hex(_TOKENS * _TOKEN_BYTES)
            places = range(0, len(drawn), 2 * _TOKEN_BYTES)
            self._tokens = [drawn[place : place + 2 * _TOKEN_BYTES] for place in places]
        return self._tokens.pop()

    async def call(self, function: Callable[[Any], Awaitable[T]]) -> T:
        """Call an async function with nats-py's client, in its thread. A checkpoint.

        Raises:
          TransportBroken: if it fails, or the connection is lost. It may have had its effect.

        """
        await trio.lowlevel.checkpoint()
        return await self._current().call(function)

    async def aclose(self) -> None:
        """See `Transport.aclose`."""
        self._stop.cancel()
        self._close()
        await trio.lowlevel.checkpoint()

    def _subscribe(self, number: int, mailbox: Mailbox) -> None:
        if self._client is not None:
            self._client.outgoing.send(Subscribe(number, mailbox.subject, mailbox.queue))

    def _unsubscribe(self, number: int, mailbox: Mailbox, *, keep: bool) -> None:
        if self._client is not None:
            self._client.outgoing.send(Unsubscribe(number, keep))

    # For the client.

    def dispatch(self, item: Arrival, behind_ns: int) -> None:
        """Pass on a message; ``behind_ns`` is added to its time stamps to get local time."""
        if item.number == INBOX:
            self._received += 1
            answers = self._requests.get(item.subject.rpartition(".")[2])
            if answers is None:
                self._late_replies += 1
            else:
                answers.take(item, behind_ns)
            return
        mailbox = self._mailboxes.get(item.number)
        if mailbox is not None:
            headers = item.headers
            self._deliver(
                mailbox,
                Message(
                    item.subject,
                    item.data,
                    item.reply,
                    item.stamp + behind_ns,
                    headers.get("Nats-Msg-Id", "") if headers else "",
                    headers,
                ),
            )

    def count_dropped(self, messages: int) -> None:
        """Count messages that arrived faster than the thread could pass them on."""
        self._dropped += messages

    def client_complained(self, client: Client, error: str) -> None:
        """Note an error that did not end the connection; fail the requests that it refuses."""
        if "permissions violation" in error.lower():
            refusal = _REFUSAL.search(error.lower())
            if refusal is not None:
                verb, subject = refusal[1], refusal[2]
                if verb == "subscription" and self._tell_mailboxes(subject):
                    return
                error = self._refuse(client, verb, subject)
            self._permission_errors += 1
        self.note_error(error)

    def _tell_mailboxes(self, subject: str) -> bool:
        # Return whether there are subscriptions to the subject, and the user can do without all.
        refused = [
            mailbox for mailbox in self._mailboxes.values() if mailbox.subject.lower() == subject
        ]
        for mailbox in refused:
            mailbox.refusal = self._denied("subscribe", mailbox.subject)
        return bool(refused) and all(mailbox.optional for mailbox in refused)

    def _refuse(self, client: Client, verb: str, subject: str) -> str:
        # Return the text to log. nats-py gives the subject in lower case.
        shown = subject if verb == "subscription" else _of_answers(subject)
        what = f"{verb} to {shown.lower()}"
        if what in self._refused or len(self._refused) < _REFUSALS:
            self._refused[what] += 1
        if verb == "subscription":
            if subject == f"{client.inbox}.*".lower():
                # Each connection has another inbox, so the text does not name it.
                text = (
                    f"permission denied: this user may not subscribe to {self._inbox_prefix}.>, "
                    "where answers to its requests come; set `inbox_prefix` "
                    f"({PREFIX}INBOX_PREFIX) to the one that the server's permissions allow "
                    "(see docs/security.md)"
                )
                client.no_answers = PermissionDenied(text)
                self._wake_waiters()
                return text
            return self._denied("subscribe", self._spelling(subject))
        text = self._denied("publish", _of_answers(self._spelling(subject)))
        for answers in self._requests.values():
            if answers.subject.lower() == subject:
                answers.refuse(PermissionDenied(text))
        return text

    def _denied(self, verb: str, subject: str) -> str:
        advice = ""
        if subject == status_subject(self._agent_id):
            advice = f"`agent_id` ({PREFIX}AGENT_ID) must be the one in the server's permissions; "
        elif subject in (beat_subject(self._cluster_id), sync_subject(self._cluster_id)):
            advice = f"`cluster_id` ({PREFIX}CLUSTER_ID) must be the one in them; "
        elif subject == recall_subject(self._cluster_id) and verb == "subscribe":
            advice = (
                f"a program that only observes needs `answer_recalls` ({PREFIX}ANSWER_RECALLS) "
                "to be false; "
            )
        return (
            f"permission denied: this user may not {verb} to {subject}; "
            f"{advice}docs/security.md says what each role may do"
        )

    def _spelling(self, subject: str) -> str:
        cluster_id = self._cluster_id
        known = [
            status_subject(self._agent_id),
            *(of(cluster_id) for of in (beat_subject, sync_subject, tempo_subject, recall_subject)),
            *(mailbox.subject for mailbox in self._mailboxes.values()),
            *(answers.subject for answers in self._requests.values()),
        ]
        return next((own for own in known if own.lower() == subject), subject)


def _of_answers(subject: str) -> str:
    # Each answer has a subject of its own, so the text and the count are those of all like it.
    first = subject.partition(".")[0]
    for prefix in ("_INBOX", "_R_"):
        if first.lower().startswith(prefix.lower()):
            return f"{prefix}{first[len(prefix) :]}.>"
    return subject


def _failure_of(client: Client) -> TransportBroken:
    error = client.error
    return error if isinstance(error, TransportBroken) else TransportBroken(str(error))


def _options(config: BackbeatConfig, name: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "name": name,
        "allow_reconnect": False,
        # How many bytes nats-py collects before it writes. By default it joins megabytes into one
        # piece of memory, and holds the GIL meanwhile.
        "pending_size": 128 * 1024,
        "connect_timeout": config.connect_timeout,
        "inbox_prefix": config.inbox_prefix,
        "user": config.user,
        "password": config.password,
        "token": config.token,
        "tls_handshake_first": config.tls_first,
    }
    if config.creds is not None or config.nkey is not None:
        try:
            import nkeys  # noqa: F401
        except ImportError:
            raise ConfigError(
                "`creds` and `nkey` need the nkeys extra: backbeat-trio[nkeys]"
            ) from None
    for field, option in (("creds", "user_credentials"), ("nkey", "nkeys_seed")):
        path = getattr(config, field)
        if path is None:
            continue
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"{field}={path!r}: cannot be read: {error.strerror}") from None
        # In a file without these, nats-py would search for ever.
        if field == "creds" and not all(part in text for part in _CREDENTIALS):
            raise ConfigError(f"{field}={path!r}: holds no JWT and its seed")
        options[option] = path
    if config.tls_ca or config.tls_cert or config.tls_first or "tls:" in config.nats_url:
        options["tls"] = _tls_context(config)
    return options


def _tls_context(config: BackbeatConfig) -> ssl.SSLContext:
    field, path = "tls_ca", config.tls_ca
    try:
        context = ssl.create_default_context(cafile=path)
        if config.tls_cert is not None:
            field, path = "tls_cert", config.tls_cert
            context.load_cert_chain(config.tls_cert, config.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{field}={path!r}: {error.strerror or error}") from None
    return context
