"""Requests of browsers to a program on loopback: `Host` and `Origin`."""

import pytest

from seed_multimodal.serving.origin import problem

# Host, Origin ("-": not sent, as by programs that are no browsers), allowed origins, what is done.
TABLE = """
localhost               -                               -                        answered
LOCALHOST:7890          HTTP://LocalHost:3000           -                        answered
localhost.:80           http://a.localhost              -                        answered
127.8.9.1               https://127.0.0.1:1             -                        answered
[::1]:7890              http://[::1]                    -                        answered
-                       http://[0:0:0:0:0:0:0:1]:80     -                        answered
-                       null                            null                     answered
seed.example            https://seed.example            https://SEED.example     answered
Seed.Example:443        -                               https://seed.example     answered
evil.example            https://evil.example            *                        answered
evil.example:7890       -                               https://seed.example     refused
localhost.evil.example  -                               -                        refused
127.0.0.1.evil.example  -                               -                        refused
evillocalhost           -                               -                        refused
localhost@evil.example  -                               -                        refused
evil.example@localhost  -                               -                        refused
localhost,evil.example  -                               -                        refused
localhost/evil.example  -                               -                        refused
://localhost            -                               -                        refused
http://localhost        -                               -                        refused
evil.example#.localhost -                               -                        refused
10.0.0.5:7890           -                               -                        refused
0.0.0.0:7890            -                               -                        refused
[::2]:80                -                               -                        refused
[                       -                               -                        refused
:                       -                               -                        refused
localhost               http://evil.example             https://evil.example     refused
localhost               http://localhost.evil.example   -                        refused
localhost               http://localhost@evil.example   -                        refused
localhost               http://evil.example@localhost   -                        refused
localhost               http://evil.example/localhost   -                        refused
localhost               http://localhost,http://a.b     -                        refused
localhost               http://evil.example://localhost -                        refused
localhost               http://evil.a#://localhost      -                        refused
localhost               http://evil.a?.localhost        -                        refused
localhost               http://evil.a,http://localhost  -                        refused
localhost               ://localhost                    -                        refused
localhost               localhost                       -                        refused
localhost               null                            https://seed.example     refused
localhost               https://seed.example:8443       https://seed.example     refused
"""


@pytest.mark.parametrize("row", TABLE.split("\n")[1:-1])
def test_requests_on_loopback(row):
    host, origin, allowed, action = (word.removeprefix("-") for word in row.split())
    headers = {"Host": host, "Origin": origin}
    for bound in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        sentence = problem(bound, headers, [allowed])
        assert sentence.endswith(".") if action == "refused" else sentence == ""
    # Where other machines reach the program, its names are not known.
    assert problem("0.0.0.0", headers) == problem("192.168.0.7", headers) == ""
