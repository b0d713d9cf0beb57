"""``python -m tornado_proxy``: the proxy on its own; see :mod:`tornado_proxy.standalone`."""

from tornado_proxy.standalone import main

main()
