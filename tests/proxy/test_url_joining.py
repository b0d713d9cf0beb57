"""The request-target that the upstream sees, byte for byte."""

import pytest

from tornado_proxy import ProxyHandler


def case(prefix, base, inbound, outbound):
    return pytest.param(prefix, base, inbound, outbound, id=f"{prefix} + {base or 'nothing'} + {inbound}")


async def check(proxy, echo, prefix, base, inbound, outbound):
    running = await proxy(echo.url + base, prefix=prefix)
    response = await running.get(inbound)
    assert response.status == 200, response
    assert echo.requests[-1].target == outbound


TARGETS = ("prefix", "base", "inbound", "outbound")


class TestExactlyOneSlash:
    """Behaviour 9: base path and tail are joined with exactly one slash; a root request gains none."""

    @pytest.mark.parametrize(
        TARGETS,
        [
            case("/", "", "/", "/"),
            case("/", "/", "/", "/"),
            case("/", "", "/root_path", "/root_path"),
            case("/", "/", "/root_path", "/root_path"),
            case("/", "/base", "/root_path", "/base/root_path"),
            case("/", "/base/", "/root_path", "/base/root_path"),
            case("/foo", "", "/foo", "/"),
            case("/foo", "/", "/foo", "/"),
            case("/foo", "/", "/foo/x", "/x"),
            case("/foo", "/bar", "/foo/x", "/bar/x"),
            case("/foo", "/bar/", "/foo/x", "/bar/x"),
            case("/foo/", "/bar", "/foo/x", "/bar/x"),
        ],
    )
    async def test_joined(self, proxy, echo, prefix, base, inbound, outbound):
        await check(proxy, echo, prefix, base, inbound, outbound)


class TestTheWholeServer:
    """``OPTIONS *`` asks about no resource (RFC 9112 section 3.2.4): not about one that is called ``/*`` either."""

    @pytest.mark.parametrize("target", ["*", "http://front.example"])
    @pytest.mark.parametrize(
        ("base", "outbound"), [("", "*"), ("/", "*"), ("/bar", "/bar"), ("/bar/", "/bar/"), ("?k", "/?k")]
    )
    async def test_is_asked_for_as_such(self, proxy, echo, target, base, outbound):
        running = await proxy(echo.url + base)
        assert (await running.request("OPTIONS", target)).status == 200
        assert echo.requests[-1].start_line == f"OPTIONS {outbound} HTTP/1.1"

    async def test_is_not_meant_by_a_path_that_looks_so(self, proxy, echo):
        running = await proxy(echo.url)
        await running.request("OPTIONS", "/*")
        assert echo.requests[-1].target == "/*"


class TestTrailingSlash:
    """Behaviour 10: the downstream's trailing slash is kept, and none is added."""

    @pytest.mark.parametrize(
        TARGETS,
        [
            case("/", "", "/root_path/", "/root_path/"),
            case("/", "/base", "/root_path/", "/base/root_path/"),
            case("/foo", "/bar", "/foo", "/bar"),
            case("/foo", "/bar", "/foo/", "/bar/"),
            case("/foo", "/bar", "/foo/x/", "/bar/x/"),
            case("/foo", "/bar", "/foo/x", "/bar/x"),
        ],
    )
    async def test_kept(self, proxy, echo, prefix, base, inbound, outbound):
        await check(proxy, echo, prefix, base, inbound, outbound)


