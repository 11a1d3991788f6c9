"""Requests of browsers to a program on loopback: `Host` and `Origin`."""

import pytest

from seed_multimodal.serving.origin import problem

PAGE = "https://seed.example.org"
LOCAL = (
    "localhost LOCALHOST:7890 localhost.:80 127.0.0.1:7890 127.8.9.1 [::1]:7890 a.localhost:3000"
)
STRANGE = (
    "evil.example evil.example:7890 localhost.evil.example 127.0.0.1.evil.example evillocalhost "
    "localhost@evil.example evil.example@localhost localhost,evil.example localhost/evil.example "
    "10.0.0.5:7890 [::2]:80 0.0.0.0:80 [ :"
)


@pytest.mark.parametrize("host", LOCAL.split())
def test_this_machine_is_answered(host):
    for bound in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        # Programs that are no browsers send no origin, some no host.
        for origin in ("", f"http://{host}", f"HTTPS://{host}"):
            assert problem(bound, host, origin) == problem(bound, "", origin) == ""


@pytest.mark.parametrize("strange", STRANGE.split())
def test_strangers_are_refused_on_loopback_only(strange):
    for host, origin in ((strange, ""), ("localhost", f"http://{strange}"), (strange, PAGE)):
        for origins in ((), [f"{PAGE}x", "null"]):
            assert repr(origin or host) in problem("127.0.0.1", host, origin, origins)
        assert problem("0.0.0.0", host, origin) == problem("192.168.0.7", host, origin) == ""


@pytest.mark.parametrize("origins", [[PAGE], "*", ["http://a.example", PAGE.upper()]])
def test_allowed_pages_and_their_hosts_are_answered(origins):
    for host in ("127.0.0.1:7890", "seed.example.org", "Seed.Example.org:443"):
        assert problem("127.0.0.1", host, PAGE, origins) == ""
    # The origin of a sandboxed frame or a file may be any page's.
    assert bool(problem("127.0.0.1", "localhost", "null", origins)) == (origins != "*")
