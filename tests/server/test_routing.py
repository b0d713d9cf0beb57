"""Our own server finds the handlers that Tornado finds, also where somebody has changed how they are found."""

from __future__ import annotations

import pytest
from tornado.routing import AnyMatches, Matcher, PathMatches, Router, Rule, RuleRouter
from tornado.web import Application, RequestHandler, _ApplicationRouter

GET = b"GET /a/b HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"


class Named(RequestHandler):
    """Says what it was given."""

    def initialize(self, **arguments):
        self.arguments = arguments

    def get(self, *groups):
        self.write(f"{self.arguments} {groups}")


class Given(RuleRouter):
    """Finds a handler by what the rule before it has for it."""

    application = Application()

    def find_handler(self, request, **parameters):
        return self.application.get_handler_delegate(request, Named, {"given": parameters})


class GivenApplication(Application):
    """As `Given`."""

    def find_handler(self, request, **parameters):
        return self.get_handler_delegate(request, Named, {"given": parameters})


class Guarded(Application):
    """Puts something before each handler."""

    def get_handler_delegate(self, request, target_class, target_kwargs=None, path_args=None, path_kwargs=None):
        return super().get_handler_delegate(request, target_class, {"guarded": True}, path_args, path_kwargs)


class Closed(RuleRouter):
    """Lets nobody through to what stands behind it."""

    def get_target_delegate(self, target, request, **parameters):
        return None


class ByMatcher(Matcher):
    """Has arguments for the handler."""

    def match(self, request):
        return {"target_kwargs": {"matched": request.path}}


def on_the_object():
    application = Application([("/a/(.*)", Named, {"asked": "rule"})])
    found = {"asked": "object"}
    application.find_handler = lambda request, **_: application.get_handler_delegate(request, Named, found)
    return application


def by_another_router():
    application = Application([("/a/(.*)", Named, {"asked": "rule"})])
    application.default_router = Given()
    return application


def by_host():
    application = Application([("/a/b", Named, {"host": "any"})], default_host="other")
    application.add_handlers("h", [("/a/(.*)", Named, {"host": "h"})])
    return application


FOUND = {
    "a rule": lambda: Application([("/a/(.*)", Named, {"x": 1})]),
    "an application behind a router": lambda: RuleRouter([Rule(AnyMatches(), Application([("/(a)/(b)", Named)]))]),
    "a router that finds nothing, and the next": lambda: Application([("/a.*", RuleRouter()), ("/a/(b)", Named)]),
    "another host": by_host,
    "nothing": lambda: Application([("/x", Named)]),
    "a default": lambda: Application(default_handler_class=Named, default_handler_args={"default": True}),
    "a matcher's arguments": lambda: Application([Rule(ByMatcher(), Named)]),
    "a router of one's own": lambda: RuleRouter([Rule(PathMatches("/(a)/(.*)"), Given(), {"x": 1})]),
    "an application of one's own": lambda: RuleRouter([Rule(PathMatches("/(?P<n>a)/.*"), GivenApplication())]),
    "another handler": lambda: Guarded([("/a/(.*)", Named, {"x": 1})]),
    "none for a router of one's own": lambda: Closed([Rule(AnyMatches(), Application([("/a/(.*)", Named)]))]),
    "a method on the object": on_the_object,
    "a router in the application's place": by_another_router,
}


class AskedTornado(Router):
    """Lets Tornado find."""

    def __init__(self, router):
        self.router = router

    def find_handler(self, request, **parameters):
        return self.router.find_handler(request, **parameters)


class TestFinding:
    @pytest.mark.parametrize("make", FOUND.values(), ids=FOUND)
    async def test_finds_what_tornado_finds(self, serve, expect_log, make):
        expect_log("404 GET /a/b", required=False)
        tornados = await serve(AskedTornado(make())).talk(GET)
        ours = await serve(make()).talk(GET)
        assert (ours.split()[1], ours.partition(b"\r\n\r\n")[2]) == (
            tornados.split()[1],
            tornados.partition(b"\r\n\r\n")[2],
        )

    async def test_asks_each_rule_once(self, serve, expect_log):
        asked = []

        class Asked(Matcher):
            def match(self, request):
                asked.append(request.path)

        expect_log("404 GET /a/b", required=False)
        assert b" 404 " in await serve(Application([Rule(Asked(), Named)])).talk(GET)
        assert asked == ["/a/b"]

    @pytest.mark.parametrize(
        ("owner", "name"),
        [
            (Application, "find_handler"),
            (Application, "get_handler_delegate"),
            (RuleRouter, "find_handler"),
            (_ApplicationRouter, "get_target_delegate"),
        ],
        ids=lambda value: value if isinstance(value, str) else value.__name__,
    )
    async def test_asks_who_stands_in_for_tornados_method(self, serve, monkeypatch, owner, name):
        """As tracers put themselves there, also while the server runs."""
        running = serve(Application([("/a/b", Named)]))
        asked = []
        tornados = getattr(owner, name)

        def stand_in(self, *args, **kwargs):
            asked.append(self)
            return tornados(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, stand_in)
        assert b" 200 OK" in await running.talk(GET)
        assert asked
