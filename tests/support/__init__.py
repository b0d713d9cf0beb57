"""What tests are made of: a scripted upstream, a raw downstream, a started proxy. Real sockets only, nothing is mocked.

``wire``        a socket read by hand, and the little HTTP/1.1 that both ends of a test need
``serving``     what every upstream does with what was begun: keeps it for the test, or answers by itself
``upstream``    :class:`ScriptedUpstream`, driven by the test, and :class:`EchoUpstream`, which answers by itself
``h2_upstream`` :class:`H2Upstream`, an upstream that speaks HTTP/2
``h2_stream``   one request and its response there
``unreachable`` upstreams that refuse every connection, or leave it waiting
``downstream``  :class:`Downstream`, a client that sends and shows exact bytes
``http2``       :class:`Http2`, the same over HTTP/2, every frame of it the test's
``proxy``       a proxy on the test's own event loop, and what must be true once it is stopped
``strict``      h11 at both ends, for what no parser of ours should judge
``logs``        the guard that fails a test on a log line it did not expect
``fields``      fields of a head, as pairs
``flooding``    senders without end, and how much may be under way while nobody reads
``memory``      how many bytes of bodies are held
``declared``    which tests are skipped with a client that declares that it cannot do it
``certificates`` an authority of our own, and what it certified
``websocket``   a handshake by hand, and both ends of an open tunnel
``process``     the standalone proxy as a subprocess
``wrapped``     what tracers put in place of a method
``fixtures``    the pytest fixtures over all of these, loaded by ``tests/conftest.py``
"""

import pytest

# Before any import of these modules: pytest then explains their failed asserts as it does in a test module.
pytest.register_assert_rewrite("tests.support.logs", "tests.support.proxy", "tests.support.wire")
