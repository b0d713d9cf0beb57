"""heads: what is decided about heads as a whole."""

import pytest
from tornado.httputil import HTTPHeaders, HTTPServerRequest, RequestStartLine

from tornado_proxy.heads import takes_trailers


def request(version: str, *te: str) -> HTTPServerRequest:
    headers = HTTPHeaders({"Host": "front.example"})
    for value in te:
        headers.add("TE", value)
    return HTTPServerRequest(start_line=RequestStartLine("POST", "/", version), headers=headers)


class TestTakesTrailers:
    @pytest.mark.parametrize("te", [["trailers"], ["Trailers"], ["deflate;q=0.5, trailers"], ["gzip", "trailers"]])
    @pytest.mark.parametrize("version", ["HTTP/2.0", "HTTP/3"])
    def test_who_says_so(self, version, te):
        assert takes_trailers(request(version, *te))

    @pytest.mark.parametrize("te", [[], [""], ["deflate"], ["x-trailers"], ["trailers;q=0"]])
    def test_who_does_not(self, te):
        assert not takes_trailers(request("HTTP/2.0", *te))

    @pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/1.1"])
    def test_over_http_1_nobody_can_tell(self, version):
        assert not takes_trailers(request(version, "trailers"))
