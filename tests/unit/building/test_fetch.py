"""The guarded fetcher against a server of our own. Names resolve to what a test says; nothing leaves the machine."""

import contextlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from types import SimpleNamespace
from typing import ClassVar

import pytest

from megatron_gemini.building import fetch, timed_socket
from megatron_gemini.building.fetch import Fetcher, is_public, read_address
from megatron_gemini.modalities.bad_sample import BadSample

BODY = b"\x89PNG picture" * 100


class Site(BaseHTTPRequestHandler):
    seen: ClassVar[list] = []  # (path, headers) of every request of a test

    def do_GET(self):
        self.seen.append((self.path, dict(self.headers)))
        getattr(self, self.path.split("?")[0].strip("/").replace("-", "_") or "picture")()

    def answer(self, status=200, body=BODY, **headers):
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def picture(self):
        self.answer(Content_Type="text/plain")

    def gone(self):
        self.answer(404)

    def loop(self):
        self.answer(302, b"", Location="/loop")

    def away(self):
        self.answer(302, b"", Location="//inner.test/secret")

    def to_file(self):
        self.answer(301, b"", Location="file:///etc/passwd")

    def once(self):
        self.answer(307, b"", Location="picture?x=1")

    def declared(self):
        self.answer(Content_Length=str(10**12))

    def endless(self):
        self.answer(body=b"", Content_Length=None)
        while True:
            self.wfile.write(b"x" * 10_000)

    def short(self):
        self.answer(body=b"abc", Content_Length="10")

    def zipped(self):
        self.answer(Content_Encoding="gzip")

    def optout(self):
        self.answer(X_Robots_Tag="otherbot: noindex, noai")

    def optout_later(self):
        self.send_response(200)
        for value in ("all", "max-snippet: 5", "noai"):
            self.send_header("X-Robots-Tag", value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def optout_and_away(self):
        self.answer(302, b"", Location="/picture", X_Robots_Tag="noai")

    def zipped_twice(self):
        self.send_response(200)
        for value in ("identity", "gzip"):
            self.send_header("Content-Encoding", value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def malformed(self):
        self.answer(302, b"", Location="http://[::1/x")

    def foreign(self):
        self.answer(302, b"", Location="/caf\xc3\xa9")

    def __getattr__(self, name):
        if name == "caf%C3%A9":
            return self.picture
        raise AttributeError(name)

    def drip_body(self):
        self.answer(body=b"", Content_Length="1000")
        self.drip(b"x")

    def drip_header(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        self.drip(b"y")

    def drip(self, byte):
        for _ in range(400):  # then the body has ended, which is another reason
            self.wfile.write(byte)
            time.sleep(0.01)

    def nonsense(self):
        self.wfile.write(b"SSH-2.0-OpenSSH\r\n")

    def handle(self):
        with contextlib.suppress(OSError):  # the fetcher hung up, as it should
            super().handle()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as site:
        site.daemon_threads, site.block_on_close = True, False
        threading.Thread(target=site.serve_forever, args=(0.02,), daemon=True).start()
        yield site.server_port
        site.shutdown()


@pytest.fixture
def names(monkeypatch):
    """What every name resolves to; looked-up names are counted, and a number resolves to itself."""
    table, lookups, real = {"site.test": ["127.0.0.1"], "inner.test": ["10.0.0.7"]}, [], socket.getaddrinfo

    def look_up(host, port, *arguments, **options):
        if host not in table:
            return real(host, port, *arguments, **{**options, "flags": socket.AI_NUMERICHOST})
        lookups.append(host)
        answer = table[host](len(lookups)) if callable(table[host]) else table[host]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in answer]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    Site.seen = []
    return table, lookups


def here(address: str) -> bool:
    """The test server counts as public; nothing else private does."""
    return address == "127.0.0.1" or is_public(address)


def reason(url: str, **options) -> str:
    with pytest.raises(BadSample) as caught:
        Fetcher(**{"is_allowed": here, "seconds": 5.0, "max_bytes": 50_000, **options}).fetch(url)
    return caught.value.reason


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.9.9.9",
        "10.0.0.1",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "192.0.2.1",
        "198.18.0.1",
        "::1",
        "::",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd00:ec2::254",
        "fec0::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::127.0.0.1",
        "2002:7f00:1::",
        "2002:a9fe:a9fe::1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "2001:db8::1",
        "2001:0:4136:e378:8000:63bf:80ff:fffe",
        "4000::1",
        "168.63.129.16",  # of Azure's host, to every machine on it
        "192.0.0.192",  # metadata of Oracle's cloud
        "192.0.0.9",
        "100.100.100.200",  # metadata of Alibaba's cloud
        "161.26.0.10",  # what IBM's cloud offers to its own machines
        "166.9.0.1",
        "192.88.99.1",
        "::ffff:168.63.129.16",
        "64:ff9b::a83f:8110",
        "2002:a83f:8110::1",
        "2001:db8:1::5efe:a00:1",
        "2606:4700::5efe:a00:1",
        "2606:4700::200:5efe:a9fe:a9fe",
        "fd20:ce::254",
        "fd00:42::42",
        "3fff::1",
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "8.8.8.8", "172.32.0.1", "168.63.129.17", "192.0.1.1", "2606:4700::1111", "::ffff:8.8.8.8"]
)
def test_addresses_that_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("file:///etc/passwd", "url_scheme"),
        ("ftp://site.test/x", "url_scheme"),
        ("gopher://site.test/x", "url_scheme"),
        ("data:image/png;base64,AAAA", "url_scheme"),
        ("//site.test/x", "url_scheme"),
        ("http://user:secret@site.test/", "url_credentials"),
        ("http://site.test@inner.test/", "url_credentials"),
        ("http://site.test:22/", "url_port"),
        ("http://site.test:99999/", "url_invalid"),
        ("http:///x", "url_invalid"),
        ("http://site.test/a b", "url_invalid"),
        ("http://site.test/\r\nX: y", "url_invalid"),
        ("http://site.test\\@inner.test/", "url_invalid"),
        ("http://[::1/", "url_invalid"),
        ("http://" + "a" * 70 + ".test/", "url_invalid"),
        ("http://site.test/" + "a" * 9000, "url_invalid"),
    ],
)
def test_addresses_that_are_refused_before_anything_is_looked_up(url, expected, names):
    assert reason(url) == expected
    assert names[1] == []


