"""Who may use the dashboard: names of the host, origins of pages, the token, and logins.

A browser lets pages of other sites send requests here, and a name that an attacker owns may be made
to point here (DNS rebinding). So each request must name a known host, and what a page asks for must
come from the dashboard's own page. What changes the cluster needs the token as well.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
COOKIE: Final = "backbeat_login"
MIN_TOKEN: Final = 16

# A login ends when it has not been used for so many seconds, and the oldest ones give way.
_LOGIN_LASTS: Final = 12 * 3600.0
_MAX_LOGINS: Final = 100
# Wrong tokens that are looked at in a minute: from one address, and from all together.
_MAX_FAILURES: Final = 10
_MAX_ALL_FAILURES: Final = 100
_FAILURES_WITHIN: Final = 60.0
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}

ASGIScope = Mapping[str, Any]


class Problem(Exception):
    """A request is refused, or cannot be carried out.

    Attributes:
      status: the status of the response.
      detail: why, for people.
      headers: further headers of the response.

    """

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = dict(headers or {})


class Access:
    """Decides which requests are let in, and which of them may change the cluster.

    Args:
      hosts: names of the host beside those of the loopback interface, each with or without a port;
        IPv6 addresses in brackets.
      token: the token, of `MIN_TOKEN` characters or more; None turns off what changes the cluster.
      require_token: whether reading needs the token, too.
      clock: returns the time, in seconds.

    Raises:
      ValueError: if a name of a host or the token is not valid, or is missing.

    """

    def __init__(
        self,
        *,
        hosts: Iterable[str] = (),
        token: str | None = None,
        require_token: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        given = [_split_host(host) for host in hosts]
        self._hosts = {name for name, _ in given} | set(LOOPBACK)
        self._sites = {(name, port) for name, port in given if name not in LOOPBACK}
        if token is not None and len(token) < MIN_TOKEN:
            raise ValueError(f"the token has {len(token)} characters: {MIN_TOKEN} are needed")
        if require_token and token is None:
            raise ValueError("the token is required for reading, but there is none")
        self._token = None if token is None else _digest(token)
        self._require_token = require_token
        self._clock = clock
        self._logins: dict[bytes, float] = {}
        self._failures: list[tuple[float, str]] = []

    @property
    def has_token(self) -> bool:
        """Whether there is a token, so that the cluster can be changed from here."""
        return self._token is not None

    @property
    def requires_token(self) -> bool:
        """Whether reading needs the token, too."""
        return self._require_token

    # Hosts and origins.

    def check_site(self, scope: ASGIScope) -> None:
        """Raise unless a request names a known host and comes from no other site's page.

        Args:
          scope: the request.

        Raises:
          Problem: if it is refused.

        """
        headers = scope["headers"]
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        try:
            (given,) = hosts
            name, port = _split_host(given)
        except ValueError:
            raise Problem(400, "the request must have one valid Host header") from None
        if name not in self._hosts and not _arrived_at(name, scope):
            raise Problem(
                421, "this host name is not known here: `--allow-host` lets another one in"
            )
        origins = [value.decode("latin-1") for key, value in headers if key == b"origin"]
        if origins and not all(self._is_own(origin, name, port) for origin in origins):
            raise Problem(403, "requests from pages of other sites are refused")
        sites = {value.lower() for key, value in headers if key == b"sec-fetch-site"}
        if sites - {b"same-origin", b"none"} and not _is_navigation(scope):
            raise Problem(403, "requests from pages of other sites are refused")

    def _is_own(self, origin: str, name: str, port: int | None) -> bool:
        try:
            parts = urlsplit(origin)
            there = (parts.hostname or "", parts.port)
        except ValueError:
            return False
        default = _DEFAULT_PORTS.get(parts.scheme)
        if default is None or not there[0]:
            return False
        # A proxy that ends TLS passes on the name and port that its clients use, or says its own;
        # then the origin itself must be on the list.
        same = there[0] == name and (there[1] or default) == (port or default)
        listed = {(host, at or default) for host, at in self._sites}
        return same or (there[0], there[1] or default) in listed

    # The token.

    def check_reader(self, scope: ASGIScope) -> None:
        """Raise unless a request may read.

        Raises:
          Problem: if it may not.

        """
        if self._require_token:
            self._check_credentials(scope)

    def check_actor(self, scope: ASGIScope) -> None:
        """Raise unless a request may change the cluster.

        Raises:
          Problem: if it may not.

        """
        if self._token is None:
            raise Problem(
                403,
                "this dashboard only shows the cluster, because it was started without a token: "
                "see the option --token-file of 'backbeat dashboard'",
            )
        self._check_credentials(scope)

    def has_login(self, scope: ASGIScope) -> bool:
        """Return whether a request carries the cookie of a login."""
        now = self._clock()
        for value in _cookies(scope):
            key = _digest(value)
            used = self._logins.pop(key, None)
            if used is not None and now - used < _LOGIN_LASTS:
                # The logins are in the order of their last use.
                self._logins[key] = now
                return True
        return False

    def log_in(self, token: str, scope: ASGIScope) -> str:
        """Check a token, and return the value of the header that sets the cookie.

        Raises:
          Problem: if the token is wrong, or there is none.

        """
        if self._token is None:
            self.check_actor(scope)
        self._try(token, scope)
        now = self._clock()
        login = secrets.token_urlsafe(32)
        while len(self._logins) >= _MAX_LOGINS:
            del self._logins[next(iter(self._logins))]
        self._logins[_digest(login)] = now
        return f"{COOKIE}={login}; {self._attributes(scope)}; Max-Age={int(_LOGIN_LASTS)}"

    def log_out(self, scope: ASGIScope) -> str:
        """End the login of a request, and return the header that removes the cookie."""
        for value in _cookies(scope):
            self._logins.pop(_digest(value), None)
        return f"{COOKIE}=; {self._attributes(scope)}; Max-Age=0"

    def _attributes(self, scope: ASGIScope) -> str:
        # Behind a proxy that ends TLS only the origin of the page tells that it came over TLS.
        origin = dict(scope["headers"]).get(b"origin", b"")
        secure = scope["scheme"] == "https" or origin.startswith(b"https:")
        return "SameSite=Strict; HttpOnly; Path=/" + ("; Secure" if secure else "")

    def _check_credentials(self, scope: ASGIScope) -> None:
        if self.has_login(scope):
            return
        token = self._bearer(scope)
        if token is None:
            raise Problem(
                401,
                "log in with the token, or send it as 'Authorization: Bearer'",
                {"WWW-Authenticate": "Bearer"},
            )
        self._try(token, scope)

    def _bearer(self, scope: ASGIScope) -> str | None:
        for name, value in scope["headers"]:
            if name == b"authorization":
                kind, _, token = value.decode("latin-1").partition(" ")
                return token.strip() if kind.lower() == "bearer" else ""
        return None

    def _matches(self, token: str) -> bool:
        # Digests of the same length do not give away how long the token is.
        return self._token is not None and hmac.compare_digest(_digest(token), self._token)

    def _try(self, token: str, scope: ASGIScope) -> None:
        now, address = self._clock(), (scope.get("client") or ("",))[0]
        self._failures = [
            (at, where) for at, where in self._failures if now - at < _FAILURES_WITHIN
        ]
        own = [at for at, where in self._failures if where == address]
        everybody = [at for at, _ in self._failures]
        for failures, limit in ((own, _MAX_FAILURES), (everybody, _MAX_ALL_FAILURES)):
            if len(failures) >= limit:
                wait = int(failures[-limit] + _FAILURES_WITHIN - now) + 1
                raise Problem(
                    429,
                    f"too many wrong tokens: try again in {wait} s",
                    {"Retry-After": str(wait)},
                )
        if not self._matches(token):
            self._failures.append((now, address))
            raise Problem(401, "the token is wrong", {"WWW-Authenticate": "Bearer"})


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def _split_host(text: str) -> tuple[str, int | None]:
    """Return the name in lower case and the port of a Host header.

    Raises:
      ValueError: if it is not one.
    """
    parts = urlsplit(f"//{text}")
    bare = text.rpartition(":")[0] if parts.port is not None else text
    name = (parts.hostname or "").rstrip(".")
    if not name or bare.strip("[]").rstrip(".").lower() != name:
        raise ValueError(f"{text!r} is not the name of a host")
    return name, parts.port


def _arrived_at(name: str, scope: ASGIScope) -> bool:
    # Probes of Kubernetes and of load balancers use the address itself. A page of another site
    # cannot: a browser puts the site's name into the header.
    try:
        address = ipaddress.ip_address(name)
        return address == ipaddress.ip_address((scope.get("server") or ("",))[0])
    except ValueError:
        return False


def _is_navigation(scope: ASGIScope) -> bool:
    # Following a link to the page is harmless: no other page sees what comes.
    headers = dict(scope["headers"])
    return (
        scope["method"] in ("GET", "HEAD")
        and not scope["path"].startswith("/api/")
        and headers.get(b"sec-fetch-mode") == b"navigate"
    )


def _cookies(scope: ASGIScope) -> Iterable[str]:
    for name, value in scope["headers"]:
        if name == b"cookie":
            for cookie in value.decode("latin-1").split(";"):
                key, _, text = cookie.strip().partition("=")
                if key == COOKIE:
                    yield text