class TestTail:
    """Behaviour 11: only the path below the mount is used, percent-encoded as it was received."""

    @pytest.mark.parametrize(
        TARGETS,
        [
            case("/foo", "/bar", "/foo/a%2Fb?x=1", "/bar/a%2Fb?x=1"),
            case("/foo", "/bar", "/foo/a%2fb", "/bar/a%2fb"),
            case("/foo", "/bar", "/foo/%7Euser/%41", "/bar/%7Euser/%41"),
            case("/foo", "/bar", "/foo/%E2%82%AC/%zz/100%", "/bar/%E2%82%AC/%zz/100%"),
            case("/foo", "/bar", "/foo/a;b=c,d:e@f!g$h&i'(j)*k+l=m", "/bar/a;b=c,d:e@f!g$h&i'(j)*k+l=m"),
            # Empty segments are not collapsed.
            case("/foo", "/bar", "/foo//a", "/bar//a"),
            case("/foo", "/bar", "/foo/a//b//", "/bar/a//b//"),
            case("/", "", "//a", "//a"),
            # Dots that stay inside the base are not resolved.
            case("/foo", "/bar", "/foo/a/./b/../c", "/bar/a/./b/../c"),
            case("/foo", "/bar", "/foo/a/%2e%2e/c", "/bar/a/%2e%2e/c"),
            case("/", "", "/a?q=1?2/3&r", "/a?q=1?2/3&r"),
            case("/foo/deep", "/bar", "/foo/deep/x/foo/deep", "/bar/x/foo/deep"),
        ],
    )
    async def test_raw(self, proxy, echo, prefix, base, inbound, outbound):
        await check(proxy, echo, prefix, base, inbound, outbound)

    @pytest.mark.parametrize("inbound", ["/foobar", "/fo", "/", "/FOO/x", "/x/foo/"])
    async def test_what_is_not_below_the_mount_is_not_matched(self, proxy, echo, inbound):
        running = await proxy(echo.url, prefix="/foo")
        assert (await running.get(inbound)).status == 404
        assert echo.accepted == 0

    @pytest.mark.parametrize(
        "inbound",
        ["/foo/../secret", "/foo/%2e%2e/secret", "/foo/..%2fsecret", "/foo//../../secret", "/foo;/../secret"],
    )
    async def test_nothing_outside_the_base_is_reached(self, proxy, echo, inbound):
        running = await proxy(f"{echo.url}/bar", prefix="/foo")
        assert (await running.get(inbound)).status in (400, 404)
        assert echo.accepted == 0

    @pytest.mark.parametrize(
        ("pattern", "inbound", "outbound"),
        [
            (r"/foo(/.*)?", "/foo", "/bar"),
            (r"/foo(/.*)?", "/foo/a%2Fb?x=1", "/bar/a%2Fb?x=1"),
            (r"/foo/(.*)", "/foo/a%2Fb//c", "/bar/a%2Fb//c"),
            (r"/v[12](/.*)", "/v2/a", "/bar/a"),
            # Without a group, the whole path.
            (r"/foo/.*", "/foo/a%2Fb", "/bar/foo/a%2Fb"),
        ],
    )
    async def test_in_tornados_own_spelling_the_first_group_is_the_tail(self, proxy, echo, pattern, inbound, outbound):
        running = await proxy.app([(pattern, ProxyHandler, {"upstream": f"{echo.url}/bar"})])
        assert (await running.get(inbound)).status == 200
        assert echo.requests[-1].target == outbound


class TestUpstreamQuery:
    """Behaviour 12: the upstream's own query reaches it, and the downstream's follows: nothing is discarded."""

    @pytest.mark.parametrize(
        TARGETS,
        [
            case("/", "/root_upstream?query=yes", "/root_path", "/root_upstream/root_path?query=yes"),
            case("/", "?query=yes", "/", "/?query=yes"),
            case("/foo", "/bar?query=yes", "/foo", "/bar?query=yes"),
            case("/foo", "/bar?query=yes", "/foo?query=no&x=1", "/bar?query=yes&query=no&x=1"),
            case("/", "/base?k=%2F+a", "/x?k=%2f+b&&c&d=", "/base/x?k=%2F+a&k=%2f+b&&c&d="),
        ],
    )
    async def test_merged(self, proxy, echo, prefix, base, inbound, outbound):
        await check(proxy, echo, prefix, base, inbound, outbound)

    @pytest.mark.parametrize(
        "query", ["a=1&a=2&a=3", "a", "a=b=c", "%26=%3D", "q=%E2%82%AC", "&&", "a;b", "a[]=1&a[]=2"]
    )
    async def test_the_downstreams_query_passes_as_it_came(self, proxy, echo, query):
        running = await proxy(echo.url)
        await running.get(f"/x?{query}")
        assert echo.requests[-1].target == f"/x?{query}"


class TestEmptyQuery:
    """Behaviour 13: no ``?`` where there is no query."""

    @pytest.mark.parametrize(
        TARGETS,
        [
            case("/", "", "/", "/"),
            case("/", "/base", "/x", "/base/x"),
            case("/foo", "/bar", "/foo", "/bar"),
            case("/foo", "/bar?", "/foo", "/bar"),
        ],
    )
    async def test_none_is_invented(self, proxy, echo, prefix, base, inbound, outbound):
        await check(proxy, echo, prefix, base, inbound, outbound)