def test_what_is_sent_of_an_address():
    address = read_address("https://EXAMPLE.test:8443/süß/%20?q=ä&r=1#fragment")
    assert (address.host, address.port) == ("example.test", 8443)
    assert address.target == "/s%C3%BC%C3%9F/%20?q=%C3%A4&r=1"
    assert read_address("http://bücher.test").host == "xn--bcher-kva.test"


def test_a_picture_arrives_whatever_its_type_is_called(server, names):
    assert Fetcher(is_allowed=here).fetch(f"http://site.test:{server}/picture") == BODY
    assert Fetcher(is_allowed=here).fetch(f"http://site.test:{server}/once") == BODY
    assert [path for path, _ in Site.seen] == ["/picture", "/once", "/picture?x=1"]


def test_a_host_of_any_script_is_asked_by_its_ascii_name(server, names):
    for host, sent in {"пример.test": "xn--e1afmkfd.test", "bücher.test": "xn--bcher-kva.test"}.items():
        names[0][sent] = ["127.0.0.1"]
        assert Fetcher(is_allowed=here).fetch(f"http://{host}:{server}/picture") == BODY
        assert Site.seen[-1][1]["Host"] == f"{sent}:{server}"


def test_an_address_of_ipv6_keeps_its_brackets():
    assert read_address("http://[2606:4700::1111]/x").host_header == "[2606:4700::1111]"
    assert read_address("https://a.test:8443/x").host_header == "a.test:8443"
    assert read_address("https://a.test:443/x").host_header == "a.test"


def test_a_redirect_to_a_name_in_utf_8_is_followed(server, names):
    assert Fetcher(is_allowed=here).fetch(f"http://site.test:{server}/foreign") == BODY


def test_nothing_is_sent_but_the_request(server, names, monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine site.test login me password secret\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://inner.test:8080")
    assert Fetcher(is_allowed=here).fetch(f"http://site.test:{server}/picture") == BODY
    ((_, headers),) = Site.seen
    assert set(headers) == {"Host", "User-Agent", "Accept", "Accept-Encoding", "Connection"}
    assert headers["Host"] == f"site.test:{server}"
    assert set(names[1]) == {"site.test"}


@pytest.mark.parametrize(
    "url",
    ["http://inner.test/", "http://127.0.0.1/", "http://[::1]/", "http://2130706433/", "http://0x7f.1/", "http://0/"],
)
def test_private_addresses_are_refused_however_they_are_written(url, names, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("it connected"))
    assert reason(url, is_allowed=is_public) == "host_not_public"


def test_one_private_address_among_public_ones_is_enough_to_refuse(names):
    names[0]["mixed.test"] = ["1.1.1.1", "192.168.0.1"]
    assert reason("http://mixed.test/") == "host_not_public"


def test_a_name_is_resolved_once_and_the_checked_address_is_connected_to(server, names):
    """DNS rebinding: the first answer is harmless, every later one would be an inner machine."""
    names[0]["turns.test"] = lambda lookup: ["127.0.0.1"] if lookup == 1 else ["10.0.0.7"]
    assert Fetcher(is_allowed=here).fetch(f"http://turns.test:{server}/picture") == BODY
    assert names[1] == ["turns.test"]


def test_a_redirect_is_checked_like_the_first_address(server, names):
    assert reason(f"http://site.test:{server}/away") == "host_not_public"
    assert reason(f"http://site.test:{server}/to-file") == "url_scheme"
    assert reason(f"http://site.test:{server}/loop") == "redirect_loop"
    assert [path for path, _ in Site.seen] == ["/away", "/to-file", *["/loop"] * 6]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("gone", "http_404"),
        ("declared", "fetch_too_large"),
        ("endless", "fetch_too_large"),
        ("short", "fetch_truncated"),
        ("zipped", "fetch_encoded"),
        ("optout", "opted_out"),
        ("optout-later", "opted_out"),
        ("optout-and-away", "opted_out"),
        ("zipped-twice", "fetch_encoded"),
        ("malformed", "url_invalid"),
        ("nonsense", "fetch_failed"),
    ],
)
def test_answers_that_are_refused(path, expected, server, names):
    assert reason(f"http://site.test:{server}/{path}") == expected


@pytest.mark.parametrize("path", ["drip-body", "drip-header"])
def test_a_server_that_sends_a_byte_now_and_then_is_quarantined_in_time(path, server, names, monkeypatch):
    """By a clock on which every look takes a second: no byte, however soon it comes, puts the end off."""
    clock = count(1000)
    for module in (fetch, timed_socket):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    assert reason(f"http://site.test:{server}/{path}", seconds=40.0) == "fetch_timeout"
    assert next(clock) <= 1000 + 42


def test_an_unknown_host_and_a_closed_port_are_reasons(names, monkeypatch):
    assert reason("http://nowhere.test/") == "host_unknown"
    monkeypatch.setattr(fetch, "resolve", lambda *_: ["127.0.0.1"])
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert reason(f"http://site.test:{unused.getsockname()[1]}/") == "fetch_failed"
