"""Downloading what a list of addresses names, where whoever wrote the list is not trusted.

A list can name anything: a cloud machine's metadata service, a router's page, a server that never stops sending. So:

- Only http and https are spoken.
- Every host is resolved here, and all of its addresses must be public.
- The connection goes to the very address that was checked, since a second resolution could answer otherwise.
- Each redirect is checked like the first address.
- Size and time are limited while bytes arrive.
- Nothing is sent but the request: no credentials, no cookies, and no proxy of the environment.
- What the server says of the content is not believed; decoding it tells.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

from megatron_gemini.building.timed_socket import TimedSocket
from megatron_gemini.modalities.bad_sample import BadSample, one_line

USER_AGENT = "megatron_gemini-build_shards/1"
OPT_OUT = {"noai", "noimageai", "none", "noindex"}
"""Words of the X-Robots-Tag header with which a site says that its pictures are not for this."""
_SAFE = "%/:=&?~#+!$,;'@()*[]"  # what stays as it is in a path or query
# Not compressed: a few bytes could become gigabytes before any limit sees them.
_HEADERS = {"User-Agent": USER_AGENT, "Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"}
_CHUNK = 64 * 1024
_REDIRECTS = (301, 302, 303, 307, 308)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, also seen through IPv6's ways of carrying IPv4."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if any(ip in network for network in _INTERNAL if network.version == ip.version):
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        # An address of the local network can hide in each of these.
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if int(ip) >> 32 & 0xFDFFFFFF == _ISATAP:  # of any network; a bit says whether the IPv4 address is unique
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
        if ip not in _GLOBAL_UNICAST:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_ISATAP = 0x00005EFE  # RFC 5214, section 6.1
# They count as public, and what answers there is the cloud that a machine is in, or nobody.
_INTERNAL = tuple(
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32",  # Azure's host
        "192.0.0.0/24",  # protocols; Oracle's metadata are at 192.0.0.192
        "192.88.99.0/24",  # relays from IPv6, given up (RFC 7526)
        "161.26.0.0/16",  # IBM's services for its own machines
        "166.8.0.0/14",
        "3fff::/20",  # documentation (RFC 9637), which older Pythons do not know
    )
)
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")


@dataclass(frozen=True)
class Address:
    """An address that was read and found in order. host: as it is looked up, in ASCII. host_header, target (path and
    query): as they are sent."""

    url: str
    scheme: str
    host: str
    port: int
    host_header: str
    target: str


@dataclass(frozen=True)
class Fetcher:
    """Limits: bytes of a file; seconds from first to last, with redirects; number of redirects.

    is_allowed: which IP addresses may be connected to.
    """

    max_bytes: int = 20_000_000
    seconds: float = 20.0
    redirects: int = 5
    is_allowed: Callable[[str], bool] = is_public

    def fetch(self, url: str) -> bytes:
        """The content of an address.

        Raises BadSample: url_scheme, url_invalid, url_credentials, url_port, host_unknown, host_not_public,
        redirect_loop, opted_out, http_<status>, fetch_too_large, fetch_encoded, fetch_truncated, fetch_timeout,
        fetch_failed.
        """
        deadline = time.monotonic() + self.seconds
        try:
            for _ in range(self.redirects + 1):
                data, url = self._once(read_address(url), deadline)
                if not url:
                    return data
        except TimeoutError:
            raise BadSample("fetch_timeout", f"not done within {self.seconds:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise BadSample("fetch_failed", one_line(error)) from None
        raise BadSample("redirect_loop", f"more than {self.redirects} redirects")

    def _once(self, address: Address, deadline: float) -> tuple[bytes, str]:
        """(content, ""), or (b"", the address that it redirects to)."""
        with self._connect(address, deadline) as connected:
            connection = http.client.HTTPConnection(address.host, address.port)
            connection.sock = connected  # it would only resolve and connect if it had none
            connection.request("GET", address.target, headers={"Host": address.host_header, **_HEADERS})
            with connection.getresponse() as response:
                self._check_opt_out(response)
                location = response.headers.get("Location")
                if response.status in _REDIRECTS and location:
                    return b"", _redirected(address.url, location)
                return self._body(response), ""

    def _connect(self, address: Address, deadline: float) -> TimedSocket:
        ips = resolve(address.host, address.port)
        # All of them, since whoever owns the name could put a private address beside a public one.
        for ip in ips:
            if not self.is_allowed(ip):
                raise BadSample("host_not_public", f"{address.host[:80]} is {ip}, which is not a public address")
        plain = socket.create_connection((ips[0], address.port), timeout=_left(deadline))
        try:
            if address.scheme == "https":
                plain.settimeout(_left(deadline))
                plain = ssl.create_default_context().wrap_socket(plain, server_hostname=address.host)
        except BaseException:
            plain.close()
            raise
        return TimedSocket(plain, deadline)

    @staticmethod
    def _check_opt_out(response: http.client.HTTPResponse) -> None:
        # The header may come several times, and with the name of a robot before the words.
        words = ",".join(response.headers.get_all("X-Robots-Tag", [])).replace(":", ",").lower().split(",")
        if {word.strip() for word in words} & OPT_OUT:
            raise BadSample("opted_out", "the site's X-Robots-Tag header says that it is not for this use")

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        if response.status != 200:
            raise BadSample(f"http_{response.status}", f"the server answers with status {response.status}")
        encodings = response.headers.get_all("Content-Encoding", [])
        if any(encoding.strip().lower() != "identity" for encoding in encodings):
            raise BadSample("fetch_encoded", "the server sends a compressed body, which was not asked for")
        declared = response.length  # None where the server does not say; it may lie, so that the bytes are counted too
        body = bytearray()
        while len(body) <= self.max_bytes and (declared or 0) <= self.max_bytes:
            chunk = response.read(_CHUNK)
            if not chunk:
                if declared is not None and len(body) < declared:
                    raise BadSample("fetch_truncated", f"{len(body):,} of {declared:,} bytes arrived")
                return bytes(body)
            body += chunk
        raise BadSample("fetch_too_large", f"more than {self.max_bytes:,} bytes")


def read_address(url: str) -> Address:
    """Take an address apart. Raises BadSample: url_scheme, url_invalid, url_credentials, url_port."""
    if any(ord(character) <= 32 or ord(character) == 127 for character in url) or "\\" in url or len(url) > 8192:
        raise BadSample("url_invalid", "it has spaces, control characters, a backslash or more than 8192 characters")
    try:
        parts = urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").encode("idna").decode("ascii")
        path, query = quote(parts.path or "/", _SAFE), quote(parts.query, _SAFE)
    except ValueError as error:  # half an emoji among them, which cannot be sent
        raise BadSample("url_invalid", one_line(error)) from None
    if parts.scheme not in ("http", "https"):
        raise BadSample("url_scheme", f"{parts.scheme[:20]!r} is not http or https")
    if "@" in parts.netloc:  # also a way to let one host look like another
        raise BadSample("url_credentials", "it carries a user name or password")
    if not host:
        raise BadSample("url_invalid", "it names no host")
    port = port if port is not None else (443 if parts.scheme == "https" else 80)
    if port < 1024 and port not in (80, 443):  # a request could be read as mail or as a command there
        raise BadSample("url_port", f"port {port} belongs to another service")
    shown = f"[{host}]" if ":" in host else host
    usual = {"http": 80, "https": 443}[parts.scheme]
    host_header = shown if port == usual else f"{shown}:{port}"
    return Address(url, parts.scheme, host, port, host_header, f"{path}?{query}" if query else path)


def _redirected(url: str, location: str) -> str:
    """Where a redirect leads. Raises BadSample: url_invalid."""
    try:
        # http.client reads headers as Latin-1, and what is not ASCII in them is UTF-8 today.
        return urljoin(url, location.encode("latin-1").decode("utf-8", "replace"))
    except ValueError as error:
        raise BadSample("url_invalid", f"it redirects to no address: {one_line(error)}") from None


def resolve(host: str, port: int) -> list[str]:
    """All IP addresses of a host. Raises BadSample: host_unknown."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise BadSample("host_unknown", one_line(error)) from None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
