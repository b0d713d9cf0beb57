"""Our own server, of HTTP/1.1 and HTTP/2, for any Tornado ``Application``, in place of ``tornado.httpserver``'s.

::

    from tornado_proxy.server import HTTPServer

    server = HTTPServer(application)
    server.listen(8888)

Nothing here knows the proxy.
"""

from tornado_proxy.server.http1 import HTTPServer

__all__ = ["HTTPServer"]
